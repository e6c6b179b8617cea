"""The data plane of hosts without network namespaces: one device, and packets that are rewritten.

    program's own c:cp ──▶ virtual v:vp ──▶ device ──▶ tun worker ──▶ device ──▶ virtual v:cp ──▶ own c:L

The host's own kernel is the TCP stack: L is the port of a listening socket on the interface's own address,
made for exactly (v, vp). Whoever accepts there sees v:cp as its peer, and knows from the socket which
(v, vp) it is.

The sockets take nothing that comes through another interface, so other machines cannot reach them. A
program of this machine can. As its peer a proxy sees the interface's own address then, which is not v, and
resets the connection. The DNS server answers: it would tell the same at the DNS address.
"""

import errno
import socket
from collections.abc import Sequence
from typing import Final

import msgspec

from ipc.messages import DataPlaneKind, Redirect
from supervisor import plane_sockets
from supervisor.dataplane import KeptLink
from supervisor.host_link import Host, HostLinkPlane, require_interface
from supervisor.plane_sockets import DNS_PORT


class RewritingDataPlane(HostLinkPlane):
    """See the module, and `HostLinkPlane` for how it is made."""

    kind: Final = DataPlaneKind.REWRITING

    @classmethod
    def adopt(cls, kept: KeptLink, host: Host) -> "RewritingDataPlane":
        """Goes on with the link of an earlier process; see `HostLinkPlane`."""
        return cls(kept.network, host, kept)

    @property
    def tun_descriptors(self) -> list[int]:
        return [self._outer.fileno()]

    @property
    def dns_redirects(self) -> Sequence[Redirect]:
        return [
            Redirect(
                address=address,
                port=DNS_PORT,
                local_port=end.getsockname()[1],
                is_udp=kind == socket.SOCK_DGRAM,
            )
            for (kind, address), end in zip(self._dns_plan(), self._dns_sockets, strict=True)
        ]

    def open_listener(self, address: bytes, port: int) -> socket.socket:  # noqa: ARG002  # the redirect says it
        listener = self._own_port(socket.SOCK_STREAM, address)
        plane_sockets.listen(listener)
        return listener

    def set_forwarded(self, networks: Sequence[str]) -> dict[str, OSError]:  # noqa: ARG002  # see DataPlane
        return {}

    def keep(self) -> KeptLink:
        return KeptLink(
            network=msgspec.structs.replace(self._network, ranges=list(self._ranges)),
            outer=self._outer.fileno(),
            inner=None,
            namespace=None,
            dns=tuple(self.dns_descriptors),
        )

    def _build(self) -> None:
        self._open_links()
        self._make_outer()
        self._set_up_outer()
        for kind, address in self._dns_plan():
            end = self._own_port(kind, address)
            plane_sockets.make_ready_for_dns(end)
            self._dns_sockets.append(self._own_socket(end))
        self._route_ranges()

    def _take(self, kept: KeptLink) -> None:
        self._own_outer(self._host.adopt_device(kept.outer))
        found = self._own_dns_sockets(kept.dns)
        self._dns_sockets = [
            plane_sockets.find(kind, self._own_address(address), None, found)
            for kind, address in self._dns_plan()
        ]
        self._open_links()
        require_interface(self._outer, self._network.interface)
        self._set_up_outer()
        self._route_kept_ranges()

    def _own_address(self, virtual: bytes) -> bytes:
        """The interface's own address of the same family. Raises OSError."""
        own = self._network.tun_ipv4 if len(virtual) == 4 else self._network.tun_ipv6
        if own is None:
            raise OSError(errno.EAFNOSUPPORT, "IPv6 is off")
        return own

    def _own_port(self, kind: socket.SocketKind, virtual: bytes) -> socket.socket:
        """A socket on a port that the kernel chooses, and that nobody else has."""
        end = plane_sockets.bound_socket(kind, self._own_address(virtual), 0, is_shared=False)
        try:
            self._host.restrict(end, self._network.interface)
        except OSError:
            end.close()
            raise
        return end

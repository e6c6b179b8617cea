"""The data plane with an inner network namespace (Linux).

    host's namespace                          inner namespace
    program ── outer TUN (.1, ::1)            lo: every virtual address is local
                  │                             │ listening sockets, DNS sockets
                  └──── tun worker ──── inner TUN (the way back to .1 and ::1, and to forwarded networks)

The supervisor owns all of it; workers borrow descriptors. A socket keeps the namespace it was made in,
so a proxy accepts on virtual addresses and dials from the host's network.
"""

import os
import socket
from collections.abc import Sequence
from ipaddress import ip_network
from typing import Final

import msgspec

from ipc.addresses import as_text
from ipc.messages import DataPlaneKind, Network, Redirect
from supervisor import devices, plane_sockets
from supervisor.dataplane import KeptLink
from supervisor.devices import Links, LinuxHost, TunDevice
from supervisor.exits import NotPermittedError
from supervisor.host_link import HostLinkPlane, require_interface
from supervisor.namespace import inside, make_network_namespace
from supervisor.network import ipv6_range
from supervisor.plane_sockets import DNS_PORT, LISTEN_BACKLOG

INNER_NAME: Final = "vnet-inner"


class NoNamespaceError(NotPermittedError):
    """A network namespace cannot be made here."""


class NamespaceDataPlane(HostLinkPlane):
    """See the module, and `HostLinkPlane` for how it is made."""

    kind: Final = DataPlaneKind.NAMESPACE
    dns_redirects: Final[tuple[Redirect, ...]] = ()

    def __init__(self, network: Network, kept: KeptLink | None = None) -> None:
        """Raises NoNamespaceError as well."""
        super().__init__(network, LinuxHost(), kept)

    @classmethod
    def adopt(cls, kept: KeptLink) -> "NamespaceDataPlane":
        """Goes on with the link of an earlier process; see `HostLinkPlane`."""
        return cls(kept.network, kept)

    @property
    def tun_descriptors(self) -> list[int]:
        return [self._outer.fileno(), self._inner.fileno()]

    def open_listener(self, address: bytes, port: int) -> socket.socket:
        with inside(self._namespace):
            listener = plane_sockets.bound_socket(socket.SOCK_STREAM, address, port, is_shared=True)
        plane_sockets.listen(listener)
        return listener

    def set_forwarded(self, networks: Sequence[str]) -> dict[str, OSError]:
        links = self._inner_links
        wanted = {str(ip_network(text)) for text in networks}
        failed: dict[str, OSError] = {}
        with inside(self._namespace):  # where the device has its name
            # Asked, because an earlier process may have routed others.
            routed = links.state_of(INNER_NAME).routes
            for gone in routed - wanted:
                links.remove_route(INNER_NAME, gone)
            for new in sorted(wanted - routed):
                try:
                    links.add_route(INNER_NAME, new)
                except OSError as error:
                    failed[new] = error
        return failed

    def keep(self) -> KeptLink:
        return KeptLink(
            network=msgspec.structs.replace(self._network, ranges=list(self._ranges)),
            outer=self._outer.fileno(),
            inner=self._inner.fileno(),
            namespace=self._namespace,
            dns=tuple(self.dns_descriptors),
        )

    def _enter(self, block: str) -> None:
        self._inner_links.add_local(block)

    def _leave(self, block: str) -> None:
        self._inner_links.remove_local(block)

    def _build(self) -> None:
        self._open_links()
        self._make_outer()
        try:
            self._own_namespace(make_network_namespace())
        except PermissionError as error:
            raise NoNamespaceError(
                "a network namespace cannot be made: CAP_SYS_ADMIN is needed; run as root"
                " (sudo vnet-supervisor)"
            ) from error
        except OSError as error:
            # The kernel has none, or a limit is reached (user.max_net_namespaces).
            raise NoNamespaceError(f"a network namespace cannot be made: {error}") from error
        with inside(self._namespace):
            self._open_inner_links()
            self._own_inner(devices.make_tun(INNER_NAME))
            self._set_up_inner()
            for kind, address in self._dns_plan():
                end = plane_sockets.bound_socket(
                    kind, address, DNS_PORT, is_shared=kind == socket.SOCK_STREAM
                )
                plane_sockets.make_ready_for_dns(end)
                self._dns_sockets.append(self._own_socket(end))
        self._set_up_outer()
        self._route_ranges()

    def _take(self, kept: KeptLink) -> None:
        assert kept.inner is not None, "it is a link of this kind"
        assert kept.namespace is not None, "it is a link of this kind"
        self._own_outer(TunDevice(kept.outer))
        self._own_inner(TunDevice(kept.inner))
        self._own_namespace(kept.namespace)
        found = self._own_dns_sockets(kept.dns)
        self._dns_sockets = [
            plane_sockets.find(kind, address, DNS_PORT, found) for kind, address in self._dns_plan()
        ]
        self._open_links()
        require_interface(self._outer, self._network.interface)
        with inside(self._namespace):
            self._open_inner_links()
            require_interface(self._inner, INNER_NAME)
            self._set_up_inner()
        self._set_up_outer()
        self._route_kept_ranges()

    def _open_inner_links(self) -> None:
        self._inner_links = Links()
        self._closing.callback(self._inner_links.close)

    def _own_inner(self, device: TunDevice) -> None:
        self._inner = device
        self._closing.callback(device.close)

    def _own_namespace(self, descriptor: int) -> None:
        self._namespace = descriptor
        self._closing.callback(os.close, descriptor)

    def _set_up_inner(self) -> None:
        network, links = self._network, self._inner_links
        for interface in ("all", "default", INNER_NAME):
            devices.write_setting(f"ipv4/conf/{interface}/rp_filter", "0")
        if network.ipv6_prefix is not None:
            # Where new namespaces begin without it; the host's own setting was looked at before.
            devices.write_setting("ipv6/conf/all/disable_ipv6", "0")
        devices.quiet_ipv6(INNER_NAME)
        devices.write_setting("core/somaxconn", str(LISTEN_BACKLOG))
        # Every SYN was admitted, so a full backlog is no attack; cookies would lose options.
        devices.write_setting("ipv4/tcp_syncookies", "0")
        links.bring_up("lo")
        links.bring_up(INNER_NAME, network.mtu)
        links.add_exception(INNER_NAME, network.tun_ipv4)
        if (block := ipv6_range(network)) and network.tun_ipv6:
            links.add_local(str(block))
            links.add_exception(INNER_NAME, network.tun_ipv6)
        if network.dns_ipv6:
            # ICMPv6 errors need an address to come from; that a range is local gives them none.
            links.add_address("lo", network.dns_ipv6)
        # The DNS addresses are local before the range is, because their sockets are bound next.
        links.add_local(f"{as_text(network.dns_ipv4)}/32")

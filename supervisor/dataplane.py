"""The kernel side of the data plane: two TUN devices and the inner network namespace.

    host's namespace                          inner namespace
    program ── outer TUN (.1, ::1)            lo: every virtual address is local
                  │                             │ listening sockets, DNS sockets
                  └──── tun worker ──── inner TUN (the way back to .1 and ::1)

The supervisor owns all of it; workers borrow descriptors. A socket keeps the namespace it was made in,
so a proxy accepts on virtual addresses and dials from the host's network.
"""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ipc.addresses import as_text
from ipc.messages import Network
from supervisor import devices
from supervisor.devices import Links, LinkState, TunDevice
from supervisor.exits import ConflictError, NotPermittedError, StartupError
from supervisor.namespace import inside, make_network_namespace
from supervisor.network import dns_addresses, ipv6_range

log = logging.getLogger(__name__)

INNER_NAME = "vnet-inner"
DNS_PORT = 53
# Connections whose SYN was admitted and that a proxy has not accepted yet; also what waits while a
# proxy is restarted.
LISTEN_BACKLOG = 1024
IPV6_FREEBIND = 78  # linux/in6.h; Python has no name for it
IP_FREEBIND = 15  # linux/in.h
# A local path has no bottleneck to probe for: BBR, a common default, costs a third of the speed.
CONGESTION_CONTROL = b"reno"
# Bursts of queries wait here while the dns worker is restarted.
DNS_RECEIVE_BYTES = 1 << 20


class LinkLostError(StartupError):
    """The interface was deleted or renamed while VNet ran: everything is to be made anew."""


class UnfitLinkError(Exception):
    """Descriptors of an earlier run that no data plane can be made of; the text says why."""


@dataclass(frozen=True, slots=True)
class KeptLink:
    """A data plane as descriptors, with which another process can go on while the link stays up.

    `dns` in any order. Whoever gets it owns the descriptors.
    """

    network: Network
    outer: int
    inner: int
    namespace: int
    dns: tuple[int, ...]

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.outer, self.inner, self.namespace, *self.dns)

    def close(self) -> None:
        """Gives it up; the link goes with the last copy."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class DataPlane(Protocol):
    """What the supervisor needs of a data plane, whichever way it is built."""

    @property
    def tun_descriptors(self) -> list[int]:
        """[outer device, inner device], for the tun worker."""
        ...

    @property
    def dns_descriptors(self) -> list[int]:
        """UDP sockets, then listening TCP sockets, IPv4 first; for the dns worker."""
        ...

    def open_listener(self, address: bytes, port: int) -> socket.socket:
        """A listening TCP socket on a virtual address. Raises OSError."""
        ...

    def set_ranges(self, ranges: list[str]) -> dict[str, OSError]:
        """Routes exactly these IPv4 ranges; returns those that could not be, and why."""
        ...

    @property
    def has_ipv6(self) -> bool:
        """Whether IPv6 works on the interface, as far as was seen when it was mended last."""
        ...

    def mend(self) -> list[str]:
        """Puts back what somebody has taken away: the interface up, its addresses, its routes.

        Returns what was missing, in words.

        Raises:
            LinkLostError: the interface is gone.
            OSError: something cannot be put back.
        """
        ...

    def keep(self) -> KeptLink:
        """Everything it is made of; the descriptors stay this one's."""
        ...

    def remove(self) -> None:
        """Removes everything, whoever else has copies of the descriptors."""
        ...

    def close(self) -> None:
        """Closes everything; what nobody else holds is gone then. Safe to call twice."""
        ...


class NamespaceDataPlane:
    """The data plane with an inner namespace (Linux)."""

    def __init__(self, network: Network, kept: KeptLink | None = None) -> None:
        """Makes devices, addresses, routes and DNS sockets; with `kept` see `adopt`.

        Raises:
            NotPermittedError: a capability or /dev/net/tun is missing.
            ConflictError: the interface or one of the addresses is taken.
        """
        self._network = network
        self._ranges: list[str] = []
        self._has_ipv6 = False
        self._closing = contextlib.ExitStack()
        try:
            if kept is None:
                self._build()
            else:
                self._take(kept)
        except OSError as error:
            if kept is None:
                self.close()
                raise StartupError(f"the data plane cannot be made: {error}") from error
            self.remove()
            raise UnfitLinkError(str(error)) from error
        except BaseException:
            self.close()
            raise

    @classmethod
    def adopt(cls, kept: KeptLink) -> "NamespaceDataPlane":
        """Goes on with the link of an earlier process; what it lacks is mended, what it has stays up.

        Raises:
            UnfitLinkError: it is beyond mending and was removed; its descriptors are closed.
        """
        return cls(kept.network, kept)

    @property
    def tun_descriptors(self) -> list[int]:
        return [self._outer.fileno(), self._inner.fileno()]

    @property
    def dns_descriptors(self) -> list[int]:
        return [end.fileno() for end in self._dns_sockets]

    def open_listener(self, address: bytes, port: int) -> socket.socket:
        with inside(self._namespace):
            listener = _bound_socket(socket.SOCK_STREAM, address, port)
        try:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION_CONTROL)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener.listen(LISTEN_BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener

    def set_ranges(self, ranges: list[str]) -> dict[str, OSError]:
        name, source = self._network.interface, self._network.tun_ipv4
        for gone in [old for old in self._ranges if old not in ranges]:
            self._outer_links.remove_route(name, gone)
            self._inner_links.remove_local(gone)
            self._ranges.remove(gone)
        failed: dict[str, OSError] = {}
        for new in [wanted for wanted in ranges if wanted not in self._ranges]:
            try:
                self._inner_links.add_local(new)
                self._outer_links.add_route(name, new, source)
            except OSError as error:
                failed[new] = error
            else:
                self._ranges.append(new)
        return failed

    @property
    def has_ipv6(self) -> bool:
        return self._has_ipv6

    def mend(self) -> list[str]:
        network, links = self._network, self._outer_links
        name = network.interface
        try:
            _require_interface(self._outer, name)
        except OSError as error:
            raise LinkLostError(
                f"the interface {name} was deleted or renamed by another program: start VNet again"
            ) from error
        missing = []
        state = links.state_of(name)
        if not state.is_up:
            missing.append("it was down")
            links.bring_up(name, network.mtu)
            # It has taken routes and addresses along.
            state = links.state_of(name)
        if as_text(network.tun_ipv4) not in state.addresses:
            missing.append(f"the address {as_text(network.tun_ipv4)} was gone")
            links.add_address(name, network.tun_ipv4)
        for text in self._ranges:
            if text not in state.routes:
                # Somebody else may have put another in its place, which is theirs to remove.
                with contextlib.suppress(FileExistsError):
                    links.add_route(name, text, network.tun_ipv4)
                    missing.append(f"the route {text} was gone")
        return missing + self._mend_ipv6(state)

    def _mend_ipv6(self, state: LinkState) -> list[str]:
        block, address = ipv6_range(self._network), self._network.tun_ipv6
        if not block or not address:
            return []
        has_address, has_route = as_text(address) in state.addresses, str(block) in state.routes
        if has_address and has_route:
            return []
        if has_route:
            # With the address the kernel has taken its source from it.
            self._outer_links.remove_route(self._network.interface, str(block))
        had_ipv6 = self._has_ipv6
        self._set_up_ipv6()
        is_back = had_ipv6 and self._has_ipv6
        return [f"the address or the route of {block} was gone"] if is_back else []

    def keep(self) -> KeptLink:
        return KeptLink(
            network=msgspec.structs.replace(self._network, ranges=list(self._ranges)),
            outer=self._outer.fileno(),
            inner=self._inner.fileno(),
            namespace=self._namespace,
            dns=tuple(self.dns_descriptors),
        )

    def remove(self) -> None:
        devices.delete_interface(self._outer)
        self.close()

    def close(self) -> None:
        self._closing.close()

    def _build(self) -> None:
        self._outer_links = self._own_links()
        self._refuse_taken_addresses()
        self._outer = self._own_device(devices.make_tun(self._network.interface))
        try:
            self._namespace = make_network_namespace()
        except PermissionError as error:
            raise NotPermittedError(
                "a network namespace cannot be made: CAP_SYS_ADMIN is needed; run as root"
                " (sudo vnet-supervisor)"
            ) from error
        self._closing.callback(os.close, self._namespace)
        with inside(self._namespace):
            self._inner_links = self._own_links()
            self._inner = self._own_device(devices.make_tun(INNER_NAME))
            self._set_up_inner()
            self._dns_sockets = [
                self._own_socket(_dns_socket(kind, address)) for kind, address in self._dns_plan()
            ]
        self._set_up_outer()
        self._route_ranges()

    def _take(self, kept: KeptLink) -> None:
        # All are owned before anything can fail.
        self._outer = self._own_device(TunDevice(kept.outer))
        self._inner = self._own_device(TunDevice(kept.inner))
        self._namespace = kept.namespace
        self._closing.callback(os.close, kept.namespace)
        found = [self._own_socket(end) for end in map(_as_socket, kept.dns) if end is not None]
        self._dns_sockets = [_find(kind, address, found) for kind, address in self._dns_plan()]
        self._outer_links = self._own_links()
        _require_interface(self._outer, self._network.interface)
        with inside(self._namespace):
            self._inner_links = self._own_links()
            _require_interface(self._inner, INNER_NAME)
            self._set_up_inner()
        self._set_up_outer()
        failed = self.set_ranges(self._network.ranges)
        for text, reason in failed.items():
            # A range of a cluster is asked for again; without its own there is no VNet.
            if text == self._network.ranges[0]:
                raise reason
            log.warning("the range %s cannot be routed any more: %s", text, reason)

    def _route_ranges(self) -> None:
        for text, reason in self.set_ranges(self._network.ranges).items():
            if isinstance(reason, FileExistsError):
                raise ConflictError(
                    f"the range {text} is routed to another interface: set network.ipv4_cidr_range"
                ) from reason
            raise reason

    def _own_links(self) -> Links:
        links = Links()
        self._closing.callback(links.close)
        return links

    def _own_device(self, device: TunDevice) -> TunDevice:
        self._closing.callback(device.close)
        return device

    def _own_socket(self, end: socket.socket) -> socket.socket:
        self._closing.callback(end.close)
        return end

    def _refuse_taken_addresses(self) -> None:
        taken = self._outer_links.addresses()
        own = (self._network.tun_ipv4, self._network.dns_ipv4)
        for address in own:
            if address in taken:
                raise ConflictError(
                    f"the address {as_text(address)} is taken: set network.ipv4_cidr_range"
                )
        # Its prefix is random and kept in the state directory, so only another VNet can have it.
        if self._network.tun_ipv6 in taken:
            raise ConflictError(
                f"the address {as_text(self._network.tun_ipv6)} is taken: another VNet runs with"
                " this state directory; set --state-dir"
            )

    def _set_up_inner(self) -> None:
        network, links = self._network, self._inner_links
        for interface in ("all", "default", INNER_NAME):
            devices.write_setting(f"ipv4/conf/{interface}/rp_filter", "0")
        if network.ipv6_prefix is not None:
            # Where new namespaces begin without it; the host's own setting was looked at before.
            devices.write_setting("ipv6/conf/all/disable_ipv6", "0")
        _quiet_ipv6(INNER_NAME)
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

    def _set_up_outer(self) -> None:
        network, links = self._network, self._outer_links
        _quiet_ipv6(network.interface)
        links.bring_up(network.interface, network.mtu)
        links.add_address(network.interface, network.tun_ipv4)
        self._set_up_ipv6()

    def _set_up_ipv6(self) -> None:
        """IPv6 of the outer device; somebody may have switched it off there, which is no failure."""
        network, links = self._network, self._outer_links
        block, address = ipv6_range(network), network.tun_ipv6
        if not block or not address:
            return
        try:
            links.add_address(network.interface, address)
            links.add_route(network.interface, str(block), address)
        except OSError:
            self._has_ipv6 = False
        else:
            self._has_ipv6 = True

    def _dns_plan(self) -> list[tuple[socket.SocketKind, bytes]]:
        return [
            (kind, address)
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)
            for address in dns_addresses(self._network)
        ]


def _dns_socket(kind: socket.SocketKind, address: bytes) -> socket.socket:
    end = _bound_socket(kind, address, DNS_PORT)
    try:
        if kind == socket.SOCK_STREAM:
            end.listen(LISTEN_BACKLOG)
        else:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, DNS_RECEIVE_BYTES)
    except OSError:
        end.close()
        raise
    return end


def _as_socket(descriptor: int) -> socket.socket | None:
    """A socket that owns the descriptor, which is closed if it is none."""
    try:
        end = socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        return None
    end.setblocking(False)
    return end


def _find(kind: socket.SocketKind, address: bytes, ends: Sequence[socket.socket]) -> socket.socket:
    """The DNS socket on this address, listening if it is a stream. Raises OSError."""
    for end in ends:
        is_fit = end.type == kind and end.getsockname()[:2] == (as_text(address), DNS_PORT)
        accepts = end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if is_fit and bool(accepts) == (kind == socket.SOCK_STREAM):
            return end
    raise OSError(errno.ENOTSOCK, f"the socket of the DNS address {as_text(address)} is missing")


def _require_interface(device: TunDevice, name: str) -> None:
    """Checks that the device is the interface of this name here. Raises OSError."""
    if device.name() != name:
        raise OSError(errno.ENODEV, f"the interface {name} is called {device.name()} now")
    socket.if_nametoindex(name)


def _bound_socket(kind: socket.SocketKind, address: bytes, port: int) -> socket.socket:
    version6 = len(address) == 16
    end = socket.socket(socket.AF_INET6 if version6 else socket.AF_INET, kind)
    try:
        end.setblocking(False)
        if version6:
            end.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
            end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        else:
            end.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        if kind == socket.SOCK_STREAM:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.bind((as_text(address), port))
    except OSError:
        end.close()
        raise
    return end


def _quiet_ipv6(interface: str) -> None:
    """Keeps the kernel from talking on the device: no link-local address, no solicitations."""
    devices.write_setting(f"ipv6/conf/{interface}/addr_gen_mode", "1")
    devices.write_setting(f"ipv6/conf/{interface}/accept_ra", "0")
    devices.write_setting(f"ipv6/conf/{interface}/router_solicitations", "0")

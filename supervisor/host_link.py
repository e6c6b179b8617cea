"""VNet's interface in the host's network, which every data plane has: device, addresses, routes.

What differs from system to system stands behind `Host`; `supervisor.devices` is that of Linux.
"""

import contextlib
import errno
import logging
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ipc.addresses import as_text
from ipc.messages import Network
from supervisor import plane_sockets
from supervisor.dataplane import KeptLink, LinkLostError, UnfitLinkError
from supervisor.exits import ConflictError, StartupError
from supervisor.network import dns_addresses, ipv6_range

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkState:
    """One interface: its addresses, and what is routed into it, as text."""

    is_up: bool
    addresses: frozenset[str]
    routes: frozenset[str]


class Device(Protocol):
    """A TUN device behind a descriptor of ours; the interface goes with the last such descriptor."""

    def fileno(self) -> int: ...

    def close(self) -> None:
        """Safe to call twice."""
        ...

    def name(self) -> str:
        """The name of its interface. Raises OSError: it is gone, or this is no such device."""
        ...


class HostLinks(Protocol):
    """Interfaces, addresses and routes of the host. Everything raises OSError."""

    def close(self) -> None: ...

    def addresses(self) -> set[bytes]:
        """All packed addresses that this host has."""
        ...

    def state_of(self, name: str) -> LinkState: ...

    def bring_up(self, name: str, mtu: int | None = None) -> None: ...

    def add_address(self, name: str, address: bytes) -> None:
        """Adds one packed address without a subnet; no error if the interface has it."""
        ...

    def add_route(self, name: str, destination: str, source: bytes) -> None:
        """Routes a range into the interface, programs taking `source` for their own address.

        Raises FileExistsError where it is routed to another; not if it is routed here.
        """
        ...

    def remove_route(self, name: str, destination: str) -> None:
        """No error if there is none."""
        ...


class Host(Protocol):
    """What a data plane asks of the operating system."""

    @property
    def has_family_header(self) -> bool:
        """Whether its devices have the address family before each packet (4 bytes)."""
        ...

    def open_links(self) -> HostLinks: ...

    def make_device(self, name: str) -> Device:
        """A non-blocking device; the system may choose another name.

        Raises:
            NotPermittedError: a right or a kernel module is missing.
            ConflictError: the name is taken.
        """
        ...

    def adopt_device(self, descriptor: int) -> Device:
        """The device behind the descriptor, which is taken over; nothing is checked."""
        ...

    def delete_interface(self, device: Device) -> None:
        """Removes the interface, whoever else has copies of the descriptor."""
        ...

    def quiet(self, interface: str) -> None:
        """Keeps the kernel from talking on the interface by itself, as far as it can be told."""
        ...

    def restrict(self, end: socket.socket, interface: str) -> None:
        """Keeps what comes through other interfaces away from a socket. Raises OSError."""
        ...


class HostLinkPlane(ABC):
    """What data planes share: the outer device with its addresses and routes, and how all of it ends."""

    def __init__(self, network: Network, host: Host, kept: KeptLink | None = None) -> None:
        """Makes devices, addresses, routes and DNS sockets.

        With `kept` it goes on with the link of an earlier process, and owns its descriptors: what that
        lacks is mended, what it has stays up.

        Raises:
            NotPermittedError: a right or a kernel module is missing.
            ConflictError: the interface or one of the addresses is taken.
            UnfitLinkError: what was kept is beyond mending and was removed; its descriptors are closed.
        """
        self._network = network
        self._host = host
        self._ranges: list[str] = []
        self._dns_sockets: list[socket.socket] = []
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

    @abstractmethod
    def _build(self) -> None:
        """Makes everything anew."""

    @abstractmethod
    def _take(self, kept: KeptLink) -> None:
        """Goes on with what is there. All of it is owned before anything can fail."""

    @property
    def has_family_header(self) -> bool:
        return self._host.has_family_header

    @property
    def dns_descriptors(self) -> list[int]:
        return [end.fileno() for end in self._dns_sockets]

    def set_ranges(self, ranges: list[str]) -> dict[str, OSError]:
        name, source = self._network.interface, self._network.tun_ipv4
        for gone in [old for old in self._ranges if old not in ranges]:
            self._links.remove_route(name, gone)
            self._leave(gone)
            self._ranges.remove(gone)
        failed: dict[str, OSError] = {}
        for new in [wanted for wanted in ranges if wanted not in self._ranges]:
            try:
                self._enter(new)
                self._links.add_route(name, new, source)
            except OSError as error:
                failed[new] = error
            else:
                self._ranges.append(new)
        return failed

    @property
    def has_ipv6(self) -> bool:
        return self._has_ipv6

    def mend(self) -> list[str]:
        network, links = self._network, self._links
        name = network.interface
        try:
            require_interface(self._outer, name)
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
            self._links.remove_route(self._network.interface, str(block))
        had_ipv6 = self._has_ipv6
        self._set_up_ipv6()
        is_back = had_ipv6 and self._has_ipv6
        return [f"the address or the route of {block} was gone"] if is_back else []

    def remove(self) -> None:
        self._host.delete_interface(self._outer)
        self.close()

    def close(self) -> None:
        self._closing.close()

    # -- for the ways to build it --

    def _enter(self, block: str) -> None:  # noqa: B027  # few have something to do
        """A range is about to be routed. May raise OSError."""

    def _leave(self, block: str) -> None:  # noqa: B027  # few have something to do
        """A range is routed no more. May raise OSError."""

    def _open_links(self) -> None:
        self._links = self._host.open_links()
        self._closing.callback(self._links.close)

    def _make_outer(self) -> None:
        """Makes the device, once it is sure that nobody else has the addresses."""
        self._refuse_taken_addresses()
        self._own_outer(self._host.make_device(self._network.interface))
        name = self._outer.name()
        if name != self._network.interface:
            self._network = msgspec.structs.replace(self._network, interface=name)

    def _own_outer(self, device: Device) -> None:
        self._outer = device
        self._closing.callback(device.close)

    def _own_socket(self, end: socket.socket) -> socket.socket:
        self._closing.callback(end.close)
        return end

    def _own_dns_sockets(self, descriptors: Sequence[int]) -> list[socket.socket]:
        """Those of a kept link, whatever they are; what is no socket is closed."""
        ends = [plane_sockets.as_socket(descriptor) for descriptor in descriptors]
        return [self._own_socket(end) for end in ends if end is not None]

    def _set_up_outer(self) -> None:
        network, links = self._network, self._links
        self._host.quiet(network.interface)
        links.bring_up(network.interface, network.mtu)
        links.add_address(network.interface, network.tun_ipv4)
        self._set_up_ipv6()

    def _route_ranges(self) -> None:
        """Of a new link."""
        for text, reason in self.set_ranges(self._network.ranges).items():
            if isinstance(reason, FileExistsError):
                raise ConflictError(
                    f"the range {text} is routed to another interface: set network.ipv4_cidr_range"
                ) from reason
            raise reason

    def _route_kept_ranges(self) -> None:
        """Of an earlier link."""
        failed = self.set_ranges(self._network.ranges)
        for text, reason in failed.items():
            # A range of a cluster is asked for again; without its own there is no VNet.
            if text == self._network.ranges[0]:
                raise reason
            log.warning("the range %s cannot be routed any more: %s", text, reason)

    def _dns_plan(self) -> list[tuple[socket.SocketKind, bytes]]:
        """Kind and DNS address of each DNS socket, in their order."""
        return [
            (kind, address)
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)
            for address in dns_addresses(self._network)
        ]

    def _refuse_taken_addresses(self) -> None:
        taken = self._links.addresses()
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

    def _set_up_ipv6(self) -> None:
        """IPv6 of the outer device; somebody may have switched it off there, which is no failure."""
        network, links = self._network, self._links
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


def require_interface(device: Device, name: str) -> None:
    """Checks that the device is the interface of this name here. Raises OSError."""
    if device.name() != name:
        raise OSError(errno.ENODEV, f"the interface {name} is called {device.name()} now")
    socket.if_nametoindex(name)

"""macOS as a `supervisor.host_link.Host`: utun devices, addresses and routes by ifconfig and route."""

import contextlib
import logging
import socket
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final

from supervisor.host_link import Device, LinkState
from supervisor.macos import commands, output
from supervisor.macos.commands import Command
from supervisor.macos.run import Run, run
from supervisor.macos.utun import UtunDevice, make_utun

log = logging.getLogger(__name__)

# netinet/in.h, netinet6/in6.h of XNU: the socket sends through the interface of this index alone.
IP_BOUND_IF: Final = 25
IPV6_BOUND_IF: Final = 125


class MacLinks:
    """As `supervisor.host_link.HostLinks`; what is there already is left as it is."""

    def __init__(self, execute: Run = run) -> None:
        self._execute = execute

    def close(self) -> None:
        """Nothing is open."""

    def addresses(self) -> set[bytes]:
        found = output.read_interfaces(self._execute(commands.show_interfaces()))
        return {ip_address(text).packed for interface in found for text in interface.addresses}

    def state_of(self, name: str) -> LinkState:
        return output.link_state(
            name,
            self._execute(commands.show_interfaces(name)),
            self._execute(commands.show_routes(4)),
            self._execute(commands.show_routes(6)),
        )

    def bring_up(self, name: str, mtu: int | None = None) -> None:
        *size, up = commands.bring_up(name, mtu)
        try:
            self._run_all(size)
        except OSError as error:
            # Smaller packets only cost speed.
            log.warning("%s keeps its MTU: %s", name, error)
        self._run_all([up])

    def add_address(self, name: str, address: bytes) -> None:
        present = self.state_of(name).addresses
        self._run_all(commands.add_address(name, address, present))

    def add_route(self, name: str, destination: str, source: bytes) -> None:  # noqa: ARG002  # the only one
        present = self.state_of(name).routes
        self._run_all(commands.add_route(name, destination, present))

    def remove_route(self, name: str, destination: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._run_all(commands.remove_route(name, destination, self.state_of(name).routes))

    def _run_all(self, wanted: Iterable[Command]) -> None:
        for command in wanted:
            self._execute(command)


class MacHost:
    """See the module."""

    has_family_header: Final = True

    def __init__(self, execute: Run = run) -> None:
        self._execute = execute

    def open_links(self) -> MacLinks:
        return MacLinks(self._execute)

    def make_device(self, name: str) -> UtunDevice:
        return make_utun(name)

    def adopt_device(self, descriptor: int) -> UtunDevice:
        return UtunDevice(descriptor)

    def delete_interface(self, device: Device) -> None:
        """Takes it down: nobody but the last holder of a descriptor can delete a utun interface."""
        with contextlib.suppress(OSError):
            self._execute(commands.take_down(device.name()))

    def quiet(self, interface: str) -> None:
        """There are no settings for it; what the kernel sends itself is dropped by tun."""

    def restrict(self, end: socket.socket, interface: str) -> None:
        """Has it send through the interface alone; whom it takes from, XNU does not let it choose.

        A program that connects past the interface has an own address, and the proxy refuses that.
        """
        index = socket.if_nametoindex(interface)
        if end.family == socket.AF_INET6:
            end.setsockopt(socket.IPPROTO_IPV6, IPV6_BOUND_IF, index)
        else:
            end.setsockopt(socket.IPPROTO_IP, IP_BOUND_IF, index)

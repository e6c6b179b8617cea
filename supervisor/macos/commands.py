"""Command lines of ifconfig(8), route(8) and netstat(1) of macOS. Pure.

route does not tell by its exit status whether it has changed anything, so what it prints is read
(`supervisor.macos.output`).
"""

import ipaddress
from typing import Final

from ipc.addresses import as_text

IFCONFIG: Final = "/sbin/ifconfig"
ROUTE: Final = "/sbin/route"
NETSTAT: Final = "/usr/sbin/netstat"

Command = list[str]


def bring_up(name: str, mtu: int | None) -> list[Command]:
    """Sets the MTU, if one is given, and has the interface up."""
    size = [] if mtu is None else [[IFCONFIG, name, "mtu", str(mtu)]]
    return [*size, [IFCONFIG, name, "up"]]


def take_down(name: str) -> Command:
    """Nothing is sent to the interface any more."""
    return [IFCONFIG, name, "down"]


def add_address(name: str, address: bytes, present: frozenset[str]) -> list[Command]:
    """Adds one address without a subnet; nothing if it is `present` already.

    The interface is point-to-point: its other end is the same address, since nobody is there.
    """
    text = as_text(address)
    if text in present:
        return []
    if len(address) == 16:
        return [[IFCONFIG, name, "inet6", text, "prefixlen", "128", "alias"]]
    return [[IFCONFIG, name, "inet", text, text, "netmask", "255.255.255.255", "alias"]]


def add_route(name: str, destination: str, present: frozenset[str]) -> list[Command]:
    """Routes a range into the interface; nothing if it is among those that are `present` there."""
    return [] if _written(destination) in present else [_route("add", name, destination)]


def remove_route(name: str, destination: str, present: frozenset[str]) -> list[Command]:
    """The other way round."""
    return [_route("delete", name, destination)] if _written(destination) in present else []


def show_interfaces(name: str = "") -> Command:
    """One interface, or all."""
    return [IFCONFIG, name] if name else [IFCONFIG, "-a"]


def show_routes(version: int) -> Command:
    """The routing table of one version of IP, without names."""
    return [NETSTAT, "-rn", "-f", "inet6" if version == 6 else "inet"]


def ask_route(address: bytes) -> Command:
    """Where packets to an address go."""
    family = "-inet6" if len(address) == 16 else "-inet"
    return [ROUTE, "-n", "get", family, as_text(address)]


def _route(action: str, name: str, destination: str) -> Command:
    block = ipaddress.ip_network(destination)
    if block.version == 6:
        where = ["-inet6", str(block.network_address), "-prefixlen", str(block.prefixlen)]
    else:
        where = ["-inet", "-net", str(block)]
    return [ROUTE, "-n", action, *where, "-interface", name]


def _written(destination: str) -> str:
    return str(ipaddress.ip_network(destination))

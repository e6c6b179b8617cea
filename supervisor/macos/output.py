"""What ifconfig(8), netstat(1) and route(8) of macOS print, read. Pure.

netstat leaves out octets that are zero at the end: 100.64/10, 192.168.1, 127. Of its flags count (netstat(1)):
H a single host, C neighbours are found directly, R and B refused, W made of another route, I only for who
has bound the interface.
"""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final

from supervisor.host_link import LinkState
from supervisor.osconfig.route_conflicts import (
    MAIN,
    HostRoutes,
    Route,
    RouteKind,
    Rule,
    RuleAction,
)

_INTERFACE: Final = re.compile(r"(\S+): flags=[0-9a-f]+<([^>]*)> mtu (\d+)")
_ADDRESS: Final = re.compile(r"\s+inet6? ([0-9A-Fa-f.:]+)(?:%\S+)?(?:\s|$)")
_FIELD: Final = re.compile(r"(?m)^\s*interface: (\S+)\s*$")
_BROADCAST: Final = IPv4Network("255.255.255.255")
# There is one table, and every packet asks it.
_ONE_TABLE: Final = (Rule(priority=0, action=RuleAction.TABLE, target=MAIN),)


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface of `ifconfig`; addresses as text, without a zone."""

    name: str
    is_up: bool
    mtu: int
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TableRoute:
    """One line of `netstat -rn`."""

    destination: IPv4Network | IPv6Network
    gateway: str
    flags: str
    interface: str


def read_interfaces(text: str) -> list[Interface]:
    """Of `ifconfig`, with or without `-a`; what is not understood is passed over."""
    found: list[Interface] = []
    for line in text.splitlines():
        if match := _INTERFACE.match(line):
            flags = match[2].split(",")
            found.append(Interface(match[1], "UP" in flags, int(match[3]), ()))
        elif found and (match := _ADDRESS.match(line)):
            try:
                address = str(ip_address(match[1]))
            except ValueError:
                continue
            last = found[-1]
            found[-1] = Interface(last.name, last.is_up, last.mtu, (*last.addresses, address))
    return found


def read_routes(text: str) -> list[TableRoute]:
    """Of `netstat -rn -f inet` or `-f inet6`; older versions have more columns."""
    found = []
    columns: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["Destination"]:
            columns = words
        elif columns and len(words) > columns.index("Netif"):
            is_version6 = ":" in words[0] or (words[0] == "default" and ":" in words[1])
            destination = _destination(words[0], words[2], is_version6=is_version6)
            if destination is not None:
                place = columns.index("Netif")
                found.append(TableRoute(destination, words[1], words[2], words[place]))
    return found


def link_state(name: str, interfaces: str, routes: str, routes6: str) -> LinkState:
    """What one interface has.

    Raises:
        OSError: there is no such interface.
    """
    found = next((i for i in read_interfaces(interfaces) if i.name == name), None)
    if found is None:
        raise OSError(errno.ENXIO, f"there is no interface {name}")
    listed = [*read_routes(routes), *read_routes(routes6)]
    return LinkState(
        is_up=found.is_up,
        addresses=frozenset(found.addresses),
        routes=frozenset(
            str(route.destination)
            for route in listed
            if route.interface == name and not _is_of_few(route)
        ),
    )


def host_routes(interfaces: str, routes: str) -> HostRoutes:
    """Routes and addresses as `supervisor.osconfig.route_conflicts` judges them, IPv4."""
    addresses = [
        (interface.name, IPv4Address(text))
        for interface in read_interfaces(interfaces)
        for text in interface.addresses
        if ":" not in text
    ]
    own = [
        Route(IPv4Network(address), interface=name, kind=RouteKind.LOCAL)
        for name, address in addresses
    ]
    return HostRoutes(
        routes=(*own, *_judged(read_routes(routes))),
        rules=_ONE_TABLE,
        addresses=tuple(addresses),
    )


def interface_of(text: str) -> str:
    """Where `route get` says that packets go; empty if it says nothing of it."""
    match = _FIELD.search(text)
    return match[1] if match else ""


def route_error(text: str) -> OSError | None:
    """Why `route add` or `route delete` has done nothing, by what it has printed; None if it has."""
    for said, number in (
        ("File exists", errno.EEXIST),
        ("not in table", errno.ESRCH),
        ("No such process", errno.ESRCH),
        ("Network is unreachable", errno.ENETUNREACH),
        ("must be root", errno.EPERM),
        ("Operation not permitted", errno.EPERM),
        ("bad address", errno.EINVAL),
        ("Invalid argument", errno.EINVAL),
    ):
        if said in text:
            return OSError(number, os.strerror(number))
    return None


def _judged(listed: list[TableRoute]) -> Iterator[Route]:
    for route in listed:
        if not isinstance(route.destination, IPv4Network) or _is_of_few(route):
            continue
        if route.destination.is_multicast or route.destination == _BROADCAST:
            continue
        is_host = route.destination.prefixlen == 32
        refuses = bool(set("RB") & set(route.flags))
        yield Route(
            destination=route.destination,
            interface=route.interface,
            kind=RouteKind.REFUSING if refuses else RouteKind.UNICAST,
            is_neighbourhood="C" in route.flags and not is_host and not refuses,
            gateway=_gateway(route.gateway),
        )


def _is_of_few(route: TableRoute) -> bool:
    return bool(set("WI") & set(route.flags))


def _gateway(text: str) -> IPv4Address | None:
    try:
        return IPv4Address(text)
    except ValueError:
        return None


def _destination(text: str, flags: str, *, is_version6: bool) -> IPv4Network | IPv6Network | None:
    try:
        if is_version6:
            host, _, length = ("::/0" if text == "default" else text).partition("/")
            return IPv6Network((host.partition("%")[0], int(length or 128)), strict=False)
        if text == "default":
            return IPv4Network("0.0.0.0/0")
        host, _, length = text.partition("/")
        octets = host.split(".")
        missing = 4 - len(octets)
        whole = ".".join([*octets, *["0"] * missing])
        default = 32 if "H" in flags or not missing else 8 * len(octets)
        found = ip_network((whole, int(length or default)), strict=False)
    except ValueError:
        return None
    return found

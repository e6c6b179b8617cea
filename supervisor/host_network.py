"""The host's routes, rules and addresses as the kernel tells them, and when they change (rtnetlink(7)).

Everything belongs to the network namespace it was made in, and nothing waits for anybody but the kernel.
"""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network, ip_address
from typing import Any, Final

from supervisor.osconfig.route_conflicts import HostRoutes, Route, RouteKind, Rule, RuleAction
from supervisor.way import Way

if sys.platform == "linux":
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

# linux/rtnetlink.h: RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR, _IPV6_ROUTE,
# _IPV6_IFINFO, and the bits of RTNLGRP_IPV4_NETCONF and RTNLGRP_IPV6_NETCONF.
GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x800 | 1 << 23 | 1 << 24
_RECEIVE_BYTES: Final = 1 << 16
# Messages that are thrown away in one go; what is left wakes the loop again.
_READS: Final = 200
# A table that changes while it is read is read again, this often at most.
_ATTEMPTS: Final = 5

# linux/rtnetlink.h, linux/fib_rules.h
_RTPROT_KERNEL: Final = 2
_RT_SCOPE_LINK: Final = 253
_RTM_F_CLONED: Final = 0x200
_ROUTE_KINDS: Final[Mapping[int, RouteKind]] = {
    1: RouteKind.UNICAST,
    2: RouteKind.LOCAL,
    3: RouteKind.LOCAL,
    4: RouteKind.LOCAL,
    6: RouteKind.REFUSING,
    7: RouteKind.REFUSING,
    8: RouteKind.REFUSING,
    9: RouteKind.THROW,
}
_RULE_ACTIONS: Final[Mapping[int, RuleAction]] = {
    1: RuleAction.TABLE,
    2: RuleAction.GOTO,
    6: RuleAction.REFUSE,
    7: RuleAction.REFUSE,
    8: RuleAction.REFUSE,
}
_FIB_RULE_INVERT: Final = 0x2
_ALL_BITS: Final = 0xFFFFFFFF
# Selectors of sockets that are not ordinary; one that has no name yet is taken for such.
_SPECIAL: Final = (
    "FRA_L3MDEV", "FRA_SPORT_RANGE", "FRA_DPORT_RANGE", "FRA_IP_PROTO", "FRA_TUN_ID", "FRA_FLOW",
)  # fmt: skip


class Monitor:
    """Says that something of the host's network has changed, not what."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            self._socket.setblocking(False)
            self._socket.bind((0, GROUPS))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def has_heard(self) -> bool:
        """Takes what has come; whether there was anything, messages that were lost included."""
        has_heard = False
        for _ in range(_READS):
            try:
                self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError:
                # ENOBUFS: the kernel had more to say than there was room for. Whatever it is, a look at
                # everything makes up for it.
                return True
            has_heard = True
        return has_heard

    def close(self) -> None:
        self._socket.close()


class HostNetwork:
    """Asks the kernel. Everything raises OSError."""

    def __init__(self) -> None:
        self._netlink = IPRoute()

    def close(self) -> None:
        self._netlink.close()

    def read(self) -> HostRoutes:
        """Routes of all tables, rules and addresses, IPv4."""
        names = dict(socket.if_nameindex())
        inet = {"family": socket.AF_INET}
        return HostRoutes(
            routes=tuple(
                _route(message, names)
                for message in self._list(lambda: self._netlink.get_routes(**inet))
                if not message["flags"] & _RTM_F_CLONED
            ),
            rules=tuple(map(_rule, self._list(lambda: self._netlink.get_rules(**inet)))),
            addresses=tuple(
                (names.get(message["index"], ""), IPv4Address(text))
                for message in self._list(lambda: self._netlink.get_addr(**inet))
                if (text := message.get("IFA_LOCAL") or message.get("IFA_ADDRESS"))
            ),
        )

    def way_to(self, address: bytes) -> Way:
        """Where a packet without mark, socket and source goes (RTM_GETROUTE)."""
        family = socket.AF_INET6 if len(address) == 16 else socket.AF_INET
        try:
            answers = list(self._netlink.route("get", dst=str(ip_address(address)), family=family))
        except NetlinkError as error:
            return Way("", os.strerror(error.code))
        index = answers[0].get("RTA_OIF") if answers else None
        if index is None:
            return Way("", "no route")
        with contextlib.suppress(OSError):
            return Way(socket.if_indextoname(index))
        return Way("", "its interface is gone")

    def _list(self, dump: Callable[[], Any]) -> list[Any]:
        for _ in range(_ATTEMPTS):
            try:
                return list(dump())
            except NetlinkDumpInterrupted:
                continue
            except NetlinkError as error:
                raise OSError(error.code, os.strerror(error.code)) from error
        raise OSError(errno.EAGAIN, "it changes while it is read")


def read_host() -> HostRoutes:
    """Routes, rules and addresses, read once. Raises OSError."""
    kernel = HostNetwork()
    try:
        return kernel.read()
    finally:
        kernel.close()


def _network(text: str | None, length: int) -> IPv4Network:
    return IPv4Network((text or 0, length))


def _route(message: Any, names: Mapping[int, str]) -> Route:
    index = message.get("RTA_OIF")
    gateway = message.get("RTA_GATEWAY")
    hops = message.get("RTA_MULTIPATH") or []
    if index is None and hops:
        index = hops[0]["oif"]
    return Route(
        destination=_network(message.get("RTA_DST"), message["dst_len"]),
        interface=names.get(index, ""),
        table=message.get("RTA_TABLE") or message["table"],
        kind=_ROUTE_KINDS.get(message["type"], RouteKind.UNICAST),
        is_neighbourhood=message["proto"] == _RTPROT_KERNEL
        and message["scope"] == _RT_SCOPE_LINK
        and message["type"] == 1,
        gateway=IPv4Address(gateway) if gateway else None,
    )


def _rule(message: Any) -> Rule:
    action = _RULE_ACTIONS.get(message["action"], RuleAction.NOTHING)
    target = message.get("FRA_GOTO") if action is RuleAction.GOTO else message.get("FRA_TABLE")
    suppressed = message.get("FRA_SUPPRESS_PREFIXLEN")
    mark = message.get("FRA_FWMARK") or 0
    mask = message.get("FRA_FWMASK")
    users = message.get("FRA_UID_RANGE")
    first, _, last = users.partition(":") if users else ("", "", "")
    is_unknown = any(name == "UNKNOWN" for name, _ in message["attrs"])
    return Rule(
        priority=message.get("FRA_PRIORITY") or 0,
        action=action,
        target=target or message["table"],
        destination=_network(message.get("FRA_DST"), message["dst_len"])
        if message["dst_len"]
        else None,
        is_inverted=bool(message["flags"] & _FIB_RULE_INVERT),
        suppressed_length=-1 if suppressed in (None, _ALL_BITS) else suppressed,
        mark=mark,
        mask=_ALL_BITS if mask is None else mask,
        incoming=message.get("FRA_IIFNAME") or "",
        outgoing=message.get("FRA_OIFNAME") or "",
        users=(int(first), int(last)) if users else None,
        is_special=is_unknown
        or message["src_len"] > 0
        or message["tos"] > 0
        or any(message.get(name) for name in _SPECIAL),
    )

"""systemd-resolved: settings of VNet's link, over D-Bus.

Source: org.freedesktop.resolve1(5). Of the settings of a link,

    DNS              VNet's addresses
    Domains          VNet's zones, for routing only: names in them are asked there, and nothing is
                     completed with them
    DefaultRoute     no: no other name is asked there
    DNSSEC           no: VNet's answers have no signatures, and with DNSSEC=yes for all links
    DNSOverTLS       no: VNet's server speaks plain DNS        they would all be thrown away
    LLMNR            no, and MulticastDNS: there is nobody on the link

They go away with the link, so nothing is left of a VNet that was killed. VNet's addresses are on the
link itself: systemd-resolved up to 249 reaches no other for a link, not even one of 127.0.0.0/8.
"""

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from supervisor.clusters import is_zone
from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.bus_facts import RESOLVED
from supervisor.osconfig.dbus import (
    UNKNOWN_METHOD,
    BusError,
    Call,
    Calls,
    NoAnswerError,
    NoBusError,
    NoServiceError,
    RefusedError,
    SystemBus,
)
from supervisor.osconfig.networkmanager import leave_alone
from supervisor.osconfig.resolv_conf import STUBS, nameservers
from supervisor.osconfig.wish import ResolverWish, without_own

log = logging.getLogger(__name__)

# Where it names the servers that it asks itself, for programs that go past it.
UPLINKS: Final = Path("/run/systemd/resolve/resolv.conf")
_PATH: Final = "/org/freedesktop/resolve1"
_MANAGER: Final = "org.freedesktop.resolve1.Manager"
_LINK: Final = "org.freedesktop.resolve1.Link"
_NO_SUCH_LINK: Final = "org.freedesktop.resolve1.NoSuchLink"
_ABOUT_SIGNATURES: Final = ("SetLinkDNSSEC", "SetLinkDNSOverTLS")
_LINK_BUSY: Final = "org.freedesktop.resolve1.LinkBusy"
# The settings of the link are read again so often; a restart is noticed with each check.
LOOK_SECONDS: Final = 5.0
# A program that changes the link's settings each time they are mended is named to the user.
MENDS_UNTOLD: Final = 3
_DNS_PORT: Final = 53


class ResolvedBackend:
    """The back end "resolved"."""

    name = "resolved"

    def __init__(
        self,
        bus: SystemBus,
        uplinks: Path = UPLINKS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._uplinks = uplinks
        self._clock = clock
        self._wish: ResolverWish | None = None
        # What is in force, and the unique name of who was told.
        self._applied: ResolverWish | None = None
        self._owner = ""
        # The link that has settings of ours, perhaps only some.
        self._link: ResolverWish | None = None
        # Optional settings that it would not take; told once.
        self._refused: dict[str, str] = {}
        self._mends = 0
        self._next_look = 0.0

    def apply(self, wish: ResolverWish) -> None:
        """Sets up the link; only what has changed, as long as the same systemd-resolved runs."""
        self._wish = wish
        if not wish.index:
            return
        calls = self._bus.within()
        with _told(wish):
            owner = self._owner_here(calls)
            if owner != self._owner:
                self._applied = None
            if self._applied == wish:
                return
            self._set_up(calls, wish, owner)

    def undo(self) -> None:
        """Gives the link back its own settings; without link or systemd-resolved there is nothing."""
        link, self._link = self._link, None
        self._wish = self._applied = None
        self._owner = ""
        if link is None:
            return
        try:
            self._bus.within().do(revert(link.index))
        except (NoServiceError, NoBusError):
            return
        except RefusedError as error:
            if error.name != _NO_SUCH_LINK:
                raise OsConfigError(_undo_failed(link, error)) from error
        except BusError as error:
            raise OsConfigError(_undo_failed(link, error)) from error

    def upstream(self) -> list[tuple[str, int, str]] | None:
        """The servers that systemd-resolved itself asks.

        Only names in VNet's zones come to VNet. Those that are not VNet's must not go back to
        systemd-resolved, which would ask VNet again.
        """
        found = read_uplinks(self._uplinks)
        return None if found is None else without_own(found, self._wish)

    def check(self) -> list[str]:
        """Sets up the link again after a restart of systemd-resolved, or when someone changed it."""
        wish = self._wish
        if wish is None or not wish.index:
            return []
        calls = self._bus.within()
        with _told(wish):
            owner = self._owner_here(calls)
            if owner != self._owner or self._applied != wish:
                self._mends = 0
                self._set_up(calls, wish, owner, in_full=True)
                return self._warnings(wish)
            if self._clock() < self._next_look:
                return self._warnings(wish)
            self._next_look = self._clock() + LOOK_SECONDS
            if self._differences(calls, wish):
                self._mends += 1
                log.info("the DNS settings of %s were changed, setting them again", wish.interface)
                self._set_up(calls, wish, owner, in_full=True)
            else:
                self._mends = 0
        return self._warnings(wish)

    def _warnings(self, wish: ResolverWish) -> list[str]:
        if self._mends < MENDS_UNTOLD:
            return []
        sentence = (
            f"Another program changes the DNS settings of {wish.interface} again and again: have it"
            " leave the interface alone."
        )
        return [sentence]

    def _owner_here(self, calls: Calls) -> str:
        owner = calls.owner(RESOLVED)
        if not owner:
            raise NoServiceError("systemd-resolved does not run")
        if owner != self._owner and not calls.is_here(RESOLVED):
            raise BusError("the systemd-resolved on the bus is one of another network namespace")
        return owner

    def _set_up(
        self, calls: Calls, wish: ResolverWish, owner: str, *, in_full: bool = False
    ) -> None:
        before = None if in_full else self._applied
        # Half of it may be done when a call fails.
        self._applied = None
        self._link = wish
        for call, is_needed in settings(wish, before):
            try:
                calls.do(call)
            except RefusedError as error:
                if is_needed or error.name in (_NO_SUCH_LINK, _LINK_BUSY):
                    raise
                self._note_refusal(wish, call.member, error)
        self._owner = owner
        self._applied = wish
        if before is None:
            leave_alone(calls, wish.interface)

    def _note_refusal(self, wish: ResolverWish, member: str, error: RefusedError) -> None:
        is_new = self._refused.get(member) != error.name
        self._refused[member] = error.name
        # What it does not know, it does not do either.
        if is_new and member in _ABOUT_SIGNATURES and error.name != UNKNOWN_METHOD:
            log.warning(
                "systemd-resolved refuses %s for %s: %s; with DNSSEC=yes or DNSOverTLS=yes for all"
                " links it will not take VNet's answers",
                member,
                wish.interface,
                error,
            )

    def _differences(self, calls: Calls, wish: ResolverWish) -> list[str]:
        get_link = Call(RESOLVED, _PATH, _MANAGER, "GetLink", "i", (wish.index,))
        (path,) = calls.ask(get_link, tuple[str])
        return differences(wish, calls.properties(RESOLVED, path, _LINK), frozenset(self._refused))


def settings(wish: ResolverWish, before: ResolverWish | None = None) -> Iterator[tuple[Call, bool]]:
    """The calls that set up a link, and whether each must succeed. Pure.

    `before` is what is in force already. The servers come last: until then no name is asked there,
    above all none that is not VNet's.
    """
    servers, zones = _link_servers(wish), _link_zones(wish)
    if before is not None and before.index == wish.index:
        if zones != _link_zones(before):
            yield _call("SetLinkDomains", "ia(sb)", wish.index, zones), True
        if servers != _link_servers(before):
            yield _call("SetLinkDNS", "ia(iay)", wish.index, servers), True
        return
    yield _call("SetLinkDefaultRoute", "ib", wish.index, False), False
    yield _call("SetLinkDomains", "ia(sb)", wish.index, zones), True
    yield _call("SetLinkLLMNR", "is", wish.index, "no"), False
    yield _call("SetLinkMulticastDNS", "is", wish.index, "no"), False
    yield _call("SetLinkDNSSEC", "is", wish.index, "no"), False
    yield _call("SetLinkDNSOverTLS", "is", wish.index, "no"), False
    yield _call("SetLinkDNS", "ia(iay)", wish.index, servers), True


def revert(index: int) -> Call:
    """The call that gives a link back its own settings. Pure."""
    return _call("RevertLink", "i", index)


def differences(
    wish: ResolverWish, found: dict[str, Any], refused: frozenset[str] = frozenset()
) -> list[str]:
    """Which of the properties of a link are not as set up; those it does not have are. Pure.

    `refused` are the calls that it did not take.
    """
    wanted = {
        "DNS": _link_servers(wish),
        "Domains": sorted(_link_zones(wish)),
        "DefaultRoute": False,
        "LLMNR": "no",
        "MulticastDNS": "no",
        "DNSSEC": "no",
        "DNSOverTLS": "no",
    }
    seen = dict(found)
    if "Domains" in seen:
        seen["Domains"] = sorted(map(tuple, seen["Domains"]))
    if "DNS" in seen:
        seen["DNS"] = [tuple(server) for server in seen["DNS"]]
    return [
        name
        for name, value in wanted.items()
        if name in seen and f"SetLink{name}" not in refused and seen[name] != value
    ]


def read_uplinks(path: Path = UPLINKS) -> list[tuple[str, int, str]] | None:
    """The servers that systemd-resolved itself asks, VNet's among them; None without its file."""
    try:
        return uplink_servers(path.read_text(errors="replace"))
    except OSError:
        return None


def uplink_servers(text: str) -> list[tuple[str, int, str]]:
    """The servers in systemd-resolved's file of uplinks: (address, port, interface or "").

    Its own stubs are left out. An interface may be there as its number.
    """
    return [
        (address, _DNS_PORT, _interface_name(scope))
        for address, scope in nameservers(text)
        if address not in STUBS
    ]


def _interface_name(scope: str) -> str:
    if scope.isascii() and scope.isdecimal():
        with suppress(OSError, OverflowError):
            return socket.if_indextoname(int(scope))
    return scope


def _link_servers(wish: ResolverWish) -> list[tuple[int, bytes]]:
    """Without zones a server would be asked for every name by those that know no DefaultRoute."""
    if not _link_zones(wish):
        return []
    return [
        (socket.AF_INET if len(server) == 4 else socket.AF_INET6, server) for server in wish.servers
    ]


def _link_zones(wish: ResolverWish) -> list[tuple[str, bool]]:
    """Never the root or a single label, whoever asks for it."""
    return [(zone, True) for zone in wish.zones if is_zone(zone)]


def _call(member: str, signature: str, *body: object) -> Call:
    return Call(RESOLVED, _PATH, _MANAGER, member, signature, body)


@contextmanager
def _told(wish: ResolverWish) -> Iterator[None]:
    """Turns an error of the bus into a sentence about what to do."""
    try:
        yield
    except BusError as error:
        raise OsConfigError(complaint(wish.interface, error)) from error


def complaint(interface: str, error: BusError) -> str:
    """What is wrong and what to do, in a sentence. Pure."""
    match error:
        case NoServiceError():
            return (
                'systemd-resolved does not run: run "systemctl start systemd-resolved", or choose'
                " another dns.os_integration."
            )
        case NoAnswerError():
            return (
                "systemd-resolved does not answer on the system bus: run"
                ' "systemctl restart systemd-resolved".'
            )
        case RefusedError(name=name) if name == _LINK_BUSY:
            return (
                f"systemd-networkd manages {interface} and its DNS settings: exclude it with"
                " Unmanaged=yes in a .network file."
            )
        case RefusedError(name=name) if name == _NO_SUCH_LINK:
            return f"systemd-resolved does not know {interface} yet: wait, VNet tries again."
        case NoBusError():
            return (
                f"systemd-resolved is not told VNet's zones, since {error}: start D-Bus, or choose"
                " another dns.os_integration."
            )
        case _:
            return (
                f"systemd-resolved is not told VNet's zones, since {error}: choose another"
                " dns.os_integration."
            )


def _undo_failed(wish: ResolverWish, error: BusError) -> str:
    return (
        f"systemd-resolved still sends names to {wish.interface}, since {error}: that ends with the"
        " interface."
    )

"""NetworkManager where it runs a dnsmasq of its own, and keeping it off VNet's interface.

Sources: org.freedesktop.NetworkManager (Reload, GetDeviceByIpIface, Device.Managed), NetworkManager.conf(5)
with dns=dnsmasq: it reads /etc/NetworkManager/dnsmasq.d when it starts dnsmasq; dnsmasq(8), server.

Where NetworkManager feeds systemd-resolved, that is asked directly (`resolved`). Where it writes
/etc/resolv.conf, it is one of the programs that the plain back end lives with.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Final

from supervisor.clusters import is_zone
from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.bus_facts import (
    DNS_MANAGER,
    DNS_MANAGER_PATH,
    DNSMASQ_ADDRESSES,
    NETWORK_MANAGER,
)
from supervisor.osconfig.dbus import (
    BusError,
    Call,
    Calls,
    NoBusError,
    NoServiceError,
    RefusedError,
    SystemBus,
    set_property,
)
from supervisor.osconfig.journal import Journal, Outcome, changed_by_others
from supervisor.osconfig.resolv_conf import nameservers
from supervisor.osconfig.wish import ResolverWish, without_own

log = logging.getLogger(__name__)

DROP_IN: Final = Path("/etc/NetworkManager/dnsmasq.d/vnet.conf")
# Where it names the servers that its dnsmasq asks.
UPLINKS: Final = Path("/run/NetworkManager/no-stub-resolv.conf")
# The entry of the journal: what is to be called once the file is as it was.
RELOAD_ACTION: Final = "networkmanager-restart-dnsmasq"
_PATH: Final = "/org/freedesktop/NetworkManager"
_DEVICE: Final = "org.freedesktop.NetworkManager.Device"
_UNKNOWN_DEVICE: Final = "org.freedesktop.NetworkManager.UnknownDevice"
# NM_MANAGER_RELOAD_FLAG_DNS_FULL: dnsmasq is started anew and reads its files.
_RESTART_DNS: Final = 0x04
_MODE: Final = "dnsmasq"
_DNS_PORT: Final = 53


class NetworkManagerBackend:
    """The back end "networkmanager"."""

    name = "networkmanager"

    def __init__(
        self, bus: SystemBus, journal: Journal, drop_in: Path = DROP_IN, uplinks: Path = UPLINKS
    ) -> None:
        """`journal` knows `UNDO_CALLS`."""
        self._bus = bus
        self._journal = journal
        self._drop_in = drop_in
        self._uplinks = uplinks
        self._wish: ResolverWish | None = None
        # What dnsmasq has read; None if that is not known.
        self._in_force: bytes | None = None

    def apply(self, wish: ResolverWish) -> None:
        """Writes the file and has dnsmasq read it, when it changes."""
        self._wish = wish
        content = drop_in_text(wish).encode()
        if content == self._in_force:
            return
        if not content:
            self._take_back()
            self._in_force = b""
            return
        calls = self._bus.within()
        try:
            _require_dnsmasq(calls)
        except BusError as error:
            raise OsConfigError(complaint(error)) from error
        if not self._drop_in.parent.is_dir():
            raise OsConfigError(
                f"{self._drop_in.parent} is not there, but NetworkManager reads it: make it."
            )
        # First what is to be done last.
        self._journal.note(self.name, RELOAD_ACTION)
        self._journal.write(self.name, self._drop_in, content)
        try:
            calls.do(restart_dns())
        except BusError as error:
            raise OsConfigError(complaint(error)) from error
        self._in_force = content
        leave_alone(calls, wish.interface)

    def undo(self) -> None:
        """Takes the file away, and has dnsmasq forget it."""
        self._wish = None
        self._take_back()

    def upstream(self) -> list[tuple[str, int, str]] | None:
        """The servers that NetworkManager's dnsmasq asks; itself would ask VNet again."""
        try:
            text = self._uplinks.read_text(errors="replace")
        except OSError:
            return None
        found = [
            (address, _DNS_PORT, scope)
            for address, scope in nameservers(text)
            if address not in DNSMASQ_ADDRESSES
        ]
        return without_own(found, self._wish)

    def check(self) -> list[str]:
        """Looks whether dnsmasq still runs, and the file is as it was written."""
        if self._wish is None or not drop_in_text(self._wish):
            return []
        if self._in_force is None:
            self.apply(self._wish)
            return []
        try:
            _require_dnsmasq(self._bus.within())
        except BusError as error:
            return [complaint(error)]
        change = self._journal.find(self._drop_in)
        if change is not None and not self._journal.is_ours(change):
            return [changed_by_others(self._drop_in)]
        return []

    def _take_back(self) -> None:
        self._in_force = None
        for undone in self._journal.undo({self.name}):
            if undone.outcome is not Outcome.UNDONE:
                raise OsConfigError(undone.text)


def _reload(_arguments: Mapping[str, str]) -> None:
    with closing(SystemBus()) as bus:
        try:
            bus.within().do(restart_dns())
        except (NoServiceError, NoBusError):
            # It reads its files anew when it starts.
            return
        except BusError as error:
            raise OsConfigError(complaint(error)) from error


UNDO_CALLS: Final[Mapping[str, Callable[[Mapping[str, str]], None]]] = {RELOAD_ACTION: _reload}


def drop_in_text(wish: ResolverWish) -> str:
    """The file for dnsmasq, "" without zones. Pure."""
    zones = [zone for zone in wish.zones if is_zone(zone)]
    if not zones or not wish.servers:
        return ""
    lines = ["# VNet's zones. Removed when VNet stops."]
    for zone in zones:
        lines += [f"server=/{zone}/{server}" for server in wish.server_texts]
        # VNet's addresses are private ones, which stop-dns-rebind would not let pass.
        lines.append(f"rebind-domain-ok=/{zone}/")
    return "".join(f"{line}\n" for line in lines)


def restart_dns() -> Call:
    """The call that starts dnsmasq anew. Pure."""
    return Call(NETWORK_MANAGER, _PATH, NETWORK_MANAGER, "Reload", "u", (_RESTART_DNS,))


def complaint(error: BusError) -> str:
    """What is wrong and what to do, in a sentence. Pure."""
    if isinstance(error, NoServiceError):
        return (
            'NetworkManager does not run: run "systemctl start NetworkManager", or choose another'
            " dns.os_integration."
        )
    return (
        f"NetworkManager's dnsmasq is not told VNet's zones, since {error}: choose another"
        " dns.os_integration."
    )


def leave_alone(calls: Calls, interface: str) -> None:
    """Has NetworkManager, if it runs, not manage the interface; what fails is only logged.

    It lasts as long as the interface. NetworkManager takes an interface that others have made for its
    own to describe, and some versions reset what others have told systemd-resolved of it.
    """
    try:
        if not calls.owner(NETWORK_MANAGER) or not calls.is_here(NETWORK_MANAGER):
            return
        get_device = Call(
            NETWORK_MANAGER, _PATH, NETWORK_MANAGER, "GetDeviceByIpIface", "s", (interface,)
        )
        (path,) = calls.ask(get_device, tuple[str])
        if calls.properties(NETWORK_MANAGER, path, _DEVICE).get("Managed") is True:
            calls.do(set_property(NETWORK_MANAGER, path, _DEVICE, "Managed", "b", value=False))
            log.info("NetworkManager leaves %s alone from now on", interface)
    except RefusedError as error:
        if error.name != _UNKNOWN_DEVICE:
            log.warning("NetworkManager does not leave %s alone: %s", interface, error)
    except BusError as error:
        log.warning("NetworkManager does not leave %s alone: %s", interface, error)


def _require_dnsmasq(calls: Calls) -> None:
    if not calls.owner(NETWORK_MANAGER):
        raise NoServiceError("NetworkManager does not run")
    mode = calls.properties(NETWORK_MANAGER, DNS_MANAGER_PATH, DNS_MANAGER).get("Mode", "")
    if mode != _MODE:
        raise BusError(f"its DNS mode is {str(mode)[:40]!r}, not {_MODE!r}")

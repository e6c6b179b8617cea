"""Who looks after the system's resolver, as far as the system bus tells. Pure but for `dbus_facts`.

Sources: systemd-resolved.service(8) and nss-resolve(8), /etc/resolv.conf; the DnsManager interface of
NetworkManager (org.freedesktop.NetworkManager.DnsManager) and NetworkManager.conf(5), dns and rc-manager.
"""

import logging
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from supervisor.osconfig.dbus import BusError, Calls, SystemBus
from supervisor.osconfig.resolv_conf import STUBS, nameservers

log = logging.getLogger(__name__)

RESOLVED: Final = "org.freedesktop.resolve1"
NETWORK_MANAGER: Final = "org.freedesktop.NetworkManager"
DNS_MANAGER_PATH: Final = "/org/freedesktop/NetworkManager/DnsManager"
DNS_MANAGER: Final = "org.freedesktop.NetworkManager.DnsManager"
# Where NetworkManager's dnsmasq listens; older ones of Ubuntu the second.
DNSMASQ_ADDRESSES: Final = frozenset({"127.0.0.1", "::1", "127.0.1.1"})


class Presence(StrEnum):
    """Whether a service is on the bus."""

    ABSENT = "absent"
    HERE = "here"
    # It runs in another network namespace, as the host's does for a container that shares the bus.
    ELSEWHERE = "elsewhere"
    # It has its name, but did not answer in time.
    SILENT = "silent"


class ResolvedUse(StrEnum):
    """Which programs ask systemd-resolved."""

    ALL = "all"
    # Those that use the C library (nss-resolve); others, such as dig, read /etc/resolv.conf.
    C_LIBRARY = "c library"
    NONE = "none"


class NetworkManagerRole(StrEnum):
    """What NetworkManager does for the resolver."""

    NONE = "none"
    # It tells systemd-resolved: that is the one to talk to.
    FEEDS_RESOLVED = "feeds resolved"
    # Programs ask a dnsmasq that it runs and that reads our file.
    RUNS_DNSMASQ = "runs dnsmasq"
    # It rewrites /etc/resolv.conf with each change of the network.
    REWRITES_FILE = "rewrites file"
    # It hands its servers to resolvconf(8).
    FEEDS_RESOLVCONF = "feeds resolvconf"


@dataclass(frozen=True, slots=True)
class BusFacts:
    """What was found. `problem` says why the bus could not be asked; the rest is then as if empty.

    `dns_mode` and `rc_manager` are NetworkManager's own words.
    """

    problem: str = ""
    resolved: Presence = Presence.ABSENT
    network_manager: Presence = Presence.ABSENT
    dns_mode: str = ""
    rc_manager: str = ""

    @property
    def network_manager_role(self) -> NetworkManagerRole:
        """What NetworkManager does here."""
        if self.network_manager is not Presence.HERE:
            return NetworkManagerRole.NONE
        return network_manager_role(self.dns_mode, self.rc_manager)


def network_manager_role(dns_mode: str, rc_manager: str) -> NetworkManagerRole:
    """What NetworkManager does with these settings. Pure."""
    match dns_mode, rc_manager:
        case "systemd-resolved", _:
            return NetworkManagerRole.FEEDS_RESOLVED
        case "none", _:
            return NetworkManagerRole.NONE
        # Programs would not be sent to its dnsmasq.
        case _, "unmanaged":
            return NetworkManagerRole.NONE
        case "dnsmasq", _:
            return NetworkManagerRole.RUNS_DNSMASQ
        case _, "resolvconf":
            return NetworkManagerRole.FEEDS_RESOLVCONF
        case _:
            return NetworkManagerRole.REWRITES_FILE


def resolved_use(resolv_conf: str, nsswitch: str) -> ResolvedUse:
    """Who asks systemd-resolved, by the texts of /etc/resolv.conf and /etc/nsswitch.conf. Pure.

    What the servers are counts, not where a symbolic link points: there are systems that copy the
    stub's file, and links to the file of the uplinks that lead past systemd-resolved.
    """
    servers = nameservers(resolv_conf)
    if servers and servers[0][0] in STUBS:
        return ResolvedUse.ALL
    return ResolvedUse.C_LIBRARY if "resolve" in _host_sources(nsswitch) else ResolvedUse.NONE


def asks_dnsmasq(resolv_conf: str) -> bool:
    """Whether programs ask a dnsmasq of this machine, by the text of /etc/resolv.conf. Pure.

    With mode dnsmasq they need not: NetworkManager does not replace everybody's file.
    """
    servers = nameservers(resolv_conf)
    return bool(servers) and servers[0][0] in DNSMASQ_ADDRESSES


def _host_sources(nsswitch: str) -> list[str]:
    """The sources of host names, in order (nsswitch.conf(5)), without [actions]."""
    for line in nsswitch.splitlines():
        name, colon, sources = line.partition("#")[0].partition(":")
        if colon and name.strip() == "hosts":
            return sources.split()
    return []


def dbus_facts(bus: SystemBus | None = None) -> BusFacts:
    """Asks the system bus, or that of a test; takes 2 s at most."""
    if bus is None:
        with closing(SystemBus()) as own:
            return dbus_facts(own)
    calls = bus.within()
    try:
        resolved = _presence(calls, RESOLVED)
        manager = _presence(calls, NETWORK_MANAGER)
    except BusError as error:
        return BusFacts(problem=str(error))
    if manager is not Presence.HERE:
        return BusFacts(resolved=resolved, network_manager=manager)
    try:
        found = calls.properties(NETWORK_MANAGER, DNS_MANAGER_PATH, DNS_MANAGER)
    except BusError as error:
        log.warning("NetworkManager does not say what it does with the resolver: %s", error)
        return BusFacts(resolved=resolved, network_manager=Presence.SILENT)
    return BusFacts(
        resolved=resolved,
        network_manager=manager,
        dns_mode=str(found.get("Mode", "")),
        rc_manager=str(found.get("RcManager", "")),
    )


def _presence(calls: Calls, service: str) -> Presence:
    if not calls.owner(service):
        return Presence.ABSENT
    return Presence.HERE if calls.is_here(service) else Presence.ELSEWHERE

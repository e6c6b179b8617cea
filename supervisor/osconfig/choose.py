"""Which back end sets up the system's resolver, and why. Pure.

Sources: systemd-resolved.service(8), NetworkManager.conf(5), and where the two programs named resolvconf
let `/etc/resolv.conf` point: Debian's to its file in `/run`, openresolv writes it itself.
"""

import dataclasses
from dataclasses import dataclass, field

from supervisor.osconfig.bus_facts import (
    BusFacts,
    NetworkManagerRole,
    Presence,
    ResolvedUse,
    asks_dnsmasq,
    resolved_use,
)
from supervisor.osconfig.resolvconf_backend import ResolvconfKind


@dataclass(frozen=True, slots=True)
class Facts:
    """What the system has. Of `/etc/resolv.conf`: how it is without VNet.

    `platform` is Python's `sys.platform`, `target` where the symbolic link leads in the end, "" for
    a file; `nsswitch` the text of that file; `resolvconf` what is installed under that name.
    """

    platform: str = "linux"
    bus: BusFacts = field(default_factory=BusFacts)
    target: str = ""
    text: str = ""
    nsswitch: str = ""
    resolvconf: ResolvconfKind | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The back end by its name in the configuration; `reasons` are clauses.

    `problem` says why it is none although one was wanted.
    """

    backend: str
    reasons: tuple[str, ...]
    problem: str = ""


def choose(wanted: str, facts: Facts) -> Choice:
    """What `dns.os_integration` means on this system."""
    if wanted == "auto":
        choice = _choose_best(facts)
        return dataclasses.replace(choice, reasons=tuple(dict.fromkeys(choice.reasons)))
    objection = _objection(wanted, facts)
    if objection:
        return Choice(
            "none",
            (f"{wanted} is configured", objection),
            f"dns.os_integration {wanted!r} is not possible, since {objection}: set it to"
            ' "auto" or start what is missing, then restart VNet.',
        )
    return Choice(wanted, (f"{wanted} is configured",))


def _objection(wanted: str, facts: Facts) -> str:
    """Why a back end cannot be used; empty if it can."""
    if wanted == "none":
        return ""
    is_macos = facts.platform == "darwin"
    if is_macos != (wanted == "macos"):
        return f"this system is {facts.platform}"
    match wanted:
        case "resolved":
            return _not_here("systemd-resolved", facts.bus.resolved, facts.bus)
        case "networkmanager":
            return _not_here("NetworkManager", facts.bus.network_manager, facts.bus)
        case "resolvconf":
            return "" if _usable(facts.resolvconf) else _resolvconf_clause(facts)
        case _:
            return ""


def _choose_best(facts: Facts) -> Choice:
    if facts.platform == "darwin":
        return Choice("macos", ("this system is macOS",))
    reasons: list[str] = []
    bus = facts.bus
    objection = _not_here("systemd-resolved", bus.resolved, bus)
    if objection:
        reasons.append(objection)
    else:
        match resolved_use(facts.text, facts.nsswitch):
            case ResolvedUse.ALL:
                return Choice("resolved", ("/etc/resolv.conf names systemd-resolved's stub",))
            case ResolvedUse.C_LIBRARY:
                return Choice("resolved", ("nsswitch.conf has programs ask systemd-resolved",))
            case _:
                reasons.append("systemd-resolved runs, but no program asks it")
    reasons.append(_network_manager_clause(bus))
    if bus.network_manager_role is NetworkManagerRole.RUNS_DNSMASQ:
        if asks_dnsmasq(facts.text):
            return Choice("networkmanager", tuple(reasons))
        reasons.append("/etc/resolv.conf does not name its dnsmasq")
    reasons.append(_resolvconf_clause(facts))
    if _composes(facts):
        return Choice("resolvconf", tuple(reasons))
    reasons.append(
        f"/etc/resolv.conf leads to {facts.target}"
        if facts.target
        else "/etc/resolv.conf is a file"
    )
    return Choice("resolv.conf", tuple(reasons))


def _not_here(name: str, presence: Presence, bus: BusFacts) -> str:
    match presence:
        case Presence.HERE:
            return ""
        case Presence.ELSEWHERE:
            return f"{name} runs in another network namespace"
        case Presence.SILENT:
            return f"{name} does not answer"
        case _:
            return bus.problem or f"{name} does not run"


def _network_manager_clause(bus: BusFacts) -> str:
    objection = _not_here("NetworkManager", bus.network_manager, bus)
    if objection:
        return objection
    match bus.network_manager_role:
        case NetworkManagerRole.RUNS_DNSMASQ:
            return "NetworkManager runs dnsmasq"
        case NetworkManagerRole.FEEDS_RESOLVED:
            return "NetworkManager hands its servers to systemd-resolved"
        case NetworkManagerRole.FEEDS_RESOLVCONF:
            return "NetworkManager hands its servers to resolvconf"
        case NetworkManagerRole.REWRITES_FILE:
            return "NetworkManager only writes /etc/resolv.conf"
        case _:
            return "NetworkManager leaves the resolver alone"


def _usable(kind: ResolvconfKind | None) -> bool:
    return kind in (ResolvconfKind.DEBIAN, ResolvconfKind.OPENRESOLV)


def _composes(facts: Facts) -> bool:
    """Whether resolvconf is what writes the file that programs read."""
    if facts.resolvconf is ResolvconfKind.DEBIAN:
        return "/resolvconf/" in facts.target
    return facts.resolvconf is ResolvconfKind.OPENRESOLV and (
        "generated by resolvconf" in facts.text.lower() or "/resolvconf/" in facts.target
    )


def _resolvconf_clause(facts: Facts) -> str:
    if facts.resolvconf is None:
        return "resolvconf is not installed"
    if not _usable(facts.resolvconf):
        return f"resolvconf is {facts.resolvconf}"
    if _composes(facts):
        return f"{facts.resolvconf} writes /etc/resolv.conf"
    return f"{facts.resolvconf} is installed but does not write /etc/resolv.conf"

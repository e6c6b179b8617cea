"""What a connection is counted by: see `workers.proxy.connections`. Pure."""

from collections.abc import Mapping
from typing import Final

from ipc.connection_list import TargetKind
from workers.proxy.book import APP, DATABASE, Entry
from workers.proxy.connections import Target
from workers.proxy.teleport.apps import check_port
from workers.proxy.teleport.targets import (
    AppTarget,
    ClusterTarget,
    DatabaseTarget,
    Resolution,
    WebApp,
)
from workers.proxy.undecided import Meaning

_KINDS: Final[Mapping[str, TargetKind]] = {APP: TargetKind.APP, DATABASE: TargetKind.DATABASE}


def booked(entry: Entry) -> Target:
    """By what the name stood for last, as long as nothing better is known."""
    kind = _KINDS.get(entry.target.kind, TargetKind.UNKNOWN)
    return Target(kind, entry.target.profile, entry.target.leaf, entry.name)


def web(name: str, profile: str) -> Target:
    """The web port of a profile's proxy."""
    return Target(TargetKind.WEB, profile, "", name)


def meant(name: str, meaning: Meaning, found: Resolution, port: int) -> Target | None:
    """By what is done with it; None for nothing. A port that an app does not have is not its own."""
    match meaning, found:
        case Meaning.DIAL, AppTarget():
            allowed = check_port(found.app.ports, port)
            own = allowed if isinstance(allowed, int) and allowed else None
            return Target(TargetKind.APP, found.profile, found.leaf, name, own)
        case Meaning.DIAL, DatabaseTarget():
            return Target(TargetKind.DATABASE, found.profile, found.leaf, name)
        case Meaning.SSH, ClusterTarget():
            return Target(TargetKind.SSH, found.profile, found.leaf, name)
        case ((Meaning.RELAY | Meaning.RELAY_FOR_NOW), (WebApp() | ClusterTarget())):
            return web(name, found.profile)
        case _:
            return None

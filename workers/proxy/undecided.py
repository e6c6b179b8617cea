"""What a connection to a port of a name means. Pure.

    the name stands for       web port of the proxy     port 22     any other port
    TCP app, database         dialled                   dialled     dialled
    name below a cluster's    relayed, for now          SSH         refused: no app has it
    web app                   relayed                   refused     refused: the web port alone
    nothing of VNet's         refused                   refused     refused

A name below a cluster's has an address whether something has it or not: it may be a host, a web app
that a browser is led to, or an app that is made later. So it is decided for each connection anew.
Relayed means: byte by byte to the proxy's web port, as if the name had led there. SSH means: a
session with the host that the proxy leads to (`workers.proxy.ssh`). A dialled app has
ports of its own, which `Teleport.plan` checks.

Source: `lib/vnet/tcp_handler_resolver.go`.
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

from ipc.messages import Refusal
from ipc.slots import SSH_PORT
from workers.proxy.teleport.errors import PortNotAllowedError, TeleportError, UnknownAppError
from workers.proxy.teleport.targets import (
    AppTarget,
    ClusterTarget,
    DatabaseTarget,
    NoSuchName,
    NotOurs,
    Resolution,
    WebApp,
)

# A page opens dozens of connections; whether the name is an app by now need not be asked for each.
WEB_SECONDS: Final = 15.0
MAX_WEB_NAMES: Final = 1000


class NoSshError(TeleportError):
    """An SSH connection has come to a worker that serves none."""

    refusal = Refusal.INTERNAL


class Port(Enum):
    """What a port is to a proxy whose web port is known."""

    WEB = auto()
    SSH = auto()
    OTHER = auto()


class Meaning(Enum):
    """What is done with a connection."""

    DIAL = auto()
    RELAY = auto()
    RELAY_FOR_NOW = auto()  # remembered for WEB_SECONDS
    SSH = auto()
    NO_APP = auto()
    WEB_ONLY = auto()
    GONE = auto()


MEANINGS: Final[Mapping[tuple[type[Resolution], Port], Meaning]] = {
    (AppTarget, Port.WEB): Meaning.DIAL,
    (AppTarget, Port.SSH): Meaning.DIAL,
    (AppTarget, Port.OTHER): Meaning.DIAL,
    (DatabaseTarget, Port.WEB): Meaning.DIAL,
    (DatabaseTarget, Port.SSH): Meaning.DIAL,
    (DatabaseTarget, Port.OTHER): Meaning.DIAL,
    (ClusterTarget, Port.WEB): Meaning.RELAY_FOR_NOW,
    (ClusterTarget, Port.SSH): Meaning.SSH,
    (ClusterTarget, Port.OTHER): Meaning.NO_APP,
    (WebApp, Port.WEB): Meaning.RELAY,
    (WebApp, Port.SSH): Meaning.WEB_ONLY,
    (WebApp, Port.OTHER): Meaning.WEB_ONLY,
    (NotOurs, Port.WEB): Meaning.GONE,
    (NotOurs, Port.SSH): Meaning.GONE,
    (NotOurs, Port.OTHER): Meaning.GONE,
    (NoSuchName, Port.WEB): Meaning.GONE,
    (NoSuchName, Port.SSH): Meaning.GONE,
    (NoSuchName, Port.OTHER): Meaning.GONE,
}


def meaning_of(resolution: Resolution, port: int, web_port: int | None) -> Meaning:
    """The row of the table. `web_port` is that of the name's profile, None when it has none."""
    other = Port.SSH if port == SSH_PORT else Port.OTHER
    return MEANINGS[type(resolution), Port.WEB if port == web_port else other]


def error_of(meaning: Meaning, web_port: int | None) -> TeleportError:
    """Why a connection of this meaning is refused; for the last four meanings alone.

    SSH is among them for workers that serve none.
    """
    match meaning:
        case Meaning.SSH:
            return NoSshError("SSH is the work of another worker, which was not asked")
        case Meaning.NO_APP:
            return UnknownAppError("no app and no database has this name: vnet ls shows all")
        case Meaning.WEB_ONLY:
            alone = "no port" if web_port is None else f"port {web_port} alone"
            return PortNotAllowedError(f"it is a web app and has {alone}")
        case _:
            return UnknownAppError("the name stands for no app any more")


class WebNames:
    """Names whose web port is relayed for now; the one remembered first makes room."""

    def __init__(self, seconds: float = WEB_SECONDS, max_names: int = MAX_WEB_NAMES) -> None:
        self._seconds = seconds
        self._max_names = max_names
        self._known: dict[tuple[str, int], tuple[str, float]] = {}

    def profile_of(self, name: str, port: int, now: float) -> str | None:
        """The profile whose web proxy is relayed to without asking; `now` is monotonic seconds."""
        profile, until = self._known.get((name, port), (None, now))
        return profile if now < until else None

    def remember(self, name: str, port: int, profile: str, now: float) -> None:
        """It was just decided that this name's web port leads to this profile's proxy."""
        self._known.pop((name, port), None)
        while len(self._known) >= self._max_names:
            del self._known[next(iter(self._known))]
        self._known[name, port] = (profile, now + self._seconds)

    def forget(self, profile: str) -> None:
        """The login of this profile has ended."""
        self._known = {key: known for key, known in self._known.items() if known[0] != profile}

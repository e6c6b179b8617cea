"""Which app a DNS name stands for, and which ports it takes.

Source: `lib/vnet/fqdn_resolver.go`, RFD 182. Only apps with a `tcp://` URI are VNet's; another
app's name goes to the ordinary DNS, which leads the browser to the proxy.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from ipc.messages import Refusal
from workers.proxy.teleport.cluster import Cluster
from workers.proxy.teleport.errors import TeleportError
from workers.proxy.teleport.names import name_predicate, normalise, public_addr_predicate
from workers.proxy.teleport.pb import types_pb2
from workers.proxy.teleport.remembered import Remembered

# Several agents may serve one app, and a web app may share its address.
LOOKUP_LIMIT = 10
# RFD 182 sets no limit; a message may have so many and more, a sane app has a handful.
MAX_PORT_RANGES = 10_000
# A user reads the valid ports in one sentence.
MAX_SHOWN_RANGES = 10


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports from `first` to `last`, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}" if self.first != self.last else str(self.first)


@dataclass(frozen=True, slots=True)
class App:
    """A TCP app. `ports` is None when any port leads to the one port in `uri`."""

    name: str
    public_addr: str
    uri: str
    ports: tuple[PortRange, ...] | None


@dataclass(frozen=True, slots=True)
class OtherApp:
    """An app that is no TCP app: a browser reaches it through the proxy's web address."""

    name: str


AnyApp: TypeAlias = App | OtherApp


def check_port(ports: tuple[PortRange, ...] | None, port: int) -> int | Refusal:
    """The target port for the certificate (0: the app's only one), or why there is none."""
    if ports is None:
        return 0
    if any(r.first <= port <= r.last for r in ports):
        return port
    return Refusal.PORT_NOT_ALLOWED


def valid_ports(app: App) -> str:
    """The ports of an app for a sentence: "5432, 6000-6010", at most MAX_SHOWN_RANGES of them."""
    ranges = app.ports or ()
    shown = ", ".join(map(str, ranges[:MAX_SHOWN_RANGES]))
    more = len(ranges) - MAX_SHOWN_RANGES
    return f"{shown} and {more} more" if more > 0 else shown


def make_app(app: types_pb2.AppV3) -> App | None:
    """The value of a TCP app; None for an app of another kind. Impossible ports are left out."""
    spec = app.Spec
    if not spec.URI.lower().startswith("tcp://"):
        return None
    ports = tuple(
        PortRange(r.Port, r.EndPort or r.Port)
        for r in spec.TCPPorts[:MAX_PORT_RANGES]
        if 1 <= r.Port <= (r.EndPort or r.Port) <= 65535
    )
    return App(app.Metadata.Name, spec.PublicAddr, spec.URI, ports if spec.TCPPorts else None)


def select_app(
    servers: Iterable[types_pb2.AppServerV3], name: str, label: str = ""
) -> AnyApp | None:
    """The app behind a name, in any spelling; None when there is none.

    A TCP app with this public address comes first, then another app with it or, if `label` is not
    empty, of that name. A TCP app that has only the name is none of VNet's.
    """
    other: OtherApp | None = None
    for app in (server.Spec.App for server in servers):
        has_address = normalise(app.Spec.PublicAddr) == normalise(name)
        if not app.Metadata.Name:
            continue
        tcp = make_app(app)
        if tcp is not None and has_address:
            return tcp
        has_name = bool(label) and app.Metadata.Name.lower() == label.lower()
        if tcp is None and (has_address or has_name):
            other = other or OtherApp(app.Metadata.Name)
    return other


@dataclass(frozen=True, slots=True)
class _Question:
    spelling: str
    label: str


class AppFinder:
    """Finds the app for a name in one cluster and remembers the answer: see `Remembered`."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        clock: Callable[[], float],
        positive_seconds: float = 60.0,
        negative_seconds: float = 10.0,
        patience_seconds: float = 1.0,
        max_names: int = 10_000,
    ) -> None:
        self._cluster = cluster
        self._kept = Remembered[_Question, AnyApp](
            self._ask,
            clock=clock,
            positive_seconds=positive_seconds,
            negative_seconds=negative_seconds,
            patience_seconds=patience_seconds,
            max_names=max_names,
        )

    async def find(
        self, name: str, *, spelling: str = "", label: str = "", fresh: bool = False
    ) -> AnyApp | None:
        """The app behind `name`, which is normalised; `spelling` is the same as it was typed.

        Servers compare bytes, so a public address with capitals is found by its own spelling, and
        from then on by every other. With `label` an app of that name counts as well: `select_app`.

        Raises:
            TeleportError: the cluster cannot be asked and never was asked for this name.
        """
        asked = _Question(name, label)
        typed = _Question(spelling.removesuffix(".") or name, label)
        return await self._kept.find(asked, typed, fresh=fresh)

    def current(self, name: str, label: str = "") -> tuple[AnyApp | None] | None:
        """The remembered answer in a tuple, or None when the cluster has to be asked."""
        found = self._kept.current(_Question(name, label))
        return None if found is None else (found.value,)

    def last_known(self, name: str, label: str = "") -> AnyApp | None:
        """What the cluster last said, however old; None also when it was never asked."""
        return self._kept.last_known(_Question(name, label))

    def expire(self) -> None:
        """Lets every name be asked again; the old answers still serve when that fails."""
        self._kept.expire()

    async def _ask(self, question: _Question) -> AnyApp | None:
        name, label = question.spelling, question.label
        predicate = public_addr_predicate([name])
        if label:
            predicate = f"{predicate} || {name_predicate(label)}"
        try:
            api = await self._cluster.api()
            servers = await api.app_servers(predicate, LOOKUP_LIMIT)
        except TeleportError as error:
            self._cluster.note(error)
            raise
        self._cluster.note(None)
        app = select_app(servers, name, label)
        self._kept.keep_normalised(_Question(normalise(name), label), app)
        return app

    async def close(self) -> None:
        """Ends the questions under way."""
        await self._kept.close()

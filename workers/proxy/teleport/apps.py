"""Which app a DNS name stands for, and which ports it takes.

Source: `lib/vnet/fqdn_resolver.go`, RFD 182. Only apps with a `tcp://` URI are VNet's; a web app's
name goes to the ordinary DNS, which leads the browser to the proxy.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from ipc.messages import Refusal
from workers.proxy.teleport.cluster import Cluster
from workers.proxy.teleport.errors import TeleportError
from workers.proxy.teleport.names import normalise, public_addr_predicate
from workers.proxy.teleport.pb import types_pb2
from workers.proxy.teleport.single_flight import SingleFlight

# Several agents may serve one app, and a web app may share its address.
LOOKUP_LIMIT = 10
# RFD 182 sets no limit; a message may have so many and more, a sane app has a handful.
MAX_PORT_RANGES = 10_000


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports from `first` to `last`, both included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class App:
    """A TCP app. `ports` is None when any port leads to the one port in `uri`."""

    name: str
    public_addr: str
    uri: str
    ports: tuple[PortRange, ...] | None


def check_port(ports: tuple[PortRange, ...] | None, port: int) -> int | Refusal:
    """The target port for the certificate (0: the app's only one), or why there is none."""
    if ports is None:
        return 0
    if any(r.first <= port <= r.last for r in ports):
        return port
    return Refusal.PORT_NOT_ALLOWED


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


def select_app(servers: Iterable[types_pb2.AppServerV3], name: str) -> App | None:
    """The TCP app with this public address, in any spelling; None when there is none."""
    for server in servers:
        app = make_app(server.Spec.App)
        if app is not None and app.name and normalise(app.public_addr) == normalise(name):
            return app
    return None


@dataclass(frozen=True, slots=True)
class _Found:
    app: App | None
    until: float


class AppFinder:
    """Finds the app for a name in one cluster and remembers the answer, also a negative one.

    When the cluster cannot be asked, or takes longer than `patience_seconds`, the last answer
    counts; the question goes on in the background. At most `max_names` are remembered;
    the one not used for longest is forgotten.
    """

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
        self._clock = clock
        self._positive_seconds = positive_seconds
        self._negative_seconds = negative_seconds
        self._patience_seconds = patience_seconds
        self._max_names = max_names
        self._found = OrderedDict[str, _Found]()
        self._flight = SingleFlight[str, App | None]()

    async def find(self, name: str) -> App | None:
        """The TCP app whose public address is `name`, without the trailing dot.

        Asked for in this spelling and in lower case.

        Raises:
            TeleportError: the cluster cannot be asked and never was asked for this name.
        """
        known = self._found.get(name)
        if known is not None:
            self._found.move_to_end(name)
            if self._clock() < known.until:
                return known.app
        if known is None:
            return await self._flight.run(name, lambda: self._ask(name))
        try:
            async with asyncio.timeout(self._patience_seconds):
                return await self._flight.run(name, lambda: self._ask(name))
        except (TeleportError, TimeoutError):
            return known.app

    def last_known(self, name: str) -> App | None:
        """What the cluster last said, however old; None also when it was never asked."""
        known = self._found.get(name)
        return known.app if known is not None else None

    def expire(self) -> None:
        """Lets every name be asked again; the old answers still serve when that fails."""
        self._found = OrderedDict((k, _Found(v.app, -inf)) for k, v in self._found.items())

    async def _ask(self, name: str) -> App | None:
        predicate = public_addr_predicate([name])
        try:
            servers = await self._cluster.api.app_servers(predicate, LOOKUP_LIMIT)
        except TeleportError as error:
            self._cluster.note(error)
            raise
        self._cluster.note(None)
        app = select_app(servers, name)
        seconds = self._negative_seconds if app is None else self._positive_seconds
        self._found[name] = _Found(app, self._clock() + seconds)
        self._found.move_to_end(name)
        while len(self._found) > self._max_names:
            self._found.popitem(last=False)
        return app

    async def close(self) -> None:
        """Ends the questions under way."""
        await self._flight.close()

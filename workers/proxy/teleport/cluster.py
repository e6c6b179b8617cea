"""What one cluster (root or leaf) says about itself: zones and address range, kept for minutes.

Source: `lib/vnet/clusterconfigcache.go`. When the cluster cannot be asked, the last answer is used.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from math import inf
from typing import TypeAlias

from ipc.messages import ClusterState
from workers.proxy.teleport.auth_client import AuthApi
from workers.proxy.teleport.errors import (
    RefusedError,
    TeleportError,
    UnreachableError,
    safe_text,
)
from workers.proxy.teleport.names import is_zone, normalise, split_host_port
from workers.proxy.teleport.pb import vnet_pb2
from workers.proxy.teleport.single_flight import SingleFlight

logger = logging.getLogger(__name__)

CONFIG_TTL_SECONDS = 300.0
RETRY_SECONDS = 5.0
# The report of a cluster takes 200; the profile's and the cluster's own name come first.
MAX_ZONES = 197
MAX_PREFIX_LENGTH = 27
# Questions asked with an earlier login end within this time.
RETIRE_SECONDS = 15.0
# So long a cluster that does not answer may keep others from being asked.
TURN_SECONDS = 1.0

Connect: TypeAlias = Callable[[], Awaitable[AuthApi]]


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The cluster's part in VNet.

    `zones`: normalised DNS zones, the proxy's public address first. `ipv4_range` is None when the
    cluster sets none, so that VNet's own applies. `problem` names settings that were ignored.
    """

    proxy_public_host: str
    zones: tuple[str, ...]
    ipv4_range: IPv4Network | None
    problem: str = ""


def make_config(proxy_public_addr: str, spec: vnet_pb2.VnetConfigSpec) -> ClusterConfig:
    """The configuration that the cluster's answers amount to. Pure; what is impossible is left out.

    Zones must be names of two labels or more: they become routing domains of the whole machine.
    """
    problems: list[str] = []
    try:
        host = split_host_port(proxy_public_addr)[0] if proxy_public_addr else ""
    except ValueError:
        host = ""
        problems.append(f"its public address {safe_text(proxy_public_addr, 60)!r} is none")
    zones = {host: None} if is_zone(host) else {}
    for suffix in (zone.suffix for zone in spec.custom_dns_zones):
        zone = normalise(suffix.strip()).removeprefix(".")
        if is_zone(zone) and len(zones) <= MAX_ZONES:
            zones[zone] = None
        else:
            problems.append(f"its DNS zone {safe_text(suffix, 60)!r} cannot be used")
    ipv4_range = None
    if spec.ipv4_cidr_range:
        ipv4_range = _range(spec.ipv4_cidr_range)
        if ipv4_range is None:
            problems.append(f"its range {safe_text(spec.ipv4_cidr_range, 60)!r} cannot be used")
    problem = safe_text("; ".join(problems), 300)
    if problem:
        problem += ": correct vnet_config"
    return ClusterConfig(host, tuple(zones), ipv4_range, problem)


@contextlib.asynccontextmanager
async def _turn(limiter: asyncio.Semaphore | None) -> AsyncIterator[None]:
    """One of the places that `limiter` has. Who does not answer soon makes room for others."""
    if limiter is None:
        yield
        return
    await limiter.acquire()
    left = contextlib.ExitStack()
    left.callback(limiter.release)
    timer = asyncio.get_running_loop().call_later(TURN_SECONDS, left.close)
    try:
        yield
    finally:
        timer.cancel()
        left.close()


async def _ask_config(api: AuthApi) -> ClusterConfig:
    ping = await api.ping()
    try:
        spec = await api.vnet_config()
    except RefusedError as error:
        if error.state is not ClusterState.OK:
            raise
        # Names below the proxy's address work without it.
        config = make_config(ping.ProxyPublicAddr, vnet_pb2.VnetConfigSpec())
        return replace(config, problem=safe_text(f"its vnet_config cannot be read: {error}"))
    return make_config(ping.ProxyPublicAddr, spec)


def _range(text: str) -> IPv4Network | None:
    try:
        network = IPv4Network(text.strip(), strict=False)
    except ValueError:
        return None
    return network if 1 <= network.prefixlen <= MAX_PREFIX_LENGTH else None


class _Connection:
    """A connection that is made when it is needed first."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._api: AuthApi | None = None
        self._is_closed = False
        self._opening = SingleFlight[str, AuthApi]()

    async def api(self) -> AuthApi:
        if self._api is not None:
            return self._api
        return await self._opening.run("open", self._open)

    async def _open(self) -> AuthApi:
        # Kept here: whoever asked may have been cancelled meanwhile.
        self._api = await self._connect()
        if self._is_closed:
            self._api.close()
        return self._api

    def close(self) -> None:
        self._is_closed = True
        if self._api is not None:
            self._api.close()

    async def end(self) -> None:
        await self._opening.close()
        self.close()


class Cluster:
    """One cluster with its connection, its configuration and how it was when last asked.

    `connect` makes the connection when the first question is asked; `limiter` bounds how many
    clusters are asked for their configuration at once. After a failure the next attempt waits
    `retry_seconds`, twice as long each time, up to `max_retry_seconds`.
    """

    def __init__(
        self,
        name: str,
        connect: Connect,
        *,
        clock: Callable[[], float],
        on_change: Callable[[], None],
        config_ttl_seconds: float = CONFIG_TTL_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
        max_retry_seconds: float = RETRY_SECONDS,
        limiter: asyncio.Semaphore | None = None,
    ) -> None:
        self.name = name
        self.config: ClusterConfig | None = None
        # The last error that says something about the cluster as a whole; None when all is well.
        self.problem: TeleportError | None = None
        # Of the problem: when it was met first and last.
        self.failing_since = self.failed_at = -inf
        # Since when it is not known which names are the cluster's.
        self.asked_since = clock()
        self._clock = clock
        self._on_change = on_change
        self._ttl_seconds = config_ttl_seconds
        self._retry_seconds = retry_seconds
        self._max_retry_seconds = max_retry_seconds
        self._failures = 0
        self._limiter = limiter
        self._answered_at = self._refresh_at = -inf
        self._config_error: TeleportError | None = None
        self._flight = SingleFlight[str, ClusterConfig]()
        self._connection = _Connection(connect)
        self._retiring: dict[_Connection, asyncio.TimerHandle] = {}

    def use(self, connect: Connect) -> None:
        """Takes over a new login; what is known stays until it can be asked again.

        Questions under way are finished with the old one.
        """
        self.asked_since = self._clock()
        self.reconnect(connect)

    def reconnect(self, connect: Connect) -> None:
        """Makes the connection anew, another way."""
        old, self._connection = self._connection, _Connection(connect)
        self._retiring[old] = asyncio.get_running_loop().call_later(
            RETIRE_SECONDS, self._retire, old
        )
        self._failures = 0
        self.expire()

    def _retire(self, old: _Connection) -> None:
        del self._retiring[old]
        old.close()

    async def api(self) -> AuthApi:
        """The connection.

        Raises:
            TeleportError: it cannot even be prepared.
        """
        return await self._connection.api()

    def expire(self) -> None:
        """Lets the next use of the configuration ask the cluster again."""
        self._refresh_at = -inf

    def doubt(self) -> None:
        """It was not reached in another way: whether it is well is found out soon."""
        if self.problem is None:
            soon = max(self._clock(), self._answered_at + self._retry_seconds)
            self._refresh_at = min(self._refresh_at, soon)

    def is_due(self) -> bool:
        """Whether the configuration should be asked for, and nobody is about it."""
        return self._clock() >= self._refresh_at and not self._flight.is_running("config")

    async def current_config(self) -> ClusterConfig:
        """The configuration, asked for when it is too old; the last known one if that fails.

        Raises:
            TeleportError: it was never known, and the cluster cannot be asked.
        """
        if self._clock() < self._refresh_at:
            if self.config is not None:
                return self.config
            assert self._config_error is not None
            raise self._config_error
        try:
            return await self._flight.run("config", self._fetch)
        except TeleportError:
            if self.config is not None:
                return self.config
            raise

    async def first_config(self, seconds: float) -> ClusterConfig:
        """The configuration, however old; waits for the first one until `asked_since` + `seconds`.

        Raises:
            TeleportError: it is not known, and the cluster has failed or not answered by then.
        """
        if self.config is not None:
            return self.config
        left = self.asked_since + seconds - self._clock()
        if left <= 0:
            raise self._config_error or self._silent()
        try:
            async with asyncio.timeout(left):
                return await self.current_config()
        except TimeoutError as error:
            raise self._silent() from error

    def _silent(self) -> TeleportError:
        return UnreachableError(f"{safe_text(self.name, 100)} has not answered yet")

    async def _fetch(self) -> ClusterConfig:
        connection = self._connection
        try:
            async with _turn(self._limiter):
                config = await _ask_config(await connection.api())
        except TeleportError as error:
            if connection is not self._connection:
                raise
            self._failures += 1
            wait = self._retry_seconds * 2 ** min(self._failures - 1, 10)
            self._refresh_at = self._clock() + min(wait, self._max_retry_seconds)
            self._config_error = error
            self.note(error)
            raise
        self._failures = 0
        self._answered_at = self._clock()
        if connection is self._connection:
            self._refresh_at = self._clock() + self._ttl_seconds
        changed = config != self.config
        if changed and config.problem:
            logger.warning("cluster %s: %s", self.name, config.problem)
        self.config = config
        self.note(None)
        if changed:
            self._on_change()
        return config

    def note(self, outcome: TeleportError | None) -> None:
        """Records how a call to this cluster went; None for success."""
        if outcome is not None and outcome.state is None:
            return
        well = outcome is None or outcome.state is ClusterState.OK
        if not well:
            self.failed_at = self._clock()
            if self.problem is None:
                self.failing_since = self.failed_at
                # Nobody may ask again for minutes: whether it is well is found out before.
                self._refresh_at = min(self._refresh_at, self.failed_at + self._retry_seconds)
        before, self.problem = self.problem, None if well else outcome
        problem = self.problem
        if str(before) != str(problem):
            if problem is not None:
                logger.warning("%s", problem)
            self._on_change()

    async def close(self) -> None:
        """Ends what runs and closes the connection."""
        await self._flight.close()
        await self._connection.end()
        for old, handle in self._retiring.items():
            handle.cancel()
            await old.end()
        self._retiring.clear()

"""What one cluster (root or leaf) says about itself: zones and address range, kept for minutes.

Source: `lib/vnet/clusterconfigcache.go`. When the cluster cannot be asked, the last answer is used.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Network
from math import inf

from ipc.messages import ClusterState
from workers.proxy.teleport.auth_client import AuthApi
from workers.proxy.teleport.errors import TeleportError, safe_text
from workers.proxy.teleport.names import is_zone, normalise, split_host_port
from workers.proxy.teleport.pb import vnet_pb2
from workers.proxy.teleport.single_flight import SingleFlight

logger = logging.getLogger(__name__)

CONFIG_TTL_SECONDS = 300.0
MAX_ZONES = 199  # the report of a cluster takes 200, and one is the proxy's own
MAX_PREFIX_LENGTH = 27


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
    return ClusterConfig(host, tuple(zones), ipv4_range, safe_text("; ".join(problems)))


def _range(text: str) -> IPv4Network | None:
    try:
        network = IPv4Network(text.strip(), strict=False)
    except ValueError:
        return None
    return network if 1 <= network.prefixlen <= MAX_PREFIX_LENGTH else None


class Cluster:
    """One cluster with its connection, its configuration and how it was when last asked."""

    def __init__(
        self,
        name: str,
        api: AuthApi,
        *,
        clock: Callable[[], float],
        on_change: Callable[[], None],
        config_ttl_seconds: float = CONFIG_TTL_SECONDS,
        retry_seconds: float = 5.0,
    ) -> None:
        self.name = name
        self.api = api
        self.config: ClusterConfig | None = None
        # The last error that says something about the cluster as a whole; None when all is well.
        self.problem: TeleportError | None = None
        self._clock = clock
        self._on_change = on_change
        self._ttl_seconds = config_ttl_seconds
        self._retry_seconds = retry_seconds
        self._refresh_at = -inf
        self._config_error: TeleportError | None = None
        self._flight = SingleFlight[str, ClusterConfig]()

    def use(self, api: AuthApi) -> None:
        """Takes over a new login; what is known stays until it can be asked again."""
        self.api.close()
        self.api = api
        self.expire()

    def expire(self) -> None:
        """Lets the next use of the configuration ask the cluster again."""
        self._refresh_at = -inf

    def is_due(self) -> bool:
        """Whether the configuration should be asked for."""
        return self._clock() >= self._refresh_at

    async def current_config(self) -> ClusterConfig:
        """The configuration, asked for when it is too old; the last known one if that fails.

        Raises:
            TeleportError: it was never known, and the cluster cannot be asked.
        """
        if not self.is_due():
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

    async def _fetch(self) -> ClusterConfig:
        try:
            ping = await self.api.ping()
            config = make_config(ping.ProxyPublicAddr, await self.api.vnet_config())
        except TeleportError as error:
            self._refresh_at = self._clock() + self._retry_seconds
            self._config_error = error
            self.note(error)
            raise
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
        before, self.problem = self.problem, None if well else outcome
        problem = self.problem
        if str(before) != str(problem):
            if problem is not None:
                logger.warning("%s", problem)
            self._on_change()

    async def close(self) -> None:
        """Ends what runs and closes the connection."""
        await self._flight.close()
        self.api.close()

"""The leaf clusters of a root: which there are, whether they are connected, whom they trust.

Source: `lib/vnet/clusterconfigcache.go`, presence and trust services of `api/proto/teleport`. The
list is kept for minutes; when the root cannot be asked, the last one counts.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf

from ipc.messages import ClusterState
from workers.proxy.teleport.cluster import Cluster
from workers.proxy.teleport.errors import RefusedError, TeleportError, UnreachableError
from workers.proxy.teleport.pb import types_pb2
from workers.proxy.teleport.single_flight import SingleFlight

logger = logging.getLogger(__name__)

LIST_TTL_SECONDS = 300.0
# The return of a leaf is looked for more often than that of a new one.
OFFLINE_SECONDS = 30.0
RETRY_SECONDS = 5.0
MAX_LEAVES = 5000
MAX_NAME = 253


def read_leaves(found: Iterable[types_pb2.RemoteClusterV3]) -> dict[str, bool]:
    """Leaf names, sorted, and whether the root calls them connected. Impossible names are left out.

    A root that does not tell counts its leaves as connected. At most MAX_LEAVES are taken.
    """
    leaves = {
        cluster.Metadata.Name: cluster.Status.Connection != "offline"
        for cluster in found
        if 0 < len(cluster.Metadata.Name) <= MAX_NAME and cluster.Metadata.Name.isprintable()
    }
    if len(leaves) > MAX_LEAVES:
        logger.warning("%d leaf clusters are too many and ignored", len(leaves) - MAX_LEAVES)
    return dict(sorted(leaves.items())[:MAX_LEAVES])


@dataclass(frozen=True, slots=True)
class _Trust:
    certificates: tuple[bytes, ...]
    until: float


class Leaves:
    """The leaves of one root cluster. `on_answer` is called after each list, changed or not."""

    def __init__(
        self,
        root: Cluster,
        *,
        clock: Callable[[], float],
        on_answer: Callable[[], None],
        ttl_seconds: float = LIST_TTL_SECONDS,
    ) -> None:
        # None: the root has not answered yet.
        self.known: Mapping[str, bool] | None = None
        self.answered_at = -inf
        self._tried_at = -inf
        self._root = root
        self._clock = clock
        self._on_answer = on_answer
        self._ttl_seconds = ttl_seconds
        self._refresh_at = -inf
        self._trust: dict[str, _Trust] = {}
        self._listing = SingleFlight[str, Mapping[str, bool]]()
        self._asking = SingleFlight[str, tuple[bytes, ...]]()

    def expire(self) -> None:
        """Lets everything be asked again, with another login; the old serves while that fails."""
        self._refresh_at = -inf
        self._trust.clear()

    def want(self) -> None:
        """Something may have changed: asks again soon, but not at every turn."""
        self._refresh_at = min(self._refresh_at, self._tried_at + RETRY_SECONDS)

    def is_due(self) -> bool:
        """Whether the list should be asked for, and nobody is about it."""
        return self._clock() >= self._refresh_at and not self._listing.is_running("list")

    async def current(self) -> Mapping[str, bool]:
        """The leaves, asked for when that is due; the last known ones if that fails.

        A root that refuses to tell has none, as far as VNet can know.

        Raises:
            TeleportError: they were never known, and the root cannot be asked.
        """
        if self._clock() < self._refresh_at and self.known is not None:
            return self.known
        try:
            return await self._listing.run("list", self._fetch)
        except TeleportError:
            if self.known is not None:
                return self.known
            raise

    async def _fetch(self) -> Mapping[str, bool]:
        self._tried_at = self._clock()
        self._refresh_at = self._tried_at + RETRY_SECONDS
        try:
            api = await self._root.api()
            leaves = read_leaves(await api.remote_clusters())
        except TeleportError as error:
            if error.state is not ClusterState.OK:
                self._root.note(error)
                raise
            logger.info("leaf clusters are not used: %s", error)
            leaves = {}
        self._root.note(None)
        self.answered_at = self._clock()
        seconds = self._ttl_seconds
        if not all(leaves.values()):
            seconds = min(seconds, OFFLINE_SECONDS)
        self._refresh_at = self.answered_at + seconds
        self.known = leaves
        self._on_answer()
        return leaves

    async def authorities(self, leaf: str, *, is_new: bool = False) -> tuple[bytes, ...]:
        """The host authorities (DER) of a leaf, from the root; `is_new`: not the remembered ones.

        Raises:
            UnreachableError: the root cannot be asked or knows none.
        """
        trust = self._trust.get(leaf)
        if trust is not None and self._clock() < trust.until and not is_new:
            return trust.certificates
        return await self._asking.run(leaf, lambda: self._ask(leaf))

    async def _ask(self, leaf: str) -> tuple[bytes, ...]:
        api = await self._root.api()
        try:
            certificates = await api.host_authority(leaf)
        except RefusedError as error:
            raise UnreachableError(
                f"leaf cluster {leaf}: nobody says whom to trust: {error}"
            ) from error
        if not certificates:
            raise UnreachableError(f"{self._root.name} knows no host authority of leaf {leaf}")
        self._trust[leaf] = _Trust(certificates, self._clock() + self._ttl_seconds)
        return certificates

    async def close(self) -> None:
        """Ends the questions under way."""
        await self._listing.close()
        await self._asking.close()

"""The report of all clusters, in messages of bounded size and put together again. Pure."""

from collections.abc import Sequence

import msgspec

from ipc.codec import MAX_MESSAGE_BYTES
from ipc.messages import MAX_SAFE_TEXT, Cluster, ClustersReported

# Room for the envelope; a single cluster with 200 zones of 253 characters still fits.
PART_BYTES = MAX_MESSAGE_BYTES - 64 * 1024
MAX_PARTS = 100
MAX_PART_CLUSTERS = 1000


class ReportOrderError(Exception):
    """A part came out of its order."""


def split(clusters: Sequence[Cluster], problem: str) -> list[ClustersReported]:
    """The messages that report these clusters, in their order; at least one.

    What does not fit into MAX_PARTS messages (tens of thousands of clusters) is left out, and the
    problem says so.
    """
    parts: list[list[Cluster]] = [[]]
    left = PART_BYTES
    for cluster in clusters:
        size = len(msgspec.msgpack.encode(cluster))
        if parts[-1] and (size > left or len(parts[-1]) == MAX_PART_CLUSTERS):
            parts.append([])
            left = PART_BYTES
        parts[-1].append(cluster)
        left -= size
    if len(parts) > MAX_PARTS:
        excess = sum(map(len, parts[MAX_PARTS:]))
        problem = problem or (
            f"{excess} clusters are too many and ignored: run tsh logout --proxy=<address> for profiles"
            " that you do not need"
        )
        del parts[MAX_PARTS:]
    problem = _fitting(problem)
    return [
        ClustersReported(clusters=part, problem=problem, part=number, parts=len(parts))
        for number, part in enumerate(parts)
    ]


def _fitting(problem: str) -> str:
    """As much of a sentence as a message takes: the path in its middle may be as long as it likes."""
    if len(problem) <= MAX_SAFE_TEXT:
        return problem
    half = MAX_SAFE_TEXT // 2
    return f"{problem[: half - 3]}...{problem[-half:]}"


class Assembly:
    """Puts the parts of one speaker together."""

    def __init__(self) -> None:
        self._clusters: list[Cluster] = []
        self._expected = 0

    @property
    def is_begun(self) -> bool:
        """Whether parts have come and others are due."""
        return self._expected > 0

    def take(self, message: ClustersReported) -> list[Cluster] | None:
        """All clusters when the last part has come, else None. A first part begins anew.

        Raises:
            ReportOrderError: another part was due.
        """
        if message.part == 0:
            self._clusters = []
        elif message.part != self._expected:
            raise ReportOrderError(f"part {message.part} of the clusters came out of order")
        self._clusters += message.clusters
        self._expected = message.part + 1
        if self._expected < message.parts:
            return None
        clusters, self._clusters, self._expected = self._clusters, [], 0
        return clusters

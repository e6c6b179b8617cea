"""What commands and the status page need of the supervisor, so that they do not import it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from ipc.messages import Network, SetLogLevel
from supervisor.clusters import ClusterView
from supervisor.settings import Settings
from supervisor.worker import Worker


class ObservedRun(Protocol):
    """A run as the status page sees it."""

    @property
    def settings(self) -> Settings: ...

    @property
    def workers(self) -> Mapping[str, Worker]:
        """By slot, in the order in which they are started."""
        ...

    @property
    def network(self) -> Network: ...

    @property
    def zones(self) -> Sequence[str]: ...

    @property
    def range_problems(self) -> Sequence[str]:
        """Sentences about zones and ranges that were left out."""
        ...

    @property
    def were_ready(self) -> bool:
        """Whether all workers have been ready once."""
        ...

    @property
    def started_at(self) -> float:
        """Monotonic seconds."""
        ...

    @property
    def past_counters(self) -> Mapping[str, int]:
        """Totals of worker processes that have ended."""
        ...

    def cluster_report(self) -> ClusterView | None:
        """What is known of the clusters, or None while no proxy has spoken."""
        ...


class Run(ObservedRun, Protocol):
    """A run as commands see it."""

    def order_stop(self) -> None:
        """Ends VNet soon."""
        ...

    def restart(self, worker: Worker) -> None:
        """Restarts a worker; this never counts as a crash."""
        ...

    def use_upstream(self, configured: Sequence[str]) -> None:
        """Takes over `dns.upstream` of a reloaded configuration."""
        ...

    def use_log_level(self, message: SetLogLevel) -> None:
        """Every worker takes over the level."""
        ...

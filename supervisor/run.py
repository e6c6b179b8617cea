"""What commands and the status page need of the supervisor, so that they do not import it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ipc.messages import Access, DataPlaneKind, Network, SetLogLevel
from supervisor.clusters import ClusterView
from supervisor.control import Promise
from supervisor.in_force import Then
from supervisor.log_book import LogBook
from supervisor.reload_plan import ReloadPlan
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
    def others(self) -> Sequence[Worker]:
        """Successors that are not ready, and earlier processes that finish what they have."""
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
    def probe_problems(self) -> Sequence[str]:
        """Sentences about probes that nobody answers, and no worker is to blame."""
        ...

    @property
    def network_problems(self) -> Sequence[str]:
        """Sentences about what others do to VNet's routes and interface."""
        ...

    @property
    def data_plane(self) -> DataPlaneKind:
        """How packets get to the sockets."""
        ...

    @property
    def os_integration(self) -> str:
        """What sets up the system's resolver, as `dns.os_integration` names it."""
        ...

    @property
    def os_problems(self) -> Sequence[str]:
        """Sentences about the system's resolver."""
        ...

    @property
    def os_reasons(self) -> Sequence[str]:
        """Clauses that say why `os_integration` was chosen; empty before it was."""
        ...

    @property
    def access(self) -> Access:
        """Which users may connect."""
        ...

    @property
    def access_problems(self) -> Sequence[str]:
        """Sentences about why nobody may connect."""
        ...

    @property
    def access_warnings(self) -> Sequence[str]:
        """Sentences about others who may connect than was meant."""
        ...

    @property
    def forwarding_warnings(self) -> Sequence[str]:
        """Sentences about networks in `security.allow_forwarded_from` that are not in force."""
        ...

    @property
    def metrics_problems(self) -> Sequence[str]:
        """Sentences about why metrics are not served."""
        ...

    @property
    def were_ready(self) -> bool:
        """Whether all workers that connections need have been ready once."""
        ...

    @property
    def was_healthy(self) -> bool:
        """Whether VNet has been healthy once."""
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

    @property
    def log_book(self) -> LogBook:
        """The last lines of the log."""
        ...

    def order_stop(self) -> None:
        """Ends VNet soon."""
        ...

    def restart(self, worker: Worker) -> None:
        """Restarts a worker; this never counts as a crash."""
        ...

    def replace(self, slots: Sequence[str]) -> None:
        """Replaces workers without cutting a connection. Raises CannotReplaceError."""
        ...

    def order_upgrade(self) -> Promise:
        """Has the installed version take over. Raises CannotReplaceError, UpgradeError."""
        ...

    def use_config(self, plan: ReloadPlan, teleport_home: Path) -> None:
        """Takes over what can change while VNet runs. Raises CannotReplaceError."""
        ...

    def when_in_force(self, then: Then) -> None:
        """Calls `then` soon: when all workers have taken over what they were told until now."""
        ...

    def use_log_level(self, message: SetLogLevel) -> None:
        """Every worker takes over the level."""
        ...

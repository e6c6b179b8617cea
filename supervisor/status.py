"""What `vnet status` shows (docs/schema/status.json), and how health follows from it. Pure."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final

import msgspec

from ipc.messages import Cluster, ClusterState, DataPlaneKind
from ipc.slots import METRICS
from supervisor.exits import ExitStatus
from supervisor.worker_states import WorkerState

SCHEMA: Final = 1
# Clusters that are named in one reason.
_MAX_AWAITED: Final = 5


class Health(StrEnum):
    """The one-word summary."""

    STARTING = "starting"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    STOPPED = "stopped"


EXIT_OF_HEALTH: Final = {
    Health.STARTING: ExitStatus.DEGRADED,
    Health.HEALTHY: ExitStatus.OK,
    Health.DEGRADED: ExitStatus.DEGRADED,
    Health.STOPPED: ExitStatus.NOT_RUNNING,
}


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    pass


class SupervisorStatus(_Part, frozen=True):
    """The supervisor process."""

    pid: int
    version: str
    uptime_seconds: float
    user: str


class LastExitStatus(_Part, frozen=True):
    """How a worker's previous process ended: a status, or the name of a signal."""

    status: int | None
    signal: str | None


class ConfinementStatus(_Part, frozen=True):
    """What a worker has said of its confinement before its own code began.

    `capabilities` are those it could not be rid of, `landlock` is the version of the kernel's
    interface, `seccomp` the kind of the system call filter; `missing` says what is not in force.
    """

    uid: int
    no_new_privs: bool
    capabilities: list[str]
    landlock: int | None
    seccomp: str | None
    missing: list[str]


class WorkerStatus(_Part, frozen=True):
    """One worker slot. Measures of the process are null while there is none."""

    name: str
    pid: int | None
    state: WorkerState
    restarts: int
    uptime_seconds: float | None
    heartbeat_age_seconds: float | None
    rss_bytes: int | None
    cpu_percent: float | None
    last_exit: LastExitStatus | None
    confinement: ConfinementStatus | None = None


class NetworkStatus(_Part, frozen=True):
    """Addresses, ranges and zones in use."""

    interface: str
    mtu: int
    ipv4_cidr_ranges: list[str]
    ipv6_prefix: str | None
    dns_addresses: list[str]
    dns_zones: list[str]
    os_integration: str
    data_plane: DataPlaneKind


class ClusterStatus(_Part, frozen=True):
    """One cluster of one profile."""

    name: str
    profile: str
    leaf_of: str | None
    state: ClusterState
    user: str
    expires: str | None


class ConnectionsStatus(_Part, frozen=True):
    """Totals since the start of the workers that run now."""

    active: int
    total: int
    failed: int
    bytes_sent: int
    bytes_received: int


class Check(StrEnum):
    """Whether something is looked at."""

    ON = "on"
    OFF = "off"


class SecurityStatus(_Part, frozen=True):
    """Who may connect, and which HTTP requests pass.

    `http_unchecked` names the apps whose requests all pass. What was refused is counted since the start.
    """

    user_check: Check
    http_check: Check
    http_unchecked: list[str]
    users_refused: int
    http_refused: int


class Status(_Part, frozen=True, kw_only=True):
    """The whole answer. Others than root and the VNet user get health and reasons only.

    `warnings` say what works otherwise than it was meant; health does not follow from them.
    `reason_ids` has the kind of each reason, in the same order (docs/troubleshooting.md); a later
    version may know more kinds.
    """

    schema: int = SCHEMA
    health: Health
    reasons: list[str]
    reason_ids: list[str] = []
    supervisor: SupervisorStatus | None = None
    workers: list[WorkerStatus] | None = None
    network: NetworkStatus | None = None
    clusters: list[ClusterStatus] | None = None
    connections: ConnectionsStatus | None = None
    security: SecurityStatus | None = None
    warnings: list[str] = []


class Summary(_Part, frozen=True, kw_only=True):
    """What everyone may see."""

    schema: int = SCHEMA
    health: Health
    reasons: list[str]
    reason_ids: list[str] = []


def judge(
    workers: Sequence[WorkerStatus],
    clusters: Sequence[Cluster],
    *,
    clusters_are_known: bool,
    awaited: Sequence[str] = (),
    were_ready: bool,
    other_reasons: Iterable[str],
) -> tuple[Health, list[str]]:
    """Health and its reasons; each is a sentence that says what to do.

    `were_ready` says whether all workers have been ready once, `clusters_are_known` whether a
    proxy has reported, `awaited` names the clusters whose first answer is waited for.
    """
    reasons = [*_worker_reasons(workers, were_ready=were_ready)]
    reasons += [cluster.problem for cluster in clusters if cluster.problem]
    reasons += other_reasons
    # Nobody waits for metrics.
    needed = [worker for worker in workers if worker.name != METRICS]
    if not were_ready and all(w.state is not WorkerState.FAILED for w in needed):
        return Health.STARTING, reasons or ["The workers are starting: wait."]
    if not clusters_are_known and not reasons:
        return Health.STARTING, ["The Teleport profiles are being read: wait."]
    if awaited and not reasons:
        shown = ", ".join(map(repr, awaited[:_MAX_AWAITED]))
        return Health.STARTING, [f"First answers of clusters are due ({shown}): wait."]
    return (Health.DEGRADED if reasons else Health.HEALTHY), list(dict.fromkeys(reasons))


def _worker_reasons(workers: Sequence[WorkerStatus], *, were_ready: bool) -> Iterable[str]:
    for worker in workers:
        ended = _ended(worker.last_exit)
        if worker.state is WorkerState.FAILED:
            yield (
                f"The worker {worker.name} {ended} too often and is given up: read the log, then"
                f" run: vnet restart {worker.name}"
            )
        elif worker.state is WorkerState.BACKOFF:
            yield f"The worker {worker.name} {ended} and is restarted in a moment: wait."
        elif were_ready and worker.state is not WorkerState.READY and worker.name != METRICS:
            yield f"The worker {worker.name} is {worker.state}: wait."


def _ended(last_exit: LastExitStatus | None) -> str:
    if last_exit is None:
        return "ended"
    if last_exit.signal is not None:
        return f"ended with {last_exit.signal}"
    return f"ended with status {last_exit.status}"

"""What a supervisor hands to the program that goes on in its place: the same process, a newer version.

    | magic, 8 bytes | version of the format, 2 bytes, big-endian | MessagePack of Handover |

It lies in sealed memory whose descriptor the new program inherits, together with every descriptor that
is named in it. Within a version of the format fields are only added, each with a default, so that programs
of different ages understand each other. Times are monotonic seconds; the clock goes on.
"""

import struct
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from ipc.messages import BusKeys, Cluster, Confined, Network
from ipc.order import Stage
from ipc.slots import METRICS
from supervisor import sealed
from supervisor.config import Config
from supervisor.exits import StartupError
from supervisor.log_book import LogEntry
from supervisor.worker_states import WorkerState

# The second for states with a metrics worker: a program that knows none of these must not even try.
FORMAT: Final = 2
_WITHOUT_METRICS: Final = 1
_MAGIC: Final = b"VNetHand"
_HEADER: Final = struct.Struct(">8sH")
# Sixteen thousand listeners, the kept log and what waits for a worker that does not read, and room.
MAX_BYTES: Final = 256 << 20


class HandoverError(StartupError):
    """What was handed over cannot be used."""


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    pass


class KeptIdentity(_Part, frozen=True, kw_only=True):
    """Whom the worker of a slot becomes: `supervisor.privileges.Identity`."""

    uid: int
    gid: int
    extra_group: int | None = None


class KeptMessage(_Part, frozen=True, kw_only=True):
    """A message for a worker that has not read yet, as bytes of `ipc.codec`, and its descriptors."""

    data: bytes
    descriptors: list[int] = []


class KeptProcess(_Part, frozen=True, kw_only=True):
    """A worker's process. A descriptor is -1 where its pipe has ended.

    `conversation` is that of `ipc.order` which it was started with.
    """

    pid: int
    channel: int
    log: int
    log_unread: bytes = b""
    error_output: int
    error_output_unread: bytes = b""
    waiting: list[KeptMessage] = []
    conversation: int = 0


class KeptExit(_Part, frozen=True, kw_only=True):
    """How the last process of a slot ended: a status, or the name of a signal."""

    status: int | None
    signal: str | None


class KeptWorker(_Part, frozen=True, kw_only=True):
    """A worker slot, or a process that finishes what it has."""

    slot: str
    state: WorkerState
    stage: Stage
    process: KeptProcess | None = None
    restarts: int = 0
    last_exit: KeptExit | None = None
    counters: dict[str, int] = {}
    confinement: Confined | None = None
    started_at: float = 0.0
    last_heartbeat: float = 0.0
    restart_at: float | None = None
    kill_at: float | None = None
    drains_until: float | None = None
    waits_for_take_over: bool = False
    comes_back: bool = False
    crashes: list[float] = []
    has_hung_up: bool = False
    killed_at: float | None = None


class KeptListener(_Part, frozen=True, kw_only=True):
    """A listener for a virtual address (packed) and port; idle if no proxy uses it."""

    address: bytes
    port: int
    descriptor: int
    is_idle: bool = False


class KeptDevices(_Part, frozen=True, kw_only=True):
    """The data plane: `supervisor.dataplane.KeptLink`."""

    outer: int
    inner: int | None
    namespace: int | None
    dns: list[int]


class KeptReport(_Part, frozen=True, kw_only=True):
    """What one proxy has said of the clusters: `supervisor.clusters.ClusterView`."""

    clusters: list[Cluster]
    problem: str


class KeptCpu(_Part, frozen=True, kw_only=True):
    """The CPU time of one process, which may have ended since it was looked at."""

    slot: str
    pid: int
    started_at: float
    milliseconds: int


class KeptMetrics(_Part, frozen=True, kw_only=True):
    """Where metrics are served: `supervisor.metrics_endpoint.MetricsEndpoint`.

    `listen` is the address as the configuration had it. CPU time of the processes that have ended, by slot,
    and of those at the last look. `started_at` is Unix time as it was told, or None if it never was.
    """

    descriptor: int
    listen: str = ""
    cpu_milliseconds: dict[str, int] = {}
    processes: list[KeptCpu] = []
    started_at: float | None = None


class KeptLog(_Part, frozen=True, kw_only=True):
    """The lines for `vnet logs`; `name` and `last` are the book's name and its last number."""

    name: str = ""
    last: int = 0
    lines: list[LogEntry] = []


class Handover(_Part, frozen=True, kw_only=True):
    """Everything that survives. `config` is the configuration in force, as `supervisor.config.Config`."""

    pid: int
    version: str
    config: dict[str, Any]
    network: Network
    keys: dict[str, BusKeys]
    identities: dict[str, KeptIdentity]
    lock: int
    control: int
    devices: KeptDevices
    listeners: list[KeptListener]
    workers: list[KeptWorker]
    leavers: list[KeptWorker] = []
    reports: dict[str, KeptReport] = {}
    known_clusters: list[Cluster] = []
    past_counters: dict[str, int] = {}
    metrics: KeptMetrics | None = None
    started_at: float
    were_ready: bool
    was_healthy: bool = False
    log_level: str
    log: KeptLog = KeptLog()

    def descriptors(self) -> Iterator[int]:
        """Every descriptor that is named in it and open."""
        devices = self.devices
        yield from (self.lock, self.control, devices.outer)
        yield from (part for part in (devices.inner, devices.namespace) if part is not None)
        yield from devices.dns
        if self.metrics is not None:
            yield self.metrics.descriptor
        yield from (listener.descriptor for listener in self.listeners)
        for worker in (*self.workers, *self.leavers):
            if (process := worker.process) is not None:
                ends = (process.channel, process.log, process.error_output)
                yield from (end for end in ends if end >= 0)
                for message in process.waiting:
                    yield from message.descriptors


def config_of(state: Handover) -> Config:
    """The configuration in force. Raises HandoverError."""
    try:
        return msgspec.convert(state.config, Config)
    except msgspec.ValidationError as error:
        raise HandoverError(
            f"the configuration of the running VNet is not understood: {error}"
        ) from error


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Handover)


def encode(state: Handover) -> bytes:
    """As bytes, format and all."""
    has_metrics = any(worker.slot == METRICS for worker in (*state.workers, *state.leavers))
    return _HEADER.pack(_MAGIC, FORMAT if has_metrics else _WITHOUT_METRICS) + _encoder.encode(
        state
    )


def decode(data: bytes) -> Handover:
    """The state in `data`.

    Raises:
        HandoverError: it is none, or of another version of the format.
    """
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise HandoverError("it is no state of a running VNet")
    _, version = _HEADER.unpack_from(data)
    if version not in (_WITHOUT_METRICS, FORMAT):
        raise HandoverError(
            f"the running VNet hands over in format {version}, and this version understands"
            f" {FORMAT}: restart VNet"
        )
    try:
        return _decoder.decode(data[_HEADER.size :])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HandoverError(f"the state of the running VNet is not understood: {error}") from error


def seal(state: Handover) -> int:
    """A close-on-exec descriptor of sealed memory with the state. Raises OSError, HandoverError."""
    data = encode(state)
    if len(data) > MAX_BYTES:
        raise HandoverError(f"its state has {len(data)} bytes, more than {MAX_BYTES}")
    return sealed.seal("vnet-handover", data)


def unseal(descriptor: int) -> Handover:
    """The state behind a descriptor of `seal`, which stays open.

    Raises:
        HandoverError: it is none.
    """
    try:
        data = sealed.unseal(descriptor, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise HandoverError(f"descriptor {descriptor} has no state of VNet: {error}") from error
    return decode(data)

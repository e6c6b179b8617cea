"""What the supervisor tells the metrics worker: `ipc.messages.MetricsSnapshot`, from a running one."""

import os
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import psutil

from ipc import codec, counters
from ipc import messages as m
from ipc.permits import role_of
from supervisor.handover import KeptCpu
from supervisor.run import ObservedRun
from supervisor.settings import version
from supervisor.worker import Worker
from supervisor.worker_states import WorkerState

# As many as the message takes; the others are counted.
MAX_CLUSTERS: Final = 100
MAX_WORKERS: Final = 100
# Of the names of all of them, for a message has a limit as a whole too; everything else has less.
MAX_NAME_BYTES: Final = codec.MAX_MESSAGE_BYTES // 2


class Figures:
    """Keeps what has to be remembered from one look to the next.

    `past_cpu` are the milliseconds of a CPU that processes have used that have ended, by slot, and
    `processes` those that have not, as of the last look of an earlier program of this process;
    `started_at` is the Unix time of the start of VNet: found once, because the clocks do not go alike.
    """

    def __init__(
        self,
        past_cpu: dict[str, int] | None = None,
        started_at: float | None = None,
        processes: Sequence[KeptCpu] = (),
    ) -> None:
        self.past_cpu = past_cpu or {}
        self.started_at = started_at
        self._own_cpu = 0
        # By process id and start (monotonic seconds), as of the last look. In whole milliseconds, because
        # sums of fractions differ with their order, and a total must not fall by the last digit of one.
        self._processes: dict[tuple[int, float], tuple[str, psutil.Process | None, int]] = {
            (each.pid, each.started_at): (each.slot, None, each.milliseconds) for each in processes
        }

    def collect(self, run: ObservedRun, health: str) -> m.MetricsSnapshot:
        """The figures of this moment."""
        now, wall = time.monotonic(), time.time()
        everyone = [*run.workers.values(), *run.others]
        memory = self._look(everyone)
        report = run.cluster_report()
        clusters = report.clusters if report is not None else []
        own = _process(os.getpid())
        self._own_cpu = max(self._own_cpu, _cpu(own))
        if self.started_at is None:
            self.started_at = wall - (now - run.started_at)
        return m.MetricsSnapshot(
            taken_at=wall,
            started_at=self.started_at,
            version=version()[:100],
            health=health,
            resident_bytes=_memory(own),
            cpu_seconds=self._own_cpu / 1000,
            workers=[
                self._of_slot(worker, now, memory.get(slot, 0))
                for slot, worker in list(run.workers.items())[:MAX_WORKERS]
            ],
            clusters=_of_clusters(clusters),
            cluster_count=len(clusters),
            counters=_sums(run, everyone),
        )

    def cpu_seconds(self, slot: str) -> float:
        """Of all processes that the slot has had, as far as they were looked at."""
        present = sum(cpu for used_by, _, cpu in self._processes.values() if used_by == slot)
        return (self.past_cpu.get(slot, 0) + present) / 1000

    def processes(self) -> list[KeptCpu]:
        """Those of the last look, for another program of this process; some may have ended since."""
        return [
            KeptCpu(slot=slot, pid=pid, started_at=started_at, milliseconds=cpu)
            for (pid, started_at), (slot, _, cpu) in self._processes.items()
        ]

    def _look(self, everyone: Sequence[Worker]) -> dict[str, int]:
        """Looks at each process; returns the memory by slot."""
        alive = {
            (worker.pid, worker.started_at): worker.slot
            for worker in everyone
            if worker.pid is not None
        }
        for key in [key for key in self._processes if key not in alive]:
            slot, _, cpu = self._processes.pop(key)
            self.past_cpu[slot] = self.past_cpu.get(slot, 0) + cpu
        memory: dict[str, int] = {}
        for key, slot in alive.items():
            _, process, cpu = self._processes.get(key, (slot, None, 0))
            process = process or _process(key[0])
            memory[slot] = memory.get(slot, 0) + _memory(process)
            cpu = max(cpu, _cpu(process))
            self._processes[key] = (slot, process, cpu)
        return memory

    def _of_slot(self, worker: Worker, now: float, memory: int) -> m.WorkerFigures:
        age = max(0.0, now - worker.last_heartbeat) if worker.is_alive else None
        return m.WorkerFigures(
            slot=worker.slot,
            is_up=worker.state is WorkerState.READY,
            restarts=worker.restarts,
            heartbeat_age_seconds=age,
            resident_bytes=memory,
            cpu_seconds=self.cpu_seconds(worker.slot),
        )


def _sums(run: ObservedRun, everyone: Sequence[Worker]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for role in counters.SERVED:
        past = counters.served(role, {})
        counters.add(sums, {name: run.past_counters.get(name, 0) for name in past})
    for worker in everyone:
        counters.add(sums, counters.served(role_of(worker.slot), worker.counters))
    return sums


def _of_clusters(clusters: Sequence[m.Cluster]) -> list[m.ClusterFigures]:
    found = []
    left = MAX_NAME_BYTES
    for cluster in clusters[:MAX_CLUSTERS]:
        left -= len(cluster.name.encode()) + len(cluster.profile.encode())
        if left < 0:
            break
        found.append(
            m.ClusterFigures(
                name=cluster.name,
                profile=cluster.profile,
                state=cluster.state,
                expires=_unix_time(cluster.expires),
            )
        )
    return found


def _unix_time(text: str | None) -> float | None:
    """Of RFC 3339 text; None for what is none, for proxies may say anything."""
    try:
        return None if text is None else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except (psutil.Error, OSError):
        return None


def _memory(process: psutil.Process | None) -> int:
    if process is None:
        return 0
    try:
        return int(process.memory_info().rss)
    except (psutil.Error, OSError):
        # It has ended, or no descriptor is left to look.
        return 0


def _cpu(process: psutil.Process | None) -> int:
    """Milliseconds of a CPU that it has used."""
    if process is None:
        return 0
    try:
        times = process.cpu_times()
    except (psutil.Error, OSError):
        return 0
    return round((times.user + times.system) * 1000)

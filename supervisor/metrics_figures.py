"""What the supervisor tells the metrics worker: `ipc.messages.MetricsSnapshot`, from a running one."""

import os
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import psutil

from ipc import counters
from ipc import messages as m
from ipc.permits import role_of
from supervisor.run import ObservedRun
from supervisor.settings import version
from supervisor.worker import Worker
from supervisor.worker_states import WorkerState

# As many as the message takes; the others are counted.
MAX_CLUSTERS: Final = 100
MAX_WORKERS: Final = 100


class Figures:
    """Keeps what has to be remembered from one look to the next.

    `past_cpu` are the milliseconds of a CPU that processes have used that have ended, by slot;
    `started_at` is the Unix time of the start of VNet: found once, because the clocks do not go alike.
    """

    def __init__(
        self, past_cpu: dict[str, int] | None = None, started_at: float | None = None
    ) -> None:
        self.past_cpu = past_cpu or {}
        self.started_at = started_at
        # By process id and start (monotonic seconds), as of the last look.
        self._processes: dict[tuple[int, float], tuple[str, psutil.Process | None, float]] = {}

    def collect(self, run: ObservedRun, health: str) -> m.MetricsSnapshot:
        """The figures of this moment."""
        now, wall = time.monotonic(), time.time()
        everyone = [*run.workers.values(), *run.others]
        memory = self._look(everyone)
        report = run.cluster_report()
        clusters = report.clusters if report is not None else []
        own = psutil.Process(os.getpid())
        if self.started_at is None:
            self.started_at = wall - (now - run.started_at)
        return m.MetricsSnapshot(
            taken_at=wall,
            started_at=self.started_at,
            version=version()[:100],
            health=health,
            resident_bytes=_memory(own),
            cpu_seconds=_cpu(own),
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
        return self.past_cpu.get(slot, 0) / 1000 + present

    def _look(self, everyone: Sequence[Worker]) -> dict[str, int]:
        """Looks at each process; returns the memory by slot."""
        alive = {
            (worker.pid, worker.started_at): worker.slot
            for worker in everyone
            if worker.pid is not None
        }
        for key in [key for key in self._processes if key not in alive]:
            slot, _, cpu = self._processes.pop(key)
            self.past_cpu[slot] = self.past_cpu.get(slot, 0) + int(cpu * 1000)
        memory: dict[str, int] = {}
        for key, slot in alive.items():
            _, process, cpu = self._processes.get(key, (slot, None, 0.0))
            process = process or _process(key[0])
            if process is not None:
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
    return [
        m.ClusterFigures(
            name=cluster.name,
            profile=cluster.profile,
            state=cluster.state,
            expires=_unix_time(cluster.expires),
        )
        for cluster in clusters[:MAX_CLUSTERS]
    ]


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


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except (psutil.Error, OSError):
        # It has ended, or no descriptor is left to look.
        return 0


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except (psutil.Error, OSError):
        return 0.0
    return float(times.user + times.system)

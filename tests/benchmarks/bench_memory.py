"""Memory of all VNet processes: idle, and with many idle connections.

The proportional set size divides a page by the number of processes that share it. The programs of
the benchmark share the interpreter's and the libraries' pages with VNet's, so beside it stands the
sum of the anonymous pages, which no other program shares.
"""

import contextlib
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench_bed import Bed
from bench_connect import ping, through_vnet
from bench_figures import Aim, Compare, Figure

CONNECTIONS = 1000
SETTLE_SECONDS = 1.0
IDLE_AIM = Aim(Compare.VALUE, most=200)
GROWTH_AIM = Aim(Compare.VALUE, most=60)


def measure(bed: Bed) -> list[Figure]:
    """Idle, then with idle connections that had a few bytes each way."""
    time.sleep(SETTLE_SECONDS)
    idle, processes = _sizes(bed), _by_process(bed)
    connect = through_vnet()
    with _many_descriptors(), ExitStack() as connections:
        for _ in range(CONNECTIONS):
            ping(connections.enter_context(connect()))
        time.sleep(SETTLE_SECONDS)
        full = _sizes(bed)
    growth = full["Pss"] - idle["Pss"]
    return [
        Figure("memory idle", "MB", idle["Pss"], aim=IDLE_AIM),
        Figure("  of it anonymous", "MB", idle["Pss_Anon"]),
        *(Figure(f"  {name}", "MB", size) for name, size in processes.items()),
        Figure(f"memory of {CONNECTIONS} idle connections", "MB", growth, aim=GROWTH_AIM),
    ]


@contextlib.contextmanager
def _many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(CONNECTIONS + 500, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _by_process(bed: Bed) -> dict[str, float]:
    return {name: sum(rollup(pid)["Pss"] for pid in pids) for name, pids in bed.vnet.pids().items()}


def _sizes(bed: Bed) -> dict[str, float]:
    """Megabytes of all VNet processes together."""
    rollups = [rollup(pid) for pids in bed.vnet.pids().values() for pid in pids]
    return {key: sum(rollup[key] for rollup in rollups) for key in ("Pss", "Pss_Anon")}


def rollup(pid: int) -> dict[str, float]:
    """proc(5), /proc/PID/smaps_rollup, in megabytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    pairs = (line.split() for line in lines)
    return {key.rstrip(":"): int(kilobytes) / 1e3 * 1.024 for key, kilobytes, *_ in pairs}

"""`vnet status` as a health check: what it takes beside Python with the library of the command line alone.

Both are started in turn, so that a machine that is slow or busy is so for both.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench_bed import Bed
from bench_figures import Aim, Compare, Figure, percentile

ROUNDS = 20
BASELINE = (sys.executable, "-c", "import typer")
BEYOND_AIM = Aim(Compare.EXCESS, most=150)
STOPPED_AIM = Aim(Compare.VALUE, most=2000)
LIMIT_SECONDS = 30.0


def measure(bed: Bed, rounds: int) -> list[Figure]:
    """Milliseconds from start to end of the command, 20 times in each round; of a stopped supervisor once each."""
    vnet, run_dir = str(Path(sys.executable).with_name("vnet")), str(bed.vnet.directory / "run")
    commands = {
        "text": (vnet, "status", "--run-dir", run_dir),
        "JSON": (vnet, "status", "--json", "--run-dir", run_dir),
    }
    taken: dict[str, list[float]] = {name: [] for name in (*commands, "baseline")}
    for _ in range(ROUNDS * rounds):
        for name, command in (*commands.items(), ("baseline", BASELINE)):
            taken[name].append(_milliseconds(command, 0))
    figures = [
        Figure(
            f"vnet status p{rank}, {name}",
            "ms",
            percentile(taken[name], rank),
            percentile(taken["baseline"], rank),
            "python -c 'import typer'",
            BEYOND_AIM if rank == 50 else None,
        )
        for name in commands
        for rank in (50, 99)
    ]
    return [*figures, _of_a_stopped_supervisor(bed, commands["text"], rounds)]


def _of_a_stopped_supervisor(bed: Bed, command: Sequence[str], rounds: int) -> Figure:
    [pid] = bed.vnet.pids()["supervisor"]
    os.kill(pid, signal.SIGSTOP)
    try:
        longest = max(_milliseconds(command, 5) for _ in range(rounds))
    finally:
        os.kill(pid, signal.SIGCONT)
    return Figure("vnet status, supervisor stopped", "ms", longest, aim=STOPPED_AIM)


def _milliseconds(command: Sequence[str], status: int) -> float:
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, timeout=LIMIT_SECONDS, check=False)
    took = (time.perf_counter() - begin) * 1000
    if done.returncode != status:
        said = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {said}")
    return took

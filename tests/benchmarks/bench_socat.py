"""One or more streams of socat between /dev/zero or /dev/null and a connection, and what they moved.

What they moved is read from their I/O counters (proc(5), /proc/PID/io), after a second of warming
up: the program's bytes, without framing.
"""

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from bench_programs import SOCAT_BLOCK, cpu_seconds

WARM_UP_SECONDS = 1.0
# Direction -> the app that takes or gives the bytes.
DIRECTIONS = {"up": "sink", "down": "source"}


@dataclass(frozen=True, slots=True)
class Moved:
    """Gbit/s, and CPU seconds per gigabyte by process."""

    gbits: float
    cpu: Mapping[str, float]


def move(
    address: str,
    direction: str,
    streams: int,
    seconds: float,
    watched: Callable[[], dict[str, list[int]]],
) -> Moved:
    """Streams to or from a socat address, and what `watched` processes take for it."""
    if direction == "up":
        command = ["socat", "-u", SOCAT_BLOCK, "OPEN:/dev/zero,rdonly", address]
    else:
        command = ["socat", "-u", SOCAT_BLOCK, address, "OPEN:/dev/null,wronly"]
    return move_by(command, direction, streams, seconds, watched)


def move_by(
    command: Sequence[str],
    direction: str,
    streams: int,
    seconds: float,
    watched: Callable[[], dict[str, list[int]]],
) -> Moved:
    """The same with a program that reads without end (up) or writes without end (down).

    Its standard input is /dev/zero, its standard output /dev/null.
    """
    with ExitStack() as running:
        loads = [running.enter_context(running_load(command)) for _ in range(streams)]
        time.sleep(WARM_UP_SECONDS)
        processes = watched() | {"client": [pid for load in loads for pid in _with_children(load)]}
        cpu = {name: -cpu_seconds(pids) for name, pids in processes.items()}
        begin, before = time.monotonic(), _bytes(loads, direction)
        time.sleep(seconds)
        elapsed, moved = time.monotonic() - begin, _bytes(loads, direction) - before
        for name, pids in processes.items():
            cpu[name] += cpu_seconds(pids)
    if not moved:
        raise RuntimeError(f"nothing moves {direction} by {' '.join(command)}")
    return Moved(moved * 8 / elapsed / 1e9, {name: s / moved * 1e9 for name, s in cpu.items()})


@contextmanager
def running_load(command: Sequence[str]) -> Iterator[psutil.Process]:
    """The program, between /dev/zero and /dev/null; killed in the end."""
    with Path("/dev/zero").open("rb") as zeros:
        load = subprocess.Popen(command, stdin=zeros, stdout=subprocess.DEVNULL)
    try:
        yield psutil.Process(load.pid)
    finally:
        load.kill()
        load.wait()


def _with_children(load: psutil.Process) -> list[int]:
    return [load.pid, *(child.pid for child in load.children(recursive=True))]


def _bytes(loads: list[psutil.Process], direction: str) -> int:
    """Bytes read from /dev/zero, or written to /dev/null, and what little else there is."""
    counters = [load.io_counters() for load in loads]
    return sum(c.read_chars if direction == "up" else c.write_chars for c in counters)

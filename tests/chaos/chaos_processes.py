"""Processes of the private network, as proc(5) shows them."""

import contextlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """One process; `state` is proc(5)'s letter."""

    pid: int
    parent: int
    state: str
    command: str


def processes() -> list[Process]:
    """All processes of this pid namespace."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # One may end while it is looked at.
        with contextlib.suppress(OSError):
            _, _, rest = (entry / "stat").read_text().rpartition(") ")
            state, parent, *_ = rest.split()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found.append(Process(int(entry.name), int(parent), state, command.strip()))
    return found


def state_of(pid: int) -> str:
    """The letter of a process's state; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]
    except OSError:
        return ""


def strays(
    found: Collection[Process], init: int, own: Collection[int], workers: Collection[int]
) -> list[str]:
    """Processes that nobody has: of init, which it did not start, and of VNet, which shows it not.

    `own` are the children of init, `workers` the processes that VNet shows.
    """
    known = {init, *own, *workers}
    return [
        f"{process.pid} (of {process.parent}, {process.state}) {process.command}"
        for process in found
        if process.pid not in known and (process.parent == init or process.parent in own)
    ]


def descriptors(pid: int) -> int | None:
    """How many a process has open; None when it is gone."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None


def resident_bytes(pid: int) -> int | None:
    """Resident set size; None when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except OSError:
        return None


def measure(pids: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Descriptors, memory and threads of each."""
    return {
        name: {
            "descriptors": descriptors(pid),
            "rss_mb": round((resident_bytes(pid) or 0) / 1e6, 1),
            "threads": sum(1 for _ in Path(f"/proc/{pid}/task").iterdir()),
        }
        for name, pid in pids.items()
    }

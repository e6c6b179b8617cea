"""Whose a TCP connection of this machine is: asks the kernel (sock_diag(7)), then /proc.

    both ends of a connection --sock_diag--> user and inode --/proc/<pid>/fd--> process --exe--> program

The kernel tells everybody the user; the process only root, or who runs it. Connections of other network
namespaces, such as a container's, are not found. On other systems nothing is.
"""

import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from ipc.socket_owner import Owner, SocketDiag

# One question takes some 10 microseconds.
MAX_QUESTIONS = 2000
# Looking through /proc ends after so long, with whatever was found.
PROC_SECONDS = 0.3


class Ends(NamedTuple):
    """A connection as its program sees it; addresses as text."""

    address: str
    port: int
    peer_address: str
    peer_port: int


@dataclass(frozen=True, slots=True)
class SocketOwner:
    """`pid` and `program` (a path, or a name) are None where they may not be seen."""

    uid: int
    pid: int | None
    program: str | None


def owners(connections: Iterable[Ends]) -> dict[Ends, SocketOwner]:
    """Those that could be found out, of the first MAX_QUESTIONS."""
    if sys.platform != "linux":
        return {}
    found = _sockets(list(connections)[:MAX_QUESTIONS])
    processes = _processes({owner.inode for owner in found.values()})
    return {
        ends: SocketOwner(owner.uid, *processes.get(owner.inode, (None, None)))
        for ends, owner in found.items()
    }


def _sockets(connections: list[Ends]) -> dict[Ends, Owner]:
    """Those that a process has. None at all where there is no sock_diag."""
    found: dict[Ends, Owner] = {}
    if not connections:
        return found
    with suppress(OSError), SocketDiag.open() as kernel:
        diag = SocketDiag(kernel)
        for ends in connections:
            try:
                owner = diag.tcp_owner(
                    ip_address(ends.address).packed,
                    ends.port,
                    ip_address(ends.peer_address).packed,
                    ends.peer_port,
                )
            except ValueError:
                continue  # a proxy has told nonsense
            if owner is not None and owner.inode:
                found[ends] = owner
    return found


def _processes(inodes: set[int]) -> dict[int, tuple[int, str | None]]:
    """Process and program of each socket that is open in a process that may be looked at.

    Of several the one with the lowest number, mostly the parent.
    """
    # Without paths as objects: there may be a hundred thousand descriptors.
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, tuple[int, str | None]] = {}
    deadline = time.monotonic() + PROC_SECONDS
    try:
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208
    except OSError:
        return found
    for pid in pids:
        if not wanted or time.monotonic() > deadline:
            break
        with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
            for descriptor in descriptors:
                with suppress(OSError):
                    inode = wanted.pop(os.readlink(descriptor.path), None)  # noqa: PTH115
                    if inode is not None:
                        found[inode] = (pid, _program(pid))
    return found


def _program(pid: int) -> str | None:
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/exe").readlink())
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return None

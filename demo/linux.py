"""The few system calls of the demo that Python has no function for (Linux)."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
# linux/mount.h
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4
# linux/capability.h
CAPABILITY_VERSION = 0x20080522
LAST_CAPABILITY = 40

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """New namespaces for this process (flags of unshare, section 2). Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mounts a file system (mount, section 2). Raises OSError."""
    result = _libc.mount(
        source.encode(),
        str(target).encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _check(result, f"mount {target}")


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def keep_capabilities_over_exec() -> None:
    """Makes every capability this process holds ambient, so that programs it runs hold it too.

    Only of use for another user than root, whose programs have all of them anyway.
    """
    _set_inheritable(lambda permitted: permitted)
    for capability in range(LAST_CAPABILITY + 1):
        _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0)


def drop_capabilities_on_exec() -> None:
    """Undoes `keep_capabilities_over_exec`."""
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _set_inheritable(lambda _permitted: 0)


def _set_inheritable(choose: Callable[[int], int]) -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    words = (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, words), "capget")
    # Two groups of (effective, permitted, inheritable).
    words[2], words[5] = choose(words[1]), choose(words[4])
    _check(_libc.capset(header, words), "capset")


def map_own_user(uid: int, gid: int) -> None:
    """In a new user namespace: the caller stays who they are."""
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")

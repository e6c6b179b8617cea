"""What a worker gives up between fork and work: capabilities(7), prctl(2); on macOS the user alone."""

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
# linux/capability.h: version 3, 64 bits in two words
CAPABILITY_VERSION = 0x20080522
CAPABILITY_WORDS = 2
LAST_CAPABILITY_BOUND = 64

# sys/syslimits.h of macOS
OPEN_MAX = 10240
# How often a process looks for its parent where the kernel does not tell of its end.
ORPHAN_LOOK_SECONDS = 0.25

_IS_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True)


class _OrphanWatch:
    """A thread of a child that sends it a signal once it has another parent; one for each process."""

    def __init__(self) -> None:
        self._pid = 0
        self._number = signal.SIGKILL

    def begin(self, parent_pid: int, number: signal.Signals) -> None:
        """From now on; only the signal changes where it runs already."""
        self._number = number
        if self._pid != os.getpid():
            self._pid = os.getpid()
            threading.Thread(
                target=self._live, args=(parent_pid,), name="orphan-watch", daemon=True
            ).start()

    def _live(self, parent_pid: int) -> None:
        while os.getppid() == parent_pid:
            time.sleep(ORPHAN_LOOK_SECONDS)
        os.kill(os.getpid(), self._number)


_orphan_watch = _OrphanWatch()


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a worker becomes. `extra_group` opens the bus directory; None where uids are one."""

    uid: int
    gid: int
    extra_group: int | None


def die_with_parent(parent_pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """A signal for this process when its parent ends; its own end if that has ended already."""
    if _IS_LINUX:
        _prctl(PR_SET_PDEATHSIG, number)
    else:
        _orphan_watch.begin(parent_pid, number)
    if os.getppid() != parent_pid:
        os._exit(1)


def name_process(name: str) -> None:
    """The name shown by ps and top (15 characters at most)."""
    if _IS_LINUX:
        _libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def raise_file_limit() -> int:
    """Raises the soft limit of open files to the hard one; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not _IS_LINUX and hard == resource.RLIM_INFINITY:
        # setrlimit(2) of macOS takes no more than OPEN_MAX then.
        wanted = max(soft, OPEN_MAX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else sys.maxsize


def give_up(identity: Identity, max_files: int) -> None:
    """Becomes `identity` for good, without capabilities or a way to get them.

    Raises:
        OSError: the kernel refused a step; the worker must not go on.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = max_files if hard == resource.RLIM_INFINITY else min(max_files, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    os.umask(0o077)
    os.chdir("/")
    if not _IS_LINUX:
        _leave_groups(identity)
        # Of root these set the real, the effective and the saved one.
        os.setgid(identity.gid)
        os.setuid(identity.uid)
        return
    for capability in range(LAST_CAPABILITY_BOUND):
        # Beyond the kernel's last capability: EINVAL. Without CAP_SETPCAP: EPERM, and then
        # no_new_privs keeps the bounding set from mattering.
        _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    _leave_groups(identity)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _drop_capabilities()
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    # Otherwise another worker of the same user could read its memory.
    _prctl(PR_SET_DUMPABLE, 0)


def held_capabilities() -> list[int]:
    """The numbers of all capabilities in a set of this process, the bounding set included."""
    if not _IS_LINUX:
        return []
    held = 0
    for word in _capability_words():
        held |= word
    return [
        number
        for number in range(LAST_CAPABILITY_BOUND)
        if held >> number & 1 or _libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0) == 1
    ]


def has_no_new_privs() -> bool:
    """Whether this process can gain no right by running a program."""
    return _IS_LINUX and bool(_libc.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1)


def _leave_groups(identity: Identity) -> None:
    try:
        os.setgroups([] if identity.extra_group is None else [identity.extra_group])
    except PermissionError:
        # A user namespace that has one user does not let go of groups.
        if identity.extra_group is not None:
            raise


def _capability_words() -> tuple[int, int, int]:
    """Effective, permitted and inheritable capabilities, 64 bits each."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    words = (ctypes.c_uint32 * (3 * CAPABILITY_WORDS))()
    if _libc.capget(header, words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capget: {os.strerror(number)}")
    return words[0] | words[3] << 32, words[1] | words[4] << 32, words[2] | words[5] << 32


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * (3 * CAPABILITY_WORDS))()
    if _libc.capset(header, nothing) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capset: {os.strerror(number)}")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")

"""The system call filter of a worker (seccomp(2)), made with libseccomp.

`VNET_SECCOMP=log` in the supervisor's environment lets calls pass that are in no list, and the kernel
logs them: for finding out what another C library or Python needs.
"""

import ctypes
import errno
import os
import sys
from typing import Final

try:
    import pyseccomp
except (ImportError, RuntimeError):
    # RuntimeError: libseccomp itself is not there.
    pyseccomp = None

from supervisor.confinement.system_calls import (
    ABSENT_ERRNO,
    MACHINES,
    REFUSED_ERRNO,
    Call,
    CallList,
)

MODE_VARIABLE: Final = "VNET_SECCOMP"
# How the filter is named in `vnet status`.
ALLOW_LIST: Final = "allow-list"
LOG_ONLY: Final = "log"
# linux/prctl.h, linux/seccomp.h
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
# SCMP_FLTATR_CTL_OPTIMIZE of libseccomp: a binary tree instead of one comparison after the other
_BINARY_TREE: Final = 2
_HIGHEST_PRIORITY: Final = 255

_libc = ctypes.CDLL(None, use_errno=True)


class NoSeccompError(Exception):
    """There can be no filter here; the message says why."""


def require() -> None:
    """Raises NoSeccompError if this system has no part that the filter needs."""
    if sys.platform != "linux":
        raise NoSeccompError("this system has no system call filter")
    machine = os.uname().machine
    if machine not in MACHINES:
        raise NoSeccompError(f"there is no list of system calls for {machine}")
    # Without a program this fails in any case, and in which way tells.
    ctypes.set_errno(0)
    _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, None, 0, 0)
    if ctypes.get_errno() != errno.EFAULT:
        raise NoSeccompError("this kernel has no system call filter")
    if pyseccomp is None:
        raise NoSeccompError("libseccomp is not installed: install it (Debian: libseccomp2)")


def restrict(calls: CallList) -> str:
    """Confines the calling thread and all that it starts from now on, for good.

    Needs no_new_privs. Returns ALLOW_LIST, or LOG_ONLY if calls outside the list are only logged.

    Raises:
        OSError: the kernel or libseccomp refused the filter.
    """
    is_log_only = os.environ.get(MODE_VARIABLE) == LOG_ONLY
    default = pyseccomp.LOG if is_log_only else pyseccomp.ERRNO(REFUSED_ERRNO)
    made = pyseccomp.SyscallFilter(default)
    made.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    # No code of others runs in a worker, so the slow protection against it is not wanted.
    _set_if_known(made, pyseccomp.Attr.CTL_SSB, 1)
    _set_if_known(made, pyseccomp.Attr.CTL_OPTIMIZE, _BINARY_TREE)
    for position, call in enumerate(calls.allowed):
        _add(made, pyseccomp.ALLOW, call, max(0, _HIGHEST_PRIORITY - position))
    for name in calls.absent:
        _add(made, pyseccomp.ERRNO(ABSENT_ERRNO), Call(name), 0)
    for name in calls.lethal:
        _add(made, pyseccomp.KILL_PROCESS, Call(name), 0)
    made.load()
    return LOG_ONLY if is_log_only else ALLOW_LIST


def _set_if_known(made: "pyseccomp.SyscallFilter", attribute: int, value: int) -> None:
    try:
        made.set_attr(attribute, value)
    except OSError as error:
        # An older libseccomp or kernel; the filter is right without it.
        if error.errno not in (errno.EINVAL, errno.EEXIST, errno.EOPNOTSUPP):
            raise


def _add(made: "pyseccomp.SyscallFilter", action: int, call: Call, priority: int) -> None:
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call.name)
    if number < 0:
        # Only other machines or newer libraries have it.
        return
    conditions = [
        pyseccomp.Arg(each.argument, pyseccomp.MASKED_EQ, each.mask, each.value)
        for each in call.conditions
    ]
    made.add_rule(action, number, *conditions)
    if priority:
        made.syscall_priority(number, priority)

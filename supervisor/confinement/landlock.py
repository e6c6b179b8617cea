"""The three system calls of Landlock (landlock(7)); their numbers are the same on every machine."""

import ctypes
import errno
import os
import stat
import struct
import sys
from typing import Final

from supervisor.confinement.landlock_rules import (
    NET_VERSION,
    OF_FILES,
    SCOPE_VERSION,
    FileRight,
    FileRule,
    NetRight,
    Ruleset,
    fitted,
)

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
# linux/landlock.h
_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1
_RULE_NET_PORT: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class NoLandlockError(Exception):
    """This kernel cannot do it; the message says why."""


def version() -> int:
    """The version of Landlock's interface that this kernel has.

    Raises:
        NoLandlockError: it has none.
    """
    if sys.platform != "linux":
        raise NoLandlockError("this system has no Landlock")
    try:
        return _call(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            why = "Landlock is switched off: name it in lsm= on the kernel's command line"
        elif error.errno == errno.ENOSYS:
            why = "this kernel has no Landlock"
        else:
            why = f"Landlock cannot be used here ({error.strerror})"
        raise NoLandlockError(why) from error


def restrict(wanted: Ruleset, kernel_version: int) -> None:
    """Confines the calling thread and all that it starts from now on, for good.

    Needs no_new_privs. Paths that do not exist, or that this user cannot reach, give no right.

    Raises:
        OSError: the kernel refused a step.
    """
    rules = fitted(wanted, kernel_version)
    attributes = struct.pack("QQQ", rules.files, rules.net, rules.scope)
    size = 24 if kernel_version >= SCOPE_VERSION else 16 if kernel_version >= NET_VERSION else 8
    descriptor = _call(_CREATE_RULESET, attributes, size, 0)
    try:
        for rule in rules.rules:
            _add(descriptor, rule)
        for port in rules.bound_ports:
            attributes = struct.pack("=QQ", NetRight.BIND_TCP, port)
            _call(_ADD_RULE, descriptor, _RULE_NET_PORT, attributes, 0)
        _call(_RESTRICT_SELF, descriptor, 0)
    finally:
        os.close(descriptor)


def _add(ruleset: int, rule: FileRule) -> None:
    try:
        path = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rights = rule.rights
        if not stat.S_ISDIR(os.fstat(path).st_mode):
            rights &= OF_FILES
        if rights != FileRight(0):
            _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, path), 0)
    finally:
        os.close(path)


def _call(number: int, *arguments: int | bytes | None) -> int:
    # Whole registers: an int would be passed as 32 bits.
    passed = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *passed))
    if result < 0:
        code = ctypes.get_errno()
        names = {_CREATE_RULESET: "create_ruleset", _ADD_RULE: "add_rule"}
        name = names.get(number, "restrict_self")
        raise OSError(code, f"landlock_{name}: {os.strerror(code)}")
    return result

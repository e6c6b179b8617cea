"""Which files, ports and processes a worker may still reach by Landlock (landlock(7)). Pure.

A ruleset says what is refused unless a rule allows it. It covers what is opened from then on:
descriptors that a worker was given keep working.
"""

from dataclasses import dataclass, replace
from enum import IntFlag
from pathlib import Path
from typing import Final

from ipc.permits import Role


class FileRight(IntFlag):
    """LANDLOCK_ACCESS_FS_* of linux/landlock.h."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13  # version 2
    TRUNCATE = 1 << 14  # version 3
    IOCTL_DEV = 1 << 15  # version 5


class NetRight(IntFlag):
    """LANDLOCK_ACCESS_NET_*, version 4."""

    BIND_TCP = 1 << 0
    CONNECT_TCP = 1 << 1


class Scope(IntFlag):
    """LANDLOCK_SCOPE_*, version 6: whom a process cannot reach outside its own ruleset."""

    ABSTRACT_UNIX_SOCKET = 1 << 0
    SIGNAL = 1 << 1


# The newest version this module knows; a newer kernel's further rights are left alone.
NEWEST_VERSION: Final = 7
_SINCE_VERSION: Final = {
    FileRight.REFER: 2,
    FileRight.TRUNCATE: 3,
    FileRight.IOCTL_DEV: 5,
}
NET_VERSION: Final = 4
SCOPE_VERSION: Final = 6

READ: Final = FileRight.READ_FILE | FileRight.READ_DIR
# What SQLite does with its files.
KEEP_FILES: Final = (
    READ | FileRight.WRITE_FILE | FileRight.TRUNCATE | FileRight.MAKE_REG | FileRight.REMOVE_FILE
)
KEEP_SOCKETS: Final = FileRight.READ_DIR | FileRight.MAKE_SOCK | FileRight.REMOVE_FILE
# The only rights that a rule for something else than a directory may have.
OF_FILES: Final = (
    FileRight.EXECUTE
    | FileRight.WRITE_FILE
    | FileRight.READ_FILE
    | FileRight.TRUNCATE
    | FileRight.IOCTL_DEV
)


@dataclass(frozen=True, slots=True)
class FileRule:
    """Rights beneath a directory, or to one file. A path that does not exist gives none.

    A rule holds for what is at the path when it is made. If `is_awaited`, what is put there later
    matters as well: then the worker has to be started again.
    """

    path: Path
    rights: FileRight
    is_awaited: bool = False


@dataclass(frozen=True, slots=True)
class Ruleset:
    """What is refused, and the files that are excepted from it."""

    files: FileRight
    net: NetRight
    scope: Scope
    rules: tuple[FileRule, ...] = ()
    # TCP ports that may be bound; 0 stands for those that the kernel chooses.
    bound_ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reach:
    """What of the file system a worker needs beside the system's and its program's own files.

    `bus_dir` is where its listening socket of the bus is made, before it gives up its rights.
    """

    bus_dir: Path | None = None
    rules: tuple[FileRule, ...] = ()


# Read-only, for name resolution, TLS trust and what libraries load late.
SYSTEM_FILES: Final = tuple(
    Path(path)
    for path in (
        "/etc",
        "/usr",
        "/lib",
        "/lib64",
        # Where resolv.conf may lead to, and the sockets of resolvers.
        "/run/systemd/resolve",
        "/run/NetworkManager",
        "/run/resolvconf",
        "/run/connman",
        "/run/netconfig",
        "/run/nscd",
        # Its own mounts: whether the tsh home is on a network file system.
        "/proc/self",
        "/dev/urandom",
        "/sys/devices/system/cpu",
    )
)
# The event loop holds it open beside listening sockets, to have a descriptor left when all are used.
_SPARE_DESCRIPTOR: Final = FileRule(Path("/dev/null"), FileRight.READ_FILE)
_ALL_FILES: Final = FileRight((1 << 16) - 1)
_ALL_NET: Final = NetRight.BIND_TCP | NetRight.CONNECT_TCP
_ALL_SCOPES: Final = Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL


def ruleset(role: Role, reach: Reach, program: tuple[Path, ...]) -> Ruleset:
    """The ruleset of a role; `program` is where its code lies."""
    match role:
        case Role.TUN | Role.METRICS:
            return Ruleset(_ALL_FILES, _ALL_NET, _ALL_SCOPES)
        case Role.DNS:
            # Its servers may be anywhere, and change.
            return Ruleset(_ALL_FILES, NetRight.BIND_TCP, _ALL_SCOPES, (_SPARE_DESCRIPTOR,))
        case _:
            readable = (*SYSTEM_FILES, *program)
            rules = (
                *(FileRule(path, READ) for path in dict.fromkeys(readable)),
                _SPARE_DESCRIPTOR,
                *reach.rules,
            )
            # It is given its listening sockets; a browser returns to a port that the kernel chose.
            return Ruleset(_ALL_FILES, NetRight.BIND_TCP, _ALL_SCOPES, rules, (0,))


def fitted(wanted: Ruleset, version: int) -> Ruleset:
    """The part of a ruleset that a kernel with this version of Landlock can enforce."""
    known = FileRight(0)
    for right in FileRight:
        if _SINCE_VERSION.get(right, 1) <= version:
            known |= right
    return Ruleset(
        wanted.files & known,
        wanted.net if version >= NET_VERSION else NetRight(0),
        wanted.scope if version >= SCOPE_VERSION else Scope(0),
        tuple(replace(rule, rights=rule.rights & known) for rule in wanted.rules),
        wanted.bound_ports if version >= NET_VERSION else (),
    )


def shortcomings(version: int) -> list[str]:
    """What this version of Landlock does not cover, for `vnet status`."""
    lacking = [
        text
        for text, since in (
            ("truncating files", _SINCE_VERSION[FileRight.TRUNCATE]),
            ("TCP ports", NET_VERSION),
            ("control of devices", _SINCE_VERSION[FileRight.IOCTL_DEV]),
            ("signals and abstract sockets", SCOPE_VERSION),
        )
        if version < since
    ]
    if not lacking:
        return []
    return [f"Landlock {version} of this kernel does not cover {', '.join(lacking)}"]

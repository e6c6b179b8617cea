"""Takes a worker's rights, in the one order that works, and says what is in force then.

    user and capabilities  ->  Landlock  ->  system call filter

All of it holds for the calling thread and those it starts later, so no other may run yet. The
kernel's own claims decide: what it has not is reported, what it has and refuses is an error.
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from ipc.messages import Confined
from ipc.orphan import ORPHAN_SIGNAL
from ipc.permits import Role
from supervisor import privileges
from supervisor.confinement import landlock, seccomp
from supervisor.confinement.awaited import Awaited
from supervisor.confinement.capability_names import NAMES
from supervisor.confinement.identities import NOBODY
from supervisor.confinement.landlock import NoLandlockError
from supervisor.confinement.landlock_rules import Reach, ruleset, shortcomings
from supervisor.confinement.seccomp import NoSeccompError
from supervisor.confinement.system_calls import call_list
from supervisor.privileges import Identity


class ConfinementError(Exception):
    """A right could not be taken; the worker must not go on. The message says which."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """What is in force, and the paths that were looked at for it."""

    report: Confined
    awaited: Awaited


def confine(
    role: Role, identity: Identity, reach: Reach, max_files: int, supervisor_pid: int
) -> Confinement:
    """Confines this process for good. All it will ever import must be there already.

    Raises:
        ConfinementError: see there.
    """
    missing: list[str] = []
    step = "user and capabilities"
    try:
        _require_one_thread()
        privileges.give_up(identity, max_files)
        # A change of user clears it.
        privileges.die_with_parent(
            supervisor_pid, ORPHAN_SIGNAL if role is Role.TUN else signal.SIGKILL
        )
        missing += _shared_with(role, identity)
        # Before the rules are made: what changes in between is noticed rather than missed.
        awaited = Awaited(reach.rules)
        step = "Landlock"
        version = _apply_landlock(role, reach, missing)
        held = privileges.held_capabilities()
        if held:
            missing.append("the capability bounding set could not be emptied")
        no_new_privs = privileges.has_no_new_privs()
        step = "system call filter"
        kind = _apply_seccomp(role, missing)
    except OSError as error:
        raise ConfinementError(f"{step}: {error.strerror or error}") from error
    report = Confined(
        uid=os.getuid(),
        no_new_privs=no_new_privs,
        capabilities=[NAMES.get(number, f"cap_{number}") for number in held],
        landlock=version,
        seccomp=kind,
        missing=missing,
    )
    return Confinement(report, awaited)


def _require_one_thread() -> None:
    if sys.platform != "linux":
        # There the user is the whole process's.
        return
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208  # only their number counts
    if threads != 1:
        raise OSError(0, f"{threads} threads run already")


def _shared_with(role: Role, identity: Identity) -> list[str]:
    if identity.extra_group is None:
        return ["the workers share one user: this user namespace has no other"]
    if identity.uid == NOBODY and role is not Role.PROXY:
        return ["the user nobody is used: no number is left for a user of its own"]
    return []


def _apply_landlock(role: Role, reach: Reach, missing: list[str]) -> int | None:
    try:
        version = landlock.version()
    except NoLandlockError as error:
        missing.append(str(error))
        return None
    landlock.restrict(ruleset(role, reach, _program_files()), version)
    missing += shortcomings(version)
    return version


def _apply_seccomp(role: Role, missing: list[str]) -> str | None:
    try:
        seccomp.require()
    except NoSeccompError as error:
        missing.append(str(error))
        return None
    kind = seccomp.restrict(call_list(role, os.getpid()))
    if kind != seccomp.ALLOW_LIST:
        missing.append(f"system calls are only logged: unset {seccomp.MODE_VARIABLE}")
    return kind


def _program_files() -> tuple[Path, ...]:
    """Where Python, its libraries and this program lie, and the certificates OpenSSL trusts."""
    own = {Path(sys.modules[name].__path__[0]) for name in ("ipc", "supervisor", "workers")}
    libraries = {Path(entry) for entry in sys.path if Path(entry).name in _LIBRARY_NAMES}
    prefixes = {Path(sys.prefix), Path(sys.base_prefix)}
    found = {path.resolve() for path in own | libraries | prefixes} | _trust_files()
    # A Python at the top of the file system would open all of it.
    return tuple(sorted(found - {Path("/")}))


_LIBRARY_NAMES = ("site-packages", "dist-packages", "lib-dynload")


def _trust_files() -> set[Path]:
    ssl = sys.modules.get("ssl")
    if ssl is None:
        return set()
    paths = ssl.get_default_verify_paths()
    named = (paths.cafile, paths.capath, paths.openssl_cafile, paths.openssl_capath)
    return {Path(name) for name in named if name}

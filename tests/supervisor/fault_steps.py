"""Ends a process at each step at which something on the disk changes, or a program is run.

A step is a call of one of the functions below, and the end comes right before it: either an exception that
nothing catches, or SIGKILL. Run as a program it is `vnet-supervisor` with one more argument, the
number of the step.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

STEPS = [
    *((os, name) for name in ("fsync", "pwrite", "ftruncate", "fchmod", "fchown")),
    *((Path, name) for name in ("replace", "unlink", "symlink_to", "mkdir", "rmdir")),
    (subprocess, "run"),
]


class Died(BaseException):
    """The process has ended here."""


def _die() -> None:
    raise Died


@contextlib.contextmanager
def dying(step: int, only: Callable[[], bool] = lambda: True, die: Callable[[], None] = _die):
    """Counts the steps from 0 while `only()`; yields a list that has one item for each."""
    done: list[str] = []
    with contextlib.ExitStack() as closing:
        for place, name in STEPS:
            real = getattr(place, name)

            def wrapper(*arguments, _real=real, _name=name, **options):
                if only():
                    if len(done) == step:
                        die()
                    done.append(_name)
                return _real(*arguments, **options)

            setattr(place, name, wrapper)
            closing.callback(setattr, place, name, real)
        yield done


@contextlib.contextmanager
def mount_point(path: Path) -> Iterator[None]:
    """Lets nobody replace or remove the file, as if it were a mount point."""
    replace, unlink = Path.replace, Path.unlink

    def refuse_replace(self: Path, target: Path) -> Path:
        if Path(target) == path:
            raise OSError(16, "Device or resource busy")
        return replace(self, target)

    def refuse_unlink(self: Path, missing_ok: bool = False) -> None:
        if self == path:
            raise OSError(16, "Device or resource busy")
        unlink(self, missing_ok=missing_ok)

    Path.replace, Path.unlink = refuse_replace, refuse_unlink  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Path.replace, Path.unlink = replace, unlink  # type: ignore[method-assign]


def tree(directory: Path) -> dict[str, tuple[object, ...]]:
    """All that is in a directory: kind, mode, owner, and bytes or target."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        name = str(path.relative_to(directory))
        found[name] = (status.st_mode, status.st_uid, status.st_gid, content)
    return found


def is_os_thread() -> bool:
    """Whether this is the thread that sets up the resolver."""
    return threading.current_thread().name == "os-settings"


def kill_self() -> None:
    """What nobody can catch."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from supervisor.main import main

    number = int(sys.argv.pop(1))
    backup = Path(sys.argv[sys.argv.index("--state-dir") + 1]) / "os-backup"
    # From the moment on in which there is something to repair.
    with dying(number, lambda: is_os_thread() and backup.exists(), kill_self):
        main()

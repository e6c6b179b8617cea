"""The directories of a run: who may enter which, and the lock that makes a run the only one."""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import sys
from pathlib import Path

from ipc.prompts import PROMPTS_DIRECTORY
from supervisor.exits import (
    ConflictError,
    MisconfiguredError,
    NotPermittedError,
    StartupError,
)
from supervisor.network import PREFIX_RANDOM_BYTES, ula_prefix
from supervisor.settings import User

# unix(7): a socket's path has 107 bytes (macOS: 103), and "/mfa/proxy-63.sock" comes after the directory.
MAX_PATH_BYTES = (103 if sys.platform == "darwin" else 107) - 18


class RunDirectory:
    """`<run dir>`: lock, control socket, sockets of the workers. `close` empties it."""

    def __init__(self, path: Path, lock: int | None = None) -> None:
        """Takes the lock; `lock` is a descriptor that has it already, see `adopt`.

        Raises:
            ConflictError: another supervisor runs here.
            NotPermittedError: the directory cannot be made or written.
        """
        self.path = path
        if len(os.fsencode(path.absolute())) > MAX_PATH_BYTES:
            raise MisconfiguredError(
                [f"{path} is too long for the sockets in it: set --run-dir to a shorter path"]
            )
        if lock is not None:
            self._lock = lock
            return
        try:
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._lock = _lock(path / "lock")
        except PermissionError as error:
            raise NotPermittedError(
                f"{path} cannot be written: run as root (sudo vnet-supervisor), or set --run-dir"
            ) from error
        except OSError as error:
            raise StartupError(f"{path} cannot be used: {error}") from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    @classmethod
    def adopt(cls, path: Path, lock: int) -> "RunDirectory":
        """Goes on with the directory of this process's earlier program, as that left it."""
        return cls(path, lock)

    @property
    def lock(self) -> int:
        """The descriptor that holds the lock."""
        return self._lock

    @property
    def bus_path(self) -> Path:
        return self.path / "bus"

    @property
    def prompts_path(self) -> Path:
        return self.path / PROMPTS_DIRECTORY

    @property
    def control_path(self) -> Path:
        return self.path / "control.sock"

    def make_bus(self, group: int | None) -> Path:
        """An empty bus directory for sockets of the workers, and of nobody else.

        Workers of different users meet here: a group nobody is in opens it (set-group-id, so
        that the sockets belong to it). They are made before a worker gives up its rights, so that it
        can neither add nor remove one. Where all have one user id the directory is that user's alone.

        Raises:
            MisconfiguredError: other users cannot reach the directory.
        """
        if group is not None:
            _require_way_for_others(self.path)
        bus = self.bus_path
        shutil.rmtree(bus, ignore_errors=True)
        bus.mkdir(mode=0o700)
        if group is not None:
            os.chown(bus, -1, group)
            bus.chmod(0o2710)
        return bus

    def make_prompts(self, user: User, *, change_owner: bool) -> Path:
        """An empty directory, the VNet user's own, where proxies meet `vnet mfa`."""
        prompts = self.prompts_path
        shutil.rmtree(prompts, ignore_errors=True)
        prompts.mkdir(mode=0o700)
        if change_owner:
            os.chown(prompts, user.uid, user.gid, follow_symlinks=False)
        return prompts

    def close(self) -> None:
        """Removes what the run made and gives the lock back."""
        for directory in (self.bus_path, self.prompts_path):
            shutil.rmtree(directory, ignore_errors=True)
        for name in ("control.sock", "lock"):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
        os.close(self._lock)


def _lock(path: Path) -> int:
    """A descriptor of this file, with the lock. Raises ConflictError, OSError."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that has just ended may have removed the file between the two calls; then
            # another run could lock another file of this name.
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BlockingIOError as error:
            pid = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConflictError(
                f"VNet runs already with {path.parent} (process {pid}): stop it (vnet stop), or set"
                " --run-dir"
            ) from error
        os.close(descriptor)


def _require_way_for_others(path: Path) -> None:
    for directory in (path, *path.parents):
        if not directory.stat().st_mode & stat.S_IXOTH:
            problem = (
                f"--run-dir: {path} lies in {directory}, which other users cannot enter, and the"
                " workers are other users: choose another, such as /run/vnet"
            )
            raise MisconfiguredError([problem])


def make_state_directory(path: Path, user: User, *, change_owner: bool) -> Path:
    """`<state dir>` and in it the VNet user's own directory, which is returned.

    Raises:
        NotPermittedError: it cannot be made.
    """
    own = path / user.name
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        own.mkdir(mode=0o700, exist_ok=True)
        if change_owner:
            os.chown(own, user.uid, user.gid, follow_symlinks=False)
    except OSError as error:
        raise NotPermittedError(
            f"the state directory {path} cannot be used ({error.strerror}): run as root, or set"
            " --state-dir"
        ) from error
    return own


def ipv6_prefix(state_dir: Path) -> bytes:
    """The /64 of this machine (16 bytes), drawn at the first start and kept."""
    path = state_dir / "ipv6-prefix"
    try:
        drawn = bytes.fromhex(path.read_text().strip())
        if len(drawn) == PREFIX_RANDOM_BYTES:
            return ula_prefix(drawn)
    except (OSError, ValueError):
        pass
    drawn = secrets.token_bytes(PREFIX_RANDOM_BYTES)
    temporary = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        # A state directory that cannot be written costs stable addresses, not the start.
        temporary.write_text(drawn.hex() + "\n")
        temporary.replace(path)
    return ula_prefix(drawn)

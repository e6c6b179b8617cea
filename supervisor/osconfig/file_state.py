"""What is at a path, and making a path be like that: file, symbolic link or nothing.

Files are replaced as a whole (rename(2)). Where that is impossible, at a mount point (EBUSY) or in a
directory that cannot be written, the bytes are written over the old ones and the rest is cut off.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from supervisor.osconfig.backend import OsConfigError

# Files of settings are smaller.
MAX_BYTES: Final = 1024 * 1024
_IN_PLACE: Final = (errno.EBUSY, errno.EROFS, errno.EACCES, errno.EPERM)


class FileKind(StrEnum):
    """What may be at a path."""

    MISSING = "missing"
    FILE = "file"
    SYMLINK = "symlink"


class FileState(msgspec.Struct, frozen=True, kw_only=True):
    """What is at a path, but for the bytes of a file. `xattrs` are extended attributes by name."""

    kind: FileKind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    target: str = ""
    xattrs: dict[str, bytes] = {}


def temporary_of(path: Path) -> Path:
    """Where a file is written before it gets its name; a process that dies may leave it."""
    return path.with_name(f".{path.name}.vnet-new")


def look(path: Path) -> tuple[FileState, bytes]:
    """What is there now, and a file's bytes.

    Raises:
        OsConfigError: it is of no kind that can be restored.
        OSError: it cannot be read.
    """
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            target = str(path.readlink())
            return FileState(
                kind=FileKind.SYMLINK, uid=found.st_uid, gid=found.st_gid, target=target
            ), b""
        if not stat.S_ISREG(found.st_mode):
            raise OsConfigError(f"{path} is neither a file nor a symbolic link: make it one.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return FileState(kind=FileKind.MISSING), b""
    if len(data) > MAX_BYTES:
        raise OsConfigError(f"{path} is larger than {MAX_BYTES} bytes: make it shorter.")
    return FileState(
        kind=FileKind.FILE,
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        xattrs=_xattrs(path),
    ), data


def put(path: Path, state: FileState, data: bytes = b"") -> None:
    """Makes the path be like that, on disk when this returns. Raises OSError."""
    temporary = temporary_of(path)
    with contextlib.suppress(FileNotFoundError, PermissionError):
        temporary.unlink()
    if state.kind is FileKind.MISSING:
        path.unlink(missing_ok=True)
    else:
        try:
            _make(temporary, state, data)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if state.kind is FileKind.SYMLINK or error.errno not in _IN_PLACE:
                raise
            _write_over(path, data)
    sync_directory(path.parent)


def torn(contents: Iterable[bytes]) -> set[bytes]:
    """These contents of a file, and all that a writer leaves who dies on the way between two."""
    known = list(contents)
    return {new + old[len(new) :] for new in known for old in (b"", *known)}


def sync_directory(path: Path) -> None:
    """The names in the directory are on disk when this returns. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(path: Path, state: FileState, data: bytes) -> None:
    if state.kind is FileKind.SYMLINK:
        path.symlink_to(state.target)
        if os.geteuid() == 0:
            os.chown(path, state.uid, state.gid, follow_symlinks=False)
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        # In this order: the mode of somebody else's file may be out of reach.
        os.fchmod(descriptor, state.mode)
        if os.geteuid() == 0:
            os.fchown(descriptor, state.uid, state.gid)
        _set_xattrs(descriptor, state.xattrs)
        os.fsync(descriptor)


def _write_over(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        # In this order nobody reads an empty file. A disk that gets full takes a part.
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], written)
        os.ftruncate(descriptor, len(data))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _xattrs(path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    if hasattr(os, "listxattr"):
        with contextlib.suppress(OSError):
            for name in os.listxattr(path):
                found[name] = os.getxattr(path, name)
    return found


def _set_xattrs(descriptor: int, xattrs: dict[str, bytes]) -> None:
    for name, value in xattrs.items():
        # Security labels may be the system's own affair.
        with contextlib.suppress(OSError):
            os.setxattr(descriptor, name, value)

"""The file system as the small SSH server shows it over SFTP: what the cluster's own user may do.

(paramiko's SFTP server, version 3 of the protocol.)
"""

import contextlib
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import paramiko

_T = TypeVar("_T")

_OK = int(paramiko.SFTP_OK)


def _or_error(method: Callable[..., _T]) -> Callable[..., _T | int]:
    """The result of a method, or the SFTP status code of its OSError."""

    @wraps(method)
    def call(*arguments: Any) -> _T | int:
        try:
            return method(*arguments)
        except OSError as error:
            return int(paramiko.SFTPServer.convert_errno(error.errno or 0))

    return call


class _OpenFile(paramiko.SFTPHandle):  # type: ignore[misc]  # paramiko has no types
    """An open file, read and written at offsets."""

    def __init__(self, descriptor: int, flags: int) -> None:
        super().__init__(flags)
        self._descriptor = descriptor
        self._is_appending = bool(flags & os.O_APPEND)

    @_or_error
    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    @_or_error
    def write(self, offset: int, data: bytes) -> int:
        view = memoryview(data)
        while view:
            written = (
                os.write(self._descriptor, view)
                if self._is_appending
                else os.pwrite(self._descriptor, view, offset)
            )
            view, offset = view[written:], offset + written
        return _OK

    @_or_error
    def stat(self) -> paramiko.SFTPAttributes:
        return paramiko.SFTPAttributes.from_stat(os.fstat(self._descriptor))

    @_or_error
    def chattr(self, attr: paramiko.SFTPAttributes) -> int:
        return _set_attributes(self._descriptor, attr)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class FilesServer(paramiko.SFTPServer):  # type: ignore[misc]
    """paramiko's server with an exit status, without which scp takes a transfer for failed."""

    def finish_subsystem(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self.sock.send_exit_status(0)
        super().finish_subsystem()


class LocalFiles(paramiko.SFTPServerInterface):  # type: ignore[misc]
    """Files and directories; relative paths begin in the user's home directory."""

    def canonicalize(self, path: str) -> str:
        return os.path.realpath(self._path(path))

    def _path(self, path: str) -> str:
        home = os.path.expanduser("~")  # noqa: PTH111  # paths are text in this protocol
        return os.path.join(home, path)  # noqa: PTH118

    @_or_error
    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle:
        mode = attr.st_mode if attr.st_mode is not None else 0o666
        return _OpenFile(os.open(self._path(path), flags, mode & 0o7777), flags)

    @_or_error
    def list_folder(self, path: str) -> list[paramiko.SFTPAttributes]:
        found = []
        with os.scandir(self._path(path)) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    found.append(paramiko.SFTPAttributes.from_stat(status, entry.name))
        return found

    @_or_error
    def stat(self, path: str) -> paramiko.SFTPAttributes:
        return paramiko.SFTPAttributes.from_stat(os.stat(self._path(path)))  # noqa: PTH116

    @_or_error
    def lstat(self, path: str) -> paramiko.SFTPAttributes:
        return paramiko.SFTPAttributes.from_stat(os.lstat(self._path(path)))

    @_or_error
    def remove(self, path: str) -> int:
        os.remove(self._path(path))  # noqa: PTH107
        return _OK

    @_or_error
    def rename(self, oldpath: str, newpath: str) -> int:
        if os.path.lexists(self._path(newpath)):  # unlike rename(2) it replaces nothing
            raise FileExistsError(newpath)
        os.rename(self._path(oldpath), self._path(newpath))  # noqa: PTH104
        return _OK

    @_or_error
    def posix_rename(self, oldpath: str, newpath: str) -> int:
        os.replace(self._path(oldpath), self._path(newpath))  # noqa: PTH105
        return _OK

    @_or_error
    def mkdir(self, path: str, attr: paramiko.SFTPAttributes) -> int:
        mode = attr.st_mode if attr.st_mode is not None else 0o777
        os.mkdir(self._path(path), mode & 0o7777)  # noqa: PTH102
        return _OK

    @_or_error
    def rmdir(self, path: str) -> int:
        os.rmdir(self._path(path))  # noqa: PTH106
        return _OK

    @_or_error
    def chattr(self, path: str, attr: paramiko.SFTPAttributes) -> int:
        return _set_attributes(self._path(path), attr)

    @_or_error
    def symlink(self, target_path: str, path: str) -> int:
        os.symlink(target_path, self._path(path))  # noqa: PTH211
        return _OK

    @_or_error
    def readlink(self, path: str) -> str:
        return os.readlink(self._path(path))  # noqa: PTH115


def _set_attributes(target: str | int, attr: paramiko.SFTPAttributes) -> int:
    """Size, permissions and times; paramiko's own function empties a file to change its size."""
    flags = attr._flags  # noqa: SLF001
    if flags & attr.FLAG_SIZE:
        os.truncate(target, attr.st_size)
    if flags & attr.FLAG_PERMISSIONS:
        os.chmod(target, attr.st_mode & 0o7777)  # noqa: PTH101
    if flags & attr.FLAG_AMTIME:
        os.utime(target, (attr.st_atime, attr.st_mtime))
    return _OK

"""Reads and replaces files in the tsh home, which is the user's and may be in any state.

A file is replaced as a whole (rename(2)), has mode 0600 from the beginning, and is never written
through a symbolic link. What is there and is no regular file, or another user's, is left alone.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MODE: Final = 0o600


class FileError(Exception):
    """The text is one sentence without its end: what is wrong with which file, and what to do."""


class HomeFiles:
    """The files of one directory, which is looked up anew each time: it may come and go."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def read(self, name: str, limit: int, *, is_secret: bool = False) -> bytes | None:
        """A file's bytes; None if there is no such file.

        One that `is_secret` is closed to other users first, since OpenSSH ignores it otherwise.

        Raises:
            FileError: it cannot be read, or has more than `limit` bytes.
        """
        with self._opened() as home:
            data, mode = self._read(home, name, limit, must_be_private=is_secret)
            if mode is not None and len(data) > limit:
                raise FileError(f"{self._home / name} has more than {limit} bytes: remove it")
            return None if mode is None else data

    def keep(self, name: str, data: bytes) -> bool:
        """Has the file hold this, with mode 0600; whether it had to be written.

        Raises:
            FileError: see the module, or it cannot be written.
        """
        with self._opened() as home:
            found, mode = self._read(home, name, len(data))
            if mode == MODE and found == data:
                return False
            self._replace(home, name, data)
            return True

    def remove(self, name: str, beginning: bytes) -> None:
        """Removes a file that begins like this; any other is left alone.

        Raises:
            FileError: it cannot be removed.
        """
        with self._opened() as home:
            found, _ = self._read(home, name, len(beginning))
            if found.startswith(beginning):
                with self._explained(name, "removed"):
                    os.unlink(name, dir_fd=home)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            home = os.open(self._home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise FileError(f"there is no {self._home}: run tsh login") from None
        except OSError as error:
            raise FileError(f"{self._home} cannot be used ({error.strerror})") from error
        try:
            if not _is_ours(os.fstat(home)):
                raise FileError(
                    f"{self._home} belongs to another user: set TELEPORT_HOME to a directory of yours"
                )
            yield home
        finally:
            os.close(home)

    def _read(
        self, home: int, name: str, limit: int, *, must_be_private: bool = False
    ) -> tuple[bytes, int | None]:
        """At most `limit` + 1 bytes, and the mode; None as mode if there is no such file."""
        # O_NONBLOCK: a FIFO in the place of a file must not hang the reader.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self._explained(name, "read"):
            try:
                descriptor = os.open(name, flags, dir_fd=home)
            except FileNotFoundError:
                return b"", None
            try:
                found = os.fstat(descriptor)
                self._check(name, found)
                mode = stat.S_IMODE(found.st_mode)
                if must_be_private and mode & 0o077:
                    os.fchmod(descriptor, MODE)
                with open(descriptor, "rb", closefd=False) as file:
                    return file.read(limit + 1), mode
            finally:
                os.close(descriptor)

    def _replace(self, home: int, name: str, data: bytes) -> None:
        # What cannot be read may still be looked at, and a private key need not have been read.
        with self._explained(name, "written"):
            with contextlib.suppress(FileNotFoundError):
                self._check(name, os.stat(name, dir_fd=home, follow_symlinks=False))
            temporary = f".{name}.vnet-new"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=home)
            try:
                self._write(home, temporary, data)
                os.rename(temporary, name, src_dir_fd=home, dst_dir_fd=home)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=home)
                raise

    @staticmethod
    def _write(home: int, name: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, MODE, dir_fd=home)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - from a descriptor
            # The umask may have taken from it.
            os.fchmod(descriptor, MODE)
            file.write(data)
            file.flush()
            os.fsync(descriptor)

    def _check(self, name: str, found: os.stat_result) -> None:
        path = self._home / name
        if stat.S_ISLNK(found.st_mode):
            raise FileError(f"{path} is a symbolic link: remove it")
        if not stat.S_ISREG(found.st_mode):
            raise FileError(f"{path} is no regular file: remove it")
        if not _is_ours(found):
            raise FileError(f"{path} belongs to another user: remove it")

    @contextlib.contextmanager
    def _explained(self, name: str, what: str) -> Iterator[None]:
        path = self._home / name
        try:
            yield
        except OSError as error:
            match error.errno:
                case errno.ELOOP:
                    text = f"{path} is a symbolic link: remove it"
                case errno.ENOSPC | errno.EDQUOT:
                    text = f"{path} cannot be {what} ({error.strerror}): make room on the disk"
                case _:
                    text = f"{path} cannot be {what} ({error.strerror})"
            raise FileError(text) from error


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0)

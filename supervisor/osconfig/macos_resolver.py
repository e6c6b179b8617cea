"""Resolver files of macOS: `/etc/resolver/<zone>` names the servers of a zone (resolver(5)).

A file is VNet's if its first line is the mark; only such files are ever changed or removed, so that
what a VNet that died has left is known without any journal. Tried on Linux only, with another
directory.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.file_state import FileKind, FileState, look, put, temporary_of
from supervisor.osconfig.journal import Journal, Outcome, Undo
from supervisor.osconfig.wish import ResolverWish

DIRECTORY: Final = Path("/etc/resolver")
MARK: Final = "# VNet asks its own server for this zone; removed when VNet stops"
_UNDO: Final = "removal of files of zones"


def content(servers: tuple[str, ...]) -> bytes:
    """The file of a zone. Pure."""
    return "".join([f"{MARK}\n", *(f"nameserver {server}\n" for server in servers)]).encode()


def is_own(data: bytes) -> bool:
    """Whether a file with these bytes is VNet's. Pure."""
    return data.split(b"\n", 1)[0].rstrip(b"\r") == MARK.encode()


def remove_own(directory: Path, kept: frozenset[str] = frozenset()) -> list[Path]:
    """Removes VNet's files but those `kept` by name; returns which. Raises OSError."""
    removed = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.name in kept or path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(len(MARK) + 2)
        if is_own(head):
            path.unlink()
            removed.append(path)
    return removed


def _undo(arguments: Mapping[str, str]) -> None:
    directory = Path(arguments["directory"])
    remove_own(directory)
    if arguments["made"] == "yes":
        with contextlib.suppress(OSError):
            directory.rmdir()


UNDO_CALLS: Final[Mapping[str, Undo]] = {_UNDO: _undo}


class MacosBackend:
    """See the module."""

    name = "macos"

    def __init__(self, journal: Journal, directory: Path = DIRECTORY) -> None:
        self._journal = journal
        self._directory = directory
        self._wish: ResolverWish | None = None

    def apply(self, wish: ResolverWish) -> None:
        """Writes a file for each zone and removes those of other zones. Raises OSError."""
        self._wish = wish
        self._settle(wish)

    def undo(self) -> None:
        """Removes them all. Raises OsConfigError."""
        self._wish = None
        for undone in self._journal.undo({self.name}):
            if undone.outcome is not Outcome.UNDONE:
                raise OsConfigError(undone.text)
        remove_own(self._directory)

    def upstream(self) -> list[tuple[str, int, str]] | None:
        """What the system itself has: zones do not touch its own nameservers."""
        return None

    def check(self) -> list[str]:
        """Restores files that were changed or removed. Raises OSError."""
        return [] if self._wish is None else self._settle(self._wish)

    def _settle(self, wish: ResolverWish) -> list[str]:
        if not any(change.backend == self.name for change in self._journal.changes):
            made = "no" if self._directory.is_dir() else "yes"
            self._journal.note(self.name, _UNDO, directory=str(self._directory), made=made)
        self._directory.mkdir(mode=0o755, exist_ok=True)
        remove_own(self._directory, kept=frozenset(wish.zones))
        wanted = content(wish.server_texts)
        problems = []
        for zone in wish.zones:
            # Names of files come from clusters: `supervisor.clusters` lets only DNS names through.
            path = self._directory / Path(zone).name
            with contextlib.suppress(FileNotFoundError):
                temporary_of(path).unlink()
            now, data = look(path)
            if now.kind is FileKind.FILE and data == wanted:
                continue
            if now.kind is not FileKind.MISSING and not is_own(data):
                problems.append(
                    f"{path} is not VNet's, so names in {zone} are not found: move it away."
                )
                continue
            put(
                path,
                FileState(kind=FileKind.FILE, mode=0o644, uid=os.geteuid(), gid=os.getegid()),
                wanted,
            )
        return problems

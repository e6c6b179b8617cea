"""What VNet has changed in the operating system, on disk before each change.

    <state dir>/os-changes.json     the changes that are not undone yet, in their order
    <state dir>/os-backup/N         what was in the file of change N before
    <state dir>/os-lock             held (flock) by the VNet or the repair that may change them

The file is there only while there is something to undo. A change is undone backwards and taken out
when it is: whoever dies in between begins again where it was.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from supervisor.osconfig.backend import OsConfigError, said
from supervisor.osconfig.file_state import (
    FileKind,
    FileState,
    look,
    put,
    sync_directory,
    temporary_of,
    torn,
)

log = logging.getLogger(__name__)

JOURNAL: Final = "os-changes.json"
BACKUP: Final = "os-backup"
LOCK: Final = "os-lock"
# A VNet that ends, or goes on as another program, lets go within this.
LOCK_SECONDS: Final = 2.0
SCHEMA: Final = 1
# Far more than any back end makes: one for each zone at most.
MAX_CHANGES: Final = 2000
MAX_BYTES: Final = 16 * 1024 * 1024


class ChangedByOthersError(OsConfigError):
    """A file that VNet has written was changed by someone else since."""


class _LeftError(OsConfigError):
    """Something stays as it is, for good."""


class InUseError(Exception):
    """A running VNet has the state directory."""


class FileChange(msgspec.Struct, frozen=True, kw_only=True, tag="file"):
    """A file that is VNet's for now. `before` is what to restore, its bytes are the backup's.

    `ours` are the bytes that VNet has written or was about to write, the last last.
    """

    number: int
    backend: str
    path: str
    before: FileState
    digest: str
    ours: list[bytes]


class CallChange(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """Something that a call undoes: `action` names it in the table of the one who undoes."""

    number: int
    backend: str
    action: str
    arguments: dict[str, str]


Change = FileChange | CallChange


class _Pages(msgspec.Struct, frozen=True, kw_only=True):
    schema: int = SCHEMA
    changes: list[Change] = []


class Outcome(StrEnum):
    """What became of a change that was to be undone."""

    UNDONE = "undone"
    LEFT = "left"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Undone:
    """One change after an undo; `text` says what and why."""

    outcome: Outcome
    text: str


def changed_by_others(path: Path) -> str:
    """The sentence about a file of VNet's that is not as VNet has left it."""
    return (
        f"{path} was changed by another program: remove it and restart VNet, or choose another"
        " dns.os_integration."
    )


# Undoes a call; raises OsConfigError or OSError.
Undo = Callable[[Mapping[str, str]], None]


class Journal:
    """The journal of one state directory. All methods may raise OSError."""

    def __init__(self, state_dir: Path, undo_calls: Mapping[str, Undo] | None = None) -> None:
        """Takes the lock. `undo_calls` has every action that `note` is given.

        Raises:
            InUseError: somebody else has it.
        """
        self._directory = state_dir
        self._path = state_dir / JOURNAL
        self._backup = state_dir / BACKUP
        self._undo_calls = undo_calls or {}
        self._changes: list[Change] = []
        # What could not be read of the journal; told with the next undo.
        self._damage: list[Undone] = []
        self._lock = _take_lock(state_dir / LOCK)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets others have the state directory."""
        os.close(self._lock)

    @property
    def changes(self) -> Sequence[Change]:
        """What is not undone yet, the oldest first."""
        return self._changes

    def backends(self) -> set[str]:
        """Whose changes these are."""
        return {change.backend for change in self._changes}

    # -- changing --

    def find(self, path: Path) -> FileChange | None:
        """The change of this file."""
        for change in self._changes:
            if isinstance(change, FileChange) and change.path == str(path):
                return change
        return None

    def original(self, change: FileChange) -> bytes:
        """The bytes of the file before the change.

        Raises:
            OsConfigError: the backup is gone or damaged.
        """
        try:
            data = (self._backup / str(change.number)).read_bytes()
        except FileNotFoundError:
            data = b""
        if _digest(data) != change.digest:
            raise _LeftError(
                f"The backup of {change.path} in {self._backup} is damaged: write the file anew."
            )
        return data

    def is_ours(self, change: FileChange) -> bool:
        """Whether the file is as VNet has left it, or as it was before."""
        return self._may_write(change, *look(Path(change.path)))

    def write(
        self,
        backend: str,
        path: Path,
        content: bytes,
        *,
        mode: int = 0o644,
        instead: bytes | None = None,
    ) -> None:
        """Gives the file this content; what was there before comes back with the undo.

        Mode and owner stay those of the file before; `mode` is for one that was none. `instead` is
        what to restore rather than the bytes that are there.

        Raises:
            ChangedByOthersError: it was VNet's, and someone else has changed it.
        """
        now, data = look(path)
        change = self.find(path)
        if change is None:
            change = self._begin(backend, path, now, data if instead is None else instead)
        elif not self._may_write(change, now, data):
            raise ChangedByOthersError(changed_by_others(path))
        elif now.kind is FileKind.FILE and data == content == change.ours[-1]:
            return
        # What is there may be what `instead` takes the place of, or an earlier content of ours.
        ours = [*([data] if now.kind is FileKind.FILE else []), content]
        change = msgspec.structs.replace(change, ours=ours)
        self._keep(change)
        put(path, self._own_state(change.before, mode), content)

    def take_foreign(self, change: FileChange, now: FileState, found: bytes, data: bytes) -> None:
        """Someone else has replaced the file by this: from now on it is restored, with `data`.

        `found` are its bytes, which VNet may overwrite from now on.
        """
        fresh = self._new_number()
        self._write_backup(fresh, data)
        kept = msgspec.structs.replace(
            change,
            number=fresh,
            before=now,
            digest=_digest(data),
            ours=[found] if now.kind is FileKind.FILE else change.ours[-1:],
        )
        self._changes = [kept if known is change else known for known in self._changes]
        self._save()
        self._drop_backup(change.number)

    def note(self, backend: str, action: str, **arguments: str) -> None:
        """Writes down a change that follows, and that this call undoes; nothing twice."""
        same = (backend, action, arguments)
        for known in self._changes:
            if (
                isinstance(known, CallChange)
                and (known.backend, known.action, known.arguments) == same
            ):
                return
        number = self._new_number()
        self._keep(CallChange(number=number, backend=backend, action=action, arguments=arguments))

    # -- undoing --

    def undo(self, backends: set[str] | None = None) -> list[Undone]:
        """Undoes changes backwards: those of these back ends, or all.

        A file that someone else has changed stays as it is. What fails stays in the journal.
        """
        done, self._damage = self._damage, []
        for change in reversed(self._changes[:]):
            if backends is not None and change.backend not in backends:
                continue
            try:
                outcome = self._undo_one(change)
            except _LeftError as error:
                outcome = Undone(Outcome.LEFT, str(error))
            except OsConfigError as error:
                done.append(Undone(Outcome.FAILED, f"{_what(change)}: {error}"))
                continue
            except OSError as error:
                text = (
                    f"{_what(change)} cannot be undone ({said(error)}): mend that; VNet tries"
                    " again, and so does vnet repair."
                )
                done.append(Undone(Outcome.FAILED, text))
                continue
            self._changes.remove(change)
            self._save()
            self._drop_backup(change.number)
            done.append(outcome)
        if not self._changes:
            self._remove_backups()
        return done

    def _undo_one(self, change: Change) -> Undone:
        if isinstance(change, CallChange):
            undo = self._undo_calls.get(change.action)
            if undo is None:
                raise _LeftError(f"{_what(change)}: this version does not know how to undo it.")
            undo(change.arguments)
            return Undone(Outcome.UNDONE, f"{_what(change)} is done.")
        path = Path(change.path)
        with contextlib.suppress(FileNotFoundError):
            temporary_of(path).unlink()
        now, data = look(path)
        original = self.original(change)
        if _is_before(change, now, data, original):
            return Undone(Outcome.UNDONE, f"{path} is as it was.")
        if not self._may_write(change, now, data):
            raise _LeftError(
                f"{path} was changed by another program and stays as it is: look whether it still"
                " names VNet's addresses."
            )
        put(path, change.before, original)
        return Undone(Outcome.UNDONE, f"{path} is restored.")

    def _may_write(self, change: FileChange, now: FileState, data: bytes) -> bool:
        try:
            original = self.original(change)
        except OsConfigError:
            return now.kind is FileKind.FILE and data in torn(change.ours)
        if _is_before(change, now, data, original):
            # The same bytes with another mode are someone else's file.
            before = change.before
            return (now.mode, now.uid, now.gid) == (before.mode, before.uid, before.gid)
        known = [*change.ours, *([original] if change.before.kind is FileKind.FILE else [])]
        return now.kind is FileKind.FILE and data in torn(known)

    # -- disk --

    def _begin(self, backend: str, path: Path, before: FileState, data: bytes) -> FileChange:
        number = self._new_number()
        self._write_backup(number, data)
        return FileChange(
            number=number,
            backend=backend,
            path=str(path),
            before=before,
            digest=_digest(data),
            ours=[],
        )

    @staticmethod
    def _own_state(before: FileState, mode: int) -> FileState:
        if before.kind is FileKind.FILE:
            return before
        return FileState(kind=FileKind.FILE, mode=mode, uid=os.geteuid(), gid=os.getegid())

    def _new_number(self) -> int:
        if len(self._changes) >= MAX_CHANGES:
            raise OsConfigError(
                f"VNet changes no more than {MAX_CHANGES} settings: use fewer DNS zones."
            )
        return max((change.number for change in self._changes), default=0) + 1

    def _keep(self, change: Change) -> None:
        for place, known in enumerate(self._changes):
            if known.number == change.number:
                self._changes[place] = change
                break
        else:
            self._changes.append(change)
        self._save()

    def _save(self) -> None:
        if not self._changes:
            self._path.unlink(missing_ok=True)
            sync_directory(self._directory)
            return
        _write_safely(self._path, msgspec.json.encode(_Pages(changes=self._changes)))

    def _write_backup(self, number: int, data: bytes) -> None:
        self._backup.mkdir(mode=0o700, exist_ok=True)
        _write_safely(self._backup / str(number), data)

    def _drop_backup(self, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._backup / str(number)).unlink()

    def _remove_backups(self) -> None:
        _temporary(self._path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in self._backup.iterdir():
                path.unlink()
            self._backup.rmdir()

    def _read(self) -> None:
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            self._changes = msgspec.json.decode(data, type=_Pages).changes
        except FileNotFoundError:
            pass
        except (msgspec.MsgspecError, ValueError) as error:
            aside = self._path.with_suffix(".unreadable")
            self._path.replace(aside)
            text = (
                f"The journal of changes cannot be read ({error}): it is kept as {aside}; look"
                " whether /etc/resolv.conf still names VNet's addresses."
            )
            self._damage.append(Undone(Outcome.LEFT, text))


def _take_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise InUseError(f"a VNet runs with {path.parent}") from error
            time.sleep(0.05)
        else:
            return descriptor


def _write_safely(path: Path, data: bytes) -> None:
    temporary = _temporary(path)
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)
    sync_directory(path.parent)


def _is_before(change: FileChange, now: FileState, data: bytes, original: bytes) -> bool:
    before = change.before
    return (now.kind, now.target, data) == (before.kind, before.target, original)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _what(change: Change) -> str:
    if isinstance(change, FileChange):
        return change.path
    return change.action

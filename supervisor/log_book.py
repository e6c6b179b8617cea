"""The last lines of the log, kept in memory for `vnet logs`. Pure but for a lock.

Lines are numbered from 1 in the order in which they came. Room is made by the oldest line of whoever
has taken most of it, so that a worker that writes without end does not drive out what the others said.
"""

import sys
import threading
from collections import deque
from collections.abc import Iterable
from typing import Literal

import msgspec

MAX_LINES = 5000
MAX_BYTES = 4 << 20
# One answer to `vnet logs`; what does not fit is asked for again.
MAX_PIECE_LINES = 1000
MAX_PIECE_BYTES = 256 * 1024
# What a line takes beside its message, about.
_LINE_BYTES = 600

LevelName = Literal["debug", "info", "warning", "error", "critical"]
LEVELS: dict[LevelName, int] = {
    "debug": 10,
    "info": 20,
    "warning": 30,
    "error": 40,
    "critical": 50,
}


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `vnet logs --json`, and of the log itself with `--log-format json`.

    `time` is UTC (RFC 3339). `worker` is a worker's name, or "supervisor". `connection` is the same for all
    that the processes say of one connection; empty where a line is about none. `message` may have line
    breaks and control characters in it. `sequence` counts from 1 in each run of VNet.
    """

    schema: int = 1
    sequence: int = 0
    time: str
    level: LevelName
    worker: str
    pid: int
    logger: str
    message: str
    connection: str = ""


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to a request for lines.

    `book` changes with each run of VNet: then numbers begin anew. `next` is what to ask after next, at
    once if there is `more`. `has_missed`: lines after the number that was asked for are gone already.
    """

    book: str
    entries: list[LogEntry]
    next: int
    more: bool
    has_missed: bool


class _Shelf:
    """The lines of one worker, oldest first."""

    __slots__ = ("dropped", "lines", "taken")

    def __init__(self) -> None:
        self.lines: deque[LogEntry] = deque()
        self.taken = 0
        self.dropped = 0  # number of the latest line that is gone


class LogBook:
    """At most `max_lines` lines, which take about `max_bytes`. `name` tells this book from others.

    Any thread may write and read.
    """

    def __init__(
        self, name: str = "", *, max_lines: int = MAX_LINES, max_bytes: int = MAX_BYTES
    ) -> None:
        self.name = name
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._shelves: dict[str, _Shelf] = {}
        self._lines = 0
        self._taken = 0
        self._last = 0
        self._lock = threading.Lock()

    def add(self, entry: LogEntry) -> LogEntry:
        """Keeps a line and gives it its number."""
        with self._lock:
            self._last += 1
            numbered = msgspec.structs.replace(entry, sequence=self._last)
            shelf = self._shelves.setdefault(entry.worker, _Shelf())
            shelf.lines.append(numbered)
            self._count(shelf, 1, _size(numbered))
            while self._lines > self._max_lines or self._taken > self._max_bytes:
                self._drop_one()
        return numbered

    def read(
        self,
        after: int,
        *,
        worker: str | None = None,
        level: LevelName = "debug",
        limit: int = MAX_PIECE_LINES,
        max_bytes: int = MAX_PIECE_BYTES,
    ) -> Piece:
        """Lines with a number above `after`, at least of this level, oldest first.

        At most `limit` lines and about `max_bytes`, but one at least if there is any.
        """
        with self._lock:
            shelves = [
                shelf for name, shelf in self._shelves.items() if worker is None or name == worker
            ]
            found = [line for shelf in shelves for line in _newer(shelf.lines, after)]
            has_missed = any(shelf.dropped > after for shelf in shelves)
            last = self._last
        found.sort(key=lambda line: line.sequence)
        wanted = [line for line in found if LEVELS[line.level] >= LEVELS[level]]
        shown: list[LogEntry] = []
        size = 0
        for line in wanted[:limit]:
            size += _size(line)
            if shown and size > max_bytes:
                break
            shown.append(line)
        has_more = len(shown) < len(wanted)
        return Piece(
            book=self.name,
            entries=shown,
            next=shown[-1].sequence if has_more else last,
            more=has_more,
            has_missed=has_missed,
        )

    def keep(self) -> tuple[int, list[LogEntry]]:
        """The last number, and every line in order; for `restore`."""
        with self._lock:
            lines = [line for shelf in self._shelves.values() for line in shelf.lines]
            return self._last, sorted(lines, key=lambda line: line.sequence)

    def restore(self, name: str, last: int, lines: Iterable[LogEntry]) -> None:
        """Goes on with the lines of another book, as that book; this one is empty still."""
        with self._lock:
            self.name = name
            self._last = last
            for line in lines:
                shelf = self._shelves.setdefault(line.worker, _Shelf())
                shelf.lines.append(line)
                self._count(shelf, 1, _size(line))
            # What the other has dropped is not known by worker: all may have missed something.
            first = min((s.lines[0].sequence for s in self._shelves.values()), default=last + 1)
            for shelf in self._shelves.values():
                shelf.dropped = first - 1

    def _drop_one(self) -> None:
        by_lines = self._lines > self._max_lines
        shelf = max(
            self._shelves.values(), key=lambda each: len(each.lines) if by_lines else each.taken
        )
        dropped = shelf.lines.popleft()
        shelf.dropped = dropped.sequence
        self._count(shelf, -1, -_size(dropped))

    def _count(self, shelf: _Shelf, lines: int, size: int) -> None:
        shelf.taken += size
        self._lines += lines
        self._taken += size


def _size(entry: LogEntry) -> int:
    return _LINE_BYTES + sys.getsizeof(entry.message)


def _newer(lines: deque[LogEntry], after: int) -> Iterable[LogEntry]:
    for line in reversed(lines):
        if line.sequence <= after:
            return
        yield line

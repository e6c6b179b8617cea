"""The one log stream: lines of the supervisor and of every worker, on standard error.

What is written is also kept in a `LogBook`, for `vnet logs`.
"""

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Mapping
from typing import Literal

import msgspec

from ipc.log_limit import LimitFilter
from supervisor.log_book import LEVELS, LevelName, LogBook, LogEntry
from supervisor.standard_error import StandardError

log = logging.getLogger(__name__)

LogFormat = Literal["text", "json"]

# Libraries that log each of their steps. A level on their loggers does not last: some set it anew
# when they are imported.
_CHATTY = ("pyroute2", "asyncio", "hpack", "h2", "grpclib")
# Characters; the stack of a deep recursion is shorter.
_MAX_MESSAGE = 64 * 1024

_encoder = msgspec.json.Encoder()
_exceptions = logging.Formatter()


class StandardErrorHandler(logging.Handler):
    """Writes each record at once, and keeps it in `book`; any thread may call `emit`.

    No buffered stream is used: its lock, held by one thread at the moment of a fork, would be held
    for ever in the child. The lock of a handler is made anew there.
    """

    def __init__(
        self,
        log_format: LogFormat = "text",
        book: LogBook | None = None,
        *,
        to_journal: bool = False,
        descriptor: int = 2,
    ) -> None:
        """`to_journal`: standard error is the journal, which takes the level of each line."""
        super().__init__()
        self._standard_error = StandardError(descriptor)
        self._lost = 0
        self.book = book or LogBook()
        self._format = log_format
        self._to_journal = to_journal

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record; a standard error that is closed, full or not read loses it, VNet goes on."""
        if record.levelno < logging.WARNING and record.name.partition(".")[0] in _CHATTY:
            return
        try:
            entry = self.book.add(entry_of(record))
            if self._format == "json":
                line = json_line(entry)
            elif self._to_journal:
                line = with_priority(text_line(entry), entry.level)
            else:
                line = text_line(entry)
            self._write((line + "\n").encode(errors="replace"))
        except OSError:
            pass
        except (ValueError, TypeError):
            self.handleError(record)

    def _write(self, line: bytes) -> None:
        with self.lock or contextlib.nullcontext():
            if not self._standard_error.write(line):
                self._lost += 1
                return
            lost, self._lost = self._lost, 0
        if lost:
            log.warning("%d log lines were lost, nobody read standard error", lost)


def entry_of(record: logging.LogRecord) -> LogEntry:
    """What is told of a record."""
    message = record.getMessage()
    if record.exc_info:
        message = f"{message}\n{_exceptions.formatException(record.exc_info)}"
    if len(message) > _MAX_MESSAGE:
        message = message[: _MAX_MESSAGE - 4] + " ..."
    return LogEntry(
        time=_stamp(record),
        level=_level(record.levelno),
        worker=str(getattr(record, "worker", "supervisor")),
        pid=record.process or 0,
        logger=record.name,
        # File names that are no UTF-8 have no other form.
        message=message.encode(errors="replace").decode(),
        connection=str(getattr(record, "connection", "")),
    )


def _stamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.created % 1 * 1000):03d}Z"


def _level(number: int) -> LevelName:
    """The highest level that `number` reaches."""
    reached: LevelName = "debug"
    for name, least in LEVELS.items():
        if number >= least:
            reached = name
    return reached


# What moves a terminal's cursor, or ends a line for some reader; the line feed is not among them.
_CONTROLS = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029)
}


def text_line(entry: LogEntry, *, before: str = "", after: str = "") -> str:
    """`2026-01-31T12:00:00.123Z INFO dns[4711]: message`, UTC, with the connection before the colon.

    Messages quote what workers and clusters say. Lines after the first are indented, so that
    none of them looks like a record. `before` and `after` stand around the level, for its colour.
    """
    message = entry.message.translate(_CONTROLS).replace("\n", "\n    ")
    connection = f" {entry.connection}" if entry.connection else ""
    level = f"{before}{entry.level.upper()}{after}"
    return f"{entry.time} {level} {entry.worker}[{entry.pid}]{connection}: {message}"


def json_line(entry: LogEntry) -> str:
    """One JSON object."""
    return _encoder.encode(entry).decode()


# Of syslog(3), as sd-daemon(3) has them.
_PRIORITIES: dict[LevelName, int] = {
    "debug": 7,
    "info": 6,
    "warning": 4,
    "error": 3,
    "critical": 2,
}


def with_priority(text: str, level: LevelName) -> str:
    """Each line with its level as sd-daemon(3) has it: the journal takes every line for itself."""
    prefix = f"<{_PRIORITIES[level]}>"
    return prefix + text.replace("\n", f"\n{prefix}")


def is_journal(environment: Mapping[str, str], descriptor: int) -> bool:
    """Whether this descriptor leads to the journal: JOURNAL_STREAM in systemd.exec(5)."""
    named = environment.get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return named == f"{found.st_dev}:{found.st_ino}"


def set_up(level: str, log_format: LogFormat) -> StandardErrorHandler:
    """Makes the root logger write the stream; returns the handler for the workers' records."""
    handler = StandardErrorHandler(
        log_format, LogBook(secrets.token_hex(8)), to_journal=is_journal(os.environ, 2)
    )
    # Records of workers do not pass it: they have been limited where they were made.
    handler.addFilter(LimitFilter(handler.emit))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    return handler


def book_of(handler: logging.Handler) -> LogBook:
    """The book in which this handler keeps what it writes; an empty one if it keeps none."""
    return handler.book if isinstance(handler, StandardErrorHandler) else LogBook()

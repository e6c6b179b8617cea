"""A limit for each message of a process's log: the same one again and again becomes a number.

    within WINDOW_SECONDS: the first MAX_REPEATS lines --> told --> the others counted --> one line

The same is what has the same logger, level and template; its arguments may differ. `MessageLimit` is
pure, `LimitFilter` puts it before a handler.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

WINDOW_SECONDS: Final = 10.0
MAX_REPEATS: Final = 20
# Who asks for debug lines wants to follow each connection; this is against what runs wild.
MAX_DEBUG_REPEATS: Final = 1000
# Different messages in one window; all others share one limit.
MAX_KINDS: Final = 500
_MAX_TEMPLATE: Final = 200
_MAX_SAMPLE: Final = 300

# `extra` of a line whose writer has a limit of its own.
UNLIMITED: Final[Mapping[str, object]] = {"is_unlimited": True}


class Kind(NamedTuple):
    """What makes two lines the same message."""

    logger: str
    level: int
    template: str


_OTHERS: Final = Kind(__name__, logging.WARNING, "")


class Suppressed(NamedTuple):
    """Lines of one kind that were not told; `sample` is the text of the first."""

    kind: Kind
    sample: str
    number: int


@dataclass(slots=True)
class _Window:
    until: float
    told: int = 0
    suppressed: int = 0
    sample: str = ""


class MessageLimit:
    """Times are monotonic seconds and never go back."""

    def __init__(
        self,
        *,
        window_seconds: float = WINDOW_SECONDS,
        max_repeats: int = MAX_REPEATS,
        max_debug_repeats: int = MAX_DEBUG_REPEATS,
        max_kinds: int = MAX_KINDS,
    ) -> None:
        self._window_seconds = window_seconds
        self._max_repeats = max_repeats
        self._max_debug_repeats = max_debug_repeats
        self._max_kinds = max_kinds
        # In the order of their ends.
        self._windows: dict[Kind, _Window] = {}

    def note(self, kind: Kind, text: Callable[[], str], now: float) -> bool:
        """Whether a line of this kind is to be told; `text` makes its text when that is needed."""
        window = self._windows.get(kind)
        if window is None:
            if len(self._windows) >= self._max_kinds:
                kind = _OTHERS
            window = self._windows.get(kind) or _Window(now + self._window_seconds)
            self._windows[kind] = window
        is_debug = kind.level <= logging.DEBUG
        if window.told < (self._max_debug_repeats if is_debug else self._max_repeats):
            window.told += 1
            return True
        if not window.suppressed:
            window.sample = text()
        window.suppressed += 1
        return False

    def due(self, now: float) -> list[Suppressed]:
        """What was suppressed in windows that are over."""
        found = []
        for kind, window in list(self._windows.items()):
            if now < window.until:
                break
            del self._windows[kind]
            if window.suppressed:
                found.append(Suppressed(kind, window.sample, window.suppressed))
        return found


class LimitFilter(logging.Filter):
    """A filter for a handler; `write` is that handler's `emit`, for the lines with the numbers."""

    def __init__(
        self,
        write: Callable[[logging.LogRecord], None],
        limit: MessageLimit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._write = write
        self._limit = limit or MessageLimit()
        self._clock = clock
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is told; what is due is written before it."""
        self.tell_due()
        if getattr(record, "is_unlimited", False):
            return True
        kind = Kind(record.name, record.levelno, str(record.msg)[:_MAX_TEMPLATE])
        with self._lock:
            return self._limit.note(kind, lambda: _sample(record), self._clock())

    def tell_due(self) -> None:
        """Writes what was suppressed in windows that are over."""
        with self._lock:
            due = self._limit.due(self._clock())
        for suppressed in due:
            self._write(_summary(suppressed))


def tell_suppressed() -> None:
    """Has all limits before the root logger's handlers tell what is due.

    Called now and then, so that the number comes also when the process has fallen silent.
    """
    for handler in logging.getLogger().handlers:
        for each in handler.filters:
            if isinstance(each, LimitFilter):
                each.tell_due()


def _sample(record: logging.LogRecord) -> str:
    text = str(record.msg)
    with contextlib.suppress(ValueError, TypeError):  # arguments that do not fit: the template then
        text = record.getMessage()
    first, *_ = text.splitlines() or [""]
    return first[:_MAX_SAMPLE]


def _summary(suppressed: Suppressed) -> logging.LogRecord:
    kind = suppressed.kind
    what = "lines of other kinds" if kind == _OTHERS else "more like this"
    return logging.makeLogRecord(
        {
            "name": kind.logger,
            "levelno": kind.level,
            "levelname": logging.getLevelName(kind.level),
            "msg": f"{suppressed.sample} ... {suppressed.number} {what} in {WINDOW_SECONDS:g} s",
        }
    )

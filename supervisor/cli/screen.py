"""A view that is shown again and again: in place on a terminal, one after the other elsewhere.

On a terminal the view has a screen of its own (the alternate one, xterm's private mode 1049), so that what the
user sees there already is left alone. Each view is one write: to the top, each line and the rest of its row
cleared, then the rest of the screen; nothing scrolls and nothing is empty for a moment. At the end the terminal
is as it was, whatever ends the command, and the last view stays below the command.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Final, NoReturn, Self, TextIO

from supervisor.cli.text import wants_colour

# Whatever a terminal says about itself.
MIN_WIDTH: Final = 40
MIN_HEIGHT: Final = 6
# How soon a terminal of another size is drawn anew.
STEP_SECONDS: Final = 0.1

# Own screen, no cursor, no automatic line breaks: a line too long for a terminal that says less is cut.
_BEGIN, _END = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
_HOME, _TO_LINE_END, _TO_SCREEN_END = "\x1b[H", "\x1b[K", "\x1b[J"
SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether it is one that can move its cursor, not "dumb"."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def width_of(stream: TextIO) -> int | None:
    """Columns to be used there; None where it is no terminal: then everything is printed in full."""
    if not stream.isatty():
        return None
    return max(shutil.get_terminal_size().columns, MIN_WIDTH)


def has_colour(stream: TextIO) -> bool:
    """Whether it is a terminal that may get colours."""
    return stream.isatty() and wants_colour(os.environ)


def fitted(shown: Sequence[str], height: int, whole: str) -> list[str]:
    """As many lines as a terminal of this height shows, one of which says how many are missing.

    `whole` is the command that shows all. Pure.
    """
    room = max(height, MIN_HEIGHT) - 1
    if len(shown) <= room:
        return list(shown)
    missing = len(shown) - room + 1
    return [*shown[: room - 1], f"... {missing} more lines: {whole}"]


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """Signals that end a process raise SystemExit here, with the status that a shell gives for them."""
    before = [(number, signal.signal(number, _end)) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class Screen:
    """Use as a context; `whole` is the command that shows a view that does not fit.

    `minds_signals`: not where `orderly_run` does.
    """

    def __init__(
        self, whole: str, *, is_for_people: bool = True, minds_signals: bool = True
    ) -> None:
        self.is_in_place = is_for_people and is_terminal(sys.stdout)
        self._minds_signals = minds_signals
        self._whole = whole
        self._last: list[str] = []
        self._signals = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self.is_in_place:
            # First: whatever ends us from here on is cleaned up after.
            if self._minds_signals:
                self._signals.enter_context(ended_in_order())
            try:
                _write(_BEGIN)
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.is_in_place:
            return
        last = "".join(f"{line}\n" for line in self._last)
        # Unless the terminal has gone.
        with self._signals, contextlib.suppress(OSError):
            _write(f"{_END}{last}")

    def show(self, view: Sequence[str]) -> None:
        """Shows a view in place of the one before; after it, with an empty line, where there is no place."""
        if not self.is_in_place:
            _write("".join(f"{line}\n" for line in view) + "\n")
            return
        self._last = fitted(view, shutil.get_terminal_size().lines, self._whole)
        rows = "".join(f"{line}{_TO_LINE_END}\n" for line in self._last)
        _write(f"{_HOME}{rows}{_TO_SCREEN_END}")

    def pause(self, seconds: float) -> None:
        """Returns after this time, or soon after the terminal has another size."""
        for step in self.steps(seconds):
            time.sleep(step)

    def steps(self, seconds: float) -> Iterator[float]:
        """The seconds of a pause, in pieces that are to be slept through one after the other."""
        size, until = shutil.get_terminal_size(), time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            yield min(left, STEP_SECONDS) if self.is_in_place else left
            if self.is_in_place and shutil.get_terminal_size() != size:
                return


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)

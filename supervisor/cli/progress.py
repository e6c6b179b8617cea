"""One line on standard error that says what takes so long, while it does; only on a terminal."""

import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

from supervisor.cli.screen import is_terminal
from supervisor.cli.text import cut

# What is done sooner needs no word.
DELAY_SECONDS = 0.5
STEP_SECONDS = 1.0

_ANEW = "\r\x1b[K"
_USUAL_COLUMNS = 80


class Progress:
    """Use as a context: "TEXT ... 3 s" as long as it lasts. Whoever prints meanwhile calls `hide` before."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._is_shown = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if is_terminal(sys.stderr):
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Takes the line away for good; its thread has ended then, so that the process may fork."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        self.hide()

    def hide(self) -> None:
        """Takes the line away; it is back with the next second."""
        with self._lock:
            if self._is_shown:
                self._is_shown = False
                print(_ANEW, end="", file=sys.stderr, flush=True)

    def _run(self) -> None:
        began, wait = time.monotonic(), DELAY_SECONDS
        while not self._is_over.wait(wait):
            wait = STEP_SECONDS
            with self._lock:
                if self._is_over.is_set():
                    return
                self._is_shown = True
                passed = f" ... {time.monotonic() - began:.0f} s"
                text = cut(self._text, _columns() - len(passed)) + passed
                print(f"{_ANEW}{text}", end="", file=sys.stderr, flush=True)


def _columns() -> int:
    """A line that takes more than a row of the terminal could not be taken away."""
    try:
        found = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        found = 0
    return (found or _USUAL_COLUMNS) - 1

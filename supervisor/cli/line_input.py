"""Standard input, line by line and only when a line is wanted: what follows is for others."""

import os
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue

MAX_LINE_BYTES = 4096
_STDIN = 0


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its line feed; None at the end of input."""

    text: str | None


class LineInput:
    """Reads in a thread, because what cannot be waited for (a file) must do as well.

    `put` is called in that thread.
    """

    def __init__(self, put: Callable[[Line], None]) -> None:
        self._put = put
        self._orders: SimpleQueue[None] = SimpleQueue()
        self._is_waiting = False
        self._thread: threading.Thread | None = None
        self._rest = b""
        self._echo: list[object] | None = None
        self.has_ended = False
        self.is_terminal = _is_terminal()

    def took(self, _line: Line) -> None:
        """The line was made use of."""
        self._is_waiting = False

    def want(self, *, is_secret: bool) -> None:
        """A `Line` will come. One that was wanted before and has not come counts for this."""
        self._show_typing(is_shown=not is_secret)
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        if not self._is_waiting and not self.has_ended:
            self._is_waiting = True
            self._orders.put(None)

    def close(self) -> None:
        """Leaves the terminal as it was; a read that is under way ends with the process."""
        self._show_typing(is_shown=True)

    def _show_typing(self, *, is_shown: bool) -> None:
        if not self.is_terminal or is_shown == (self._echo is None):
            return
        if self._echo is None:
            before = termios.tcgetattr(_STDIN)
            hidden = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
            termios.tcsetattr(_STDIN, termios.TCSADRAIN, hidden)
            self._echo = list(before)
        else:
            # What was typed and not read was meant to be secret: it must not become an answer.
            termios.tcsetattr(_STDIN, termios.TCSAFLUSH, self._echo)  # type: ignore[arg-type]  # what tcgetattr gave
            self._echo = None
            print()  # the line feed was not seen either

    def _read(self) -> None:
        for line in self._lines():
            self._put(Line(line))
            self._orders.get()
        self.has_ended = True
        self._put(Line(None))

    def _lines(self) -> Iterator[str]:
        self._orders.get()
        while True:
            while b"\n" not in self._rest and len(self._rest) < MAX_LINE_BYTES:
                try:
                    piece = os.read(_STDIN, MAX_LINE_BYTES)
                except OSError:
                    piece = b""
                if not piece:
                    if self._rest:
                        yield self._rest.decode(errors="replace")
                    return
                self._rest += piece
            line, _, self._rest = self._rest.partition(b"\n")
            yield line.decode(errors="replace")


def _is_terminal() -> bool:
    try:
        return os.isatty(_STDIN)
    except OSError:
        return False

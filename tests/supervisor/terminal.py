"""A terminal of a test's own: what a program has drawn on it, and whether it was left as it was.

Knows what VNet writes, and nothing else: whatever is unknown fails the test.
"""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

VNET = str(Path(sys.executable).with_name("vnet"))
DEADLINE_SECONDS = 30.0
_PIECE = re.compile(r"\x1b\[([?0-9;]*)([a-zA-Z])|\r|\n|[^\x00-\x1f\x7f]")


class Display:
    """What is to be seen: `rows`, and the modes of a VT100 with those of xterm that programs switch."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self.modes = {"1049": False, "25": True, "7": True}
        # How often what is drawn in place had no room.
        self.scrolled = self.clipped = 0
        self._main: tuple[list[list[str]], int, int] | None = None
        self._blank()

    def _blank(self) -> None:
        self._cells = [[" "] * self.columns for _ in range(self.lines)]
        self._x = self._y = 0

    @property
    def rows(self) -> list[str]:
        return ["".join(row).rstrip() for row in self._cells]

    @property
    def text(self) -> str:
        return "\n".join(self.rows).rstrip()

    def resize(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        self._blank()

    def feed(self, text: str) -> str:
        """Draws it; returns what is the beginning of something."""
        at = 0
        while at < len(text):
            found = _PIECE.match(text, at)
            if found is None:
                assert text[at] == "\x1b", f"a control character: {text[at : at + 10]!r}"
                assert len(text) - at < 20, f"an unknown sequence: {text[at : at + 20]!r}"
                return text[at:]
            at = found.end()
            if found[2]:
                self._control(found[1], found[2])
            elif found[0] == "\r":
                self._x = 0
            elif found[0] == "\n":
                self._line_feed()
            else:
                self._put(found[0])
        return ""

    def _control(self, values: str, order: str) -> None:
        if order == "m":
            return
        if order == "H" and not values:
            self._x = self._y = 0
        elif order == "K" and not values:
            self._cells[self._y][self._x :] = [" "] * (self.columns - self._x)
        elif order == "J" and not values:
            self._control("", "K")
            self._cells[self._y + 1 :] = [
                [" "] * self.columns for _ in range(self.lines - self._y - 1)
            ]
        elif order in "hl" and values.startswith("?") and values[1:] in self.modes:
            self._mode(values[1:], is_on=order == "h")
        else:
            raise AssertionError(f"an unknown order: {values!r} {order}")

    def _mode(self, name: str, *, is_on: bool) -> None:
        if name == "1049" and is_on != self.modes[name]:
            if is_on:
                self._main = self._cells, self._x, self._y
                self._blank()
            else:
                assert self._main is not None
                self._cells, self._x, self._y = self._main
        self.modes[name] = is_on

    def _line_feed(self) -> None:
        if self._y == self.lines - 1:
            self.scrolled += self.modes["1049"]
            self._cells = [*self._cells[1:], [" "] * self.columns]
        else:
            self._y += 1

    def _put(self, character: str) -> None:
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self._x + width > self.columns:
            if not self.modes["7"]:
                self.clipped += 1
                return
            self._x = 0
            self._line_feed()
        self._cells[self._y][self._x : self._x + width] = [character] + [""] * (width - 1)
        self._x += width


class Terminal:
    """A command in a terminal of this size. `errors` goes to the terminal as well."""

    def __init__(
        self, arguments: Sequence[str], columns: int = 80, lines: int = 24, **env: str
    ) -> None:
        ours, theirs = pty.openpty()
        self._end = ours
        self._rest = ""
        self.raw = ""
        self.display = Display(columns, lines)
        self._tell_size(theirs)
        known = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [VNET, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=known | {"TERM": "xterm"} | env,
            start_new_session=True,
        )
        os.close(theirs)
        os.set_blocking(ours, False)

    def _tell_size(self, descriptor: int) -> None:
        size = struct.pack("HHHH", self.display.lines, self.display.columns, 0, 0)
        fcntl.ioctl(descriptor, termios.TIOCSWINSZ, size)

    def resize(self, columns: int, lines: int) -> None:
        self._read()
        self.display.resize(columns, lines)
        self._tell_size(self._end)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # nothing there, or nobody any more
            text = os.read(self._end, 1 << 20).decode()
            self.raw += text
            self._rest = self.display.feed(self._rest + text)

    def wait_for(self, is_so: Callable[[Display], object]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not is_so(self.display):
            assert time.monotonic() < deadline, self.display.text
            time.sleep(0.01)
            self._read()

    def end(self, number: int = signal.SIGINT) -> int:
        """Its exit status after this signal."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.display.text
            time.sleep(0.01)
            self._read()
        self._read()
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@contextlib.contextmanager
def terminal(*arguments: str, columns: int = 80, lines: int = 24, **env: str) -> Iterator[Terminal]:
    """`vnet` with these arguments."""
    made = Terminal(arguments, columns, lines, **env)
    try:
        yield made
    finally:
        made.close()

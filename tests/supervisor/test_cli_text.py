"""Text for terminals, and the line on standard error while something takes long."""

import fcntl
import io
import os
import pty
import re
import struct
import termios
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.cli import progress, text
from supervisor.cli.progress import Progress
from supervisor.cli.screen import fitted

PRINTABLE = st.text(max_size=60).map(text.printable)


@pytest.mark.parametrize(
    ("shown", "columns"),
    [("", 0), ("abc", 3), ("日本", 4), ("e\u0301", 1), ("ｱ", 1), ("\uff21", 2), ("\U0001f600", 2)],
)
def test_columns_are_those_of_the_terminal(shown, columns):
    assert text.columns(shown) == columns


def test_what_is_too_long_is_cut_to_the_columns():
    assert text.cut("pg.example.com", 8) == "pg.exam…"
    assert text.cut_middle("pg.example.com", 8) == "pg.e…com"
    assert text.cut_middle("日本語日本語", 7) == "日…本語"
    assert text.cut_middle("short", 5) == "short"
    assert text.padded("日本", 6) == "日本  "
    assert text.padded("7", 3, is_number=True) == "  7"


@given(PRINTABLE, st.integers(0, 40))
def test_nothing_is_wider_than_it_may_be(shown, width):
    for cut in (text.cut(shown, width), text.cut_middle(shown, width), text.head(shown, width)):
        assert text.columns(cut) <= width
    for line in text.wrapped(shown, max(width, 4), max_lines=3):
        assert text.columns(line) <= max(width, 4)


@given(PRINTABLE, st.integers(2, 40))
def test_wrapping_loses_nothing(shown, width):
    lines = text.wrapped(shown, width)
    assert "".join("".join(lines).split()) == "".join(shown.split())


def test_wrapped_lines_are_indented_and_no_more_than_wanted():
    lines = text.wrapped("one two three four five", 10, indent="  ", max_lines=2)
    assert lines == ["  one two", "  thre ..."]
    assert text.wrapped("", 10) == []


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.9, "0s"), (59, "59s"), (61, "1m 1s"), (7205, "2h 0m"), (90_000, "1d 1h")],
)
def test_durations(seconds, shown):
    assert text.duration(seconds) == shown


def test_nothing_moves_the_cursor_or_turns_the_writing():
    evil = "a\x1b[2Jb\nc\u202ed\u200b\x9be"
    assert text.printable(evil) == "a [2Jb c d  e"


def test_a_terminal_of_few_lines_says_how_many_are_missing():
    shown = [str(number) for number in range(30)]
    assert fitted(shown, 31, "vnet x") == shown
    cut = fitted(shown, 30, "vnet x")
    assert len(cut) == 29
    assert cut[:28] == shown[:28]
    assert cut[28] == "... 2 more lines: vnet x"
    assert len(fitted(shown, 0, "vnet x")) == 5


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def errors(monkeypatch):
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.01)
    monkeypatch.setattr(progress, "STEP_SECONDS", 0.01)
    monkeypatch.setenv("TERM", "xterm")

    def use(stream):
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return use


def wait_for(is_so):
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_progress_is_shown_on_a_terminal_and_gone_at_the_end(errors):
    stream = errors(Tty())
    with Progress("asking") as line:
        wait_for(lambda: re.search(r"asking \.\.\. \d+ s", stream.getvalue()))
        line.hide()
        seen = len(stream.getvalue())
        wait_for(lambda: "asking" in stream.getvalue()[seen:])
    assert stream.getvalue().endswith("\r\x1b[K")
    said = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == said


def test_progress_takes_one_row_of_the_terminal(errors):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
    with os.fdopen(ours, "rb", buffering=0) as screen, os.fdopen(theirs, "w") as stream:
        errors(stream)
        with Progress("looking for " + "long-" * 50):
            seen = b""
            while seen.count(b"\r\x1b[K") < 2:
                seen += screen.read(4096)
    shown = seen.decode().split("\r\x1b[K")[1]
    assert re.fullmatch(r"looking for long-.*… \.\.\. \d+ s", shown)
    assert len(shown) == 29


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_progress_is_for_terminals_only(errors, monkeypatch, term):
    stream = errors(io.StringIO() if term == "xterm" else Tty())
    monkeypatch.setenv("TERM", term)
    with Progress("asking"):
        time.sleep(0.05)
    assert stream.getvalue() == ""


def test_what_is_done_at_once_needs_no_word(errors, monkeypatch):
    monkeypatch.setattr(progress, "DELAY_SECONDS", 60.0)
    stream = errors(Tty())
    with Progress("asking"):
        pass
    assert stream.getvalue() == ""

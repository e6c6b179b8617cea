import contextlib
import json
import logging
import os
import select
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor import logs, standard_error
from supervisor.log_book import LogBook


def record(text: str, **extra: object) -> logging.LogRecord:
    values = {
        "created": 0.1234,
        "levelno": 30,
        "levelname": "WARNING",
        "name": "a.b",
        "msg": text,
        "process": 4711,
    }
    return logging.makeLogRecord(values | extra)


def text_of(found: logging.LogRecord) -> str:
    return logs.text_line(logs.entry_of(found))


def test_line_for_people():
    stamp = "1970-01-01T00:00:00.123Z"
    assert text_of(record("hello")) == f"{stamp} WARNING supervisor[4711]: hello"
    assert text_of(record("x", worker="dns")).endswith("Z WARNING dns[4711]: x")
    about = record("x", worker="tun", connection="caaaaaaab")
    assert text_of(about).endswith("Z WARNING tun[4711] caaaaaaab: x")


def test_line_for_machines(capfd):
    book = LogBook("run")
    handler = logs.StandardErrorHandler("json", book)
    handler.emit(record("a\nb\x1b", worker="dns", connection="caaaaaaab"))
    handler.emit(record("next", levelno=25))
    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert first == {
        "schema": 1,
        "sequence": 1,
        "time": "1970-01-01T00:00:00.123Z",
        "level": "warning",
        "worker": "dns",
        "pid": 4711,
        "logger": "a.b",
        "message": "a\nb\x1b",
        "connection": "caaaaaaab",
    }
    assert (second["sequence"], second["level"], second["worker"]) == (2, "info", "supervisor")
    assert [entry.message for entry in book.read(0).entries] == ["a\nb\x1b", "next"]


def test_stack_is_indented():
    try:
        {}["key"]
    except KeyError as error:
        text = text_of(record("it failed", exc_info=(type(error), error, error.__traceback__)))
    first, *rest = text.split("\n")
    assert first.endswith("it failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-1] == "    KeyError: 'key'"


@given(st.text())
def test_message_cannot_look_like_a_record_of_its_own(text):
    line = text_of(record(text))
    for following in line.splitlines()[1:]:
        assert following.startswith("    ")
    assert all(
        character.isprintable() or ord(character) >= 160 or character in "\t\n"
        for character in line
    )


@given(st.text(), st.sampled_from([10, 20, 30, 40, 50]))
def test_each_line_for_the_journal_has_its_priority(text, level):
    entry = logs.entry_of(record(text, levelno=level))
    lines = logs.with_priority(logs.text_line(entry), entry.level).split("\n")
    assert {line[:3] for line in lines} == {f"<{ {10: 7, 20: 6, 30: 4, 40: 3, 50: 2}[level] }>"}


def test_the_journal_is_known_by_device_and_inode(monkeypatch, capfd):
    """JOURNAL_STREAM is inherited by programs whose standard error leads elsewhere."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        of_ours = os.fstat(ours.fileno())
        environment = {"JOURNAL_STREAM": f"{of_ours.st_dev}:{of_ours.st_ino}"}
        assert logs.is_journal(environment, ours.fileno())
        assert not logs.is_journal(environment, theirs.fileno())
        assert not logs.is_journal({}, ours.fileno())
    assert not logs.is_journal(environment, -1)

    found = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    with own_root_logger("text"):
        logging.getLogger("x").error("two\nlines")
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("<3>")
    assert second == "<3>    lines"


class own_root_logger:  # noqa: N801  # reads as the statement it is
    """The root logger set up as the supervisor does it; put back afterwards."""

    def __init__(self, log_format: logs.LogFormat) -> None:
        self._root = logging.getLogger()
        self._before = self._root.handlers[:], self._root.level
        self._format = log_format

    def __enter__(self) -> logs.StandardErrorHandler:
        return logs.set_up("INFO", self._format)

    def __exit__(self, *_: object) -> None:
        self._root.handlers[:] = self._before[0]
        self._root.setLevel(self._before[1])


def test_the_same_message_again_and_again_is_cut_short_but_not_that_of_workers(capfd):
    with own_root_logger("text") as handler:
        log = logging.getLogger("x")
        for number in range(200):
            log.error("wrong: %d", number)
            handler.emit(record(f"of a worker {number}", worker="dns"))
        error = capfd.readouterr().err
        assert error.count("wrong: ") == 20
        assert error.count("of a worker") == 200
        assert logs.book_of(handler) is handler.book
        assert len(handler.book.read(0).entries) == 220


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_file_name_that_is_no_utf8_is_no_obstacle(capfd, log_format):
    logs.StandardErrorHandler(log_format).emit(record(os.fsdecode(b"caf\xe9")))
    assert "caf?" in capfd.readouterr().err


def test_endless_message_is_cut():
    assert len(logs.entry_of(record("x" * 1_000_000)).message) < 100_000


def test_closed_standard_error_loses_the_line_and_nothing_else():
    handler = logs.StandardErrorHandler()
    pid = os.fork()
    if pid == 0:
        os.close(2)
        handler.emit(record("x"))
        os._exit(0 if len(handler.book.read(0).entries) == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_chatter_of_libraries_is_left_out_but_not_their_warnings(capfd):
    handler = logs.StandardErrorHandler()
    handler.emit(record("step", name="pyroute2.netlink", levelno=10))
    handler.emit(record("trouble", name="pyroute2.netlink"))
    error = capfd.readouterr().err
    assert "step" not in error
    assert "trouble" in error


@pytest.fixture
def pipe():
    """A reader and a writer that waits."""
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def read_all(reader: int) -> bytes:
    os.set_blocking(reader, False)
    found = b""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reader, 1 << 16):
            found += data
    return found


@pytest.mark.parametrize("size", [10, 3000, 20_000])
def test_a_reader_that_stands_still_holds_nobody_up_and_gets_whole_lines_later(pipe, size):
    reader, writer = pipe
    handler = logs.StandardErrorHandler("json", LogBook("run"), descriptor=writer)
    logs.log.addHandler(handler)
    try:
        began = time.monotonic()
        for number in range(3000):
            handler.emit(record(f"{number} {'x' * size}", worker="dns"))
        took = time.monotonic() - began
        first = read_all(reader)
        handler.emit(record("heard again"))
    finally:
        logs.log.removeHandler(handler)
    lines = (first + read_all(reader)).decode().splitlines()
    # It was waited for once, and the machine may be busy.
    assert took < 10
    told = [json.loads(line)["message"] for line in lines if line.endswith("}")]
    assert len(lines) - len(told) <= 1  # the last before it stood still may be cut
    *before, again, notice = told
    assert again == "heard again"
    assert [int(text.split()[0]) for text in before] == list(range(len(before)))
    assert notice == f"{3000 - len(before)} log lines were lost, nobody read standard error"
    assert len(handler.book.read(0, worker="dns", limit=5000, max_bytes=1 << 30).entries) > 100


@pytest.mark.parametrize("size", [0, 900, 9000])
def test_a_terminal_that_stands_still_holds_nobody_up_and_is_not_changed(size):
    screen, terminal = os.openpty()
    handler = logs.StandardErrorHandler("text", LogBook("run"), descriptor=terminal)
    try:
        flood = threading.Thread(
            target=lambda: [handler.emit(record("x" * size)) for _ in range(3000)], daemon=True
        )
        flood.start()
        flood.join(20)
        assert not flood.is_alive()
        # Whoever started VNet goes on with the same terminal.
        assert os.get_blocking(terminal)
        assert read_all(screen)
        handler.emit(record("heard again"))
        # The screen is told by the kernel, in its own time.
        shown = b""
        while b"heard again\r\n" not in shown:
            assert select.select([screen], [], [], 20)[0]
            shown += os.read(screen, 1 << 16)
    finally:
        os.close(screen)
        os.close(terminal)
        os.close(handler._standard_error._descriptor)


def test_threads_do_not_write_into_each_others_lines(pipe, monkeypatch):
    # A reader that comes late costs no line here.
    monkeypatch.setattr(standard_error, "PATIENCE_SECONDS", 60.0)
    reader, writer = pipe
    handler = logs.StandardErrorHandler("json", LogBook("run"), descriptor=writer)
    threads = [
        threading.Thread(target=lambda: [handler.emit(record("x" * 9000)) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    found = b""
    while found.count(b"\n") < 200:
        found += os.read(reader, 1 << 16)
    for thread in threads:
        thread.join()
    assert all(json.loads(line)["message"] == "x" * 9000 for line in found.splitlines())


def test_nobody_waits_for_a_reader_that_is_gone(pipe):
    reader, writer = pipe
    handler = logs.StandardErrorHandler("text", LogBook("run"), descriptor=writer)
    while select.select([], [writer], [], 0)[1]:
        os.write(writer, bytes(4096))
    # The fixture closes a number, so it stays one.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, reader)
    os.close(nothing)
    began = time.monotonic()
    for _ in range(1000):
        handler.emit(record("x"))
    assert time.monotonic() - began < 5
    assert handler.book.read(0).entries

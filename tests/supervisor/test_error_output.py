"""A worker's standard error: cut into texts, read from a pipe, written by real confined workers."""

import contextlib
import ctypes
import logging
import os
import pwd
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import confined_body
import pytest
from confined_body import run_confined
from hypothesis import given
from hypothesis import strategies as st

from ipc.logpipe import make_pipe
from supervisor import error_output
from supervisor.confinement import identities
from supervisor.confinement.landlock_rules import Reach
from supervisor.error_output import (
    BURST_BYTES,
    BYTES_PER_SECOND,
    LONGEST_SECONDS,
    MAX_ENTRY_BYTES,
    MAX_LINE,
    MAX_TOTAL_BYTES,
    QUIET_SECONDS,
    Bursts,
    ErrorOutputReceiver,
)
from supervisor.settings import User
from supervisor.spawn import DUMP_SIGNAL

DEADLINE_SECONDS = 20.0


class Gathered(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def texts(self) -> list[str]:
        return [record.getMessage() for record in self.records]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():  # polled: the receiver is a thread
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- pure --


def test_what_comes_in_one_go_is_one_text():
    bursts = Bursts(0.0)
    assert bursts.seconds_left(0.0) is None
    assert bursts.feed(b"Fatal Python error\n\n", 1.0) == []
    assert bursts.feed(b'  File "x.py"\n', 1.0 + QUIET_SECONDS / 2) == []
    assert bursts.due(1.0 + QUIET_SECONDS) == []
    assert bursts.due(1.0 + QUIET_SECONDS * 2) == ['Fatal Python error\n\n  File "x.py"']
    assert bursts.seconds_left(2.0) is None
    assert bursts.flush() == []


def test_what_drips_for_ever_becomes_texts():
    bursts, texts, now = Bursts(0.0), [], 0.0
    for _ in range(100):
        texts += bursts.feed(b".", now) + bursts.due(now)
        now += QUIET_SECONDS / 2
    assert len(texts) == pytest.approx(now / LONGEST_SECONDS, abs=1)
    assert "".join(texts + bursts.flush()) == "." * 100


def test_long_burst_is_parted_between_lines_and_long_lines_are_cut():
    bursts = Bursts(0.0)
    texts = bursts.feed(b"one line\n" * 10_000, 0.0) + bursts.flush()
    assert {line for text in texts for line in text.splitlines()} == {"one line"}
    assert sum(text.count("\n") + 1 for text in texts) == 10_000
    assert all(len(text) <= MAX_ENTRY_BYTES for text in texts)
    [line] = Bursts(0.0, b"x" * 5000).flush()
    assert len(line) == MAX_LINE
    assert line.endswith(" ...")


def test_flood_is_cut_and_counted():
    bursts, told, now, sent = Bursts(0.0), 0, 0.0, 0
    for _ in range(10_000):
        told += sum(len(text) + 1 for text in bursts.feed(b"x" * 99 + b"\n", now))
        sent += 100
        now += 0.001
    told += sum(len(text) + 1 for text in bursts.flush())
    assert told <= BURST_BYTES + BYTES_PER_SECOND * now
    assert told + bursts.cut_bytes == sent


def test_total_is_bounded():
    bursts, told, now = Bursts(0.0), 0, 0.0
    for _ in range(2000):
        told += sum(map(len, bursts.feed(b"x" * BYTES_PER_SECOND, now)))
        now += 1.0
    assert told <= MAX_TOTAL_BYTES


@given(st.lists(st.tuples(st.binary(max_size=200), st.floats(0, 0.3)), max_size=50))
def test_nothing_is_lost_or_made_up(pieces):
    bursts, texts, now = Bursts(0.0), [], 0.0
    for data, later in pieces:
        texts += bursts.due(now)
        texts += bursts.feed(data, now)
        now += later
    texts += bursts.flush()
    sent = b"".join(data for data, _ in pieces)
    if sent.isascii():
        assert "".join(texts).replace("\n", "") == sent.decode().replace("\n", "")


# -- the thread --


@contextlib.contextmanager
def receiving(handler: logging.Handler) -> Iterator[tuple[ErrorOutputReceiver, int]]:
    reader, writer = make_pipe()
    receiver = ErrorOutputReceiver(reader, "dns", handler, pid=4711)
    try:
        yield receiver, writer
    finally:
        with contextlib.suppress(OSError):
            os.close(writer)
        receiver.thread.join(DEADLINE_SECONDS)
        assert not receiver.thread.is_alive()


def test_text_becomes_a_record_of_the_worker():
    gathered = Gathered()
    with receiving(gathered) as (_, writer):
        os.write(writer, b"100 %s\nand more\xff\n")
        wait_for(lambda: gathered.records)
        os.write(writer, b"the last words")
    first, last = gathered.records
    assert first.getMessage() == "100 %s\nand more\ufffd"
    assert (first.levelno, first.worker, first.process) == (logging.ERROR, "dns", 4711)
    assert last.getMessage() == "the last words"


def test_what_is_taken_away_goes_on_elsewhere():
    gathered = Gathered()
    with receiving(gathered) as (receiver, writer):
        os.write(writer, b"first half, ")
        wait_for(lambda: receiver._bursts.unread or gathered.records)
        began = time.monotonic()
        descriptor, unread = receiver.detach()
        assert time.monotonic() - began < error_output._JOIN_SECONDS
        assert descriptor >= 0
        os.write(writer, b"second half")
        second = ErrorOutputReceiver(descriptor, "dns", gathered, buffered=unread)
        os.close(writer)
        second.thread.join(DEADLINE_SECONDS)
    assert "".join(gathered.texts) == "first half, second half"
    assert second.detach() == (-1, b"")
    ErrorOutputReceiver(-1, "dns", gathered).thread.join(DEADLINE_SECONDS)


def test_flood_is_told_and_leaves_the_supervisor_its_time(caplog):
    gathered = Gathered()
    with receiving(gathered) as (_, writer):
        stopping = threading.Event()

        def flood() -> None:
            os.set_blocking(writer, True)
            while not stopping.is_set():
                os.write(writer, b"x" * 1000)

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            wait_for(lambda: "writes too much" in caplog.text)
            before = time.process_time(), time.monotonic()
            time.sleep(0.5)
            spent, lasted = time.process_time() - before[0], time.monotonic() - before[1]
        finally:
            stopping.set()
            flooding.join()
    assert spent < 0.6 * lasted
    assert len("".join(gathered.texts)) < 2 * BURST_BYTES


# -- real workers --


@pytest.fixture
def chosen():
    owner = pwd.getpwnam("daemon")
    user = User(owner.pw_name, owner.pw_uid, owner.pw_gid, Path("/nonexistent"))
    return identities.choose(["tun", "proxy-0", "dns"], user)


def turn_for_ever_here() -> None:
    while True:
        pass


@pytest.mark.root
@pytest.mark.parametrize("slot", ["tun", "proxy-0", "dns"])
def test_worker_that_hangs_writes_its_stack_into_the_log(monkeypatch, chosen, slot):
    """Confined as in earnest; asked twice, so that it has gone on after the first time."""
    log = confined_body._Lines()
    monkeypatch.setattr(confined_body, "_Lines", lambda: log)
    stacks: list[str] = []

    def ask_or_kill(pid: int) -> None:
        found = [line for line in list(log.lines) if "turn_for_ever_here" in line]
        is_turning = confined_body.outcomes().get("begin") == "begun"
        if len(found) >= 2:
            os.kill(pid, signal.SIGKILL)
        elif is_turning and time.monotonic() - asked_at[-1] > 4 * QUIET_SECONDS:
            asked_at.append(time.monotonic())
            os.kill(pid, DUMP_SIGNAL)
        stacks[:] = found

    asked_at = [0.0]
    attempts = {"begin": lambda: "begun", "hang": turn_for_ever_here}
    ended = run_confined(
        monkeypatch, slot, chosen.of[slot], Reach(), attempts, meanwhile=ask_or_kill
    )
    assert ended.status == -signal.SIGKILL
    assert ended.report.seccomp
    assert len(stacks) >= 2
    # One record for the whole stack.
    assert all("most recent call first" in stack for stack in stacks)
    assert all("runtime.py" in stack for stack in stacks)


@pytest.mark.root
def test_crash_in_native_code_is_in_the_log(monkeypatch, chosen):
    """And nothing of it on the supervisor's own standard error."""
    attempts = {"crash": lambda: ctypes.string_at(1)}
    ended = run_confined(monkeypatch, "dns", chosen.of["dns"], Reach(), attempts)
    assert ended.status == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in ended.log
    assert "string_at" in ended.log


@pytest.mark.root
def test_standard_error_of_a_worker_is_a_pipe_of_its_own(monkeypatch, chosen, capfd):
    ours = os.fstat(2)

    def look() -> bool:
        found = os.fstat(2)
        os.write(2, b"a library complains\n")
        return (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino)

    ended = run_confined(monkeypatch, "tun", chosen.of["tun"], Reach(), {"look": look})
    assert ended.outcomes == {"look": "True"}
    assert "a library complains" in ended.log
    assert "a library complains" not in capfd.readouterr().err


@pytest.mark.root
def test_worker_that_floods_its_standard_error_does_not_wait(monkeypatch, chosen, caplog):
    def flood() -> str:
        for _ in range(100_000):
            with contextlib.suppress(BlockingIOError):
                os.write(2, b"x" * 1000)
        return "done"

    ended = run_confined(monkeypatch, "dns", chosen.of["dns"], Reach(), {"flood": flood})
    assert ended.outcomes == {"flood": "done"}
    assert "dns writes too much to its standard error" in caplog.text


@pytest.mark.root
def test_worker_that_says_the_same_again_and_again_is_cut_short(monkeypatch, chosen):
    def repeat() -> None:
        for number in range(300):
            logging.getLogger("workers.x").error("wrong: %d", number)

    ended = run_confined(monkeypatch, "tun", chosen.of["tun"], Reach(), {"repeat": repeat})
    assert ended.log.count("wrong: ") == 20

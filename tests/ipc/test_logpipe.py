"""Log records through real pipes, from real forked writers where it matters."""

import contextlib
import fcntl
import gc
import logging
import os
import pickle
import signal
import struct
import termios
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import logpipe
from ipc.logpipe import MAX_RECORD_BYTES, WorkerLogHandler, WorkerLogReceiver, make_pipe

DEADLINE_SECONDS = 20.0


class Gathered(logging.Handler):
    """Keeps the records it is given."""

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


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def gathered():
    return Gathered()


@pytest.fixture
def own_log():
    """What the supervisor itself says of the workers' logs."""
    handler, log = Gathered(), logging.getLogger(logpipe.__name__)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


@contextlib.contextmanager
def receiver(handler: logging.Handler, worker: str = "dns", pid: int = 0):
    """The write end of a worker's log whose records go to `handler`; joined at the end."""
    reader, writer = make_pipe()
    receiving = WorkerLogReceiver(reader, worker, handler, pid=pid)
    try:
        yield writer
    finally:
        with contextlib.suppress(OSError):
            os.close(writer)
        receiving.thread.join(DEADLINE_SECONDS)
        assert not receiving.thread.is_alive()


def record(text: object, *args: object, name: str = "workers.dns", level: int = 20):
    return logging.LogRecord(name, level, "file.py", 1, text, args, None)


def worker_logger(writer: int) -> logging.Logger:
    """A logger as a worker's root logger is set up, on a copy of the descriptor."""
    log = logging.Logger("workers.dns.service")  # noqa: LOG001  # one that nobody else has
    log.addHandler(WorkerLogHandler(writer))
    return log


def test_record_arrives_as_it_was_logged(gathered):
    with receiver(gathered, "proxy-3", 4711) as writer:
        before = time.time()
        about_it = {"connection": "caaaaaaab"}
        worker_logger(writer).warning("%d of %s: ü", 7, {"a": 1}, extra=about_it)
    [found] = gathered.records
    assert found.getMessage() == "7 of {'a': 1}: ü"
    assert found.name == "workers.dns.service"
    assert (found.levelno, found.levelname) == (logging.WARNING, "WARNING")
    assert before - 1 < found.created < time.time() + 1
    assert (found.worker, found.process, found.connection) == ("proxy-3", 4711, "caaaaaaab")
    assert not found.args
    assert found.exc_info is None


def test_stack_of_an_exception_travels_as_text(gathered):
    with receiver(gathered) as writer:
        try:
            {}["what was looked up"]
        except LookupError:
            worker_logger(writer).exception("it failed")
    [text] = gathered.texts
    assert text.startswith("it failed\nTraceback (most recent call last)")
    assert text.endswith("KeyError: 'what was looked up'")


def test_end_of_a_long_stack_arrives(gathered):
    def sink(depth: int) -> None:
        try:
            if depth:
                sink(depth - 1)
            {}["what was looked up"]
        except LookupError as error:
            raise LookupError(f"at {depth}: {'x' * 200}") from error

    with receiver(gathered) as writer:
        try:
            sink(20)
        except LookupError:
            worker_logger(writer).exception("it failed")
    [text] = gathered.texts
    assert text.startswith("it failed\nTraceback (most recent call last)")
    assert "\n ...\n" in text
    assert text.endswith("LookupError: at 20: " + "x" * 200)


@pytest.mark.parametrize("connection", ["two words", "A", "x" * 17, "a\n", None, 7.5])
def test_connection_of_another_form_is_left_out(gathered, connection):
    with receiver(gathered) as writer:
        worker_logger(writer).info("x", extra={"connection": connection})
        worker_logger(writer).info("y")
    assert [found.connection for found in gathered.records] in (["", ""], ["none", ""])


def test_worker_of_another_version_is_understood(gathered, own_log):
    """Fields are added at the end: fewer or more of them are no breach."""
    old, new = [1.0, 20, "n", "old"], [1.0, 20, "n", "new", "cab", {"more": 1}]
    with receiver(gathered) as writer:
        for fields in (old, new):
            body = logpipe.msgspec.msgpack.encode(fields)
            os.write(writer, struct.pack(">H", len(body)) + body)
    assert gathered.texts == ["old", "new"]
    assert not own_log.records


def test_log_that_is_taken_away_goes_on_elsewhere(gathered):
    """As in an upgrade in place: nothing is lost between the two receivers, not even half a record."""
    reader, writer = make_pipe()
    data = logpipe.encode(record("a line"))
    first = WorkerLogReceiver(reader, "dns", gathered)
    for _ in range(3):
        os.write(writer, data)
    os.write(writer, data[:7])
    wait_for(lambda: len(gathered.records) == 3 and waiting_bytes(reader) == 0)
    began = time.monotonic()
    descriptor, unread = first.detach()
    assert time.monotonic() - began < logpipe._JOIN_SECONDS
    assert not first.thread.is_alive()
    assert (descriptor, unread) == (reader, data[:7])
    os.write(writer, data[7:] + data)
    second = WorkerLogReceiver(descriptor, "dns", gathered, buffered=unread)
    os.close(writer)
    second.thread.join(DEADLINE_SECONDS)
    assert gathered.texts == ["a line"] * 5
    assert second.detach() == (-1, b"")
    third = WorkerLogReceiver(-1, "dns", gathered, buffered=data)
    third.thread.join(DEADLINE_SECONDS)
    assert len(gathered.records) == 6
    assert not third.breach


def test_flooded_log_is_taken_away_at_once(gathered):
    reader, writer = make_pipe()
    receiving = WorkerLogReceiver(reader, "dns", gathered)
    with flooding_child(writer):
        wait_for(lambda: len(gathered.records) >= 2000)
        began = time.monotonic()
        descriptor, _ = receiving.detach()
        assert time.monotonic() - began < logpipe._JOIN_SECONDS
    assert not receiving.thread.is_alive()
    os.close(descriptor)
    os.close(writer)


def test_message_that_cannot_be_formatted_does_no_harm(gathered, capsys):
    with receiver(gathered) as writer:
        log = worker_logger(writer)
        log.info("%d", "no number")
        log.info("and on")
    assert gathered.texts == ["and on"]
    assert "TypeError" in capsys.readouterr().err


@pytest.mark.parametrize("filler", ["x", "ü", "\U0001f600", "\udcff"])
@pytest.mark.parametrize("name", ["n", "\U0001f600" * 300])
def test_long_text_is_cut_and_says_so(gathered, filler, name):
    with receiver(gathered) as writer:
        handler = WorkerLogHandler(writer)
        handler.emit(record(filler * 10_000, name=name))
        handler.emit(record("next"))
    long, following = gathered.texts
    assert long.endswith(" ...")
    assert 3000 < len(long.encode()) < MAX_RECORD_BYTES
    assert following == "next"


@given(st.text(), st.text(), st.integers(-(2**70), 2**70))
def test_every_record_fits_one_untorn_write_and_survives(text, name, level):
    about_it = record(text, name=name, level=level)
    about_it.connection = "c" * 16
    data = logpipe.encode(about_it)
    assert len(data) <= MAX_RECORD_BYTES
    found = logpipe.decode(data[2:])
    shown = text.encode(errors="replace").decode()
    assert found.getMessage() == shown or found.getMessage().endswith(" ...")
    assert 0 <= found.levelno <= 50


@given(st.binary(max_size=300))
def test_decoder_raises_only_its_own_errors(data):
    with contextlib.suppress(logpipe.msgspec.MsgspecError, UnicodeDecodeError):
        logpipe.decode(data)


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def as_multiprocessing_sends_it(thing: object) -> bytes:
    data = pickle.dumps(thing)
    return struct.pack("!i", len(data)) + data


@pytest.mark.parametrize("framing", ["pickle", "queue", "record"])
def test_hostile_pickle_runs_nothing_and_ends_only_that_log(tmp_path, gathered, own_log, framing):
    exploit = Exploit(tmp_path / "owned")
    data = {
        "pickle": pickle.dumps(exploit),
        "queue": as_multiprocessing_sends_it(exploit),
        "record": struct.pack(">H", len(pickle.dumps(exploit))) + pickle.dumps(exploit),
    }[framing]
    with receiver(gathered, "dns") as hostile, receiver(gathered, "tun") as honest:
        os.write(hostile, logpipe.encode(record("before")))
        os.write(hostile, data.ljust(5000, b"\xc1") + logpipe.encode(record("after")))
        wait_for(lambda: own_log.texts)
        worker_logger(honest).info("and the others go on")
        wait_for(lambda: len(gathered.texts) == 2)
    assert not (tmp_path / "owned").exists()
    assert gathered.texts == ["before", "and the others go on"]
    [text] = own_log.texts
    assert text.startswith("dns writes what is no log record")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x94\xcb" + struct.pack(">d", 1e300) + b"\x14\xa1n\xa1t",  # a time after all calendars
        b"\x94\xcb" + struct.pack(">d", float("inf")) + b"\x14\xa1n\xa1t",
        b"\x94\xcb" + struct.pack(">d", float("nan")) + b"\x14\xa1n\xa1t",
        b"\x94\x01\xcc\xff\xa1n\xa1t",  # a level of 255
        b"\x94\x01\x14\xa1n\xa2\xff\xff",  # no UTF-8
        b"\x96\x01\x14\xa1n\xa1t\xa0" + b"\x91" * 3000,  # arrays in arrays
    ],
)
def test_malformed_record_ends_the_log(gathered, own_log, body):
    with receiver(gathered) as writer:
        os.write(writer, struct.pack(">H", len(body)) + body + logpipe.encode(record("after")))
        wait_for(lambda: own_log.texts)
    assert not gathered.records


def test_half_a_record_waits_for_its_rest_and_is_dropped_at_the_end(gathered, own_log):
    data = logpipe.encode(record("whole"))
    with receiver(gathered) as writer:
        for byte in data:
            os.write(writer, bytes([byte]))
        wait_for(lambda: gathered.records)
        os.write(writer, data[:-1])
    assert gathered.texts == ["whole"]
    assert not own_log.records


def test_full_pipe_never_blocks_the_worker_and_the_gap_is_told(gathered):
    reader, writer = make_pipe()  # nobody reads yet
    log = worker_logger(writer)
    for number in range(2000):  # a few hundred fit
        log.info("line %d %s", number, "x" * 3000)
    receiving = WorkerLogReceiver(reader, "dns", gathered)
    wait_for(lambda: waiting_bytes(reader) == 0)
    log.info("again")
    os.close(writer)
    receiving.thread.join(DEADLINE_SECONDS)
    lost = sum(int(text.split()[0]) for text in gathered.texts if "were lost" in text)
    told = [text for text in gathered.texts if text.startswith("line")]
    assert lost > 1000
    assert lost + len(told) == 2000
    assert gathered.texts[-1] == "again"


def waiting_bytes(descriptor: int) -> int:
    (waiting,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
    return waiting


def test_worker_without_a_reader_goes_on(capsys):
    reader, writer = make_pipe()
    os.close(reader)
    log = worker_logger(writer)
    log.info("nobody hears this")
    os.close(writer)
    assert capsys.readouterr().err == ""


def test_flood_is_cut_and_counted(gathered, own_log):
    total = 30_000
    data = logpipe.encode(record("flood"))
    with receiver(gathered) as writer:
        os.set_blocking(writer, True)
        for _ in range(total):
            os.write(writer, data)
    shown = len(gathered.records)
    assert 2000 <= shown < 10_000
    cut = sum(int(text.split()[4]) for text in own_log.texts)
    assert shown + cut == total
    assert len(own_log.texts) < 10  # and not once for each line


def test_flood_leaves_the_supervisor_its_time(gathered):
    """A supervisor beside a worker that writes as fast as it can still gets its work done."""
    with receiver(gathered) as writer, flooding_child(writer):
        wait_for(lambda: len(gathered.records) >= 2000)
        before = time.thread_time(), time.process_time(), time.monotonic()
        time.sleep(0.5)
        spent, lasted = time.process_time() - before[1], time.monotonic() - before[2]
    assert spent < 0.6 * lasted


@contextlib.contextmanager
def flooding_child(writer: int):
    pid = fork(lambda: flood(writer))
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def flood(writer: int) -> None:
    data = logpipe.encode(record("flood"))
    os.set_blocking(writer, True)
    while True:
        os.write(writer, data)


def fork(work: Callable[[], None]) -> int:
    """A child that does `work` and nothing of pytest's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # receivers are threads
        pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_killed_writers_silence_nobody(gathered):
    """25 workers are killed while they write; two others go on and are heard to the end."""
    with receiver(gathered, "tun") as tun, receiver(gathered, "proxy-0") as proxy:
        logs = {"tun": worker_logger(tun), "proxy-0": worker_logger(proxy)}
        for number in range(25):
            doomed = Gathered()
            with receiver(doomed, "dns") as writer, flooding_child(writer):
                wait_for(lambda heard=doomed.records: heard)
            assert set(doomed.texts) == {"flood"}
            for log in logs.values():
                log.info("still here after %d", number)
        wait_for(lambda: len(gathered.records) == 50)
    for worker in logs:
        heard = [found.getMessage() for found in gathered.records if found.worker == worker]
        assert heard == [f"still here after {number}" for number in range(25)]


def test_fifty_worker_starts_leave_no_thread_and_no_descriptor(gathered):
    def start_and_end() -> None:
        with receiver(gathered) as writer:
            pid = fork(lambda: worker_logger(writer).info("hello"))
            os.waitpid(pid, 0)

    start_and_end()  # what is opened once for all
    descriptors, threads = open_descriptors(), threading.active_count()
    handlers = len(logging._handlerList)
    for _ in range(50):
        start_and_end()
    assert open_descriptors() <= descriptors
    assert threading.active_count() <= threads  # one of a test before may have ended
    gc.collect()
    assert len(logging._handlerList) <= handlers
    assert len(gathered.records) == 51


def test_pipe_is_closed_on_exec():
    ends = make_pipe()
    for end in ends:
        assert not os.get_inheritable(end)
        os.close(end)


def test_worker_keeps_no_thread_of_its_log_handler():
    reader, writer = make_pipe()
    before = threading.active_count()
    WorkerLogHandler(writer)
    assert threading.active_count() <= before
    os.close(reader)
    os.close(writer)

import contextlib
import errno
import json
import os
import resource
import selectors
import socket
import threading
import time
from pathlib import Path

import msgspec
import pytest

from supervisor import control, control_messages
from supervisor.cli.control_client import AskError, ask, order
from supervisor.control import (
    CLIENT_SECONDS,
    MAX_CLIENTS,
    PAUSE_SECONDS,
    ControlSocket,
    Promise,
)
from supervisor.exits import ExitStatus

DEADLINE_SECONDS = 10.0


class Bed:
    """A control socket that is served by the test's own turns."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "control.sock"
        self.selector = selectors.DefaultSelector()
        self.asked: list[tuple[int, bytes]] = []
        self.reply: bytes | Promise = b'{"status":0,"text":"done"}\n'
        self.control = ControlSocket(self.path, self.selector, self._answer)

    def _answer(self, uid: int, line: bytes) -> bytes | Promise:
        self.asked.append((uid, line))
        return self.reply

    def turn(self, seconds: float = 0.0) -> int:
        ready = self.selector.select(seconds)
        for key, events in ready:
            key.data(events)
        return len(ready)

    def settle(self) -> None:
        for _ in range(10_000):
            if not self.turn():
                return
        raise AssertionError("the selector never comes to rest")

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(DEADLINE_SECONDS)
        client.connect(str(self.path))
        return client

    @property
    def clients(self) -> int:
        return len(self.selector.get_map()) - 1  # the listener


@pytest.mark.parametrize(
    "line", [b'{"command":"\xff"}', b'{"command":"stop","x":' + b"[" * 4000, b"\xff", b"[]"]
)
def test_a_line_that_cannot_be_read_is_no_request(line):
    with pytest.raises(msgspec.MsgspecError):
        control_messages.decode(line)


@pytest.fixture
def bed(tmp_path):
    made = Bed(tmp_path)
    yield made
    made.control.close()
    assert not made.selector.get_map()
    made.selector.close()
    assert not made.path.exists()


@contextlib.contextmanager
def served(bed: Bed):
    """Turns in a thread, for clients that block."""
    is_over = threading.Event()

    def serve() -> None:
        while not is_over.is_set():
            bed.turn(0.01)
            bed.control.drop_silent(time.monotonic())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def everything(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def test_one_request_one_answer_then_the_end(bed):
    with bed.connect() as client:
        client.sendall(b"first\nsecond\n")
        bed.settle()
        assert everything(client) == bed.reply
    assert [line for _, line in bed.asked] == [b"first"]
    assert bed.clients == 0


def test_request_may_come_in_pieces(bed):
    with bed.connect() as client:
        for piece in (b"fi", b"rst", b"\n"):
            bed.settle()
            client.sendall(piece)
        bed.settle()
        assert everything(client) == bed.reply


def test_asker_is_who_the_kernel_says(bed, monkeypatch):
    for uid in (0, 4711):
        monkeypatch.setattr(control, "peer_uid", lambda _end, uid=uid: uid)
        with bed.connect() as client:
            client.sendall(b"x\n")
            bed.settle()
    monkeypatch.undo()
    with bed.connect() as client:
        client.sendall(b"x\n")
        bed.settle()
    assert [uid for uid, _ in bed.asked] == [0, 4711, os.getuid()]


@pytest.mark.parametrize("text", [b"", b"half a request", b"\0" * 100])
def test_client_that_leaves_early_is_forgotten(bed, text):
    with bed.connect() as client:
        client.sendall(text)
        bed.settle()
    bed.settle()
    assert bed.clients == 0
    assert not bed.asked


def test_request_without_an_end_is_cut_off(bed):
    with bed.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(b"x" * (4 * control_messages.MAX_REQUEST_BYTES))
        bed.settle()
        with contextlib.suppress(ConnectionError):
            assert everything(client) == b""
    assert bed.clients == 0
    assert not bed.asked


def test_client_that_does_not_read_gets_its_answer_when_it_does(bed):
    bed.reply = b"x" * 4_000_000 + b"\n"
    with bed.connect() as slow, bed.connect() as quick:
        slow.sendall(b"a\n")
        bed.settle()
        quick.sendall(b"b\n")
        bed.settle()
        assert len(bed.asked) == 2  # the slow one holds up nobody
        got = bytearray()
        while not got.endswith(b"\n"):
            got += slow.recv(1 << 20)
            bed.settle()
    assert bytes(got) == bed.reply
    bed.settle()


def test_client_that_neither_asks_nor_reads_is_sent_away(bed):
    bed.reply = b"x" * 4_000_000 + b"\n"
    with bed.connect() as silent, bed.connect() as deaf:
        deaf.sendall(b"x\n")
        bed.settle()
        now = time.monotonic()
        bed.control.drop_silent(now)
        bed.control.drop_silent(now + CLIENT_SECONDS)
        assert bed.clients == 2
        bed.control.drop_silent(now + CLIENT_SECONDS + 0.1)
        assert bed.clients == 0
        assert everything(silent) == b""


def test_promised_answer_comes_when_it_is_given(bed):
    bed.reply = promise = Promise(60.0)
    with bed.connect() as waiting, bed.connect() as other:
        waiting.sendall(b"a\n")
        bed.settle()
        bed.reply = b"at once\n"
        other.sendall(b"b\n")
        bed.settle()
        assert everything(other) == b"at once\n"
        # Longer than others may be silent.
        bed.control.drop_silent(time.monotonic() + 2 * CLIENT_SECONDS)
        assert bed.clients == 1
        promise.give(b"late\n")
        assert everything(waiting) == b"late\n"
    bed.settle()
    assert bed.clients == 0
    promise.give(b"twice\n")


def test_promise_has_an_end(bed):
    bed.reply = promise = Promise(60.0)
    with bed.connect() as waiting:
        waiting.sendall(b"a\n")
        bed.settle()
        bed.control.drop_silent(time.monotonic() + 59)
        assert bed.clients == 1
        bed.control.drop_silent(time.monotonic() + 61)
        assert everything(waiting) == b""
    promise.give(b"late\n")


def test_client_that_does_not_wait_for_the_promise_is_forgotten(bed):
    bed.reply = promise = Promise(60.0)
    with bed.connect() as waiting:
        waiting.sendall(b"a\nmore\n")
        bed.settle()
    bed.settle()
    assert bed.clients == 0
    promise.give(b"late\n")
    assert len(bed.asked) == 1


def test_another_program_goes_on_listening(bed):
    with bed.connect() as early:
        early.sendall(b"a\n")
        listener = socket.socket(fileno=socket.dup(bed.control.fileno()))
        listener.setblocking(False)
        bed.selector.unregister(bed.control._listener)
        bed.control._listener.close()
        bed.control = ControlSocket(bed.path, bed.selector, bed._answer, listener)
        bed.settle()
        assert everything(early) == bed.reply
    assert bed.path.exists()


def test_whoever_holds_connections_keeps_nobody_out(bed):
    with contextlib.ExitStack() as held:
        holders = [held.enter_context(bed.connect()) for _ in range(3)]
        for _ in range(2 * MAX_CLIENTS):
            holders.append(held.enter_context(bed.connect()))
            bed.settle()
        assert bed.clients == MAX_CLIENTS
        with bed.connect() as honest:
            honest.sendall(b"status\n")
            bed.settle()
            assert everything(honest) == bed.reply
        assert everything(holders[0]) == b""  # the oldest made room


def test_without_a_descriptor_left_nobody_is_let_in_and_the_loop_rests(bed):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with bed.connect() as waiting:
        waiting.sendall(b"status\n")
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            bed.settle()
            bed.control.drop_silent(time.monotonic())
            assert not bed.turn()
            bed.control.drop_silent(time.monotonic() + PAUSE_SECONDS)
            bed.settle()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not bed.asked
        bed.control.drop_silent(time.monotonic() + PAUSE_SECONDS)
        bed.settle()
        assert everything(waiting) == bed.reply


def test_end_in_a_pause_of_listening(tmp_path, monkeypatch):
    bed = Bed(tmp_path)

    def no_room(_listener: socket.socket) -> None:
        raise OSError(errno.EMFILE, "too many")

    with bed.connect():
        monkeypatch.setattr(socket.socket, "accept", no_room)
        bed.settle()
    bed.control.close()
    assert not bed.selector.get_map()
    bed.selector.close()


def test_asker_who_is_not_known_is_sent_away(bed, monkeypatch):
    def gone(_end: socket.socket) -> int:
        raise OSError(errno.ENOTCONN, "gone")

    monkeypatch.setattr(control, "peer_uid", gone)
    with bed.connect() as client:
        bed.settle()
        assert everything(client) == b""
    assert bed.clients == 0


def test_thousand_requests_are_answered(bed):
    with served(bed):
        for _ in range(1000):
            assert ask(bed.path.parent, control_messages.Status()) == bed.reply
    assert len(bed.asked) == 1000


def test_socket_of_a_dead_run_is_replaced(tmp_path):
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(tmp_path / "control.sock"))
    dead.close()
    bed = Bed(tmp_path)
    with served(bed):
        assert order(tmp_path, control_messages.Stop()).text == "done"
    bed.control.close()


def test_anyone_may_connect(bed):
    assert bed.path.stat().st_mode & 0o777 == 0o777


# -- the asking side --


def failure(action) -> AskError:
    with pytest.raises(AskError) as caught:
        action()
    return caught.value


def test_vnet_that_does_not_run_is_said_not_to(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        error = failure(lambda path=path: ask(path, control_messages.Status()))
        assert error.status is ExitStatus.NOT_RUNNING
        assert str(path) in str(error)
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(tmp_path / "control.sock"))
    dead.close()
    error = failure(lambda: ask(tmp_path, control_messages.Status()))
    assert error.status is ExitStatus.NOT_RUNNING


def test_vnet_that_hangs_is_an_internal_error_after_two_seconds(bed):
    before = time.monotonic()
    error = failure(lambda: ask(bed.path.parent, control_messages.Status()))
    assert error.status is ExitStatus.INTERNAL
    assert 1.9 < time.monotonic() - before < 6


@pytest.mark.parametrize("reply", [b"nonsense\n", b"{}\n", b"no line feed"])
def test_answer_that_is_none_is_an_internal_error(bed, reply):
    bed.reply = reply
    with served(bed):
        error = failure(lambda: order(bed.path.parent, control_messages.Stop()))
    assert error.status is ExitStatus.INTERNAL


def test_refusal_becomes_its_exit_status(bed):
    bed.reply = json.dumps({"status": 4, "text": "only root may"}).encode() + b"\n"
    with served(bed):
        error = failure(lambda: order(bed.path.parent, control_messages.Stop()))
    assert (error.status, str(error)) == (ExitStatus.NOT_PERMITTED, "only root may")

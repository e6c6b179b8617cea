import gc
import os
import socket
from pathlib import Path

import pytest

from ipc import codec
from ipc import messages as m
from ipc.channel import MAX_DESCRIPTORS, Channel, make_pair
from ipc.errors import BusyError, ForbiddenMessageError, MalformedMessageError, PeerGoneError
from ipc.permits import Role

OPENED = m.ListenerOpened(address=b"\x64\x40\3\4", port=443)


def open_descriptors() -> set[str]:
    gc.collect()
    return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.exists()}


@pytest.fixture
def raw_ends():
    """(supervisor's end, worker's end) as plain sockets."""
    before = open_descriptors()
    ends = make_pair()
    yield ends
    for end in ends:
        end.close()
    assert open_descriptors() <= before  # one of a test before may be closed meanwhile


@pytest.fixture
def supervisor(raw_ends):
    return Channel(raw_ends[0], Role.SUPERVISOR, Role.PROXY, takes_descriptors=False)


@pytest.fixture
def worker(raw_ends):
    return Channel(raw_ends[1], Role.PROXY, Role.SUPERVISOR, takes_descriptors=True)


def test_messages_go_both_ways_in_order(supervisor, worker):
    for level in ("INFO", "DEBUG"):
        supervisor.send(m.SetLogLevel(level=level))
    assert worker.receive() == (m.SetLogLevel(level="INFO"), [])
    assert worker.receive() == (m.SetLogLevel(level="DEBUG"), [])
    assert worker.receive() is None
    worker.send(m.Ready())
    assert supervisor.receive() == (m.Ready(), [])
    assert supervisor.receive() is None


def test_both_ends_are_closed_on_exec_and_never_block(raw_ends):
    for end in raw_ends:
        assert not end.get_inheritable()
        assert not end.getblocking()


def test_descriptors_arrive_with_their_message_and_are_closed_on_exec(supervisor, worker):
    reader, writer = os.pipe()
    supervisor.send(OPENED, [reader, writer])
    supervisor.send(m.SetLogLevel(level="INFO"))
    os.close(reader)
    os.close(writer)
    message, (got_reader, got_writer) = worker.receive()
    try:
        assert message == OPENED
        os.write(got_writer, b"through")
        assert os.read(got_reader, 100) == b"through"
        assert not os.get_inheritable(got_reader)
        assert not os.get_inheritable(got_writer)
        assert worker.receive() == (m.SetLogLevel(level="INFO"), [])
    finally:
        os.close(got_reader)
        os.close(got_writer)


def test_so_many_descriptors_arrive_and_no_more(raw_ends, supervisor, worker):
    with Path(os.devnull).open("rb") as null:
        supervisor.send(OPENED, [null.fileno()] * MAX_DESCRIPTORS)
        socket.send_fds(
            raw_ends[0], [codec.encode(OPENED)], [null.fileno()] * (MAX_DESCRIPTORS + 3)
        )
    for _ in range(2):
        _, descriptors = worker.receive()
        assert len(descriptors) == MAX_DESCRIPTORS
        for descriptor in descriptors:
            os.close(descriptor)


def test_descriptors_that_a_worker_sends_are_closed_unseen_and_forbidden(raw_ends, supervisor):
    with Path(os.devnull).open("rb") as null:
        before = open_descriptors()
        for _ in range(50):
            socket.send_fds(raw_ends[1], [codec.encode(m.Ready())], [null.fileno()] * 100)
            with pytest.raises(ForbiddenMessageError, match="may not send descriptors"):
                supervisor.receive()
        assert open_descriptors() <= before


def test_descriptors_of_a_malformed_message_are_closed(raw_ends, worker):
    with Path(os.devnull).open("rb") as null:
        before = open_descriptors()
        socket.send_fds(raw_ends[0], [b"\xc1"], [null.fileno()] * 3)
        with pytest.raises(MalformedMessageError):
            worker.receive()
        assert open_descriptors() <= before


def test_end_of_file_means_that_the_other_is_gone(raw_ends, supervisor, worker):
    worker.send(m.Ready())
    raw_ends[1].close()
    assert supervisor.receive() == (m.Ready(), [])  # what it said before still counts
    with pytest.raises(PeerGoneError):
        supervisor.receive()
    with pytest.raises(PeerGoneError):
        supervisor.send(m.Stop(grace_seconds=1))


def test_an_empty_datagram_is_an_end(raw_ends, supervisor):
    raw_ends[1].send(b"")
    with pytest.raises(PeerGoneError):
        supervisor.receive()


def test_other_end_that_does_not_read_is_busy_and_takes_the_rest_later(supervisor, worker):
    sent = 0

    def send_one_after_another() -> None:
        nonlocal sent
        for _ in range(100_000):
            supervisor.send(m.ListenerRefused(address=b"\x64\x40\3\4", port=1, reason="r" * 500))
            sent += 1

    with pytest.raises(BusyError):
        send_one_after_another()
    assert sent > 10
    while worker.receive() is not None:
        sent -= 1
    assert sent == 0
    supervisor.send(m.Stop(grace_seconds=1))
    assert worker.receive() == (m.Stop(grace_seconds=1), [])


def test_message_of_the_largest_size_passes(supervisor, worker):
    level = "x" * (codec.MAX_MESSAGE_BYTES - len(codec.encode(m.SetLogLevel(level="x" * 70_000))))
    message = m.SetLogLevel(level=level + "x" * 70_000)
    supervisor.send(message)
    assert worker.receive() == (message, [])


def test_larger_datagram_is_malformed_and_not_its_beginning(raw_ends, supervisor):
    # A message that would be whole if the rest were cut off.
    raw_ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    big = codec.encode(m.Ready()).ljust(codec.MAX_MESSAGE_BYTES + 1, b"\0")
    raw_ends[1].send(big)
    with pytest.raises(MalformedMessageError, match="more than a message may have"):
        supervisor.receive()


def test_too_large_message_is_not_sent(supervisor, worker):
    with pytest.raises(MalformedMessageError):
        supervisor.send(m.SetLogLevel(level="x" * codec.MAX_MESSAGE_BYTES))
    assert worker.receive() is None


def test_worker_may_not_give_orders(raw_ends, supervisor):
    raw_ends[1].send(codec.encode(m.Stop(grace_seconds=0)))
    with pytest.raises(ForbiddenMessageError, match="Stop"):
        supervisor.receive()

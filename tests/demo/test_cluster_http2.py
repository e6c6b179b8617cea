"""The embedded proxy's HTTP/2 and gRPC against h2, the library, and against clients that misbehave."""

import asyncio
import contextlib
import os
import socket
import struct

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack
import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from hypothesis import given
from hypothesis import strategies as st

from demo.cluster.errors import Http2Error
from demo.cluster.grpc_calls import MAX_MESSAGE_BYTES, GrpcConnection
from demo.cluster.http2 import (
    MAX_FRAME_BYTES,
    MAX_STREAMS,
    PREFACE,
    STREAM_WINDOW,
    Ended,
    Http2Connection,
    Opened,
    Received,
    Reset,
)
from demo.cluster.streams import TcpStream, abort

HEADERS = [
    (":method", "POST"),
    (":scheme", "https"),
    (":path", "/service/Echo"),
    (":authority", "proxy"),
    ("content-type", "application/grpc"),
]


def frame(kind, flags, stream, payload=b""):
    length = len(payload)
    return struct.pack(">HBBBI", length >> 8, length & 255, kind, flags, stream) + payload


def block(headers=HEADERS):
    return hpack.Encoder().encode(headers)


def begun():
    connection = Http2Connection()
    assert connection.receive(PREFACE + frame(4, 0, 0)) != []
    connection.take()
    return connection


# --- The connection -------------------------------------------------------------------------


def test_bytes_may_come_one_by_one():
    whole = PREFACE + frame(4, 0, 0) + frame(1, 4, 1, block()) + frame(0, 1, 1, b"data")
    connection = Http2Connection()
    events = [event for byte in whole for event in connection.receive(bytes([byte]))]
    assert events[1:] == [Opened(1, tuple(HEADERS)), Received(1, b"data", 4), Ended(1)]


def test_headers_may_be_cut_and_padded():
    connection = begun()
    content = block()
    padded = bytes([3]) + bytes(5) + content[:4] + bytes(3)
    events = connection.receive(
        frame(1, 8 | 32, 1, padded) + frame(9, 0, 1, content[4:6]) + frame(9, 4, 1, content[6:])
    )
    assert events == [Opened(1, tuple(HEADERS))]
    events = connection.receive(frame(0, 8 | 1, 1, b"\2abc\0\0"))
    assert events == [Received(1, b"abc", 6), Ended(1)]


def test_unknown_frames_and_those_of_ended_streams_mean_nothing():
    connection = begun()
    connection.receive(frame(1, 4, 1, block()))
    connection.send_headers(1, [(":status", "200")], ends=True)
    assert connection.receive(frame(77, 0, 0, b"x") + frame(0, 0, 1, b"late")) == []
    assert connection.receive(frame(3, 0, 1, bytes(4)) + frame(8, 0, 1, b"\0\0\0\1")) == []


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        PREFACE + frame(0, 0, 0, b"x"),
        PREFACE + frame(0, 0, 1, b"x"),
        PREFACE + frame(1, 4, 2, block()),
        PREFACE + frame(1, 4, 1, b"\xff" * 10),
        PREFACE + frame(1, 0, 1, block()) + frame(6, 0, 0, bytes(8)),
        PREFACE + frame(9, 4, 1, block()),
        PREFACE + frame(1, 0, 1, bytes(60_000)) + frame(9, 0, 1, bytes(60_000)),
        PREFACE + frame(1, 4 | 8, 1, b"\xff"),
        PREFACE + frame(1, 5, 1, block()) + frame(0, 0, 1, b"x"),
        PREFACE + frame(1, 4, 1, block()) + frame(1, 4, 1, block()),
        PREFACE + frame(6, 0, 0, b"x"),
        PREFACE + frame(4, 0, 0, b"x"),
        PREFACE + frame(4, 0, 0, struct.pack(">HI", 4, 1 << 31)),
        PREFACE + frame(8, 0, 0, bytes(4)),
        PREFACE + frame(8, 0, 0, b"x"),
        PREFACE + frame(8, 0, 0, b"\x7f\xff\xff\xff"),
        PREFACE + struct.pack(">HBBBI", (MAX_FRAME_BYTES + 1) >> 8, 1, 0, 0, 1),
        PREFACE + frame(6, 0, 0, bytes(8)) * 5000,
        PREFACE
        + frame(1, 4, 1, block())
        + frame(0, 0, 1, bytes(MAX_FRAME_BYTES)) * (STREAM_WINDOW // MAX_FRAME_BYTES + 1),
    ],
)
def test_client_that_breaks_the_protocol_is_an_error(data):
    with pytest.raises(Http2Error):
        Http2Connection().receive(data)


@given(st.lists(st.binary(max_size=60), max_size=20), st.booleans())
def test_any_bytes_are_taken_or_an_error(pieces, has_preface):
    connection = Http2Connection()
    with contextlib.suppress(Http2Error):
        connection.receive(PREFACE if has_preface else b"")
        for piece in pieces:
            connection.receive(piece)


@given(
    st.lists(
        st.builds(
            frame,
            st.integers(0, 10),
            st.integers(0, 255),
            st.integers(0, 5),
            st.one_of(st.binary(max_size=20), st.just(block())),
        ),
        max_size=20,
    )
)
def test_any_frames_are_taken_or_an_error(frames):
    connection = Http2Connection()
    with contextlib.suppress(Http2Error):
        connection.receive(PREFACE)
        for one in frames:
            for event in connection.receive(one):
                if isinstance(event, Opened):
                    connection.send_headers(event.stream, [(":status", "200")], ends=False)
                elif isinstance(event, Received):
                    connection.credit(event.stream, event.size)
                    connection.send_data(event.stream, b"x"[: connection.sendable(event.stream)])


def test_too_many_streams_are_refused_one_by_one():
    connection = begun()
    opened = [
        event
        for number in range(MAX_STREAMS + 1)
        for event in connection.receive(frame(1, 4, 2 * number + 1, block()))
    ]
    assert len(opened) == MAX_STREAMS
    assert connection.take() == frame(3, 0, 2 * MAX_STREAMS + 1, struct.pack(">I", 7))


def test_data_waits_for_both_windows():
    connection = begun()
    connection.receive(frame(1, 4, 1, block()))
    assert connection.sendable(1) == 65_535
    connection.send_data(1, bytes(65_535))
    assert connection.sendable(1) == 0
    connection.receive(frame(8, 0, 1, struct.pack(">I", 10)))
    assert connection.sendable(1) == 0
    connection.receive(frame(8, 0, 0, struct.pack(">I", 7)))
    assert connection.sendable(1) == 7
    # Settings change the windows of streams that are open, below zero even (section 6.9.2).
    connection.receive(frame(4, 0, 0, struct.pack(">HI", 4, 0)))
    assert connection.sendable(1) == 0


def test_frames_are_as_large_as_the_client_takes():
    connection = begun()
    connection.receive(frame(4, 0, 0, struct.pack(">HIHI", 4, 1 << 20, 5, 40_000)))
    connection.receive(frame(8, 0, 0, struct.pack(">I", 1 << 20)) + frame(1, 4, 1, block()))
    connection.take()
    connection.send_data(1, bytes(100_000))
    sent = connection.take()
    sizes = []
    while sent:
        size = int.from_bytes(sent[:3], "big")
        sizes.append(size)
        sent = sent[9 + size :]
    assert sizes == [40_000, 40_000, 20_000]


def test_client_that_gave_a_stream_up_is_told_of():
    connection = begun()
    connection.receive(frame(1, 4, 1, block()))
    assert connection.receive(frame(3, 0, 1, bytes(4))) == [Reset(1)]
    assert connection.sendable(1) == 0
    assert not connection.is_open(1)


# --- Calls ----------------------------------------------------------------------------------


class Peer:
    """h2 as a gRPC client, over a socket pair."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.h2.initiate_connection()
        self.data = {}
        self.headers = {}
        self.resets = {}
        self.has_ended = set()
        self.takes = True

    def call(self, path="/service/Echo"):
        number = self.h2.get_next_available_stream_id()
        headers = [(name, path if name == ":path" else value) for name, value in HEADERS]
        self.h2.send_headers(number, headers)
        self.data[number] = b""
        return number

    async def send(self, number, data, *, end=False):
        """A message, or bytes as they are; waits for room."""
        while data:
            room = min(self.h2.local_flow_control_window(number), self.h2.max_outbound_frame_size)
            if not room:
                await self.receive()
                continue
            self.h2.send_data(number, data[:room])
            data = data[room:]
        if end:
            self.h2.end_stream(number)
        await self.flush()

    async def flush(self):
        self.writer.write(self.h2.data_to_send())
        await self.writer.drain()

    async def receive(self):
        await self.flush()
        received = await asyncio.wait_for(self.reader.read(65_536), 20)
        for event in self.h2.receive_data(received):
            match event:
                case h2.events.DataReceived():
                    self.data[event.stream_id] += event.data
                    if self.takes:
                        size = event.flow_controlled_length
                        self.h2.acknowledge_received_data(size, event.stream_id)
                case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    found = self.headers.setdefault(event.stream_id, {})
                    found |= {name.decode(): value.decode() for name, value in event.headers}
                case h2.events.StreamEnded():
                    self.has_ended.add(event.stream_id)
                case h2.events.StreamReset():
                    self.resets[event.stream_id] = event.error_code
        await self.flush()
        return received

    async def end(self, number):
        """Waits for the end of a call; its status."""
        while number not in self.has_ended:
            assert await self.receive(), "the connection ended"
        return Status(int(self.headers[number]["grpc-status"]))


def message(content):
    return b"\0" + len(content).to_bytes(4, "big") + content


async def echo(call):
    while (content := await call.receive()) is not None:
        await call.send(content)


def serve(scenario, **handlers):
    async def main():
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)
        paths = {
            f"/service/{name}": handler for name, handler in ({"Echo": echo} | handlers).items()
        }
        connection = GrpcConnection(TcpStream(reader, writer), paths)
        served = asyncio.create_task(connection.serve())
        peer = Peer(*await asyncio.open_connection(sock=ours))
        try:
            await asyncio.wait_for(scenario(peer), 60)
            peer.writer.close()
            await asyncio.wait_for(served, 10)
        finally:
            abort(peer.writer)
            abort(writer)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_messages_go_both_ways_in_several_calls_at_once():
    async def scenario(peer):
        calls = [peer.call() for _ in range(5)]
        for number in calls:
            await peer.send(number, message(b"one %d" % number) + message(b""))
        for number in calls:
            await peer.send(number, message(b"two"), end=True)
        for number in calls:
            assert await peer.end(number) is Status.OK
            assert peer.data[number] == message(b"one %d" % number) + message(b"") + message(b"two")

    serve(scenario)


@pytest.mark.parametrize("size", [1, 70_000, 1_000_000, MAX_MESSAGE_BYTES])
def test_message_of_any_size_passes(size):
    content = os.urandom(size)

    async def scenario(peer):
        number = peer.call()
        await peer.send(number, message(content) * 3, end=True)
        assert await peer.end(number) is Status.OK
        assert peer.data[number] == message(content) * 3

    serve(scenario)


def test_sender_waits_for_a_client_that_takes_nothing_and_others_go_on():
    sent = 0

    async def flood(call):
        nonlocal sent
        while sent < 100:
            await call.send(bytes(10_000))
            sent += 1

    async def scenario(peer):
        peer.takes = False
        number = peer.call("/service/Flood")
        await peer.flush()
        while len(peer.data[number]) < 65_535:
            await peer.receive()
        assert sent < 10
        # The window of the connection is used up by that call: it has to be larger for others.
        peer.h2.increment_flow_control_window(1 << 20)
        other = peer.call()
        await peer.send(other, message(b"x"), end=True)
        assert await peer.end(other) is Status.OK
        peer.takes = True
        peer.h2.increment_flow_control_window(1 << 20, number)
        assert await peer.end(number) is Status.OK
        assert sent == 100

    serve(scenario, Flood=flood)


def test_receiver_that_takes_nothing_makes_the_client_wait():
    go_on = asyncio.Event()
    taken = []

    async def slow(call):
        await go_on.wait()
        while (content := await call.receive()) is not None:
            taken.append(content)

    async def scenario(peer):
        number = peer.call("/service/Slow")
        await peer.flush()
        await peer.receive()  # the settings: a window of our own
        while (room := peer.h2.local_flow_control_window(number)) >= 20_000:
            await peer.send(number, message(bytes(19_995)))
        peer.h2.ping(b"12345678")
        while b"12345678" not in await peer.receive():
            pass  # everything sent before has been looked at when the answer comes
        assert peer.h2.local_flow_control_window(number) == room, "credited though not taken"
        go_on.set()
        await peer.send(number, message(bytes(400_000)), end=True)
        assert await peer.end(number) is Status.OK
        assert sum(map(len, taken)) > STREAM_WINDOW

    serve(scenario, Slow=slow)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\1" + message(b"compressed")[1:], Status.RESOURCE_EXHAUSTED),
        (b"\0" + (MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"), Status.RESOURCE_EXHAUSTED),
        (message(b"whole")[:-1], Status.INVALID_ARGUMENT),
    ],
)
def test_bad_message_ends_the_call_with_a_status(data, status):
    async def scenario(peer):
        number = peer.call()
        await peer.send(number, data, end=True)
        assert await peer.end(number) is status

    serve(scenario)


def test_refusal_has_its_status_and_text_and_resets_a_client_that_goes_on():
    async def refuse(_call):
        raise GRPCError(Status.NOT_FOUND, "100 % näh\n")

    async def scenario(peer):
        number = peer.call("/service/Refuse")
        assert await peer.end(number) is Status.NOT_FOUND
        assert peer.headers[number]["grpc-message"] == "100 %25 n%C3%A4h%0A"
        other = peer.call("/service/None")
        assert await peer.end(other) is Status.UNIMPLEMENTED
        assert peer.resets == {number: 0, other: 0}

    serve(scenario, Refuse=refuse)


def test_failure_of_a_method_is_told_without_its_text(caplog):
    async def fail(_call):
        raise ValueError("secret")

    async def scenario(peer):
        number = peer.call("/service/Fail")
        await peer.send(number, b"", end=True)
        assert await peer.end(number) is Status.INTERNAL
        assert "secret" not in peer.headers[number]["grpc-message"]

    serve(scenario, Fail=fail)
    assert "secret" in caplog.text


def test_call_that_the_client_gives_up_is_cancelled():
    began, was_cancelled = asyncio.Event(), []

    async def wait(call):
        began.set()
        try:
            await call.receive()
        except asyncio.CancelledError:
            was_cancelled.append(True)
            raise

    async def scenario(peer):
        number = peer.call("/service/Wait")
        await peer.flush()
        await asyncio.wait_for(began.wait(), 10)
        peer.h2.reset_stream(number)
        other = peer.call()
        await peer.send(other, b"", end=True)
        assert await peer.end(other) is Status.OK
        assert was_cancelled

    serve(scenario, Wait=wait)


def test_client_that_breaks_the_protocol_is_told_and_left():
    async def main():
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)
        served = asyncio.create_task(GrpcConnection(TcpStream(reader, writer), {}).serve())
        ours.sendall(PREFACE + frame(0, 0, 1, b"x"))
        with pytest.raises(Http2Error):
            await asyncio.wait_for(served, 10)
        writer.close()
        received = b""
        while piece := await asyncio.to_thread(ours.recv, 65_536):
            received += piece
        assert received.endswith(frame(7, 0, 0, struct.pack(">II", 0, 1)))
        ours.close()

    asyncio.run(main())


def test_messages_of_several_senders_are_not_mixed():
    async def both(call):
        await asyncio.gather(*(call.send(bytes([number]) * 50_000) for number in range(8)))

    async def scenario(peer):
        number = peer.call("/service/Both")
        assert await peer.end(number) is Status.OK
        data = peer.data[number]
        found = [data[at + 5 : at + 50_005] for at in range(0, len(data), 50_005)]
        assert sorted(found) == [bytes([number]) * 50_000 for number in range(8)]

    serve(scenario, Both=both)

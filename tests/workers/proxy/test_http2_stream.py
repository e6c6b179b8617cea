"""One HTTP/2 stream, against h2 as the server and against frames made by hand."""

import os

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RemoteSettingsChanged, RequestReceived, StreamEnded
from h2.settings import SettingCodes
from http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PRIORITISED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    block,
    content_of,
    data,
    fed,
    frame,
    headers,
    opened,
    padded,
    read_frames,
    settings,
    taken,
    trailers,
    window,
)

from workers.proxy.http2_stream import (
    MAX_CONTROL_BYTES,
    MAX_FRAME_BYTES,
    WINDOW_BYTES,
    Http2Error,
    Http2Stream,
)

BYTES = os.urandom(300_000)
LARGEST = 2**31 - 1


class Server:
    """h2's own view of what the client sends."""

    def __init__(self) -> None:
        self.http2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self.http2.initiate_connection()
        self.events: list = []

    def hear(self, sent: bytes) -> bytes:
        self.events += self.http2.receive_data(sent)
        return self.http2.data_to_send()

    def of(self, kind) -> list:
        return [event for event in self.events if isinstance(event, kind)]


def talk(client: Http2Stream, server: Server) -> bytes:
    """Until neither has anything to say; returns the content that came."""
    content = b""
    while True:
        up, down = taken(client), server.http2.data_to_send()
        if not up and not down:
            return content
        down += server.hear(up)
        content += fed(client, down)


def test_a_real_server_takes_the_request_and_is_understood():
    client, server = Http2Stream(), Server()
    client.open([(":method", "POST"), (":scheme", "https"), (":authority", "a"), (":path", "/p")])
    client.send(memoryview(BYTES))
    talk(client, server)
    [request] = server.of(RequestReceived)
    assert dict(request.headers)[":path"] == "/p"
    [changed] = server.of(RemoteSettingsChanged)
    new = {code: setting.new_value for code, setting in changed.changed_settings.items()}
    assert new[SettingCodes.INITIAL_WINDOW_SIZE] == WINDOW_BYTES
    assert new[SettingCodes.ENABLE_PUSH] == 0
    # The server's windows are the default ones: the rest waits.
    received = b"".join(event.data for event in server.of(DataReceived))
    assert received == BYTES[:65_535]
    assert client.pending_bytes == len(BYTES) - 65_535
    client.end()
    while client.pending_bytes:
        server.http2.acknowledge_received_data(30_000, 1)
        talk(client, server)
    assert b"".join(event.data for event in server.of(DataReceived)) == BYTES
    assert len(server.of(StreamEnded)) == 1
    server.http2.send_headers(1, [(":status", "200"), ("a", "b")])
    # As much as the client's windows allow, many times over.
    sent = received = b""
    for start in range(0, 40 * len(BYTES), len(BYTES)):
        piece = BYTES
        while piece:
            count = min(
                len(piece),
                server.http2.local_flow_control_window(1),
                server.http2.max_outbound_frame_size,
            )
            assert count, start
            server.http2.send_data(1, piece[:count])
            sent += piece[:count]
            piece = piece[count:]
            received += talk(client, server)
    server.http2.send_headers(1, [("grpc-status", "0")], end_stream=True)
    talk(client, server)
    assert received == sent
    assert client.headers == {b":status": b"200", b"a": b"b"}
    assert client.trailers == {b"grpc-status": b"0"}
    assert client.is_ended
    assert not client.reason


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 1000])
def test_pieces_of_any_size(size):
    whole = (
        data(BYTES[:5])
        + padded(BYTES[5:50], 255)
        + padded(b"", 0)
        + frame(0xBE, 0xFF, 7, b"unknown")
        + frame(PRIORITY, 0, 3, bytes(5))
        + frame(PING, 0, 0, b"12345678")
        + data(BYTES[50:2000])
        + trailers(("grpc-status", "5"))
    )
    stream = opened()
    found = b"".join(
        b"".join(stream.feed(whole[start : start + size])) for start in range(0, len(whole), size)
    )
    assert found == BYTES[:2000]
    assert stream.trailers == {b"grpc-status": b"5"}
    assert stream.is_ended
    assert (PING, ACK, 0, b"12345678") in read_frames(taken(stream))


def test_headers_in_fragments_with_padding_and_priority():
    text = block([(":status", "200"), ("x", "y" * 5000)])
    first = bytes([3]) + bytes(5) + text[:10] + bytes(3)
    stream = opened(
        answer=frame(HEADERS, PADDED | PRIORITISED, 1, first)
        + frame(CONTINUATION, 0, 1, text[10:20])
        + frame(CONTINUATION, END_HEADERS, 1, text[20:])
    )
    assert stream.headers is not None
    assert stream.headers[b"x"] == b"y" * 5000


def test_the_end_counts_when_fragments_and_padding_have_come():
    text = block([("grpc-status", "0")])
    stream = opened()
    stream.feed(frame(HEADERS, END_STREAM, 1, text[:3]))
    assert not stream.is_ended
    stream.feed(frame(CONTINUATION, END_HEADERS, 1, text[3:]))
    assert stream.is_ended

    stream, last = opened(), padded(b"last", 10, END_STREAM)
    assert fed(stream, last[:-1]) == b"last"
    assert not stream.is_ended
    stream.feed(last[-1:])
    assert stream.is_ended


def test_informational_answers_come_before_the_answer():
    stream = opened(answer=headers([(":status", "103")]) + headers())
    assert stream.headers is not None
    assert stream.headers[b":status"] == b"200"


def test_trailers_may_refer_to_names_of_the_headers():
    from hpack import Encoder

    encoder = Encoder()
    stream = opened(
        answer=frame(HEADERS, END_HEADERS, 1, encoder.encode([(":status", "200"), ("x-a", "b")]))
    )
    stream.feed(frame(HEADERS, END_HEADERS | END_STREAM, 1, encoder.encode([("x-a", "b")])))
    assert stream.trailers == {b"x-a": b"b"}


# -- our direction --


def test_content_waits_for_both_windows_and_keeps_its_order():
    stream = opened((INITIAL_WINDOW, 100))
    stream.send(memoryview(BYTES[:60]))
    stream.send(memoryview(BYTES[60:200]))
    stream.send(memoryview(BYTES[200:300]))
    assert content_of(taken(stream)) == BYTES[:100]
    assert stream.pending_bytes == 200
    stream.feed(window(50, 0))
    assert taken(stream) == b""
    stream.feed(window(50, 1))
    assert content_of(taken(stream)) == BYTES[100:150]
    stream.end()
    assert taken(stream) == b""
    stream.feed(window(LARGEST - 1_000_000, 1))
    *sent, last = read_frames(taken(stream))
    assert b"".join(payload for *_, payload in sent) == BYTES[150:300]
    assert last == (DATA, END_STREAM, 1, b"")
    assert stream.pending_bytes == 0
    stream.send(memoryview(b"more"))
    assert taken(stream) == b""


def test_a_smaller_window_counts_what_was_sent_already():
    stream = opened((INITIAL_WINDOW, 100))
    stream.send(memoryview(BYTES[:100]))
    taken(stream)
    stream.feed(settings((INITIAL_WINDOW, 40)))
    stream.send(memoryview(BYTES[100:120]))
    stream.feed(window(60, 1))
    assert content_of(taken(stream)) == b""
    stream.feed(window(1, 1))
    assert content_of(taken(stream)) == BYTES[100:101]
    stream.feed(settings((INITIAL_WINDOW, 1000)))
    assert content_of(taken(stream)) == BYTES[101:120]


@pytest.mark.parametrize("size", [16_384, 20_000, 2**24 - 1])
def test_frames_are_as_large_as_the_far_end_takes(size):
    stream = opened((MAX_FRAME_SIZE, size), (INITIAL_WINDOW, LARGEST))
    stream.feed(window(LARGEST - 65_535, 0))
    taken(stream)
    stream.send(memoryview(BYTES))
    lengths = [len(payload) for *_, payload in read_frames(taken(stream))]
    assert sum(lengths) == len(BYTES)
    assert set(lengths[:-1]) <= {size}


def test_what_waits_is_dropped_when_the_call_ends():
    stream = opened((INITIAL_WINDOW, 10))
    stream.send(memoryview(BYTES))
    taken(stream)
    stream.feed(trailers(("grpc-status", "14")))
    assert stream.pending_bytes == 0
    stream.send(memoryview(BYTES))
    stream.end()
    assert taken(stream) == b""


# -- the far end's direction --


def test_credit_is_given_for_what_was_fed_and_a_server_that_takes_more_is_told():
    stream = opened()
    piece = BYTES[:16_000]
    count = 0
    while not (sent := taken(stream)):
        count += len(fed(stream, data(piece)))
        assert count <= WINDOW_BYTES
    credit = count.to_bytes(4)
    assert read_frames(sent) == [(WINDOW_UPDATE, 0, 0, credit), (WINDOW_UPDATE, 0, 1, credit)]

    # In one go, so that there was no credit meanwhile; padding counts as well.
    stream = opened()
    room = WINDOW_BYTES // 1000
    whole = padded(bytes(899), 100) * room
    assert len(fed(stream, whole)) == 899 * room
    stream = opened()
    with pytest.raises(Http2Error, match="more content than was allowed"):
        stream.feed(whole + data(bytes(1000)))


# -- the far end breaks off --


def test_resets_and_farewells():
    stream = opened()
    stream.feed(frame(RST_STREAM, 0, 1, (8).to_bytes(4)))
    assert stream.is_ended
    assert "CANCEL" in stream.reason

    stream = opened()
    stream.feed(frame(GOAWAY, 0, 0, bytes(8) + b"debug"))
    assert stream.is_ended
    assert "no more calls (NO_ERROR)" in stream.reason

    stream = opened()
    farewell = frame(GOAWAY, 0, 0, (1).to_bytes(4) + bytes(4))
    assert fed(stream, farewell + data(b"goes on")) == b"goes on"
    stream.feed(frame(RST_STREAM, 0, 1, (4711).to_bytes(4)))
    assert "error 4711" in stream.reason


# -- what is no HTTP/2 --


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        data(b"x"),
        frame(SETTINGS, ACK, 0),
    ],
)
def test_the_first_frame_has_to_be_settings(answer):
    stream = Http2Stream()
    stream.open([])
    with pytest.raises(Http2Error, match="none of HTTP/2"):
        stream.feed(answer)


WRONG = {
    "data of another stream": frame(DATA, 0, 3, b"x"),
    "data without stream": frame(DATA, 0, 0, b"x"),
    "headers of another stream": frame(HEADERS, END_HEADERS, 2, block([])),
    "padding that does not fit": frame(DATA, PADDED, 1, b"\3ab"),
    "padding of nothing": frame(DATA, PADDED, 1),
    "padded headers that do not fit": frame(HEADERS, PADDED | END_HEADERS, 1, b"\3ab"),
    "padded headers of nothing": frame(HEADERS, PADDED | END_HEADERS, 1),
    "trailers without end": frame(HEADERS, END_HEADERS, 1, block([("a", "b")])),
    "no hpack": frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\xff\xff\xff\xff\xff\xff"),
    "continuation of nothing": frame(CONTINUATION, END_HEADERS, 1, b""),
    "something between headers": frame(HEADERS, 0, 1, b"\x88") + frame(PING, 0, 0, bytes(8)),
    "a promise": frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)),
    "settings of a stream": frame(SETTINGS, 0, 1),
    "settings cut": frame(SETTINGS, 0, 0, bytes(5)),
    "settings with push": settings((2, 1)),
    "settings with a huge window": settings((INITIAL_WINDOW, 2**31)),
    "settings with tiny frames": settings((MAX_FRAME_SIZE, 16_383)),
    "settings with huge frames": settings((MAX_FRAME_SIZE, 2**24)),
    "an answer to settings with content": frame(SETTINGS, ACK, 0, bytes(6)),
    "a short ping": frame(PING, 0, 0, bytes(7)),
    "a ping of a stream": frame(PING, 0, 1, bytes(8)),
    "a short farewell": frame(GOAWAY, 0, 0, bytes(7)),
    "a short reset": frame(RST_STREAM, 0, 1, bytes(3)),
    "a reset of another stream": frame(RST_STREAM, 0, 3, bytes(4)),
    "a short window update": frame(WINDOW_UPDATE, 0, 0, bytes(3)),
    "a window update of nothing": window(0, 1),
    "a window update of another stream": window(1, 3),
    "window of the stream too large": window(LARGEST, 1),
    "window of the connection too large": window(LARGEST, 0),
    "a priority of nothing": frame(PRIORITY, 0, 0, bytes(5)),
    "a short priority": frame(PRIORITY, 0, 1, bytes(4)),
    "a frame that is too large": frame(DATA, 0, 1, bytes(MAX_FRAME_BYTES + 1))[:100],
    "a large frame that is kept": frame(SETTINGS, 0, 0, bytes(MAX_CONTROL_BYTES + 1))[:100],
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_breaks_the_rules_is_an_error_and_said_to_the_far_end(wrong):
    stream = opened()
    with pytest.raises(Http2Error):
        stream.feed(wrong)
    *_, (kind, _, number, payload) = read_frames(taken(stream))
    assert (kind, number) == (GOAWAY, 0)
    assert int.from_bytes(payload[4:]) != 0
    assert stream.feed(data(b"x")) == []


def test_content_before_the_headers_is_an_error():
    stream = opened(answer=b"")
    with pytest.raises(Http2Error, match="nobody asked"):
        stream.feed(data(b"x"))


def test_headers_without_end_are_given_up():
    stream = opened()
    stream.feed(frame(HEADERS, 0, 1, bytes(10)))
    with pytest.raises(Http2Error, match="too many headers"):
        stream.feed(frame(CONTINUATION, 0, 1, bytes(5000)) * 20)
    stream = opened()
    stream.feed(frame(HEADERS, 0, 1, b""))
    with pytest.raises(Http2Error, match="too many headers"):
        stream.feed(frame(CONTINUATION, 0, 1, b"") * 100)


def test_headers_that_unfold_are_given_up():
    from hpack import Encoder

    # Each byte refers to a field of four kilobytes in the table.
    bomb = Encoder().encode([("x", "y" * 4000)]) + b"\xbe" * 10_000
    stream = opened()
    with pytest.raises(Http2Error, match="unreadable headers"):
        stream.feed(frame(HEADERS, END_HEADERS | END_STREAM, 1, bomb))


FLOODS = {
    "pings": frame(PING, 0, 0, bytes(8)),
    "settings": settings((INITIAL_WINDOW, 65_535)),
    "empty content": data(b""),
    "padding alone": padded(b"", 1),
    "unknown frames": frame(0x77, 0, 0, b""),
    "answers on the way": headers([(":status", "103")]),
}


@pytest.mark.parametrize("flood", FLOODS, ids=FLOODS.keys())
def test_floods_are_given_up(flood):
    answer = b"" if flood == "answers on the way" else None
    stream = opened(answer=answer)
    with pytest.raises(Http2Error, match="too many frames without content"):
        stream.feed(FLOODS[flood] * 10_000)


def test_a_ping_now_and_then_is_no_flood():
    now = [0.0]
    stream = opened(clock=lambda: now[0])
    for _ in range(20_000):
        now[0] += 0.1
        stream.feed(FLOODS["pings"])
    assert len(taken(stream)) == 20_000 * 17


def test_much_content_may_come_with_many_frames_about_it():
    stream = opened((INITIAL_WINDOW, LARGEST - 100_000))
    stream.feed(window(LARGEST - 1_000_000, 0))
    for _ in range(20_000):
        stream.send(memoryview(b"x"))
        stream.feed(window(1, 0) + window(1, 1) + FLOODS["pings"])
        taken(stream)

"""The WebSocket codec against frames put together by hand (RFC 6455 section 5)."""

import contextlib
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workers.proxy.websocket import WebSocketClient, WebSocketError

BINARY, CONTINUATION, TEXT, CLOSE, PING, PONG = 0x2, 0x0, 0x1, 0x8, 0x9, 0xA


def server_frame(opcode: int, payload: bytes, *, is_final: bool = True) -> bytes:
    start = (0x80 if is_final else 0) | opcode
    if len(payload) < 126:
        return bytes([start, len(payload)]) + payload
    if len(payload) < 65536:
        return struct.pack(">BBH", start, 126, len(payload)) + payload
    return struct.pack(">BBQ", start, 127, len(payload)) + payload


def parse_client_frame(data: bytes) -> tuple[int, bytes, bytes]:
    """(opcode, payload, what follows) of one whole masked frame."""
    assert data[0] & 0xF0 == 0x80, "final, nothing reserved"
    assert data[1] & 0x80, "a client masks"
    length, offset = data[1] & 0x7F, 2
    if length == 126:
        (length,) = struct.unpack_from(">H", data, 2)
        offset = 4
    elif length == 127:
        (length,) = struct.unpack_from(">Q", data, 2)
        offset = 10
    key, payload = data[offset : offset + 4], data[offset + 4 : offset + 4 + length]
    assert len(payload) == length
    unmasked = bytes(byte ^ key[index % 4] for index, byte in enumerate(payload))
    return data[0] & 0x0F, unmasked, data[offset + 4 + length :]


def joined(pieces: list[memoryview]) -> bytes:
    return b"".join(pieces)


PIECES = st.lists(
    st.one_of(
        st.tuples(st.just(BINARY), st.binary(max_size=300)),
        st.tuples(st.just(PING), st.binary(max_size=125)),
        st.tuples(st.just(PONG), st.binary(max_size=125)),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(PIECES, st.lists(st.integers(1, 40), max_size=60))
def test_any_chunking_gives_the_same_payload_and_pongs(frames, sizes):
    stream = b"".join(server_frame(opcode, payload) for opcode, payload in frames)
    client = WebSocketClient()
    payload, pongs = b"", []
    while stream:
        size = sizes.pop() if sizes else len(stream)
        pieces = client.feed(stream[:size])
        assert all(pieces)
        payload += joined(pieces)
        if reply := client.take_replies():
            opcode, content, rest = parse_client_frame(reply)
            assert (opcode, rest) == (PONG, b"")
            pongs.append(content)
        stream = stream[size:]
    assert payload == b"".join(data for opcode, data in frames if opcode == BINARY)
    pings = [data for opcode, data in frames if opcode == PING]
    assert pongs[-1:] == pings[-1:]
    remaining = iter(pings)
    assert all(pong in remaining for pong in pongs), "in their order"
    assert not client.is_ended


@pytest.mark.parametrize("length", [0, 1, 125, 126, 65535, 65536, 300_000])
def test_every_form_of_length_both_ways(length):
    data = bytes(length)
    client = WebSocketClient()
    assert parse_client_frame(client.frame(memoryview(data))) == (BINARY, data, b"")
    assert joined(client.feed(server_frame(BINARY, data) + server_frame(BINARY, b"x"))) == (
        data + b"x"
    )


def test_the_mask_leaves_the_payload_as_it_is():
    assert WebSocketClient().frame(b"abc").endswith(b"\0\0\0\0abc")


def test_payload_is_passed_on_before_its_frame_is_complete():
    client = WebSocketClient()
    start = struct.pack(">BBQ", 0x82, 127, 2**40)
    assert joined(client.feed(start + b"first")) == b"first"
    assert joined(client.feed(b"second")) == b"second"


def test_a_message_in_parts_with_a_ping_between():
    stream = (
        server_frame(BINARY, b"a", is_final=False)
        + server_frame(CONTINUATION, b"b", is_final=False)
        + server_frame(PING, b"!")
        + server_frame(CONTINUATION, b"c")
        + server_frame(BINARY, b"d")
    )
    client = WebSocketClient()
    assert joined(client.feed(stream)) == b"abcd"
    assert parse_client_frame(client.take_replies())[:2] == (PONG, b"!")


def test_of_many_pings_only_the_last_is_answered():
    """What has to be sent stays small whatever the far end does."""
    client = WebSocketClient()
    client.feed(b"".join(server_frame(PING, bytes([n])) for n in range(100)))
    assert parse_client_frame(client.take_replies()) == (PONG, bytes([99]), b"")
    assert client.take_replies() == b""


def test_a_close_is_answered_with_its_status_and_ends_everything():
    client = WebSocketClient()
    close = server_frame(CLOSE, struct.pack(">H", 1003) + b"unknown subprotocol")
    assert joined(client.feed(server_frame(BINARY, b"last") + close + b"\xff\xff noise")) == b"last"
    assert client.is_ended
    assert parse_client_frame(client.take_replies()) == (CLOSE, struct.pack(">H", 1003), b"")
    assert client.feed(server_frame(BINARY, b"late")) == []
    assert client.close() == b""


def test_our_close_goes_once_and_its_answer_is_not_answered():
    client = WebSocketClient()
    assert parse_client_frame(client.close()) == (CLOSE, struct.pack(">H", 1000), b"")
    assert client.close() == b""
    client.feed(server_frame(CLOSE, struct.pack(">H", 1000)))
    assert client.is_ended
    assert client.take_replies() == b""


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"\xc2\x01x", "reserved"),
        (b"\x82\x81\0\0\0\0x", "masked"),
        (server_frame(TEXT, b"x"), "kind 1"),
        (server_frame(0x3, b"x"), "kind 3"),
        (server_frame(0xB, b""), "kind 11"),
        (server_frame(PING, bytes(126)), "control"),
        (server_frame(CLOSE, b"", is_final=False), "control"),
        (server_frame(CONTINUATION, b"x"), "order"),
        (server_frame(BINARY, b"x", is_final=False) + server_frame(BINARY, b"x"), "order"),
        (struct.pack(">BBQ", 0x82, 127, 2**63), "length"),
    ],
)
def test_what_no_server_may_send_is_an_error(frame, why):
    with pytest.raises(WebSocketError, match=why):
        WebSocketClient().feed(frame)
    with pytest.raises(WebSocketError, match=why):
        feed_bytewise(WebSocketClient(), frame)


def feed_bytewise(client: WebSocketClient, data: bytes) -> None:
    for byte in data:
        client.feed(bytes([byte]))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=10))
@example([b"\x89", b"\x00", b"\x88\x01", b"x"])
def test_noise_raises_only_our_error(chunks):
    client = WebSocketClient()
    with contextlib.suppress(WebSocketError):
        for chunk in chunks:
            client.feed(chunk)
            client.take_replies()

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.proxy.ping import HEADER_BYTES, MAX_PAYLOAD_BYTES, PingDecoder, put_header

PING = bytes(4)
PAYLOADS = st.lists(st.binary(max_size=300), max_size=20)


def frame(payload: bytes) -> bytes:
    buffer = bytearray(HEADER_BYTES) + payload
    if payload:
        put_header(memoryview(buffer), len(payload))
    return bytes(buffer)


def decode(decoder: PingDecoder, data: bytes) -> bytes:
    return b"".join(decoder.feed(memoryview(data)))


@given(PAYLOADS, st.lists(st.integers(0, 6000)))
def test_payload_survives_any_chunking(payloads, cuts):
    stream = b"".join(map(frame, payloads))
    decoder = PingDecoder()
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [decode(decoder, stream[a:b]) for a, b in pairwise(edges)]
    assert b"".join(pieces) == b"".join(payloads)
    assert decoder.is_between_frames


@given(PAYLOADS)
def test_payload_survives_byte_by_byte(payloads):
    decoder = PingDecoder()
    stream = b"".join(map(frame, payloads))
    assert b"".join(decode(decoder, bytes([byte])) for byte in stream) == b"".join(payloads)


@given(st.lists(st.binary(max_size=50)))
def test_any_input_is_accepted(chunks):
    decoder = PingDecoder()
    for chunk in chunks:
        views = decoder.feed(memoryview(chunk))
        assert all(views)
        assert sum(map(len, views)) <= len(chunk)


def test_pings_carry_nothing():
    decoder = PingDecoder()
    assert decode(decoder, PING * 1000) == b""
    assert decoder.is_between_frames


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_frame_cut_short_is_noticed(cut):
    decoder = PingDecoder()
    decode(decoder, frame(b"12345")[:cut])
    assert not decoder.is_between_frames


def test_a_frame_larger_than_every_buffer_is_passed_on_as_it_comes():
    decoder = PingDecoder()
    chunk = bytes(1 << 20)
    assert decode(decoder, struct.pack(">I", MAX_PAYLOAD_BYTES)) == b""
    for _ in range(100):
        (view,) = decoder.feed(memoryview(chunk))
        assert len(view) == len(chunk)


def test_payload_is_not_copied():
    data = bytearray(frame(b"abc"))
    (view,) = PingDecoder().feed(memoryview(data))
    data[4:] = b"xyz"
    assert view == b"xyz"


def test_the_longest_length_can_be_written():
    header = bytearray(4)
    put_header(memoryview(header), MAX_PAYLOAD_BYTES)
    assert header == b"\xff\xff\xff\xff"

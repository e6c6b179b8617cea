"""Teleport's ping frames: any stream in any pieces gives what a slow reading of the whole gives.

Layout: see `byte_choices.pieces_of`.
"""

from byte_choices import Choices, pieces_of

from workers.proxy.ping import HEADER_BYTES, PingDecoder, put_header


def check(data: bytes) -> None:
    stream, pieces = pieces_of(Choices(data))
    decoder = PingDecoder()
    found = b""
    for piece in pieces:
        views = decoder.feed(memoryview(piece))
        assert all(views), "an empty view"
        found += b"".join(views)
        assert len(decoder._header) < HEADER_BYTES
    expected, is_whole = slow_payload(stream)
    assert found == expected
    assert decoder.is_between_frames == is_whole
    check_encoder(stream, pieces)


def slow_payload(stream: bytes) -> tuple[bytes, bool]:
    """(payload of all frames, whether the stream ends with the end of one)."""
    payload = b""
    while len(stream) >= 4:
        length = int.from_bytes(stream[:4])
        payload += stream[4 : 4 + length]
        if len(stream) < 4 + length:
            return payload, False
        stream = stream[4 + length :]
    return payload, not stream


def check_encoder(stream: bytes, pieces: list[bytes]) -> None:
    """Each piece as a frame with a ping behind it; cut anywhere, the same bytes come out."""
    framed = b""
    for piece in pieces:
        frame = bytearray(HEADER_BYTES) + piece
        put_header(memoryview(frame), len(piece))
        framed += frame + bytes(HEADER_BYTES)
    decoder = PingDecoder()
    middle = len(framed) // 2
    halves = [
        *decoder.feed(memoryview(framed[:middle])),
        *decoder.feed(memoryview(framed[middle:])),
    ]
    assert b"".join(halves) == stream
    assert decoder.is_between_frames

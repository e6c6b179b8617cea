"""HTTP/2 frames as a server may send them, right and wrong. Shares nothing with the client."""

from hpack import Encoder

from workers.proxy.http2_stream import Http2Stream

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE = range(6)
PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(6, 10)
END_STREAM = ACK = 1
END_HEADERS, PADDED, PRIORITISED = 4, 8, 32
MAX_FRAME_SIZE, INITIAL_WINDOW = 5, 4
HEADERS_OF_ANSWER = [(":status", "200"), ("content-type", "application/grpc")]


def frame(kind: int, flags: int = 0, stream: int = 1, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def data(payload: bytes, flags: int = 0) -> bytes:
    return frame(DATA, flags, 1, payload)


def padded(payload: bytes, padding: int, flags: int = 0) -> bytes:
    return data(bytes([padding]) + payload + bytes(padding), flags | PADDED)


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(n.to_bytes(2) + v.to_bytes(4) for n, v in pairs))


def window(credit: int, stream: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, credit.to_bytes(4))


def block(headers) -> bytes:
    return Encoder().encode(headers)


def headers(fields=HEADERS_OF_ANSWER, flags: int = END_HEADERS) -> bytes:
    return frame(HEADERS, flags, 1, block(fields))


def trailers(*fields: tuple[str, str]) -> bytes:
    return headers(list(fields), END_HEADERS | END_STREAM)


def read_frames(sent: bytes) -> list[tuple[int, int, int, bytes]]:
    """(kind, flags, stream, payload) of each frame."""
    frames = []
    while sent:
        length = int.from_bytes(sent[:3])
        assert len(sent) >= 9 + length
        frames.append((sent[3], sent[4], int.from_bytes(sent[5:9]), sent[9 : 9 + length]))
        sent = sent[9 + length :]
    return frames


def content_of(sent: bytes) -> bytes:
    return b"".join(payload for kind, _, _, payload in read_frames(sent) if kind == DATA)


def opened(*pairs: tuple[int, int], clock=lambda: 0.0, answer: bytes | None = None) -> Http2Stream:
    """A stream whose far end has sent its settings and the headers of its answer."""
    stream = Http2Stream(clock)
    stream.open([(":method", "POST"), (":path", "/a")])
    stream.take()
    assert stream.feed(settings(*pairs) + (headers() if answer is None else answer)) == []
    assert read_frames(taken(stream)) == [(SETTINGS, ACK, 0, b"")]
    return stream


def taken(stream: Http2Stream) -> bytes:
    """What it has to send."""
    return b"".join(stream.take())


def fed(stream: Http2Stream, received: bytes) -> bytes:
    return b"".join(stream.feed(received))

"""The call that carries SSH: HTTP/2, gRPC and its frames from a server, in any pieces.

The first byte chooses: any bytes as HTTP/2 (the second byte: with an answer before them or not, then
the layout of `byte_choices.pieces_of`), an honest server with its own choice of frames, or any bytes
as one message.
"""

from byte_choices import Choices, pieces_of
from google.protobuf.message import DecodeError
from hpack import Encoder

from workers.proxy.dial_plan import SshTarget
from workers.proxy.grpc_frames import GrpcError, read_frame
from workers.proxy.http2_stream import MAX_CONTROL_BYTES, WINDOW_BYTES
from workers.proxy.layers import LayerError, Plain
from workers.proxy.ssh_stream import SshStream
from workers.proxy.teleport.pb.transport_pb2 import Frame, ProxySSHResponse

DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
PREFACE_BYTES = 24
DEFAULT_WINDOW = 65_535
TARGET = SshTarget("n:0", "c")


def check(data: bytes) -> None:
    choices = Choices(data)
    match choices.below(3):
        case 0:
            is_begun = choices.below(2) == 0
            check_any_bytes(*pieces_of(choices), is_begun=is_begun)
        case 1:
            check_honest_server(choices)
        case _:
            check_message(choices.rest())


class Reader:
    """A stream, what it gave and what it sent."""

    def __init__(self) -> None:
        self.stream = SshStream(Plain(), TARGET)
        self.stream.handshake(b"")
        self.sent = self.stream.take_records()
        self.found = b""
        self.error = ""
        self._is_open = False

    def feed(self, piece: bytes) -> None:
        if self.error:
            return
        try:
            if not self._is_open:
                self._is_open = self.stream.handshake(piece)
                piece = b""
            if self._is_open:
                self.found += self.stream.decrypt(piece)
        except LayerError as error:
            self.error = str(error)
            assert self.error.isprintable()
        self.sent += self.stream.take_records()
        http2 = self.stream._http2
        assert len(http2._kept) <= MAX_CONTROL_BYTES + 9
        assert 0 <= http2._room <= WINDOW_BYTES
        assert http2._room + http2._uncredited == WINDOW_BYTES


def check_any_bytes(stream: bytes, pieces: list[bytes], *, is_begun: bool) -> None:
    beginning = [frame(SETTINGS, 0, 0), answer_headers()] if is_begun else []
    whole, cut = Reader(), Reader()
    for piece in beginning:
        whole.feed(piece)
        cut.feed(piece)
    whole.feed(stream)
    for piece in pieces:
        cut.feed(piece)
    if not whole.error:
        assert (cut.found, cut.error) == (whole.found, "")
        assert cut.stream.is_receive_ended == whole.stream.is_receive_ended
        assert cut.stream.end_reason == whole.stream.end_reason
    elif not cut.stream.is_receive_ended:
        # What came in the same piece as the mistake is lost with the connection.
        assert cut.error
    check_windows(cut.sent, b"".join(beginning) + stream)


def check_windows(sent: bytes, received: bytes) -> None:
    """Nothing but whole frames is sent, and not more content than was allowed at most."""
    allowed = DEFAULT_WINDOW + sum(
        int.from_bytes(payload) & 2**31 - 1
        for kind, _, payload in frames_of(received)
        if kind == WINDOW_UPDATE and len(payload) == 4
    )
    content = 0
    for kind, _, payload in frames_of(sent[PREFACE_BYTES:]):
        content += len(payload) if kind == DATA else 0
    assert content <= allowed


def check_honest_server(choices: Choices) -> None:
    expected, frames = honest_server(choices)
    reader = Reader()
    lengths = [1 + choices.byte() for _ in range(3)]
    position = number = 0
    while position < len(frames):
        length = lengths[number % len(lengths)]
        reader.feed(frames[position : position + length])
        position += length
        number += 1
    assert not reader.error
    assert reader.found == expected
    # What it answers of itself: settings and pings.
    answers = [kind for kind, flags, _ in frames_of(reader.sent[PREFACE_BYTES:]) if flags & 1]
    asked = [kind for kind, _, _ in frames_of(frames) if kind in {SETTINGS, PING}]
    assert answers == asked


def honest_server(choices: Choices) -> tuple[bytes, bytes]:
    """(SSH bytes, frames) of a server that cuts its messages and frames as chosen."""
    first = message(ProxySSHResponse(details={"fips_enabled": True}))
    frames = frame(SETTINGS, 0, 0) + answer_headers() + frame(DATA, 0, 1, first)
    expected = content = b""
    while choices:
        payload = choices.take(choices.byte() * choices.pick([0, 1, 4]))
        expected += payload
        content += message(ProxySSHResponse(ssh=Frame(payload=payload)))
        count = choices.byte() * choices.pick([1, 10])
        piece, content = content[:count], content[count:]
        match choices.below(5):
            case 0:
                frames += frame(PING, 0, 0, bytes(8))
            case 1:
                frames += frame(0x20, 0xFF, 9, piece)
            case 2:
                padding = choices.byte()
                piece = bytes([padding]) + piece + bytes(padding)
                frames += frame(DATA, 8, 1, piece)
                continue
        frames += frame(DATA, 0, 1, piece)
    return expected, frames + frame(DATA, 0, 1, content)


def check_message(data: bytes) -> None:
    try:
        kind, payload = read_frame(memoryview(data))
    except GrpcError:
        try:
            ProxySSHResponse.FromString(data)
        except DecodeError:
            return
        raise AssertionError("protobuf reads it") from None
    try:
        expected = ProxySSHResponse.FromString(data)
    except DecodeError:
        return  # it looks into fields that mean nothing here
    which = expected.WhichOneof("frame")
    assert kind == {None: 0, "ssh": 2, "agent": 3}[which]
    assert bytes(payload) == (getattr(expected, which).payload if which else b"")


def message(response: ProxySSHResponse) -> bytes:
    encoded = response.SerializeToString()
    return b"\0" + len(encoded).to_bytes(4) + encoded


def answer_headers() -> bytes:
    fields = [(":status", "200"), ("content-type", "application/grpc")]
    return frame(HEADERS, 4, 1, Encoder().encode(fields))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def frames_of(data: bytes) -> list[tuple[int, int, bytes]]:
    """(kind, flags, payload) of each frame; one that is cut is left out."""
    found = []
    while len(data) >= 9:
        end = 9 + int.from_bytes(data[:3])
        if len(data) >= end:
            found.append((data[3], data[4], data[9:end]))
        data = data[end:]
    return found

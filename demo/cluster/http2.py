"""The server's side of one HTTP/2 connection (RFC 9113). Pure: bytes in, events and bytes out.

For gRPC only: no push, no priorities. A stream's window is credited when its data has been taken,
the connection's at once (both in large steps), so what a connection can make us hold is streams x `STREAM_WINDOW`.
Frames may be as large as the peer allows: the fewer, the faster.
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TypeAlias

import hpack

from demo.cluster.errors import Http2Error

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 1 << 24
MAX_FRAME_BYTES = 1 << 18
MAX_STREAMS = 100
_MAX_HEADER_BYTES = 64 * 1024
_DEFAULT_WINDOW = 65_535
_DEFAULT_FRAME_BYTES = 16_384
_MAX_WINDOW = (1 << 31) - 1
_HEADER = struct.Struct(">HBBBI")
# Bytes of answers to PING, SETTINGS and streams too many that may wait to be sent.
_MAX_UNSENT_ANSWERS = 64 * 1024

Headers: TypeAlias = tuple[tuple[str, str], ...]


class Frame(IntEnum):
    """Types of frames (section 6)."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag(IntFlag):
    """Flags of frames; ACK and END_STREAM are the same bit."""

    END_STREAM = 1
    ACK = 1
    END_HEADERS = 4
    PADDED = 8
    PRIORITY = 32


class Code(IntEnum):
    """Error codes (section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class _Setting(IntEnum):
    HEADER_TABLE_SIZE = 1
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5


@dataclass(frozen=True, slots=True)
class Opened:
    """The client began a stream."""

    stream: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class Received:
    """Data of a stream; `size` has to be given back by `credit` when it has been taken."""

    stream: int
    data: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The client sends no more on a stream."""

    stream: int


@dataclass(frozen=True, slots=True)
class Reset:
    """The client gave a stream up."""

    stream: int


@dataclass(frozen=True, slots=True)
class Credited:
    """More may be sent, on whatever stream waits for it."""


Event: TypeAlias = Opened | Received | Ended | Reset | Credited


@dataclass(slots=True)
class _Stream:
    send_window: int
    receive_window: int = STREAM_WINDOW
    uncredited: int = 0
    has_client_ended: bool = False
    has_ended: bool = False


class Http2Connection:
    """One connection. What `take` gives is to be sent after every other call."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._needs_preface = True
        self._streams: dict[int, _Stream] = {}
        self._last_stream = 0
        self._send_window = _DEFAULT_WINDOW
        self._initial_window = _DEFAULT_WINDOW
        self._uncredited = 0
        self._max_frame = _DEFAULT_FRAME_BYTES
        self._decoder = hpack.Decoder(_MAX_HEADER_BYTES)
        self._encoder = hpack.Encoder()
        # A header block that goes on in CONTINUATION frames: stream, flags, what has come.
        self._block: tuple[int, int, bytearray] | None = None
        self._unsent: list[bytes] = []
        self._answer_bytes = 0
        settings = {
            _Setting.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            _Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            _Setting.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
        }
        pairs = b"".join(struct.pack(">HI", *setting) for setting in settings.items())
        self._send(Frame.SETTINGS, 0, 0, pairs)
        self._send_window_update(0, CONNECTION_WINDOW - _DEFAULT_WINDOW)
        self._handlers: dict[int, Callable[[int, int, bytes], Iterable[Event]]] = {
            Frame.DATA: self._on_data,
            Frame.HEADERS: self._on_headers,
            Frame.RST_STREAM: self._on_reset,
            Frame.SETTINGS: self._on_settings,
            Frame.PING: self._on_ping,
            Frame.WINDOW_UPDATE: self._on_window_update,
            Frame.CONTINUATION: self._on_continuation,
        }

    def take(self) -> bytes:
        """What has to be sent now."""
        data = b"".join(self._unsent)
        self._unsent.clear()
        self._answer_bytes = 0
        return data

    # -- receiving --

    def receive(self, data: bytes) -> list[Event]:
        """What these bytes mean.

        Raises:
            Http2Error: the client breaks the protocol; the connection has to end.
        """
        self._received += data
        at = self._skip_preface()
        events: list[Event] = []
        if self._needs_preface:
            return events
        with memoryview(self._received) as view:
            while len(view) - at >= 9:
                high, low, kind, flags, stream = _HEADER.unpack_from(view, at)
                length = high << 8 | low
                if length > MAX_FRAME_BYTES:
                    raise Http2Error(f"a frame of {length} bytes", Code.FRAME_SIZE_ERROR)
                if len(view) - at - 9 < length:
                    break
                payload = bytes(view[at + 9 : at + 9 + length])
                at += 9 + length
                events += self._on_frame(kind, flags, stream & _MAX_WINDOW, payload)
        del self._received[:at]
        return events

    def _skip_preface(self) -> int:
        if not self._needs_preface:
            return 0
        if not PREFACE.startswith(self._received[: len(PREFACE)]):
            raise Http2Error("no HTTP/2", Code.PROTOCOL_ERROR)
        if len(self._received) < len(PREFACE):
            return 0
        self._needs_preface = False
        return len(PREFACE)

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> Iterable[Event]:
        if self._block is not None and (kind != Frame.CONTINUATION or stream != self._block[0]):
            raise Http2Error("a header block is interrupted", Code.PROTOCOL_ERROR)
        handler = self._handlers.get(kind)
        return handler(flags, stream, payload) if handler is not None else ()

    def _on_data(self, flags: int, number: int, payload: bytes) -> Iterable[Event]:
        size = len(payload)
        self._uncredited += size
        if self._uncredited >= CONNECTION_WINDOW // 16:
            self._send_window_update(0, self._uncredited)
            self._uncredited = 0
        stream = self._streams.get(number)
        if stream is None:
            if number == 0 or number > self._last_stream:
                raise Http2Error(f"data of stream {number}", Code.PROTOCOL_ERROR)
            return  # what was on its way when we ended the stream
        if stream.has_client_ended:
            raise Http2Error(f"data after the end of stream {number}", Code.STREAM_CLOSED)
        stream.receive_window -= size
        if stream.receive_window < 0:
            raise Http2Error("more data than the window allows", Code.FLOW_CONTROL_ERROR)
        if size:
            yield Received(number, _without_padding(flags, payload), size)
        if flags & Flag.END_STREAM:
            yield from self._client_ended(number, stream)

    def _on_headers(self, flags: int, number: int, payload: bytes) -> Iterable[Event]:
        block = _without_padding(flags, payload)
        if flags & Flag.PRIORITY:
            block = block[5:]
        return self._add_to_block(flags, number, bytearray(block), flags)

    def _on_continuation(self, flags: int, number: int, payload: bytes) -> Iterable[Event]:
        if self._block is None:
            raise Http2Error("CONTINUATION without HEADERS", Code.PROTOCOL_ERROR)
        _, first_flags, block = self._block
        return self._add_to_block(first_flags, number, block + payload, flags)

    def _add_to_block(
        self, first_flags: int, number: int, block: bytearray, flags: int
    ) -> Iterable[Event]:
        if len(block) > _MAX_HEADER_BYTES:
            raise Http2Error("too many headers", Code.ENHANCE_YOUR_CALM)
        if not flags & Flag.END_HEADERS:
            self._block = number, first_flags, block
            return ()
        self._block = None
        try:
            pairs = self._decoder.decode(bytes(block))
        except hpack.HPACKError as error:
            raise Http2Error(f"headers: {error}", Code.COMPRESSION_ERROR) from error
        return self._on_header_list(
            first_flags, number, tuple((str(name), str(value)) for name, value in pairs)
        )

    def _on_header_list(self, flags: int, number: int, headers: Headers) -> Iterable[Event]:
        stream = self._streams.get(number)
        if stream is not None:  # trailers
            if not flags & Flag.END_STREAM or stream.has_client_ended:
                raise Http2Error(f"headers in stream {number}", Code.PROTOCOL_ERROR)
            yield from self._client_ended(number, stream)
            return
        if number % 2 == 0:
            raise Http2Error(f"stream {number} is not a client's", Code.PROTOCOL_ERROR)
        if number <= self._last_stream:
            return
        self._last_stream = number
        if len(self._streams) >= MAX_STREAMS:
            refused = struct.pack(">I", Code.REFUSED_STREAM)
            self._answer(Frame.RST_STREAM, refused, number)
            return
        self._streams[number] = stream = _Stream(self._initial_window)
        yield Opened(number, headers)
        if flags & Flag.END_STREAM:
            yield from self._client_ended(number, stream)

    def _client_ended(self, number: int, stream: _Stream) -> Iterable[Event]:
        stream.has_client_ended = True
        yield Ended(number)

    def _on_reset(self, _flags: int, number: int, _payload: bytes) -> Iterable[Event]:
        if self._streams.pop(number, None) is not None:
            yield Reset(number)

    def _on_settings(self, flags: int, _number: int, payload: bytes) -> Iterable[Event]:
        if flags & Flag.ACK:
            return
        if len(payload) % 6:
            raise Http2Error("SETTINGS of a wrong size", Code.FRAME_SIZE_ERROR)
        for key, value in struct.iter_unpack(">HI", payload):
            if key == _Setting.HEADER_TABLE_SIZE:
                self._encoder.header_table_size = min(value, 4096)
            elif key == _Setting.MAX_FRAME_SIZE:
                self._max_frame = max(value, _DEFAULT_FRAME_BYTES)
            elif key == _Setting.INITIAL_WINDOW_SIZE:
                if value > _MAX_WINDOW:
                    raise Http2Error("a window that is too large", Code.FLOW_CONTROL_ERROR)
                for stream in self._streams.values():
                    stream.send_window += value - self._initial_window
                self._initial_window = value
        self._answer(Frame.SETTINGS, b"")
        yield Credited()

    def _on_ping(self, flags: int, _number: int, payload: bytes) -> Iterable[Event]:
        if len(payload) != 8:
            raise Http2Error("PING of a wrong size", Code.FRAME_SIZE_ERROR)
        if not flags & Flag.ACK:
            self._answer(Frame.PING, payload)
        return ()

    def _on_window_update(self, _flags: int, number: int, payload: bytes) -> Iterable[Event]:
        if len(payload) != 4:
            raise Http2Error("WINDOW_UPDATE of a wrong size", Code.FRAME_SIZE_ERROR)
        more = int.from_bytes(payload, "big") & _MAX_WINDOW
        stream = self._streams.get(number)
        if number == 0:
            self._send_window += more
            window = self._send_window
        elif stream is not None:
            stream.send_window += more
            window = stream.send_window
        else:
            return
        if not more or window > _MAX_WINDOW:
            raise Http2Error("WINDOW_UPDATE out of range", Code.FLOW_CONTROL_ERROR)
        yield Credited()

    # -- sending --

    def sendable(self, number: int) -> int:
        """How many bytes of data a stream may send now; none when it is gone."""
        stream = self._streams.get(number)
        return max(0, min(stream.send_window, self._send_window)) if stream is not None else 0

    def is_open(self, number: int) -> bool:
        """Whether answers can be sent on a stream."""
        stream = self._streams.get(number)
        return stream is not None and not stream.has_ended

    def send_headers(self, number: int, headers: Iterable[tuple[str, str]], *, ends: bool) -> None:
        """Sends headers, or trailers with `ends`, which lets the stream go."""
        stream = self._streams[number]
        block = self._encoder.encode(list(headers))
        flags = Flag.END_HEADERS | (Flag.END_STREAM if ends else 0)
        self._send(Frame.HEADERS, flags, number, block)
        if ends:
            stream.has_ended = True
            del self._streams[number]
            if not stream.has_client_ended:
                # Section 8.1: nobody reads what the client may still send.
                self._send(Frame.RST_STREAM, 0, number, struct.pack(">I", Code.NO_ERROR))

    def send_data(self, number: int, data: bytes | memoryview) -> None:
        """Sends data, no more than `sendable` says."""
        self._streams[number].send_window -= len(data)
        self._send_window -= len(data)
        for start in range(0, len(data), self._max_frame):
            self._send(Frame.DATA, 0, number, data[start : start + self._max_frame])

    def credit(self, number: int, size: int) -> None:
        """Lets the client send so many bytes more on a stream, which may be gone."""
        stream = self._streams.get(number)
        if stream is None or stream.has_client_ended:
            return
        stream.uncredited += size
        if stream.uncredited >= STREAM_WINDOW // 4:
            stream.receive_window += stream.uncredited
            self._send_window_update(number, stream.uncredited)
            stream.uncredited = 0

    def give_up(self, code: Code) -> None:
        """Says why the connection ends."""
        self._send(Frame.GOAWAY, 0, 0, struct.pack(">II", self._last_stream, code))

    def _send_window_update(self, number: int, size: int) -> None:
        self._send(Frame.WINDOW_UPDATE, 0, number, struct.pack(">I", size))

    def _answer(self, kind: Frame, payload: bytes, number: int = 0) -> None:
        """Sends what a client can make us send, of which only so much may wait."""
        self._answer_bytes += 9 + len(payload)
        if self._answer_bytes > _MAX_UNSENT_ANSWERS:
            raise Http2Error("a flood of frames to be answered", Code.ENHANCE_YOUR_CALM)
        self._send(kind, 0 if number else Flag.ACK, number, payload)

    def _send(self, kind: Frame, flags: int, number: int, payload: bytes | memoryview) -> None:
        length = len(payload)
        self._unsent.append(_HEADER.pack(length >> 8, length & 255, kind, flags, number))
        if length:
            self._unsent.append(payload)  # type: ignore[arg-type]  # joined at once


def _without_padding(flags: int, payload: bytes) -> bytes:
    if not flags & Flag.PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Http2Error("more padding than payload", Code.PROTOCOL_ERROR)
    return payload[1 : len(payload) - payload[0]]

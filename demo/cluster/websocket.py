"""The server's end of a WebSocket (RFC 6455): frames in and out, and a byte stream on top.

| FIN, RSV1-3, opcode, 4 bits | MASK, length, 7 bits | length, 0, 2 or 8 bytes |
| masking key, 0 or 4 bytes | payload |                                           section 5.2

Frames of clients are masked, those of servers are not. Clients of Teleport send no text frames and
no fragments (api/client/alpn_websocket.go), and old proxies cannot read them: errors, here.
"""

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from demo.cluster.errors import TruncatedStreamError, WebSocketError
from demo.cluster.streams import ByteStream

# What a proxy puts into its pings.
PING_PAYLOAD = b"teleport"

_KEY_SUFFIX = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3
_FIN = 0x80
_RESERVED = 0x70
_MASK = 0x80
_MAX_CONTROL_BYTES = 125  # section 5.5


class Opcode(IntEnum):
    """Section 5.2."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class CloseCode(IntEnum):
    """Section 7.4.1."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003


def accept_key(key: str) -> str:
    """The Sec-WebSocket-Accept that answers a Sec-WebSocket-Key (section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + _KEY_SUFFIX).digest()).decode()


def is_key(key: str) -> bool:
    """Whether a Sec-WebSocket-Key is 16 bytes in base64 (section 4.1)."""
    try:
        return len(base64.b64decode(key, validate=True)) == 16
    except ValueError:
        return False


def encode_frame(opcode: Opcode, payload: bytes) -> bytes:
    """One whole frame of a server."""
    head = bytes([_FIN | opcode])
    if len(payload) <= _MAX_CONTROL_BYTES:
        return head + bytes([len(payload)]) + payload
    if len(payload) <= 0xFFFF:
        return head + b"\x7e" + len(payload).to_bytes(2, "big") + payload
    return head + b"\x7f" + len(payload).to_bytes(8, "big") + payload


def encode_close(code: int, reason: str = "") -> bytes:
    """A close frame."""
    return encode_frame(Opcode.CLOSE, code.to_bytes(2, "big") + reason.encode())


@dataclass(frozen=True, slots=True)
class Event:
    """What arrived: a piece of a binary frame, or a whole control frame."""

    opcode: Opcode
    payload: bytes


@dataclass(slots=True)
class _Frame:
    """A frame whose header is read."""

    opcode: Opcode
    missing: int
    key: bytes
    payload: bytes = b""  # of a control frame, so far
    at: int = 0


class FrameDecoder:
    """Reads the frames of a client.

    Binary payload is handed on as it arrives, so nothing but a header and a control frame, 125
    bytes at most, is ever held.
    """

    def __init__(self) -> None:
        self._received = bytearray()
        self._frame: _Frame | None = None

    @property
    def is_inside_frame(self) -> bool:
        """Whether the stream would be cut in the middle of a frame if it ended now."""
        return bool(self._received or self._frame)

    def feed(self, data: bytes) -> Iterator[Event]:
        """What `data` completes. To be read to its end before more is fed.

        Raises:
            WebSocketError: the client breaks the protocol; `code` is what to close with.
        """
        self._received += data
        while True:
            if self._frame is None:
                self._frame = self._take_header()
                if self._frame is None:
                    return
            event = self._take_payload(self._frame)
            if event is not None:
                yield event
            if self._frame.missing:
                return
            self._frame = None

    def _take_header(self) -> _Frame | None:
        if len(self._received) < 2:
            return None
        first, second = self._received[:2]
        length = second & ~_MASK
        opcode = _check_header(first, second, length)
        extended = {126: 2, 127: 8}.get(length, 0)
        end = 2 + extended + 4
        if len(self._received) < end:
            return None
        if extended:
            length = int.from_bytes(self._received[2 : 2 + extended], "big")
        if length >= 1 << 63:
            raise WebSocketError("a frame length has its highest bit set", CloseCode.PROTOCOL_ERROR)
        return _Frame(opcode, length, self._take(end)[-4:])

    def _take_payload(self, frame: _Frame) -> Event | None:
        piece = _unmask(self._take(frame.missing), frame.key, frame.at)
        frame.missing -= len(piece)
        frame.at += len(piece)
        if frame.opcode is Opcode.BINARY:
            return Event(frame.opcode, piece) if piece else None
        frame.payload += piece
        return None if frame.missing else Event(frame.opcode, frame.payload)

    def _take(self, size: int) -> bytes:
        piece = bytes(self._received[:size])
        del self._received[:size]
        return piece


def _check_header(first: int, second: int, length: int) -> Opcode:
    try:
        opcode = Opcode(first & 0x0F)
    except ValueError as error:
        raise WebSocketError("unknown opcode", CloseCode.PROTOCOL_ERROR) from error
    if first & _RESERVED:
        raise WebSocketError("a reserved bit is set", CloseCode.PROTOCOL_ERROR)
    if not second & _MASK:
        raise WebSocketError("a frame is not masked", CloseCode.PROTOCOL_ERROR)
    if opcode is Opcode.TEXT:
        raise WebSocketError("a text frame", CloseCode.UNSUPPORTED_DATA)
    if opcode is Opcode.CONTINUATION or not first & _FIN:
        raise WebSocketError("a fragmented message", CloseCode.PROTOCOL_ERROR)
    if opcode >= Opcode.CLOSE and length > _MAX_CONTROL_BYTES:
        raise WebSocketError("a control frame is too long", CloseCode.PROTOCOL_ERROR)
    return opcode


def _unmask(data: bytes, key: bytes, at: int) -> bytes:
    """XOR with the key, whose byte `at % 4` comes first (section 5.3)."""
    if not data or key == b"\0\0\0\0":
        return data
    offset = at % 4
    pad = ((key[offset:] + key[:offset]) * (len(data) // 4 + 1))[: len(data)]
    mixed = int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")
    return mixed.to_bytes(len(data), "big")


class WebSocketStream:
    """The `ByteStream` inside a WebSocket.

    There are no directions here: a close frame, from either side, ends both. A proxy does not
    wait for the answer to its own.
    """

    def __init__(self, below: ByteStream) -> None:
        self._below = below
        self._decoder = FrameDecoder()
        self._payload: list[bytes] = []
        self._is_ended = False
        self._is_close_sent = False

    async def read(self) -> bytes:
        """Some bytes; empty after a close frame, or the end of the stream below.

        Raises:
            WebSocketError: the client breaks the protocol; the close frame is sent.
            TruncatedStreamError: the stream below ended inside a frame.
        """
        while not self._payload and not self._is_ended:
            data = await self._below.read()
            if not data:
                self._is_ended = True
                if self._decoder.is_inside_frame:
                    raise TruncatedStreamError("the stream ended inside a WebSocket frame")
                break
            try:
                await self._take(data)
            except WebSocketError as error:
                await self._close(error.code)
                raise
        payload, self._payload = b"".join(self._payload), []
        return payload

    async def _take(self, data: bytes) -> None:
        for event in self._decoder.feed(data):
            match event.opcode:
                case Opcode.BINARY:
                    self._payload.append(event.payload)
                case Opcode.PING:
                    await self._send(Opcode.PONG, event.payload)
                case Opcode.CLOSE:
                    self._is_ended = True
                    await self._close(CloseCode.NORMAL)
                    return
                case _:
                    pass  # a pong

    async def write(self, data: bytes) -> None:
        """Sends one binary frame; after the end the bytes go nowhere."""
        await self._send(Opcode.BINARY, data)

    async def ping(self) -> None:
        """Sends a ping."""
        await self._send(Opcode.PING, PING_PAYLOAD)

    async def write_eof(self) -> None:
        """Sends a close frame."""
        await self._close(CloseCode.NORMAL)

    async def _send(self, opcode: Opcode, payload: bytes) -> None:
        if not self._is_close_sent:
            await self._below.write(encode_frame(opcode, payload))

    async def _close(self, code: int) -> None:
        if not self._is_close_sent:
            self._is_close_sent = True
            await self._below.write(encode_close(code))

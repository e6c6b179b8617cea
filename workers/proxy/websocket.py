"""The client's side of a WebSocket that carries a byte stream (RFC 6455 section 5). Pure.

     0        1                 2           2, 4 or 10
    +--------+-----------------+-----------+-------------+---------+
    | F  op  | M  length       | longer    | masking key | payload |
    |        | (126, 127: next)| length    | only if M   |         |
    +--------+-----------------+-----------+-------------+---------+

Payload is passed on as it comes, whatever the size of its frame, and message borders mean nothing.
Pings are answered, of those in a row only the last (section 5.5.3). We mask with a key of zeros,
which leaves the payload as it is: the mask protects caches from what a web page may send (section
10.3), and the payload here is TLS. Teleport's own client does the same, because servers of old
versions did not unmask.

Source: RFC 6455; Teleport, api/client/alpn_websocket.go.
"""

import struct

from workers.proxy.layers import LayerError

MAX_CONTROL_BYTES = 125  # section 5.5
MAX_PAYLOAD_BYTES = 2**63 - 1  # section 5.2
_MAX_HEADER_BYTES = 10  # of a frame without masking key

_FINAL, _RESERVED, _OPCODE = 0x80, 0x70, 0x0F
_MASKED, _LENGTH = 0x80, 0x7F
_CONTINUATION, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x2, 0x8, 0x9, 0xA
_STATUS_NORMAL = 1000  # section 7.4.1

_SHORT = struct.Struct(">BBI")  # with the masking key
_MIDDLE = struct.Struct(">BBHI")
_LONG = struct.Struct(">BBQI")
_LENGTH_16 = struct.Struct(">H")
_LENGTH_64 = struct.Struct(">Q")


class WebSocketError(LayerError):
    """The far end does not keep to the protocol; the connection is of no more use."""


class WebSocketClient:
    """Frames out, frames in. Begins behind the answer to the opening handshake."""

    __slots__ = (
        "_control",
        "_control_opcode",
        "_header",
        "_is_close_sent",
        "_is_message_open",
        "_missing_bytes",
        "_reply",
        "is_ended",
    )

    def __init__(self) -> None:
        self._header = b""  # an incomplete header, less than _MAX_HEADER_BYTES
        self._missing_bytes = 0  # payload of the present frame that has not come yet
        self._control_opcode = 0  # of the present frame; 0: it carries data
        self._control = b""  # payload of the present control frame
        self._is_message_open = False  # the last data frame said that another follows
        self._is_close_sent = False
        self._reply = b""
        self.is_ended = False  # a close frame came: whatever follows it is dropped

    def feed(self, data: bytes | memoryview) -> list[memoryview]:
        """The payload in the next bytes of the stream, as views of `data` in their order.

        The views are never empty. Call `take_replies` afterwards.

        Raises:
            WebSocketError: the frames are not valid, or not of a kind that carries bytes.
        """
        payload: list[memoryview] = []
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end and not self.is_ended:
            if self._missing_bytes:
                piece = view[position : position + self._missing_bytes]
                position += len(piece)
                self._missing_bytes -= len(piece)
                if not self._control_opcode:
                    payload.append(piece)
                    continue
                self._control += piece
            else:
                taken = self._read_header(view[position : position + _MAX_HEADER_BYTES])
                position += taken
            if self._control_opcode and not self._missing_bytes:
                self._obey_control()
        return payload

    def frame(self, data: bytes | memoryview) -> bytes:
        """One binary frame with `data`, header and all."""
        return _header(_BINARY, len(data)) + data

    def close(self) -> bytes:
        """The frame that ends the WebSocket, both directions (section 5.5.1); empty if it went."""
        if self._is_close_sent:
            return b""
        self._is_close_sent = True
        return _control_frame(_CLOSE, _LENGTH_16.pack(_STATUS_NORMAL))

    def take_replies(self) -> bytes:
        """What has to be sent in answer to the far end's control frames. May be empty."""
        reply, self._reply = self._reply, b""
        return reply

    def _read_header(self, data: memoryview) -> int:
        """Begins a frame if its header is complete; returns how many bytes it took."""
        header = self._header + data[: _MAX_HEADER_BYTES - len(self._header)]
        before = len(self._header)
        size = 2
        if len(header) >= size:
            length = header[1] & _LENGTH
            size += {126: 2, 127: 8}.get(length, 0)
        if len(header) < size:
            self._check_start(header)
            self._header = header
            return len(header) - before
        if length == 126:
            (length,) = _LENGTH_16.unpack_from(header, 2)
        elif length == 127:
            (length,) = _LENGTH_64.unpack_from(header, 2)
        self._check_start(header)
        self._header = b""
        self._begin_frame(header[0], length)
        return size - before

    def _check_start(self, header: bytes) -> None:
        if header[0] & _RESERVED:
            raise WebSocketError("WebSocket frame with reserved bits")
        if header[1:] and header[1] & _MASKED:
            raise WebSocketError("masked WebSocket frame from a server")  # section 5.1

    def _begin_frame(self, start: int, length: int) -> None:
        opcode, is_final = start & _OPCODE, bool(start & _FINAL)
        if length > MAX_PAYLOAD_BYTES:
            raise WebSocketError("WebSocket frame of an impossible length")
        if opcode in {_CLOSE, _PING, _PONG}:
            if length > MAX_CONTROL_BYTES or not is_final:
                raise WebSocketError("WebSocket control frame too long or in parts")
            self._control_opcode = opcode
            self._control = b""
        elif opcode in {_BINARY, _CONTINUATION}:
            if self._is_message_open is not (opcode == _CONTINUATION):
                raise WebSocketError("WebSocket frames out of order")
            self._is_message_open = not is_final
            self._control_opcode = 0
        else:
            raise WebSocketError(f"WebSocket frame of kind {opcode}, only binary ones are of use")
        self._missing_bytes = length

    def _obey_control(self) -> None:
        """A control frame is complete."""
        opcode, self._control_opcode = self._control_opcode, 0
        if opcode == _PING:
            self._reply = _control_frame(_PONG, self._control)
        elif opcode == _CLOSE:
            self.is_ended = True
            if not self._is_close_sent:
                self._is_close_sent = True
                self._reply = _control_frame(_CLOSE, self._control[:2])


def _header(opcode: int, length: int) -> bytes:
    """The header of a whole message with a masking key of zeros."""
    start = _FINAL | opcode
    if length < 126:
        return _SHORT.pack(start, _MASKED | length, 0)
    if length < 2**16:
        return _MIDDLE.pack(start, _MASKED | 126, length, 0)
    return _LONG.pack(start, _MASKED | 127, length, 0)


def _control_frame(opcode: int, payload: bytes) -> bytes:
    return _header(opcode, len(payload)) + payload

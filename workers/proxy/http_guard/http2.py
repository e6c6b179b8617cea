"""The client's side of an HTTP/2 connection with the requests in it checked. Pure.

Frames are followed, not kept: of one that carries no header fields only the nine bytes of its head
are looked at. Blocks of header fields are held until they are whole, decoded and checked. Streams
are not tracked, but for the highest: a block on a lower one can only be trailers.

The app's settings are not seen here. Only one could matter, the size of the table for header
fields that the client may use. Whatever it is, a client that uses another size than the initial
4096 bytes says so inside its blocks (RFC 7541 section 4.2), so the table here follows it without
the setting, up to MAX_TABLE_BYTES.

Sources: RFC 9113 sections 3.4, 4, 6 and 8, RFC 8441 (CONNECT with a :protocol), RFC 7541.
"""

import re
import struct
from typing import Final

from hpack import Decoder, HPACKError, OversizedHeaderListError

from workers.proxy.http_guard.classifier import TCHAR
from workers.proxy.http_guard.refusal import RequestRefusedError
from workers.proxy.http_guard.rules import CHECKED_FIELDS, Rules, check_request

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

MAX_BLOCK_BYTES: Final = 64 * 1024  # of header fields, encoded as well as decoded
MAX_FRAGMENTS: Final = 64  # of one block
MAX_TABLE_BYTES: Final = 64 * 1024

_HEAD_BYTES: Final = 9
_HEAD = struct.Struct(">HBBBI")  # length in 24 bits, type, flags, stream
_STREAM_BITS: Final = 2**31 - 1

# RFC 9113 section 6.
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS = 0, 1, 2, 3, 4
_PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 5, 6, 7, 8, 9
_ACK = 0x1
_END_HEADERS, _PADDED, _PRIORITISED = 0x4, 0x8, 0x20
# Frames of one size, and whether they belong to a stream (None: to either).
_SIZES: Final = {
    _PRIORITY: (5, True),
    _RST_STREAM: (4, True),
    _PING: (8, False),
    _WINDOW_UPDATE: (4, None),
}

_PSEUDO_FIELDS: Final = frozenset((b":method", b":scheme", b":authority", b":path", b":protocol"))
_NAME = re.compile(rb"[" + TCHAR.replace(b"A-Z", b"") + rb"]++")
_METHOD = re.compile(rb"[" + TCHAR + rb"]++")
_NOT_IN_VALUES = re.compile(rb"[\r\n\x00]")
# Of HTTP/1 (section 8.2.2): they would mean something where HTTP/2 is turned into it.
_CONNECTION_FIELDS: Final = frozenset(
    (b"connection", b"transfer-encoding", b"upgrade", b"keep-alive", b"proxy-connection")
)


class Http2:
    """What follows the preface. `has_request`: a request has been found right."""

    __slots__ = ("_block", "_decoder", "_fragments", "_is_settled", "_rules", "_stream", "_taken",
                 "_top_stream", "has_request")  # fmt: skip

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._decoder = Decoder(max_header_list_size=MAX_BLOCK_BYTES)
        self._decoder.max_allowed_table_size = MAX_TABLE_BYTES
        self._is_settled = False  # the first frame has come
        self._block: bytearray | None = None  # header fields of which more come
        self._fragments = 0
        self._stream = 0  # of the block
        self._taken = 0  # bytes of the frames of the block so far
        self._top_stream = 0
        self.has_request = False

    def take(self, buffer: bytes | bytearray, position: int) -> tuple[int, int]:
        """(how many bytes from `position` may pass, how many behind them need not be seen).

        (0, 0) while more is needed. What need not be seen need not be in `buffer`, and the next
        call is for what follows it.

        Raises:
            RequestRefusedError: a wrong request, or no HTTP/2.
        """
        while True:
            start = position + self._taken
            if len(buffer) - start < _HEAD_BYTES:
                return 0, 0
            high, low, kind, flags, stream = _HEAD.unpack_from(buffer, start)
            length: int = high << 8 | low
            stream &= _STREAM_BITS
            if kind not in (_HEADERS, _CONTINUATION):
                self._check_frame(kind, flags, stream, length)
                return _HEAD_BYTES, length
            self._check_block_frame(kind, stream, length)
            end = start + _HEAD_BYTES + length
            if len(buffer) < end:
                return 0, 0
            payload = bytes(buffer[start + _HEAD_BYTES : end])
            self._collect(flags, payload)
            self._taken = end - position
            if flags & _END_HEADERS:
                assert self._block is not None
                block, self._block, self._taken = bytes(self._block), None, 0
                self._check_block(block)
                return end - position, 0

    def _check_frame(self, kind: int, flags: int, stream: int, length: int) -> None:
        if self._block is not None:
            raise RequestRefusedError(400, "header fields in HTTP/2 are broken off")
        if not self._is_settled:
            if kind != _SETTINGS or flags & _ACK:
                raise RequestRefusedError(400, "its first frame of HTTP/2 is not SETTINGS")
            self._is_settled = True
        if kind == _PUSH_PROMISE:
            raise RequestRefusedError(400, "it sends a PUSH_PROMISE")
        if kind in _SIZES:
            size, has_stream = _SIZES[kind]
            is_right = length == size and has_stream in (None, stream != 0)
        elif kind == _DATA:
            is_right = stream != 0 and (length > 0 or not flags & _PADDED)
        elif kind == _SETTINGS:
            is_right = stream == 0 and not (length if flags & _ACK else length % 6)
        else:
            # Unknown ones are extensions, without a meaning for requests (section 5.5).
            is_right = kind != _GOAWAY or (stream == 0 and length >= 8)
        if not is_right:
            raise RequestRefusedError(400, "a frame of HTTP/2 is not well formed")

    def _check_block_frame(self, kind: int, stream: int, length: int) -> None:
        is_first = self._block is None
        if not self._is_settled:
            raise RequestRefusedError(400, "its first frame of HTTP/2 is not SETTINGS")
        if is_first != (kind == _HEADERS) or (not is_first and stream != self._stream):
            raise RequestRefusedError(400, "header fields in HTTP/2 are broken off")
        if is_first:
            if not stream % 2:
                raise RequestRefusedError(400, "a stream of HTTP/2 is none of a client")
            self._stream = stream
            self._fragments = 0
        present = 0 if self._block is None else len(self._block)
        if present + length > MAX_BLOCK_BYTES or self._fragments >= MAX_FRAGMENTS:
            raise RequestRefusedError(
                431, f"its head is larger than {MAX_BLOCK_BYTES} bytes", stream=self._stream
            )

    def _collect(self, flags: int, payload: bytes) -> None:
        self._fragments += 1
        if self._block is not None:
            self._block += payload
            return
        start, padding = 0, 0
        if flags & _PADDED:
            start, padding = 1, payload[0] if payload else 0
        if flags & _PRIORITISED:
            start += 5
        if start + padding > len(payload):
            raise RequestRefusedError(400, "a frame of HTTP/2 is not well formed")
        self._block = bytearray(payload[start : len(payload) - padding])

    def _check_block(self, block: bytes) -> None:
        stream, is_trailers = self._stream, self._stream <= self._top_stream
        self._top_stream = max(self._top_stream, stream)
        try:
            fields = self._decode(block)
            if is_trailers:
                _check_trailers(fields)
            else:
                _check_request(self._rules, fields)
        except RequestRefusedError as error:
            error.stream = stream
            raise
        self.has_request = True

    def _decode(self, block: bytes) -> list[tuple[bytes, bytes]]:
        try:
            fields = self._decoder.decode(block, raw=True)
            return [(bytes(name), bytes(value)) for name, value in fields]
        except OversizedHeaderListError as error:
            raise RequestRefusedError(
                431, f"its head is larger than {MAX_BLOCK_BYTES} bytes"
            ) from error
        except HPACKError as error:
            raise RequestRefusedError(400, "its header fields in HTTP/2 cannot be read") from error


def _check_request(rules: Rules, fields: list[tuple[bytes, bytes]]) -> None:
    pseudo: dict[bytes, bytes] = {}
    checked: dict[bytes, list[bytes]] = {}
    is_behind_pseudo = False
    for name, value in fields:
        if _NOT_IN_VALUES.search(value):
            raise RequestRefusedError(400, "a header field has a byte that is not allowed")
        if name in _PSEUDO_FIELDS:
            if is_behind_pseudo or name in pseudo:
                raise RequestRefusedError(400, "its pseudo-header fields are not in order")
            pseudo[name] = value
            continue
        is_behind_pseudo = True
        if not _NAME.fullmatch(name) or name in _CONNECTION_FIELDS:
            raise RequestRefusedError(400, "a header field is none of HTTP/2")
        if name in CHECKED_FIELDS:
            checked.setdefault(name, []).append(value)
    method = pseudo.get(b":method", b"")
    if method != b"CONNECT" or b":protocol" in pseudo:
        path = pseudo.get(b":path", b"")
        if not (path.startswith(b"/") or (path == b"*" and method == b"OPTIONS")):
            raise RequestRefusedError(400, "its target is none that HTTP knows")
    if not _METHOD.fullmatch(method):
        raise RequestRefusedError(400, "its method is none")
    check_request(rules, method, pseudo.get(b":authority"), checked)


def _check_trailers(fields: list[tuple[bytes, bytes]]) -> None:
    for name, value in fields:
        is_right = _NAME.fullmatch(name) and not _NOT_IN_VALUES.search(value)
        if not is_right or name in CHECKED_FIELDS or name in _CONNECTION_FIELDS:
            raise RequestRefusedError(400, "trailers of HTTP/2 are none")

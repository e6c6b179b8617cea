"""The client's side of an HTTP/2 connection with exactly one stream (RFC 9113). Pure, but for a clock.

    open --> SETTINGS, WINDOW_UPDATE, HEADERS     feed: frames in, content of the stream out
    send --> DATA, as the far end's windows allow; the rest is kept and follows by itself
    end  --> END_STREAM, behind everything        take: frames to be sent

Content is passed on as it comes, whatever the size of its frame. Since there is one stream, one
window counts for the stream and the connection: both are announced alike and credited together, for
what was fed. Whoever is full stops reading, so that nothing is fed. Frames that only cost time
(settings, pings, empty and unknown ones) are limited by how much content goes either way and by
time.

For a call that lasts, over a connection of its own. `h2`, which grpclib has, is for many streams and
takes three times as long for each byte.
"""

import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Final

from hpack import Decoder, Encoder, HPACKError

from workers.proxy.layers import LayerError

# What the far end may send without credit; credit is given when a quarter of it was fed.
WINDOW_BYTES: Final = 4 * 1024 * 1024
_CREDIT_BYTES: Final = WINDOW_BYTES // 4
# The far end's largest frame of content. Others are not kept larger than MAX_CONTROL_BYTES.
MAX_FRAME_BYTES: Final = 1024 * 1024
MAX_CONTROL_BYTES: Final = 64 * 1024
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_FRAGMENTS: Final = 64  # of one block of headers

# Frames without content: so many at once, so many a second, and for each frame of content either
# way so many and one for so many bytes.
_ALLOWED_AT_ONCE: Final = 2000
_ALLOWED_A_SECOND: Final = 200
_ALLOWED_FOR_CONTENT: Final = 4
_CONTENT_BYTES: Final = 512
_MAX_ALLOWED: Final = 20_000

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_STREAM: Final = 1
_HEAD_BYTES: Final = 9
_DEFAULT_WINDOW: Final = 65_535
_DEFAULT_FRAME: Final = 16_384
_LARGEST_FRAME: Final = 2**24 - 1
_LARGEST_WINDOW: Final = 2**31 - 1

_HEAD = struct.Struct(">HBBBI")  # length in 24 bits, type, flags, stream
_SETTING = struct.Struct(">HI")
_UINT = struct.Struct(">I")

# Section 6.
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS = 0, 1, 2, 3, 4
_PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 5, 6, 7, 8, 9
_ACK = _END_STREAM = 0x1
_END_HEADERS = 0x4
_PADDED = 0x8
_PRIORITISED = 0x20
# Section 6.5.2.
_ENABLE_PUSH, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE, _MAX_HEADER_LIST_SIZE = 2, 4, 5, 6

_STATUS: Final = b":status"


class ErrorCode(IntEnum):
    """RFC 9113 section 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class Http2Error(LayerError):
    """The far end does not keep to HTTP/2; the connection is of no more use."""


class Http2Stream:
    """One connection, one request. After `feed`, also one that raised, `take` has what to send."""

    __slots__ = (
        "_allowed",
        "_allowed_at",
        "_block",
        "_clock",
        "_decoder",
        "_ends_behind",
        "_fragments",
        "_is_end_sent",
        "_is_end_wanted",
        "_is_settled",
        "_kept",
        "_left",
        "_max_frame",
        "_out",
        "_room",
        "_send_window",
        "_skipped",
        "_stream_window",
        "_uncredited",
        "_waiting",
        "_window_setting",
        "headers",
        "is_ended",
        "pending_bytes",
        "reason",
        "trailers",
    )

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is monotonic, in seconds."""
        self._clock = clock
        self._allowed = float(_ALLOWED_AT_ONCE)
        self._allowed_at = clock()
        self._out: list[bytes | memoryview] = []
        # What comes.
        self._kept = b""  # the beginning of a frame that is not whole
        self._left = 0  # content of the present frame that has not come yet
        self._skipped = 0  # padding, or a frame of no interest, likewise
        self._ends_behind = False  # the present frame is the stream's last
        self._is_settled = False  # the first frame has come
        self._decoder = Decoder(max_header_list_size=MAX_HEADER_BYTES)
        self._block: bytearray | None = None  # headers of which more fragments follow
        self._fragments = 0
        self._room = WINDOW_BYTES  # what may still come without credit
        self._uncredited = 0
        self.headers: dict[bytes, bytes] | None = None
        self.trailers: dict[bytes, bytes] | None = None
        # The far end has ended the stream, in order or not. Whatever follows is dropped.
        self.is_ended = False
        self.reason = ""  # why it ended out of order
        # What goes.
        self._max_frame = _DEFAULT_FRAME
        self._send_window = _DEFAULT_WINDOW
        self._stream_window = _DEFAULT_WINDOW
        self._window_setting = _DEFAULT_WINDOW
        self._waiting: deque[memoryview] = deque()
        self._is_end_wanted = False
        self._is_end_sent = False
        self.pending_bytes = 0  # content that waits for the far end's leave

    @property
    def max_frame_bytes(self) -> int:
        """The largest frame that the far end takes."""
        return self._max_frame

    # -- out --

    def open(self, headers: Iterable[tuple[str, str]]) -> None:
        """Begins with the request's headers. Content may follow at once."""
        settings = (
            (_ENABLE_PUSH, 0),
            (_INITIAL_WINDOW_SIZE, WINDOW_BYTES),
            (_MAX_FRAME_SIZE, MAX_FRAME_BYTES),
            (_MAX_HEADER_LIST_SIZE, MAX_HEADER_BYTES),
        )
        self._out.append(_PREFACE)
        self._put(_SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings))
        self._put(_WINDOW_UPDATE, 0, 0, _UINT.pack(WINDOW_BYTES - _DEFAULT_WINDOW))
        self._put(_HEADERS, _END_HEADERS, _STREAM, Encoder().encode(list(headers)))

    def send(self, content: memoryview) -> None:
        """Sends content now or when the far end allows it; dropped when the stream is over.

        What may be sent now is in the next `take`, until which `content` must not change.
        """
        if self.is_ended or self._is_end_wanted:
            return
        rest = content if self._waiting else self._emit(content)
        if rest:
            self._waiting.append(memoryview(bytes(rest)))
            self.pending_bytes += len(rest)

    def end(self) -> None:
        """Ends our direction, behind everything that waits."""
        self._is_end_wanted = True
        self._flush()

    def take(self) -> list[bytes | memoryview]:
        """Frames to be sent, in order, in parts that are to be joined. May be empty."""
        out, self._out = self._out, []
        return out

    def _put(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        length = len(payload)
        self._out.append(_HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream))
        self._out.append(payload)

    def _emit(self, content: memoryview) -> memoryview:
        """Puts what may go into frames; returns the rest."""
        limit = min(self._send_window, self._stream_window, len(content))
        position = 0
        while position < limit:
            length = min(limit - position, self._max_frame)
            self._out.append(_HEAD.pack(length >> 8, length & 0xFF, _DATA, 0, _STREAM))
            self._out.append(content[position : position + length])
            position += length
            self._allowed += _ALLOWED_FOR_CONTENT + length // _CONTENT_BYTES
        self._send_window -= position
        self._stream_window -= position
        return content[position:]

    def _flush(self) -> None:
        waiting = self._waiting
        while waiting:
            content = waiting.popleft()
            rest = self._emit(content)
            self.pending_bytes -= len(content) - len(rest)
            if rest:
                waiting.appendleft(rest)
                return
        if self._is_end_wanted and not self._is_end_sent and not self.is_ended:
            self._is_end_sent = True
            self._put(_DATA, _END_STREAM, _STREAM, b"")

    # -- in --

    def feed(self, data: bytes | memoryview) -> list[memoryview]:
        """The stream's content in the next bytes, as views in their order, none of them empty.

        Raises:
            Http2Error: the far end does not keep to the protocol, or its frames are too many.
        """
        content: list[memoryview] = []
        if self._kept:
            data = self._kept + bytes(data)
            self._kept = b""
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end and not self.is_ended:
            if self._left:
                piece = view[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                content.append(piece)
            elif self._skipped:
                count = min(self._skipped, end - position)
                position += count
                self._skipped -= count
            else:
                taken = self._begin(view[position:])
                if not taken:
                    self._kept = bytes(view[position:])
                    break
                position += taken
            if self._ends_behind and not (self._left or self._skipped or self._block is not None):
                self._end("")
        self._give_credit()
        return content

    def _begin(self, view: memoryview) -> int:
        """Takes the next frame, of DATA and unknown ones the beginning; 0 when more is needed."""
        # What answers in HTTP/1.1 or another protocol is told from its first bytes.
        if not self._is_settled and len(view) > 3 and view[3] != _SETTINGS:
            raise self._fault(ErrorCode.PROTOCOL_ERROR, "its first answer is none of HTTP/2")
        if len(view) < _HEAD_BYTES:
            return 0
        high, low, kind, flags, stream = _HEAD.unpack_from(view)
        length: int = high << 8 | low
        stream &= _LARGEST_WINDOW
        if not self._is_settled and (stream or flags & _ACK):
            raise self._fault(ErrorCode.PROTOCOL_ERROR, "its first answer is none of HTTP/2")
        if length > MAX_FRAME_BYTES:
            raise self._fault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
        if self._block is not None and kind != _CONTINUATION:
            raise self._fault(ErrorCode.PROTOCOL_ERROR, "headers that are not finished")
        if kind == _DATA:
            return self._begin_data(view, length, flags, stream)
        self._spend()
        if kind > _CONTINUATION:
            self._skipped = length
            return _HEAD_BYTES
        if length > MAX_CONTROL_BYTES:
            raise self._fault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes")
        if len(view) < _HEAD_BYTES + length:
            self._allowed += 1  # it is counted when it is whole
            return 0
        self._control(kind, flags, stream, bytes(view[_HEAD_BYTES : _HEAD_BYTES + length]))
        self._is_settled = True
        return _HEAD_BYTES + length

    def _begin_data(self, view: memoryview, length: int, flags: int, stream: int) -> int:
        if stream != _STREAM or self.headers is None:
            raise self._fault(ErrorCode.PROTOCOL_ERROR, "content that nobody asked for")
        if length > self._room:
            raise self._fault(ErrorCode.FLOW_CONTROL_ERROR, "more content than was allowed")
        padding, taken = 0, _HEAD_BYTES
        if flags & _PADDED:
            if length and len(view) == _HEAD_BYTES:
                return 0
            padding = view[_HEAD_BYTES] if length else 0
            if padding >= length:
                raise self._fault(ErrorCode.PROTOCOL_ERROR, "more padding than fits")
            taken += 1
        self._room -= length
        self._uncredited += length
        self._left = length - padding - (taken - _HEAD_BYTES)
        self._skipped = padding
        self._ends_behind = bool(flags & _END_STREAM)
        if self._left:
            self._allowed += _ALLOWED_FOR_CONTENT + length // _CONTENT_BYTES
        else:
            self._spend()
        return taken

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        match kind:
            case 1:  # _HEADERS
                self._headers(flags, stream, payload)
            case 9:  # _CONTINUATION
                self._continuation(flags, stream, payload)
            case 4:  # _SETTINGS
                self._settings(flags, stream, payload)
            case 8:  # _WINDOW_UPDATE
                self._window_update(stream, payload)
            case 6:  # _PING
                self._check(stream == 0, len(payload) == 8)
                if not flags & _ACK:
                    self._put(_PING, _ACK, 0, payload)
            case 7:  # _GOAWAY
                self._check(stream == 0, len(payload) >= 8)
                self._goaway(payload)
            case 3:  # _RST_STREAM
                self._check(stream == _STREAM, len(payload) == 4)
                self._end(f"it was broken off ({_code(_UINT.unpack(payload)[0])})")
            case 2:  # _PRIORITY
                self._check(stream != 0, len(payload) == 5)
            case _:  # _PUSH_PROMISE
                raise self._fault(ErrorCode.PROTOCOL_ERROR, "a promise that nobody wants")

    def _headers(self, flags: int, stream: int, payload: bytes) -> None:
        self._check(stream == _STREAM)
        start, padding = 0, 0
        if flags & _PADDED:
            self._check(True, bool(payload))
            start, padding = 1, payload[0]
        if flags & _PRIORITISED:
            start += 5
        if start + padding > len(payload):
            raise self._fault(ErrorCode.PROTOCOL_ERROR, "more padding than fits")
        self._block = bytearray(payload[start : len(payload) - padding])
        self._fragments = 1
        self._ends_behind = bool(flags & _END_STREAM)
        if flags & _END_HEADERS:
            self._headers_done()

    def _continuation(self, flags: int, stream: int, payload: bytes) -> None:
        if self._block is None:
            raise self._fault(ErrorCode.PROTOCOL_ERROR, "headers that have not begun")
        self._check(stream == _STREAM)
        self._block += payload
        self._fragments += 1
        if self._fragments > MAX_FRAGMENTS or len(self._block) > MAX_HEADER_BYTES:
            raise self._fault(ErrorCode.ENHANCE_YOUR_CALM, "too many headers")
        if flags & _END_HEADERS:
            self._headers_done()

    def _headers_done(self) -> None:
        assert self._block is not None
        block, self._block = bytes(self._block), None
        try:
            fields = self._decoder.decode(block, raw=True)
            headers = {bytes(name): bytes(value) for name, value in fields}
        except (HPACKError, ValueError, LookupError) as error:
            raise self._fault(ErrorCode.COMPRESSION_ERROR, "unreadable headers") from error
        if self.headers is not None:
            if not self._ends_behind:
                raise self._fault(ErrorCode.PROTOCOL_ERROR, "trailers that end nothing")
            self.trailers = headers
        elif not headers.get(_STATUS, b"").startswith(b"1"):
            self.headers = headers
        elif self._ends_behind:
            raise self._fault(ErrorCode.PROTOCOL_ERROR, "an answer without an end")

    def _settings(self, flags: int, stream: int, payload: bytes) -> None:
        self._check(stream == 0, len(payload) % _SETTING.size == 0)
        if flags & _ACK:
            self._check(True, not payload)
            return
        for name, value in _SETTING.iter_unpack(payload):
            if name == _INITIAL_WINDOW_SIZE:
                if value > _LARGEST_WINDOW:
                    raise self._fault(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
                # Section 6.9.2: what has been sent already counts, so it may become negative.
                self._stream_window += value - self._window_setting
                self._window_setting = value
            elif name == _MAX_FRAME_SIZE:
                self._check(_DEFAULT_FRAME <= value <= _LARGEST_FRAME)
                self._max_frame = value
            elif name == _ENABLE_PUSH:
                self._check(value == 0)
        self._put(_SETTINGS, _ACK, 0, b"")
        self._flush()

    def _window_update(self, stream: int, payload: bytes) -> None:
        self._check(stream in (0, _STREAM), len(payload) == _UINT.size)
        credit = _UINT.unpack(payload)[0] & _LARGEST_WINDOW
        self._check(credit > 0)
        if stream:
            self._stream_window += credit
        else:
            self._send_window += credit
        if max(self._stream_window, self._send_window) > _LARGEST_WINDOW:
            raise self._fault(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
        if self._waiting:
            self._flush()

    def _goaway(self, payload: bytes) -> None:
        last, code = (_UINT.unpack_from(payload, offset)[0] for offset in (0, _UINT.size))
        reason = f"it takes no more calls ({_code(code)})"
        if last & _LARGEST_WINDOW < _STREAM:
            self._end(reason)
        elif code:
            self.reason = reason  # the end of the connection follows

    def _end(self, reason: str) -> None:
        self.is_ended = True
        self.reason = reason
        self._left = self._skipped = 0
        self._waiting.clear()
        self.pending_bytes = 0

    def _give_credit(self) -> None:
        if self._uncredited < _CREDIT_BYTES or self.is_ended:
            return
        credit = _UINT.pack(self._uncredited)
        self._put(_WINDOW_UPDATE, 0, 0, credit)
        self._put(_WINDOW_UPDATE, 0, _STREAM, credit)
        self._room += self._uncredited
        self._uncredited = 0

    def _spend(self) -> None:
        self._allowed -= 1
        if self._allowed < 0:
            now = self._clock()
            self._allowed = (now - self._allowed_at) * _ALLOWED_A_SECOND
            self._allowed_at = now
            if self._allowed < 1:
                raise self._fault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames without content")
        self._allowed = min(self._allowed, _MAX_ALLOWED)

    def _check(self, is_fit: bool, has_fit_size: bool = True) -> None:  # noqa: FBT001, FBT002 - terse
        if not is_fit:
            raise self._fault(ErrorCode.PROTOCOL_ERROR, "a frame out of place")
        if not has_fit_size:
            raise self._fault(ErrorCode.FRAME_SIZE_ERROR, "a frame of an impossible size")

    def _fault(self, code: ErrorCode, text: str) -> Http2Error:
        """The error to raise; the far end is told as well (section 5.4.1)."""
        self.is_ended = True
        self.reason = text
        self._put(_GOAWAY, 0, 0, bytes(_UINT.size) + _UINT.pack(code))
        return Http2Error(f"HTTP/2 failed: {text}")


def _code(number: int) -> str:
    try:
        return ErrorCode(number).name
    except ValueError:
        return f"error {number}"

"""Where the body of an HTTP/1 request ends. Pure.

Sources: RFC 9112 sections 6 and 7, RFC 9110 section 6.5.1 (what may not be in trailers).
"""

import re
from typing import Final

from workers.proxy.http_guard.head import END, RequestHead, check_line_ends, fields_of
from workers.proxy.http_guard.refusal import RequestRefusedError
from workers.proxy.http_guard.rules import CHECKED_FIELDS

FRAMING_FIELDS: Final = frozenset((b"content-length", b"transfer-encoding"))

MAX_CHUNK_LINE_BYTES: Final = 4096  # with its extensions
MAX_TRAILER_BYTES: Final = 8192

_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*+)?\r\n")
_NOT_IN_TRAILERS: Final = FRAMING_FIELDS | CHECKED_FIELDS


def length_of_body(head: RequestHead) -> int | None:
    """In bytes; None stands for a body in chunks.

    Raises:
        RequestRefusedError: there is more than one way to tell, or none that is known.
    """
    lengths = head.fields.get(b"content-length", [])
    codings = head.fields.get(b"transfer-encoding", [])
    if codings:
        # Nothing but "chunked" alone: servers disagree about the rest.
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise RequestRefusedError(400, "its Transfer-Encoding is not chunked")
        if lengths:
            raise RequestRefusedError(400, "it has a Transfer-Encoding and a Content-Length")
        if not head.minor_version:
            raise RequestRefusedError(400, "HTTP/1.0 has no Transfer-Encoding")
        if head.method == b"CONNECT":
            raise RequestRefusedError(400, "a CONNECT has no body")
        return None
    if not lengths:
        return 0
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise RequestRefusedError(400, "its Content-Length is not one plain number")
    length = int(lengths[0])
    if length and head.method == b"CONNECT":
        raise RequestRefusedError(400, "a CONNECT has no body")
    return length


class ChunkedBody:
    """Takes a body in chunks apart: lines, which are held until they are whole, and content."""

    __slots__ = ("_is_behind_content", "_is_in_trailers", "is_over")

    def __init__(self) -> None:
        self._is_behind_content = False  # the next line begins with the end of a chunk
        self._is_in_trailers = False
        self.is_over = False

    def take(self, buffer: bytes | bytearray, position: int) -> tuple[int, int]:
        """(how many bytes from `position` are right, how many behind them are content).

        (0, 0) when the line is not whole yet. The content need not be in `buffer`, and the next
        call is for what follows it.

        Raises:
            RequestRefusedError: these are no chunks.
        """
        if self._is_in_trailers:
            return self._trailers(buffer, position), 0
        start = position + 2 if self._is_behind_content else position
        end = buffer.find(b"\n", start, position + MAX_CHUNK_LINE_BYTES) + 1
        if not end:
            if len(buffer) - position >= MAX_CHUNK_LINE_BYTES:
                raise RequestRefusedError(400, "its body is not chunked as it says")
            return 0, 0
        matched = _CHUNK_LINE.fullmatch(buffer, start, end)
        if matched is None or (self._is_behind_content and buffer[position:start] != b"\r\n"):
            raise RequestRefusedError(400, "its body is not chunked as it says")
        size = int(matched[1], 16)
        self._is_behind_content = True
        self._is_in_trailers = not size
        return end - position, size

    def _trailers(self, buffer: bytes | bytearray, position: int) -> int:
        if buffer.startswith(b"\r\n", position):
            self.is_over = True
            return 2
        end = buffer.find(END, position, position + MAX_TRAILER_BYTES)
        if end < 0:
            if len(buffer) - position >= MAX_TRAILER_BYTES:
                raise RequestRefusedError(
                    431, f"it has more than {MAX_TRAILER_BYTES} bytes of trailers"
                )
            return 0
        end += len(END)
        trailers = bytes(buffer[position:end])
        check_line_ends(trailers)
        if fields_of(trailers, _NOT_IN_TRAILERS):
            raise RequestRefusedError(400, "a trailer changes what its head says")
        self.is_over = True
        return end - position

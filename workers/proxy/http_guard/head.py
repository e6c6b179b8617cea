"""Heads of HTTP/1 requests, and trailers: where they end, and what is in them. Pure.

What could be read in two ways is refused: a bare CR or LF, a NUL, a folded line, a space before a
colon, more than one space in the request line, a version other than 1.0 and 1.1.

Sources: RFC 9112 sections 2 to 3 and 5, RFC 9110 section 5.
"""

import re
from collections.abc import Container
from typing import Final, NamedTuple

from workers.proxy.http_guard.classifier import TCHAR
from workers.proxy.http_guard.refusal import RequestRefusedError

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_FIELDS: Final = 256

END: Final = b"\r\n\r\n"
_LINE_END: Final = b"\r\n"

# 8-bit bytes in a path are against the grammar, but curl sends what its user types.
_REQUEST_LINE = re.compile(rb"([" + TCHAR + rb"]++) ([^\x00-\x20\x7f]++) HTTP/1\.([01])")
_NAME = re.compile(rb"[" + TCHAR + rb"]++")
_ABSOLUTE_FORM = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*+://([^/?#]*+)([/?#][^\r\n]*+)?")


class RequestHead(NamedTuple):
    """`authority` is that of the target, None when it has none. `fields` are those asked for."""

    method: bytes
    authority: bytes | None
    minor_version: int  # HTTP/1.0 or HTTP/1.1
    fields: dict[bytes, list[bytes]]


class HeadEnd:
    """Finds the end of a head that comes in pieces; looks at each byte once."""

    __slots__ = ("_scanned",)

    def __init__(self) -> None:
        self._scanned = 0  # bytes without an end and without a CR at their own end

    def find(self, buffer: bytes | bytearray, start: int, limit: int) -> int:
        """Behind the empty line of the head that begins at `start`; 0 while it has not come.

        Raises:
            RequestRefusedError: a bare CR or LF or NUL comes first, or more than `limit` bytes.
        """
        last = min(len(buffer), start + limit)
        begin = start + self._scanned
        found = buffer.find(END, max(start, begin - len(END)), last)
        stop = found + len(END) if found >= 0 else last
        if found < 0 and buffer.endswith(b"\r", begin, stop):
            stop -= 1
        part = buffer[begin:stop]
        check_line_ends(part)
        if found >= 0:
            self._scanned = 0
            return stop
        if last - start == limit:
            raise RequestRefusedError(431, f"its head is larger than {limit} bytes")
        self._scanned = stop - start
        return 0


def check_line_ends(part: bytes | bytearray) -> None:
    """Lines end with CR LF, and neither of them nor NUL stands anywhere else.

    Raises:
        RequestRefusedError: servers disagree about what the lines are.
    """
    ends = part.count(_LINE_END)
    if part.count(b"\n") != ends or part.count(b"\r") != ends or 0 in part:
        raise RequestRefusedError(400, "its head has a line end or a byte that is not allowed")


def parse(head: bytes, wanted: Container[bytes]) -> RequestHead:
    """Reads a head as `HeadEnd` found it. `wanted` are names of fields in lower case.

    Raises:
        RequestRefusedError: it does not keep to the grammar.
    """
    line, _, block = head.partition(_LINE_END)
    matched = _REQUEST_LINE.fullmatch(line)
    if matched is None:
        raise RequestRefusedError(400, "its request line is not well formed")
    method, target, minor = matched.groups()
    return RequestHead(
        method=method,
        authority=_authority(method, target),
        minor_version=int(minor),
        fields=fields_of(block, wanted),
    )


def fields_of(block: bytes, wanted: Container[bytes]) -> dict[bytes, list[bytes]]:
    """The values of wanted fields, by name in lower case.

    `block` ends with an empty line and has passed `check_line_ends`.

    Raises:
        RequestRefusedError: a line is no field, or there are more than MAX_FIELDS.
    """
    fields: dict[bytes, list[bytes]] = {}
    if block == _LINE_END:
        return fields
    if block.count(_LINE_END) > MAX_FIELDS + 1:
        raise RequestRefusedError(431, f"it has more than {MAX_FIELDS} header fields")
    for line in block.removesuffix(END).split(_LINE_END):
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name):
            raise RequestRefusedError(400, "a line of its head is no header field")
        name = name.lower()
        if name in wanted:
            fields.setdefault(name, []).append(value.strip(b" \t"))
    return fields


def _authority(method: bytes, target: bytes) -> bytes | None:
    """The authority in the target, by the four forms of RFC 9112 section 3.2."""
    if method == b"CONNECT":
        return target
    if target.startswith(b"/") or (target == b"*" and method == b"OPTIONS"):
        return None
    matched = _ABSOLUTE_FORM.fullmatch(target)
    if matched is None:
        raise RequestRefusedError(400, "its target is none that HTTP knows")
    return matched[1]

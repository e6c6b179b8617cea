"""What is said about a request that does not pass: to the log and to the program. Pure.

Sources: RFC 9110 section 15.5 (the statuses), RFC 9112 section 9.6 (the end of a connection),
RFC 9113 sections 5.4, 6.8 and 8.1.
"""

import struct
from http import HTTPStatus
from typing import Final, NamedTuple

from hpack import Encoder

_MAX_HOST_TEXT: Final = 255

# Without the app's name: the page that reads this may be the one that was refused.
_TEXTS: Final = {
    400: "This request is not whole or could be read in two ways, so VNet does not pass it on.",
    403: (
        "VNet does not pass on requests that a page of another site makes; "
        "security.http_origins in its configuration allows the site."
    ),
    408: "The head of this request did not come in time.",
    421: (
        "VNet passes on only requests that name the app: use its own name in the address, or "
        "allow this one with security.http_hosts in VNet's configuration."
    ),
    431: "The head of this request is larger than 64 KB.",
}

_FRAME = struct.Struct(">HBBBI")  # length in 24 bits, type, flags, stream
_UINT2 = struct.Struct(">II")
_DATA, _HEADERS, _SETTINGS, _GOAWAY = 0, 1, 4, 7
_END_STREAM, _END_HEADERS = 0x1, 0x4
_NO_ERROR, _PROTOCOL_ERROR = 0, 1


class RequestRefusedError(Exception):
    """A request that must not reach the app. The reason is a clause without foreign text."""

    def __init__(self, status: int, reason: str, *, host: bytes = b"", stream: int = 0) -> None:
        """`stream` is that of HTTP/2, if one request and not the whole connection is wrong."""
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.host = host
        self.stream = stream


class Refused(NamedTuple):
    """Why a request does not pass. `reason` and `host` are printable and short: safe to log.

    `response` is for the program in place of the app's answer; empty when there is no safe place
    for it. It must not be sent either once anything of the app has reached the program.
    """

    status: int  # as in HTTP: 400, 403, 408, 421 or 431
    reason: str  # a clause: "the Host is not a name of the app"
    host: str  # as the request has it, empty when it has none
    response: bytes


def refused(error: RequestRefusedError, *, has_place: bool, is_http2: bool) -> Refused:
    """`has_place`: nothing else is on its way to the program."""
    response = b""
    if has_place:
        response = _http2(error.status, error.stream) if is_http2 else _http1(error.status)
    return Refused(error.status, error.reason, _printable(error.host), response)


def _printable(host: bytes) -> str:
    text = host[: _MAX_HOST_TEXT + 1].decode("ascii", "replace")
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= _MAX_HOST_TEXT else f"{text[: _MAX_HOST_TEXT - 3]}..."


def _http1(status: int) -> bytes:
    text = f"{_TEXTS[status]}\n"
    head = (
        f"HTTP/1.1 {status} {_phrase(status)}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(text)}\r\n"
        "Cache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Connection: close\r\n"
        "\r\n"
    )
    return f"{head}{text}".encode()


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase


def _http2(status: int, stream: int) -> bytes:
    """A server's first frames and its last."""
    frames = _frame(_SETTINGS, 0, 0, b"")
    if not stream:
        return frames + _frame(_GOAWAY, 0, 0, _UINT2.pack(0, _PROTOCOL_ERROR))
    text = f"{_TEXTS[status]}\n".encode()
    fields = [
        (":status", str(status)),
        ("content-type", "text/plain; charset=utf-8"),
        ("content-length", str(len(text))),
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
    ]
    frames += _frame(_HEADERS, _END_HEADERS, stream, Encoder().encode(fields))
    frames += _frame(_DATA, _END_STREAM, stream, text)
    return frames + _frame(_GOAWAY, 0, 0, _UINT2.pack(stream, _NO_ERROR))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    length = len(payload)
    return _FRAME.pack(length >> 8, length & 0xFF, kind, flags, stream) + payload

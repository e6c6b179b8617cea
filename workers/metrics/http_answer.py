"""Answers one HTTP request for the metrics (RFC 9110, RFC 9112). Pure.

Only GET and HEAD of `/metrics`, and a hint at `/`. The Host header must be an address, `localhost` or this
machine's name: a web page whose own name leads here (DNS rebinding) is refused, because its browser sends
that name. Every answer ends the connection.
"""

import re
from collections.abc import Callable, Collection
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

PATH: Final = "/metrics"
TEXT: Final = "text/plain; charset=utf-8"
# RFC 9112 section 3 and RFC 9110 section 5.6.2.
_REQUEST_LINE: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) (\S{1,4096}) HTTP/1\.([01])")
_FIELD_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NOT_IN_VALUES: Final = frozenset("\r\n\0")
_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]@/\s]+))(?::[0-9]{0,5})?")

# Content type and body for an Accept header.
Render = Callable[[str], tuple[str, bytes]]


class Answer(NamedTuple):
    """`response` is the whole of it, as bytes to be sent."""

    status: HTTPStatus
    response: bytes


class _Request(NamedTuple):
    method: str
    target: str
    minor: int  # of HTTP/1
    hosts: list[str]
    accept: str


def answer(head: bytes, names: Collection[str], render: Render) -> Answer:
    """The answer to a request; `head` ends with its empty line.

    `names` are those of this machine in lower case. A body is not looked at.
    """
    request = _parse(head)
    if request is None:
        return plain(HTTPStatus.BAD_REQUEST, "This is no HTTP/1 request.")
    is_head = request.method == "HEAD"
    if len(request.hosts) > 1 or (request.minor == 1 and not request.hosts):
        return plain(HTTPStatus.BAD_REQUEST, "One Host header is needed.", is_head=is_head)
    if request.hosts and not is_own(request.hosts[0], names):
        text = "Use an address of this machine, localhost or its name as the host."
        return plain(HTTPStatus.MISDIRECTED_REQUEST, text, is_head=is_head)
    if request.method not in ("GET", "HEAD"):
        return plain(HTTPStatus.METHOD_NOT_ALLOWED, "Use GET.", extra="Allow: GET, HEAD\r\n")
    path = request.target.partition("?")[0]
    if path == "/":
        return plain(HTTPStatus.OK, f"The metrics of VNet are at {PATH}.", is_head=is_head)
    if path != PATH:
        return plain(HTTPStatus.NOT_FOUND, f"There is only {PATH}.", is_head=is_head)
    content_type, body = render(request.accept)
    return Answer(
        HTTPStatus.OK, _response(HTTPStatus.OK, content_type, body, is_head=is_head, extra="")
    )


def plain(status: HTTPStatus, text: str, *, is_head: bool = False, extra: str = "") -> Answer:
    """An answer of one line; `extra` are header lines."""
    body = f"{text}\n".encode()
    return Answer(status, _response(status, TEXT, body, is_head=is_head, extra=extra))


def is_own(host: str, names: Collection[str]) -> bool:
    """Whether the value of a Host header is an address or one of the names, with any port."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    ipv6, name = match.groups()
    if ipv6 is None and name.lower().removesuffix(".") in names:
        return True
    try:
        return bool(IPv4Address(name) if ipv6 is None else IPv6Address(ipv6))
    except ValueError:
        return False


def _parse(head: bytes) -> _Request | None:
    # Latin-1 takes any byte, and what is compared is ASCII.
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    match = _REQUEST_LINE.fullmatch(first)
    if match is None:
        return None
    method, target, minor = match.groups()
    hosts: list[str] = []
    accepted: list[str] = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or _FIELD_NAME.fullmatch(name) is None or not _NOT_IN_VALUES.isdisjoint(value):
            return None
        if name.lower() == "host":
            hosts.append(value.strip(" \t"))
        elif name.lower() == "accept":
            accepted.append(value.strip(" \t"))
    return _Request(method, target, int(minor), hosts, ",".join(accepted))


def _response(
    status: HTTPStatus, content_type: str, body: bytes, *, is_head: bool, extra: str
) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        f"{extra}"
        "Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + (b"" if is_head else body)

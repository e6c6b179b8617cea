"""Parts of HTTP/1.1 heads: an answer's status and fields, and what comes behind it. Pure.

Source: RFC 9112 sections 3.2, 4 and 5.
"""

import re
from http import HTTPStatus

# Servers and balancers allow 8 to 64 KiB; what is read here has a few short fields.
MAX_HEAD_BYTES = 16 * 1024

# Firewalls for the web refuse requests without one.
USER_AGENT = "vnet"

_HOST = re.compile(r"[0-9A-Za-z._:-]{1,255}")
_STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: .*)?")


class HttpHeadError(Exception):
    """Not fit for an HTTP head, or no HTTP answer. The text is safe to log and show."""


class HttpHead:
    """Collects an answer's head. `status` and `fields` (names in lower case) are set with it."""

    __slots__ = ("_collected", "fields", "status")

    def __init__(self) -> None:
        self._collected = b""
        self.status = 0
        self.fields: dict[str, str] = {}

    def feed(self, data: bytes | memoryview) -> bytes | None:
        """What follows the head in `data`, once the head is complete; None until then.

        Raises:
            HttpHeadError: no answer will come of this.
        """
        self._collected += data
        head, separator, rest = self._collected.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD_BYTES:
            raise HttpHeadError(f"an HTTP head of more than {MAX_HEAD_BYTES} bytes")
        if not b"HTTP/1.".startswith(head[:7]):
            raise HttpHeadError("no HTTP/1.1 answer")
        if not separator:
            return None
        self._collected = b""
        self._parse(head)
        return rest

    def _parse(self, head: bytes) -> None:
        start, *lines = head.split(b"\r\n")
        matched = _STATUS_LINE.fullmatch(start)
        if matched is None:
            raise HttpHeadError("no HTTP/1.1 answer")
        self.status = int(matched[1])
        for line in lines:
            name, _, value = line.decode("latin-1").partition(":")
            # Fields that may come more than once are lists (RFC 9110 section 5.2).
            before = self.fields.get(name.lower())
            value = value.strip(" \t")
            self.fields[name.lower()] = value if before is None else f"{before}, {value}"


def describe(status: int) -> str:
    """A status with its registered words, never the server's own."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def authority(host: str, port: int) -> str:
    """`host:port` as a request names its target (RFC 9110 section 7.2).

    Raises:
        HttpHeadError: this is neither a host name in ASCII nor an address.
    """
    if not _HOST.fullmatch(host):
        raise HttpHeadError("the host name is not valid")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

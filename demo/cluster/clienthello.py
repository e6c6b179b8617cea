"""Reads the server name and the ALPN list out of a TLS ClientHello. Pure.

    record:    | 22 | version, 2 | length, 2 | handshake bytes |     RFC 8446 section 5.1
    handshake: | 1 | length, 3 | version, 2 | random, 32 | session id, <1> | suites, <2> |
               | compression, <1> | extensions, <2> |                        section 4.1.2

A ClientHello may be cut into several records. The parser raises only ClientHelloError.
"""

from dataclasses import dataclass

from demo.cluster.errors import ClientHelloError

# A hello with post-quantum key shares has about 1800 bytes; sixteen times that is no hello.
MAX_CLIENT_HELLO_BYTES = 32 * 1024

_RECORD_HANDSHAKE = 22
_MAX_RECORD_BYTES = 16384  # RFC 8446 section 5.1
_CLIENT_HELLO = 1
_SERVER_NAME = 0  # RFC 6066 section 3
_ALPN = 16  # RFC 7301 section 3.1


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What routing needs: `server_name` is None without SNI, `alpn` keeps the client's order."""

    server_name: str | None
    alpn: tuple[str, ...]


class _Cursor:
    """Bounds-checked reading of one byte string."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise ClientHelloError("a length points past the end of the ClientHello")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, length_size: int) -> "_Cursor":
        return _Cursor(self.take(self.number(length_size)))

    def rest(self) -> bytes:
        return self._data[self._at :]


def parse_client_hello(data: bytes, limit: int = MAX_CLIENT_HELLO_BYTES) -> ClientHello | None:
    """The ClientHello at the start of `data`, or None while more bytes are needed.

    Raises:
        ClientHelloError: and nothing else: this will never become a ClientHello.
    """
    handshake = _handshake_bytes(data, limit)
    if handshake[:1] and handshake[0] != _CLIENT_HELLO:
        raise ClientHelloError(f"handshake message {handshake[0]} is no ClientHello")
    if len(handshake) < 4:
        return None
    length = int.from_bytes(handshake[1:4], "big")
    if length > limit:
        raise ClientHelloError(f"a ClientHello of {length} bytes is too large")
    if len(handshake) < 4 + length:
        return None
    return _parse_body(_Cursor(handshake[4 : 4 + length]))


def _handshake_bytes(data: bytes, limit: int) -> bytes:
    """The handshake bytes of all records in `data`, the last one perhaps incomplete."""
    collected = b""
    at = 0
    while at < len(data) and len(collected) <= limit:
        if data[at] != _RECORD_HANDSHAKE:
            raise ClientHelloError(f"record type {data[at]} before the ClientHello ended")
        if len(data) - at < 5:
            break
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at + 1] != 3 or not 0 < length <= _MAX_RECORD_BYTES:
            raise ClientHelloError("not a TLS record")
        collected += data[at + 5 : at + 5 + length]
        if _is_complete(collected):
            break
        at += 5 + length
    return collected


def _is_complete(handshake: bytes) -> bool:
    return len(handshake) >= 4 and len(handshake) - 4 >= int.from_bytes(handshake[1:4], "big")


def _parse_body(body: _Cursor) -> ClientHello:
    body.take(2 + 32)
    body.vector(1)
    body.vector(2)
    body.vector(1)
    server_name: str | None = None
    alpn: tuple[str, ...] = ()
    # Hellos before TLS 1.3 may end without extensions.
    extensions = body.vector(2) if body else _Cursor(b"")
    while extensions:
        kind = extensions.number(2)
        content = extensions.vector(2)
        if kind == _SERVER_NAME:
            server_name = _parse_server_name(content)
        elif kind == _ALPN:
            alpn = _parse_alpn(content)
    return ClientHello(server_name, alpn)


def _parse_server_name(content: _Cursor) -> str | None:
    names = content.vector(2)
    while names:
        kind = names.number(1)
        name = names.vector(2).rest()
        if kind == 0:
            return _ascii(name)
    return None


def _parse_alpn(content: _Cursor) -> tuple[str, ...]:
    entries = content.vector(2)
    found: list[str] = []
    while entries:
        found.append(_ascii(entries.vector(1).rest()))
    return tuple(found)


def _ascii(text: bytes) -> str:
    try:
        return text.decode("ascii")
    except UnicodeDecodeError as error:
        raise ClientHelloError(f"{text!r} is not ASCII") from error

"""SQL Server's PRELOGIN, as the proxy answers it (lib/srv/db/sqlserver/proxy.go).

| type | status | length, 2, of all | process, 2 | number | window |     [MS-TDS] section 2.2.3.1
"""

from collections.abc import Awaitable, Callable

from demo.cluster.errors import DatabaseError, EmbeddedClusterError
from demo.cluster.streams import BufferedReads, Streams, TcpStream, closing_on_error

PRELOGIN = 0x12
LOGIN7 = 0x10
RESPONSE = 0x04
_END_OF_MESSAGE = 1
_MAX_PACKET_BYTES = 32 * 1024
_MAX_LOGIN_BYTES = 128 * 1024  # [MS-TDS] section 2.2.6.4

# Options (token, value) of section 2.2.6.5: a version, encryption not supported, no instance
# to check, no thread, one result set at a time.
_OPTIONS = (
    (0, bytes.fromhex("0f0007d00000")),
    (1, b"\x02"),
    (2, b"\0"),
    (3, b""),
    (4, b"\0"),
)
_ERROR_NUMBER = 28353
_SECURITY_CLASS = 14


async def begin(client: BufferedReads, dial: Callable[[], Awaitable[Streams]]) -> Streams:
    """Takes PRELOGIN and LOGIN7, and sends the latter to the database after a PRELOGIN of its own.

    Raises:
        DatabaseError: one of the two does not speak TDS.
        EmbeddedClusterError, OSError: from `dial`; the client is told.
    """
    await _read_message(client, PRELOGIN)
    await client.write(encode_packet(RESPONSE, encode_prelogin()))
    login = await _read_message(client, LOGIN7)
    try:
        backend = await dial()
    except (EmbeddedClusterError, OSError) as error:
        await client.write(encode_packet(RESPONSE, _encode_error(str(error))))
        raise
    async with closing_on_error(backend):
        server = BufferedReads(TcpStream(*backend))
        await server.write(encode_packet(PRELOGIN, encode_prelogin()))
        await _read_message(server, RESPONSE)
        await server.write(login)
    return backend


async def _read_message(stream: BufferedReads, kind: int) -> bytes:
    """All packets of one message, with their headers."""
    message = b""
    while True:
        head = await stream.read_exactly(8)
        length = int.from_bytes(head[2:4], "big")
        if head[0] != kind or not 8 <= length <= _MAX_PACKET_BYTES:
            raise DatabaseError(f"a TDS packet of type {head[0]}, {length} bytes")
        message += head + await stream.read_exactly(length - 8)
        if head[1] & _END_OF_MESSAGE:
            return message
        if len(message) > _MAX_LOGIN_BYTES:
            raise DatabaseError("a TDS message is too long")


def encode_packet(kind: int, body: bytes) -> bytes:
    """A message of one packet."""
    head = bytes([kind, _END_OF_MESSAGE]) + (len(body) + 8).to_bytes(2, "big")
    return head + b"\0\0\1\0" + body


def encode_prelogin() -> bytes:
    """The options that say: no encryption in here."""
    offset = 5 * len(_OPTIONS) + 1
    index = b""
    for token, value in _OPTIONS:
        index += bytes([token]) + offset.to_bytes(2, "big") + len(value).to_bytes(2, "big")
        offset += len(value)
    return index + b"\xff" + b"".join(value for _, value in _OPTIONS)


def _encode_error(message: str) -> bytes:
    """ERROR and DONE tokens (sections 2.2.7.10 and 2.2.7.6)."""
    text = message[:1000]
    body = _ERROR_NUMBER.to_bytes(4, "little") + bytes([1, _SECURITY_CLASS])
    body += len(text).to_bytes(2, "little") + text.encode("utf-16-le")
    body += b"\0\0" + (0).to_bytes(4, "little")  # no server and procedure name, no line
    return b"\xaa" + len(body).to_bytes(2, "little") + body + b"\xfd\x02\0\0\0" + bytes(8)

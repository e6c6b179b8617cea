"""PostgreSQL's start-up packets, as the proxy takes them (lib/srv/db/postgres/proxy.go).

| length, 4, of all | code or version, 4 | parameters |     PostgreSQL manual, chapter 55.7
"""

from collections.abc import Awaitable, Callable

from demo.cluster.errors import DatabaseError, EmbeddedClusterError
from demo.cluster.streams import BufferedReads, Streams, closing_on_error

SSL_REQUEST = 80877103
GSSENC_REQUEST = 80877104
CANCEL_REQUEST = 80877102
_VERSION_3 = 3
# PostgreSQL's own limit of a start-up packet.
_MAX_STARTUP_BYTES = 10_000


async def begin(client: BufferedReads, dial: Callable[[], Awaitable[Streams]]) -> Streams:
    """Takes packets up to the one that starts a session, or cancels one, and sends that on.

    Raises:
        DatabaseError: these are no packets of PostgreSQL, or an encryption is asked for twice.
        EmbeddedClusterError, OSError: from `dial`; the client is told.
    """
    packet = await _read_startup(client)
    try:
        backend = await dial()
    except (EmbeddedClusterError, OSError) as error:
        await client.write(encode_error(str(error)))
        raise
    async with closing_on_error(backend):
        backend[1].write(packet)
        await backend[1].drain()
    return backend


async def _read_startup(client: BufferedReads) -> bytes:
    refused: set[int] = set()
    while True:
        head = await client.read_exactly(8)
        length, code = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")
        if not 8 <= length <= _MAX_STARTUP_BYTES:
            raise DatabaseError(f"a start-up packet of {length} bytes")
        packet = head + await client.read_exactly(length - 8)
        if code == CANCEL_REQUEST or code >> 16 == _VERSION_3:
            return packet
        if code not in {SSL_REQUEST, GSSENC_REQUEST} or code in refused:
            raise DatabaseError(f"start-up packet {code} is not expected")
        refused.add(code)
        await client.write(b"N")


def encode_error(message: str) -> bytes:
    """An ErrorResponse that holds only a message, as Teleport's."""
    body = b"M" + message.encode() + b"\0\0"
    return b"E" + (len(body) + 4).to_bytes(4, "big") + body

"""What the proxy does in a database's own protocol before it forwards bytes.

    postgres, cockroachdb   SSLRequest and GSSENCRequest get an N, then the start-up packet goes on
    mysql                   the proxy greets, takes any password and logs in by itself
    sqlserver               the proxy answers PRELOGIN: no encryption; LOGIN7 goes on
    others                  nothing

All of it is inside the TLS connection that the certificate came with (lib/srv/db/proxyserver.go).
A refusal after the client has spoken is an error of its protocol. Where a real agent proves the
user's identity to the database, this one logs in without a password.
"""

import asyncio
from collections.abc import Awaitable, Callable

from demo.cluster import mysql, postgres, sqlserver
from demo.cluster.streams import BufferedReads, ByteStream, Streams, forward

# More time than any client needs to say what it wants, and a database to log it in.
BEGIN_SECONDS = 60.0

Dial = Callable[[], Awaitable[Streams]]
_Begin = Callable[[BufferedReads, Dial], Awaitable[Streams]]

_PROTOCOLS: dict[str, _Begin] = {
    "postgres": postgres.begin,
    "cockroachdb": postgres.begin,
    "mysql": mysql.begin,
    "sqlserver": sqlserver.begin,
}


async def serve_database(client: ByteStream, protocol: str, dial: Dial) -> None:
    """Serves one client until both directions have ended.

    `dial` connects to the database; what it raises is told to the client.

    Raises:
        EmbeddedClusterError, OSError: the client is refused, knows why, and can be closed.
        ExceptionGroup: of these; a connection broke.
    """
    stream = BufferedReads(client)
    begin = _PROTOCOLS.get(protocol)
    async with asyncio.timeout(BEGIN_SECONDS):
        backend = await (begin(stream, dial) if begin else dial())
    await forward(stream, backend)

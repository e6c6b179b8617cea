"""Beginnings and endings of asyncio streams: what is copied arrives, nothing is left open."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

READ_BYTES = 64 * 1024

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def listening_socket(host: str, port: int) -> socket.socket:
    """A TCP socket that listens on an IPv4 or IPv6 address; port 0 takes a free one.

    The protocol is named because asyncio sets TCP_NODELAY only where it reads IPPROTO_TCP, and
    accepted sockets inherit it; `socket.create_server` leaves it 0, at 40 ms per small answer.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # A proxy that was down takes its port again at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.asynccontextmanager
async def closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Closes a connection after the block: with all its data, or at once when the block failed."""
    try:
        yield
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    except BaseException:
        writer.transport.abort()
        raise


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies until the end, then ends the other side's direction too."""
    while data := await reader.read(READ_BYTES):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def forward(client: Streams, backend: Streams) -> None:
    """Copies both ways until both have ended; closes the backend.

    Raises:
        ExceptionGroup: of OSErrors; one of the connections broke.
    """
    async with closing(backend[1]), asyncio.TaskGroup() as group:
        group.create_task(copy(client[0], backend[1]))
        group.create_task(copy(backend[0], client[1]))

"""Beginnings and endings of byte streams: what is copied arrives, nothing is left open."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from demo.cluster.errors import TruncatedStreamError

READ_BYTES = 64 * 1024

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ByteStream(Protocol):
    """Bytes both ways, each direction with its own end; layers are put on top of each other.

    One task may read while others write. A write hands its bytes to the layer below before it
    first waits, so that what several tasks write stays in order.
    """

    async def read(self) -> bytes:
        """Some bytes; empty at the end of the direction."""

    async def write(self, data: bytes) -> None:
        """Sends `data` whole and in one go; waits while the peer reads too slowly."""

    async def write_eof(self) -> None:
        """Ends the own direction; reading goes on."""


class TcpStream:
    """A connection of asyncio as a `ByteStream`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        return await self._reader.read(READ_BYTES)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def write_eof(self) -> None:
        self._writer.write_eof()


class BufferedReads:
    """A `ByteStream` with bytes that were received before, and reading by size."""

    def __init__(self, below: ByteStream, received: bytes = b"") -> None:
        self._below = below
        self._received = received

    async def read(self) -> bytes:
        if self._received:
            received, self._received = self._received, b""
            return received
        return await self._below.read()

    async def write(self, data: bytes) -> None:
        await self._below.write(data)

    async def write_eof(self) -> None:
        await self._below.write_eof()

    async def read_exactly(self, size: int) -> bytes:
        """So many bytes.

        Raises:
            TruncatedStreamError: the peer ended its direction before.
        """
        while len(self._received) < size:
            data = await self._below.read()
            if not data:
                raise TruncatedStreamError(f"the stream ended where {size} bytes were due")
            self._received += data
        piece, self._received = self._received[:size], self._received[size:]
        return piece


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


def abort(writer: asyncio.StreamWriter) -> None:
    """Closes a connection at once, if it is not."""
    # What was closed while data was waiting forgets that it is, and its event loop
    # (asyncio.selector_events of CPython 3.11 to 3.13).
    with contextlib.suppress(AttributeError):
        writer.transport.abort()


@contextlib.asynccontextmanager
async def closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Closes a connection after the block: with all its data, or at once when the block failed."""
    try:
        yield
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    except BaseException:
        abort(writer)
        raise


@contextlib.asynccontextmanager
async def closing_on_error(streams: Streams) -> AsyncIterator[None]:
    """Closes a connection at once when the block fails."""
    try:
        yield
    except BaseException:
        abort(streams[1])
        raise


@contextlib.asynccontextmanager
async def repeating(send: Callable[[], Awaitable[None]], seconds: float) -> AsyncIterator[None]:
    """Sends something at an interval while the block runs; 0 seconds means never."""
    if not seconds:
        yield
        return
    task = asyncio.create_task(_repeat(send, seconds))
    try:
        yield
    finally:
        task.cancel()
        # Its failure is the connection's, and the next read or write tells.
        await asyncio.gather(task, return_exceptions=True)


async def _repeat(send: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        await send()


async def copy(source: ByteStream, destination: ByteStream) -> None:
    """Copies until the end, then ends the other side's direction too."""
    while data := await source.read():
        await destination.write(data)
    await destination.write_eof()


async def forward(client: ByteStream, backend: Streams) -> None:
    """Copies both ways until both have ended; closes the backend.

    Raises:
        ExceptionGroup: of OSErrors (SSLErrors among them) and EmbeddedClusterErrors; one of the
            connections broke.
    """
    server = TcpStream(*backend)
    async with closing(backend[1]), asyncio.TaskGroup() as group:
        group.create_task(copy(client, server))
        group.create_task(copy(server, client))

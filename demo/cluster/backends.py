"""What apps lead to: real addresses, and small servers that run inside the cluster.

A built-in backend is reached over a socket pair, so it needs no port of the machine.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from html import escape

from demo.cluster.config import BUILTIN_SUFFIX
from demo.cluster.streams import Streams, TcpStream, closing, copy

logger = logging.getLogger(__name__)

DIAL_SECONDS = 10.0

_Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]

_PAGE = """<!doctype html>
<html><head><title>Hello from VNet</title></head>
<body><h1>Hello from VNet</h1>
<p>This page came through a Teleport cluster. You asked for {host}, {path}.</p></body></html>
"""


class Backends:
    """Dials backends and runs the built-in ones."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def dial(self, host: str, port: int) -> Streams:
        """A connection to a backend.

        Raises:
            OSError: it cannot be reached.
        """
        if host.endswith(BUILTIN_SUFFIX):
            return await self._dial_builtin(host, port)
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                return await asyncio.open_connection(host, port)
        except TimeoutError as error:
            raise TimeoutError(f"{host} does not answer within {DIAL_SECONDS:g} s") from error

    async def _dial_builtin(self, host: str, port: int) -> Streams:
        serve = _BUILTIN.get(host.removesuffix(BUILTIN_SUFFIX))
        if serve is None:
            raise ConnectionRefusedError(f"no built-in backend is called {host}")
        ours, theirs = socket.socketpair()
        task = asyncio.create_task(_run(serve, theirs, port), name=host)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.open_connection(sock=ours)

    async def stop(self) -> None:
        """Ends all built-in backends."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _run(serve: _Serve, sock: socket.socket, port: int) -> None:
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        async with closing(writer):
            await serve(reader, writer, port)
    except OSError as error:
        logger.debug("a built-in backend lost its connection: %s", error)


async def _serve_echo(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _port: int
) -> None:
    stream = TcpStream(reader, writer)
    await copy(stream, stream)


async def _serve_ports(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int
) -> None:
    writer.write(f"{port}\n".encode())
    await _serve_echo(reader, writer, port)


async def _serve_hello(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _port: int
) -> None:
    """One HTTP request, one page (RFC 9112, connection closed after it)."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return
    lines = head.decode("latin-1").split("\r\n")
    method, path = [*lines[0].split(" "), "", ""][:2]
    hosts = (line.partition(":")[2].strip() for line in lines if line.lower().startswith("host:"))
    body = _PAGE.format(host=escape(next(hosts, "?")), path=escape(path)).encode()
    status = "200 OK" if method in {"GET", "HEAD"} else "405 Method Not Allowed"
    writer.write(
        f"HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
    )
    if method != "HEAD":
        writer.write(body)
    await writer.drain()


_BUILTIN: dict[str, _Serve] = {
    "hello": _serve_hello,
    "echo": _serve_echo,
    "ports": _serve_ports,
}

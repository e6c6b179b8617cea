"""Ways to a TLS server of a cluster: straight through TCP, or in a WebSocket.

The third way is `workers.proxy.teleport.proxy_cluster`; `workers.proxy.teleport.routes` chooses.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial

from workers.proxy.connection_upgrade import ALPN_PING, ConnectionUpgrade
from workers.proxy.dial import DialError, connect_tcp
from workers.proxy.layers import LayerError
from workers.proxy.teleport.channel import TLS_SHUTDOWN_SECONDS
from workers.proxy.teleport.errors import UnreachableError, safe_text
from workers.proxy.teleport.pipe import CHUNK_BYTES, Line, open_pipe, pump
from workers.proxy.teleport.routes import AuthRoute
from workers.proxy.websocket import WebSocketClient


async def _connect_tcp(route: AuthRoute) -> socket.socket:
    try:
        return await connect_tcp(route.host, route.port, http_proxy=route.http_proxy)
    except DialError as error:
        raise UnreachableError(safe_text(str(error))) from error


class DirectCarrier:
    """TCP, through a forward proxy where the route names one."""

    is_kept = False

    def __init__(self, route: AuthRoute) -> None:
        self._route = route

    async def connect(self) -> Line:
        """See `Carrier`."""
        return Line(await _connect_tcp(self._route))

    def suspect(self, since: float) -> None:
        """Nothing is kept."""


class UpgradeCarrier:
    """A WebSocket inside the TLS of a load balancer.

    `make_context` gives the context for that TLS (`contexts.upgrade_context`).
    """

    is_kept = False

    def __init__(
        self, route: AuthRoute, make_context: Callable[[], Awaitable[ssl.SSLContext]]
    ) -> None:
        self._route = route
        self._make_context = make_context

    async def connect(self) -> Line:
        """See `Carrier`."""
        route, context = self._route, await self._make_context()
        try:
            reader, writer = await self._open_outer(context)
        except ssl.SSLCertVerificationError as error:
            raise UnreachableError(
                f"{route.host}: the web port's certificate is not trusted "
                f"({safe_text(error.verify_message, 100)}): name its authority in ca_file of "
                "[teleport]"
            ) from error
        except ssl.SSLError as error:
            reason = safe_text(str(error.reason or "no reason given"), 100)
            raise UnreachableError(f"{route.host}: TLS failed at the web port: {reason}") from error
        try:
            early = await self._upgrade(reader, writer)
        except LayerError as error:
            writer.transport.abort()
            raise UnreachableError(f"{route.host}: {safe_text(str(error))}") from error
        except BaseException:
            writer.transport.abort()
            raise
        return open_pipe(partial(_serve, reader, writer, early))

    async def _open_outer(
        self, context: ssl.SSLContext
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = await _connect_tcp(self._route)
        try:
            return await asyncio.open_connection(
                sock=sock,
                ssl=context,
                server_hostname=self._route.host,
                ssl_shutdown_timeout=TLS_SHUTDOWN_SECONDS,
            )
        except BaseException:
            sock.close()
            raise

    async def _upgrade(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        """The first bytes inside the WebSocket."""
        upgrade = ConnectionUpgrade(self._route.host, self._route.port, protocol=ALPN_PING)
        writer.write(upgrade.request)
        while True:
            data = await reader.read(CHUNK_BYTES)
            if not data:
                raise ConnectionResetError("the web port closed during the connection upgrade")
            early = upgrade.feed(data)
            if early is not None:
                return early

    def suspect(self, since: float) -> None:
        """Nothing is kept."""


async def _serve(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    early: bytes,
    near: socket.socket,
) -> None:
    try:
        await pump(near, _WebSocketEnd(reader, writer, early))
    finally:
        writer.close()


class _WebSocketEnd:
    """`FarEnd` in WebSocket frames."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, early: bytes
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._early = early
        self._websocket = WebSocketClient()

    async def send(self, data: bytes) -> None:
        self._writer.write(self._websocket.frame(data))
        await self._writer.drain()

    async def receive(self) -> bytes:
        while not self._websocket.is_ended:
            data, self._early = self._early or await self._reader.read(CHUNK_BYTES), b""
            if not data:
                break
            try:
                payload = b"".join(self._websocket.feed(data))
            except LayerError as error:
                raise UnreachableError(f"the connection upgrade broke: {error}") from error
            if replies := self._websocket.take_replies():
                self._writer.write(replies)
                await self._writer.drain()
            if payload:
                return payload
        return b""

    async def end(self) -> None:
        self._writer.write(self._websocket.close())
        await self._writer.drain()

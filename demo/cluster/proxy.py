"""The proxy: one port for everything, told apart by the ALPN list of the ClientHello.

first handler in the client's order        what happens
http/1.1, h2, or an empty list             web API, web certificate
teleport-auth@<cluster>                    bytes to that cluster's auth server, unread
teleport-tcp-ping, teleport-tcp            TCP app by client certificate, web certificate
none                                       closed
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from demo.cluster.authorities import Authority, issue_web_certificate
from demo.cluster.backends import Backends
from demo.cluster.clienthello import ClientHello, parse_client_hello
from demo.cluster.errors import EmbeddedClusterError, TruncatedStreamError
from demo.cluster.identity import decode_peer
from demo.cluster.relay import relay
from demo.cluster.state import ClusterState, authorize_app, decode_cluster_name
from demo.cluster.streams import READ_BYTES, Streams, closing, forward
from demo.cluster.tls import HANDSHAKE_SECONDS, TlsStream, server_context
from demo.cluster.web import respond

logger = logging.getLogger(__name__)

AUTH_PREFIX = "teleport-auth@"
TCP = "teleport-tcp"
TCP_PING = "teleport-tcp-ping"
HTTP = "http/1.1"

MAX_CONNECTIONS = 20_000
_MAX_REQUEST_HEAD_BYTES = 16 * 1024


class Kind(Enum):
    """What a connection is for; faults end connections by kind."""

    NEW = "new"
    WEB = "web"
    AUTH = "auth"
    APP = "app"


@dataclass(frozen=True, slots=True)
class Route:
    """Where a connection goes: the ALPN value to negotiate, and for AUTH the cluster."""

    kind: Kind
    protocol: str
    cluster: str = ""


def choose_route(hello: ClientHello, *, has_ping: bool) -> Route | None:
    """The first entry of the client's ALPN list that has a handler. Pure."""
    if not hello.alpn:
        return Route(Kind.WEB, HTTP)
    for protocol in hello.alpn:
        if protocol in {HTTP, "h2"}:
            # No HTTP/2 web stack here: with h2 alone the handshake ends without a protocol.
            return Route(Kind.WEB, HTTP)
        if protocol == TCP or (protocol == TCP_PING and has_ping):
            return Route(Kind.APP, protocol)
        if protocol.startswith(AUTH_PREFIX):
            name = decode_cluster_name(protocol.removeprefix(AUTH_PREFIX))
            return Route(Kind.AUTH, protocol, name) if name else None
    return None


@dataclass(slots=True)
class _Connection:
    """What a connection turned out to be for; `cluster` is the one it leads to."""

    kind: Kind = Kind.NEW
    cluster: str = ""


class Proxy:
    """The proxy of one root cluster."""

    def __init__(
        self,
        state: ClusterState,
        web_ca: Authority,
        auth_addresses: Mapping[str, tuple[str, int]],
        backends: Backends,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._state = state
        self._auth_addresses = auth_addresses
        self._backends = backends
        self._max_connections = max_connections
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._contexts = self._make_contexts(web_ca)

    def _make_contexts(self, web_ca: Authority) -> dict[str, ssl.SSLContext]:
        host = self._state.config.proxy_host
        pair = issue_web_certificate(web_ca, (host, f"*.{host}"), datetime.now(UTC))
        users = [self._state.user_ca]
        # No client certificate is an error of the app handler, after a good handshake.
        tcp, ping = (
            server_context(pair, [protocol], users, ssl.CERT_OPTIONAL)
            for protocol in (TCP, TCP_PING)
        )
        return {HTTP: server_context(pair, [HTTP]), TCP: tcp, TCP_PING: ping}

    async def listen(self, sock: socket.socket) -> None:
        """Starts to accept on a bound socket, which belongs to the proxy from now on."""
        self._server = await asyncio.start_server(self._accept, sock=sock)

    @property
    def is_listening(self) -> bool:
        """Whether new connections are accepted."""
        return self._server is not None

    def stop_listening(self) -> None:
        """Gives its address up; connections stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def stop(self) -> None:
        """Stops listening and ends every connection."""
        self.stop_listening()
        await self.drop(*Kind)

    async def drop(self, *kinds: Kind, cluster: str | None = None) -> None:
        """Ends the connections of these kinds at once; of one cluster, if one is named."""
        tasks = [
            task
            for task, connection in self._connections.items()
            if connection.kind in kinds and cluster in {None, connection.cluster}
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        # A task may start after `stop` has dropped the others.
        if not self.is_listening or len(self._connections) >= self._max_connections:
            logger.warning("connection refused: stopped, or %d are open", len(self._connections))
            writer.transport.abort()
            return
        connection = self._connections[task] = _Connection()
        try:
            async with closing(writer):
                await self._serve(connection, reader, writer)
        except* (OSError, EmbeddedClusterError) as errors:
            logger.info("connection ended: %s", "; ".join(str(e) for e in errors.exceptions))
        except* asyncio.CancelledError:
            # Only `drop` cancels; raised, asyncio's stream server would log it as a fault.
            pass
        except* Exception:
            logger.exception("connection ended by a fault of the cluster")
        finally:
            del self._connections[task]

    async def _serve(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            hello, received = await _read_hello(reader)
        route = choose_route(hello, has_ping=self._state.config.ping_interval_seconds > 0)
        if route is None:
            logger.info("no handler for ALPN %s", hello.alpn)
            return
        connection.kind, connection.cluster = route.kind, route.cluster
        if route.kind is Kind.AUTH:
            await self._serve_auth(route.cluster, reader, writer, received)
            return
        stream = TlsStream(reader, writer, self._contexts[route.protocol], received)
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await stream.handshake()
        if route.kind is Kind.WEB:
            await self._serve_web(stream)
        else:
            await self._serve_app(connection, stream, is_ping=route.protocol == TCP_PING)

    async def _serve_web(self, stream: TlsStream) -> None:
        head = b""
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            while b"\r\n\r\n" not in head and len(head) <= _MAX_REQUEST_HEAD_BYTES:
                data = await stream.read()
                if not data:
                    return
                head += data
        await stream.write(respond(head, self._state.config))
        await stream.write_eof()

    async def _serve_auth(
        self,
        cluster: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        received: bytes,
    ) -> None:
        faults = self._state.faults
        address = self._auth_addresses.get(cluster)
        if self._state.member(cluster) is None or address is None:
            logger.info("no auth server for cluster %r", cluster)
            return
        if faults.auth_down or faults.expire_login or self._state.is_offline(cluster):
            logger.info("a fault keeps the auth server of %s away", cluster)
            return
        backend = await asyncio.open_connection(*address)
        backend[1].write(received)
        await forward((reader, writer), backend)

    async def _serve_app(
        self, connection: _Connection, stream: TlsStream, *, is_ping: bool
    ) -> None:
        try:
            backend = await self._dial_app(connection, stream)
        except (OSError, EmbeddedClusterError) as error:
            # The client learns nothing but the end of its connection.
            logger.info("app connection refused: %s", error)
            await stream.write_eof()
            return
        ping_seconds = self._state.config.ping_interval_seconds if is_ping else 0
        await relay(stream, backend, ping_seconds)

    async def _dial_app(self, connection: _Connection, stream: TlsStream) -> Streams:
        if stream.peer_certificate_count() != 1:
            raise EmbeddedClusterError("not exactly one client certificate")
        identity = decode_peer(stream.peer())
        app = authorize_app(self._state, identity, datetime.now(UTC))
        if self._state.faults.close_apps or self._state.faults.expire_login:
            raise EmbeddedClusterError(f"a fault keeps app {app.name} away")
        assert identity.route_to_app is not None
        connection.cluster = identity.route_to_app.cluster_name
        return await self._backends.dial(*app.backend(identity.route_to_app.target_port))


async def _read_hello(reader: asyncio.StreamReader) -> tuple[ClientHello, bytes]:
    """The ClientHello and every byte received so far, for the TLS layer that comes after."""
    received = b""
    while True:
        chunk = await reader.read(READ_BYTES)
        if not chunk:
            raise TruncatedStreamError("the connection ended before a ClientHello")
        received += chunk
        hello = parse_client_hello(received)
        if hello is not None:
            return hello, received

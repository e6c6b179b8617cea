"""The proxy: its web port, and an SSH port where there is no TLS routing.

first handler in the client's order        what happens on the web port
http/1.1, h2, or an empty list             web stack, web certificate
teleport-auth@<cluster>                    bytes to that cluster's auth server, unread (*)
teleport-proxy-ssh-grpc                    the transport service, with a certificate of its own
teleport-tcp, a database's                 where the client certificate leads to, web certificate
  with -ping                               the same in frames
none                                       closed

(*) only with TLS routing. Without it there is an SSH port, where any TLS is for the transport
service, which carries streams to auth servers too.

The web stack upgrades a connection to a WebSocket, inside of which the same begins again, with a
certificate of the host authority. Behind a load balancer there is no other way in: it ends TLS and
knows http/1.1 alone.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from demo.cluster.authorities import (
    Authority,
    KeyPair,
    issue_host_certificate,
    issue_web_certificate,
)
from demo.cluster.backends import Backends
from demo.cluster.clienthello import ClientHello, parse_client_hello
from demo.cluster.databases import serve_database
from demo.cluster.errors import AccessError, EmbeddedClusterError, TruncatedStreamError
from demo.cluster.identity import DatabaseRoute, Identity, decode_peer
from demo.cluster.nodes import Nodes
from demo.cluster.pingstream import PingStream
from demo.cluster.routes import HTTP, WEB, Kind, Route, choose_route
from demo.cluster.state import API_DOMAIN, ClusterState, authorize_app, authorize_database
from demo.cluster.streams import (
    BufferedReads,
    ByteStream,
    Streams,
    TcpStream,
    closing,
    forward,
    repeating,
)
from demo.cluster.tls import HANDSHAKE_SECONDS, TlsStream, server_context
from demo.cluster.transport import PROTOCOLS, AuthDialer, TransportServer
from demo.cluster.upgrade import ALPN_PING, PATH, answer_upgrade
from demo.cluster.web import parse_request, refuse, respond, web_apps_of
from demo.cluster.websocket import WebSocketStream

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 20_000
_MAX_REQUEST_HEAD_BYTES = 16 * 1024
# From the accept over transport and task to the end of an abort.
_ARRIVAL_TURNS = 8
# A fatal alert, no_application_protocol (RFC 7301 section 3.2), as Go's servers send it.
_NO_APPLICATION_PROTOCOL = b"\x15\x03\x03\0\2\2\x78"


@dataclass(slots=True)
class _Connection:
    """What a connection turned out to be for; `cluster` is the one it leads to.

    `client` is the address it came from.
    """

    kind: Kind = Kind.NEW
    cluster: str = ""
    client: str = ""


_Serve = Callable[[_Connection, ByteStream], Awaitable[None]]


class Proxy:
    """The proxy of one root cluster."""

    def __init__(
        self,
        state: ClusterState,
        web_ca: Authority,
        auth_addresses: Mapping[str, tuple[str, int]],
        backends: Backends,
        nodes: Nodes,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._state = state
        self._web_ca = web_ca
        self._auth = AuthDialer(state, auth_addresses)
        self._transport = TransportServer(state, self._auth, nodes)
        self._backends = backends
        self._max_connections = max_connections
        self._servers: list[asyncio.Server] = []
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._contexts: dict[tuple[str, bool], ssl.SSLContext] = {}
        self._web_pair, self._host_pair = self._issue()

    def _issue(self) -> tuple[KeyPair, KeyPair]:
        """The certificates for the web port, and for what is inside an upgraded connection."""
        host = self._state.config.proxy_host
        web = issue_web_certificate(
            self._web_ca, (host, f"*.{host}", *web_apps_of(self._state)), datetime.now(UTC)
        )
        names = (host, f"*.{host}", f"*.{API_DOMAIN}", API_DOMAIN)
        return web, issue_host_certificate(self._state.host_ca, names, "Proxy", datetime.now(UTC))

    def reload(self) -> None:
        """Takes the state's authorities, clock and apps over for handshakes from now on."""
        self._web_pair, self._host_pair = self._issue()
        self._contexts.clear()
        self._transport.reload(self._host_pair)

    async def listen(self, web: socket.socket, ssh: socket.socket | None) -> None:
        """Starts to accept on bound sockets, which belong to the proxy from now on."""
        self._transport.reload(self._host_pair)
        ports: list[tuple[socket.socket, _Serve]] = [(web, self._serve_web_port)]
        if ssh is not None:
            ports.append((ssh, self._serve_ssh_port))
        for sock, serve in ports:
            accept = partial(self._accept, serve)
            self._servers.append(await asyncio.start_server(accept, sock=sock))

    @property
    def is_listening(self) -> bool:
        """Whether new connections are accepted."""
        return bool(self._servers)

    def stop_listening(self) -> None:
        """Gives its addresses up; connections stay."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def stop(self) -> None:
        """Stops listening and ends every connection."""
        self.stop_listening()
        await self.drop(*Kind)
        # One that was just accepted has no task that could close it until asyncio has had its turns.
        for _ in range(_ARRIVAL_TURNS):
            await asyncio.sleep(0)

    def drop_nodes(self, names: Container[str]) -> None:
        """Ends the streams to nodes with one of these names or UUIDs."""
        self._transport.drop_nodes(names)

    async def drop(self, *kinds: Kind, cluster: str | None = None) -> None:
        """Ends the connections of these kinds at once; of one cluster, if one is named.

        Streams of the transport service to auth servers are of the kind AUTH, to nodes NODE.
        """
        if Kind.AUTH in kinds:
            self._transport.drop(cluster)
        if Kind.NODE in kinds:
            self._transport.drop_nodes((), cluster)
        tasks = [
            task
            for task, connection in self._connections.items()
            if connection.kind in kinds and cluster in {None, connection.cluster}
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(
        self, serve: _Serve, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        # A task may start after `stop` has dropped the others.
        if not self.is_listening or len(self._connections) >= self._max_connections:
            logger.warning("connection refused: stopped, or %d are open", len(self._connections))
            writer.transport.abort()
            return
        peer = writer.get_extra_info("peername")
        connection = self._connections[task] = _Connection(client=peer[0] if peer else "")
        try:
            async with closing(writer):
                await serve(connection, TcpStream(reader, writer))
        except* (OSError, EmbeddedClusterError) as errors:
            logger.info("connection ended: %s", "; ".join(str(e) for e in errors.exceptions))
        except* asyncio.CancelledError:
            # Only `drop` cancels; raised, asyncio's stream server would log it as a fault.
            pass
        except* Exception:
            logger.exception("connection ended by a fault of the cluster")
        finally:
            del self._connections[task]

    # -- by ALPN --

    async def _serve_ssh_port(self, connection: _Connection, stream: ByteStream) -> None:
        hello, whole = await _read_hello(stream)
        if hello.alpn and set(hello.alpn).isdisjoint(PROTOCOLS):
            logger.info("the SSH port has no protocol of %s", hello.alpn)
            await stream.write(_NO_APPLICATION_PROTOCOL)
            return
        connection.kind = Kind.TRANSPORT
        await self._transport.serve(whole, connection.client)

    async def _serve_web_port(self, connection: _Connection, stream: ByteStream) -> None:
        await self._serve_tls(connection, stream, is_inner=False)

    async def _serve_tls(
        self, connection: _Connection, below: ByteStream, *, is_inner: bool
    ) -> None:
        """One TLS connection; `is_inner` tells one inside an upgraded connection."""
        hello, stream = await _read_hello(below)
        route = self._choose_route(hello, is_inner=is_inner)
        if route is None:
            logger.info("no handler for ALPN %s", hello.alpn)
            return
        connection.kind, connection.cluster = route.kind, route.cluster
        if route.kind is Kind.AUTH:
            await forward(stream, await self._auth.dial(route.cluster))
            return
        if route.kind is Kind.TRANSPORT:
            await self._transport.serve(stream, connection.client)
            return
        tls = TlsStream(stream, self._context(route, is_inner=is_inner))
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await tls.handshake()
        if route.kind is Kind.WEB:
            await self._serve_web(connection, tls, is_inner=is_inner)
        else:
            await self._serve_certified(connection, tls, route)

    def _choose_route(self, hello: ClientHello, *, is_inner: bool) -> Route | None:
        config = self._state.config
        if config.conn_upgrade_required and not is_inner:
            return WEB
        return choose_route(
            hello,
            has_ping=config.ping_interval_seconds > 0,
            has_tls_routing=config.tls_routing,
        )

    def _context(self, route: Route, *, is_inner: bool) -> ssl.SSLContext:
        key = (route.protocol, is_inner)
        if key not in self._contexts:
            pair = self._host_pair if is_inner else self._web_pair
            if route.kind is Kind.WEB:
                context = server_context(pair, [HTTP])
            else:
                # No client certificate is an error of the handler, after a good handshake.
                users = [self._state.user_ca]
                context = server_context(pair, [route.protocol], users, ssl.CERT_OPTIONAL)
                self._state.tune(context)
            self._contexts[key] = context
        return self._contexts[key]

    # -- web --

    async def _serve_web(self, connection: _Connection, tls: TlsStream, *, is_inner: bool) -> None:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            head, rest = await _read_request_head(tls)
        if not head:
            return
        request = parse_request(head)
        if request is None:
            await tls.write(refuse(400, "malformed request"))
        elif request.path != PATH or is_inner or request.host in web_apps_of(self._state):
            await tls.write(respond(request, self._state))
        else:
            answer = answer_upgrade(request)
            await tls.write(answer.response)
            # What comes before the answer is no WebSocket's.
            if answer.protocol and not rest:
                await self._serve_upgraded(connection, tls, is_ping=answer.protocol == ALPN_PING)
        await tls.write_eof()

    async def _serve_upgraded(
        self, connection: _Connection, tls: TlsStream, *, is_ping: bool
    ) -> None:
        stream = WebSocketStream(tls)
        seconds = self._state.config.ping_interval_seconds if is_ping else 0
        async with repeating(stream.ping, seconds):
            await self._serve_tls(connection, stream, is_inner=True)
            await stream.write_eof()

    # -- by client certificate --

    async def _serve_certified(self, connection: _Connection, tls: TlsStream, route: Route) -> None:
        try:
            if tls.peer_certificate_count() != 1:
                raise AccessError("not exactly one client certificate")
            identity = decode_peer(tls.peer())
            async with self._framed(tls, is_ping=route.is_ping) as stream:
                # The certificate decides, whatever the ALPN value (lib/srv/alpnproxy/proxy.go).
                if identity.route_to_database is not None:
                    await self._serve_database(
                        connection, identity, identity.route_to_database, stream
                    )
                elif route.is_for_apps:
                    await self._serve_app(connection, identity, stream)
                else:
                    raise AccessError("the certificate leads to no database")
        except (OSError, EmbeddedClusterError) as error:
            # The client of an app learns nothing but the end of its connection.
            logger.info("connection refused: %s", error)
            await tls.write_eof()

    @contextlib.asynccontextmanager
    async def _framed(self, tls: TlsStream, *, is_ping: bool) -> AsyncIterator[ByteStream]:
        if not is_ping:
            yield tls
            return
        stream = PingStream(tls)
        async with repeating(stream.ping, self._state.config.ping_interval_seconds):
            yield stream

    async def _serve_app(
        self, connection: _Connection, identity: Identity, stream: ByteStream
    ) -> None:
        app = authorize_app(self._state, identity, self._state.now())
        self._check_faults(app.name)
        assert identity.route_to_app is not None
        connection.cluster = identity.route_to_app.cluster_name
        address = app.backend(identity.route_to_app.target_port)
        await forward(stream, await self._backends.dial(*address))

    async def _serve_database(
        self,
        connection: _Connection,
        identity: Identity,
        route: DatabaseRoute,
        stream: ByteStream,
    ) -> None:
        connection.kind, connection.cluster = Kind.DATABASE, identity.route_to_cluster
        self._check_faults(route.service_name)
        authorize = partial(
            authorize_database, self._state, identity, route.protocol, self._state.now()
        )

        async def dial() -> Streams:
            return await self._backends.dial(*authorize().backend)

        # That there is such a database is the proxy's to know; whether it may be used is the
        # agent's, who is asked when the client has said what it wants.
        with contextlib.suppress(AccessError):
            authorize()
        await serve_database(stream, route.protocol, dial)

    def _check_faults(self, name: str) -> None:
        if self._state.faults.close_apps or self._state.faults.expire_login:
            raise AccessError(f"a fault keeps {name} away")


async def _read_hello(stream: ByteStream) -> tuple[ClientHello, BufferedReads]:
    """The ClientHello, and the stream from its start, for the TLS layer that comes after."""
    received = b""
    async with asyncio.timeout(HANDSHAKE_SECONDS):
        while chunk := await stream.read():
            received += chunk
            hello = parse_client_hello(received)
            if hello is not None:
                return hello, BufferedReads(stream, received)
    raise TruncatedStreamError("the connection ended before a ClientHello")


async def _read_request_head(stream: ByteStream) -> tuple[bytes, bytes]:
    """An HTTP head without its empty line, and what has come behind it; less of it at the end."""
    received = b""
    while b"\r\n\r\n" not in received and len(received) <= _MAX_REQUEST_HEAD_BYTES:
        data = await stream.read()
        if not data:
            break
        received += data
    head, _, rest = received.partition(b"\r\n\r\n")
    return head, rest

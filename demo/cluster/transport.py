"""The transport service of the proxy: streams to auth servers, over gRPC with mutual TLS.

It has a loopback listener of its own, and the proxy forwards bytes to it unread, as a real one
does (lib/service/service.go, lib/srv/transport/transportv1). The client's certificate must be of a
user CA this cluster knows; a cluster's name in SNI narrows that to its own.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from grpclib.const import Status
from grpclib.events import RecvRequest, listen
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from demo.cluster.authorities import KeyPair
from demo.cluster.errors import NotFoundError
from demo.cluster.routes import HTTP2, TRANSPORT
from demo.cluster.services import request_check
from demo.cluster.state import ClusterState, decode_cluster_name
from demo.cluster.streams import Streams, abort, closing, listening_socket
from demo.cluster.tls import server_context
from workers.proxy.teleport.pb import transport_grpc, transport_pb2

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# Go's gRPC offers them in this order (lib/service/service.go).
PROTOCOLS = (HTTP2, TRANSPORT)
# Real ones cut their streams, too: a message of gRPC has at most 4 MiB.
FRAME_BYTES = 16 * 1024

_ClusterStream = Stream[transport_pb2.ProxyClusterRequest, transport_pb2.ProxyClusterResponse]
_SshStream = Stream[transport_pb2.ProxySSHRequest, transport_pb2.ProxySSHResponse]
_DetailsStream = Stream[
    transport_pb2.GetClusterDetailsRequest, transport_pb2.GetClusterDetailsResponse
]


class AuthDialer:
    """Connects to the auth servers of a root cluster and its leaves, as its proxy sees them."""

    def __init__(self, state: ClusterState, addresses: Mapping[str, tuple[str, int]]) -> None:
        self._state = state
        self._addresses = addresses

    async def dial(self, cluster: str) -> Streams:
        """A connection to a cluster's auth server.

        Raises:
            NotFoundError: the cluster is neither this one nor a leaf of it.
            OSError: it cannot be reached.
        """
        address = self._addresses.get(cluster)
        if self._state.member(cluster) is None or address is None:
            raise NotFoundError(f"cluster {cluster!r} is not found")
        faults = self._state.faults
        if faults.auth_down or faults.expire_login or self._state.is_offline(cluster):
            raise ConnectionRefusedError(f"cluster {cluster!r} is offline")
        return await asyncio.open_connection(*address)


@dataclass(eq=False, slots=True)
class _Tunnel:
    """A stream that is carried to an auth server."""

    cluster: str
    writer: asyncio.StreamWriter
    is_dropped: bool = False


class TransportService(transport_grpc.TransportServiceBase):
    """teleport.transport.v1.TransportService."""

    def __init__(self, state: ClusterState, auth: AuthDialer) -> None:
        self._state = state
        self._auth = auth
        self._tunnels: set[_Tunnel] = set()

    def drop(self, cluster: str | None) -> None:
        """Ends the streams to auth servers; to that of one cluster, if one is named."""
        for tunnel in self._tunnels:
            if cluster in {None, tunnel.cluster}:
                tunnel.is_dropped = True
                abort(tunnel.writer)

    async def GetClusterDetails(self, stream: _DetailsStream) -> None:  # noqa: N802
        await stream.recv_message()
        details = transport_pb2.ClusterDetails(fips_enabled=False)
        await stream.send_message(transport_pb2.GetClusterDetailsResponse(details=details))

    async def ProxySSH(self, stream: _SshStream) -> None:  # noqa: N802
        """Finds the host, and then has no SSH server to connect to."""
        request = await stream.recv_message()
        if request is None or not request.HasField("dial_target"):
            raise GRPCError(Status.INVALID_ARGUMENT, "first message must contain a dial target")
        target = request.dial_target
        cluster = self._state.member(target.cluster or self._state.name)
        host = target.host_port.rpartition(":")[0]
        if cluster is None or all(node.hostname != host for node in cluster.config.nodes):
            raise GRPCError(Status.NOT_FOUND, f"no matching hosts for {target.host_port!r}")
        raise GRPCError(Status.UNIMPLEMENTED, "this cluster serves no SSH")

    async def ProxyCluster(self, stream: _ClusterStream) -> None:  # noqa: N802
        """Carries bytes to an auth server until that one, or the client's call, has ended."""
        request = await stream.recv_message()
        if request is None or not request.cluster:
            raise GRPCError(Status.INVALID_ARGUMENT, "first message must contain a cluster")
        async with self._tunnel(request.cluster) as (reader, tunnel):
            upload = asyncio.create_task(_upload(stream, tunnel.writer, request.frame.payload))
            try:
                while data := await reader.read(FRAME_BYTES):
                    frame = transport_pb2.Frame(payload=data)
                    await stream.send_message(transport_pb2.ProxyClusterResponse(frame=frame))
            except OSError as error:
                logger.info("a stream to %s ended: %s", tunnel.cluster, error)
            finally:
                upload.cancel()
                await asyncio.gather(upload, return_exceptions=True)
            if tunnel.is_dropped:
                raise GRPCError(Status.UNAVAILABLE, f"cluster {tunnel.cluster!r} went away")

    @contextlib.asynccontextmanager
    async def _tunnel(self, cluster: str) -> AsyncIterator[tuple[asyncio.StreamReader, _Tunnel]]:
        try:
            reader, writer = await self._auth.dial(cluster)
        except NotFoundError as error:
            raise GRPCError(Status.NOT_FOUND, str(error)) from error
        except OSError as error:
            raise GRPCError(Status.UNAVAILABLE, str(error)) from error
        tunnel = _Tunnel(cluster, writer)
        self._tunnels.add(tunnel)
        try:
            async with closing(writer):
                yield reader, tunnel
        finally:
            self._tunnels.discard(tunnel)


async def _upload(stream: _ClusterStream, writer: asyncio.StreamWriter, first: bytes) -> None:
    """Copies until the client has ended its side; a failure ends the other direction too."""
    try:
        writer.write(first)
        while (request := await stream.recv_message()) is not None:
            writer.write(request.frame.payload)
            await writer.drain()
        writer.write_eof()
    except Exception:
        abort(writer)
        raise


class TransportServer:
    """The listener of the transport service."""

    def __init__(self, state: ClusterState, auth: AuthDialer) -> None:
        self._state = state
        self._service = TransportService(state, auth)
        self._server: Server | None = None
        self.address = (LOOPBACK, 0)
        self.drop = self._service.drop
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._listening.sni_callback = self._choose

    async def start(self, pair: KeyPair) -> None:
        """Starts to serve, showing `pair`; `address` is set afterwards."""
        self._server = Server([self._service])
        listen(self._server, RecvRequest, request_check(self._state))
        sock = listening_socket(LOOPBACK, 0)
        self.address = sock.getsockname()
        self.reload(pair)
        await self._server.start(sock=sock, ssl=self._listening)

    def reload(self, pair: KeyPair) -> None:
        """Shows `pair` and takes the state's clock over for handshakes from now on."""
        trusted = self._state.trusted()
        self._contexts = {
            cluster.name: server_context(pair, PROTOCOLS, [cluster.user_ca], ssl.CERT_REQUIRED)
            for cluster in trusted
        }
        users = [cluster.user_ca for cluster in trusted]
        self._contexts[""] = server_context(pair, PROTOCOLS, users, ssl.CERT_REQUIRED)
        # A connection keeps how it verifies from the context it began with.
        self._listening.verify_mode = ssl.CERT_REQUIRED
        self._state.tune(self._listening)

    def _choose(self, tls: ssl.SSLObject, server_name: str | None, _begun: ssl.SSLContext) -> None:
        name = decode_cluster_name(server_name or "") or ""
        tls.context = self._contexts.get(name, self._contexts[""])

    async def stop(self) -> None:
        """Ends all calls and connections."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

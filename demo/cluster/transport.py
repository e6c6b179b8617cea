"""The transport service of the proxy: streams to auth servers and SSH nodes, over gRPC.

With mutual TLS: the client's certificate must be of a user CA this cluster knows; a cluster's name
in SNI narrows that to its own (lib/service/service.go, lib/srv/transport/transportv1).
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from demo.cluster.authorities import KeyPair
from demo.cluster.config import Node
from demo.cluster.errors import (
    AccessError,
    IdentityError,
    NotFoundError,
    RequestError,
    TruncatedStreamError,
)
from demo.cluster.grpc_calls import GrpcCall, GrpcConnection, Handler
from demo.cluster.identity import decode_peer
from demo.cluster.nodes import NodeLink, Nodes
from demo.cluster.routes import HTTP2, TRANSPORT
from demo.cluster.services import check_call
from demo.cluster.state import ClusterState, decode_cluster_name
from demo.cluster.streams import ByteStream, Streams, abort, closing
from demo.cluster.tls import HANDSHAKE_SECONDS, TlsStream, server_context
from workers.proxy.teleport.pb import transport_pb2

logger = logging.getLogger(__name__)

PATH = "/teleport.transport.v1.TransportService"
# Go's gRPC offers them in this order (lib/service/service.go).
PROTOCOLS = (HTTP2, TRANSPORT)
# Real ones cut their streams, too: a message of gRPC has at most 4 MiB.
FRAME_BYTES = 16 * 1024
# SSH is measured, and its clients take frames of any size.
SSH_FRAME_BYTES = 64 * 1024


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
    """A stream that is carried to an auth server or to a node."""

    cluster: str
    writer: asyncio.StreamWriter
    node: Node | None = None
    is_dropped: bool = False

    def drop(self) -> None:
        self.is_dropped = True
        abort(self.writer)


class TransportService:
    """teleport.transport.v1.TransportService, for one client at a time."""

    def __init__(self, state: ClusterState, auth: AuthDialer, nodes: Nodes) -> None:
        self._state = state
        self._auth = auth
        self._nodes = nodes
        self._tunnels: set[_Tunnel] = set()

    def drop(self, cluster: str | None) -> None:
        """Ends the streams to auth servers; to that of one cluster, if one is named."""
        for tunnel in self._tunnels:
            if tunnel.node is None and cluster in {None, tunnel.cluster}:
                tunnel.drop()

    def drop_nodes(self, names: Container[str], cluster: str | None = None) -> None:
        """Ends the streams to nodes with one of these names or UUIDs, or of this cluster."""
        for tunnel in self._tunnels:
            node = tunnel.node
            if node and (node.hostname in names or node.uuid in names or tunnel.cluster == cluster):
                tunnel.drop()

    def handlers(self, peer: Mapping[str, Any] | None, address: str) -> dict[str, Handler]:
        """The methods by path, for a client with this certificate at this address."""
        client = _Client(peer, address)
        methods = {
            "GetClusterDetails": self._get_cluster_details,
            "ProxySSH": self._proxy_ssh,
            "ProxyCluster": self._proxy_cluster,
        }
        return {
            f"{PATH}/{name}": partial(self._check, how, client) for name, how in methods.items()
        }

    async def _check(self, method: "_Method", client: "_Client", call: GrpcCall) -> None:
        await check_call(self._state, call.metadata.get("version"), client.peer)
        await method(client, call)

    async def _get_cluster_details(self, _client: "_Client", call: GrpcCall) -> None:
        await call.receive()
        details = transport_pb2.ClusterDetails(fips_enabled=False)
        answer = transport_pb2.GetClusterDetailsResponse(details=details)
        await call.send(answer.SerializeToString())

    async def _proxy_ssh(self, client: "_Client", call: GrpcCall) -> None:
        """Carries bytes to a node, until that one or the client's call has ended."""
        request = transport_pb2.ProxySSHRequest.FromString(await call.receive() or b"")
        if not request.HasField("dial_target"):
            raise GRPCError(Status.INVALID_ARGUMENT, "first message must contain a dial target")
        with _statuses():
            cluster, node = self._find(request.dial_target)
            async with self._nodes.dial(
                cluster, node, decode_peer(client.peer), client.address
            ) as link:
                details = transport_pb2.ClusterDetails(fips_enabled=False)
                first = transport_pb2.ProxySSHResponse(details=details)
                await call.send(first.SerializeToString())
                await self._carry(call, link, cluster.name)

    def _find(self, target: transport_pb2.TargetHost) -> tuple[ClusterState, Node]:
        name = target.cluster or self._state.name
        cluster = self._state.member(name)
        if cluster is None:
            raise NotFoundError(f"cluster {name!r} is not found")
        if self._state.is_offline(name):
            raise ConnectionRefusedError(f"cluster {name!r} is offline")
        host, _, port = target.host_port.rpartition(":")
        if not port.isascii() or not port.isdigit() or len(port) > 5:
            raise RequestError(f"{target.host_port!r} is not HOST:PORT")
        return cluster, cluster.find_node(host, int(port))

    async def _carry(self, call: GrpcCall, link: NodeLink, cluster: str) -> None:
        reader, writer = link.streams
        helpers = [asyncio.create_task(_upload_ssh(call, link))]
        if link.agent is not None:
            helpers.append(asyncio.create_task(_ask_agent(call, link.agent[0])))
        with self._listed(_Tunnel(cluster, writer, link.node)) as tunnel:
            try:
                while data := await reader.read(SSH_FRAME_BYTES):
                    frame = transport_pb2.Frame(payload=data)
                    answer = transport_pb2.ProxySSHResponse(ssh=frame)
                    await call.send(answer.SerializeToString())
            except OSError as error:
                logger.info("a stream to node %s ended: %s", link.node.hostname, error)
            finally:
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, return_exceptions=True)
            if tunnel.is_dropped:
                raise GRPCError(Status.UNAVAILABLE, f"node {link.node.hostname} went away")

    async def _proxy_cluster(self, _client: "_Client", call: GrpcCall) -> None:
        """Carries bytes to an auth server until that one, or the client's call, has ended."""
        request = transport_pb2.ProxyClusterRequest.FromString(await call.receive() or b"")
        if not request.cluster:
            raise GRPCError(Status.INVALID_ARGUMENT, "first message must contain a cluster")
        with _statuses():
            reader, writer = await self._auth.dial(request.cluster)
        async with closing(writer):
            with self._listed(_Tunnel(request.cluster, writer)) as tunnel:
                upload = asyncio.create_task(_upload(call, writer, request.frame.payload))
                try:
                    while data := await reader.read(FRAME_BYTES):
                        frame = transport_pb2.Frame(payload=data)
                        answer = transport_pb2.ProxyClusterResponse(frame=frame)
                        await call.send(answer.SerializeToString())
                except OSError as error:
                    logger.info("a stream to %s ended: %s", tunnel.cluster, error)
                finally:
                    upload.cancel()
                    await asyncio.gather(upload, return_exceptions=True)
                if tunnel.is_dropped:
                    raise GRPCError(Status.UNAVAILABLE, f"cluster {tunnel.cluster!r} went away")

    @contextlib.contextmanager
    def _listed(self, tunnel: _Tunnel) -> Iterator[_Tunnel]:
        self._tunnels.add(tunnel)
        try:
            yield tunnel
        finally:
            self._tunnels.discard(tunnel)


@dataclass(frozen=True, slots=True)
class _Client:
    """Who calls: the verified certificate and the address the connection came from."""

    peer: Mapping[str, Any] | None
    address: str


_Method = Callable[[_Client, GrpcCall], Awaitable[None]]


@contextlib.contextmanager
def _statuses() -> Iterator[None]:
    """Turns refusals into gRPC statuses."""
    try:
        yield
    except NotFoundError as error:
        raise GRPCError(Status.NOT_FOUND, str(error)) from error
    except (AccessError, IdentityError) as error:
        raise GRPCError(Status.PERMISSION_DENIED, str(error)) from error
    except RequestError as error:
        raise GRPCError(Status.INVALID_ARGUMENT, str(error)) from error
    except OSError as error:
        raise GRPCError(Status.UNAVAILABLE, str(error)) from error


async def _upload(call: GrpcCall, writer: asyncio.StreamWriter, first: bytes) -> None:
    """Copies until the client has ended its side; a failure ends the other direction too."""
    try:
        writer.write(first)
        while (message := await call.receive()) is not None:
            writer.write(transport_pb2.ProxyClusterRequest.FromString(message).frame.payload)
            await writer.drain()
        writer.write_eof()
    except Exception:
        abort(writer)
        raise


async def _upload_ssh(call: GrpcCall, link: NodeLink) -> None:
    """Copies what the client sends to the node, and its agent's answers to who asked."""
    writer = link.streams[1]
    try:
        while (message := await call.receive()) is not None:
            request = transport_pb2.ProxySSHRequest.FromString(message)
            if payload := request.ssh.payload:
                writer.write(payload)
                await writer.drain()
            elif request.agent.payload and link.agent is not None:
                link.agent[1].write(request.agent.payload)
                await link.agent[1].drain()
        writer.write_eof()
    except Exception:
        abort(writer)
        raise


async def _ask_agent(call: GrpcCall, questions: asyncio.StreamReader) -> None:
    """Sends the client what its agent is asked."""
    while data := await questions.read(FRAME_BYTES):
        frame = transport_pb2.Frame(payload=data)
        await call.send(transport_pb2.ProxySSHResponse(agent=frame).SerializeToString())


class TransportServer:
    """Serves the transport service on connections that the proxy has accepted."""

    def __init__(self, state: ClusterState, auth: AuthDialer, nodes: Nodes) -> None:
        self._state = state
        self._service = TransportService(state, auth, nodes)
        self.drop = self._service.drop
        self.drop_nodes = self._service.drop_nodes
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._listening.sni_callback = self._choose

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

    async def serve(self, stream: ByteStream, client_address: str) -> None:
        """Serves one connection, TLS and all, until the client ends it.

        Raises:
            OSError, EmbeddedClusterError: the connection broke.
        """
        tls = TlsStream(stream, self._listening)
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await tls.handshake()
        connection = GrpcConnection(tls, self._service.handlers(tls.peer(), client_address))
        # Clients of gRPC end TCP without close_notify.
        with contextlib.suppress(TruncatedStreamError):
            await connection.serve()

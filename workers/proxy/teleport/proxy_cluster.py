"""Tunnels to the auth services of a proxy's clusters, for proxies without TLS routing.

    our TLS with a cluster's auth service --> frames of ProxyCluster --> gRPC, TLS --> SSH proxy

One connection to the proxy's TransportService carries a stream for each cluster. It is opened with
the first tunnel and closed with the last.

Source: `api/proto/teleport/transport/v1/transport_service.proto`, `api/client/proxy/client.go`.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from functools import partial
from math import inf

from grpclib.client import Stream
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from workers.proxy.teleport.channel import Carrier, TlsChannel, translate
from workers.proxy.teleport.errors import TeleportError, UnreachableError, safe_text
from workers.proxy.teleport.pb import transport_grpc, transport_pb2
from workers.proxy.teleport.pipe import Line, open_pipe, pump

# The SSH proxy's port takes any TLS for gRPC; on the web port the name would choose the service.
TRANSPORT_ALPN = ("teleport-proxy-ssh-grpc", "h2")

_ProxyCluster = Stream[transport_pb2.ProxyClusterRequest, transport_pb2.ProxyClusterResponse]


class _LeftError(Exception):
    """The near end was closed: leaves a call without waiting for its status."""


class ClusterTransport:
    """The connection to one proxy. Shared: each cluster's `TransportCarrier` opens its tunnels here.

    `carrier` leads to the SSH proxy; `context` is the root cluster's (`contexts.cluster_context`).
    """

    def __init__(
        self,
        carrier: Carrier,
        context: ssl.SSLContext,
        *,
        profile: str,
        version: str,
        timeout_seconds: float,
    ) -> None:
        self._channel = TlsChannel(carrier, context, timeout_seconds)
        self._service = transport_grpc.TransportServiceStub(self._channel)
        self._profile = profile
        self._version = version
        self._tunnels = 0
        self._heard_at = -inf

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection; it may have died unnoticed."""
        return self._channel.is_connected

    def open(self, cluster: str) -> Line:
        """A tunnel to the auth service of `cluster`. What goes wrong becomes the line's fault."""
        return open_pipe(partial(self._serve, cluster))

    def suspect(self, since: float) -> None:
        """Closes the connection if nothing has come through it since then."""
        if self._heard_at < since:
            self._channel.close()

    async def _serve(self, cluster: str, near: socket.socket) -> None:
        self._tunnels += 1
        try:
            await self._tunnel(cluster, near)
        except GRPCError as error:
            raise self._translated(error, cluster) from error
        except StreamTerminatedError as error:
            raise self._channel.lost or error from error
        finally:
            self._tunnels -= 1
            if not self._tunnels:
                self._channel.close()

    async def _tunnel(self, cluster: str, near: socket.socket) -> None:
        method = self._service.ProxyCluster
        with contextlib.suppress(_LeftError):
            async with method.open(metadata={"version": self._version}) as stream:
                await stream.send_message(transport_pb2.ProxyClusterRequest(cluster=cluster))
                await pump(near, _Frames(stream, self._heard))
                raise _LeftError

    def _heard(self) -> None:
        self._heard_at = asyncio.get_running_loop().time()

    def _translated(self, error: GRPCError, cluster: str) -> TeleportError:
        if error.status in {
            Status.UNAUTHENTICATED,
            Status.PERMISSION_DENIED,
            Status.INVALID_ARGUMENT,
        }:
            return translate(error, cluster, self._profile)
        text = safe_text(error.message or error.status.name, 200)
        return UnreachableError(f"{cluster} cannot be reached through {self._profile}: {text}")


class _Frames:
    """`FarEnd` in the messages of a ProxyCluster call."""

    def __init__(self, stream: _ProxyCluster, heard: Callable[[], None]) -> None:
        self._stream = stream
        self._heard = heard

    async def send(self, data: bytes) -> None:
        frame = transport_pb2.Frame(payload=data)
        await self._stream.send_message(transport_pb2.ProxyClusterRequest(frame=frame))

    async def receive(self) -> bytes:
        while (message := await self._stream.recv_message()) is not None:
            self._heard()
            if message.frame.payload:
                return message.frame.payload
        # The status that explains the end.
        await self._stream.end()
        await self._stream.recv_trailing_metadata()
        return b""

    async def end(self) -> None:
        await self._stream.end()


class TransportCarrier:
    """`Carrier` to the auth service of one cluster, through a shared `ClusterTransport`."""

    def __init__(self, transport: ClusterTransport, cluster: str) -> None:
        self._transport = transport
        self._cluster = cluster

    @property
    def is_kept(self) -> bool:
        """See `Carrier`."""
        return self._transport.is_connected

    async def connect(self) -> Line:
        """See `Carrier`."""
        return self._transport.open(self._cluster)

    def suspect(self, since: float) -> None:
        """See `Carrier`."""
        self._transport.suspect(since)

"""Proxies that carry SSH: a grpclib server in a thread, and one call over any blocking far end.

They share nothing with the client's layer but the protobuf messages.
"""

import asyncio
import ssl
import threading

from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded
from tls_peers import SERVER_NAME, client_context, server_context

from workers.proxy.dial_plan import DialPlan, SshTarget, TlsPlan
from workers.proxy.teleport.pb import transport_grpc, transport_pb2

ALPN = "h2"
TARGET = SshTarget("node1:0", "demo.test", "18.0.0")
Frame = transport_pb2.Frame
Response = transport_pb2.ProxySSHResponse
DETAILS = Response(details=transport_pb2.ClusterDetails(fips_enabled=True))


async def echo(stream):
    """What comes goes back, in messages of the same size."""
    await stream.send_message(DETAILS)
    while (request := await stream.recv_message()) is not None:
        await stream.send_message(Response(ssh=request.ssh))


class SshProxyPeer:
    """Serves ProxySSH with `handle(stream)` after it has read the target; a context manager."""

    def __init__(self, handle=echo, *, is_tls: bool = True, window: int = 65_535) -> None:
        self._handle = handle
        self._context: ssl.SSLContext | None = server_context(ALPN) if is_tls else None
        self._config = Configuration(
            http2_connection_window_size=window, http2_stream_window_size=window
        )
        self.targets: list[tuple[str, str]] = []
        self.metadata: list[dict[str, str]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._started = threading.Event()
        self._stopping = asyncio.Event()
        self.port = 0

    def plan(self, target: SshTarget = TARGET) -> DialPlan:
        tls = TlsPlan(client_context(ALPN), SERVER_NAME) if self._context else None
        return DialPlan("127.0.0.1", self.port, tls, ssh=target)

    def __enter__(self):
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(20)
        assert not self._thread.is_alive()
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        peer = self

        class Service(transport_grpc.TransportServiceBase):
            async def ProxySSH(self, stream):  # noqa: N802
                await peer._proxy_ssh(stream)

            async def ProxyCluster(self, _stream):  # noqa: N802
                raise GRPCError(Status.UNIMPLEMENTED)

            async def GetClusterDetails(self, _stream):  # noqa: N802
                raise GRPCError(Status.UNIMPLEMENTED)

        server = Server([Service()], config=self._config)
        await server.start("127.0.0.1", 0, ssl=self._context)
        self.port = server._server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stopping.wait()
        server.close()
        await server.wait_closed()
        await self._loop.shutdown_default_executor()

    async def _proxy_ssh(self, stream) -> None:
        first = await stream.recv_message()
        assert first.HasField("dial_target")
        assert first.WhichOneof("frame") is None
        self.targets.append((first.dial_target.host_port, first.dial_target.cluster))
        self.metadata.append(dict(stream.metadata))
        await self._handle(stream)


def serve_call(far, *, is_recording: bool = False) -> None:
    """One ProxySSH call over any blocking far end: an echo that ends when the client does.

    With `is_recording` the echo is in the answers of the client's agent.
    """
    http2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
    http2.initiate_connection()
    far.send(http2.data_to_send())
    content, answers, is_over = b"", b"", False
    while data := far.recv():
        for event in http2.receive_data(data):
            match event:
                case RequestReceived():
                    headers = [(":status", "200"), ("content-type", "application/grpc+proto")]
                    http2.send_headers(1, headers)
                case DataReceived():
                    content += event.data
                    http2.acknowledge_received_data(event.flow_controlled_length, 1)
                case StreamEnded():
                    is_over = True
        while len(content) >= 5 and len(content) >= 5 + int.from_bytes(content[1:5]):
            end = 5 + int.from_bytes(content[1:5])
            request, content = (
                transport_pb2.ProxySSHRequest.FromString(content[5:end]),
                content[end:],
            )
            if request.HasField("dial_target"):
                answers += framed(DETAILS)
            elif request.HasField("agent"):
                answers += framed(Response(ssh=request.agent))
            else:
                kind = "agent" if is_recording else "ssh"
                answers += framed(Response(**{kind: request.ssh}))
        while answers and (
            room := min(http2.local_flow_control_window(1), http2.max_outbound_frame_size)
        ):
            http2.send_data(1, answers[:room])
            answers = answers[room:]
        if is_over and not answers:
            is_over = False
            http2.send_headers(1, [("grpc-status", "0")], end_stream=True)
        far.send(http2.data_to_send())


def framed(message) -> bytes:
    """A message of gRPC."""
    encoded = message.SerializeToString()
    return b"\0" + len(encoded).to_bytes(4) + encoded

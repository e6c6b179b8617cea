"""Auth services on loopback, and every way to them: web port, load balancer, SSH proxy.

    AuthService (grpclib, TLS that asks for user certificates), one per cluster
    WebPort      forwards by the cluster name in the ClientHello's ALPN, unread
    Balancer     ends TLS, then WebSocket frames, then as WebPort
    SshProxy     TransportService with ProxyCluster
    ForwardProxy HTTP CONNECT

Nothing here uses the client's code but its generated messages.
"""

import asyncio
import base64
import contextlib
import hashlib
import os
import re
import socket
import ssl
import struct
import tempfile
import threading
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Server
from teleport_fakes import (
    CLUSTER,
    HOSTS,
    LONG_AFTER,
    LONG_AGO,
    USER_KEY,
    USER_SUBJECT,
    der,
    pem,
    pem_key,
    user_certificate,
)

from ipc.messages import ClusterState
from workers.proxy.teleport.credentials import parse_credentials
from workers.proxy.teleport.home import Login
from workers.proxy.teleport.pb import (
    auth_grpc,
    auth_pb2,
    presence_grpc,
    presence_pb2,
    transport_grpc,
    transport_pb2,
    trust_grpc,
    types_pb2,
    vnet_grpc,
    vnet_pb2,
)
from workers.proxy.teleport.profile import Profile

HOST = "127.0.0.1"
WAYS = ("direct", "upgrade", "transport")


def make_authority(cluster=CLUSTER):
    """As Teleport makes them: a serial number in the subject tells those of one cluster apart."""
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, cluster),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, str(serial)),
        ]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(LONG_AGO)
        .not_valid_after(LONG_AFTER)
        .add_extension(x509.BasicConstraints(True, None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def issue(authority, names=(HOSTS,)):
    """A server certificate for these names, as (certificate, key)."""
    signer, issuer = authority
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives = [
        x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
        for name in names
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(LONG_AGO)
        .not_valid_after(LONG_AFTER)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return certificate, key


def server_context(authority, *, names=(HOSTS,), clients=None, alpn=("h2",)):
    """A server's context; with `clients` (an authority) it wants certificates of that one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate, key = issue(authority, names)
    with tempfile.NamedTemporaryFile() as file:
        file.write(pem(certificate) + pem_key(key))
        file.flush()
        context.load_cert_chain(file.name)
    context.set_alpn_protocols(list(alpn))
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=pem(clients[1]).decode())
    return context


@contextlib.contextmanager
def handshaking_server(context):
    """Shakes hands once, in a thread, and sends the alert with which that may end.

    The servers of asyncio and uvloop just close when a handshake fails.
    """
    listener = socket.create_server((HOST, 0))

    def serve():
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(10)
            tls = context.wrap_bio(incoming := ssl.MemoryBIO(), outgoing := ssl.MemoryBIO(), True)
            with contextlib.suppress(ssl.SSLCertVerificationError):
                while data := connection.recv(65536):
                    incoming.write(data)
                    with contextlib.suppress(ssl.SSLWantReadError):
                        tls.do_handshake()
                    connection.sendall(outgoing.read())
            connection.sendall(outgoing.read())  # the alert
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        thread.join(20)
        listener.close()


def _complete(base):
    """The base class with all methods, each unimplemented."""

    async def refuse(self, stream):
        raise GRPCError(Status.UNIMPLEMENTED, "not here")

    methods = dict.fromkeys(base.__abstractmethods__, refuse)
    return type(base.__name__, (base,), methods)


# ruff: noqa: N802 - the names are Teleport's
class Auth(_complete(auth_grpc.AuthServiceBase)):
    """The auth service of one cluster. `rows` maps a kind to its resources."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.rows = {}
        self.requests = []
        self.max_rows = 10_000  # of a page; more do not fit into a message
        self.error = None
        self.gate = None
        self.connections = set()
        self.versions = []

    async def Ping(self, stream):
        await stream.recv_message()
        self.connections.add(stream.peer.addr())
        self.versions.append(stream.metadata["version"])
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        await stream.send_message(
            auth_pb2.PingResponse(ClusterName=self.cluster.name, ServerVersion="17.4.2")
        )

    async def ListResources(self, stream):
        await self.list_resources(stream)

    async def list_resources(self, stream):
        request = await stream.recv_message()
        self.requests.append(request)
        if request.Limit > self.max_rows:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "grpc: received message larger than max")
        rows = self.rows.get(request.ResourceType, [])
        start = int(request.StartKey or 0)
        end = start + request.Limit
        await stream.send_message(
            auth_pb2.ListResourcesResponse(
                Resources=rows[start:end], NextKey=str(end) if end < len(rows) else ""
            )
        )

    async def CreateAuthenticateChallenge(self, stream):
        request = await stream.recv_message()
        assert request.WhichOneof("Request") == "ContextUser"
        await stream.send_message(auth_pb2.MFAAuthenticateChallenge(TOTP=auth_pb2.TOTPChallenge()))

    async def IsMFARequired(self, stream):
        await stream.recv_message()
        raise self.error


class Vnet(_complete(vnet_grpc.VnetConfigServiceBase)):
    async def GetVnetConfig(self, stream):
        await stream.recv_message()
        spec = vnet_pb2.VnetConfigSpec(ipv4_cidr_range="100.80.0.0/16")
        await stream.send_message(vnet_pb2.VnetConfig(spec=spec))


class Presence(_complete(presence_grpc.PresenceServiceBase)):
    """Two leaves per page."""

    def __init__(self, names):
        self.names = names

    async def ListRemoteClusters(self, stream):
        request = await stream.recv_message()
        start = int(request.page_token or 0)
        page = [
            types_pb2.RemoteClusterV3(
                Metadata=types_pb2.Metadata(Name=name),
                # Go's zero time.
                Status=types_pb2.RemoteClusterStatusV3(
                    Connection="offline", LastHeartbeat={"seconds": -62135596800}
                ),
            )
            for name in self.names[start : start + 2]
        ]
        token = str(start + 2) if start + 2 < len(self.names) else ""
        await stream.send_message(
            presence_pb2.ListRemoteClustersResponse(remote_clusters=page, next_page_token=token)
        )


class Trust(_complete(trust_grpc.TrustServiceBase)):
    def __init__(self):
        self.active = []
        self.additional = []
        self.active_ssh = []
        self.additional_ssh = []

    async def GetCertAuthority(self, stream):
        request = await stream.recv_message()
        assert (request.type, request.include_key) == ("host", False)

        def keys(certificates, lines):
            return types_pb2.CAKeySet(
                TLS=[types_pb2.TLSKeyPair(Cert=c) for c in certificates],
                SSH=[types_pb2.SSHKeyPair(PublicKey=line) for line in lines],
            )

        await stream.send_message(
            types_pb2.CertAuthorityV2(
                Spec=types_pb2.CertAuthoritySpecV2(
                    ActiveKeys=keys(self.active, self.active_ssh),
                    AdditionalTrustedKeys=keys(self.additional, self.additional_ssh),
                )
            )
        )


@dataclass
class Cluster:
    """A cluster with its authority, which signs servers, and its auth service."""

    name: str
    authority: tuple
    auth: Auth = None
    presence: Presence = field(default_factory=lambda: Presence([]))
    trust: Trust = field(default_factory=Trust)
    port: int = 0

    def __post_init__(self):
        self.auth = Auth(self)


async def _copy(reader, writer):
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


class _Stop:
    """Servers and what they have open; `cut` ends all connections as a crash would."""

    def __init__(self):
        self.port = 0
        self.writers = set()
        self.is_silent = False
        self._tasks = set()
        self._server = None

    async def start(self, context=None):
        self._server = await asyncio.start_server(self._accept, HOST, 0, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        self.writers.add(writer)
        try:
            with contextlib.suppress(OSError, EOFError):
                await self.serve(reader, writer)
        finally:
            self._tasks.discard(task)
            self.writers.discard(writer)
            writer.close()

    def cut(self):
        for writer in self.writers:
            writer.transport.abort()

    async def stop(self):
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class WebPort(_Stop):
    def __init__(self, clusters):
        super().__init__()
        self.clusters = clusters

    def find(self, hello):
        encoded = re.search(rb"teleport-auth@([0-9a-f]+)\.teleport\.cluster\.local", hello)
        name = bytes.fromhex(encoded[1].decode()).decode() if encoded else ""
        return self.clusters.get(name)

    async def serve(self, reader, writer):
        hello = await reader.read(65536)
        cluster = self.find(hello)
        if cluster is None:
            return
        back, forth = await asyncio.open_connection(HOST, cluster.port)
        self.writers.add(forth)
        forth.write(hello)
        await asyncio.gather(_copy(reader, forth), self._back(back, writer))

    async def _back(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if not self.is_silent:
                    writer.write(data)
                    await writer.drain()
        writer.close()


class Balancer(WebPort):
    """`status` other than 101 refuses; `pings` are sent before the first data."""

    def __init__(self, clusters):
        super().__init__(clusters)
        self.status = "101 Switching Protocols"
        self.pings = 0
        self.pongs = []
        self.protocols = []

    async def serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("GET /webapi/connectionupgrade HTTP/1.1\r\n")
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
        }
        self.protocols.append(fields["sec-websocket-protocol"])
        accept = hashlib.sha1(
            fields["sec-websocket-key"].encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        ).digest()
        writer.write(
            f"HTTP/1.1 {self.status}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Protocol: {fields['sec-websocket-protocol']}\r\n"
            f"Sec-WebSocket-Accept: {base64.b64encode(accept).decode()}\r\n\r\n".encode()
        )
        if not self.status.startswith("101"):
            return
        writer.write(b"\x89\x02hi" * self.pings)
        hello = await self._receive(reader)
        cluster = self.find(hello)
        if cluster is None:
            writer.write(b"\x88\x00")
            return
        back, forth = await asyncio.open_connection(HOST, cluster.port)
        self.writers.add(forth)
        forth.write(hello)
        down = asyncio.create_task(self._frames(back, writer))
        try:
            while data := await self._receive(reader):
                forth.write(data)
                await forth.drain()
        finally:
            down.cancel()
            forth.close()

    async def _receive(self, reader):
        """The payload of the next binary frame; empty when the client closed."""
        while True:
            start, length = await reader.readexactly(2)
            assert length & 0x80, "a client's frame is masked"
            length &= 0x7F
            if length == 126:
                (length,) = struct.unpack(">H", await reader.readexactly(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", await reader.readexactly(8))
            key = await reader.readexactly(4)
            data = await reader.readexactly(length)
            data = bytes(byte ^ key[i % 4] for i, byte in enumerate(data))
            match start:
                case 0x82:
                    return data
                case 0x8A:
                    self.pongs.append(data)
                case 0x88:
                    return b""

    async def _frames(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(1000):
                if not self.is_silent:
                    writer.write(struct.pack(">BBH", 0x82, 126, len(data)) + data)
                    await writer.drain()
            writer.close()


class Transport(_complete(transport_grpc.TransportServiceBase)):
    def __init__(self, clusters):
        self.clusters = clusters
        self.names = []
        self.connections = set()
        self.transports = set()
        self.streams = 0
        self.errors = {}
        self.is_silent = False

    async def ProxyCluster(self, stream):
        self.connections.add(stream.peer.addr())
        self.transports.add(stream.peer._transport)
        name = (await stream.recv_message()).cluster
        self.names.append(name)
        if name in self.errors:
            raise self.errors[name]
        reader, writer = await asyncio.open_connection(HOST, self.clusters[name].port)
        self.streams += 1
        ways = [
            asyncio.create_task(self._up(stream, writer)),
            asyncio.create_task(self._down(reader, stream)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.streams -= 1
            writer.close()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _up(self, stream, writer):
        while (message := await stream.recv_message()) is not None:
            assert len(message.frame.payload) <= 16 * 1024
            writer.write(message.frame.payload)
            await writer.drain()

    async def _down(self, reader, stream):
        while data := await reader.read(16 * 1024):
            if not self.is_silent:
                frame = transport_pb2.Frame(payload=data)
                await stream.send_message(transport_pb2.ProxyClusterResponse(frame=frame))


class ForwardProxy(_Stop):
    """HTTP CONNECT to any name, which is always this machine."""

    def __init__(self):
        super().__init__()
        self.targets = []

    async def serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        target = head.split(" ")[1]
        self.targets.append(target)
        back, forth = await asyncio.open_connection(HOST, int(target.rpartition(":")[2]))
        self.writers.add(forth)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(_copy(reader, forth), _copy(back, writer))


class Bed:
    """A root cluster, leaves, and all ways to them. `root_host` are the names of the web port."""

    def __init__(self, directory, root=CLUSTER, leaves=("leaf.test",), host=HOST):
        self.host = host
        self.root = Cluster(root, make_authority(root))
        self.leaves = [Cluster(name, make_authority(name)) for name in leaves]
        self.clusters = {c.name: c for c in (self.root, *self.leaves)}
        self.users = make_authority(root)
        self.web = make_authority("web")
        self.ca_file = Path(directory) / "web.pem"
        self.ca_file.write_bytes(pem(self.web[1]))
        self.web_port = WebPort(self.clusters)
        self.balancer = Balancer(self.clusters)
        self.forward_proxy = ForwardProxy()
        self.transport = Transport(self.clusters)
        self._servers = []

    async def __aenter__(self):
        for cluster in self.clusters.values():
            context = server_context(cluster.authority, clients=self.users)
            services = [cluster.auth, Vnet(), cluster.presence, cluster.trust]
            cluster.port = await self._serve(services, context)
        context = server_context(
            self.root.authority,
            clients=self.users,
            alpn=("h2", "teleport-proxy-ssh-grpc"),
        )
        self.ssh_port = await self._serve([self.transport], context)
        await self.web_port.start()
        await self.forward_proxy.start()
        outer = server_context(self.web, names=(self.host,), alpn=("http/1.1",))
        await self.balancer.start(outer)
        return self

    async def _serve(self, services, context):
        server = Server(services)
        await server.start(HOST, 0, ssl=context)
        self._servers.append(server)
        return server._server.sockets[0].getsockname()[1]

    def crash_ssh_proxy(self):
        """Cuts the TransportService's connections; it takes new ones."""
        for transport in self.transport.transports:
            transport.abort()

    async def __aexit__(self, *_exc):
        for stopped in (self.web_port, self.balancer, self.forward_proxy):
            await stopped.stop()
        for server in self._servers:
            server.close()
            await server.wait_closed()

    def profile(self, way):
        port = self.balancer.port if way == "upgrade" else self.web_port.port
        return Profile(
            name=self.host,
            web_host=self.host,
            web_port=port,
            user="alice",
            cluster=self.root.name,
            is_tls_routing_enabled=way != "transport",
            is_conn_upgrade_required=way == "upgrade",
            private_key_policy="none",
            mfa_mode="",
            ssh_proxy=(self.host, self.ssh_port),
        )

    def login(self, way):
        certificate = user_certificate(LONG_AFTER, USER_SUBJECT, authority=self.users)
        authorities = {c.name: (der(c.authority[1]),) for c in self.clusters.values()}
        credentials = parse_credentials(pem(certificate), pem_key(USER_KEY))
        return Login(self.host, self.profile(way), credentials, authorities, ClusterState.OK, "")


def open_files():
    """How many sockets this process has open."""
    count = 0
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            count += str(Path(f"/proc/self/fd/{entry}").readlink()).startswith("socket:")
    return count

"""A small Teleport client for tests: plain `ssl` and grpclib, nothing of our own client."""

import asyncio
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpclib.client import Channel

from workers.proxy.teleport.pb import auth_grpc, auth_pb2

DOMAIN = "teleport.cluster.local"
VERSION = {"version": "18.0.0"}
REQUEST = auth_pb2.UserCertsRequest


def encoded(cluster: str) -> str:
    return f"{cluster.encode().hex()}.{DOMAIN}"


class TlsClient:
    """A blocking TLS connection whose directions end one by one."""

    def __init__(self, address, context, server_name):
        self.sock = socket.create_connection(address, timeout=10)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=server_name)
        try:
            self._run(self.tls.do_handshake)
        except BaseException:
            self.sock.close()
            raise

    def _flush(self):
        if self.outgoing.pending:
            self.sock.sendall(self.outgoing.read())

    def _run(self, function, *arguments):
        while True:
            try:
                result = function(*arguments)
            except ssl.SSLWantReadError:
                self._flush()
                data = self.sock.recv(65536)
                if data:
                    self.incoming.write(data)
                else:
                    self.incoming.write_eof()
            except ssl.SSLError:
                self._flush()
                raise
            else:
                self._flush()
                return result

    def send(self, data):
        view = memoryview(data)
        while view:
            view = view[self.tls.write(view) :]
        self._flush()

    def send_eof(self):
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            self._flush()

    def recv(self):
        """Some plaintext; empty after the server's close_notify."""
        try:
            return self._run(self.tls.read, 65536)
        except ssl.SSLZeroReturnError:
            return b""

    def recv_all(self):
        parts = []
        while data := self.recv():
            parts.append(data)
        return b"".join(parts)

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.close()


class Home:
    """What a client reads of a tsh home."""

    def __init__(self, path: Path):
        self.path = path
        name = (path / "current-profile").read_text().strip()
        self.profile = yaml.safe_load((path / f"{name}.yaml").read_text())
        self.keys = path / "keys" / name
        self.user = self.profile["user"]
        self.cluster = self.profile["cluster"]
        host, _, port = self.profile["web_proxy_addr"].rpartition(":")
        self.proxy_host = host
        self.address = ("127.0.0.1", int(port))

    def context(self, protocols, *, ca=None, certificate=None, key=None):
        context = ssl.create_default_context(cafile=str(ca or self.path / "web-ca.pem"))
        context.set_alpn_protocols(protocols)
        if certificate is not None:
            context.load_cert_chain(str(certificate), str(key))
        return context

    def auth_context(self, cluster, *, certificate=None, key=None):
        return self.context(
            [f"teleport-auth@{encoded(cluster)}", "h2"],
            ca=self.keys / "cas" / f"{cluster}.pem",
            certificate=certificate or self.keys / f"{self.user}.crt",
            key=key or self.keys / f"{self.user}.key",
        )

    @asynccontextmanager
    async def auth(self, cluster=None, *, sni=None, **pair) -> AsyncIterator[Channel]:
        context = self.auth_context(cluster or self.cluster, **pair)
        channel = TlsChannel(self.address, context, encoded(sni or self.cluster))
        try:
            yield channel
        finally:
            channel.close()

    def app(self, pem: "AppPair", protocols=("teleport-tcp-ping", "teleport-tcp")) -> TlsClient:
        with tempfile.NamedTemporaryFile() as file:
            file.write(pem.key + pem.certificate)
            file.flush()
            context = self.context(list(protocols), certificate=file.name, key=file.name)
        return TlsClient(self.address, context, self.proxy_host)


class TlsChannel(Channel):
    """A grpclib channel with an SNI of its own."""

    def __init__(self, address, context, server_name):
        super().__init__(*address, ssl=context)
        self._context = context
        self._server_name = server_name

    async def _create_connection(self):
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(
            self._protocol_factory,
            self._host,
            self._port,
            ssl=self._context,
            server_hostname=self._server_name,
        )
        return protocol


class AppPair:
    """A fresh key, and the certificate the cluster gave for it."""

    def __init__(self):
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.key = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        self.certificate = b""

    def public(self):
        return self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


def cert_request(home: Home, pair: AppPair, route: dict[str, Any], **changes) -> REQUEST:
    request = REQUEST(
        Username=home.user,
        Usage=REQUEST.App,
        RequesterName=REQUEST.TSH_APP_LOCAL_PROXY,
        RouteToCluster=home.cluster,
        RouteToApp=auth_pb2.RouteToApp(**route),
        TLSPublicKey=pair.public(),
    )
    request.Expires.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    for name, value in changes.items():
        setattr(request, name, value)
    return request


async def app_pair(home: Home, route: dict[str, Any], **changes) -> AppPair:
    """An app certificate from the root cluster."""
    pair = AppPair()
    async with home.auth() as channel:
        stub = auth_grpc.AuthServiceStub(channel)
        request = cert_request(home, pair, route, **changes)
        certs = await stub.GenerateUserCerts(request, metadata=VERSION)
    pair.certificate = certs.TLS
    return pair


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def unframe(data: bytes) -> tuple[bytes, int]:
    """The payload and the number of pings in whole frames."""
    payload, pings = b"", 0
    while data:
        length = int.from_bytes(data[:4], "big")
        assert len(data) >= 4 + length, "a frame is cut"
        pings += length == 0
        payload += data[4 : 4 + length]
        data = data[4 + length :]
    return payload, pings

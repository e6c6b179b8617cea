"""A small Teleport client for tests: plain `ssl` and grpclib, nothing of our own client."""

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpclib.client import Channel

from workers.proxy.teleport.pb import auth_grpc, auth_pb2, mfa_pb2

DOMAIN = "teleport.cluster.local"
VERSION = {"version": "18.0.0"}
REQUEST = auth_pb2.UserCertsRequest


def encoded(cluster: str) -> str:
    return f"{cluster.encode().hex()}.{DOMAIN}"


class TlsClient:
    """A blocking TLS connection whose directions end one by one; `address` may be a socket."""

    def __init__(self, address, context, server_name):
        connected = isinstance(address, socket.socket)
        self.sock = address if connected else socket.create_connection(address, timeout=10)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=server_name)
        self.unread = b""
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
        # OpenSSL looks for the other end's close_notify at once, and fails if it finds data.
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while data := self.tls.read(65536):
                self.unread += data
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self._flush()

    def recv(self):
        """Some plaintext; empty after the server's close_notify."""
        if self.unread:
            data, self.unread = self.unread, b""
            return data
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
        return TlsClient(self.address, self.pair_context(pem, protocols), self.proxy_host)

    def pair_context(self, pem: "AppPair", protocols, *, ca=None) -> ssl.SSLContext:
        with tempfile.NamedTemporaryFile() as file:
            file.write(pem.key + pem.certificate)
            file.flush()
            return self.context(list(protocols), ca=ca, certificate=file.name, key=file.name)


class TlsChannel(Channel):
    """A grpclib channel with an SNI of its own; `address` may be a socket."""

    def __init__(self, address, context, server_name):
        self._sock = address if isinstance(address, socket.socket) else None
        super().__init__(*(("", 0) if self._sock else address), ssl=context)
        self._context = context
        self._server_name = server_name

    async def _create_connection(self):
        loop = asyncio.get_running_loop()
        place = {"host": self._host, "port": self._port}
        if self._sock is not None:
            place = {"sock": self._sock.dup()}  # the loop closes what it is given
        _, protocol = await loop.create_connection(
            self._protocol_factory,
            **place,
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


async def database_pair(home: Home, route: dict[str, Any], **changes) -> AppPair:
    """A database certificate from the root cluster, as a local proxy asks for it."""
    pair = AppPair()
    usage = {"Usage": REQUEST.Database, "RequesterName": REQUEST.TSH_DB_LOCAL_PROXY_TUNNEL}
    request = cert_request(home, pair, {}, **{**usage, **changes})
    request.RouteToDatabase.CopyFrom(auth_pb2.RouteToDatabase(**route))
    async with home.auth() as channel:
        stub = auth_grpc.AuthServiceStub(channel)
        pair.certificate = (await stub.GenerateUserCerts(request, metadata=VERSION)).TLS
    return pair


def session_challenge(**fields) -> auth_pb2.CreateAuthenticateChallengeRequest:
    """What a client sends before it asks for a certificate with MFA."""
    return auth_pb2.CreateAuthenticateChallengeRequest(
        ContextUser=auth_pb2.ContextUser(),
        ChallengeExtensions=mfa_pb2.ChallengeExtensions(scope=mfa_pb2.CHALLENGE_SCOPE_USER_SESSION),
        **fields,
    )


class SoftwareKey:
    """Answers in place of the demo user's security key (WebAuthn level 2, section 6.3.3)."""

    def __init__(self, home: Path):
        document = json.loads((home / "webauthn-credential.json").read_text())
        self.rp_id = document["rp_id"]
        self.credential_id = base64.b64decode(document["credential_id"])
        self.user_handle = base64.b64decode(document["user_handle"])
        pem = document["private_key"].encode()
        self._key = serialization.load_pem_private_key(pem, None)

    def answer(
        self, challenge, origin, *, kind="webauthn.get", flags=1, rp_id=None, credential_id=None
    ) -> auth_pb2.MFAAuthenticateResponse:
        options = challenge.WebauthnChallenge.public_key
        assert [d.id for d in options.allow_credentials] == [self.credential_id]
        encoded_challenge = base64.urlsafe_b64encode(options.challenge).rstrip(b"=").decode()
        client_data = json.dumps(
            {"type": kind, "challenge": encoded_challenge, "origin": origin}
        ).encode()
        rp_hash = hashlib.sha256((rp_id or options.rp_id).encode()).digest()
        data = rp_hash + bytes([flags]) + bytes(4)
        signed = data + hashlib.sha256(client_data).digest()
        response = auth_pb2.MFAAuthenticateResponse()
        response.Webauthn.type = "public-key"
        response.Webauthn.raw_id = credential_id or self.credential_id
        response.Webauthn.response.client_data_json = client_data
        response.Webauthn.response.authenticator_data = data
        response.Webauthn.response.signature = self._key.sign(signed, ec.ECDSA(hashes.SHA256()))
        return response


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

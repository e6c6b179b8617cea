"""Small TLS far ends and a test CA for the relay's tests.

The peers use `ssl.SSLObject` in blocking threads and share nothing with `workers.proxy.tls`.
"""

import contextlib
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

SERVER_NAME = "proxy.example.test"
DEADLINE_SECONDS = 30
PEM = serialization.Encoding.PEM


class Authority:
    """A CA that issues certificates for one name each."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test CA")])
        self._certificate = self._sign(self._name, self._key, [x509.BasicConstraints(True, None)])
        self.pem = self._certificate.public_bytes(PEM).decode()

    def load(self, context: ssl.SSLContext, name: str) -> None:
        """Gives `context` a fresh certificate for `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        certificate = self._sign(subject, key, [names])
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "pem")
            path.write_bytes(
                certificate.public_bytes(PEM)
                + key.private_bytes(
                    PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
            context.load_cert_chain(path)

    def _sign(self, subject, key, extensions):
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256())


@cache
def authority() -> Authority:
    return Authority()


@cache
def stranger() -> Authority:
    """A CA that nobody trusts."""
    return Authority()


def client_context(alpn: str = "teleport-tcp", issuer: Authority | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority().pem)
    (issuer or authority()).load(context, "client")
    context.set_alpn_protocols([alpn])
    return context


@cache
def server_context(alpn: str = "teleport-tcp", version: str = "TLSv1_3") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    authority().load(context, SERVER_NAME)
    context.load_verify_locations(cadata=authority().pem)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([alpn])
    return context


class FarConnection:
    """One accepted TLS connection, blocking; each direction can be ended by itself."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, is_ping: bool) -> None:
        self.socket = sock
        self._is_ping = is_ping
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._unread = b""
        self._frame = b""
        while not self._shake():
            pass

    def _shake(self) -> bool:
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            self._incoming.write(self.socket.recv(65536) or b"eof")
            return False
        except ssl.SSLError:
            self._flush()
            raise
        self._flush()
        return True

    def _flush(self) -> None:
        self.socket.sendall(self._outgoing.read())

    def send(self, data: bytes) -> None:
        """Sends application data; with ping in one frame, with a ping before and behind."""
        ping = bytes(4)
        self.send_raw(ping + struct.pack(">I", len(data)) + data + ping if self._is_ping else data)

    def send_raw(self, data: bytes) -> None:
        self._ssl.write(data)
        self._flush()

    def recv(self) -> bytes:
        """Some application data, at most one record; empty at close_notify or FIN."""
        while True:
            try:
                return self._ssl.read(65536)
            except ssl.SSLWantReadError:
                records = self.socket.recv(65536)
                if not records:
                    return b""
                self._incoming.write(records)
            except ssl.SSLZeroReturnError:
                return b""

    @property
    def has_unread(self) -> bool:
        """Whether more of what has come is left for `recv`."""
        return bool(self._incoming.pending)

    def recv_all(self) -> bytes:
        """Everything to the end, without framing."""
        data = b"".join(iter(self.recv, b""))
        return unframe(data) if self._is_ping else data

    def close_notify(self) -> None:
        """Ends the sending direction only. What has come so far must have been read."""
        assert not self._incoming.pending
        with contextlib.suppress(ssl.SSLWantReadError):
            self._ssl.unwrap()
        self._flush()

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def unframe(data: bytes) -> bytes:
    """Payload of complete ping frames, the slow and obvious way."""
    payload = b""
    pieces = []
    while data:
        (length,) = struct.unpack(">I", data[:4])
        assert len(data) >= 4 + length
        pieces.append(data[4 : 4 + length])
        data = data[4 + length :]
    return payload.join(pieces)


class Peer:
    """A listening far end; each connection is served by `handler` in a thread of its own.

    Use as a context manager: leaving it waits for the handlers and raises what they raised.
    """

    def __init__(
        self,
        handler: Callable[[FarConnection], None],
        context: ssl.SSLContext | None = None,
        *,
        is_ping: bool = False,
        is_tls: bool = True,
        ignored_errors: tuple[type[BaseException], ...] = (),
    ) -> None:
        self._ignored_errors = ignored_errors
        self._handler = handler
        self._context = context or server_context(
            "teleport-tcp-ping" if is_ping else "teleport-tcp"
        )
        self._is_ping = is_ping
        self._is_tls = is_tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        self.errors: list[BaseException] = []

    def __enter__(self) -> Self:
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(DEADLINE_SECONDS)
        self._listener.close()
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)
            assert not thread.is_alive()
        if self.errors and kind is None:
            raise self.errors[0]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE_SECONDS)
        with sock:
            try:
                if self._is_tls:
                    self._handler(FarConnection(sock, self._context, self._is_ping))
                else:
                    self._handler(sock)
            except self._ignored_errors:
                pass
            except (OSError, AssertionError) as error:
                self.errors.append(error)

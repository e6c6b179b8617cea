"""Errors of foreign libraries become errors of ours, each with the state and refusal it means."""

import asyncio
import contextlib
import socket
import ssl
import threading

import pytest
import uvloop
from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from teleport_fakes import (
    LONG_AFTER,
    PROXY,
    USER_KEY,
    make_authority,
    pem,
    pem_key,
    user_certificate,
    write_home,
)

from ipc.messages import ClusterState, Refusal
from workers.proxy.teleport import auth_client
from workers.proxy.teleport.channel import translate
from workers.proxy.teleport.contexts import load_identity
from workers.proxy.teleport.errors import (
    LoginExpiredError,
    MfaRequiredError,
    NotFoundError,
    NotImplementedByClusterError,
    RefusedError,
    UnreachableError,
    ZonesUnknownError,
    safe_text,
)
from workers.proxy.teleport.home import read_home


def tls_error(reason):
    error = ssl.SSLError(1, f"[SSL: {reason}]")
    error.reason = reason
    return error


def untrusted():
    error = ssl.SSLCertVerificationError("no")
    error.verify_message = "self-signed certificate"  # ssl sets it on those it raises
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GRPCError(Status.PERMISSION_DENIED, "no"), RefusedError),
        (
            GRPCError(Status.PERMISSION_DENIED, "access to resource requires MFA"),
            MfaRequiredError,
        ),
        (GRPCError(Status.NOT_FOUND, "x"), NotFoundError),
        (GRPCError(Status.UNIMPLEMENTED, "x"), NotImplementedByClusterError),
        (GRPCError(Status.UNAVAILABLE, "x"), UnreachableError),
        (GRPCError(Status.UNKNOWN), UnreachableError),
        (GRPCError(Status.UNAUTHENTICATED, "x"), LoginExpiredError),
        (StreamTerminatedError("Connection lost"), UnreachableError),
        (TimeoutError(), UnreachableError),
        (ConnectionRefusedError(111, "Connection refused"), UnreachableError),
        (socket.gaierror(-2, "Name or service not known"), UnreachableError),
        (tls_error("TLSV1_ALERT_UNKNOWN_CA"), LoginExpiredError),
        (tls_error("SSLV3_ALERT_CERTIFICATE_EXPIRED"), LoginExpiredError),
        (tls_error("WRONG_VERSION_NUMBER"), UnreachableError),
        (untrusted(), UnreachableError),
        (DecodeError("x"), UnreachableError),
    ],
)
def test_foreign_errors_are_translated(error, expected):
    translated = translate(error, "demo.test", "proxy.test")
    assert type(translated) is expected
    assert "demo.test" in str(translated)


def test_a_hostile_message_becomes_one_short_line():
    error = GRPCError(Status.PERMISSION_DENIED, "a\n\x1b[31m" + "b" * 10_000)
    text = str(translate(error, "demo.test", "proxy.test"))
    assert text.isprintable()
    assert len(text) < 500


def test_safe_text_keeps_ordinary_text():
    assert safe_text("  a  b\tc ") == "a b c"
    assert safe_text("abcdef", 5) == "ab..."


def test_unknown_zones_show_what_stands_in_the_way():
    error = ZonesUnknownError(LoginExpiredError("x"))
    assert (error.refusal, error.state) == (Refusal.NOT_LOGGED_IN, ClusterState.LOGIN_EXPIRED)


@contextlib.contextmanager
def tls_server(client_authority):
    """Shakes hands once, as a server that takes only certificates of `client_authority`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=pem(client_authority).decode())
    context.set_alpn_protocols(["h2"])
    load_identity(context, pem(user_certificate(LONG_AFTER)), pem_key(USER_KEY))
    listener = socket.create_server(("127.0.0.1", 0))

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


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_certificate_the_server_does_not_take_asks_for_a_login(tmp_path, run):
    async def ping(port):
        write_home(tmp_path, user_certificate(LONG_AFTER))
        path = tmp_path / f"{PROXY}.yaml"
        path.write_text(path.read_text().replace(f"{PROXY}:443", f"127.0.0.1:{port}"))
        (tmp_path / "keys" / PROXY).rename(tmp_path / "keys" / "127.0.0.1")
        (login,) = read_home(tmp_path).logins
        client = auth_client.connect(login)
        try:
            with pytest.raises(LoginExpiredError, match="tsh login"):
                await client.ping()
        finally:
            client.close()

    with tls_server(make_authority()[1]) as port:
        run(ping(port))

"""Errors of foreign libraries become errors of ours, each with the state and refusal it means."""

import asyncio
import socket
import ssl

import pytest
import uvloop
from auth_bed import handshaking_server, server_context
from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from teleport_fakes import (
    AUTHORITY,
    AUTHORITY_KEY,
    LONG_AFTER,
    PROXY,
    make_authority,
    user_certificate,
    write_home,
)

from ipc.messages import ClusterState, Refusal
from workers.proxy.teleport import auth_client
from workers.proxy.teleport.channel import MessageTooLargeError, translate
from workers.proxy.teleport.errors import (
    AccessDeniedError,
    DeviceTrustError,
    KeyPolicyError,
    LimitExceededError,
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
        (GRPCError(Status.PERMISSION_DENIED, "no"), AccessDeniedError),
        (GRPCError(Status.INVALID_ARGUMENT, "no"), RefusedError),
        (
            GRPCError(Status.PERMISSION_DENIED, "access to resource requires MFA"),
            MfaRequiredError,
        ),
        (
            GRPCError(Status.PERMISSION_DENIED, "access to resource requires a trusted device"),
            DeviceTrustError,
        ),
        (
            GRPCError(Status.INVALID_ARGUMENT, "private key policy not met: hardware_key_touch"),
            KeyPolicyError,
        ),
        (
            GRPCError(Status.PERMISSION_DENIED, "private key policy not satisfied: hardware_key"),
            KeyPolicyError,
        ),
        (
            GRPCError(
                Status.PERMISSION_DENIED,
                "access denied: client credentials have expired, please relogin.",
            ),
            LoginExpiredError,
        ),
        (GRPCError(Status.RESOURCE_EXHAUSTED, "x"), LimitExceededError),
        (MessageTooLargeError("x"), LimitExceededError),
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
        (NotImplementedError("Compression not implemented"), UnreachableError),
        (DeviceTrustError("demo.test said so"), DeviceTrustError),
    ],
)
def test_foreign_errors_are_translated(error, expected):
    translated = translate(error, "demo.test", "proxy.test")
    assert type(translated) is expected
    assert "demo.test" in str(translated)


@pytest.mark.parametrize("error", [TimeoutError(), GRPCError(Status.DEADLINE_EXCEEDED, "")])
def test_both_ends_clocks_give_the_same_words(error):
    translated = translate(error, "demo.test", "proxy.test")
    assert str(translated) == "demo.test did not answer in time"


@pytest.mark.parametrize(
    ("text", "advice", "state"),
    [
        ("requires a trusted device", "registered", ClusterState.OK),
        ("private key policy not met: hardware_key", "administrator", ClusterState.HARDWARE_KEY),
    ],
)
def test_refusals_keep_the_clusters_words_and_say_what_to_do(text, advice, state):
    error = translate(GRPCError(Status.PERMISSION_DENIED, text), "demo.test", "proxy.test")
    assert text in str(error)
    assert advice in str(error)
    assert (error.refusal, error.state) == (Refusal.CERTIFICATE_REFUSED, state)


def test_a_lost_connection_is_told_in_words():
    text = str(translate(ConnectionResetError(), "demo.test", "proxy.test"))
    assert text == "demo.test cannot be reached at proxy.test: the connection was lost"


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


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("tls_routing", ["true", "false"])
def test_a_certificate_the_server_does_not_take_asks_for_a_login(tmp_path, run, tls_routing):
    """The server is an auth service, or the SSH proxy before it."""

    async def ping(port):
        write_home(tmp_path, user_certificate(LONG_AFTER))
        path = tmp_path / f"{PROXY}.yaml"
        text = path.read_text().replace(f"{PROXY}:443", f"127.0.0.1:{port}")
        path.write_text(text.replace("enabled: true", f"enabled: {tls_routing}"))
        (tmp_path / "keys" / PROXY).rename(tmp_path / "keys" / "127.0.0.1")
        (login,) = read_home(tmp_path).logins
        client = auth_client.connect(login)
        try:
            with pytest.raises(LoginExpiredError, match="tsh login"):
                await client.ping()
        finally:
            client.close()

    context = server_context((AUTHORITY_KEY, AUTHORITY), clients=make_authority())
    with handshaking_server(context) as port:
        run(ping(port))

"""The embedded cluster as a foreign Teleport client sees it, over loopback."""

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity
from cryptography.x509.oid import NameOID
from embedded_cluster_client import (
    REQUEST,
    VERSION,
    AppPair,
    Home,
    TlsClient,
    app_pair,
    cert_request,
    encoded,
    frame,
    session_challenge,
    unframe,
)
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from demo.cluster.config import parse_cluster_file
from demo.cluster.errors import HomeError
from demo.cluster.server import EmbeddedCluster
from demo.cluster.totp import totp_code
from workers.proxy.teleport.pb import (
    auth_grpc,
    auth_pb2,
    presence_grpc,
    presence_pb2,
    trust_grpc,
    trust_pb2,
    vnet_grpc,
    vnet_pb2,
)

FILE = """
[[clusters]]
name = "root.test"
proxy_addr = "localhost:0"
ipv4_cidr_range = "100.96.0.0/12"
custom_dns_zones = ["apps.test"]
ping_interval_seconds = {ping}
apps = [
  {{ name = "hello", uri = "tcp://hello.backend.internal:80", public_addr = "hello.apps.test" }},
  {{ name = "echo", uri = "tcp://echo.backend.internal:7", public_addr = "echo.apps.test" }},
  {{ name = "ports", uri = "tcp://ports.backend.internal", public_addr = "ports.apps.test", tcp_ports = [{{ port = 8000, end_port = 8010 }}] }},
  {{ name = "real", uri = "tcp://127.0.0.1", public_addr = "real.apps.test", tcp_ports = [{{ port = 1024, end_port = 65535 }}] }},
  {{ name = "mfa", uri = "tcp://echo.backend.internal:7", public_addr = "mfa.apps.test", session_mfa = true }},
  {{ name = "secret", uri = "tcp://echo.backend.internal:7", public_addr = "secret.apps.test", allowed_roles = ["admin"] }},
  {{ name = "web", uri = "http://localhost:8080", public_addr = "web.apps.test" }},
  {{ name = "away", uri = "tcp://nothing.backend.internal:1", public_addr = "away.apps.test" }},
]
nodes = [{{ hostname = "node1" }}]
databases = [{{ name = "orders", protocol = "postgres", uri = "127.0.0.1:5432" }}]

[[clusters]]
name = "leaf.test"
leaf_of = "root.test"
apps = [{{ name = "echo", uri = "tcp://echo.backend.internal:7" }}]
"""


def route(name, target_port=0, **changes):
    return {
        "Name": name,
        "PublicAddr": f"{name}.apps.test",
        "ClusterName": "root.test",
        "TargetPort": target_port,
        **changes,
    }


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def run(tmp_path: Path, scenario: Callable[[Home], Awaitable[None]], ping: float = 30) -> None:
    """Runs a scenario against a fresh cluster and checks that nothing is left afterwards."""

    async def main() -> None:
        before = open_descriptors()
        config = parse_cluster_file(FILE.format(ping=ping))
        async with EmbeddedCluster(config, tmp_path / "tsh"):
            await asyncio.wait_for(scenario(Home(tmp_path / "tsh")), 60)
        await until(lambda: open_descriptors() <= before)
        await until(lambda: len(asyncio.all_tasks()) == 1)

    asyncio.run(main())


async def until(condition, seconds=10.0):
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "condition never became true"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def auth_stub(home, *arguments, **changes):
    async with home.auth(*arguments, **changes) as channel:
        yield auth_grpc.AuthServiceStub(channel)


@asynccontextmanager
async def refused(status, text=""):
    with pytest.raises(GRPCError) as error:
        yield
    assert error.value.status is status
    assert text in (error.value.message or "")


def exchange(home, pair, data, protocols=("teleport-tcp-ping", "teleport-tcp")):
    """Sends `data`, ends the direction, and returns what came until the server's end."""
    with home.app(pair, protocols) as tls:
        is_framed = tls.tls.selected_alpn_protocol() == "teleport-tcp-ping"
        if data:
            tls.send(frame(data) if is_framed else data)
        tls.send_eof()
        received = tls.recv_all()
        return unframe(received)[0] if is_framed else received


def flood(tls, *, is_framed):
    """Sends 128 MB without reading, which times out once all buffers are full."""
    chunk = bytes(64 * 1024)
    tls.sock.settimeout(0.5)
    for _ in range(2000):
        tls.send(frame(chunk) if is_framed else chunk)


def is_closed(home, pair, protocols=("teleport-tcp-ping", "teleport-tcp")):
    """Whether the server ends the connection after a good handshake, without a byte."""
    with home.app(pair, protocols) as tls:
        return tls.recv_all() == b""


def assert_ended(tls):
    """The server ends the connection without a byte: by alert, close_notify, FIN or reset.

    Which of them it is differs with the versions of asyncio and with what is under way.
    """
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        assert tls.recv_all() == b""


def web(home, request):
    with TlsClient(home.address, home.context(["http/1.1"]), home.proxy_host) as tls:
        tls.send(request)
        head, _, body = tls.recv_all().partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)


# --- Home and web -----------------------------------------------------------------------------


def test_home_is_what_tsh_login_leaves(tmp_path):
    async def scenario(home):
        profile = home.profile
        assert profile["web_proxy_addr"] == f"localhost:{home.address[1]}"
        assert profile["user"] == "alice"
        assert profile["cluster"] == "root.test"
        assert profile["tls_routing_enabled"] is True
        assert (home.path / "current-profile").read_text() == "localhost\n"
        files = {str(f.relative_to(home.path)) for f in home.path.rglob("*") if f.is_file()}
        keys = {"alice", "alice.pub", "alice.key", "alice.crt", "alice-ssh/root.test-cert.pub"}
        keys |= {"cas/root.test.pem", "cas/leaf.test.pem"}
        assert files == {
            *(f"keys/localhost/{name}" for name in keys),
            *("current-profile", "localhost.yaml", "known_hosts", "web-ca.pem", "totp-secret"),
            "webauthn-credential.json",
        }
        for path in (home.path / "keys").rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
        lines = (home.path / "known_hosts").read_text().splitlines()
        starts = [f"@cert-authority localhost,{c},*.{c} ssh-" for c in ("root.test", "leaf.test")]
        assert [line[: len(s)] for line, s in zip(lines, starts, strict=True)] == starts
        assert all(line.endswith(" type=host") for line in lines)

    run(tmp_path, scenario)


def test_user_certificates_hold_the_identity(tmp_path):
    async def scenario(home):
        certificate = x509.load_pem_x509_certificate((home.keys / "alice.crt").read_bytes())

        def values(oid):
            return [a.value for a in certificate.subject.get_attributes_for_oid(oid)]

        assert values(NameOID.COMMON_NAME) == ["alice"]
        assert values(NameOID.ORGANIZATION_NAME) == ["access"]
        assert set(values(NameOID.LOCALITY_NAME)) >= {"alice", "root"}
        assert values(NameOID.STREET_ADDRESS) == ["root.test"]
        assert json.loads(values(NameOID.POSTAL_CODE)[0]) == {"logins": ["alice", "root"]}
        assert values(x509.ObjectIdentifier("1.3.9999.1.7")) == ["root.test"]
        line = (home.keys / "alice-ssh" / "root.test-cert.pub").read_bytes()
        ssh = load_ssh_public_identity(line)
        assert isinstance(ssh, SSHCertificate)
        assert ssh.key_id == b"alice"
        assert b"teleport-roles" in ssh.extensions
        ssh.verify_cert_signature()

    run(tmp_path, scenario)


def test_real_login_is_never_overwritten(tmp_path):
    (tmp_path / "proxy.acme.test.yaml").write_text("user: alice\n")

    async def main():
        with pytest.raises(HomeError, match="real login"):
            await EmbeddedCluster(parse_cluster_file(FILE.format(ping=0)), tmp_path).start()

    asyncio.run(main())
    assert [path.name for path in tmp_path.iterdir()] == ["proxy.acme.test.yaml"]


def test_web_api_describes_the_cluster(tmp_path):
    async def scenario(home):
        for path in (b"/webapi/ping", b"/webapi/find"):
            status, document = await asyncio.to_thread(
                web, home, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
            assert status == 200
            assert document["cluster_name"] == "root.test"
            assert document["proxy"]["tls_routing_enabled"] is True
            assert document["proxy"]["ssh"]["public_addr"] == home.profile["web_proxy_addr"]
        status, document = await asyncio.to_thread(
            web, home, b"GET /webapi/ping/okta HTTP/1.1\r\n\r\n"
        )
        assert status == 400
        assert "okta" in document["error"]["message"]
        assert (await asyncio.to_thread(web, home, b"GET /x HTTP/1.1\r\n\r\n"))[0] == 404
        assert (await asyncio.to_thread(web, home, b"\x00\r\n\r\n"))[0] == 400

    run(tmp_path, scenario)


# --- Routing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "negotiated"),
    [
        (["teleport-tcp-ping", "teleport-tcp"], "teleport-tcp-ping"),
        (["teleport-tcp", "teleport-tcp-ping"], "teleport-tcp"),
        (["unknown", "teleport-tcp"], "teleport-tcp"),
        (["http/1.1", "teleport-tcp"], "http/1.1"),
        ([], None),
    ],
)
def test_first_known_protocol_of_the_client_wins(tmp_path, offered, negotiated):
    async def scenario(home):
        def connect():
            with TlsClient(home.address, home.context(offered), home.proxy_host) as tls:
                assert tls.tls.selected_alpn_protocol() == negotiated

        await asyncio.to_thread(connect)

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "protocols",
    [
        ["teleport-reversetunnel"],
        ["teleport-auth@zz.teleport.cluster.local", "h2"],
        [f"teleport-auth@{encoded('other.test')}", "h2"],
        [f"teleport-auth@{b'root.test'.hex()}.example.com", "h2"],
    ],
)
def test_connection_without_handler_is_closed(tmp_path, protocols):
    async def scenario(home):
        def connect():
            with pytest.raises((ssl.SSLError, ConnectionError)):
                TlsClient(home.address, home.context(protocols), home.proxy_host)

        await asyncio.to_thread(connect)

    run(tmp_path, scenario)


def test_garbage_and_silence_harm_nobody(tmp_path):
    async def scenario(home):
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b""):
            reader, writer = await asyncio.open_connection(*home.address)
            writer.write(garbage)
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
        _, silent = await asyncio.open_connection(*home.address)
        async with auth_stub(home) as stub:
            await stub.Ping(auth_pb2.PingRequest(), metadata=VERSION)
        silent.close()
        await silent.wait_closed()

    run(tmp_path, scenario)


def test_proxy_without_ping_offers_only_the_plain_protocol(tmp_path):
    async def scenario(home):
        pair = await app_pair(home, route("echo"))
        assert await asyncio.to_thread(exchange, home, pair, b"plain") == b"plain"
        protocols = ("teleport-tcp-ping", "teleport-tcp")
        with await asyncio.to_thread(home.app, pair, protocols) as tls:
            assert tls.tls.selected_alpn_protocol() == "teleport-tcp"

    run(tmp_path, scenario, ping=0)


# --- Auth service -----------------------------------------------------------------------------


def test_ping_names_cluster_and_proxy(tmp_path):
    async def scenario(home):
        async with auth_stub(home) as stub:
            reply = await stub.Ping(auth_pb2.PingRequest(), metadata=VERSION)
            assert reply.ClusterName == "root.test"
            assert reply.ProxyPublicAddr == home.profile["web_proxy_addr"]
            assert reply.ServerVersion.startswith("18.")
            assert (await stub.GetDomainName(Empty())).DomainName == "root.test"

    run(tmp_path, scenario)


def test_auth_server_shows_a_host_certificate_of_its_cluster(tmp_path):
    async def scenario(home):
        context = home.auth_context("leaf.test")
        with await asyncio.to_thread(TlsClient, home.address, context, encoded("root.test")) as tls:
            assert tls.tls.selected_alpn_protocol() == "h2"
            certificate = tls.tls.getpeercert()
        assert ("DNS", "*.teleport.cluster.local") in certificate["subjectAltName"]
        assert (("1.3.9999.1.7", "leaf.test"),) in certificate["subject"]

    run(tmp_path, scenario)


def test_leaf_verifies_the_user_by_the_root_named_in_sni(tmp_path):
    async def scenario(home):
        async with auth_stub(home, "leaf.test") as stub:
            reply = await stub.Ping(auth_pb2.PingRequest(), metadata=VERSION)
            assert reply.ClusterName == "leaf.test"
        with pytest.raises((OSError, StreamTerminatedError)):
            async with auth_stub(home, "leaf.test", sni="leaf.test") as stub:
                await stub.Ping(auth_pb2.PingRequest(), metadata=VERSION)

    run(tmp_path, scenario)


@pytest.mark.parametrize("version", ["16.9.9", "eighteen", "18.0"])
def test_unsupported_client_version_is_refused(tmp_path, version):
    async def scenario(home):
        async with (
            auth_stub(home) as stub,
            refused(Status.PERMISSION_DENIED, "client version is unsupported"),
        ):
            await stub.Ping(auth_pb2.PingRequest(), metadata={"version": version})

    run(tmp_path, scenario)


def test_client_without_certificate_gets_no_auth_service(tmp_path):
    async def scenario(home):
        def connect():
            ca = home.keys / "cas" / "root.test.pem"
            context = home.context([f"teleport-auth@{encoded('root.test')}", "h2"], ca=ca)
            # TLS 1.3: the client learns of it after its own handshake.
            with TlsClient(home.address, context, encoded("root.test")) as tls:
                assert_ended(tls)

        await asyncio.to_thread(connect)

    run(tmp_path, scenario)


def listing(**fields):
    return auth_pb2.ListResourcesRequest(**{"ResourceType": "app_server", "Limit": 100, **fields})


def names(reply):
    return [row.AppServer.Spec.App.Metadata.Name for row in reply.Resources]


def test_apps_are_found_by_public_address(tmp_path):
    async def scenario(home):
        wanted = " || ".join(
            f'resource.spec.public_addr == "{name}"'
            for name in ("ports.apps.test", "ports.apps.test.")
        )
        async with auth_stub(home) as stub:
            reply = await stub.ListResources(
                listing(Limit=1, PredicateExpression=wanted), metadata=VERSION
            )
        assert names(reply) == ["ports"]
        assert reply.NextKey == ""
        app = reply.Resources[0].AppServer.Spec.App
        assert app.Spec.PublicAddr == "ports.apps.test"
        assert [(p.Port, p.EndPort) for p in app.Spec.TCPPorts] == [(8000, 8010)]

    run(tmp_path, scenario)


def test_rows_carry_the_zero_times_that_go_servers_send(tmp_path):
    async def scenario(home):
        async with auth_stub(home) as stub:
            reply = await stub.ListResources(listing(Limit=1), metadata=VERSION)
        year_one = Timestamp(seconds=-62135596800).SerializeToString()
        # types.Rotation: Started = 5 and LastRotated = 7, inside AppServerSpecV3.Rotation = 4.
        rotation = b"\x2a\x0b" + year_one + b"\x3a\x0b" + year_one
        assert b"\x22" + bytes([len(rotation)]) + rotation in reply.SerializeToString()

    run(tmp_path, scenario)


def test_pages_cover_every_app_once_and_only_those_allowed(tmp_path):
    async def scenario(home):
        found, key = [], ""
        async with auth_stub(home) as stub:
            for _ in range(10):
                request = listing(Limit=2, StartKey=key, NeedTotalCount=True)
                reply = await stub.ListResources(request, metadata=VERSION)
                assert reply.TotalCount == 7
                found += names(reply)
                key = reply.NextKey
                if not key:
                    break
        assert found == ["away", "echo", "hello", "mfa", "ports", "real", "web"]

    run(tmp_path, scenario)


def test_other_kinds_and_unified_listing(tmp_path):
    async def scenario(home):
        async with auth_stub(home) as stub:
            nodes = await stub.ListResources(listing(ResourceType="node"))
            assert [row.Node.Spec.Hostname for row in nodes.Resources] == ["node1"]
            unified = await stub.ListUnifiedResources(
                auth_pb2.ListUnifiedResourcesRequest(Kinds=["app"], SearchKeywords=["HELLO"])
            )
            assert names(unified) == ["hello"]
            every = await stub.ListUnifiedResources(auth_pb2.ListUnifiedResourcesRequest(Limit=3))
            assert len(every.Resources) == 3
            assert every.NextKey

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "fields",
    [
        {"Limit": 0},
        {"PredicateExpression": 'resource.spec.public_addr == "x'},
        {"PredicateExpression": 'resource.spec.password == "x"'},
        {"ResourceType": "user"},
    ],
)
def test_bad_listing_is_an_invalid_argument(tmp_path, fields):
    async def scenario(home):
        async with auth_stub(home) as stub, refused(Status.INVALID_ARGUMENT):
            await stub.ListResources(listing(**fields), metadata=VERSION)

    run(tmp_path, scenario)


def test_vnet_config_is_there_where_the_file_sets_one(tmp_path):
    async def scenario(home):
        async with home.auth() as channel:
            stub = vnet_grpc.VnetConfigServiceStub(channel)
            reply = await stub.GetVnetConfig(vnet_pb2.GetVnetConfigRequest())
            assert reply.spec.ipv4_cidr_range == "100.96.0.0/12"
            assert [zone.suffix for zone in reply.spec.custom_dns_zones] == ["apps.test"]
        async with home.auth("leaf.test") as channel, refused(Status.NOT_FOUND):
            stub = vnet_grpc.VnetConfigServiceStub(channel)
            await stub.GetVnetConfig(vnet_pb2.GetVnetConfigRequest())

    run(tmp_path, scenario)


def test_leaves_and_their_authorities_are_listed(tmp_path):
    async def scenario(home):
        async with home.auth() as channel:
            presence = presence_grpc.PresenceServiceStub(channel)
            reply = await presence.ListRemoteClusters(presence_pb2.ListRemoteClustersRequest())
            assert [c.Metadata.Name for c in reply.remote_clusters] == ["leaf.test"]
            trust = trust_grpc.TrustServiceStub(channel)
            listed = await trust.GetCertAuthorities(
                trust_pb2.GetCertAuthoritiesRequest(type="host")
            )
            for authority in listed.cert_authorities_v2:
                pem = (home.keys / "cas" / f"{authority.Spec.ClusterName}.pem").read_bytes()
                assert [key.Cert for key in authority.Spec.ActiveKeys.TLS] == [pem]
            one = await trust.GetCertAuthority(
                trust_pb2.GetCertAuthorityRequest(type="host", domain="leaf.test")
            )
            assert one.Spec.ClusterName == "leaf.test"
            async with refused(Status.NOT_FOUND):
                await trust.GetCertAuthority(
                    trust_pb2.GetCertAuthorityRequest(type="host", domain="other.test")
                )
            async with refused(Status.PERMISSION_DENIED):
                await trust.GetCertAuthorities(
                    trust_pb2.GetCertAuthoritiesRequest(type="host", include_key=True)
                )

    run(tmp_path, scenario)


# --- Certificates -----------------------------------------------------------------------------


def expiry(pem):
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def test_app_certificate_routes_to_the_app_and_each_has_its_own_session(tmp_path):
    async def scenario(home):
        pairs = [await app_pair(home, route("ports", 8001)) for _ in range(2)]
        sessions = set()
        for pair in pairs:
            subject = x509.load_pem_x509_certificate(pair.certificate).subject
            values = {a.oid.dotted_string: a.value for a in subject}
            sessions.add(values["1.3.9999.1.4"])
            assert values["1.3.9999.1.5"] == "root.test"
            assert values["1.3.9999.1.6"] == "ports.apps.test"
            assert values["1.3.9999.1.10"] == "ports"
            assert values["1.3.9999.1.21"] == "8001"
        assert len(sessions) == 2

    run(tmp_path, scenario)


def test_lifetime_is_limited_by_login_and_single_use(tmp_path):
    async def scenario(home):
        login = expiry((home.keys / "alice.crt").read_bytes())
        single_use = REQUEST.CERT_PURPOSE_SINGLE_USE_CERTS
        asked = datetime.now(UTC) + timedelta(days=30)

        async def lifetime(**changes):
            pair = AppPair()
            request = cert_request(home, pair, route("echo"), **changes)
            request.Expires.FromDatetime(asked)
            async with auth_stub(home) as stub:
                certs = await stub.GenerateUserCerts(request, metadata=VERSION)
            assert not certs.SSH
            return expiry(certs.TLS)

        assert await lifetime() == login
        assert await lifetime(Purpose=single_use) == login
        short = await lifetime(Purpose=single_use, RequesterName=REQUEST.UNSPECIFIED)
        assert short <= datetime.now(UTC) + timedelta(minutes=1)

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({"Username": "bob"}, Status.PERMISSION_DENIED, "bob"),
        ({"RouteToCluster": "other.test"}, Status.NOT_FOUND, "other.test"),
        ({"TLSPublicKey": b"nonsense"}, Status.INVALID_ARGUMENT, "public key"),
        ({"TLSPublicKey": b""}, Status.INVALID_ARGUMENT, "public key"),
        ({"Usage": REQUEST.SSH}, Status.INVALID_ARGUMENT, "NodeName"),
        ({"Usage": REQUEST.Database}, Status.INVALID_ARGUMENT, "ServiceName"),
        (
            {"Usage": REQUEST.All, "Purpose": REQUEST.CERT_PURPOSE_SINGLE_USE_CERTS},
            Status.INVALID_ARGUMENT,
            "single-use",
        ),
        ({"clear": "RouteToApp"}, Status.INVALID_ARGUMENT, "app Name"),
        ({"clear": "Expires"}, Status.PERMISSION_DENIED, "expired"),
    ],
)
def test_bad_certificate_request_is_refused(tmp_path, changes, status, text):
    async def scenario(home):
        changed = dict(changes)
        cleared = changed.pop("clear", None)
        request = cert_request(home, AppPair(), route("echo"), **changed)
        if cleared:
            request.ClearField(cleared)
        async with auth_stub(home) as stub, refused(status, text):
            await stub.GenerateUserCerts(request, metadata=VERSION)

    run(tmp_path, scenario)


def test_leaf_issues_no_certificates_for_users_of_the_root(tmp_path):
    async def scenario(home):
        request = cert_request(home, AppPair(), route("echo"))
        async with auth_stub(home, "leaf.test") as stub, refused(Status.PERMISSION_DENIED):
            await stub.GenerateUserCerts(request, metadata=VERSION)

    run(tmp_path, scenario)


def test_app_certificate_is_not_accepted_by_the_auth_service(tmp_path):
    async def scenario(home):
        pair = await app_pair(home, route("echo"))
        (home.path / "app.crt").write_bytes(pair.certificate)
        (home.path / "app.key").write_bytes(pair.key)
        paths = {"certificate": home.path / "app.crt", "key": home.path / "app.key"}
        async with (
            auth_stub(home, **paths) as stub,
            refused(Status.PERMISSION_DENIED, "invalid client certificate"),
        ):
            await stub.Ping(auth_pb2.PingRequest(), metadata=VERSION)

    run(tmp_path, scenario)


def test_ssh_certificate_is_issued_for_the_given_key(tmp_path):
    async def scenario(home):
        request = REQUEST(
            Username="alice",
            Usage=REQUEST.SSH,
            NodeName="node1",
            SSHPublicKey=(home.keys / "alice.pub").read_bytes(),
        )
        request.Expires.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
        async with auth_stub(home) as stub:
            certs = await stub.GenerateUserCerts(request, metadata=VERSION)
        assert certs.TLS == b""
        assert b"root" in load_ssh_public_identity(certs.SSH).valid_principals

    run(tmp_path, scenario)


# --- App access -------------------------------------------------------------------------------


BOTH_VARIANTS = pytest.mark.parametrize("protocol", ["teleport-tcp-ping", "teleport-tcp"])


@BOTH_VARIANTS
def test_bytes_pass_and_each_direction_ends_by_itself(tmp_path, protocol):
    async def scenario(home):
        pair = await app_pair(home, route("echo"))
        data = os.urandom(100_000)
        assert await asyncio.to_thread(exchange, home, pair, data, (protocol,)) == data
        assert await asyncio.to_thread(exchange, home, pair, b"", (protocol,)) == b""

    run(tmp_path, scenario)


@BOTH_VARIANTS
def test_client_may_send_after_the_app_has_ended_its_direction(tmp_path, protocol):
    async def scenario(home):
        received = bytearray()
        ended = asyncio.Event()

        async def serve(reader, writer):
            writer.write(b"bye")
            writer.write_eof()
            while data := await reader.read(1000):
                received.extend(data)
            writer.close()
            ended.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        pair = await app_pair(home, route("real", server.sockets[0].getsockname()[1]))

        def talk():
            with home.app(pair, (protocol,)) as tls:
                is_framed = protocol == "teleport-tcp-ping"
                first = tls.recv_all()
                assert (unframe(first)[0] if is_framed else first) == b"bye"
                tls.send(frame(b"still here") if is_framed else b"still here")
                tls.send_eof()

        await asyncio.to_thread(talk)
        await asyncio.wait_for(ended.wait(), 10)
        assert bytes(received) == b"still here"
        server.close()
        await server.wait_closed()

    run(tmp_path, scenario)


@BOTH_VARIANTS
def test_client_that_never_reads_is_held_back(tmp_path, protocol):
    async def scenario(home):
        pair = await app_pair(home, route("echo"))

        tls = await asyncio.to_thread(home.app, pair, (protocol,))
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(flood, tls, is_framed=protocol == "teleport-tcp-ping")
        tls.close()

    run(tmp_path, scenario)


def test_app_talks_first_and_port_is_the_target_port(tmp_path):
    async def scenario(home):
        pair = await app_pair(home, route("ports", 8007))
        assert await asyncio.to_thread(exchange, home, pair, b"x") == b"8007\nx"

    run(tmp_path, scenario)


def test_http_page_comes_through(tmp_path):
    async def scenario(home):
        pair = await app_pair(home, route("hello"))
        request = b"GET /<path> HTTP/1.1\r\nHost: hello.apps.test\r\n\r\n"
        page = await asyncio.to_thread(exchange, home, pair, request)
        assert page.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"hello.apps.test" in page
        assert b"/&lt;path&gt;" in page

    run(tmp_path, scenario)


def test_proxy_pings_while_the_connection_is_idle(tmp_path):
    async def scenario(home):
        pair = await app_pair(home, route("echo"))

        def wait_for_pings():
            with home.app(pair) as tls:
                received = b""
                while len(received) < 12:
                    received += tls.recv()
                assert received[:12] == bytes(12)
                tls.send(frame(b"x"))
                tls.send_eof()
                payload, _ = unframe(received + tls.recv_all())
                assert payload == b"x"

        await asyncio.to_thread(wait_for_pings)

    run(tmp_path, scenario, ping=0.02)


def test_app_of_a_leaf_is_reached_through_the_root(tmp_path):
    async def scenario(home):
        leaf = route("echo", PublicAddr="echo.leaf.test", ClusterName="leaf.test")
        pair = await app_pair(home, leaf, RouteToCluster="leaf.test")
        assert await asyncio.to_thread(exchange, home, pair, b"leaf") == b"leaf"

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    "wanted",
    [
        route("ports", 9000),
        route("ports", 0),
        route("echo", 7),
        route("secret"),
        route("mfa"),
        route("web"),
        route("away"),
        route("gone"),
        route("echo", ClusterName="other.test"),
        route("echo", PublicAddr=""),
        route("echo", ClusterName=""),
    ],
    ids=str,
)
def test_connection_that_may_not_be_is_closed_without_a_byte(tmp_path, wanted):
    async def scenario(home):
        pair = await app_pair(home, wanted)
        assert await asyncio.to_thread(is_closed, home, pair)

    run(tmp_path, scenario)


def test_login_certificate_and_no_certificate_lead_to_no_app(tmp_path):
    async def scenario(home):
        pair = AppPair()
        pair.certificate = (home.keys / "alice.crt").read_bytes()
        pair.key = (home.keys / "alice.key").read_bytes()
        assert await asyncio.to_thread(is_closed, home, pair)

        def without():
            context = home.context(["teleport-tcp"])
            with TlsClient(home.address, context, home.proxy_host) as tls:
                assert tls.recv_all() == b""

        await asyncio.to_thread(without)

    run(tmp_path, scenario)


def test_client_must_send_its_certificate_alone(tmp_path):
    async def scenario(home):
        pair = await app_pair(home, route("echo"))
        pair.certificate += (home.keys / "cas" / "root.test.pem").read_bytes()
        assert await asyncio.to_thread(is_closed, home, pair)

    run(tmp_path, scenario)


def test_session_of_another_cluster_is_unknown_here(tmp_path):
    async def scenario(home):
        pair = await app_pair(home, route("echo"))
        (home.path / "pair").write_bytes(pair.key + pair.certificate)
        config = parse_cluster_file(FILE.format(ping=30))
        async with EmbeddedCluster(config, tmp_path / "other"):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                # Another user CA: an alert, which TLS 1.3 shows on the first read.
                await asyncio.to_thread(is_closed, Home(tmp_path / "other"), pair)

    run(tmp_path, scenario)


def test_one_time_password_opens_an_app_that_demands_it(tmp_path):
    async def scenario(home):
        secret = (home.path / "totp-secret").read_text().strip()
        asked = auth_pb2.IsMFARequiredRequest(App=auth_pb2.RouteToApp(**route("mfa")))
        async with auth_stub(home) as stub:
            assert (await stub.IsMFARequired(asked)).MFARequired == auth_pb2.MFA_REQUIRED_YES
            challenge = await stub.CreateAuthenticateChallenge(
                session_challenge(MFARequiredCheck=asked)
            )
            assert challenge.HasField("TOTP")
            free = auth_pb2.IsMFARequiredRequest(App=auth_pb2.RouteToApp(**route("echo")))
            assert not (await stub.IsMFARequired(free)).Required
            pair = AppPair()
            request = cert_request(
                home, pair, route("mfa"), Purpose=REQUEST.CERT_PURPOSE_SINGLE_USE_CERTS
            )
            request.MFAResponse.TOTP.Code = "000000x"
            async with refused(Status.PERMISSION_DENIED, "totp"):
                await stub.GenerateUserCerts(request)
            now = datetime.now(UTC).timestamp()
            request.MFAResponse.TOTP.Code = totp_code(secret, now)
            pair.certificate = (await stub.GenerateUserCerts(request)).TLS
        assert await asyncio.to_thread(exchange, home, pair, b"mfa") == b"mfa"

    run(tmp_path, scenario)


# --- Faults -----------------------------------------------------------------------------------


def set_faults(home, text):
    (home.path / "faults").write_text(text)


async def eventually(attempt, *arguments):
    """Repeats until `attempt` succeeds; for switching, which takes a moment."""
    for _ in range(200):
        try:
            return await attempt(*arguments)
        except (OSError, GRPCError, StreamTerminatedError, AssertionError, pytest.fail.Exception):
            await asyncio.sleep(0.02)
    return await attempt(*arguments)


async def ping_auth(home):
    async with auth_stub(home) as stub:
        await stub.Ping(auth_pb2.PingRequest())


async def assert_no_auth(home):
    with pytest.raises((OSError, StreamTerminatedError)):
        await ping_auth(home)


async def assert_echo(home, pair):
    assert await asyncio.to_thread(exchange, home, pair, b"x") == b"x"


@pytest.mark.parametrize("fault", ["auth_down", "proxy_down"])
def test_auth_service_goes_away_and_comes_back(tmp_path, fault):
    async def scenario(home):
        async with auth_stub(home) as stub:
            await stub.Ping(auth_pb2.PingRequest())
            set_faults(home, f"{fault}\nnonsense\n")
            await eventually(assert_no_auth, home)
        set_faults(home, "")
        await eventually(ping_auth, home)

    run(tmp_path, scenario)


def test_proxy_that_is_down_refuses_connections(tmp_path):
    async def scenario(home):
        set_faults(home, "proxy_down")

        async def assert_refused():
            with socket.socket() as sock:
                sock.settimeout(10)
                assert sock.connect_ex(home.address) == errno.ECONNREFUSED

        await eventually(assert_refused)

    run(tmp_path, scenario)


def test_apps_are_closed_and_come_back(tmp_path):
    async def scenario(home):
        pair = await app_pair(home, route("echo"))
        with await asyncio.to_thread(home.app, pair) as tls:
            set_faults(home, "close_apps")
            await asyncio.to_thread(assert_ended, tls)
        assert await asyncio.to_thread(is_closed, home, pair)
        set_faults(home, "")
        await eventually(assert_echo, home, pair)

    run(tmp_path, scenario)


def test_certificates_are_refused_while_the_fault_is_on(tmp_path):
    async def scenario(home):
        set_faults(home, "refuse_certs")

        async def assert_denied():
            async with refused(Status.PERMISSION_DENIED):
                await app_pair(home, route("echo"))

        await eventually(assert_denied)
        (home.path / "faults").unlink()
        await eventually(app_pair, home, route("echo"))

    run(tmp_path, scenario)


def test_listing_is_slow_while_the_fault_is_on(tmp_path):
    async def scenario(home):
        set_faults(home, "slow_list 60")

        async def assert_slow():
            async with auth_stub(home) as stub:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(stub.ListResources(listing()), 0.3)

        await eventually(assert_slow)

    run(tmp_path, scenario)


def test_expired_login_stands_in_the_home_until_the_next_login(tmp_path):
    async def scenario(home):
        pair = await app_pair(home, route("echo"))
        certificate = home.keys / "alice.crt"
        set_faults(home, "expire_login")
        await until(lambda: expiry(certificate.read_bytes()) < datetime.now(UTC))
        await eventually(assert_no_auth, home)
        assert await asyncio.to_thread(is_closed, home, pair)
        set_faults(home, "")
        await until(lambda: expiry(certificate.read_bytes()) > datetime.now(UTC))
        await eventually(ping_auth, home)

    run(tmp_path, scenario)


def test_leaf_that_is_offline_cannot_be_reached(tmp_path):
    async def scenario(home):
        async def assert_offline():
            async with home.auth() as channel:
                stub = presence_grpc.PresenceServiceStub(channel)
                reply = await stub.ListRemoteClusters(presence_pb2.ListRemoteClustersRequest())
            assert [c.Status.Connection for c in reply.remote_clusters] == ["offline"]

        async with auth_stub(home) as stub, home.auth("leaf.test") as leaf_channel:
            leaf = auth_grpc.AuthServiceStub(leaf_channel)
            await stub.Ping(auth_pb2.PingRequest())
            await leaf.Ping(auth_pb2.PingRequest())
            set_faults(home, "leaf_offline leaf.test")
            await eventually(assert_offline)
            # The root's connections go on.
            await stub.Ping(auth_pb2.PingRequest())
        with pytest.raises((OSError, StreamTerminatedError)):
            async with auth_stub(home, "leaf.test") as stub:
                await stub.Ping(auth_pb2.PingRequest())

    run(tmp_path, scenario)


def test_stopping_ends_busy_and_stalled_connections(tmp_path):
    async def main():
        before = open_descriptors()
        config = parse_cluster_file(FILE.format(ping=30))
        async with EmbeddedCluster(config, tmp_path / "tsh"):
            home = Home(tmp_path / "tsh")
            pair = await app_pair(home, route("echo"))
            stalled = await asyncio.to_thread(home.app, pair, ("teleport-tcp",))
            with pytest.raises(TimeoutError):
                await asyncio.to_thread(flood, stalled, is_framed=False)
            idle = await asyncio.to_thread(home.app, pair)
            _, silent = await asyncio.open_connection(*home.address)
        stalled.close()
        idle.close()
        silent.close()
        await until(lambda: open_descriptors() <= before)

    asyncio.run(main())


@pytest.mark.parametrize("turns", range(6))
def test_stopping_ends_a_connection_that_has_just_come(tmp_path, turns):
    async def main():
        before = open_descriptors()
        config = parse_cluster_file(FILE.format(ping=30))
        async with EmbeddedCluster(config, tmp_path / "tsh"):
            client = socket.create_connection(Home(tmp_path / "tsh").address)
            for _ in range(turns):
                await asyncio.sleep(0)
        client.close()
        assert open_descriptors() <= before

    asyncio.run(main())


PROGRAM = """
import asyncio, sys
from pathlib import Path
from demo.cluster.config import default_clusters
from demo.cluster.server import run_demo_cluster
print_ready = lambda cluster: print(cluster.states["demo.test"].config.proxy_addr, flush=True)
config = default_clusters("localhost:0")
asyncio.run(run_demo_cluster(config, Path(sys.argv[1]), started=print_ready))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_cluster_runs_until_a_signal(tmp_path, number):
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "tsh")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        home = Home(tmp_path / "tsh")
        assert home.profile["web_proxy_addr"] == address
        status, _ = web(home, b"GET /webapi/find HTTP/1.1\r\n\r\n")
        assert status == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, b"")

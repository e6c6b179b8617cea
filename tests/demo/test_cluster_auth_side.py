"""The auth side of the embedded cluster over the wire: databases, MFA, faults, big lists."""

import asyncio
import ssl
import stat
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_ssh_public_identity
from cryptography.x509.oid import NameOID
from embedded_cluster_client import (
    REQUEST,
    VERSION,
    AppPair,
    Home,
    SoftwareKey,
    TlsClient,
    app_pair,
    cert_request,
    database_pair,
    encoded,
    session_challenge,
)
from google.protobuf.timestamp_pb2 import Timestamp
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from demo.cluster.config import parse_cluster_file
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
custom_dns_zones = ["apps.test"]
access_requests = [{{ id = "request-1", roles = ["admin"] }}]
{keys}
apps = [
  {{ name = "echo", uri = "tcp://echo.backend.internal:7", public_addr = "echo.apps.test" }},
  {{ name = "mfa", uri = "tcp://echo.backend.internal:7", public_addr = "mfa.apps.test", session_mfa = true }},
  {{ name = "secret", uri = "tcp://echo.backend.internal:7", public_addr = "secret.apps.test", allowed_roles = ["admin"] }},
]
nodes = [{{ hostname = "node1" }}]
databases = [
  {{ name = "orders", protocol = "postgres", uri = "127.0.0.1:5432" }},
  {{ name = "guarded", protocol = "mysql", uri = "127.0.0.1:3306", session_mfa = true }},
]

[[clusters]]
name = "leaf-a.test"
leaf_of = "root.test"

[[clusters]]
name = "leaf-b.test"
leaf_of = "root.test"
"""
SINGLE_USE = REQUEST.CERT_PURPOSE_SINGLE_USE_CERTS


def route(name, **changes):
    return {
        "Name": name,
        "PublicAddr": f"{name}.apps.test",
        "ClusterName": "root.test",
        **changes,
    }


ORDERS = {"ServiceName": "orders", "Protocol": "postgres"}


def run(tmp_path, scenario: Callable[[Home], Awaitable[None]], keys: str = "") -> None:
    """Runs a scenario against a fresh cluster; `keys` are more keys of the root."""

    async def main() -> None:
        config = parse_cluster_file(FILE.format(keys=keys))
        async with EmbeddedCluster(config, tmp_path / "tsh"):
            await asyncio.wait_for(scenario(Home(tmp_path / "tsh")), 60)

    asyncio.run(main())


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


def set_faults(home, text):
    (home.path / "faults").write_text(text)


async def eventually(attempt, *arguments):
    """Repeats until `attempt` succeeds; for switching, which takes a moment."""
    for _ in range(300):
        try:
            return await attempt(*arguments)
        except (OSError, GRPCError, StreamTerminatedError, AssertionError, pytest.fail.Exception):
            await asyncio.sleep(0.02)
    return await attempt(*arguments)


async def until(condition, seconds=10.0):
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "condition never became true"
        await asyncio.sleep(0.01)


async def ping_auth(home, **changes):
    async with auth_stub(home, **changes) as stub:
        return await stub.Ping(auth_pb2.PingRequest(), metadata=VERSION)


def certificate(pem):
    return x509.load_pem_x509_certificate(pem)


def values(pem):
    found = {}
    for attribute in certificate(pem).subject:
        found.setdefault(attribute.oid.dotted_string, []).append(attribute.value)
    return found


def listing(kind, **fields):
    return auth_pb2.ListResourcesRequest(ResourceType=kind, Limit=100, **fields)


# --- Databases --------------------------------------------------------------------------------


def test_database_is_found_by_its_dns_label(tmp_path):
    async def scenario(home):
        # The label of "orders", computed with coreutils.
        label = "3gb8lmo0q84e8"
        wanted = f'resource.status.vnet_dns_name == "{label}" || name == "{label}"'
        async with auth_stub(home) as stub:
            reply = await stub.ListResources(listing("db_server", PredicateExpression=wanted))
        found = [row.DatabaseServer.Spec.Database for row in reply.Resources]
        assert [(db.Metadata.Name, db.Spec.Protocol) for db in found] == [("orders", "postgres")]
        assert label.encode() in found[0].SerializeToString()

    run(tmp_path, scenario)


@pytest.mark.parametrize(("kind", "number"), [("app_server", 4), ("node", 5), ("db_server", 10)])
def test_rows_of_every_kind_carry_zero_times(tmp_path, kind, number):
    async def scenario(home):
        async with auth_stub(home) as stub:
            reply = await stub.ListResources(listing(kind), metadata=VERSION)
        year_one = Timestamp(seconds=-62135596800).SerializeToString()
        rotation = b"\x2a\x0b" + year_one + b"\x3a\x0b" + year_one
        field = bytes([number << 3 | 2, len(rotation)]) + rotation
        assert all(field in row.SerializeToString() for row in reply.Resources)

    run(tmp_path, scenario)


def test_database_certificate_leads_to_the_database_and_nowhere_else(tmp_path):
    async def scenario(home):
        asked = {**ORDERS, "Username": "bob", "Database": "app"}
        pair = await database_pair(home, asked, RouteToCluster="leaf-a.test")
        subject = values(pair.certificate)
        assert [subject[f"1.3.9999.2.{n}"] for n in (1, 2, 3, 4)] == [
            *(["orders"], ["postgres"], ["bob"], ["app"])
        ]
        assert subject[NameOID.ORGANIZATIONAL_UNIT_NAME.dotted_string] == ["usage:db"]
        assert subject[NameOID.STREET_ADDRESS.dotted_string] == ["leaf-a.test"]
        assert "1.3.9999.1.4" not in subject
        app = await app_pair(home, route("echo"))
        assert "1.3.9999.2.1" not in values(app.certificate)

    run(tmp_path, scenario)


def test_lifetime_of_a_database_certificate(tmp_path):
    async def scenario(home):
        login = certificate((home.keys / "alice.crt").read_bytes()).not_valid_after_utc

        async def lifetime(**changes):
            pair = await database_pair(home, ORDERS, **changes)
            return certificate(pair.certificate).not_valid_after_utc

        hour = await lifetime()
        assert hour < login
        assert abs(await lifetime(Purpose=SINGLE_USE) - hour) < timedelta(minutes=1)
        short = await lifetime(Purpose=SINGLE_USE, RequesterName=REQUEST.UNSPECIFIED)
        assert short <= datetime.now(UTC) + timedelta(minutes=1)

    run(tmp_path, scenario)


def test_whether_a_database_demands_a_second_factor(tmp_path):
    async def scenario(home):
        async with auth_stub(home) as stub:
            for name, required in (("orders", False), ("guarded", True)):
                target = auth_pb2.RouteToDatabase(ServiceName=name)
                asked = auth_pb2.IsMFARequiredRequest(Database=target)
                assert (await stub.IsMFARequired(asked)).Required is required
            gone = auth_pb2.RouteToDatabase(ServiceName="gone")
            async with refused(Status.NOT_FOUND):
                await stub.IsMFARequired(auth_pb2.IsMFARequiredRequest(Database=gone))

    run(tmp_path, scenario)


# --- Second factors and access requests -------------------------------------------------------


async def certificate_with(home, stub, response):
    request = cert_request(home, AppPair(), route("mfa"), Purpose=SINGLE_USE)
    request.MFAResponse.CopyFrom(response)
    return values((await stub.GenerateUserCerts(request)).TLS)


def test_security_key_and_code_give_certificates_with_their_devices(tmp_path):
    async def scenario(home):
        key = SoftwareKey(home.path)
        assert key.rp_id == "localhost"
        origin = f"https://{home.profile['web_proxy_addr']}"
        check = auth_pb2.IsMFARequiredRequest(App=auth_pb2.RouteToApp(**route("mfa")))
        async with auth_stub(home) as stub:
            plain = await stub.CreateAuthenticateChallenge(session_challenge())
            assert plain.MFARequired == auth_pb2.MFA_REQUIRED_UNSPECIFIED
            challenge = await stub.CreateAuthenticateChallenge(
                session_challenge(MFARequiredCheck=check)
            )
            assert challenge.MFARequired == auth_pb2.MFA_REQUIRED_YES
            response = key.answer(challenge, origin)
            by_key = (await certificate_with(home, stub, response))["1.3.9999.1.8"]
            async with refused(Status.PERMISSION_DENIED, "MFA response validation failed"):
                await certificate_with(home, stub, response)

            secret = (home.path / "totp-secret").read_text().strip()
            code = totp_code(secret, datetime.now(UTC).timestamp())
            response = auth_pb2.MFAAuthenticateResponse(TOTP=auth_pb2.TOTPResponse(Code=code))
            by_code = (await certificate_with(home, stub, response))["1.3.9999.1.8"]
            async with refused(Status.INVALID_ARGUMENT, "previously used totp token"):
                await certificate_with(home, stub, response)
        assert by_key != by_code

    run(tmp_path, scenario)


def test_no_challenge_is_made_for_what_demands_none(tmp_path):
    async def scenario(home):
        check = auth_pb2.IsMFARequiredRequest(App=auth_pb2.RouteToApp(**route("echo")))
        async with auth_stub(home) as stub:
            challenge = await stub.CreateAuthenticateChallenge(
                session_challenge(MFARequiredCheck=check)
            )
        assert challenge.MFARequired == auth_pb2.MFA_REQUIRED_NO
        assert not challenge.HasField("TOTP")
        assert not challenge.HasField("WebauthnChallenge")

    run(tmp_path, scenario)


def test_user_without_a_device_gets_an_empty_challenge(tmp_path):
    async def scenario(home):
        async with auth_stub(home) as stub:
            challenge = await stub.CreateAuthenticateChallenge(session_challenge())
        assert challenge == auth_pb2.MFAAuthenticateChallenge()

    run(tmp_path, scenario, "mfa_devices = []")


def test_challenge_without_scope_is_refused(tmp_path):
    async def scenario(home):
        bare = auth_pb2.CreateAuthenticateChallengeRequest(ContextUser=auth_pb2.ContextUser())
        async with auth_stub(home) as stub, refused(Status.INVALID_ARGUMENT, "scope"):
            await stub.CreateAuthenticateChallenge(bare)

    run(tmp_path, scenario)


def test_access_requests_have_to_be_named_again(tmp_path):
    async def scenario(home):
        organization = NameOID.ORGANIZATION_NAME.dotted_string
        login = values((home.keys / "alice.crt").read_bytes())
        assert set(login[organization]) == {"access", "admin"}
        assert login["1.3.9999.2.8"] == ["request-1"]
        plain = values((await app_pair(home, route("secret"))).certificate)
        assert plain[organization] == ["access"]
        async with auth_stub(home) as stub:
            request = cert_request(home, AppPair(), route("secret"))
            request.AccessRequests.append("request-1")
            again = values((await stub.GenerateUserCerts(request)).TLS)
            assert set(again[organization]) == {"access", "admin"}
            assert again["1.3.9999.2.8"] == ["request-1"]
            request.AccessRequests.append("request-2")
            async with refused(Status.NOT_FOUND, "request-2"):
                await stub.GenerateUserCerts(request)

    run(tmp_path, scenario)


# --- Lists ------------------------------------------------------------------------------------


def test_leaves_come_in_pages(tmp_path):
    async def scenario(home):
        found, token = [], ""
        async with home.auth() as channel:
            stub = presence_grpc.PresenceServiceStub(channel)
            for _ in range(5):
                reply = await stub.ListRemoteClusters(
                    presence_pb2.ListRemoteClustersRequest(page_size=1, page_token=token)
                )
                found += [cluster.Metadata.Name for cluster in reply.remote_clusters]
                token = reply.next_page_token
                if not token:
                    break
        assert found == ["leaf-a.test", "leaf-b.test"]

    run(tmp_path, scenario)


def test_generated_apps_are_listed_and_found(tmp_path):
    async def scenario(home):
        wanted = 'resource.spec.public_addr == "app-01999.apps.test"'
        found, key = set(), ""
        async with auth_stub(home) as stub:
            reply = await stub.ListResources(listing("app_server", PredicateExpression=wanted))
            assert [row.AppServer.Spec.App.Metadata.Name for row in reply.Resources] == [
                "app-01999"
            ]
            while True:
                request = listing("app_server", StartKey=key)
                request.Limit = 1000
                page = await stub.ListResources(request)
                found |= {row.AppServer.Spec.App.Metadata.Name for row in page.Resources}
                key = page.NextKey
                if not key:
                    break
        assert len(found) == 2003

    run(tmp_path, scenario, "generated_apps = 2000")


def test_apps_come_and_go_with_the_apps_file(tmp_path):
    async def scenario(home):
        file = home.path / "apps"

        async def assert_apps(*expected):
            async with auth_stub(home) as stub:
                reply = await stub.ListResources(listing("app_server"))
            names = [row.AppServer.Spec.App.Metadata.Name for row in reply.Resources]
            assert names == [*expected]

        table = '[[apps]]\ncluster = "root.test"\nname = "{}"\nuri = "tcp://a.test:1"\n'
        file.write_text(table.format("new") + table.format("other"))
        await eventually(assert_apps, "new", "other")
        file.write_text("[[apps]]\n")
        file.write_text(table.format("third"))
        await eventually(assert_apps, "third")
        file.unlink()
        await eventually(assert_apps, "echo", "mfa", "secret")

    run(tmp_path, scenario)


def test_apps_file_that_is_wrong_changes_nothing(tmp_path, caplog):
    async def scenario(home):
        (home.path / "apps").write_text("nonsense")
        await until(lambda: "nonsense" in caplog.text or "Expected" in caplog.text)
        await app_pair(home, route("echo"))
        async with auth_stub(home) as stub:
            assert len((await stub.ListResources(listing("app_server"))).Resources) == 3

    run(tmp_path, scenario)


# --- Home of v16 ------------------------------------------------------------------------------


def test_home_of_v16_has_one_key_for_all(tmp_path):
    async def scenario(home):
        names = {path.name for path in home.keys.iterdir()}
        assert names == {"alice", "alice.pub", "alice-x509.pem", "alice-ssh", "cas"}
        pem = (home.keys / "alice").read_bytes()
        assert pem.startswith(b"-----BEGIN RSA PRIVATE KEY-----")
        assert stat.S_IMODE((home.keys / "alice").stat().st_mode) == 0o600
        key = serialization.load_pem_private_key(pem, None)
        assert isinstance(key, rsa.RSAPrivateKey)
        ssh = load_ssh_public_identity((home.keys / "alice-ssh/root.test-cert.pub").read_bytes())
        assert ssh.public_key() == key.public_key()
        pair = {"certificate": home.keys / "alice-x509.pem", "key": home.keys / "alice"}
        assert (await ping_auth(home, **pair)).ClusterName == "root.test"
        set_faults(home, "expire_login")
        await until(
            lambda: (
                certificate(pair["certificate"].read_bytes()).not_valid_after_utc
                < datetime.now(UTC)
            )
        )

    run(tmp_path, scenario, "home_layout = 16")


# --- Faults -----------------------------------------------------------------------------------


def test_every_call_is_unavailable_while_the_fault_is_on(tmp_path):
    async def scenario(home):
        async def assert_unavailable():
            async with refused(Status.UNAVAILABLE):
                await ping_auth(home)

        set_faults(home, "unavailable")
        await eventually(assert_unavailable)
        set_faults(home, "")
        await eventually(ping_auth, home)

    run(tmp_path, scenario)


def test_calls_hang_and_are_answered_when_the_fault_goes(tmp_path):
    async def scenario(home):
        async with auth_stub(home) as stub:
            set_faults(home, "hang")

            async def assert_hanging():
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(stub.Ping(auth_pb2.PingRequest()), 0.3)

            await eventually(assert_hanging)
            waiting = asyncio.create_task(stub.Ping(auth_pb2.PingRequest()))
            set_faults(home, "")
            assert (await waiting).ClusterName == "root.test"

    run(tmp_path, scenario)


def test_certificates_are_denied_with_the_text_of_the_fault(tmp_path):
    async def scenario(home):
        async def assert_denied():
            async with refused(Status.PERMISSION_DENIED, "access requires a trusted device"):
                await app_pair(home, route("echo"))

        set_faults(home, "deny access requires a trusted device")
        await eventually(assert_denied)

    run(tmp_path, scenario)


def test_right_answers_are_refused_while_the_fault_is_on(tmp_path):
    async def scenario(home):
        key = SoftwareKey(home.path)
        origin = f"https://{home.profile['web_proxy_addr']}"
        async with auth_stub(home) as stub:

            async def answer():
                challenge = await stub.CreateAuthenticateChallenge(session_challenge())
                return await certificate_with(home, stub, key.answer(challenge, origin))

            async def assert_refused():
                async with refused(Status.PERMISSION_DENIED, "MFA response validation failed"):
                    await answer()

            set_faults(home, "mfa_refused")
            await eventually(assert_refused)
            set_faults(home, "")
            await eventually(answer)

    run(tmp_path, scenario)


def test_vnet_config_goes_away_with_the_fault(tmp_path):
    async def scenario(home):
        async with home.auth() as channel:
            stub = vnet_grpc.VnetConfigServiceStub(channel)
            await stub.GetVnetConfig(vnet_pb2.GetVnetConfigRequest())

            async def assert_gone():
                async with refused(Status.NOT_FOUND):
                    await stub.GetVnetConfig(vnet_pb2.GetVnetConfigRequest())

            set_faults(home, "no_vnet_config")
            await eventually(assert_gone)

    run(tmp_path, scenario)


def test_logout_removes_the_login_and_its_end_is_a_new_one(tmp_path):
    async def scenario(home):
        key = (home.keys / "alice.key").read_bytes()
        set_faults(home, "logout")
        await until(lambda: not (home.path / "localhost.yaml").exists())
        left = {path.name for path in home.path.iterdir()} - {"faults.taken"}
        assert left == {"faults", "totp-secret", "web-ca.pem", "webauthn-credential.json"}
        set_faults(home, "")
        await until((home.path / "current-profile").exists)
        assert (home.keys / "alice.key").read_bytes() != key
        await ping_auth(home)

    run(tmp_path, scenario)


def test_another_user_logs_in(tmp_path):
    async def scenario(home):
        def user():
            return yaml.safe_load((home.path / "localhost.yaml").read_text())["user"]

        set_faults(home, "other_user bob")
        await until(lambda: user() == "bob")
        bob = Home(home.path)
        subject = values((bob.keys / "bob.crt").read_bytes())
        assert subject[NameOID.COMMON_NAME.dotted_string] == ["bob"]
        pair = await app_pair(bob, route("echo"))
        assert values(pair.certificate)[NameOID.COMMON_NAME.dotted_string] == ["bob"]
        set_faults(home, "")
        await until(lambda: user() == "alice")
        await ping_auth(Home(home.path))

    run(tmp_path, scenario)


def test_host_authorities_are_rotated(tmp_path):
    async def scenario(home):
        cas = home.keys / "cas"
        old = {path.name: path.read_bytes() for path in cas.iterdir()}

        async def keys_of(domain):
            async with home.auth() as channel:
                stub = trust_grpc.TrustServiceStub(channel)
                request = trust_pb2.GetCertAuthorityRequest(type="host", domain=domain)
                spec = (await stub.GetCertAuthority(request)).Spec
            sets = (spec.ActiveKeys, spec.AdditionalTrustedKeys)
            assert [len(keys.SSH) for keys in sets] == [len(keys.TLS) for keys in sets]
            return [b"".join(key.Cert for key in keys.TLS) for keys in sets]

        def is_shown(trusted):
            """Whether the auth server shows a certificate of this authority."""
            (home.path / "trust.pem").write_bytes(trusted)
            context = home.context(
                [f"teleport-auth@{encoded('root.test')}", "h2"], ca=home.path / "trust.pem"
            )
            try:
                with TlsClient(home.address, context, encoded("root.test")):
                    return True
            except ssl.SSLCertVerificationError:
                return False

        assert await asyncio.to_thread(is_shown, old["root.test.pem"])
        set_faults(home, "rotate_ca")
        await until(lambda: all((cas / name).read_bytes() != pem for name, pem in old.items()))
        for name, pem in old.items():
            assert (cas / name).read_bytes().endswith(pem)
            active, additional = await keys_of(name.removesuffix(".pem"))
            assert (cas / name).read_bytes() == active + additional
            assert additional == pem
        lines = (home.path / "known_hosts").read_text().splitlines()
        assert len(lines) == 2 * len(old)
        assert not await asyncio.to_thread(is_shown, old["root.test.pem"])
        active, additional = await keys_of("root.test")
        for trusted in (active, active + additional, additional + active):
            assert await asyncio.to_thread(is_shown, trusted)

        set_faults(home, "")
        await until(lambda: not (cas / "root.test.pem").read_bytes().endswith(old["root.test.pem"]))
        active, additional = await keys_of("root.test")
        assert (cas / "root.test.pem").read_bytes() == active
        assert additional == b""

    run(tmp_path, scenario)


@pytest.mark.parametrize("seconds", [1800, -1800])
def test_cluster_whose_clock_is_off_lives_by_it(tmp_path, seconds):
    async def scenario(home):
        async def assert_shifted():
            pair = await app_pair(home, route("echo"))
            begin = certificate(pair.certificate).not_valid_before_utc
            wanted = datetime.now(UTC) + timedelta(seconds=seconds - 60)
            assert abs(begin - wanted) < timedelta(seconds=30)
            return pair

        def echo(pair):
            with home.app(pair, ("teleport-tcp",)) as tls:
                tls.send(b"x")
                return tls.recv()

        async def assert_not_valid_yet():
            async with refused(Status.PERMISSION_DENIED, "expired"):
                await ping_auth(home)

        set_faults(home, f"clock {seconds}")
        if seconds > 0:
            # By the machine's clock the certificate is not valid yet, by the cluster's it is.
            assert await asyncio.to_thread(echo, await eventually(assert_shifted)) == b"x"
        else:
            # The login begins after what the cluster takes for now.
            await eventually(assert_not_valid_yet)
        set_faults(home, "")
        await eventually(ping_auth, home)

    run(tmp_path, scenario, "cert_ttl_seconds = 86400")


def test_login_that_has_expired_by_the_clusters_clock_is_refused(tmp_path):
    async def scenario(home):
        async def assert_refused():
            async with refused(Status.PERMISSION_DENIED, "relogin"):
                await ping_auth(home)

        set_faults(home, "clock 90000")
        await eventually(assert_refused)

    run(tmp_path, scenario, "cert_ttl_seconds = 86400")

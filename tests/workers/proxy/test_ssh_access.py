"""Plans and credentials for SSH, by the whole client on fake clusters."""

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.serialization import (
    SSHCertificate,
    load_ssh_public_identity,
    load_ssh_public_key,
)
from mfa_fakes import FakePrompter, MfaApi
from ssh_keys import (
    HOST_AUTHORITY,
    KINDS,
    SSH_KEY,
    certificate,
    known_hosts_line,
    line,
    write_old_home,
    write_ssh,
)
from teleport_fakes import CLUSTER, NOW, PROXY, Clock, FakeApi, settings, until, write_home

from ipc.messages import ClusterState, Refusal
from workers.proxy.teleport.auth_client import CLIENT_VERSION
from workers.proxy.teleport.client import Teleport
from workers.proxy.teleport.errors import (
    AccessDeniedError,
    HardwareKeyError,
    LoginExpiredError,
    MfaRequiredError,
    MfaUnansweredError,
    NoSshLoginError,
    NotFoundError,
    NotImplementedByClusterError,
    RefusedError,
    UnknownAppError,
    UnreachableError,
)
from workers.proxy.teleport.pb import auth_pb2
from workers.proxy.teleport.ssh_access import AUTHORITIES_SECONDS, REQUIRED_SECONDS
from workers.proxy.teleport.targets import ClusterTarget

LEAF = "leaf.test"
NEW_AUTHORITY = KINDS["ecdsa"]


def target(host="node1", leaf="", root=CLUSTER) -> ClusterTarget:
    return ClusterTarget(profile=PROXY, root_cluster=root, leaf=leaf, ipv4_range=None, host=host)


@dataclass
class SshApi(MfaApi):
    """A cluster with hosts, for which no second factor is needed."""

    needs_mfa: bool = False
    mfa_error: Exception | None = None
    answer: bytes | None = None

    async def is_mfa_required(self, request):
        required = await super().is_mfa_required(request)
        if self.mfa_error is not None:
            raise self.mfa_error
        return required

    async def generate_user_certs(self, request):
        await self._called("generate_user_certs")
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        if self.answer is not None:
            return auth_pb2.Certs(SSH=self.answer)
        key = load_ssh_public_key(request.SSHPublicKey)
        made = certificate(key, logins=[request.SSHLogin], not_after=NOW + timedelta(minutes=1))
        return auth_pb2.Certs(SSH=made + b"\n")


@dataclass
class Bed:
    home: object
    api: SshApi = field(default_factory=SshApi)
    prompter: FakePrompter = field(default_factory=FakePrompter)

    async def __aenter__(self):
        self.clock = Clock()
        self.client = Teleport(
            self.home, settings(self.api, self.clock, prompter=self.prompter), poll_seconds=0.01
        )
        await self.client.start()
        offline = self.api.offline
        await until(lambda: all(c.is_configured or c.name in offline for c in self.client.states()))
        if self.api.leaves:
            await until(lambda: len(self.client.states()) == 1 + len(self.api.leaves))
        self.api.calls.clear()
        return self

    async def __aexit__(self, *_exc):
        await self.client.close()


@pytest.fixture
def home(tmp_path):
    write_home(tmp_path)
    write_ssh(tmp_path)
    return tmp_path


def run(home, talk, **options):
    async def main():
        async with Bed(home, **options) as bed:
            return await talk(bed)

    return asyncio.run(main())


def profile_line(home, name, value):
    path = home / f"{PROXY}.yaml"
    lines = [x for x in path.read_text().splitlines() if not x.startswith(f"{name}:")]
    path.write_text("\n".join([*lines, f"{name}: {value}", ""]))


# -- plans --


def test_the_plan_leads_to_the_web_port_and_names_the_host(home):
    async def talk(bed):
        plan = await bed.client.ssh_plan(target())
        assert (plan.host, plan.port, plan.upgrade, plan.http_proxy) == (PROXY, 443, None, "")
        assert (plan.ssh.host_port, plan.ssh.cluster) == ("node1:0", CLUSTER)
        assert plan.ssh.version == CLIENT_VERSION
        # It asks nobody, and later ones share the context.
        assert bed.api.calls == []
        assert (await bed.client.ssh_plan(target("b"))).tls.context is plan.tls.context

    run(home, talk)


def test_the_plan_behind_a_balancer(home):
    profile_line(home, "tls_routing_conn_upgrade_required", "true")

    async def talk(bed):
        plan = await bed.client.ssh_plan(target())
        assert (plan.host, plan.port) == (PROXY, 443)
        assert plan.upgrade is not None
        assert plan.upgrade.server_hostname == PROXY

    run(home, talk)


@pytest.mark.parametrize("upgrade", ["true", "false"])
def test_the_plan_without_tls_routing(home, upgrade):
    profile_line(home, "tls_routing_enabled", "false")
    profile_line(home, "tls_routing_conn_upgrade_required", upgrade)
    profile_line(home, "ssh_proxy_addr", "ssh.demo.test:3023")

    async def talk(bed):
        plan = await bed.client.ssh_plan(target())
        assert (plan.host, plan.port, plan.upgrade) == ("ssh.demo.test", 3023, None)

    run(home, talk)


def test_a_leafs_host_is_reached_through_the_roots_proxy(home):
    async def talk(bed):
        plan = await bed.client.ssh_plan(target(leaf=LEAF))
        assert (plan.host, plan.ssh.cluster) == (PROXY, LEAF)

    run(home, talk, api=SshApi(leaves={LEAF: FakeApi(apps=[])}))


def test_a_renewed_login_is_used_by_the_next_plan(home):
    async def talk(bed):
        before = (await bed.client.ssh_plan(target())).tls.context
        write_home(home)  # another certificate
        await until(lambda: bed.client._sessions[PROXY]._ssh_context is None)
        assert (await bed.client.ssh_plan(target())).tls.context is not before

    run(home, talk)


def test_plans_that_are_refused(home):
    async def talk(bed):
        with pytest.raises(UnreachableError, match="is offline"):
            await bed.client.ssh_plan(target(leaf=LEAF))
        with pytest.raises(UnknownAppError):
            await bed.client.ssh_plan(target(leaf="gone.test"))
        bed.clock.seconds += 13 * 3600
        with pytest.raises(LoginExpiredError, match="run tsh login") as caught:
            await bed.client.ssh_plan(target())
        assert caught.value.refusal is Refusal.NOT_LOGGED_IN

    run(home, talk, api=SshApi(leaves={LEAF: FakeApi()}, offline={LEAF}))


def test_a_login_with_a_hardware_key_is_refused_as_for_apps(home):
    (home / "keys" / PROXY / "alice.key").write_text(
        "-----BEGIN PIV YUBIKEY PRIVATE KEY-----\nAAAA\n-----END PIV YUBIKEY PRIVATE KEY-----\n"
    )

    async def talk():
        client = Teleport(home, settings(SshApi(), Clock()), poll_seconds=0.01)
        await client.start()
        try:
            with pytest.raises(HardwareKeyError):
                await client.ssh_plan(target())
            with pytest.raises(HardwareKeyError):
                await client.ssh_credentials(target(), "alice")
        finally:
            await client.close()

    asyncio.run(talk())


# -- credentials --


def test_without_second_factor_the_certificate_of_the_home_is_used(home):
    async def talk(bed):
        found = await bed.client.ssh_credentials(target(), "root")
        assert line(found.private_key) == line(SSH_KEY)
        path = home / "keys" / PROXY / "alice-ssh" / f"{CLUSTER}-cert.pub"
        assert found.certificate == path.read_bytes().strip()
        assert found.host_authorities == (line(HOST_AUTHORITY),)  # from known_hosts
        assert (found.host, found.user, found.cluster) == ("node1", "root", CLUSTER)
        [question] = bed.api.mfa_requests
        assert (question.Node.Node, question.Node.Login) == ("node1", "root")
        assert bed.api.requests == []
        assert bed.prompter.questions == []
        assert "private" not in repr(found)

    run(home, talk)


def test_a_home_of_version_16(tmp_path):
    write_old_home(tmp_path)

    async def talk(bed):
        found = await bed.client.ssh_credentials(target(), "alice")
        assert line(found.private_key) == line(KINDS["rsa"])

    run(tmp_path, talk)


def test_what_the_cluster_says_of_its_authorities_counts_alone(home):
    api = SshApi(ssh_authorities={CLUSTER: (line(NEW_AUTHORITY), line(HOST_AUTHORITY))})

    async def talk(bed):
        found = await bed.client.ssh_credentials(target(), "alice")
        assert found.host_authorities == (line(NEW_AUTHORITY), line(HOST_AUTHORITY))
        # The rotation is over: the file still has the old one.
        bed.api.ssh_authorities[CLUSTER] = (line(NEW_AUTHORITY),)
        bed.clock.seconds += AUTHORITIES_SECONDS
        found = await bed.client.ssh_credentials(target(), "alice")
        assert found.host_authorities == (line(NEW_AUTHORITY),)

    run(home, talk, api=api)


@pytest.mark.parametrize(
    "error", [UnreachableError("x"), AccessDeniedError("x"), NotImplementedByClusterError("x")]
)
def test_known_hosts_counts_when_the_cluster_does_not_say(home, error):
    async def talk(bed):
        found = await bed.client.ssh_credentials(target(), "alice")
        assert found.host_authorities == (line(HOST_AUTHORITY),)

    run(home, talk, api=SshApi(ssh_authorities={CLUSTER: error}))


def test_nobody_says_whom_to_trust(home):
    (home / "known_hosts").write_bytes(known_hosts_line("other.test", HOST_AUTHORITY))

    async def talk(bed):
        with pytest.raises(UnreachableError, match=f"of cluster {CLUSTER} to trust.*tsh login"):
            await bed.client.ssh_credentials(target(), "alice")

    run(home, talk)


def test_hosts_of_a_leaf(home):
    leaf = SshApi(apps=[])
    root = SshApi(leaves={LEAF: leaf}, ssh_authorities={LEAF: (line(NEW_AUTHORITY),)})

    async def talk(bed):
        found = await bed.client.ssh_credentials(target(leaf=LEAF), "alice")
        path = home / "keys" / PROXY / "alice-ssh" / f"{CLUSTER}-cert.pub"
        assert found.certificate == path.read_bytes().strip()
        assert found.host_authorities == (line(NEW_AUTHORITY),)
        assert found.cluster == LEAF
        # The cluster of the host is asked, the root for the certificate.
        assert len(leaf.mfa_requests) == 1
        assert root.mfa_requests == []
        own = home / "keys" / PROXY / "alice-ssh" / f"{LEAF}-cert.pub"
        own.write_bytes(certificate(SSH_KEY.public_key()))
        found = await bed.client.ssh_credentials(target(leaf=LEAF), "alice")
        assert found.certificate == own.read_bytes()
        leaf.needs_mfa = True
        bed.clock.seconds += REQUIRED_SECONDS
        await bed.client.ssh_credentials(target(leaf=LEAF), "alice")
        [request] = root.requests
        assert (request.RouteToCluster, request.NodeName) == (LEAF, "node1")
        assert leaf.requests == []
        [challenge] = root.challenge_requests
        assert not challenge.HasField("MFARequiredCheck")

    run(home, talk, api=root)


def test_a_second_factor_gives_a_certificate_for_this_login_alone(home):
    async def talk(bed):
        found = [await bed.client.ssh_credentials(target(), "root") for _ in range(2)]
        assert found[0].certificate != found[1].certificate
        made = load_ssh_public_identity(found[0].certificate)
        assert isinstance(made, SSHCertificate)
        assert made.valid_principals == [b"root"]
        assert [q.target for q in bed.prompter.questions] == ["SSH host node1 as root"] * 2
        assert len({q.id for q in bed.prompter.questions}) == 2
        request = bed.api.requests[0]
        assert request.Usage == auth_pb2.UserCertsRequest.SSH
        assert request.Purpose == auth_pb2.UserCertsRequest.CERT_PURPOSE_SINGLE_USE_CERTS
        assert (request.NodeName, request.SSHLogin) == ("node1", "root")
        assert (request.Username, request.RouteToCluster) == ("alice", CLUSTER)
        assert request.SSHPublicKey == line(SSH_KEY)
        assert not request.TLSPublicKey
        assert request.HasField("MFAResponse")
        assert request.Expires.ToDatetime() == (NOW + timedelta(hours=12)).replace(tzinfo=None)
        assert list(request.AccessRequests) == ["request-1"]
        [first, _] = bed.api.challenge_requests
        assert first.MFARequiredCheck.Node.Node == "node1"

    run(home, talk, api=SshApi(needs_mfa=True), prompter=FakePrompter(["123456"] * 2))


def test_a_second_factor_needs_no_certificate_in_the_home(home):
    (home / "keys" / PROXY / "alice-ssh" / f"{CLUSTER}-cert.pub").unlink()
    run(
        home,
        lambda bed: bed.client.ssh_credentials(target(), "alice"),
        api=SshApi(needs_mfa=True),
    )


def test_nobody_answers(home):
    async def talk(bed):
        with pytest.raises(MfaRequiredError) as caught:
            await bed.client.ssh_credentials(target(), "alice")
        assert caught.value.refusal is Refusal.MFA_REQUIRED
        assert bed.api.requests == []

    declined = FakePrompter(error=MfaUnansweredError("declined"))
    run(home, talk, api=SshApi(needs_mfa=True), prompter=declined)


@pytest.mark.parametrize("answer", [b"", line(SSH_KEY), certificate(NEW_AUTHORITY.public_key())])
def test_a_certificate_that_cannot_be_used(home, answer):
    async def talk(bed):
        with pytest.raises(RefusedError, match="unusable certificate for SSH host node1 as alice"):
            await bed.client.ssh_credentials(target(), "alice")

    run(home, talk, api=SshApi(needs_mfa=True, answer=answer))


@pytest.mark.parametrize(
    "error",
    [NotImplementedByClusterError("x"), NotFoundError("x"), UnreachableError("x")],
    ids=lambda error: type(error).__name__,
)
def test_a_cluster_that_does_not_say_whether_it_wants_one(home, error):
    """The host still does."""

    async def talk(bed):
        found = await bed.client.ssh_credentials(target(), "alice")
        assert found.user == "alice"
        assert bed.client.states()[0].state is ClusterState.OK

    run(home, talk, api=SshApi(mfa_error=error))


def test_a_cluster_that_refuses_to_say(home):
    async def talk(bed):
        with pytest.raises(AccessDeniedError, match="no access"):
            await bed.client.ssh_credentials(target(), "alice")

    run(home, talk, api=SshApi(mfa_error=AccessDeniedError("no access")))


def test_many_logins_at_once_ask_once_and_the_answer_is_soon_asked_again(home):
    async def talk(bed):
        await asyncio.gather(
            *(bed.client.ssh_credentials(target(), "alice") for _ in range(20)),
            bed.client.ssh_credentials(target(), "root"),
        )
        assert bed.api.calls.count("is_mfa_required") == 2
        assert bed.api.calls.count("ssh_host_authorities") == 1
        bed.api.needs_mfa = True
        bed.clock.seconds += REQUIRED_SECONDS
        await bed.client.ssh_credentials(target(), "alice")
        assert len(bed.prompter.questions) == 1

    run(home, talk)


def test_an_expired_certificate_is_told_before_the_host_refuses_it(home):
    write_ssh(home, not_after=NOW + timedelta(hours=1))

    async def talk(bed):
        await bed.client.ssh_credentials(target(), "alice")
        bed.clock.seconds += 3600
        with pytest.raises(NoSshLoginError, match=f"expired: run tsh login --proxy={PROXY}"):
            await bed.client.ssh_credentials(target(), "alice")

    run(home, talk)


def test_a_home_without_ssh_keys_says_so_and_is_well_otherwise(home):
    (home / "keys" / PROXY / "alice").unlink()

    async def talk(bed):
        with pytest.raises(NoSshLoginError, match="run tsh login") as caught:
            await bed.client.ssh_credentials(target(), "alice")
        assert caught.value.refusal is Refusal.NOT_LOGGED_IN
        assert bed.client.states()[0].state is ClusterState.OK
        assert await bed.client.resolve(f"pg.{PROXY}")

    run(home, talk)


def test_a_login_that_ends_while_the_cluster_is_asked(home):
    async def talk(bed):
        bed.api.gates["is_mfa_required"] = asyncio.Event()
        asking = asyncio.create_task(bed.client.ssh_credentials(target(), "alice"))
        await until(lambda: "is_mfa_required" in bed.api.calls)
        (home / f"{PROXY}.yaml").unlink()
        with pytest.raises(UnreachableError):
            await asking

    run(home, talk)


def test_a_cancelled_wait_takes_the_question_back(home):
    async def talk(bed):
        asking = asyncio.create_task(bed.client.ssh_credentials(target(), "alice"))
        await until(lambda: bool(bed.prompter.questions))
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        [(question, _)] = bed.prompter.outcomes
        assert question == bed.prompter.questions[0].id

    run(home, talk, api=SshApi(needs_mfa=True), prompter=FakePrompter([]))

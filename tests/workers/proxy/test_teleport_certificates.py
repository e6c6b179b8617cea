import asyncio
import dataclasses
import gc
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mfa_fakes import RIGHT_CODE, FakePrompter, MfaApi, make_login, webauthn_challenge
from sso_browser import key_of, port_of, sealed, visit
from teleport_fakes import AUTHORITY, CLUSTER, NOW, PROXY, Clock, FakeApi, der, pem, until
from teleport_fakes import user_certificate as make_user_certificate

from ipc.messages import Refusal
from workers.proxy.teleport import sso_callback
from workers.proxy.teleport.apps import App
from workers.proxy.teleport.certificates import AppSubject, Certificates, DatabaseSubject
from workers.proxy.teleport.databases import Database
from workers.proxy.teleport.errors import (
    AccessDeniedError,
    LoginExpiredError,
    MfaRequiredError,
    MfaUnansweredError,
    MisconfiguredError,
    NotImplementedByClusterError,
    RefusedError,
    SignInFailedError,
    TeleportError,
    UnreachableError,
)
from workers.proxy.teleport.issue_tally import IssueTally
from workers.proxy.teleport.pb import auth_pb2, mfa_pb2
from workers.proxy.teleport.sso_callback import Callbacks

APP = App("pg", "pg.teleport.demo.test", "tcp://127.0.0.1:5432", None)
ORDERS = Database("orders", "postgres")


@pytest.fixture
def login(tmp_path):
    return make_login(tmp_path)


@pytest.fixture
def certificates(login):
    def make(api, clock=None, **changes):
        return Certificates(login, api, wall_clock=(clock or Clock()).wall, **changes)

    return make


async def get(store, api, port=0, app=APP, leaf="", owner=None):
    subject = AppSubject(app, port)
    return await store.get(subject, cluster=leaf or CLUSTER, leaf=leaf, owner=owner or api)


async def get_database(store, api, database=ORDERS):
    return await store.get(DatabaseSubject(database), cluster=CLUSTER, leaf="", owner=api)


# -- without a second factor --


def test_the_request_is_that_of_a_local_proxy(certificates, login):
    async def run():
        api = FakeApi()
        certificate = await get(certificates(api), api, 8000)
        (request,) = api.requests
        assert request.Usage == auth_pb2.UserCertsRequest.App
        assert request.RequesterName == auth_pb2.UserCertsRequest.TSH_APP_LOCAL_PROXY
        assert request.Purpose == auth_pb2.UserCertsRequest.CERT_PURPOSE_UNSPECIFIED
        assert request.Username == "alice"
        end = login.credentials.identity.not_after
        assert request.Expires.ToDatetime() == end.replace(tzinfo=None)
        assert list(request.AccessRequests) == ["request-1"]
        assert request.RouteToCluster == CLUSTER
        route = request.RouteToApp
        assert (route.Name, route.PublicAddr, route.URI) == (APP.name, APP.public_addr, APP.uri)
        assert (route.ClusterName, route.TargetPort) == (CLUSTER, 8000)
        assert not request.SSHPublicKey
        assert not request.HasField("MFAResponse")
        assert certificate.session == "session-1"
        assert certificate.not_after == NOW + timedelta(seconds=3600)

    asyncio.run(run())


def test_a_database_certificate_names_the_service_and_no_user(certificates):
    async def run():
        api = FakeApi()
        certificate = await get_database(certificates(api), api)
        (request,) = api.requests
        assert request.Usage == auth_pb2.UserCertsRequest.Database
        assert request.RequesterName == auth_pb2.UserCertsRequest.TSH_DB_LOCAL_PROXY_TUNNEL
        assert request.RouteToDatabase == auth_pb2.RouteToDatabase(
            ServiceName="orders", Protocol="postgres"
        )
        assert request.RouteToCluster == CLUSTER
        assert list(request.AccessRequests) == ["request-1"]
        assert not request.HasField("RouteToApp")
        assert certificate.subject.alpn == ("teleport-postgres-ping", "teleport-postgres")

    asyncio.run(run())


def test_an_app_and_a_database_of_one_name_are_two_subjects(certificates):
    async def run():
        api = FakeApi()
        store = certificates(api)
        one = await get_database(store, api, Database("pg", "postgres"))
        assert await get(store, api) is not one
        assert await get_database(store, api, Database("pg", "mysql")) is not one
        assert await get_database(store, api, Database("pg", "postgres")) is one

    asyncio.run(run())


def test_a_leaf_is_asked_for_its_policy_and_the_root_for_the_certificate(certificates):
    async def run():
        root, leaf = FakeApi(), FakeApi()
        store = certificates(root)
        await get(store, root, leaf="leaf.test", owner=leaf)
        assert leaf.calls == ["is_mfa_required"]
        assert root.calls == ["generate_user_certs"]
        assert root.requests[0].RouteToCluster == "leaf.test"
        assert root.requests[0].RouteToApp.ClusterName == "leaf.test"
        await get(store, root)
        assert len(root.requests) == 2  # an app of this name in the root cluster is another one

    asyncio.run(run())


def test_a_certificate_is_reused_until_it_expires(certificates):
    async def run():
        api, clock = FakeApi(certificate_seconds=60), Clock()
        store = certificates(api, clock)
        first = await get(store, api)
        clock.seconds += 50
        assert await get(store, api) is first
        api.certificate_seconds = 600
        clock.seconds += 9
        assert await get(store, api) is not first
        assert len(api.requests) == 2

    asyncio.run(run())


def test_each_port_has_a_certificate_and_a_key_of_its_own(certificates):
    async def run():
        api = FakeApi()
        store = certificates(api)
        await get(store, api, 8000)
        await get(store, api, 8001)
        await get(store, api, 8000)
        assert [r.RouteToApp.TargetPort for r in api.requests] == [8000, 8001]
        assert len({r.TLSPublicKey for r in api.requests}) == 2

    asyncio.run(run())


def test_parallel_connections_share_one_request(certificates):
    async def run():
        api = FakeApi(gate=asyncio.Event())
        store = certificates(api)
        waiting = [asyncio.create_task(get(store, api)) for _ in range(20)]
        await asyncio.sleep(0)
        api.gate.set()
        assert len(set(map(id, await asyncio.gather(*waiting)))) == 1
        assert len(api.requests) == 1

    asyncio.run(run())


def test_a_failed_request_is_tried_again_by_the_next_connection(certificates):
    async def run():
        api = FakeApi(error=RefusedError("no"))
        store = certificates(api)
        with pytest.raises(RefusedError):
            await get(store, api)
        api.error = None
        await get(store, api)

    asyncio.run(run())


def test_each_request_is_counted_once_however_many_wait_for_it(certificates):
    async def run():
        api, tally = FakeApi(), IssueTally()
        store = certificates(api, tally=tally)
        await asyncio.gather(*(get(store, api) for _ in range(3)))
        await get(store, api)  # kept
        await get_database(store, api)
        api.error = RefusedError("no role")
        with pytest.raises(RefusedError):
            await get(store, api, 8000)
        assert tally.counters == {
            "certificates_app_issued": 1,
            "certificates_database_issued": 1,
            "certificates_app_failed": 1,
        }

    asyncio.run(run())


def test_an_old_cluster_that_knows_no_second_factors_needs_none(certificates):
    class Old(FakeApi):
        async def is_mfa_required(self, request):
            raise NotImplementedByClusterError("unknown method")

    async def run():
        api = Old()
        await get(certificates(api), api)
        assert len(api.requests) == 1

    asyncio.run(run())


def test_an_expired_login_asks_for_nothing(certificates):
    async def run():
        api, clock = FakeApi(), Clock()
        clock.seconds += 13 * 3600
        with pytest.raises(LoginExpiredError):
            await get(certificates(api, clock), api)
        assert api.calls == []

    asyncio.run(run())


@pytest.mark.parametrize(
    "answer",
    [b"", b"nonsense", pem(AUTHORITY), pem(make_user_certificate()), b"x" * 2_000_000],
    ids=["empty", "no PEM", "no user", "another key", "huge"],
)
@pytest.mark.parametrize("is_in_tunnel", [False, True])
def test_an_unusable_answer_is_a_refusal(login, answer, is_in_tunnel):
    class Odd(FakeApi):
        async def generate_user_certs(self, request):
            return auth_pb2.Certs(TLS=answer)

    async def run():
        api = Odd()
        profile = dataclasses.replace(login.profile, is_conn_upgrade_required=is_in_tunnel)
        changed = dataclasses.replace(login, profile=profile)
        with pytest.raises(RefusedError):
            await get(Certificates(changed, api, wall_clock=Clock().wall), api)

    asyncio.run(run())


def test_a_certificate_without_an_end_does_no_harm(certificates):
    """RFC 5280 section 4.1.2.5: the last moment that can be written."""

    async def run():
        never = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
        api = MfaApi(needs_mfa=False, not_after=never)
        store = certificates(api)
        for _ in range(2):
            assert (await get(store, api)).not_after == never
        assert len(api.requests) == 1

    asyncio.run(run())


def test_a_certificate_that_ends_in_the_year_1_does_no_harm(certificates):
    """Go writes a time that was never set so; no library for certificates does."""

    class Unset(FakeApi):
        async def generate_user_certs(self, request):
            reply = await super().generate_user_certs(request)
            block = der_of(reply.TLS)
            early = b"\x18\x0f00010101000000Z"
            late = b"\x17\x0d" + (NOW + timedelta(hours=1)).strftime("%y%m%d%H%M%SZ").encode()
            assert block.count(late) == 1
            # Two bytes more in each of the lengths around it: all of two bytes.
            changed = grown(block.replace(late, early), block, len(early) - len(late))
            return auth_pb2.Certs(TLS=pem_of(changed))

    async def run():
        api = Unset()
        store = certificates(api)
        for _ in range(2):
            assert (await get(store, api)).not_after == datetime(1, 1, 1, tzinfo=UTC)
        assert len(api.requests) == 2

    asyncio.run(run())


def der_of(block: bytes) -> bytes:
    return ssl.PEM_cert_to_DER_cert(block.decode())


def pem_of(block: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(block).encode()


def grown(changed: bytes, original: bytes, by: int) -> bytes:
    """`changed` with the lengths of certificate, contents and validity set to what they hold now."""
    validity = original.index(b"\x30\x1e\x17\x0d")
    out = bytearray(changed)
    out[validity + 1] += by
    for start in (0, 4):
        assert out[start : start + 2] == b"\x30\x82"
        length = int.from_bytes(out[start + 2 : start + 4], "big") + by
        out[start + 2 : start + 4] = length.to_bytes(2, "big")
    return bytes(out)


def test_the_context_dials_apps_and_trusts_the_configured_file(certificates, tmp_path):
    async def run():
        api = FakeApi()
        file = tmp_path / "ca.pem"
        file.write_bytes(pem(AUTHORITY))
        certificate = await get(certificates(api, ca_file=str(file)), api)
        context = certificate.context
        assert context is certificate.context
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
        assert der(AUTHORITY) in context.get_ca_certs(binary_form=True)
        insecure = (await get(certificates(api, insecure=True), api)).context
        assert insecure.verify_mode is ssl.CERT_NONE

    asyncio.run(run())


def test_inside_a_tunnel_only_the_cluster_itself_is_trusted(certificates):
    async def run():
        api = FakeApi()
        certificate = await get(certificates(api, insecure=True), api)
        context = certificate.tunnel_context
        assert context is certificate.tunnel_context
        assert context.get_ca_certs(binary_form=True) == [der(AUTHORITY)]
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname

    asyncio.run(run())


def test_an_unusable_ca_file_is_named(certificates, tmp_path):
    async def run():
        api = FakeApi()
        for file in (tmp_path / "none.pem", tmp_path):
            with pytest.raises(MisconfiguredError, match=str(file)):
                await get(certificates(api, ca_file=str(file)), api)
        (tmp_path / "empty.pem").write_bytes(b"")
        with pytest.raises(MisconfiguredError, match=r"empty\.pem"):
            await get(certificates(api, ca_file=str(tmp_path / "empty.pem")), api)

    asyncio.run(run())


def test_no_descriptor_is_left_open(certificates):
    async def run():
        api = FakeApi()
        store = certificates(api)
        await get(store, api, 1)
        gc.collect()
        before = set(Path("/proc/self/fd").iterdir())
        _ = (await get(store, api, 2)).tunnel_context
        assert set(Path("/proc/self/fd").iterdir()) <= before

    asyncio.run(run())


def test_the_key_does_not_show(certificates):
    async def run():
        api = FakeApi()
        certificate = await get(certificates(api), api)
        assert b"PRIVATE KEY" in certificate.key_pem
        assert "PRIVATE" not in repr(certificate)

    asyncio.run(run())


def test_certificates_beyond_the_limit_are_forgotten(certificates):
    async def run():
        api = FakeApi()
        store = certificates(api, max_kept=2)
        for port in (1, 2, 3, 1):
            await get(store, api, port)
        assert len(api.requests) == 4

    asyncio.run(run())


# -- with a second factor --


def test_the_answer_goes_to_the_cluster_with_the_request(certificates):
    async def run():
        api, prompter = MfaApi(), FakePrompter()
        certificate = await get(certificates(api, prompter=prompter), api, 8000)
        assert api.calls == ["is_mfa_required", "create_challenge"] + 2 * ["generate_user_certs"]
        (question,) = prompter.questions
        assert (question.target, question.cluster, question.user) == ("app pg", CLUSTER, "alice")
        assert (question.profile, question.takes_code, question.webauthn) == (PROXY, True, None)
        assert 100 < question.seconds <= 110
        (request,) = api.requests
        assert request.MFAResponse.TOTP.Code == RIGHT_CODE
        assert request.Purpose == auth_pb2.UserCertsRequest.CERT_PURPOSE_SINGLE_USE_CERTS
        # Which keeps the asked end, and so one answer may do for the day.
        assert request.RequesterName == auth_pb2.UserCertsRequest.TSH_APP_LOCAL_PROXY
        assert list(request.AccessRequests) == ["request-1"]
        assert prompter.outcomes == [(question.id, "app pg can be used now")]
        assert certificate.not_after > NOW

    asyncio.run(run())


def test_a_database_is_asked_for_in_the_same_way(certificates):
    async def run():
        api, prompter = MfaApi(), FakePrompter()
        await get_database(certificates(api, prompter=prompter), api)
        route = auth_pb2.RouteToDatabase(ServiceName="orders", Protocol="postgres")
        assert api.mfa_requests == [auth_pb2.IsMFARequiredRequest(Database=route)]
        assert prompter.questions[0].target == "database orders"
        (request,) = api.requests
        assert request.RequesterName == auth_pb2.UserCertsRequest.TSH_DB_LOCAL_PROXY_TUNNEL

    asyncio.run(run())


@pytest.mark.parametrize("leaf", ["", "leaf.test"])
def test_only_a_root_cluster_checks_its_own_policy_with_the_challenge(certificates, leaf):
    async def run():
        root, owner = MfaApi(), MfaApi()
        await get(certificates(root, prompter=FakePrompter()), root, leaf=leaf, owner=owner)
        (request,) = root.challenge_requests
        assert request.WhichOneof("Request") == "ContextUser"
        assert request.ChallengeExtensions.scope == mfa_pb2.CHALLENGE_SCOPE_USER_SESSION
        assert request.HasField("MFARequiredCheck") is (leaf == "")
        assert owner.challenge_requests == []
        if not leaf:
            assert request.MFARequiredCheck == owner.mfa_requests[0]

    asyncio.run(run())


def test_parallel_connections_share_one_question_and_its_answer_lasts(certificates):
    async def run():
        api, prompter = MfaApi(), FakePrompter(gate=asyncio.Event())
        store = certificates(api, prompter=prompter)
        waiting = [asyncio.create_task(get(store, api)) for _ in range(20)]
        await until(lambda: prompter.questions)
        prompter.gate.set()
        found = await asyncio.gather(*waiting)
        assert await get(store, api) is found[0]
        assert len(set(map(id, found))) == len(prompter.questions) == 1

    asyncio.run(run())


def test_who_stops_waiting_leaves_the_question_open_for_the_next(certificates):
    async def run():
        api, prompter = MfaApi(), FakePrompter(gate=asyncio.Event())
        store = certificates(api, prompter=prompter)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(get(store, api), 0.05)
        again = asyncio.create_task(get(store, api))
        await asyncio.sleep(0)
        prompter.gate.set()
        await again
        assert len(prompter.questions) == 1

    asyncio.run(run())


@pytest.mark.parametrize(("wrong", "reason"), [("000000", "invalid"), ("used", "previously used")])
def test_a_wrong_code_asks_again_and_says_why(certificates, wrong, reason):
    async def run():
        api, prompter = MfaApi(), FakePrompter(codes=[wrong, RIGHT_CODE])
        await get(certificates(api, prompter=prompter), api)
        first, second = prompter.questions
        assert (first.problem, first.id) == ("", second.id)
        assert reason in second.problem
        assert second.seconds <= first.seconds
        assert len(prompter.outcomes) == 1
        # The cluster takes back its challenge when an answer was wrong.
        assert len(api.challenge_requests) == 2

    asyncio.run(run())


def test_three_wrong_codes_are_enough(certificates):
    async def run():
        api, prompter = MfaApi(), FakePrompter(codes=["1", "2", "3", RIGHT_CODE])
        with pytest.raises(MfaRequiredError, match="refused 3 times") as caught:
            await get(certificates(api, prompter=prompter), api)
        assert caught.value.refusal is Refusal.MFA_REQUIRED
        assert len(prompter.questions) == 3
        assert len(prompter.outcomes) == 1

    asyncio.run(run())


def test_the_questions_share_one_deadline(certificates):
    async def run():
        class Slow(FakePrompter):
            async def ask(self, question, renew):
                await asyncio.sleep(question.seconds)
                return await super().ask(question, renew)

        api, prompter = MfaApi(), Slow(codes=["1", RIGHT_CODE])
        with pytest.raises(MfaUnansweredError, match="invalid totp token"):
            await get(certificates(api, prompter=prompter, prompt_seconds=0.05), api)
        assert len(prompter.questions) == 1

    asyncio.run(run())


@pytest.mark.parametrize("error", [UnreachableError("gone"), MfaUnansweredError("nobody")])
def test_what_goes_wrong_after_the_question_is_passed_on(certificates, error):
    async def run():
        api, prompter = MfaApi(), FakePrompter()
        if isinstance(error, MfaUnansweredError):
            prompter.error = error
        else:
            api.refusal = error
        with pytest.raises(type(error)):
            await get(certificates(api, prompter=prompter), api)
        assert [outcome for _, outcome in prompter.outcomes] == [str(error)]

    asyncio.run(run())


def test_a_refusal_that_a_better_answer_does_not_change_is_final(certificates):
    class PickyError(AccessDeniedError):
        """Stands for a leaf, such as a missing device trust."""

    async def run():
        api, prompter = MfaApi(refusal=PickyError("no")), FakePrompter()
        with pytest.raises(PickyError):
            await get(certificates(api, prompter=prompter), api)
        assert len(prompter.questions) == 1

    asyncio.run(run())


def test_a_login_that_ends_takes_its_question_back(certificates):
    async def run():
        api, prompter = MfaApi(), FakePrompter(gate=asyncio.Event())
        store = certificates(api, prompter=prompter)
        waiting = asyncio.create_task(get(store, api))
        await until(lambda: prompter.questions)
        await store.close()
        with pytest.raises(UnreachableError):
            await waiting
        assert len(prompter.outcomes) == 1

    asyncio.run(run())


def test_without_anybody_to_ask_the_connection_is_refused(certificates):
    async def run():
        api = MfaApi()
        with pytest.raises(MfaRequiredError) as caught:
            await get(certificates(api), api)
        assert caught.value.refusal is Refusal.MFA_REQUIRED
        assert api.requests == api.challenge_requests == []

    asyncio.run(run())


@pytest.mark.parametrize(
    ("challenge", "said"),
    [
        (auth_pb2.MFAAuthenticateChallenge(), "tsh mfa add"),
        (
            auth_pb2.MFAAuthenticateChallenge(SSOChallenge=auth_pb2.SSOChallenge(request_id="1")),
            "single sign-on",
        ),
    ],
)
def test_a_user_without_a_usable_device_is_told_what_to_do(certificates, challenge, said):
    async def run():
        api, prompter = MfaApi(challenge=challenge), FakePrompter()
        with pytest.raises(MfaUnansweredError, match=said):
            await get(certificates(api, prompter=prompter), api)
        assert prompter.questions == []

    asyncio.run(run())


# -- with single sign-on --


class SsoApi(MfaApi):
    """Offers a page to who names a way back, as clusters do, and takes one token."""

    def __init__(self, token="the token"):
        super().__init__()
        self.token = token

    async def create_challenge(self, request):
        challenge = auth_pb2.MFAAuthenticateChallenge()
        challenge.CopyFrom(await super().create_challenge(request))
        if request.SSOClientRedirectURL:
            challenge.SSOChallenge.request_id = f"r{len(self.challenge_requests)}"
            challenge.SSOChallenge.redirect_url = "https://idp.test/"
        return challenge

    async def generate_user_certs(self, request):
        if request.MFAResponse.HasField("SSO") and request.MFAResponse.SSO.token != self.token:
            raise AccessDeniedError("demo.test refused: invalid token")
        return await super().generate_user_certs(request)

    @property
    def way_back(self):
        return self.challenge_requests[-1].SSOClientRedirectURL


class BrowserPrompter(FakePrompter):
    """A user whose browser comes back with each of these in turn."""

    def __init__(self, api, *visits):
        super().__init__(codes=[])
        self.api = api
        self.visits = list(visits)

    async def ask(self, question, renew):
        self.questions.append(question)
        self.renews.append(renew)
        url = self.api.way_back
        key = key_of(url)
        fields = self.visits.pop(0)
        if "token" in fields:
            fields = {"response": sealed(key, token=fields["token"])}
        else:
            fields = fields | {"secret_key": key.hex()}
        await visit(port_of(url), **fields)
        question_id, outcome = self.given.pop()
        assert question_id == question.id
        if isinstance(outcome, SignInFailedError):
            raise outcome
        return outcome


def test_a_browser_that_comes_back_opens_the_app(certificates):
    async def run():
        api, callbacks = SsoApi(), Callbacks()
        prompter = BrowserPrompter(api, {"token": "the token"})
        await get(certificates(api, prompter=prompter, callbacks=callbacks), api)
        (asked,) = api.challenge_requests
        assert asked.ProxyAddress == f"{PROXY}:443"
        assert prompter.questions[0].sso.redirect_url == "https://idp.test/"
        (request,) = api.requests
        given = request.MFAResponse.SSO
        assert (given.request_id, given.token) == ("r1", "the token")
        assert callbacks._server is None

    asyncio.run(run())


@pytest.mark.parametrize("first", [{"err": "denied"}, {"token": "wrong"}])
def test_a_sign_on_that_fails_is_asked_for_again_with_another_key(certificates, first):
    async def run():
        api = SsoApi()
        prompter = BrowserPrompter(api, first, {"token": "the token"})
        await get(certificates(api, prompter=prompter), api)
        assert [bool(q.problem) for q in prompter.questions] == [False, True]
        assert ("denied" in prompter.questions[1].problem) is ("err" in first)
        assert len({request.SSOClientRedirectURL for request in api.challenge_requests}) == 2
        assert api.requests[0].MFAResponse.SSO.request_id == "r2"
        assert len(prompter.outcomes) == 1

    asyncio.run(run())


def test_sign_ons_that_fail_are_not_asked_for_without_end(certificates):
    async def run():
        api = SsoApi()
        prompter = BrowserPrompter(api, *[{"err": "denied"}] * 9)
        with pytest.raises(MfaRequiredError, match=r"refused 3 times .*denied"):
            await get(certificates(api, prompter=prompter), api)
        assert len(prompter.questions) == 3

    asyncio.run(run())


def test_a_cluster_without_single_sign_on_costs_one_request_and_no_listener(certificates):
    async def run():
        api, callbacks = MfaApi(), Callbacks()
        prompter = FakePrompter(gate=asyncio.Event())
        store = certificates(api, prompter=prompter, callbacks=callbacks)
        waiting = asyncio.create_task(get(store, api))
        await until(lambda: prompter.questions)
        assert callbacks._server is None
        prompter.gate.set()
        await waiting
        assert len(api.challenge_requests) == 1

    asyncio.run(run())


def test_a_new_challenge_for_a_key_leaves_the_page_as_it_is(certificates):
    async def run():
        api = SsoApi()
        prompter = BrowserPrompter(api, {"token": "the token"})
        await get(certificates(api, prompter=prompter), api)
        renewed = await prompter.renews[0]()
        assert renewed.sso == prompter.questions[0].sso
        assert api.challenge_requests[1].SSOClientRedirectURL == ""

    asyncio.run(run())


def test_who_cannot_listen_is_offered_no_page(certificates, monkeypatch):
    def fail(*_, **__):
        raise OSError("no ports")

    async def run():
        monkeypatch.setattr(sso_callback.socket, "create_server", fail)
        api, prompter = SsoApi(), FakePrompter()
        await get(certificates(api, prompter=prompter), api)
        assert api.challenge_requests[0].SSOClientRedirectURL == ""
        assert api.challenge_requests[0].ProxyAddress == ""
        assert prompter.questions[0].sso is None

    asyncio.run(run())


@pytest.mark.parametrize("ends", ["closed", "refused"])
def test_nothing_listens_after_a_question_that_ends_early(certificates, ends):
    async def run():
        api, callbacks = SsoApi(), Callbacks()
        prompter = FakePrompter(gate=asyncio.Event(), error=MfaUnansweredError("declined"))
        store = certificates(api, prompter=prompter, callbacks=callbacks)
        waiting = asyncio.create_task(get(store, api))
        await until(lambda: prompter.questions)
        assert callbacks._server is not None
        if ends == "closed":
            await store.close()
        else:
            prompter.gate.set()
        with pytest.raises(TeleportError):
            await waiting
        assert callbacks._server is None

    asyncio.run(run())


def test_a_cluster_that_changed_its_mind_wants_no_answer(certificates):
    async def run():
        challenge = auth_pb2.MFAAuthenticateChallenge(MFARequired=auth_pb2.MFA_REQUIRED_NO)
        api, prompter = MfaApi(challenge=challenge), FakePrompter()
        await get(certificates(api, prompter=prompter), api)
        assert prompter.questions == []
        assert not api.requests[0].HasField("MFAResponse")

    asyncio.run(run())


def test_the_challenge_for_a_security_key_can_be_renewed(certificates):
    async def run():
        api = MfaApi()
        api.challenge = auth_pb2.MFAAuthenticateChallenge(
            TOTP=auth_pb2.TOTPChallenge(), WebauthnChallenge=webauthn_challenge()
        )
        prompter = FakePrompter()
        await get(certificates(api, prompter=prompter), api)
        (question,) = prompter.questions
        assert question.webauthn.origin == f"https://{PROXY}"
        assert question.webauthn.rp_id == PROXY
        assert question.webauthn.credential_ids == [b"key"]
        api.challenge = auth_pb2.MFAAuthenticateChallenge(
            WebauthnChallenge=webauthn_challenge(challenge=b"another")
        )
        renewed = await prompter.renews[0]()
        assert (renewed.id, renewed.webauthn.challenge) == (question.id, b"another")
        assert renewed.takes_code

    asyncio.run(run())

import asyncio
import ssl
from datetime import timedelta
from pathlib import Path

import pytest
from teleport_fakes import AUTHORITY, CLUSTER, NOW, Clock, FakeApi, der, pem, user_certificate

from ipc.messages import Refusal
from workers.proxy.teleport.apps import App
from workers.proxy.teleport.certificates import AppCertificates
from workers.proxy.teleport.errors import (
    LoginExpiredError,
    MfaRequiredError,
    MisconfiguredError,
    RefusedError,
)
from workers.proxy.teleport.identity import read_identity
from workers.proxy.teleport.pb import auth_pb2

APP = App("pg", "pg.teleport.demo.test", "tcp://127.0.0.1:5432", None)
IDENTITY = read_identity(der(user_certificate()))


def certificates(api, clock, **changes):
    return AppCertificates(IDENTITY, api, wall_clock=clock.wall, **changes)


async def get(store, api, port=0, app=APP):
    return await store.get(app, port, cluster=CLUSTER, leaf="", owner=api)


def test_the_request_is_that_of_a_local_proxy():
    async def run():
        api = FakeApi()
        certificate = await get(certificates(api, Clock()), api, 8000)
        (request,) = api.requests
        assert request.Usage == auth_pb2.UserCertsRequest.App
        assert request.RequesterName == auth_pb2.UserCertsRequest.TSH_APP_LOCAL_PROXY
        assert request.Username == "alice"
        assert request.Expires.ToDatetime() == IDENTITY.not_after.replace(tzinfo=None)
        assert list(request.AccessRequests) == ["request-1"]
        assert request.RouteToCluster == CLUSTER
        route = request.RouteToApp
        assert (route.Name, route.PublicAddr, route.URI) == (APP.name, APP.public_addr, APP.uri)
        assert (route.ClusterName, route.TargetPort) == (CLUSTER, 8000)
        assert not request.SSHPublicKey
        assert certificate.session == "session-1"
        assert certificate.not_after == NOW + timedelta(seconds=3600)

    asyncio.run(run())


def test_a_certificate_is_reused_until_it_expires():
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


def test_each_port_has_a_certificate_and_a_key_of_its_own():
    async def run():
        api = FakeApi()
        store = certificates(api, Clock())
        await get(store, api, 8000)
        await get(store, api, 8001)
        await get(store, api, 8000)
        assert [r.RouteToApp.TargetPort for r in api.requests] == [8000, 8001]
        assert len({r.TLSPublicKey for r in api.requests}) == 2

    asyncio.run(run())


def test_parallel_connections_share_one_request():
    async def run():
        api = FakeApi(gate=asyncio.Event())
        store = certificates(api, Clock())
        waiting = [asyncio.create_task(get(store, api)) for _ in range(20)]
        await asyncio.sleep(0)
        api.gate.set()
        assert len(set(map(id, await asyncio.gather(*waiting)))) == 1
        assert len(api.requests) == 1

    asyncio.run(run())


def test_a_failed_request_is_tried_again_by_the_next_connection():
    async def run():
        api = FakeApi(error=RefusedError("no"))
        store = certificates(api, Clock())
        with pytest.raises(RefusedError):
            await get(store, api)
        api.error = None
        await get(store, api)

    asyncio.run(run())


def test_an_app_with_session_mfa_is_refused_before_a_certificate_is_asked_for():
    async def run():
        api = FakeApi(needs_mfa=True)
        with pytest.raises(MfaRequiredError) as caught:
            await get(certificates(api, Clock()), api)
        assert caught.value.refusal is Refusal.MFA_REQUIRED
        assert api.requests == []

    asyncio.run(run())


def test_an_expired_login_asks_for_nothing():
    async def run():
        api, clock = FakeApi(), Clock()
        clock.seconds += 13 * 3600
        with pytest.raises(LoginExpiredError):
            await get(certificates(api, clock), api)
        assert api.calls == []

    asyncio.run(run())


@pytest.mark.parametrize(
    "answer",
    [b"", b"nonsense", pem(AUTHORITY), pem(user_certificate()), b"x" * 2_000_000],
    ids=["empty", "no PEM", "no user", "another key", "huge"],
)
def test_an_unusable_answer_is_a_refusal(answer):
    class Odd(FakeApi):
        async def generate_user_certs(self, request):
            return auth_pb2.Certs(TLS=answer)

    async def run():
        api = Odd()
        with pytest.raises(RefusedError):
            await get(certificates(api, Clock()), api)

    asyncio.run(run())


def test_the_context_dials_apps_and_trusts_the_configured_file(tmp_path):
    async def run():
        api = FakeApi()
        file = tmp_path / "ca.pem"
        file.write_bytes(pem(AUTHORITY))
        context = (await get(certificates(api, Clock(), ca_file=str(file)), api)).context
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
        assert der(AUTHORITY) in context.get_ca_certs(binary_form=True)
        insecure = (await get(certificates(api, Clock(), insecure=True), api)).context
        assert insecure.verify_mode is ssl.CERT_NONE

    asyncio.run(run())


def test_an_unusable_ca_file_is_named(tmp_path):
    async def run():
        api = FakeApi()
        for file in (tmp_path / "none.pem", tmp_path):
            with pytest.raises(MisconfiguredError, match=str(file)):
                await get(certificates(api, Clock(), ca_file=str(file)), api)
        (tmp_path / "empty.pem").write_bytes(b"")
        with pytest.raises(MisconfiguredError, match=r"empty\.pem"):
            await get(certificates(api, Clock(), ca_file=str(tmp_path / "empty.pem")), api)

    asyncio.run(run())


def test_no_descriptor_is_left_open():
    async def run():
        api = FakeApi()
        store = certificates(api, Clock())
        await get(store, api, 1)
        before = sorted(Path("/proc/self/fd").iterdir())
        await get(store, api, 2)
        assert sorted(Path("/proc/self/fd").iterdir()) == before

    asyncio.run(run())


def test_certificates_beyond_the_limit_are_forgotten():
    async def run():
        api = FakeApi()
        store = certificates(api, Clock(), max_kept=2)
        for port in (1, 2, 3, 1):
            await get(store, api, port)
        assert len(api.requests) == 4

    asyncio.run(run())

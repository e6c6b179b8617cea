"""The whole client on a fake cluster: homes on disk, no network."""

import asyncio
from datetime import timedelta
from ipaddress import IPv4Network

import pytest
from teleport_fakes import (
    CLUSTER,
    NOW,
    PROXY,
    Clock,
    FakeApi,
    app_server,
    make_authority,
    pem,
    settings,
    until,
    user_certificate,
    write_home,
)

from ipc import codec
from ipc.messages import ClustersReported, ClusterState, Refusal
from workers.proxy.teleport import auth_client
from workers.proxy.teleport.client import NotOurs, Teleport
from workers.proxy.teleport.errors import (
    LoginExpiredError,
    NotLoggedInError,
    PortNotAllowedError,
    RefusedError,
    UnknownAppError,
    UnreachableError,
    ZonesUnknownError,
)
from workers.proxy.teleport.session import AppTarget

NAME = f"pg.{PROXY}"


class Bed:
    """A started client on `api`; `changes` counts the calls of on_change."""

    def __init__(self, home, api=None, poll_seconds=0.01, **changes):
        self.home = home
        self.api = api or FakeApi()
        self.clock = Clock()
        self.changes = 0
        self.client = Teleport(
            home,
            settings(self.api, self.clock, **changes),
            on_change=self._changed,
            poll_seconds=poll_seconds,
        )

    def _changed(self):
        self.changes += 1

    async def __aenter__(self):
        await self.client.start()
        return self

    async def __aexit__(self, *_exc):
        await self.client.close()

    @property
    def state(self):
        (cluster,) = self.client.states()
        return cluster.state


def test_a_tcp_app_is_found_and_can_be_dialled(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path, FakeApi(ipv4_range="100.80.0.0/16")) as bed:
            await until(lambda: bed.client.states()[0].ranges)
            target = await bed.client.resolve("PG.Teleport.Demo.Test.")
            assert isinstance(target, AppTarget)
            assert (target.profile, target.cluster, target.app.name) == (PROXY, CLUSTER, "pg")
            assert target.ipv4_range == IPv4Network("100.80.0.0/16")
            dial = await bed.client.dial_parameters(target, 5432)
            assert (dial.host, dial.port, dial.server_hostname) == (PROXY, 443, PROXY)
            assert dial.target_port == 0
            again = await bed.client.dial_parameters(target, 1)
            assert again.ssl_context is dial.ssl_context

    asyncio.run(run())


@pytest.mark.parametrize(
    "name",
    [
        PROXY,
        PROXY.upper() + ".",
        "public.test",  # the cluster's public address
        "www.example.com",
        "corp.test",  # a zone itself
        f"web.{PROXY}",
        f"unknown.{PROXY}",
    ],
)
def test_other_names_are_not_ours(tmp_path, name):
    async def run():
        write_home(tmp_path)
        apps = [
            app_server("proxy", public_addr=PROXY),
            app_server("public", public_addr="public.test"),
            app_server("web", "http://127.0.0.1"),
        ]
        api = FakeApi(apps=apps, zones=["corp.test", "test"], public_addr="public.test:443")
        async with Bed(tmp_path, api) as bed:
            await until(lambda: len(bed.client.states()[0].zones) > 1)
            assert await bed.client.resolve(name) == NotOurs()

    asyncio.run(run())


def test_a_name_in_a_custom_zone_is_found_at_any_depth(tmp_path):
    async def run():
        write_home(tmp_path)
        api = FakeApi(apps=[app_server(public_addr="a.b.corp.test")], zones=["corp.test"])
        async with Bed(tmp_path, api) as bed:
            assert isinstance(await bed.client.resolve("a.b.corp.test"), AppTarget)

    asyncio.run(run())


def test_a_name_outside_all_zones_is_not_asked(tmp_path):
    async def run():
        write_home(tmp_path)
        api = FakeApi(apps=[app_server(public_addr="pg.elsewhere.test")])
        async with Bed(tmp_path, api) as bed:
            assert await bed.client.resolve("pg.elsewhere.test") == NotOurs()
            assert api.predicates == []

    asyncio.run(run())


def test_a_hostile_name_stays_inside_its_quotes(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path) as bed:
            await bed.client.resolve(f'x" || true || "y.{PROXY}')
            assert r"x\" || true || \"y." in bed.api.predicates[0]

    asyncio.run(run())


def test_a_forbidden_port_is_refused_without_a_certificate(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path, FakeApi(apps=[app_server(ports=[(8000, 8010)])])) as bed:
            target = await bed.client.resolve(NAME)
            assert bed.client.check_port(target.app, 80) is Refusal.PORT_NOT_ALLOWED
            assert bed.client.check_port(target.app, 8005) == 8005
            with pytest.raises(PortNotAllowedError):
                await bed.client.dial_parameters(target, 80)
            assert bed.api.requests == []

    asyncio.run(run())


def test_names_of_a_dead_cluster_cannot_be_told_apart_from_others(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path, FakeApi(error=UnreachableError("down"))) as bed:
            with pytest.raises(UnreachableError):
                await bed.client.resolve(NAME)
            with pytest.raises(ZonesUnknownError):
                await bed.client.resolve("www.example.com")
            await until(lambda: bed.state is ClusterState.UNREACHABLE)
            assert bed.client.states()[0].problem == "down"

    asyncio.run(run())


def test_a_silent_cluster_does_not_hold_up_foreign_names(tmp_path):
    async def run():
        write_home(tmp_path)
        api = FakeApi(gate=asyncio.Event())
        async with Bed(tmp_path, api, first_answer_seconds=0.05) as bed:
            with pytest.raises(ZonesUnknownError):
                await bed.client.resolve("www.example.com")
            assert await bed.client.resolve(PROXY) == NotOurs()

    asyncio.run(run())


def test_a_cluster_that_goes_down_keeps_its_names(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path) as bed:
            target = await bed.client.resolve(NAME)
            bed.api.error = UnreachableError("down")
            bed.clock.seconds += 1000
            assert await bed.client.resolve(NAME) == target
            assert await bed.client.resolve("www.example.com") == NotOurs()
            await until(lambda: bed.state is ClusterState.UNREACHABLE)
            bed.api.error = None
            bed.clock.seconds += 10
            await until(lambda: bed.state is ClusterState.OK)

    asyncio.run(run())


def test_an_expired_login_is_reported_and_asks_nothing(tmp_path):
    async def run():
        write_home(tmp_path, user_certificate(NOW + timedelta(minutes=1)))
        async with Bed(tmp_path) as bed:
            target = await bed.client.resolve(NAME)
            bed.clock.seconds += 120
            await until(lambda: bed.state is ClusterState.LOGIN_EXPIRED)
            await until(lambda: bed.changes)
            calls = len(bed.api.calls)
            assert await bed.client.resolve(NAME) == target
            with pytest.raises(LoginExpiredError):
                await bed.client.resolve(f"new.{PROXY}")
            with pytest.raises(LoginExpiredError) as caught:
                await bed.client.dial_parameters(target, 1)
            assert caught.value.refusal is Refusal.NOT_LOGGED_IN
            assert len(bed.api.calls) == calls

    asyncio.run(run())


def test_a_renewed_login_is_taken_over_with_new_certificates(tmp_path):
    async def run():
        write_home(tmp_path, user_certificate(NOW + timedelta(minutes=1)))
        async with Bed(tmp_path) as bed:
            target = await bed.client.resolve(NAME)
            first = await bed.client.dial_parameters(target, 1)
            bed.clock.seconds += 120
            await until(lambda: bed.state is ClusterState.LOGIN_EXPIRED)
            write_home(tmp_path, user_certificate(NOW + timedelta(hours=1)))
            await until(lambda: bed.state is ClusterState.OK)
            second = await bed.client.dial_parameters(target, 1)
            assert second.ssl_context is not first.ssl_context
            assert len(bed.api.requests) == 2

    asyncio.run(run())


def test_a_rotated_authority_is_taken_over(tmp_path):
    async def run():
        keys = write_home(tmp_path)
        seen = []
        async with Bed(tmp_path, connect=lambda login: seen.append(login) or FakeApi()):
            path = keys / "cas" / f"{CLUSTER}.pem"
            path.write_bytes(path.read_bytes() + pem(make_authority()[1]))
            await until(lambda: len(seen) == 2)
            assert [len(login.authorities[CLUSTER]) for login in seen] == [1, 2]

    asyncio.run(run())


def test_login_and_logout_are_noticed(tmp_path):
    async def run():
        async with Bed(tmp_path) as bed:
            assert bed.client.states() == []
            assert "tsh login" in bed.client.problem
            write_home(tmp_path)
            await until(lambda: bed.client.states() and bed.state is ClusterState.OK)
            assert bed.client.problem == ""
            target = await bed.client.resolve(NAME)
            (tmp_path / f"{PROXY}.yaml").unlink()
            await until(lambda: bed.client.states() == [])
            with pytest.raises(UnknownAppError):
                await bed.client.dial_parameters(target, 1)
            assert await bed.client.resolve(NAME) == NotOurs()
            assert bed.api.is_closed
            assert bed.changes >= 2

    asyncio.run(run())


def test_logout_that_leaves_the_profile_is_no_login(tmp_path):
    async def run():
        keys = write_home(tmp_path)
        async with Bed(tmp_path) as bed:
            await bed.client.resolve(NAME)
            (keys / "alice.crt").unlink()
            await until(lambda: bed.state is ClusterState.NO_LOGIN)
            with pytest.raises(NotLoggedInError):
                await bed.client.resolve(NAME)

    asyncio.run(run())


def test_a_login_in_progress_does_not_interrupt(tmp_path):
    """A certificate without its key is believed only when it stays like that."""

    async def run():
        keys = write_home(tmp_path)
        async with Bed(tmp_path, poll_seconds=1000) as bed:
            for size in range(5):
                (keys / "alice.key").write_bytes(b"-" * size)
                await bed.client._look()
                assert bed.state is ClusterState.OK
            await bed.client._look()
            assert bed.state is ClusterState.NO_LOGIN
            write_home(tmp_path, user_certificate(NOW + timedelta(hours=2)))
            await bed.client._look()
            assert bed.client.states()[0].expires == "2026-11-22T14:00:00Z"

    asyncio.run(run())


def test_an_unreachable_profile_does_not_hide_another(tmp_path):
    async def run():
        write_home(tmp_path, proxy="a.test")
        write_home(tmp_path, proxy="b.test")
        bad, good = (
            FakeApi(error=UnreachableError("down")),
            FakeApi(apps=[app_server(public_addr="pg.b.test")], public_addr="b.test:443"),
        )
        apis = {"a.test": bad, "b.test": good}
        async with Bed(tmp_path, connect=lambda login: apis[login.name]) as bed:
            assert (await bed.client.resolve("pg.b.test")).profile == "b.test"
            assert [c.profile for c in bed.client.states()] == ["a.test", "b.test"]
            with pytest.raises(UnreachableError):
                await bed.client.resolve("pg.a.test")

    asyncio.run(run())


def test_a_refused_certificate_leaves_the_cluster_well(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path) as bed:
            target = await bed.client.resolve(NAME)
            bed.api.error = RefusedError("no")
            with pytest.raises(RefusedError) as caught:
                await bed.client.dial_parameters(target, 1)
            assert caught.value.refusal is Refusal.CERTIFICATE_REFUSED
            assert bed.state is ClusterState.OK

    asyncio.run(run())


def test_a_proxy_that_cannot_be_dialled_says_why(tmp_path):
    async def run():
        write_home(tmp_path)
        path = tmp_path / f"{PROXY}.yaml"
        path.write_text(path.read_text().replace("tls_routing_enabled: true", ""))
        async with Bed(tmp_path, connect=auth_client.connect) as bed:
            (cluster,) = bed.client.states()
            assert cluster.state is ClusterState.UNREACHABLE
            assert "TLS routing" in cluster.problem
            with pytest.raises(UnreachableError):
                await bed.client.resolve(NAME)

    asyncio.run(run())


def test_reports_fit_into_a_message(tmp_path):
    async def run():
        write_home(tmp_path)
        zones = [f"{'z' * 60}{i}.test" for i in range(300)]
        async with Bed(tmp_path, FakeApi(zones=zones, ipv4_range="100.96.0.0/12")) as bed:
            await until(lambda: len(bed.client.states()[0].zones) > 1)
            message = ClustersReported(clusters=bed.client.states(), problem=bed.client.problem)
            assert codec.decode(codec.encode(message), "proxy", "supervisor") == message
            (cluster,) = message.clusters
            assert cluster.name == CLUSTER
            assert cluster.zones[0] == PROXY
            assert cluster.ranges == ["100.96.0.0/12"]
            assert cluster.expires == "2026-11-23T00:00:00Z"

    asyncio.run(run())


def test_closing_during_a_question_ends_it_with_an_error_of_ours(tmp_path):
    async def run():
        write_home(tmp_path)
        bed = Bed(tmp_path, FakeApi(gate=asyncio.Event()))
        await bed.client.start()
        question = asyncio.create_task(bed.client.resolve(NAME))
        await until(lambda: "app_servers" in bed.api.calls)
        await bed.client.close()
        with pytest.raises(UnreachableError):
            await question

    asyncio.run(run())

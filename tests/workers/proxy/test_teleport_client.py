"""The whole client on fake clusters: homes on disk, no network."""

import asyncio
import contextlib
from datetime import timedelta
from ipaddress import IPv4Network

import pytest
from mfa_fakes import FakePrompter, MfaApi
from teleport_fakes import (
    CLUSTER,
    NOW,
    PROXY,
    USER_SUBJECT,
    Clock,
    FakeApi,
    app_server,
    database_server,
    der,
    make_authority,
    pem,
    settings,
    until,
    user_certificate,
    write_home,
)

from ipc import codec
from ipc.cluster_report import split
from ipc.messages import ClusterState, Refusal
from workers.proxy.dial_plan import DialPlan
from workers.proxy.teleport.client import Teleport
from workers.proxy.teleport.databases import Database, database_id
from workers.proxy.teleport.errors import (
    AccessDeniedError,
    KeyPolicyError,
    LoginExpiredError,
    MfaUnansweredError,
    NotLoggedInError,
    PortNotAllowedError,
    RefusedError,
    UnknownAppError,
    UnreachableError,
    ZonesUnknownError,
)
from workers.proxy.teleport.home import fingerprint
from workers.proxy.teleport.targets import (
    AppTarget,
    ClusterTarget,
    DatabaseTarget,
    NoSuchName,
    NotOurs,
    Owner,
    WebApp,
)

NAME = f"pg.{PROXY}"
LEAF = "leaf.test"
ALICE = Owner(PROXY, "alice", CLUSTER)


class Bed:
    """A started client on `api`; `changes` counts the calls of on_change."""

    def __init__(self, home, api=None, poll_seconds=0.01, **changes):
        self.home = home
        self.api = api or FakeApi()
        self.clock = Clock()
        self.changes = 0
        self.gone = []
        self.client = Teleport(
            home,
            settings(self.api, self.clock, **changes),
            on_change=self._changed,
            poll_seconds=poll_seconds,
        )
        self.client.on_owner_gone = self.gone.append

    def _changed(self):
        self.changes += 1

    async def __aenter__(self):
        await self.client.start()
        return self

    async def __aexit__(self, *_exc):
        await self.client.close()

    @property
    def state(self):
        return self.client.states()[0].state

    def cluster(self, name):
        return next(c for c in self.client.states() if c.name == name)

    async def ready(self):
        """All clusters have been asked."""
        await until(lambda: all(c.is_configured for c in self.client.states()))
        return self


def leaf_api(**changes):
    return FakeApi(**({"apps": [], "public_addr": "proxy.leaf.test:443"} | changes))


def test_a_tcp_app_is_found_and_can_be_dialled(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path, FakeApi(ipv4_range="100.80.0.0/16")) as bed:
            await until(lambda: bed.client.states()[0].ranges)
            target = await bed.client.resolve("PG.Teleport.Demo.Test.")
            assert isinstance(target, AppTarget)
            assert (target.profile, target.cluster, target.app.name) == (PROXY, CLUSTER, "pg")
            assert target.ipv4_range == IPv4Network("100.80.0.0/16")
            plan = await bed.client.plan(target, 5432)
            assert (plan.host, plan.port, plan.tls.server_hostname) == (PROXY, 443, PROXY)
            assert plan.upgrade is None
            assert plan.http_proxy == ""
            assert bed.api.requests[0].RouteToApp.TargetPort == 0
            assert (await bed.client.plan(target, 1)).tls.context is plan.tls.context

    asyncio.run(run())


@pytest.mark.parametrize(
    "name",
    [
        PROXY,
        PROXY.upper() + ".",
        "public.test",  # the cluster's public address
        "www.example.com",
        "corp.test",  # a zone itself
        CLUSTER,
        "unknown.corp.test",
    ],
)
def test_other_names_are_not_ours(tmp_path, name):
    async def run():
        write_home(tmp_path)
        apps = [
            app_server("proxy", public_addr=PROXY),
            app_server("public", public_addr="public.test"),
        ]
        api = FakeApi(apps=apps, zones=["corp.test", "test"], public_addr="public.test:443")
        async with Bed(tmp_path, api) as bed:
            await bed.ready()
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
            with pytest.raises(PortNotAllowedError, match=r"no port 80, only 8000-8010$") as caught:
                await bed.client.plan(target, 80)
            assert caught.value.refusal is Refusal.PORT_NOT_ALLOWED
            assert bed.api.requests == []
            await bed.client.plan(target, 8005)
            assert bed.api.requests[0].RouteToApp.TargetPort == 8005

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


def test_a_cluster_that_fails_the_first_time_is_asked_again_at_once(tmp_path):
    async def run():
        write_home(tmp_path)
        api = FakeApi(error=UnreachableError("Temporary failure in name resolution"))
        async with Bed(tmp_path, api) as bed:
            await until(lambda: bed.state is ClusterState.UNREACHABLE)
            bed.api.error = None
            bed.clock.seconds += 0.6
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
                await bed.client.plan(target, 1)
            assert caught.value.refusal is Refusal.NOT_LOGGED_IN
            assert len(bed.api.calls) == calls

    asyncio.run(run())


def test_a_renewed_login_is_taken_over_with_new_certificates(tmp_path):
    async def run():
        write_home(tmp_path, user_certificate(NOW + timedelta(minutes=1)))
        async with Bed(tmp_path) as bed:
            target = await bed.client.resolve(NAME)
            first = await bed.client.plan(target, 1)
            bed.clock.seconds += 120
            await until(lambda: bed.state is ClusterState.LOGIN_EXPIRED)
            write_home(tmp_path, user_certificate(NOW + timedelta(hours=1)))
            await until(lambda: bed.state is ClusterState.OK)
            second = await bed.client.plan(target, 1)
            assert second.tls.context is not first.tls.context
            assert len(bed.api.requests) == 2

    asyncio.run(run())


@pytest.mark.parametrize("answers", [True, False])
def test_a_name_waits_for_the_clusters_range_but_not_for_ever(tmp_path, answers):
    async def run():
        write_home(tmp_path)
        api = FakeApi(ipv4_range="100.80.0.0/16", gates={"vnet_config": asyncio.Event()})
        async with Bed(tmp_path, api, first_answer_seconds=5.0 if answers else 0.1) as bed:
            resolving = asyncio.create_task(bed.client.resolve(NAME))
            await until(lambda: "vnet_config" in api.calls)
            if answers:
                api.gates["vnet_config"].set()
            target = await resolving
            assert isinstance(target, AppTarget)
            assert target.ipv4_range == (IPv4Network("100.80.0.0/16") if answers else None)

    asyncio.run(run())


@pytest.mark.parametrize("gated", ["is_mfa_required", "generate_user_certs"])
def test_a_login_that_is_renewed_while_a_certificate_is_got_is_used_for_it(tmp_path, gated):
    async def run():
        write_home(tmp_path, user_certificate(NOW + timedelta(hours=1)))
        async with Bed(tmp_path) as bed:
            await bed.ready()
            target = await bed.client.resolve(NAME)
            bed.api.gates[gated] = asyncio.Event()
            planning = asyncio.create_task(bed.client.plan(target, 1))
            await until(lambda: gated in bed.api.calls)
            bed.api.gates = {}
            write_home(tmp_path, user_certificate(NOW + timedelta(hours=2)))
            assert (await planning).tls is not None
            assert len(bed.api.requests) == 1
            assert bed.state is ClusterState.OK
            assert bed.client.states()[0].expires == "2026-11-22T14:00:00Z"

    asyncio.run(run())


class EachTurn:
    """Does `work` in each turn of the loop while a changed home is taken over, and in no other.

    Without a pause for longer than that the threads that read the home would hardly get to run.
    """

    def __init__(self, monkeypatch, work) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        take_over = Teleport._apply

        async def turns() -> None:
            while True:
                work()
                await asyncio.sleep(0)

        async def watched(teleport, home) -> None:
            self.tasks.append(asyncio.create_task(turns()))
            try:
                await take_over(teleport, home)
            finally:
                self.tasks[-1].cancel()

        monkeypatch.setattr(Teleport, "_apply", watched)

    async def end(self) -> None:
        """Raises what `work` has raised."""
        for task in self.tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def ended(dial) -> None:
    dial.cancel()
    await asyncio.gather(dial, return_exceptions=True)


def test_nothing_is_missing_while_a_login_is_taken_over(tmp_path, monkeypatch):
    """Names are asked for and clusters are reported between any two steps of it."""

    async def run():
        write_home(tmp_path)
        write_home(tmp_path, proxy="second.test")
        renewed = NOW + timedelta(hours=24)
        api = FakeApi(gates={"generate_user_certs": asyncio.Event()})
        async with Bed(tmp_path, api) as bed:
            await bed.ready()
            target = await bed.client.resolve(NAME)
            # What is under way is ended first, which takes some steps.
            dial = asyncio.ensure_future(bed.client.plan(target, 5432))
            await until(lambda: "generate_user_certs" in api.calls)
            questions = []

            def look() -> None:
                assert [c.profile for c in bed.client.states()] == ["second.test", PROXY]
                questions.append(asyncio.create_task(bed.client.resolve(NAME)))

            turns = EachTurn(monkeypatch, look)
            before = {cluster.expires for cluster in bed.client.states()}
            write_home(tmp_path, user_certificate(renewed))
            write_home(tmp_path, user_certificate(renewed), proxy="second.test")
            await until(lambda: not before & {c.expires for c in bed.client.states()})
            async with asyncio.timeout(20):
                await turns.end()
                assert len(questions) > 1
                for answer in await asyncio.gather(*questions):
                    assert isinstance(answer, AppTarget)
            await ended(dial)

    asyncio.run(run())


def test_a_rotated_authority_is_taken_over(tmp_path):
    async def run():
        keys = write_home(tmp_path)
        seen = []
        async with Bed(tmp_path, connect=lambda login, *_: seen.append(login) or FakeApi()) as bed:
            await bed.ready()
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
            assert bed.client.owner(PROXY) == ALICE
            (tmp_path / f"{PROXY}.yaml").unlink()
            await until(lambda: bed.client.states() == [])
            assert bed.gone == [ALICE]
            assert bed.client.owner(PROXY) is None
            with pytest.raises(UnknownAppError):
                await bed.client.plan(target, 1)
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
    """A certificate that does not fit its key is believed only when it stays like that."""

    async def run():
        keys = write_home(tmp_path)
        async with Bed(tmp_path) as bed:

            def has_looked():
                seen = bed.client._half_written
                return seen is not None and seen[0] == fingerprint(tmp_path)

            for size in range(5):
                (keys / "alice.key").write_bytes(b"-" * size)
                await until(has_looked)
                bed.clock.seconds += 0.9
                assert bed.state is ClusterState.OK
            bed.clock.seconds += 0.2
            await until(lambda: bed.state is ClusterState.NO_LOGIN)
            assert bed.gone == [ALICE]
            write_home(tmp_path, user_certificate(NOW + timedelta(hours=2)))
            await until(lambda: bed.state is ClusterState.OK)
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
        async with Bed(tmp_path, connect=lambda login, *_: apis[login.name]) as bed:
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
                await bed.client.plan(target, 1)
            assert caught.value.refusal is Refusal.CERTIFICATE_REFUSED
            assert bed.state is ClusterState.OK

    asyncio.run(run())


def test_reports_fit_into_a_message(tmp_path):
    async def run():
        write_home(tmp_path)
        zones = [f"{'z' * 60}{i}.test" for i in range(300)]
        async with Bed(tmp_path, FakeApi(zones=zones, ipv4_range="100.96.0.0/12")) as bed:
            await bed.ready()
            (message,) = split(bed.client.states(), bed.client.problem)
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


# -- several clusters


def test_leaves_are_found_below_their_own_proxy_and_zones(tmp_path):
    async def run():
        write_home(tmp_path)
        leaf = leaf_api(
            apps=[
                app_server(public_addr="pg.proxy.leaf.test"),
                app_server("x", public_addr="x.z.test"),
            ],
            zones=["z.test"],
            ipv4_range="100.90.0.0/16",
        )
        async with Bed(tmp_path, FakeApi(leaves={LEAF: leaf})) as bed:
            await bed.ready()
            target = await bed.client.resolve("pg.proxy.leaf.test")
            assert isinstance(target, AppTarget)
            assert (target.profile, target.root_cluster, target.leaf) == (PROXY, CLUSTER, LEAF)
            assert target.cluster == LEAF
            assert target.ipv4_range == IPv4Network("100.90.0.0/16")
            assert (await bed.client.resolve("x.z.test")).app.name == "x"
            await bed.client.plan(target, 1)
            (request,) = bed.api.requests
            assert request.RouteToCluster == request.RouteToApp.ClusterName == LEAF
            assert "is_mfa_required" in leaf.calls
            assert "is_mfa_required" not in bed.api.calls

    asyncio.run(run())


def test_a_leafs_web_app_is_found_by_name_below_the_roots_proxy(tmp_path):
    async def run():
        write_home(tmp_path)
        apps = [
            app_server("web", "http://127.0.0.1", public_addr="web.proxy.leaf.test"),
            app_server("pg", public_addr="pg.proxy.leaf.test"),
        ]
        api = FakeApi(apps=[], leaves={LEAF: leaf_api(apps=apps)})
        async with Bed(tmp_path, api) as bed:
            await bed.ready()
            assert await bed.client.resolve(f"web.{PROXY}") == WebApp(PROXY, "web")
            assert await bed.client.resolve("web.proxy.leaf.test") == WebApp(PROXY, "web")
            # A TCP app that has only the name is ignored: the name is any below the root's.
            assert isinstance(await bed.client.resolve(f"pg.{PROXY}"), ClusterTarget)

    asyncio.run(run())


def test_names_below_a_cluster_are_undecided(tmp_path):
    async def run():
        write_home(tmp_path)
        leaf = f"leaf.{CLUSTER}"
        api = FakeApi(leaves={leaf: leaf_api(ipv4_range="100.90.0.0/16")})
        async with Bed(tmp_path, api) as bed:
            await bed.ready()
            target = await bed.client.resolve(f"node1.{CLUSTER}")
            assert isinstance(target, ClusterTarget)
            assert (target.host, target.cluster, target.ipv4_range) == ("node1", CLUSTER, None)
            for name in (f"a.node1.{leaf}", f"a.node1.{leaf}.{CLUSTER}"):
                target = await bed.client.resolve(name)
                assert (target.host, target.leaf) == ("a.node1", leaf)
                assert target.ipv4_range == IPv4Network("100.90.0.0/16")

    asyncio.run(run())


def test_an_app_that_is_added_later_is_seen_by_who_decides(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path, FakeApi(apps=[])) as bed:
            assert isinstance(await bed.client.resolve(NAME), ClusterTarget)
            bed.api.apps = [app_server()]
            bed.clock.seconds += 1.5
            assert isinstance(await bed.client.resolve(NAME), ClusterTarget)
            assert isinstance(await bed.client.resolve(NAME, fresh=True), AppTarget)
            assert isinstance(await bed.client.resolve(NAME), AppTarget)

    asyncio.run(run())


def test_databases_have_names_below_db_of_their_proxy(tmp_path):
    async def run():
        write_home(tmp_path)
        leaf = leaf_api(databases=[database_server("stock", "mysql")])
        api = FakeApi(databases=[database_server("orders")], leaves={LEAF: leaf})
        async with Bed(tmp_path, api) as bed:
            await bed.ready()
            for label in ("orders", "ORDERS", database_id("orders")):
                target = await bed.client.resolve(f"{label}.db.{PROXY}")
                assert isinstance(target, DatabaseTarget)
                assert target.database == Database("orders", "postgres")
                assert target.cluster == CLUSTER
            for host in (PROXY, "proxy.leaf.test"):
                target = await bed.client.resolve(f"stock.db.{host}")
                assert (target.database.name, target.cluster) == ("stock", LEAF)
            assert await bed.client.resolve(f"none.db.{PROXY}") == NoSuchName()
            assert isinstance(await bed.client.resolve(f"alice.orders.db.{PROXY}"), ClusterTarget)
            await bed.client.plan(target, 3306)
            (request,) = bed.api.requests
            assert request.RouteToDatabase.ServiceName == "stock"
            assert request.RouteToCluster == LEAF

    asyncio.run(run())


def test_whose_database_cannot_be_asked_for_is_not_denied(tmp_path):
    async def run():
        write_home(tmp_path)
        leaf = leaf_api()
        async with Bed(tmp_path, FakeApi(leaves={LEAF: leaf})) as bed:
            await bed.ready()
            leaf.error = UnreachableError("down")
            with pytest.raises(UnreachableError):
                await bed.client.resolve(f"orders.db.{PROXY}")

    asyncio.run(run())


def test_two_profiles_do_not_disturb_each_other(tmp_path):
    async def run():
        write_home(tmp_path, proxy="a.test")
        write_home(tmp_path, proxy="b.test")
        apis = {
            host: FakeApi(apps=[app_server(public_addr="pg.both.test")], zones=["both.test"])
            for host in ("a.test", "b.test")
        }
        async with Bed(tmp_path, connect=lambda login, *_: apis[login.name]) as bed:
            await bed.ready()
            assert (await bed.client.resolve("pg.both.test")).profile == "a.test"
            (tmp_path / "a.test.yaml").unlink()
            await until(lambda: len(bed.client.states()) == 1)
            assert (await bed.client.resolve("pg.both.test")).profile == "b.test"
            assert bed.gone == [Owner("a.test", "alice", CLUSTER)]

    asyncio.run(run())


def test_a_hung_cluster_does_not_slow_the_names_of_another(tmp_path):
    async def run():
        write_home(tmp_path, proxy="a.test")
        write_home(tmp_path, proxy="b.test")
        hung = FakeApi(gate=asyncio.Event())
        good = FakeApi(apps=[app_server(public_addr="pg.b.test")], public_addr="b.test:443")
        apis = {"a.test": hung, "b.test": good}
        async with Bed(tmp_path, connect=lambda login, *_: apis[login.name]) as bed:
            await until(lambda: bed.client.states()[1].is_configured)
            loop = asyncio.get_running_loop()
            start = loop.time()
            assert (await bed.client.resolve("pg.b.test")).profile == "b.test"
            assert loop.time() - start < 2
            # Names of nobody wait for the first answer of all once, not each.
            bed.clock.seconds += 10
            start = loop.time()
            for i in range(20):
                with pytest.raises(ZonesUnknownError):
                    await bed.client.resolve(f"{i}.example.com")
            assert loop.time() - start < 2

    asyncio.run(run())


def test_leaves_come_and_go(tmp_path):
    async def run():
        write_home(tmp_path)
        leaf = leaf_api()
        async with Bed(tmp_path) as bed:
            await bed.ready()
            assert [c.name for c in bed.client.states()] == [CLUSTER]
            bed.api.leaves[LEAF] = leaf
            bed.clock.seconds += 301
            await until(lambda: len(bed.client.states()) == 2)
            await bed.ready()
            report = bed.cluster(LEAF)
            assert (report.leaf_of, report.profile, report.user) == (CLUSTER, PROXY, "alice")
            assert report.zones == [LEAF, "proxy.leaf.test"]
            assert isinstance(await bed.client.resolve(f"x.{LEAF}"), ClusterTarget)
            del bed.api.leaves[LEAF]
            bed.clock.seconds += 301
            await until(lambda: len(bed.client.states()) == 1)
            assert await bed.client.resolve(f"x.{LEAF}") == NotOurs()
            await until(lambda: leaf.is_closed)

    asyncio.run(run())


def test_an_offline_leaf_is_no_trouble_and_comes_back(tmp_path):
    async def run():
        write_home(tmp_path)
        leaf = leaf_api(apps=[app_server(public_addr="pg.proxy.leaf.test")])
        api = FakeApi(leaves={LEAF: leaf}, offline={LEAF})
        async with Bed(tmp_path, api) as bed:
            await until(lambda: len(bed.client.states()) == 2)
            report = bed.cluster(LEAF)
            assert (report.state, report.problem) == (ClusterState.UNREACHABLE, "")
            assert leaf.calls == []
            with pytest.raises(UnreachableError, match="offline"):
                await bed.client.resolve(f"x.{LEAF}")
            bed.api.offline.clear()
            bed.clock.seconds += 31
            await until(lambda: bed.cluster(LEAF).state is ClusterState.OK)
            await bed.ready()
            target = await bed.client.resolve("pg.proxy.leaf.test")
            assert target.leaf == LEAF

            leaf.error = UnreachableError("gone")
            bed.api.offline.add(LEAF)
            with pytest.raises(UnreachableError):
                await bed.client.resolve("new.proxy.leaf.test")
            for _ in range(3):
                assert bed.cluster(LEAF).problem == ""
                bed.clock.seconds += 3
                await asyncio.sleep(0.03)
            assert await bed.client.resolve("pg.proxy.leaf.test") == target
            with pytest.raises(UnreachableError):
                await bed.client.plan(target, 1)

    asyncio.run(run())


def test_an_unreachable_leaf_that_is_connected_is_trouble(tmp_path):
    async def run():
        write_home(tmp_path)
        leaf = leaf_api(error=UnreachableError("the leaf does not answer"))
        async with Bed(tmp_path, FakeApi(leaves={LEAF: leaf})) as bed:
            await until(lambda: len(bed.client.states()) == 2)
            await until(lambda: bed.cluster(LEAF).state is ClusterState.UNREACHABLE)
            bed.clock.seconds += 6  # the root is asked whether it is offline
            await until(lambda: bed.cluster(LEAF).problem == "the leaf does not answer")
            assert bed.cluster(CLUSTER).state is ClusterState.OK
            # Its web apps may be below the root's proxy, but nobody waits for them.
            with pytest.raises(ZonesUnknownError):
                await bed.client.resolve("x.example.com")

    asyncio.run(run())


def test_a_leaf_with_a_new_authority_is_trusted_when_the_root_says_so(tmp_path):
    async def run():
        keys = write_home(tmp_path)
        old, new = make_authority(LEAF)[1], make_authority(LEAF)[1]
        (keys / "cas" / f"{LEAF}.pem").write_bytes(pem(old))
        leaf = leaf_api()
        api = FakeApi(leaves={LEAF: leaf}, authorities={LEAF: (der(new),)})
        untrusted = leaf_api(error=UnreachableError("not trusted"))

        def connect(_login, cluster, authorities):
            if not cluster:
                return api
            return leaf if authorities == (der(new),) else untrusted

        async with Bed(tmp_path, api, connect=connect) as bed:
            await until(lambda: untrusted.calls)
            async with asyncio.timeout(10):
                while not bed.cluster(LEAF).is_configured:
                    bed.clock.seconds += 6
                    await asyncio.sleep(0.05)
            assert bed.cluster(LEAF).state is ClusterState.OK

    asyncio.run(run())


def test_a_root_that_names_no_leaves_works_alone(tmp_path):
    async def run():
        write_home(tmp_path)
        api = FakeApi(leaves_error=AccessDeniedError("access denied"))
        async with Bed(tmp_path, api) as bed:
            await bed.ready()
            assert bed.state is ClusterState.OK
            assert isinstance(await bed.client.resolve(NAME), AppTarget)
            assert await bed.client.resolve("www.example.com") == NotOurs()

    asyncio.run(run())


def test_names_of_leaves_that_are_not_known_yet_are_waited_for(tmp_path):
    async def run():
        write_home(tmp_path)
        leaf = leaf_api(apps=[app_server(public_addr="pg.proxy.leaf.test")])
        gate = asyncio.Event()
        api = FakeApi(leaves={LEAF: leaf}, gates={"remote_clusters": gate})
        async with Bed(tmp_path, api) as bed:
            asking = asyncio.create_task(bed.client.resolve("pg.proxy.leaf.test"))
            await until(lambda: "remote_clusters" in api.calls)
            assert isinstance(await bed.client.resolve(NAME), AppTarget)
            assert not asking.done()
            gate.set()
            assert (await asking).leaf == LEAF

    asyncio.run(run())


@pytest.mark.parametrize(("user", "found"), [("", NotOurs), ("bob", AppTarget)])
def test_a_name_that_is_asked_for_while_the_login_ends_is_answered_by_what_follows(
    tmp_path, user, found
):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path) as bed:
            await bed.ready()
            bed.api.gates["app_servers"] = asyncio.Event()
            question = asyncio.create_task(bed.client.resolve(NAME))
            await until(lambda: "app_servers" in bed.api.calls)
            del bed.api.gates["app_servers"]
            if user:
                subject = [(kind, user if v == "alice" else v) for kind, v in USER_SUBJECT]
                write_home(tmp_path, user_certificate(subject=subject), user=user)
            else:
                (tmp_path / f"{PROXY}.yaml").unlink()
            async with asyncio.timeout(20):
                assert isinstance(await question, found)
            assert bed.gone == [ALICE]

    asyncio.run(run())


def test_a_name_that_is_asked_for_between_two_logins_is_answered_by_what_follows(
    tmp_path, monkeypatch
):
    async def run():
        write_home(tmp_path)
        api = FakeApi(gates={"generate_user_certs": asyncio.Event()})
        async with Bed(tmp_path, api) as bed:
            await bed.ready()
            target = await bed.client.resolve(NAME)
            # What is under way is ended first, which takes some steps.
            dial = asyncio.ensure_future(bed.client.plan(target, 5432))
            await until(lambda: "generate_user_certs" in api.calls)
            questions = []
            turns = EachTurn(
                monkeypatch,
                lambda: questions.append(asyncio.create_task(bed.client.resolve(NAME))),
            )
            subject = [(kind, "bob" if v == "alice" else v) for kind, v in USER_SUBJECT]
            write_home(tmp_path, user_certificate(subject=subject), user="bob")
            await until(lambda: bed.gone)
            async with asyncio.timeout(20):
                await turns.end()
                assert len(questions) > 1
                for answer in await asyncio.gather(*questions):
                    assert isinstance(answer, AppTarget)
            await ended(dial)

    asyncio.run(run())


def test_a_login_as_another_user_ends_the_earlier_one(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path) as bed:
            await bed.ready()
            target = await bed.client.resolve(NAME)
            await bed.client.plan(target, 1)
            bob = [(kind, "bob" if value == "alice" else value) for kind, value in USER_SUBJECT]
            write_home(tmp_path, user_certificate(subject=bob), user="bob")
            await until(lambda: bed.gone)
            assert bed.gone == [ALICE]
            assert bed.client.owner(PROXY) == Owner(PROXY, "bob", CLUSTER)
            await bed.client.plan(target, 1)
            assert [r.Username for r in bed.api.requests] == ["alice", "bob"]

    asyncio.run(run())


def test_a_login_to_another_cluster_ends_the_earlier_one(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path) as bed:
            target = await bed.client.resolve(NAME)
            other = make_authority("other.test")
            keys = write_home(tmp_path, user_certificate(authority=other), cluster="other.test")
            assert keys.exists()
            await until(lambda: bed.gone)
            assert bed.gone == [ALICE]
            assert bed.client.owner(PROXY).root_cluster == "other.test"
            with pytest.raises(UnknownAppError):
                await bed.client.plan(target, 1)

    asyncio.run(run())


def test_neither_expiry_nor_renewal_ends_a_login(tmp_path):
    async def run():
        write_home(tmp_path, user_certificate(NOW + timedelta(minutes=1)))
        async with Bed(tmp_path) as bed:
            await bed.ready()
            bed.clock.seconds += 120
            await until(lambda: bed.state is ClusterState.LOGIN_EXPIRED)
            write_home(tmp_path, user_certificate(NOW + timedelta(hours=1)))
            await until(lambda: bed.state is ClusterState.OK)
            assert bed.gone == []
            assert bed.client.owner(PROXY) == ALICE

    asyncio.run(run())


def test_leaves_of_an_expired_login_say_nothing_of_their_own(tmp_path):
    async def run():
        write_home(tmp_path, user_certificate(NOW + timedelta(minutes=1)))
        async with Bed(tmp_path, FakeApi(leaves={LEAF: leaf_api()})) as bed:
            await until(lambda: len(bed.client.states()) == 2)
            bed.clock.seconds += 120
            await until(lambda: bed.cluster(LEAF).state is ClusterState.LOGIN_EXPIRED)
            assert "tsh login" in bed.cluster(CLUSTER).problem
            assert bed.cluster(LEAF).problem == ""

    asyncio.run(run())


def test_a_hardware_key_is_reported_and_others_go_on(tmp_path):
    async def run():
        keys = write_home(tmp_path, proxy="a.test")
        (keys / "alice.key").write_bytes(
            b"-----BEGIN PIV YUBIKEY PRIVATE KEY-----\nAAAA\n-----END PIV YUBIKEY PRIVATE KEY-----\n"
        )
        write_home(tmp_path)
        async with Bed(tmp_path) as bed:
            await until(lambda: bed.client.states()[1].is_configured)
            assert bed.state is ClusterState.HARDWARE_KEY
            assert "hardware" in bed.client.states()[0].problem
            assert isinstance(await bed.client.resolve(NAME), AppTarget)

    asyncio.run(run())


def test_a_kept_certificate_says_nothing_of_the_cluster(tmp_path):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path) as bed:
            await bed.ready()
            target = await bed.client.resolve(NAME)
            await bed.client.plan(target, 1)
            bed.api.error = UnreachableError("down")
            with pytest.raises(UnreachableError):
                await bed.client.resolve(f"other.{PROXY}")
            assert bed.state is ClusterState.UNREACHABLE
            await bed.client.plan(target, 1)
            assert bed.state is ClusterState.UNREACHABLE

    asyncio.run(run())


@pytest.mark.parametrize("is_for_all", [False, True])
def test_a_key_policy_is_the_clusters_state_only_if_nothing_can_be_asked(tmp_path, is_for_all):
    async def run():
        write_home(tmp_path)
        async with Bed(tmp_path) as bed:
            await bed.ready()
            target = await bed.client.resolve(NAME)
            bed.api.error = KeyPolicyError("private key policy not met")
            if not is_for_all:
                bed.api.calls.clear()
                bed.api.gates["ping"] = asyncio.Event()
            with pytest.raises(KeyPolicyError):
                await bed.client.plan(target, 1)
            if is_for_all:
                await until(lambda: bed.state is ClusterState.HARDWARE_KEY)
                return
            await until(lambda: "ping" in bed.api.calls)
            bed.api.error = None
            bed.api.gates["ping"].set()
            await until(lambda: "vnet_config" in bed.api.calls)
            assert bed.state is ClusterState.OK

    asyncio.run(run())


# -- the way to the proxy


def test_behind_a_load_balancer_the_certificate_is_shown_inside(tmp_path):
    async def run():
        write_home(tmp_path)
        path = tmp_path / f"{PROXY}.yaml"
        path.write_text(path.read_text() + "tls_routing_conn_upgrade_required: true\n")
        async with Bed(tmp_path, environment={"HTTPS_PROXY": "http://proxy.corp:3128"}) as bed:
            target = await bed.client.resolve(NAME)
            plan = await bed.client.plan(target, 1)
            assert plan.upgrade.server_hostname == plan.tls.server_hostname == PROXY
            assert plan.upgrade.context is not plan.tls.context
            assert plan.http_proxy == "http://proxy.corp:3128"
            again = await bed.client.plan(target, 1)
            assert again.upgrade.context is plan.upgrade.context

    asyncio.run(run())


def test_hosts_on_the_way_to_the_proxy_are_not_ours(tmp_path):
    async def run():
        write_home(tmp_path)
        path = tmp_path / f"{PROXY}.yaml"
        path.write_text(
            path.read_text()
            .replace("tls_routing_enabled: true", "tls_routing_enabled: false")
            .replace(f"ssh_proxy_addr: {PROXY}:443", f"ssh_proxy_addr: ssh.{CLUSTER}:3023")
        )
        environment = {"HTTPS_PROXY": f"http://alice:secret@forward.{CLUSTER}:3128"}
        async with Bed(tmp_path, environment=environment) as bed:
            await bed.ready()
            assert isinstance(await bed.client.resolve(f"other.{CLUSTER}"), ClusterTarget)
            for host in ("ssh", "forward"):
                assert await bed.client.resolve(f"{host}.{CLUSTER}") == NotOurs()

    asyncio.run(run())


def test_the_web_port_is_relayed_as_it_is(tmp_path):
    async def run():
        write_home(tmp_path)
        path = tmp_path / f"{PROXY}.yaml"
        path.write_text(path.read_text().replace(f"{PROXY}:443", f"{PROXY}:3080"))
        async with Bed(tmp_path) as bed:
            assert bed.client.web_port(PROXY) == 3080
            assert bed.client.web_plan(PROXY) == DialPlan(PROXY, 3080, None)
            assert bed.client.web_port("none.test") is None
            with pytest.raises(UnknownAppError):
                bed.client.web_plan("none.test")

    asyncio.run(run())


def test_a_second_factor_is_asked_for_and_ends_with_the_login(tmp_path):
    async def run():
        write_home(tmp_path)
        prompter = FakePrompter(gate=asyncio.Event())
        async with Bed(tmp_path, MfaApi(), prompter=prompter) as bed:
            target = await bed.client.resolve(NAME)
            planning = asyncio.create_task(bed.client.plan(target, 1))
            await until(lambda: prompter.questions)
            assert prompter.questions[0].user == "alice"
            (tmp_path / f"{PROXY}.yaml").unlink()
            with pytest.raises((UnreachableError, MfaUnansweredError)):
                await planning

    asyncio.run(run())


def test_where_the_proxy_is_is_reported(tmp_path):
    async def run():
        addresses = [[b"\x0a\0\0\2", b"\x0a\0\0\1"], OSError("no answer"), [b"\x0a\0\0\3"]]
        asked = []

        async def look_up(host):
            asked.append(host)
            found = addresses[min(len(asked), 3) - 1]
            if isinstance(found, OSError):
                raise found
            return found

        write_home(tmp_path)
        api = FakeApi(leaves={LEAF: leaf_api()})
        async with Bed(tmp_path, api, look_up=look_up) as bed:
            await until(lambda: bed.cluster(CLUSTER).proxy_addresses)
            await bed.ready()
            assert bed.cluster(CLUSTER).proxy_addresses == [b"\x0a\0\0\1", b"\x0a\0\0\2"]
            assert bed.cluster(LEAF).proxy_addresses == []
            bed.clock.seconds += 301
            await until(lambda: len(asked) == 2)
            assert len(bed.cluster(CLUSTER).proxy_addresses) == 2
            bed.clock.seconds += 31
            await until(lambda: bed.cluster(CLUSTER).proxy_addresses == [b"\x0a\0\0\3"])
            assert set(asked) == {PROXY}

    asyncio.run(run())


def test_many_leaves_are_asked_a_few_at_a_time(tmp_path):
    async def run():
        write_home(tmp_path)
        gate = asyncio.Event()
        leaves = {f"l{i}.test": leaf_api(public_addr=f"l{i}.test", gate=gate) for i in range(50)}
        async with Bed(tmp_path, FakeApi(leaves=leaves)) as bed:
            await until(lambda: len(bed.client.states()) == 51)
            await until(lambda: sum(bool(leaf.calls) for leaf in leaves.values()) >= 8)
            assert sum(bool(leaf.calls) for leaf in leaves.values()) < 50
            gate.set()
            await bed.ready()
            assert (await bed.client.resolve("x.l7.test")).leaf == "l7.test"

    asyncio.run(run())


def test_a_setting_that_cannot_be_used_is_reported_with_the_cluster_that_has_it(tmp_path):
    async def run():
        write_home(tmp_path)
        api = FakeApi(zones=["single"], leaves={LEAF: leaf_api(ipv4_range="10.0.0.0/28")})
        async with Bed(tmp_path, api) as bed:
            for cluster, what in ((CLUSTER, "'single'"), (LEAF, "'10.0.0.0/28'")):
                await until(lambda name=cluster: _reported_problem(bed, name))
                report = bed.cluster(cluster)
                assert report.state is ClusterState.OK
                for part in (cluster, what, "correct vnet_config"):
                    assert part in report.problem

    asyncio.run(run())


def _reported_problem(bed, name):
    return next((c.problem for c in bed.client.states() if c.name == name), "")

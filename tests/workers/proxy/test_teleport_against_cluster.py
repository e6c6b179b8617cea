"""The client against the embedded cluster: real TLS, real gRPC, on loopback, on both event loops."""

import asyncio
import contextlib
import statistics
import time
from pathlib import Path

import pytest
import uvloop
from teleport_fakes import AUTHORITY, pem, until

from demo.cluster.config import (
    App,
    Cluster,
    ClusterFile,
    Database,
    PortRange,
    check_clusters,
    default_clusters,
)
from demo.cluster.server import EmbeddedCluster
from ipc.messages import ClusterState
from workers.proxy.teleport import auth_client
from workers.proxy.teleport.client import Teleport, default_settings
from workers.proxy.teleport.databases import database_id
from workers.proxy.teleport.errors import (
    LoginExpiredError,
    MfaRequiredError,
    PortNotAllowedError,
    RefusedError,
    TeleportError,
    UnreachableError,
)
from workers.proxy.teleport.home import read_home
from workers.proxy.teleport.targets import (
    AppTarget,
    ClusterTarget,
    DatabaseTarget,
    NoSuchName,
    NotOurs,
    Owner,
    WebApp,
)

NAME = "root.demo.test"
LEAF = "leaf.demo.test"
LONG_NAME = "a-cluster-name-far-longer-than-thirty-one-bytes.demo.test"
LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


def cluster_file(name=NAME, *, with_leaf=False, **changes):
    cluster = Cluster(
        name=name,
        proxy_addr="localhost:0",
        custom_dns_zones=("corp.test",),
        ipv4_cidr_range="100.80.0.0/16",
        apps=(
            App(name="echo", uri="tcp://echo.backend.internal:7", public_addr="echo.corp.test"),
            App(
                name="ports",
                uri="tcp://ports.backend.internal",
                tcp_ports=(PortRange(port=8000, end_port=8010),),
                public_addr="ports.corp.test",
            ),
            App(
                name="guarded",
                uri="tcp://echo.backend.internal:7",
                public_addr="guarded.corp.test",
                session_mfa=True,
            ),
            App(name="web", uri="http://127.0.0.1:1", public_addr="web.corp.test"),
            App(name="mixed", uri="tcp://echo.backend.internal:7", public_addr="Mixed.Corp.test"),
        ),
        databases=(
            Database(name="orders", protocol="postgres", uri="localhost:5432"),
            Database(name="events", protocol="mongodb", uri="localhost:27017"),
        ),
        **changes,
    )
    leaf = Cluster(
        name=LEAF,
        leaf_of=name,
        custom_dns_zones=("leaf.corp.test",),
        ipv4_cidr_range="100.81.0.0/16",
        apps=(
            App(
                name="echo", uri="tcp://echo.backend.internal:7", public_addr="echo.leaf.corp.test"
            ),
            App(name="board", uri="http://127.0.0.1:1"),
        ),
        databases=(Database(name="Stock", protocol="mysql", uri="localhost:3306"),),
    )
    return check_clusters(ClusterFile(clusters=(cluster, leaf) if with_leaf else (cluster,)))


class Bed:
    def __init__(self, cluster, client, home):
        self.cluster = cluster
        self.client = client
        self.home = home
        self.keys = home / "keys" / "localhost"

    def faults(self, *lines):
        (self.home / "faults").write_text("\n".join(lines))

    @property
    def state(self):
        return self.client.states()[0].state

    def report(self, name):
        return next(c for c in self.client.states() if c.name == name)

    async def channel(self):
        """The kept connection to the root's auth service."""
        api = await self.client._sessions["localhost"]._root.cluster.api()
        return api._channel

    async def wait_for_config(self):
        await until(lambda: all(c.is_configured for c in self.client.states()))


@contextlib.asynccontextmanager
async def started(home: Path, file=None, before=lambda keys: None, poll_seconds=0.02):
    async with EmbeddedCluster(file or cluster_file(), home) as cluster:
        before(home / "keys" / "localhost")
        client = Teleport(
            home, default_settings(ca_file=str(cluster.web_ca_file)), poll_seconds=poll_seconds
        )
        await client.start()
        try:
            yield Bed(cluster, client, home)
        finally:
            await client.close()


async def dial(plan):
    assert plan.upgrade is None
    return await asyncio.open_connection(
        plan.host, plan.port, ssl=plan.tls.context, server_hostname=plan.tls.server_hostname
    )


async def echo(plan):
    """Sends a few bytes through the proxy and back."""
    reader, writer = await dial(plan)
    protocol = writer.get_extra_info("ssl_object").selected_alpn_protocol()
    assert protocol == "teleport-tcp-ping"
    writer.write(b"\0\0\0\5hello")
    assert await asyncio.wait_for(reader.readexactly(9), 5) == b"\0\0\0\5hello"
    writer.close()


@LOOPS
def test_an_app_is_found_certified_and_reached(tmp_path, run):
    async def scenario():
        async with started(tmp_path) as bed:
            target = await bed.client.resolve("echo.corp.test")
            assert isinstance(target, AppTarget)
            assert str(target.ipv4_range) == "100.80.0.0/16"
            await echo(await bed.client.plan(target, 7))
            (report,) = bed.client.states()
            assert (report.name, report.profile, report.user) == (NAME, "localhost", "alice")
            assert report.state is ClusterState.OK
            assert report.zones == [NAME, "corp.test"]
            await until(lambda: bed.report(NAME).proxy_addresses)
            assert b"\x7f\0\0\1" in bed.report(NAME).proxy_addresses

    run(scenario())


def test_other_names_are_not_ours(tmp_path):
    async def scenario():
        async with started(tmp_path) as bed:
            for name in ("none.corp.test", "localhost", "example.com"):
                assert await bed.client.resolve(name) == NotOurs()
            assert await bed.client.resolve("web.corp.test") == WebApp("localhost", "web")
            hostile = 'x" || resource.spec.public_addr != "y.corp.test'
            assert await bed.client.resolve(hostile) == NotOurs()

    asyncio.run(scenario())


def test_an_app_with_capitals_in_its_address_is_found_as_typed(tmp_path):
    async def main():
        async with started(tmp_path) as bed:
            assert await bed.client.resolve("mixed.corp.test") == NotOurs()
            target = await bed.client.resolve("mixed.corp.test", "Mixed.Corp.test")
            assert isinstance(target, AppTarget)
            assert target.app.name == "mixed"

    asyncio.run(main())


@LOOPS
def test_a_cluster_name_too_long_for_a_dns_label_works(tmp_path, run):
    async def scenario():
        async with started(tmp_path, cluster_file(LONG_NAME)) as bed:
            target = await bed.client.resolve("echo.corp.test")
            assert target.cluster == LONG_NAME

    run(scenario())


def test_the_certificate_carries_the_target_port(tmp_path):
    async def scenario():
        async with started(tmp_path) as bed:
            target = await bed.client.resolve("ports.corp.test")
            with pytest.raises(PortNotAllowedError, match="8000-8010"):
                await bed.client.plan(target, 9)
            reader, writer = await dial(await bed.client.plan(target, 8005))
            frame = await asyncio.wait_for(reader.readexactly(8), 5)
            assert frame[4:] == b"8005"
            writer.close()

    asyncio.run(scenario())


def test_an_app_with_session_mfa_is_refused_clearly(tmp_path):
    async def scenario():
        async with started(tmp_path) as bed:
            target = await bed.client.resolve("guarded.corp.test")
            with pytest.raises(MfaRequiredError):
                await bed.client.plan(target, 7)
            assert bed.state is ClusterState.OK

    asyncio.run(scenario())


def test_a_refused_certificate_is_a_refusal_and_passes(tmp_path):
    async def scenario():
        async with started(tmp_path) as bed:
            target = await bed.client.resolve("echo.corp.test")
            bed.faults("refuse_certs")
            await until(lambda: bed.cluster.states[NAME].faults.refuse_certs)
            with pytest.raises(RefusedError, match="access denied"):
                await bed.client.plan(target, 7)
            bed.faults()
            await until(lambda: not bed.cluster.states[NAME].faults.refuse_certs)
            await bed.client.plan(target, 7)

    asyncio.run(scenario())


@LOOPS
@pytest.mark.parametrize("fault", ["auth_down", "proxy_down"])
def test_a_cluster_that_goes_down_is_reported_and_found_again(tmp_path, run, fault):
    async def scenario():
        async with started(tmp_path) as bed:
            await bed.wait_for_config()
            known = await bed.client.resolve("echo.corp.test")
            bed.faults(fault)
            await until(lambda: getattr(bed.cluster.states[NAME].faults, fault))
            with pytest.raises(UnreachableError):
                await bed.client.resolve("new.corp.test")
            assert bed.state is ClusterState.UNREACHABLE
            assert await bed.client.resolve("echo.corp.test") == known
            with pytest.raises(UnreachableError):
                await bed.client.plan(known, 7)
            bed.faults()

            async def answers():
                with contextlib.suppress(TeleportError):
                    return await bed.client.resolve("new.corp.test") == NotOurs()

            async with asyncio.timeout(5):
                while not await answers():
                    await asyncio.sleep(0.02)
            assert bed.state is ClusterState.OK

    run(scenario())


def test_a_proxy_that_nobody_reaches_is_reported_though_each_certificate_is_there(tmp_path):
    async def scenario():
        async with started(tmp_path) as bed:
            await bed.wait_for_config()
            target = await bed.client.resolve("echo.corp.test")
            await echo(await bed.client.plan(target, 7))
            bed.faults("proxy_down")
            await until(lambda: bed.cluster.states[NAME].faults.proxy_down)
            with pytest.raises(OSError):
                await dial(await bed.client.plan(target, 7))
            bed.client.doubt(target.profile)
            await until(lambda: bed.state is ClusterState.UNREACHABLE)

    asyncio.run(scenario())


@LOOPS
def test_a_connection_lost_unnoticed_costs_no_question(tmp_path, run):
    async def scenario():
        async with started(tmp_path) as bed:
            await bed.wait_for_config()
            channel = (await bed.channel()).grpc
            channel._protocol.connection._transport.abort()
            names = [f"n{i}.corp.test" for i in range(20)]
            answers = await asyncio.gather(*(bed.client.resolve(name) for name in names))
            assert answers == [NotOurs()] * 20
            assert bed.state is ClusterState.OK

    run(scenario())


def test_an_expired_login_is_noticed_and_a_renewed_one_too(tmp_path):
    async def scenario():
        async with started(tmp_path) as bed:
            target = await bed.client.resolve("echo.corp.test")
            bed.faults("expire_login")
            await until(lambda: bed.state is ClusterState.LOGIN_EXPIRED)
            with pytest.raises(LoginExpiredError):
                await bed.client.plan(target, 7)
            assert await bed.client.resolve("echo.corp.test") == target
            bed.faults()
            await until(lambda: bed.state is ClusterState.OK)
            await bed.client.plan(target, 7)

    asyncio.run(scenario())


def test_a_server_of_another_authority_is_not_trusted(tmp_path):
    def replace(keys):
        (keys / "cas" / f"{NAME}.pem").write_bytes(pem(AUTHORITY))

    async def scenario():
        async with started(tmp_path, before=replace) as bed:
            await until(lambda: bed.state is ClusterState.UNREACHABLE)
            (report,) = bed.client.states()
            assert "not trusted" in report.problem

    asyncio.run(scenario())


def test_a_leaf_is_asked_with_the_login_of_its_root(tmp_path):
    async def scenario():
        async with EmbeddedCluster(default_clusters("localhost:0"), tmp_path):
            (login,) = read_home(tmp_path).logins
            root, leaf = auth_client.connect(login), auth_client.connect(login, "leaf.demo.test")
            try:
                names = [c.Metadata.Name for c in await root.remote_clusters()]
                assert names == ["leaf.demo.test"]
                assert (await leaf.ping()).ClusterName == "leaf.demo.test"
                authority = await root.host_authority("leaf.demo.test")
                assert authority == login.authorities["leaf.demo.test"]
            finally:
                root.close()
                leaf.close()

    asyncio.run(scenario())


def test_a_closed_client_stays_closed(tmp_path):
    async def scenario():
        async with EmbeddedCluster(cluster_file(), tmp_path):
            (login,) = read_home(tmp_path).logins
            client = auth_client.connect(login)
            connecting = asyncio.create_task(client.ping())
            await asyncio.sleep(0)
            client.close()
            for attempt in (connecting, client.ping()):
                with pytest.raises(UnreachableError):
                    await attempt

    asyncio.run(scenario())


def test_a_question_has_a_deadline(tmp_path):
    async def scenario():
        async with started(tmp_path) as bed:
            await bed.wait_for_config()
            (await bed.channel())._timeout_seconds = 0.2
            bed.faults("slow_list 30")
            await until(lambda: bed.cluster.states[NAME].faults.slow_list_seconds)
            with pytest.raises(UnreachableError, match="in time"):
                await bed.client.resolve("echo.corp.test")

    asyncio.run(scenario())


def test_questions_share_one_kept_connection(tmp_path):
    """Prints what an uncached question and a certificate cost, server in the same process."""

    async def scenario():
        async with started(tmp_path) as bed:
            await bed.wait_for_config()
            channel = (await bed.channel()).grpc
            protocol = channel._protocol
            seconds = [await _timed(bed.client.resolve(f"n{i}.corp.test")) for i in range(50)]
            target = await bed.client.resolve("ports.corp.test")
            issue = [await _timed(bed.client.plan(target, port)) for port in range(8000, 8010)]
            cached = await _timed(bed.client.plan(target, 8000))
            assert channel._protocol is protocol
            print(
                f"\nresolve p50 {1e3 * statistics.median(seconds):.2f} ms, "
                f"certificate p50 {1e3 * statistics.median(issue):.1f} ms, "
                f"cached {1e6 * cached:.0f} us"
            )

    uvloop.run(scenario())


async def _timed(work):
    start = time.perf_counter()
    await work
    return time.perf_counter() - start


@LOOPS
def test_apps_of_a_leaf_are_found_certified_and_reached(tmp_path, run):
    async def scenario():
        async with started(tmp_path, cluster_file(with_leaf=True)) as bed:
            target = await bed.client.resolve("echo.leaf.corp.test")
            assert isinstance(target, AppTarget)
            assert (target.profile, target.root_cluster, target.leaf) == ("localhost", NAME, LEAF)
            await bed.wait_for_config()
            target = await bed.client.resolve("echo.leaf.corp.test")
            assert str(target.ipv4_range) == "100.81.0.0/16"
            await echo(await bed.client.plan(target, 7))
            report = bed.report(LEAF)
            assert (report.leaf_of, report.state) == (NAME, ClusterState.OK)
            assert report.zones == [LEAF, "leaf.corp.test"]
            assert report.ranges == ["100.81.0.0/16"]

    run(scenario())


def test_names_stand_for_what_they_should(tmp_path):
    async def scenario():
        async with started(tmp_path, cluster_file(with_leaf=True)) as bed:
            await bed.wait_for_config()

            async def resolve(name):
                return await bed.client.resolve(name)

            assert await resolve(f"board.{LEAF}") == WebApp("localhost", "board")
            assert await resolve("board.localhost") == WebApp("localhost", "board")
            for name, cluster, host in [
                (f"node1.{NAME}", NAME, "node1"),
                (f"node1.{LEAF}", LEAF, "node1"),
                (f"a.node1.{LEAF}.{NAME}", LEAF, "a.node1"),
            ]:
                target = await resolve(name)
                assert isinstance(target, ClusterTarget)
                assert (target.cluster, target.host) == (cluster, host)
            assert await resolve(LEAF) == NotOurs()  # also the leaf's proxy

            for name, database in [
                ("orders.db.localhost", "orders"),
                (f"{database_id('orders')}.db.localhost", "orders"),
                ("Stock.db.localhost", "Stock"),
                (f"{database_id('Stock')}.db.localhost", "Stock"),
                (f"{database_id('Stock')}.db.{LEAF}", "Stock"),
            ]:
                target = await bed.client.resolve(name.lower(), name)
                assert isinstance(target, DatabaseTarget), name
                assert target.database.name == database
            for name in ("none.db.localhost", "events.db.localhost", f"orders.db.{LEAF}"):
                assert await resolve(name) == NoSuchName()

    asyncio.run(scenario())


def test_a_leaf_goes_offline_and_comes_back(tmp_path):
    async def scenario():
        async with started(tmp_path, cluster_file(with_leaf=True)) as bed:
            await bed.wait_for_config()
            known = await bed.client.resolve("echo.leaf.corp.test")
            bed.faults(f"leaf_offline {LEAF}")
            await until(lambda: bed.cluster.states[NAME].faults.leaf_offline)
            with pytest.raises(UnreachableError):
                await bed.client.resolve("new.leaf.corp.test")
            await until(lambda: bed.report(LEAF).state is ClusterState.UNREACHABLE)
            assert bed.report(LEAF).problem == ""
            assert bed.state is ClusterState.OK
            assert await bed.client.resolve("echo.leaf.corp.test") == known
            assert isinstance(await bed.client.resolve("echo.corp.test"), AppTarget)
            bed.faults()

            async def answers():
                with contextlib.suppress(TeleportError):
                    return await bed.client.resolve("new.leaf.corp.test") == NotOurs()

            async with asyncio.timeout(20):
                while not await answers():
                    await asyncio.sleep(0.05)
            await until(lambda: bed.report(LEAF).state is ClusterState.OK)

    asyncio.run(scenario())


def test_two_profiles_and_their_names(tmp_path):
    """Two roots in one home; only the loopback names of the machine tell their proxies apart."""
    file = cluster_file()
    other = Cluster(
        name="other.demo.test",
        proxy_addr="127.0.0.1:0",
        custom_dns_zones=("other.test",),
        apps=(
            App(name="echo", uri="tcp://echo.backend.internal:7", public_addr="echo.other.test"),
        ),
    )
    both = check_clusters(ClusterFile(clusters=(*file.clusters, other)))

    async def scenario():
        async with started(tmp_path, both) as bed:
            await bed.wait_for_config()
            assert [c.profile for c in bed.client.states()] == ["127.0.0.1", "localhost"]
            first = await bed.client.resolve("echo.corp.test")
            second = await bed.client.resolve("echo.other.test")
            assert (first.profile, second.profile) == ("localhost", "127.0.0.1")
            assert (first.cluster, second.cluster) == (NAME, "other.demo.test")

    asyncio.run(scenario())


def test_a_logout_is_noticed_at_once(tmp_path):
    async def scenario():
        async with started(tmp_path, poll_seconds=1000) as bed:
            gone = []
            bed.client.on_owner_gone = gone.append
            target = await bed.client.resolve("echo.corp.test")
            assert bed.client.owner("localhost") == Owner("localhost", "alice", NAME)
            start = time.monotonic()
            (bed.keys / "alice.key").unlink()
            (bed.keys / "alice.crt").unlink()
            await until(lambda: gone)
            assert time.monotonic() - start < 3
            assert gone == [Owner("localhost", "alice", NAME)]
            with pytest.raises(TeleportError):
                await bed.client.plan(target, 7)

    uvloop.run(scenario())

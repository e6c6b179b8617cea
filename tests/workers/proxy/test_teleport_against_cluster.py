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
    PortRange,
    check_clusters,
    default_clusters,
)
from demo.cluster.server import EmbeddedCluster
from ipc.messages import ClusterState, Refusal
from workers.proxy.teleport import auth_client
from workers.proxy.teleport.client import NotOurs, Teleport, default_settings
from workers.proxy.teleport.credentials import parse_authorities
from workers.proxy.teleport.errors import (
    LoginExpiredError,
    MfaRequiredError,
    RefusedError,
    TeleportError,
    UnreachableError,
)
from workers.proxy.teleport.home import read_home
from workers.proxy.teleport.session import AppTarget

NAME = "root.demo.test"
LONG_NAME = "a-cluster-name-far-longer-than-thirty-one-bytes.demo.test"
LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


def cluster_file(name=NAME, **changes):
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
        **changes,
    )
    return check_clusters(ClusterFile(clusters=(cluster,)))


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
        (report,) = self.client.states()
        return report.state

    async def wait_for_config(self):
        await until(lambda: self.client.states()[0].ranges)


@contextlib.asynccontextmanager
async def started(home: Path, file=None, before=lambda keys: None):
    async with EmbeddedCluster(file or cluster_file(), home) as cluster:
        before(home / "keys" / "localhost")
        client = Teleport(
            home, default_settings(ca_file=str(cluster.web_ca_file)), poll_seconds=0.02
        )
        await client.start()
        try:
            yield Bed(cluster, client, home)
        finally:
            await client.close()


async def dial(parameters, tls_context=None):
    return await asyncio.open_connection(
        parameters.host,
        parameters.port,
        ssl=tls_context or parameters.ssl_context,
        server_hostname=parameters.server_hostname,
    )


@LOOPS
def test_an_app_is_found_certified_and_reached(tmp_path, run):
    async def scenario():
        async with started(tmp_path) as bed:
            target = await bed.client.resolve("echo.corp.test")
            assert isinstance(target, AppTarget)
            assert str(target.ipv4_range) == "100.80.0.0/16"
            parameters = await bed.client.dial_parameters(target, 7)
            reader, writer = await dial(parameters)
            protocol = writer.get_extra_info("ssl_object").selected_alpn_protocol()
            assert protocol == "teleport-tcp-ping"
            writer.write(b"\0\0\0\5hello")
            assert await asyncio.wait_for(reader.readexactly(9), 5) == b"\0\0\0\5hello"
            writer.close()
            (report,) = bed.client.states()
            assert (report.name, report.profile, report.user) == (NAME, "localhost", "alice")
            assert report.state is ClusterState.OK
            assert report.zones == ["corp.test"]

    run(scenario())


def test_other_names_are_not_ours(tmp_path):
    async def scenario():
        async with started(tmp_path) as bed:
            for name in ("web.corp.test", "none.corp.test", "localhost", "example.com"):
                assert await bed.client.resolve(name) == NotOurs()
            hostile = 'x" || resource.spec.public_addr != "y.corp.test'
            assert await bed.client.resolve(hostile) == NotOurs()

    asyncio.run(scenario())


def test_an_app_with_capitals_in_its_address_is_found_as_typed(tmp_path):
    async def main():
        async with started(tmp_path) as bed:
            assert isinstance(await bed.client.resolve("mixed.corp.test"), NotOurs)
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
            assert bed.client.check_port(target.app, 9) is Refusal.PORT_NOT_ALLOWED
            reader, writer = await dial(await bed.client.dial_parameters(target, 8005))
            frame = await asyncio.wait_for(reader.readexactly(8), 5)
            assert frame[4:] == b"8005"
            writer.close()

    asyncio.run(scenario())


def test_an_app_with_session_mfa_is_refused_clearly(tmp_path):
    async def scenario():
        async with started(tmp_path) as bed:
            target = await bed.client.resolve("guarded.corp.test")
            with pytest.raises(MfaRequiredError):
                await bed.client.dial_parameters(target, 7)
            assert bed.state is ClusterState.OK

    asyncio.run(scenario())


def test_a_refused_certificate_is_a_refusal_and_passes(tmp_path):
    async def scenario():
        async with started(tmp_path) as bed:
            target = await bed.client.resolve("echo.corp.test")
            bed.faults("refuse_certs")
            await until(lambda: bed.cluster.states[NAME].faults.refuse_certs)
            with pytest.raises(RefusedError, match="access denied"):
                await bed.client.dial_parameters(target, 7)
            bed.faults()
            await until(lambda: not bed.cluster.states[NAME].faults.refuse_certs)
            await bed.client.dial_parameters(target, 7)

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
                await bed.client.dial_parameters(known, 7)
            bed.faults()

            async def answers():
                with contextlib.suppress(TeleportError):
                    return await bed.client.resolve("new.corp.test") == NotOurs()

            async with asyncio.timeout(5):
                while not await answers():
                    await asyncio.sleep(0.02)
            assert bed.state is ClusterState.OK

    run(scenario())


@LOOPS
def test_a_connection_lost_unnoticed_costs_no_question(tmp_path, run):
    async def scenario():
        async with started(tmp_path) as bed:
            await bed.wait_for_config()
            channel = bed.client._sessions["localhost"]._cluster.api._channel.grpc
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
                await bed.client.dial_parameters(target, 7)
            assert await bed.client.resolve("echo.corp.test") == target
            bed.faults()
            await until(lambda: bed.state is ClusterState.OK)
            await bed.client.dial_parameters(target, 7)

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
                keys = [
                    der
                    for key in authority.Spec.ActiveKeys.TLS
                    for der in parse_authorities(key.Cert)
                ]
                assert tuple(keys) == login.authorities["leaf.demo.test"]
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
            session = bed.client._sessions["localhost"]
            session._cluster.api._channel._timeout_seconds = 0.2
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
            channel = bed.client._sessions["localhost"]._cluster.api._channel.grpc
            protocol = channel._protocol
            seconds = [await _timed(bed.client.resolve(f"n{i}.corp.test")) for i in range(50)]
            target = await bed.client.resolve("ports.corp.test")
            issue = [
                await _timed(bed.client.dial_parameters(target, port)) for port in range(8000, 8010)
            ]
            cached = await _timed(bed.client.dial_parameters(target, 8000))
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

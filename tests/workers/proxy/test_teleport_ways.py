"""Every way to the auth services: direct, in a WebSocket, through the SSH proxy."""

import asyncio
import contextlib

import pytest
import uvloop
from auth_bed import (
    HOST,
    WAYS,
    Bed,
    handshaking_server,
    make_authority,
    open_files,
    server_context,
)
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from teleport_fakes import der, until

from ipc.messages import ClusterState
from workers.proxy.teleport import pipe
from workers.proxy.teleport.auth_client import Connector
from workers.proxy.teleport.errors import (
    DeviceTrustError,
    LoginExpiredError,
    MisconfiguredError,
    UnreachableError,
)

ways = pytest.mark.parametrize("way", WAYS)
LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
LONG = "a-cluster-name-far-longer-than-thirty-one-bytes.demo.test"


def connector(bed, **changes):
    return Connector(ca_file=str(bed.ca_file), **({"timeout_seconds": 5.0} | changes))


@contextlib.asynccontextmanager
async def connected(bed, way, *names, **changes):
    """Clients for these clusters (default: the root); nothing of them is left behind."""
    files = open_files()
    connect, login = connector(bed, **changes), bed.login(way)
    clients = [connect(login, name) for name in names or [""]]
    try:
        yield clients if names else clients[0]
    finally:
        for client in clients:
            client.close()
    await until(lambda: not pipe._running and open_files() <= files, 10)


@LOOPS
@ways
def test_every_cluster_is_reached(tmp_path, way, run):
    async def scenario():
        async with (
            Bed(tmp_path) as bed,
            connected(bed, way, bed.root.name, "leaf.test") as (root, leaf),
        ):
            assert (await root.ping()).ClusterName == bed.root.name
            assert (await leaf.ping()).ClusterName == "leaf.test"
            assert (await leaf.vnet_config()).ipv4_cidr_range == "100.80.0.0/16"

    run(scenario())


@ways
def test_long_cluster_names_work(tmp_path, way):
    async def scenario():
        async with (
            Bed(tmp_path, root=LONG, leaves=("leaf-" + LONG,)) as bed,
            connected(bed, way, LONG, "leaf-" + LONG) as clients,
        ):
            assert [(await c.ping()).ClusterName for c in clients] == [LONG, "leaf-" + LONG]

    asyncio.run(scenario())


@ways
def test_both_authorities_of_a_rotation_are_trusted(tmp_path, way):
    async def scenario():
        async with Bed(tmp_path) as bed:
            login, other = bed.login(way), make_authority(bed.root.name)
            ours = login.authorities[bed.root.name]
            for authorities in ((der(other[1]), *ours), (*ours, der(other[1]))):
                login.authorities[bed.root.name] = authorities
                client = connector(bed)(login)
                assert (await client.ping()).ClusterName == bed.root.name
                client.close()
            login.authorities[bed.root.name] = (der(other[1]),)
            client = connector(bed)(login)
            with pytest.raises(UnreachableError, match=r"not trusted.*tsh login"):
                await client.ping()
            client.close()

    asyncio.run(scenario())


def test_the_authorities_of_a_leaf_may_be_given(tmp_path):
    async def scenario():
        async with Bed(tmp_path) as bed:
            login = bed.login("direct")
            authorities = login.authorities.pop("leaf.test")
            with pytest.raises(UnreachableError, match=r"no host authority of cluster leaf\.test"):
                connector(bed)(login, "leaf.test")
            with pytest.raises(UnreachableError, match="is no certificate"):
                connector(bed)(login, "leaf.test", (b"nonsense",))
            client = connector(bed)(login, "leaf.test", authorities)
            assert (await client.ping()).ClusterName == "leaf.test"
            client.close()

    asyncio.run(scenario())


@LOOPS
@ways
def test_an_auth_service_that_refuses_the_certificate_asks_for_a_login(tmp_path, way, run):
    async def scenario():
        async with Bed(tmp_path) as bed:
            context = server_context(bed.root.authority, clients=make_authority("elsewhere"))
            with handshaking_server(context) as bed.root.port:
                async with connected(bed, way) as client:
                    with pytest.raises(LoginExpiredError, match="tsh login"):
                        await client.ping()

    run(scenario())


@LOOPS
@ways
def test_much_data_goes_both_ways(tmp_path, way, run):
    """More than all buffers on the way hold, and many questions at once."""

    async def scenario():
        async with Bed(tmp_path) as bed, connected(bed, way, timeout_seconds=30.0) as client:
            bed.root.auth.rows["app_server"] = rows = [
                {"AppServer": {"Metadata": {"Name": f"{i}", "Description": "d" * 20_000}}}
                for i in range(100)
            ]
            predicate = "p" * 500_000
            answers = await asyncio.gather(
                *(client.app_servers(predicate, 100) for _ in range(5)), client.ping()
            )
            assert [len(found) for found in answers[:5]] == [len(rows)] * 5
            assert all(r.PredicateExpression == predicate for r in bed.root.auth.requests)

    run(scenario())


def cut(bed, way):
    match way:
        case "direct":
            bed.web_port.cut()
        case "upgrade":
            bed.balancer.cut()
        case "transport":
            bed.crash_ssh_proxy()


@LOOPS
@ways
def test_a_kept_connection_that_died_is_replaced(tmp_path, way, run):
    async def scenario():
        async with Bed(tmp_path) as bed, connected(bed, way) as client:
            for _ in range(3):
                await client.ping()
                cut(bed, way)  # and nothing is awaited: the client cannot know yet

    run(scenario())


def test_a_new_tunnel_over_a_dead_connection_opens_another(tmp_path):
    async def scenario():
        async with (
            Bed(tmp_path) as bed,
            connected(bed, "transport", bed.root.name, "leaf.test") as (root, leaf),
        ):
            await root.ping()
            bed.crash_ssh_proxy()
            assert (await leaf.ping()).ClusterName == "leaf.test"

    asyncio.run(scenario())


def silence(bed, way, is_silent):
    bed.web_port.is_silent = bed.balancer.is_silent = bed.transport.is_silent = is_silent


@LOOPS
@ways
def test_silence_ends_at_the_deadline_and_costs_no_more_than_that(tmp_path, way, run):
    """The kept connection is dead without a word; the next question takes a new one."""

    async def scenario():
        async with Bed(tmp_path) as bed, connected(bed, way, timeout_seconds=1.0) as client:
            await client.ping()
            silence(bed, way, True)
            with pytest.raises(UnreachableError, match="in time"):
                await client.ping()
            silence(bed, way, False)
            assert (await client.ping()).ClusterName == bed.root.name

    run(scenario())


@LOOPS
@ways
def test_silence_while_connecting_ends_at_the_deadline(tmp_path, way, run):
    async def scenario():
        async with Bed(tmp_path) as bed, connected(bed, way, timeout_seconds=0.5) as client:
            silence(bed, way, True)
            with pytest.raises(UnreachableError, match="in time"):
                await client.ping()

    run(scenario())


def test_a_slow_cluster_does_not_cut_the_others_off(tmp_path):
    async def scenario():
        async with (
            Bed(tmp_path) as bed,
            connected(bed, "transport", bed.root.name, "leaf.test", timeout_seconds=2.0) as (
                root,
                leaf,
            ),
        ):
            await root.ping()
            bed.clusters["leaf.test"].auth.gate = asyncio.Event()
            slow = asyncio.create_task(leaf.ping())
            while not slow.done():
                await root.ping()
                await asyncio.sleep(0.01)
            with pytest.raises(UnreachableError, match="in time"):
                await slow
            assert len(bed.transport.connections) == 1
            assert bed.transport.names == [bed.root.name, "leaf.test"]

    asyncio.run(scenario())


def test_all_clusters_share_one_connection_to_the_ssh_proxy(tmp_path):
    async def scenario():
        leaves = [f"leaf{i}.test" for i in range(5)]
        async with Bed(tmp_path, leaves=leaves) as bed:
            async with connected(bed, "transport", bed.root.name, *leaves) as clients:
                await asyncio.gather(*(client.ping() for client in clients))
                assert len(bed.transport.connections) == 1
                assert bed.transport.streams == 6
                clients[0].close()
                await until(lambda: bed.transport.streams == 5)
                await clients[1].ping()
            await until(lambda: bed.transport.streams == 0)
            assert len(bed.transport.connections) == 1

    asyncio.run(scenario())


@ways
def test_idle_leaves_let_go_of_their_connection(tmp_path, way):
    async def scenario():
        leaves = [f"leaf{i}.test" for i in range(4)]
        async with (
            Bed(tmp_path, leaves=leaves) as bed,
            connected(bed, way, bed.root.name, *leaves, leaf_idle_seconds=0.2) as clients,
        ):
            before = open_files()
            await asyncio.gather(*(client.ping() for client in clients))
            channels = [client._channel.grpc for client in clients]
            await until(lambda: not any(channel.is_connected for channel in channels[1:]))
            assert channels[0].is_connected
            if way != "transport":
                await until(lambda: open_files() <= before + 8)  # both sides are in this process
            assert (await clients[1].ping()).ClusterName == leaves[0]
            assert len({a for c in bed.leaves for a in c.auth.connections}) >= 4

    asyncio.run(scenario())


def test_an_idle_connection_is_not_closed_under_a_slow_question(tmp_path):
    async def scenario():
        async with (
            Bed(tmp_path) as bed,
            connected(bed, "direct", "leaf.test", leaf_idle_seconds=0.05) as (leaf,),
        ):
            await leaf.ping()
            auth = bed.clusters["leaf.test"].auth
            auth.gate = asyncio.Event()
            question = asyncio.create_task(leaf.ping())
            await until(lambda: len(auth.versions) == 2)
            await asyncio.sleep(0.15)  # longer than a connection may be idle
            auth.gate.set()
            await question
            assert len(auth.connections) == 1

    asyncio.run(scenario())


@ways
def test_a_closed_client_stays_closed(tmp_path, way):
    async def scenario():
        async with Bed(tmp_path) as bed, connected(bed, way) as client:
            connecting = asyncio.create_task(client.ping())
            await asyncio.sleep(0)
            client.close()
            for attempt in (connecting, client.ping()):
                with pytest.raises(UnreachableError):
                    await attempt

    asyncio.run(scenario())


# --- forward proxy


@pytest.mark.parametrize("way", ["direct", "transport"])
def test_a_forward_proxy_resolves_and_connects(tmp_path, way):
    async def scenario():
        async with Bed(tmp_path, host="proxy.test") as bed:
            environment = {"HTTPS_PROXY": f"http://{HOST}:{bed.forward_proxy.port}"}
            async with connected(bed, way, environment=environment) as client:
                assert (await client.ping()).ClusterName == bed.root.name
                port = bed.ssh_port if way == "transport" else bed.web_port.port
                assert bed.forward_proxy.targets == [f"proxy.test:{port}"]

    asyncio.run(scenario())


def test_a_forward_proxy_leads_to_the_load_balancer(tmp_path):
    async def scenario():
        async with Bed(tmp_path, host="proxy.test") as bed:
            environment = {"HTTPS_PROXY": f"http://{HOST}:{bed.forward_proxy.port}"}
            async with connected(bed, "upgrade", environment=environment) as client:
                assert (await client.ping()).ClusterName == bed.root.name
                assert bed.forward_proxy.targets == [f"proxy.test:{bed.balancer.port}"]

    asyncio.run(scenario())


@ways
def test_a_forward_proxy_that_is_not_there_is_named(tmp_path, way):
    async def scenario():
        async with Bed(tmp_path, host="proxy.test") as bed:
            environment = {"HTTPS_PROXY": "http://alice:secret@127.0.0.1:9"}
            async with connected(bed, way, environment=environment) as client:
                with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9") as caught:
                    await client.ping()
                assert "secret" not in str(caught.value)

    asyncio.run(scenario())


# --- connection upgrade


def test_pings_of_the_load_balancer_are_answered(tmp_path):
    async def scenario():
        async with Bed(tmp_path) as bed:
            bed.balancer.pings = 3
            async with connected(bed, "upgrade") as client:
                await client.ping()
                await until(lambda: b"hi" in bed.balancer.pongs)
                assert bed.balancer.protocols == ["alpn-ping"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("status", "said"),
    [("404 Not Found", "too old"), ("403 Forbidden", "403"), ("nonsense", "upgrade")],
)
def test_a_refused_upgrade_says_why(tmp_path, status, said):
    async def scenario():
        async with Bed(tmp_path) as bed:
            bed.balancer.status = status
            async with connected(bed, "upgrade") as client:
                with pytest.raises(UnreachableError, match=said) as caught:
                    await client.ping()
                assert HOST in str(caught.value)

    asyncio.run(scenario())


def test_a_load_balancer_that_is_not_trusted_is_told_from_the_cluster(tmp_path):
    async def scenario():
        async with Bed(tmp_path) as bed:
            client = Connector()(bed.login("upgrade"))
            with pytest.raises(UnreachableError, match=r"web port's certificate.*ca_file"):
                await client.ping()
            client.close()
            client = Connector(insecure=True)(bed.login("upgrade"))
            assert (await client.ping()).ClusterName == bed.root.name
            client.close()
            client = Connector(ca_file=str(tmp_path / "none"))(bed.login("upgrade"))
            with pytest.raises(MisconfiguredError):
                await client.ping()
            client.close()

    asyncio.run(scenario())


def test_a_web_port_without_tls_is_no_load_balancer(tmp_path):
    async def scenario():
        async with Bed(tmp_path) as bed:
            bed.balancer.port = bed.forward_proxy.port
            async with connected(bed, "upgrade", timeout_seconds=0.5) as client:
                with pytest.raises(UnreachableError):
                    await client.ping()

    asyncio.run(scenario())


# --- SSH proxy


def test_a_cluster_behind_the_ssh_proxy_that_is_away_says_so(tmp_path):
    async def scenario():
        async with Bed(tmp_path) as bed:
            errors = bed.transport.errors
            errors["leaf.test"] = GRPCError(Status.NOT_FOUND, "cluster leaf.test is offline")
            async with connected(bed, "transport", bed.root.name, "leaf.test") as (root, leaf):
                await root.ping()
                for _ in range(2):
                    with pytest.raises(UnreachableError, match=r"leaf\.test is offline") as caught:
                        await leaf.ping()
                    assert caught.value.state is ClusterState.UNREACHABLE
                errors["leaf.test"] = GRPCError(
                    Status.PERMISSION_DENIED, "access requires a trusted device"
                )
                with pytest.raises(DeviceTrustError, match="tsh login"):
                    await leaf.ping()
                await root.ping()
                assert len(bed.transport.connections) == 1

    asyncio.run(scenario())


def test_an_ssh_proxy_of_another_authority_is_not_trusted(tmp_path):
    async def scenario():
        async with Bed(tmp_path) as bed:
            login = bed.login("transport")
            client = connector(bed)(login, "leaf.test")  # its own authority is right
            client.close()
            login.authorities[bed.root.name] = (der(make_authority()[1]),)
            client = connector(bed)(login, "leaf.test")
            with pytest.raises(UnreachableError, match="not trusted"):
                await client.ping()
            assert bed.transport.names == []
            client.close()

    asyncio.run(scenario())


def test_an_ssh_proxy_that_is_not_there_is_reported(tmp_path):
    async def scenario():
        async with Bed(tmp_path) as bed:
            bed.ssh_port = 9
            async with connected(bed, "transport") as client:
                with pytest.raises(UnreachableError, match="refused"):
                    await client.ping()

    asyncio.run(scenario())

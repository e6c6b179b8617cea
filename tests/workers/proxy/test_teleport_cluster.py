import asyncio
from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from teleport_fakes import CLUSTER, PROXY, Clock, FakeApi

from ipc.messages import ClusterState
from workers.proxy.teleport import cluster as cluster_module
from workers.proxy.teleport.cluster import Cluster, make_config
from workers.proxy.teleport.errors import RefusedError, TeleportError, UnreachableError
from workers.proxy.teleport.pb import vnet_pb2


def make(api, clock, **changes):
    async def connect():
        return api

    settings = {"on_change": lambda: None} | changes
    return Cluster(CLUSTER, connect, clock=clock.monotonic, **settings)


def spec(ipv4_range="", zones=()):
    return vnet_pb2.VnetConfigSpec(
        ipv4_cidr_range=ipv4_range,
        custom_dns_zones=[vnet_pb2.CustomDNSZone(suffix=zone) for zone in zones],
    )


def test_the_proxy_address_without_port_is_the_first_zone():
    config = make_config("Proxy.Test:3080", spec(zones=["Corp.Test.", "corp.test"]))
    assert config.proxy_public_host == "proxy.test"
    assert config.zones == ("proxy.test", "corp.test")
    assert config.ipv4_range is None
    assert config.problem == ""


def test_a_range_with_host_bits_is_made_canonical():
    assert make_config("", spec("10.1.2.3/16")).ipv4_range == IPv4Network("10.1.0.0/16")


@pytest.mark.parametrize("text", ["0.0.0.0/0", "10.0.0.0/28", "fd00::/64", "x", "10.0.0.0/33"])
def test_an_impossible_range_is_ignored_and_reported(text):
    config = make_config("", spec(text))
    assert config.ipv4_range is None
    assert text in config.problem


@pytest.mark.parametrize("zone", ["com", ".", "", "10.0.0.1", "a b.test", "../etc.test"])
def test_an_impossible_zone_is_ignored_and_reported(zone):
    config = make_config("proxy.test:443", spec(zones=[zone, "corp.test"]))
    assert config.zones == ("proxy.test", "corp.test")
    assert config.problem


@given(st.text(max_size=50), st.text(max_size=50), st.lists(st.text(max_size=300), max_size=300))
def test_no_setting_breaks_the_configuration(address, ipv4_range, zones):
    config = make_config(
        address.encode(errors="ignore").decode(),
        spec(
            ipv4_range.encode(errors="ignore").decode(),
            [zone.encode(errors="ignore").decode() for zone in zones],
        ),
    )
    assert len(config.zones) <= 200
    assert len(config.problem) <= 500


def test_the_configuration_is_kept_for_its_time():
    async def run():
        api, clock = FakeApi(zones=["corp.test"]), Clock()
        changes = []
        cluster = make(api, clock, on_change=lambda: changes.append(cluster.config))
        first = await asyncio.gather(*(cluster.current_config() for _ in range(5)))
        assert {c.zones for c in first} == {(PROXY, "corp.test")}
        clock.seconds += 299
        await cluster.current_config()
        assert api.calls == ["ping", "vnet_config"]
        clock.seconds += 2
        api.zones = ["new.test"]
        assert (await cluster.current_config()).zones == (PROXY, "new.test")
        assert [config.zones for config in changes] == [(PROXY, "corp.test"), (PROXY, "new.test")]

    asyncio.run(run())


def test_the_last_configuration_serves_while_the_cluster_is_down():
    async def run():
        api, clock = FakeApi(), Clock()
        cluster = make(api, clock)
        await cluster.current_config()
        clock.seconds += 1000
        api.error = UnreachableError("down")
        assert (await cluster.current_config()).zones == (PROXY,)
        assert cluster.problem.state is ClusterState.UNREACHABLE
        api.error = None
        clock.seconds += 10
        await cluster.current_config()
        assert cluster.problem is None

    asyncio.run(run())


def test_a_cluster_that_never_answered_is_not_asked_at_every_turn():
    async def run():
        api, clock = FakeApi(error=UnreachableError("down")), Clock()
        cluster = make(api, clock, retry_seconds=5)
        for _ in range(3):
            with pytest.raises(TeleportError):
                await cluster.current_config()
        assert len(api.calls) == 1
        clock.seconds += 5
        with pytest.raises(TeleportError):
            await cluster.current_config()
        assert len(api.calls) == 2

    asyncio.run(run())


def test_a_refused_request_says_that_the_cluster_is_well():
    cluster = make(FakeApi(), Clock())
    cluster.note(UnreachableError("down"))
    cluster.note(RefusedError("no"))
    assert cluster.problem is None


def test_a_cluster_that_failed_at_a_question_is_asked_soon_how_it_is():
    async def run():
        api, clock = FakeApi(), Clock()
        cluster = make(api, clock, retry_seconds=5)
        await cluster.current_config()
        cluster.note(UnreachableError("down"))
        assert not cluster.is_due()
        clock.seconds += 5
        assert cluster.is_due()
        await cluster.current_config()
        assert cluster.problem is None
        assert not cluster.is_due()

    asyncio.run(run())


def test_a_cluster_in_doubt_is_asked_soon_and_not_with_each_doubt():
    async def run():
        api, clock = FakeApi(), Clock()
        cluster = make(api, clock, retry_seconds=5)
        await cluster.current_config()
        clock.seconds += 3
        cluster.doubt()
        assert not cluster.is_due()
        clock.seconds += 2
        assert cluster.is_due()
        api.error = UnreachableError("down")
        await cluster.current_config()  # the last one known
        assert cluster.problem is api.error
        cluster.doubt()
        assert not cluster.is_due()

    asyncio.run(run())


def test_a_cluster_that_fails_for_long_is_asked_less_often():
    async def run():
        api, clock = FakeApi(error=UnreachableError("down")), Clock()
        cluster = make(api, clock, retry_seconds=5, max_retry_seconds=60)
        asked = []
        for second in range(200):
            if cluster.is_due():
                asked.append(second)
                with pytest.raises(UnreachableError):
                    await cluster.current_config()
            clock.seconds += 1
        assert asked == [0, 5, 15, 35, 75, 135, 195]
        api.error = None
        clock.seconds += 60
        await cluster.current_config()

    asyncio.run(run())


def test_only_so_many_clusters_are_asked_at_once():
    async def run():
        limiter, gate = asyncio.Semaphore(2), asyncio.Event()
        apis = [FakeApi(gate=gate) for _ in range(5)]
        clusters = [make(api, Clock(), limiter=limiter) for api in apis]
        asking = [asyncio.create_task(cluster.current_config()) for cluster in clusters]
        for _ in range(10):
            await asyncio.sleep(0)
        assert sum(bool(api.calls) for api in apis) == 2
        gate.set()
        await asyncio.gather(*asking)

    asyncio.run(run())


def test_clusters_that_hang_do_not_keep_others_from_being_asked(monkeypatch):
    async def run():
        monkeypatch.setattr(cluster_module, "TURN_SECONDS", 0.01)
        limiter = asyncio.Semaphore(2)
        hung = [make(FakeApi(gate=asyncio.Event()), Clock(), limiter=limiter) for _ in range(4)]
        asking = [asyncio.create_task(cluster.current_config()) for cluster in hung]
        async with asyncio.timeout(5):
            await make(FakeApi(), Clock(), limiter=limiter).current_config()
        for cluster in hung:
            await cluster.close()
        assert all(
            isinstance(e, UnreachableError)
            for e in await asyncio.gather(*asking, return_exceptions=True)
        )
        for _ in range(2):
            await asyncio.wait_for(limiter.acquire(), 1)
        assert limiter.locked()

    asyncio.run(run())


def test_the_first_configuration_is_waited_for_once_and_not_per_name():
    async def run():
        api, clock = FakeApi(gate=asyncio.Event()), Clock()
        cluster = make(api, clock)
        with pytest.raises(UnreachableError, match="not answered yet"):
            await cluster.first_config(0.02)
        clock.seconds += 1
        async with asyncio.timeout(0.5):
            with pytest.raises(UnreachableError, match="not answered yet"):
                await cluster.first_config(1)
        api.gate.set()
        await cluster.current_config()
        assert (await cluster.first_config(1)).zones == (PROXY,)

    asyncio.run(run())


def test_a_vnet_config_that_may_not_be_read_costs_only_itself():
    async def run():
        api = FakeApi(zones=["corp.test"])

        async def refuse():
            raise RefusedError("access denied")

        api.vnet_config = refuse
        config = await make(api, Clock()).current_config()
        assert config.zones == (PROXY,)
        assert "access denied" in config.problem

    asyncio.run(run())


def test_a_new_login_lets_questions_under_way_finish():
    async def run():
        old, new, clock = FakeApi(gate=asyncio.Event()), FakeApi(zones=["new.test"]), Clock()
        cluster = make(old, clock)
        asking = asyncio.create_task(cluster.current_config())
        while not old.calls:
            await asyncio.sleep(0)

        async def connect():
            return new

        cluster.use(connect)
        assert await cluster.api() is new
        assert not old.is_closed
        old.gate.set()
        assert (await asking).zones == (PROXY,)
        assert (await cluster.current_config()).zones == (PROXY, "new.test")
        await cluster.close()
        assert old.is_closed
        assert new.is_closed

    asyncio.run(run())


def test_a_connection_is_closed_though_nobody_waited_for_it_any_more():
    api = FakeApi()

    async def main():
        opened = asyncio.Event()

        async def connect():
            opened.set()
            await asyncio.sleep(0)
            return api

        cluster = Cluster(CLUSTER, connect, clock=Clock().monotonic, on_change=lambda: None)
        asking = asyncio.ensure_future(cluster.api())
        await opened.wait()
        asking.cancel()
        await asyncio.wait([asking])
        await asyncio.sleep(0)
        await cluster.close()

    asyncio.run(main())
    assert api.is_closed

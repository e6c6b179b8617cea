import asyncio
from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from teleport_fakes import CLUSTER, PROXY, Clock, FakeApi

from ipc.messages import ClusterState
from workers.proxy.teleport.cluster import Cluster, make_config
from workers.proxy.teleport.errors import RefusedError, TeleportError, UnreachableError
from workers.proxy.teleport.pb import vnet_pb2


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
        cluster = Cluster(
            CLUSTER, api, clock=clock.monotonic, on_change=lambda: changes.append(cluster.config)
        )
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
        cluster = Cluster(CLUSTER, api, clock=clock.monotonic, on_change=lambda: None)
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
        cluster = Cluster(
            CLUSTER, api, clock=clock.monotonic, on_change=lambda: None, retry_seconds=5
        )
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
    cluster = Cluster(CLUSTER, FakeApi(), clock=Clock().monotonic, on_change=lambda: None)
    cluster.note(UnreachableError("down"))
    cluster.note(RefusedError("no"))
    assert cluster.problem is None

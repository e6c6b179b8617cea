import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from teleport_fakes import CLUSTER, Clock, FakeApi, app_server, until

from ipc.messages import Refusal
from workers.proxy.teleport.apps import (
    App,
    AppFinder,
    OtherApp,
    PortRange,
    check_port,
    make_app,
    select_app,
    valid_ports,
)
from workers.proxy.teleport.cluster import Cluster
from workers.proxy.teleport.errors import UnreachableError
from workers.proxy.teleport.pb import types_pb2

NAME = "pg.teleport.demo.test"


def finder(api, clock, **limits):
    async def connect():
        return api

    cluster = Cluster(CLUSTER, connect, clock=clock.monotonic, on_change=lambda: None)
    return AppFinder(cluster, clock=clock.monotonic, **limits)


def test_a_tcp_app_is_chosen_by_its_public_address():
    servers = [
        app_server("web", "http://127.0.0.1", public_addr="a.test"),
        app_server("other", public_addr="b.test"),
        app_server("pg", public_addr="A.test"),
    ]
    assert isinstance(select_app(servers, "a.test"), App)
    assert select_app(servers, "a.test").name == "pg"
    assert select_app(servers, "c.test") is None


def test_another_kind_of_app_is_found_by_address_or_name():
    servers = [
        app_server("other", "http://127.0.0.1", public_addr="x.test"),
        app_server("Web", "http://127.0.0.1", public_addr="web.leaf.test"),
    ]
    assert select_app(servers, "web.leaf.test") == OtherApp("Web")
    assert select_app(servers, "web.proxy.test") is None
    assert select_app(servers, "web.proxy.test", "web") == OtherApp("Web")


def test_a_tcp_app_that_has_only_the_name_is_ignored():
    servers = [app_server("pg", public_addr="pg.leaf.test")]
    assert select_app(servers, "pg.proxy.test", "pg") is None


@pytest.mark.parametrize("uri", ["http://x", "https://x", "mcp+http://x", "", "tcp", "cloud://AWS"])
def test_other_kinds_of_app_are_not_ours(uri):
    assert make_app(app_server(uri=uri).Spec.App) is None


def test_without_port_list_any_port_leads_to_the_one_target():
    app = make_app(app_server().Spec.App)
    assert app.ports is None
    assert check_port(app.ports, 1) == 0


def test_only_listed_ports_are_allowed():
    app = make_app(app_server(ports=[(5432, 0), (6000, 6010)]).Spec.App)
    assert app.ports == (PortRange(5432, 5432), PortRange(6000, 6010))
    allowed = [p for p in range(5000, 7000) if check_port(app.ports, p) == p]
    assert allowed == [5432, *range(6000, 6011)]
    assert check_port(app.ports, 6011) is Refusal.PORT_NOT_ALLOWED


def test_a_list_of_impossible_ports_allows_none():
    app = make_app(app_server(ports=[(0, 0), (10, 5), (70000, 0), (1, 70000)]).Spec.App)
    assert app.ports == ()
    assert check_port(app.ports, 10) is Refusal.PORT_NOT_ALLOWED


def test_valid_ports_are_told_in_a_few_words():
    few = make_app(app_server(ports=[(5432, 0), (6000, 6010)]).Spec.App)
    assert valid_ports(few) == "5432, 6000-6010"
    many = make_app(app_server(ports=[(port, 0) for port in range(1, 101)]).Spec.App)
    assert valid_ports(many) == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 90 more"


@given(st.binary(max_size=200))
def test_no_message_a_cluster_sends_breaks_the_selection(data):
    try:
        server = types_pb2.AppServerV3.FromString(data)
    except Exception:  # noqa: BLE001 - protobuf refused it before us
        return
    select_app([server], "a.test", "a")


def test_an_answer_is_reused_until_it_is_old():
    async def run():
        api, clock = FakeApi(), Clock()
        apps = finder(api, clock, positive_seconds=60, negative_seconds=10)
        assert (await apps.find(NAME)).name == "pg"
        assert await apps.find("no.teleport.demo.test") is None
        clock.seconds += 9
        await apps.find(NAME)
        await apps.find("no.teleport.demo.test")
        assert len(api.predicates) == 2
        clock.seconds += 2
        await apps.find(NAME)
        await apps.find("no.teleport.demo.test")
        assert len(api.predicates) == 3
        clock.seconds += 60
        await apps.find(NAME)
        assert len(api.predicates) == 4

    asyncio.run(run())


def test_parallel_questions_for_one_name_are_one_question():
    async def run():
        api, clock = FakeApi(gate=asyncio.Event()), Clock()
        apps = finder(api, clock)
        waiting = [asyncio.create_task(apps.find(NAME)) for _ in range(10)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        api.gate.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [r.name for r in results[1:]] == ["pg"] * 9
        assert len(api.predicates) == 1

    asyncio.run(run())


def test_an_old_answer_serves_while_the_cluster_is_down():
    async def run():
        api, clock = FakeApi(), Clock()
        apps = finder(api, clock)
        await apps.find(NAME)
        await apps.find("no.teleport.demo.test")
        clock.seconds += 1000
        api.error = UnreachableError("down")
        assert (await apps.find(NAME)).name == "pg"
        assert await apps.find("no.teleport.demo.test") is None
        with pytest.raises(UnreachableError):
            await apps.find("new.teleport.demo.test")

    asyncio.run(run())


def test_a_slow_cluster_gives_way_to_the_old_answer_and_is_heard_later():
    async def run():
        api, clock = FakeApi(), Clock()
        apps = finder(api, clock, patience_seconds=0.01)
        await apps.find(NAME)
        clock.seconds += 1000
        api.gate, api.apps = asyncio.Event(), []
        assert (await apps.find(NAME)).name == "pg"
        api.gate.set()
        await until(lambda: apps.last_known(NAME) is None)
        await apps.close()

    asyncio.run(run())


def test_names_beyond_the_limit_are_forgotten_oldest_first():
    async def run():
        api, clock = FakeApi(), Clock()
        apps = finder(api, clock, max_names=2)
        for name in ("a.test", "b.test", "a.test", "c.test", "a.test"):
            await apps.find(name)
        assert len(api.predicates) == 3
        await apps.find("b.test")
        assert len(api.predicates) == 4

    asyncio.run(run())


def test_who_decides_about_a_connection_hears_of_a_new_app_at_once():
    async def run():
        api, clock = FakeApi(apps=[]), Clock()
        apps = finder(api, clock)
        assert await apps.find(NAME) is None
        api.apps = [app_server()]
        clock.seconds += 0.5
        assert await apps.find(NAME, fresh=True) is None
        clock.seconds += 0.6
        assert await apps.find(NAME) is None
        assert (await apps.find(NAME, fresh=True)).name == "pg"
        assert (await apps.find(NAME)).name == "pg"
        clock.seconds += 5
        await apps.find(NAME, fresh=True)
        assert len(api.predicates) == 2

    asyncio.run(run())


def test_a_public_address_with_capitals_is_found_as_typed_and_then_by_every_spelling():
    async def run():
        api, clock = FakeApi(apps=[app_server(public_addr="PG.demo.test")]), Clock()
        apps = finder(api, clock)
        assert await apps.find("pg.demo.test") is None
        assert (await apps.find("pg.demo.test", spelling="PG.demo.test.")).name == "pg"
        assert (await apps.find("pg.demo.test")).name == "pg"
        assert (await apps.find("pg.demo.test", spelling="pG.dEmO.tEsT")).name == "pg"
        assert len(api.predicates) == 2

    asyncio.run(run())


def test_a_cluster_that_is_down_is_not_waited_for_at_every_turn():
    async def run():
        api, clock = FakeApi(), Clock()
        apps = finder(api, clock, patience_seconds=0.01)
        await apps.find(NAME)
        clock.seconds += 100
        api.gate = asyncio.Event()
        calls = len(api.calls)
        for _ in range(5):
            assert (await apps.find(NAME)).name == "pg"
        assert len(api.calls) == calls + 1
        await apps.close()
        clock.seconds += 10
        api.gate = None
        api.apps = []
        assert await apps.find(NAME) is None

    asyncio.run(run())

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from teleport_fakes import CLUSTER, Clock, FakeApi, database_server

from workers.proxy.teleport.cluster import Cluster
from workers.proxy.teleport.databases import (
    Database,
    DatabaseFinder,
    database_id,
    database_label,
    is_database_id,
    make_database,
    select_database,
)
from workers.proxy.teleport.errors import UnreachableError
from workers.proxy.teleport.names import DATABASE_ALPN, is_label
from workers.proxy.teleport.pb import types_pb2


def finder(api, clock=None, **limits):
    async def connect():
        return api

    clock = clock or Clock()
    cluster = Cluster(CLUSTER, connect, clock=clock.monotonic, on_change=lambda: None)
    return DatabaseFinder(cluster, clock=clock.monotonic, **limits)


@pytest.mark.parametrize(
    ("name", "identifier"),
    [
        ("db", "ffe2bkb99rso8"),
        ("db-a", "kgg8bbl0tj7eg"),
        ("my-database", "h9mqceo9f87i8"),
        ("postgres-prod-01", "15458etlcae38"),
        ("postgres-test", "vqumjaqb7sbsk"),
        ("my-postgres", "3ho0kq2qjja98"),
    ],
)
def test_the_hash_of_a_name_is_teleports(name, identifier):
    assert database_id(name) == identifier


@given(st.text())
def test_every_name_has_an_identifier_that_is_a_label(name):
    assert is_database_id(database_id(name))
    assert is_label(database_label(name))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("orders", "orders"),
        ("Orders", database_id("Orders")),
        ("orders.eu", database_id("orders.eu")),
        ("a" * 64, database_id("a" * 64)),
    ],
)
def test_a_name_is_shown_where_it_can_be_a_label(name, label):
    assert database_label(name) == label


@pytest.mark.parametrize("protocol", ["postgres", "cockroachdb", "mysql", "sqlserver"])
def test_these_protocols_are_carried(protocol):
    database = make_database(database_server("orders", protocol).Spec.Database)
    assert database == Database("orders", protocol)
    with_ping, without = DATABASE_ALPN[protocol]
    assert with_ping == f"{without}-ping"


@pytest.mark.parametrize("protocol", ["mongodb", "redis", "oracle", ""])
def test_others_are_no_match(protocol):
    assert select_database([database_server("orders", protocol)], "orders") is None


def test_servers_of_one_database_are_one(caplog):
    servers = [database_server(host=f"agent-{i}") for i in range(3)]
    with caplog.at_level(logging.WARNING):
        assert select_database(servers, "orders") == Database("orders", "postgres")
    assert caplog.records == []


def test_of_several_databases_the_first_is_taken_with_a_warning(caplog):
    other = database_id("orders")  # a database whose name is another's hash
    servers = [database_server("orders"), database_server(other, "mysql")]
    assert select_database(servers, other) == Database("orders", "postgres")
    assert "orders" in caplog.text


@given(st.binary(max_size=200))
def test_no_message_a_cluster_sends_breaks_the_selection(data):
    try:
        server = types_pb2.DatabaseServerV3.FromString(data)
    except Exception:  # noqa: BLE001 - protobuf refused it before us
        return
    select_database([server], "orders")


@pytest.mark.parametrize("knows_hashes", [True, False])
def test_a_database_is_found_by_name_and_by_hash(knows_hashes):
    async def run():
        api = FakeApi(databases=[database_server("Orders.eu")], knows_hashes=knows_hashes)
        databases = finder(api)
        expected = Database("Orders.eu", "postgres")
        assert await databases.find(database_id("Orders.eu")) == expected
        assert await databases.find("orders") is None
        api.databases = [database_server("orders")]
        assert await finder(api).find("orders") == Database("orders", "postgres")

    asyncio.run(run())


def test_an_old_server_is_listed_once_for_all_hashes():
    async def run():
        api, clock = FakeApi(databases=[database_server()], knows_hashes=False), Clock()
        databases = finder(api, clock)
        for i in range(10):
            assert await databases.find(database_id(f"none-{i}")) is None
        assert (await databases.find(database_id("orders"))).name == "orders"
        assert api.calls.count("resources") == 1
        clock.seconds += 100
        await databases.find(database_id("none-0"))
        assert api.calls.count("resources") == 2

    asyncio.run(run())


def test_a_name_that_is_no_hash_is_not_listed_for():
    async def run():
        api = FakeApi(knows_hashes=False)
        assert await finder(api).find("orders") is None
        assert "resources" not in api.calls

    asyncio.run(run())


def test_a_hostile_identifier_stays_inside_its_quotes():
    async def run():
        api = FakeApi(databases=[database_server()])
        assert await finder(api).find('x" || name != "y') is None
        assert all(r"x\" || name != \"y" in predicate for predicate in api.predicates)

    asyncio.run(run())


def test_a_name_with_capitals_is_found_as_typed_and_then_by_every_spelling():
    async def run():
        databases = finder(FakeApi(databases=[database_server("Orders")]))
        assert await databases.find("orders") is None
        assert (await databases.find("orders", spelling="Orders")).name == "Orders"
        assert (await databases.find("orders")).name == "Orders"

    asyncio.run(run())


def test_an_old_answer_serves_while_the_cluster_is_down():
    async def run():
        api, clock = FakeApi(databases=[database_server()]), Clock()
        databases = finder(api, clock)
        await databases.find("orders")
        api.error = UnreachableError("down")
        clock.seconds += 1000
        assert (await databases.find("orders")).name == "orders"
        with pytest.raises(UnreachableError):
            await databases.find("new")

    asyncio.run(run())

"""`vnet ls` without a network, and once against the embedded cluster."""

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from teleport_fakes import NOW, PROXY, FakeApi, app_server, database_server, write_home

from demo.cluster.config import App, Cluster, ClusterFile, Database, Node, check_clusters
from demo.cluster.server import EmbeddedCluster
from workers.proxy.every_cluster import MAX_AT_ONCE
from workers.proxy.listing import NoSuchClusterError, list_resources
from workers.proxy.resource_rows import Kind
from workers.proxy.teleport.auth_client import Connector
from workers.proxy.teleport.errors import AccessDeniedError, UnreachableError
from workers.proxy.teleport.pb import auth_pb2, types_pb2


@dataclass
class ListedApi(FakeApi):
    """A cluster that lists all kinds; `refused` are kinds it does not list."""

    nodes: list = field(default_factory=list)
    refused: set = field(default_factory=set)
    searched: list = field(default_factory=list)

    async def resources(self, kind, *, search=()):
        await self._called("resources")
        self.searched.append((kind, tuple(search)))
        if kind in self.refused:
            raise AccessDeniedError("access denied")
        for app in self.apps if kind == "app_server" else ():
            yield auth_pb2.PaginatedResource(AppServer=app)
        for database in self.databases if kind == "db_server" else ():
            yield auth_pb2.PaginatedResource(DatabaseServer=database)
        for hostname in self.nodes if kind == "node" else ():
            spec = types_pb2.ServerSpecV2(Hostname=hostname)
            yield auth_pb2.PaginatedResource(Node=types_pb2.ServerV2(Spec=spec))


class Bed:
    """A home with logins, and the clusters they lead to."""

    def __init__(self, home, **roots):
        self.home = home
        self.roots = roots or {PROXY: ListedApi()}
        self.connected = []
        for proxy in self.roots:
            write_home(home, proxy=proxy)

    def connect(self, login, cluster, authorities):
        root = self.roots[login.name]
        self.connected.append((login.name, cluster, authorities is not None))
        return root.leaves[cluster] if cluster else root

    def list(self, now=NOW, **changes):
        return asyncio.run(list_resources(self.home, self.connect, now, **changes))


def names(listing):
    return [row.name for row in listing.resources]


def problems(listing):
    return [str(problem) for problem in listing.problems]


def test_all_kinds_of_all_clusters(tmp_path):
    leaf = ListedApi(apps=[app_server("wiki", "http://wiki")], nodes=["node2"])
    root = ListedApi(databases=[database_server()], nodes=["node1"], leaves={"leaf.test": leaf})
    bed = Bed(tmp_path, **{PROXY: root})
    listing = bed.list()
    assert [(row.kind, row.name, row.cluster) for row in listing.resources] == [
        ("app", "pg", "demo.test"),
        ("app", "wiki", "leaf.test"),
        ("db", "orders", "demo.test"),
        ("node", "node1", "demo.test"),
        ("node", "node2", "leaf.test"),
    ]
    assert listing.problems == []
    # A leaf's authorities are the root's to tell.
    assert (PROXY, "leaf.test", True) in bed.connected
    assert root.is_closed
    assert leaf.is_closed


def test_several_profiles(tmp_path):
    other = ListedApi(apps=[app_server("web", public_addr="web.other.test")])
    bed = Bed(tmp_path, **{PROXY: ListedApi(), "other.test": other})
    listing = bed.list()
    assert [(row.name, row.profile) for row in listing.resources] == [
        ("pg", PROXY),
        ("web", "other.test"),
    ]


def test_only_the_wanted_kinds_are_asked_for_and_the_words_go_along(tmp_path):
    bed = Bed(tmp_path)
    bed.list(kinds=[Kind.APP, Kind.NODE], words=["pg", "prod"])
    assert bed.roots[PROXY].searched == [
        ("app_server", ("pg", "prod")),
        ("node", ("pg", "prod")),
    ]


def test_a_server_that_ignores_the_words_is_not_believed(tmp_path):
    bed = Bed(tmp_path, **{PROXY: ListedApi(apps=[app_server("pg"), app_server("web")])})
    assert names(bed.list(words=["PG"])) == ["pg"]


def test_one_cluster_alone(tmp_path):
    leaf = ListedApi(apps=[app_server("web")])
    root = ListedApi(leaves={"leaf.test": leaf, "other.test": ListedApi()})
    bed = Bed(tmp_path, **{PROXY: root})
    assert names(bed.list(cluster="leaf.test")) == ["web"]
    assert "resources" not in root.calls
    assert [cluster for _, cluster, _ in bed.connected] == ["", "leaf.test"]
    assert names(bed.list(cluster="demo.test")) == ["pg"]


def test_a_cluster_nobody_knows(tmp_path):
    bed = Bed(tmp_path, **{PROXY: ListedApi(leaves={"leaf.test": ListedApi()})})
    with pytest.raises(NoSuchClusterError, match=r"lead to demo\.test, leaf\.test"):
        bed.list(cluster="none.test")


def test_a_cluster_nobody_knows_may_be_behind_a_login_that_cannot_be_used(tmp_path):
    listing = Bed(tmp_path).list(now=NOW + timedelta(days=1), cluster="none.test")
    assert listing.resources == []
    assert listing.problems


@pytest.mark.parametrize("calls", [["ping"], ["resources"]])
def test_a_leaf_that_cannot_be_asked_costs_the_others_nothing(tmp_path, calls):
    broken = ListedApi()

    async def fail():
        raise UnreachableError("leaf.test does not answer")

    setattr(broken, calls[0], lambda *_, **__: fail() if calls == ["ping"] else _failing(fail))
    bed = Bed(tmp_path, **{PROXY: ListedApi(leaves={"leaf.test": broken})})
    listing = bed.list()
    assert names(listing) == ["pg"]
    assert problems(listing) == ["leaf.test cannot be asked: leaf.test does not answer"]
    assert broken.is_closed


async def _failing(fail):
    await fail()
    yield


def test_a_root_that_cannot_be_asked_is_one_problem(tmp_path):
    bed = Bed(tmp_path, **{PROXY: ListedApi(error=UnreachableError("no answer"))})
    listing = bed.list()
    assert problems(listing) == ["demo.test cannot be asked: no answer"]
    assert listing.problems[0].profile == PROXY


def test_an_offline_leaf_is_not_waited_for(tmp_path):
    leaf = ListedApi(gate=asyncio.Event())
    bed = Bed(tmp_path, **{PROXY: ListedApi(leaves={"leaf.test": leaf}, offline={"leaf.test"})})
    listing = bed.list()
    assert names(listing) == ["pg"]
    assert problems(listing) == ["leaf.test cannot be asked: it has no connection to demo.test now"]
    assert leaf.calls == []


def test_a_root_that_does_not_tell_its_leaves_has_none(tmp_path):
    bed = Bed(tmp_path, **{PROXY: ListedApi(leaves_error=AccessDeniedError("access denied"))})
    listing = bed.list()
    assert (names(listing), listing.problems) == (["pg"], [])


def test_a_kind_that_is_refused_costs_the_others_nothing(tmp_path):
    root = ListedApi(nodes=["node1"], refused={"db_server"})
    listing = Bed(tmp_path, **{PROXY: root}).list()
    assert names(listing) == ["pg", "node1"]
    assert problems(listing) == ["demo.test cannot be asked: db_server: access denied"]


def test_an_expired_login_says_what_to_do(tmp_path):
    listing = Bed(tmp_path).list(now=NOW + timedelta(days=1))
    (problem,) = problems(listing)
    assert problem.startswith(f"{PROXY} cannot be asked: the login expired")
    assert f"tsh login --proxy={PROXY}" in problem


def test_no_login_at_all(tmp_path):
    listing = asyncio.run(list_resources(tmp_path / "none", None, NOW))
    (problem,) = problems(listing)
    assert "tsh login" in problem


def test_more_than_the_limit_is_said(tmp_path):
    apps = [app_server(f"app{index}") for index in range(5)]
    listing = Bed(tmp_path, **{PROXY: ListedApi(apps=apps)}).list(max_rows=3)
    assert len(listing.resources) == 3
    assert "more than 3 resources" in problems(listing)[0]


def test_clusters_are_asked_at_the_same_time_but_not_all(tmp_path):
    now, most = 0, 0

    class CountedApi(ListedApi):
        async def ping(self):
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.001)
            now -= 1
            return await super().ping()

    leaves = {f"leaf{index}.test": CountedApi(apps=[]) for index in range(40)}
    bed = Bed(tmp_path, **{PROXY: CountedApi(leaves=leaves)})
    assert bed.list().problems == []
    assert 1 < most <= MAX_AT_ONCE


def test_against_the_embedded_cluster(tmp_path):
    root = Cluster(
        name="root.test",
        proxy_addr="localhost:0",
        custom_dns_zones=("corp.test",),
        apps=(
            App(name="echo", uri="tcp://echo.backend.internal:7", public_addr="echo.corp.test"),
            App(name="wiki", uri="http://127.0.0.1:1"),
        ),
        databases=(Database(name="orders", protocol="postgres", uri="127.0.0.1:5432"),),
        nodes=(Node(hostname="node1"),),
    )
    leaf = Cluster(
        name="leaf.test",
        leaf_of="root.test",
        apps=(App(name="far", uri="tcp://echo.backend.internal:7"),),
        generated_apps=1500,
    )

    async def main():
        file = check_clusters(ClusterFile(clusters=(root, leaf)))
        async with EmbeddedCluster(file, tmp_path):
            connect, now = Connector(), datetime.now(UTC)
            everything = await list_resources(tmp_path, connect, now)
            found = await list_resources(tmp_path, connect, now, words=["ECHO"])
            return everything, found

    everything, found = asyncio.run(main())
    assert everything.problems == []
    by_name = {row.name: row for row in everything.resources}
    assert by_name["echo"].address == "echo.corp.test"
    assert by_name["wiki"].address.startswith("https://wiki.localhost:")
    assert by_name["orders"].address == "orders.db.localhost"
    assert by_name["node1"].cluster == "root.test"
    # More than one page of them.
    assert sum(row.cluster == "leaf.test" for row in everything.resources) == 1501
    assert by_name["far"].through_vnet
    assert [row.name for row in found.resources] == ["echo"]

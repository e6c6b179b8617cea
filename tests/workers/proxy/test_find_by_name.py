import asyncio

import pytest
from teleport_fakes import NOW, PROXY, FakeApi, app_server, database_server, write_home

from workers.proxy.find_by_name import NotAskedError, NotFoundByNameError, find_by_name
from workers.proxy.listing import NoSuchClusterError
from workers.proxy.teleport.errors import UnreachableError
from workers.proxy.teleport.targets import AppTarget, DatabaseTarget


def find(home, name, roots=None, **changes):
    """`roots`: the cluster of each profile."""
    roots = roots or {PROXY: FakeApi()}
    for proxy in roots:
        write_home(home, proxy=proxy)

    def connect(login, cluster, _authorities):
        root = roots[login.name]
        return root.leaves[cluster] if cluster else root

    return asyncio.run(find_by_name(home, connect, NOW, name, **changes))


@pytest.mark.parametrize("name", ["pg", "PG", f"pg.{PROXY}", f"pg.{PROXY}.", f"PG.{PROXY}"])
def test_an_app_by_its_name_or_address(tmp_path, name):
    found = find(tmp_path, name)
    assert isinstance(found.target, AppTarget)
    assert found.target.app.name == "pg"
    assert (found.target.profile, found.target.cluster) == (PROXY, "demo.test")
    assert found.address == f"pg.{PROXY}"


def test_an_app_in_no_dns_zone_is_found(tmp_path):
    root = FakeApi(apps=[app_server(public_addr="pg.elsewhere.test")])
    assert find(tmp_path, "pg.elsewhere.test", {PROXY: root}).address == "pg.elsewhere.test"


@pytest.mark.parametrize("cluster", ["", "leaf.test"])
def test_an_app_of_a_leaf(tmp_path, cluster):
    root = FakeApi(leaves={"leaf.test": FakeApi(apps=[app_server("web")])})
    target = find(tmp_path, "web", {PROXY: root}, cluster=cluster).target
    assert (target.root_cluster, target.leaf) == ("demo.test", "leaf.test")


@pytest.mark.parametrize("knows_hashes", [True, False])
@pytest.mark.parametrize(
    "name",
    ["My Orders", f"03dnifpbhjvpe.db.{PROXY}", f"03dnifpbhjvpe.db.{PROXY}.".upper()],
)
def test_a_database_by_its_name_or_address(tmp_path, name, knows_hashes):
    root = FakeApi(databases=[database_server("My Orders")], knows_hashes=knows_hashes)
    found = find(tmp_path, name, {PROXY: root})
    assert isinstance(found.target, DatabaseTarget)
    assert found.target.database.name == "My Orders"
    assert found.address == f"03dnifpbhjvpe.db.{PROXY}"


def test_several_agents_serve_one_app(tmp_path):
    root = FakeApi(apps=[app_server(), app_server()], databases=[database_server("x")] * 2)
    assert find(tmp_path, "pg", {PROXY: root}).target.app.name == "pg"
    assert find(tmp_path, "x", {PROXY: root}).target.database.name == "x"


def test_several_profiles_lead_to_one_app(tmp_path):
    app = app_server(public_addr="pg.corp.test")
    roots = {PROXY: FakeApi(apps=[app]), "other.test": FakeApi(apps=[app])}
    assert find(tmp_path, "pg", roots).address == "pg.corp.test"


def test_an_address_counts_more_than_a_name(tmp_path):
    apps = [app_server("pg.corp.test"), app_server("other", public_addr="pg.corp.test")]
    assert find(tmp_path, "pg.corp.test", {PROXY: FakeApi(apps=apps)}).target.app.name == "other"


def test_the_roots_database_counts_more_than_a_leafs_below_the_roots_proxy(tmp_path):
    leaf = FakeApi(databases=[database_server()], public_addr="proxy.leaf.test:443")
    both = FakeApi(databases=[database_server()], leaves={"leaf.test": leaf})
    target = find(tmp_path, f"orders.db.{PROXY}", {PROXY: both}).target
    assert target.cluster == "demo.test"
    found = find(tmp_path, "orders.db.proxy.leaf.test", {PROXY: both})
    assert (found.target.cluster, found.address) == ("leaf.test", "orders.db.proxy.leaf.test")
    alone = FakeApi(leaves={"leaf.test": leaf})
    target = find(tmp_path, f"orders.db.{PROXY}", {PROXY: alone}).target
    assert target.cluster == "leaf.test"


def test_a_name_of_several_names_them_all(tmp_path):
    leaf = FakeApi(apps=[app_server(public_addr="pg.leaf.test")])
    root = FakeApi(databases=[database_server("pg")], leaves={"leaf.test": leaf})
    with pytest.raises(NotFoundByNameError) as caught:
        find(tmp_path, "pg", {PROXY: root})
    for part in (
        f"pg.{PROXY} in demo.test",
        "pg.leaf.test in leaf.test",
        f"pg.db.{PROXY} in demo.test",
        "--cluster",
    ):
        assert part in str(caught.value)
    assert find(tmp_path, "pg", {PROXY: root}, cluster="leaf.test").address == "pg.leaf.test"
    assert find(tmp_path, "pg.leaf.test", {PROXY: root}).address == "pg.leaf.test"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wiki", f"open https://wiki.{PROXY} in a browser"),
        (f"wiki.{PROXY}", "is a web app"),
        ("tool", "use tsh mcp"),
        ("cache", "protocol redis: use tsh proxy db"),
        ("nothing", "vnet ls shows"),
        ('x" || name != "', "vnet ls shows"),
    ],
)
def test_what_cannot_be_carried_says_what_to_do(tmp_path, name, text):
    apps = [app_server("wiki", "http://wiki"), app_server("tool", "mcp+stdio://")]
    root = FakeApi(apps=[app_server(), *apps], databases=[database_server("cache", "redis")])
    with pytest.raises(NotFoundByNameError) as caught:
        find(tmp_path, name, {PROXY: root})
    assert text in str(caught.value)


def test_a_cluster_that_cannot_be_asked_may_have_it(tmp_path):
    roots = {PROXY: FakeApi(), "other.test": FakeApi(error=UnreachableError("no answer"))}
    with pytest.raises(NotAskedError) as caught:
        find(tmp_path, "web", roots)
    assert "no answer" in str(caught.value.problems[0])
    assert find(tmp_path, "pg", roots).target.app.name == "pg"


def test_a_cluster_nobody_knows(tmp_path):
    with pytest.raises(NoSuchClusterError, match=r"demo\.test"):
        find(tmp_path, "pg", cluster="none.test")

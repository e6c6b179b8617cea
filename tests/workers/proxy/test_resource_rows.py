import pytest
from teleport_fakes import PROXY, app_server, database_server

from workers.proxy.resource_rows import Kind, Place, Rows, make_row
from workers.proxy.teleport.pb import auth_pb2, types_pb2
from workers.proxy.teleport.precedence import ClusterNames


def place(root="demo.test", leaf="", web_port=443, **changes):
    names = {"profile": PROXY, "web_host": PROXY, "root": root.lower(), "leaf": leaf.lower()}
    names |= {"public_host": PROXY, "zones": (PROXY, "corp.test")} | changes
    return Place(root=root, leaf=leaf, names=ClusterNames(**names), web_port=web_port)


LEAF = place(leaf="leaf.test", public_host="proxy.leaf.test", zones=("proxy.leaf.test",))


def app(*arguments, labels=(), **changes):
    server = app_server(*arguments, **changes)
    server.Spec.App.Metadata.Labels.update(dict(labels))
    return auth_pb2.PaginatedResource(AppServer=server)


def database(*arguments, **changes):
    return auth_pb2.PaginatedResource(DatabaseServer=database_server(*arguments, **changes))


def node(hostname="node1", node_id="id-1", **spec):
    server = types_pb2.ServerV2(
        Metadata=types_pb2.Metadata(Name=node_id),
        Spec=types_pb2.ServerSpecV2(Hostname=hostname, **spec),
    )
    return auth_pb2.PaginatedResource(Node=server)


def test_tcp_app_is_reached_at_its_public_address():
    row = make_row(app("pg", public_addr="Pg.corp.test."), place())
    assert (row.kind, row.name, row.cluster, row.profile) == ("app", "pg", "demo.test", PROXY)
    assert (row.address, row.ports, row.protocol) == ("Pg.corp.test", "any", "tcp")
    assert row.through_vnet
    assert row.note == ""


@pytest.mark.parametrize(
    ("ports", "shown"),
    [
        ([(8000, 8010), (9000, 0)], "8000-8010, 9000"),
        ([(5432, 0)], "5432"),
        ([(p, 0) for p in range(1, 151)], ", ".join(map(str, range(1, 101))) + " and 50 more"),
    ],
)
def test_ports_of_a_multi_port_app(ports, shown):
    assert make_row(app("pg", "tcp://pg", ports=ports), place()).ports == shown


def test_app_in_no_zone_of_its_cluster_is_not_vnets():
    row = make_row(app("pg", public_addr="pg.elsewhere.test"), place())
    assert not row.through_vnet
    assert "custom_dns_zones" in row.note
    assert make_row(app("pg", public_addr="pg.elsewhere.test"), place(zones=None)).through_vnet


def test_app_without_public_address_is_not_vnets():
    server = app_server("pg")
    server.Spec.App.Spec.PublicAddr = ""
    row = make_row(auth_pb2.PaginatedResource(AppServer=server), place())
    assert (row.address, row.through_vnet) == ("", False)
    assert "vnet proxy" in row.note


@pytest.mark.parametrize(
    ("where", "uses_any", "url"),
    [
        (place(), False, "https://wiki.corp.test"),
        (place(web_port=3080), False, "https://wiki.corp.test:3080"),
        (place(), True, f"https://wiki.{PROXY}"),
        # A leaf's web apps are served by the root's proxy, under their names.
        (LEAF, False, f"https://wiki.{PROXY}"),
    ],
)
def test_web_app_has_a_url_and_is_left_to_the_browser(where, uses_any, url):
    resource = app("wiki", "http://127.0.0.1:80", "wiki.corp.test")
    resource.AppServer.Spec.App.Spec.UseAnyProxyPublicAddr = uses_any
    row = make_row(resource, where)
    assert (row.address, row.protocol, row.ports) == (url, "web", "")
    assert not row.through_vnet


def test_mcp_server_is_not_vnets():
    row = make_row(app("tool", "mcp+stdio://"), place())
    assert (row.address, row.protocol, row.through_vnet) == ("", "mcp", False)


@pytest.mark.parametrize(
    ("name", "where", "address"),
    [
        ("orders", place(), f"orders.db.{PROXY}"),
        # Golden: the first 8 bytes of SHA-256 in base32hex.
        ("My Database", place(), f"l8pu4ocblc0ii.db.{PROXY}"),
        ("Orders", place(), f"mvkapnai5pgp0.db.{PROXY}"),
        ("orders", LEAF, "orders.db.proxy.leaf.test"),
    ],
)
def test_address_of_a_database(name, where, address):
    row = make_row(database(name), where)
    assert (row.address, row.ports, row.protocol) == (address, "any", "postgres")
    assert row.through_vnet


def test_database_of_a_protocol_that_names_no_user_is_not_vnets():
    row = make_row(database("cache", "redis"), place())
    assert (row.address, row.through_vnet, row.protocol) == ("", False, "redis")
    assert "protocol redis" in row.note


@pytest.mark.parametrize(
    ("where", "address"),
    [
        (place(), "node1.demo.test"),
        (place(root="Demo.test"), "node1.demo.test"),
        (LEAF, "node1.leaf.test"),
        (place(leaf="leaf"), "node1.leaf.demo.test"),
    ],
)
def test_address_of_a_node(where, address):
    row = make_row(node(), where)
    assert (row.address, row.ports, row.protocol) == (address, "22", "ssh")
    assert (row.through_vnet, row.note) == (True, "")


@pytest.mark.parametrize(
    ("hostname", "where"), [("my node", place()), ("node1", place(root="main"))]
)
def test_node_whose_name_is_no_dns_name_has_no_address(hostname, where):
    row = make_row(node(hostname), where)
    assert (row.address, row.through_vnet) == ("", False)


def test_two_nodes_of_one_name_have_no_address():
    rows = Rows()
    for node_id in ("id-1", "id-1", "id-2", "id-1"):
        rows.add(node(node_id=node_id), place())
    (row,) = rows.sorted()
    assert row.address == ""
    assert "several servers" in row.note


def test_what_several_agents_serve_is_one_row():
    rows = Rows()
    for _ in range(3):
        rows.add(app("pg"), place())
        rows.add(database("orders"), place())
        rows.add(app("pg"), LEAF)
    assert [(row.kind, row.cluster) for row in rows.sorted()] == [
        ("app", "demo.test"),
        ("app", "leaf.test"),
        ("db", "demo.test"),
    ]


def test_rows_are_sorted_by_kind_and_name_without_case():
    rows = Rows()
    for resource in (node(), app("b"), database("x"), app("C"), app("a")):
        rows.add(resource, place())
    assert [row.name for row in rows.sorted()] == ["a", "b", "C", "x", "node1"]


def test_there_is_a_limit():
    rows = Rows(max_rows=2)
    assert rows.add(app("a"), place())
    assert rows.add(app("b"), place())
    assert not rows.add(app("c"), place())
    assert rows.add(app("a"), place())
    assert len(rows.sorted()) == 2


@pytest.mark.parametrize(
    ("words", "is_found"),
    [
        (["PROD"], True),
        (["pg", "prod"], True),
        (["pg", "stage"], False),
        (["env"], True),
        (["corp.test"], True),
        (["the numbers"], True),
        (["demo.test"], False),
        (["5432"], False),
    ],
)
def test_a_row_contains_all_words_somewhere(words, is_found):
    resource = app("pg", public_addr="pg.corp.test", labels={"env": "prod"})
    resource.AppServer.Spec.App.Metadata.Description = "The numbers"
    rows = Rows(words)
    rows.add(resource, place())
    assert bool(rows.sorted()) is is_found


def test_a_node_is_found_by_its_dynamic_labels():
    label = types_pb2.CommandLabelV2(Result="debian")
    resource = node(CmdLabels={"os": label})
    for word, count in (("debian", 1), ("os", 1), ("fedora", 0)):
        rows = Rows([word])
        rows.add(resource, place())
        assert len(rows.sorted()) == count


def test_of_a_database_the_server_knows_more_than_we_do():
    rows = Rows(["self-hosted"])
    rows.add(database("orders"), place())
    assert rows.sorted()


def test_control_characters_never_reach_the_terminal():
    row = make_row(app("pg\x1b[2J", public_addr="pg\n.corp.test"), place())
    assert (row.name + row.address).isprintable()


def test_resources_of_other_kinds_and_without_names_are_left_out():
    assert make_row(auth_pb2.PaginatedResource(), place()) is None
    assert make_row(app(""), place()) is None
    assert make_row(node(""), place()) is None
    assert make_row(database(""), place()) is None


def test_kinds_have_the_names_of_the_command_line():
    assert list(Kind) == ["app", "db", "node"]

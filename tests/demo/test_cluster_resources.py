"""Big listings: what is found, in which pages, and how fast. And the lists of apps themselves."""

import contextlib
import time
from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.cluster.app_lists import parse_apps
from demo.cluster.config import parse_cluster_file
from demo.cluster.errors import ClusterFileError, PredicateError
from demo.cluster.resources import Listings, Query, vnet_dns_name
from demo.cluster.state import make_state
from demo.cluster.webauthn import make_security_key
from workers.proxy.teleport.pb import auth_pb2

FILE = """
[[clusters]]
name = "root.test"
proxy_addr = "localhost:0"
custom_dns_zones = ["apps.test"]
generated_apps = {count}
apps = [
  {{ name = "pg", uri = "tcp://127.0.0.1:5432", public_addr = "pg.apps.test" }},
  {{ name = "secret", uri = "tcp://127.0.0.1:5432", allowed_roles = ["admin"] }},
]
databases = [
  {{ name = "orders", protocol = "postgres", uri = "127.0.0.1:5432" }},
  {{ name = "vault", protocol = "mysql", uri = "127.0.0.1:3306", allowed_roles = ["dba"] }},
]
nodes = [{{ hostname = "node1" }}]

[[clusters]]
name = "leaf.test"
leaf_of = "root.test"
apps = [{{ name = "echo", uri = "tcp://echo.backend.internal:7" }}]
"""
NOW = datetime.now(UTC)
ASK = Query(limit=1000, start_key="", predicate="", labels={}, words=[])


def state_with(count):
    config = parse_cluster_file(FILE.format(count=count)).clusters[0]
    return make_state(config, "", make_security_key(), NOW)


@pytest.fixture(scope="module")
def big():
    state = state_with(20_000)
    return Listings(state), state.login_identity(NOW)


def names(page):
    return [row.fields["name"] for row in page.rows]


def test_look_up_by_address_is_fast_among_twenty_thousand(big):
    listings, caller = big
    wanted = 'resource.spec.public_addr == "{0}" || resource.spec.public_addr == "{0}."'
    listings.of("app_server")  # made once
    started = time.process_time()
    for number in range(0, 20_000, 200):
        query = replace(ASK, predicate=wanted.format(f"app-{number:05d}.apps.test"), limit=1)
        page = listings.of("app_server").select(query, caller)
        assert names(page) == [f"app-{number:05d}"]
        assert page.rows[0].resource.AppServer.Spec.App.Metadata.Name == f"app-{number:05d}"
    assert (time.process_time() - started) / 100 < 0.01


def test_pages_of_twenty_thousand_hold_every_app_once(big):
    listings, caller = big
    found, key = [], ""
    started = time.process_time()
    while True:
        page = listings.of("app_server").select(replace(ASK, start_key=key), caller)
        resources = [row.resource for row in page.rows]
        assert len(auth_pb2.ListResourcesResponse(Resources=resources).SerializeToString())
        found += names(page)
        key = page.next_key
        if not key:
            break
    assert found == sorted([*(f"app-{number:05d}" for number in range(20_000)), "pg"])
    assert time.process_time() - started < 10


def test_total_counts_what_lies_before_the_page_too(big):
    listings, caller = big
    first = listings.of("app_server").select(replace(ASK, limit=10, needs_total=True), caller)
    second = replace(ASK, limit=10, needs_total=True, start_key=first.next_key)
    page = listings.of("app_server").select(second, caller)
    assert (first.total, page.total) == (20_001, 20_001)
    assert names(page)[0] == "app-00010"


def test_words_are_found_among_many(big):
    listings, caller = big
    assert names(listings.unified(["app"]).select(replace(ASK, words=["APP-19999"]), caller)) == [
        "app-19999"
    ]
    assert names(listings.unified([]).select(replace(ASK, words=["orders"]), caller)) == ["orders"]


SMALL = state_with(3)
CALLER = SMALL.login_identity(NOW)
VALUES = st.sampled_from(["app-00001", "app-00001.apps.test", "pg", "pg.apps.test", "secret", ""])
PARTS = st.builds(
    '{} {} "{}"'.format,
    st.sampled_from(["name", "resource.metadata.name", "resource.spec.public_addr"]),
    st.sampled_from(["==", "!="]),
    VALUES,
)


@given(st.lists(PARTS, min_size=1, max_size=4), st.sampled_from([" || ", " && "]), st.booleans())
def test_index_finds_what_a_look_at_every_row_finds(parts, operator, needs_total):
    listing = Listings(SMALL).of("app_server")
    predicate = operator.join(parts)
    query = replace(ASK, predicate=predicate, needs_total=needs_total)
    # Negated twice an expression means the same, and no index can be used.
    every = replace(query, predicate=f"!(!({predicate}))")
    assert names(listing.select(query, CALLER)) == names(listing.select(every, CALLER))


def test_unknown_field_is_an_error_though_the_index_would_not_look():
    with pytest.raises(PredicateError):
        Listings(SMALL).of("app_server").select(
            replace(ASK, predicate='name == "none" || resource.spec.secret == "x"'), CALLER
        )


# Known values of the rule: lower-case base32hex of 8 bytes of SHA-256, computed with coreutils.
@pytest.mark.parametrize(
    ("database", "label"),
    [("orders", "3gb8lmo0q84e8"), ("my-postgres", "3ho0kq2qjja98")],
)
def test_label_of_a_database_is_a_hash_of_its_name(database, label):
    assert vnet_dns_name(database) == label
    assert len(label) == 13


@pytest.mark.parametrize(
    "predicate",
    [
        'resource.status.vnet_dns_name == "3gb8lmo0q84e8" || name == "3gb8lmo0q84e8"',
        'resource.status.vnet_dns_name == "orders" || name == "orders"',
        'resource.metadata.name == "orders"',
    ],
)
def test_database_is_found_by_label_and_by_name(predicate):
    page = Listings(SMALL).of("db_server").select(replace(ASK, predicate=predicate), CALLER)
    assert names(page) == ["orders"]


def test_databases_of_other_roles_are_not_listed():
    listing = Listings(SMALL).of("db_server")
    assert names(listing.select(ASK, CALLER)) == ["orders"]
    both = replace(CALLER, roles=("access", "dba"))
    assert names(listing.select(ASK, both)) == ["orders", "vault"]


# --- The apps file ----------------------------------------------------------------------------

CLUSTERS = parse_cluster_file(FILE.format(count=0))


def addresses(text):
    return {
        cluster: [app.public_addr for app in apps]
        for cluster, apps in parse_apps(text, CLUSTERS).items()
    }


OWN = {"root.test": ["pg.apps.test", "secret.localhost"], "leaf.test": ["echo.leaf.test"]}


def test_empty_apps_file_changes_nothing():
    assert addresses("") == OWN


def test_apps_file_replaces_the_apps_of_the_clusters_it_names():
    text = """
    [[apps]]
    cluster = "root.test"
    name = "new"
    uri = "tcp://127.0.0.1:1"
    [[apps]]
    cluster = "root.test"
    name = "ports"
    uri = "tcp://127.0.0.1"
    tcp_ports = [{ port = 5432 }]
    """
    assert addresses(text) == {**OWN, "root.test": ["new.localhost", "ports.localhost"]}


def test_apps_file_may_leave_a_cluster_without_apps():
    assert addresses('clusters = ["root.test"]') == {**OWN, "root.test": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[apps]", "declaration"),
        ("apps = 7", "array"),
        ("nodes = []", "nodes"),
        ('clusters = ["other.test"]', "other.test"),
        ('[[apps]]\nname = "x"\nuri = "tcp://a:1"', "cluster"),
        ('[[apps]]\ncluster = "other.test"\nname = "x"\nuri = "tcp://a:1"', "other.test"),
        ('[[apps]]\ncluster = "root.test"\nname = "x"\nuri = "tcp://a"', "needs a port"),
        ('[[apps]]\ncluster = "root.test"\nname = "x"\nuri = "tcp://a:1"\nkey = 1', "key"),
    ],
)
def test_apps_file_that_is_wrong_names_what_is(text, message):
    with pytest.raises(ClusterFileError, match=message):
        parse_apps(text, CLUSTERS)


@given(st.text())
def test_any_apps_file_raises_only_its_own_error(text):
    with contextlib.suppress(ClusterFileError):
        parse_apps(text, CLUSTERS)


def test_listing_follows_the_apps_and_keeps_generated_ones():
    state = state_with(2)
    listings = Listings(state)
    caller = state.login_identity(NOW)
    assert names(listings.of("app_server").select(ASK, caller)) == ["app-00000", "app-00001", "pg"]
    app = msgspec.structs.replace(state.config.apps[0], name="new", public_addr="new.apps.test")
    state.set_apps((app,))
    assert names(listings.of("app_server").select(ASK, caller)) == ["app-00000", "app-00001", "new"]
    assert state.find_app("new.apps.test") is app
    assert state.find_app("pg.apps.test") is None
    assert state.find_app("app-00001.apps.test") is not None

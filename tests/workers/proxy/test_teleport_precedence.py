"""What a name stands for, row by row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.proxy.teleport.apps import App, OtherApp
from workers.proxy.teleport.databases import Database
from workers.proxy.teleport.errors import UnreachableError, ZonesUnknownError
from workers.proxy.teleport.precedence import (
    Answer,
    Candidate,
    Claim,
    ClusterNames,
    Directory,
    Relation,
    Row,
    candidate,
    decide,
)

ROOT = ClusterNames(
    profile="teleport.acme.test",
    web_host="teleport.acme.test",
    root="root.test",
    leaf="",
    public_host="apps.acme.test",
    zones=("apps.acme.test", "corp.test"),
)
LEAF = ClusterNames(
    profile="teleport.acme.test",
    web_host="teleport.acme.test",
    root="root.test",
    leaf="leaf.test",
    public_host="proxy.leaf.example",
    zones=("proxy.leaf.example", "zone.leaf.example"),
)
PROFILE, CLUSTER, ZONE = Relation.PROFILE, Relation.CLUSTER, Relation.ZONE
DATABASE, ROOT_DATABASE = Relation.DATABASE, Relation.ROOT_DATABASE


@pytest.mark.parametrize(
    ("name", "root", "leaf"),
    [
        # (a) one label below the profile's name: every cluster of the profile
        ("x.teleport.acme.test", {PROFILE}, {PROFILE}),
        ("y.x.teleport.acme.test", None, None),
        ("teleport.acme.test", None, None),
        # (b) below the cluster's name, at any depth
        ("x.root.test", {CLUSTER}, None),
        ("z.y.x.root.test", {CLUSTER}, None),
        ("root.test", None, None),
        ("x.leaf.test", None, {CLUSTER}),
        ("y.x.leaf.test", None, {CLUSTER}),
        ("x.leaf.test.root.test", {CLUSTER}, {CLUSTER}),
        ("leaf.test.root.test", {CLUSTER}, None),
        ("xroot.test", None, None),
        # (c) below the public address or a custom zone, at any depth
        ("x.apps.acme.test", {ZONE}, None),
        ("y.x.apps.acme.test", {ZONE}, None),
        ("apps.acme.test", None, None),
        ("x.corp.test", {ZONE}, None),
        ("y.x.corp.test", {ZONE}, None),
        ("corp.test", None, None),
        ("x.proxy.leaf.example", None, {ZONE}),
        ("y.x.zone.leaf.example", None, {ZONE}),
        ("zone.leaf.example", None, None),
        # databases: one label below db.<proxy>
        ("x.db.teleport.acme.test", {DATABASE}, {ROOT_DATABASE}),
        ("x.db.apps.acme.test", {DATABASE, ZONE}, None),
        ("x.db.proxy.leaf.example", None, {DATABASE, ZONE}),
        ("alice.x.db.teleport.acme.test", None, None),
        ("db.teleport.acme.test", {PROFILE}, {PROFILE}),
        ("x.db.corp.test", {ZONE}, None),
        # nobody's
        ("www.example.com", None, None),
        ("test", None, None),
        ("", None, None),
    ],
)
def test_which_clusters_are_candidates(name, root, leaf):
    found = [candidate(name, ROOT), candidate(name, LEAF)]
    assert [None if c is None else set(c.relations) for c in found] == [root, leaf]


@pytest.mark.parametrize(
    ("name", "names", "host", "suffix"),
    [
        ("x.root.test", ROOT, "x", "root.test"),
        ("y.x.root.test", ROOT, "y.x", "root.test"),
        ("x.leaf.test.root.test", ROOT, "x.leaf.test", "root.test"),
        ("x.leaf.test.root.test", LEAF, "x", "leaf.test.root.test"),
        ("y.x.leaf.test", LEAF, "y.x", "leaf.test"),
        ("x.corp.test", ROOT, "", ""),
    ],
)
def test_a_host_is_what_stands_before_the_clusters_name(name, names, host, suffix):
    found = candidate(name, names)
    assert (found.host, found.suffix) == (host, suffix)


def test_only_leaves_are_asked_for_apps_by_name():
    assert candidate("web.teleport.acme.test", ROOT).label == ""
    assert candidate("web.teleport.acme.test", LEAF).label == "web"
    assert candidate("web.zone.leaf.example", LEAF).label == ""


def test_a_cluster_named_like_a_top_level_domain_takes_none():
    names = ClusterNames(profile="p.test", web_host="p.test", root="com", leaf="", zones=())
    assert candidate("x.com", names) is None


def test_a_leaf_is_remote_only_where_the_name_is_in_none_of_its_zones():
    assert candidate("x.teleport.acme.test", LEAF).is_remote
    assert candidate("x.db.teleport.acme.test", LEAF).is_remote
    assert not candidate("x.leaf.test", LEAF).is_remote
    assert not candidate("x.teleport.acme.test", ROOT).is_remote
    assert not candidate("x.zone.leaf.example", LEAF).is_remote


# -- all clusters together


def test_candidates_keep_their_order_and_those_of_unknown_zones_are_among_them():
    unknown = ClusterNames(profile="b.test", web_host="b.test", root="b.root.test", leaf="")
    directory = Directory([(ROOT, "root"), (LEAF, "leaf"), (unknown, "b"), (None, "leaves of b")])
    assert [(m, c is None) for m, c in directory.find("x.teleport.acme.test")] == [
        ("root", False),
        ("leaf", False),
        ("b", True),
        ("leaves of b", True),
    ]
    assert [m for m, _ in directory.find("x.b.test")] == ["b", "leaves of b"]
    assert [(m, c is None) for m, c in directory.find("x.b.root.test")][:2] == [
        ("root", False),
        ("b", False),
    ]


@pytest.mark.parametrize("host", ["teleport.acme.test", "apps.acme.test", "proxy.leaf.example"])
def test_names_of_proxies_are_known_as_such(host):
    directory = Directory([(ROOT, "root"), (LEAF, "leaf")])
    assert directory.is_proxy(host)
    assert not directory.is_proxy(f"x.{host}")


@given(st.text(st.sampled_from("ax.-é")).filter(bool))
def test_a_directory_finds_what_each_cluster_would(name):
    names = ClusterNames(
        profile="a", web_host="x.a", root="a.x", leaf="", public_host="a.a", zones=("a.a", "x.x")
    )
    found = Directory([(names, "m")]).find(name)
    assert [c for _, c in found] == [c for c in [candidate(name, names)] if c is not None]


# -- what counts

TCP = Answer(app=App("pg", "pg.corp.test", "tcp://x:1", None))
WEB = Answer(app=OtherApp("web"))
ORDERS = Answer(database=Database("orders", "postgres"))
NOTHING = Answer()
DEAD = UnreachableError("dead")
DOUBT = ZonesUnknownError(DEAD)

zone = Candidate(frozenset({ZONE}))
database = Candidate(frozenset({DATABASE}), identifier="orders")
short = Candidate(frozenset({CLUSTER}), host="x.leaf", suffix="root.test")
long = Candidate(frozenset({CLUSTER}), host="x", suffix="leaf.root.test")


@pytest.mark.parametrize(
    ("rows", "claim", "index"),
    [
        # the first candidate that has an app decides, whatever its kind
        ([(zone, NOTHING), (zone, TCP), (zone, WEB)], Claim.TCP_APP, 1),
        ([(zone, NOTHING), (zone, WEB), (zone, TCP)], Claim.WEB_APP, 1),
        ([(zone, TCP), (zone, TCP)], Claim.TCP_APP, 0),
        # who cannot be asked is passed over when somebody has it
        ([(zone, DEAD), (zone, TCP)], Claim.TCP_APP, 1),
        ([(zone, DOUBT), (zone, WEB)], Claim.WEB_APP, 1),
        # app, database, web app, cluster
        ([(database, ORDERS), (zone, TCP)], Claim.TCP_APP, 1),
        ([(zone, WEB), (database, ORDERS)], Claim.DATABASE, 1),
        ([(short, NOTHING), (database, ORDERS)], Claim.DATABASE, 1),
        ([(short, NOTHING), (zone, WEB)], Claim.WEB_APP, 1),
        ([(database, NOTHING), (database, ORDERS)], Claim.DATABASE, 1),
        # a database that does not exist is nobody's, also below a cluster's name
        ([(database, NOTHING)], Claim.NO_DATABASE, 0),
        ([(short, NOTHING), (database, NOTHING)], Claim.NO_DATABASE, 1),
        ([(database, NOTHING), (zone, WEB)], Claim.WEB_APP, 1),
        ([(database, NOTHING), (zone, DEAD)], Claim.NO_DATABASE, 0),
        # the longest cluster name
        ([(short, NOTHING)], Claim.CLUSTER, 0),
        ([(short, NOTHING), (long, NOTHING)], Claim.CLUSTER, 1),
        ([(short, DEAD), (long, NOTHING)], Claim.CLUSTER, 1),
        ([(long, NOTHING), (zone, DEAD)], Claim.CLUSTER, 0),
        ([(long, NOTHING), (zone, TCP)], Claim.TCP_APP, 1),
        # nobody
        ([(zone, NOTHING), (zone, NOTHING)], None, -1),
        ([], None, -1),
    ],
)
def test_what_a_name_stands_for(rows, claim, index):
    decision = decide([Row(*row) for row in rows])
    assert (decision.claim, decision.index) == (claim, index)
    assert decision.is_final
    assert decision.failure is None


@pytest.mark.parametrize(
    ("rows", "failure"),
    [
        ([(zone, DEAD), (zone, NOTHING)], DEAD),
        ([(zone, DOUBT), (zone, DEAD)], DEAD),
        ([(zone, DOUBT), (zone, NOTHING)], DOUBT),
        # the cluster whose name it is must have said that it has no such app
        ([(short, NOTHING), (long, DEAD)], DEAD),
        # nor may a database be denied while somebody may have it
        ([(database, NOTHING), (database, DEAD)], DEAD),
    ],
)
def test_without_a_claim_a_failure_leaves_it_open(rows, failure):
    decision = decide([Row(*row) for row in rows])
    assert decision.claim is None
    assert decision.is_final
    assert decision.failure is failure


@pytest.mark.parametrize(
    ("rows", "claim", "is_final"),
    [
        ([(zone, TCP), (zone, None)], Claim.TCP_APP, True),
        ([(zone, None), (zone, TCP)], Claim.TCP_APP, False),
        ([(zone, WEB), (zone, None)], Claim.WEB_APP, True),
        ([(zone, None), (zone, WEB)], Claim.WEB_APP, False),
        ([(zone, WEB), (database, None)], Claim.WEB_APP, False),
        ([(database, ORDERS), (zone, None)], Claim.DATABASE, False),
        ([(long, NOTHING), (zone, None)], Claim.CLUSTER, False),
        ([(long, None), (zone, NOTHING)], None, False),
        ([(long, None), (zone, DEAD)], None, False),
        ([(zone, None)], None, False),
        ([(database, NOTHING), (database, None)], None, False),
        ([(database, NOTHING), (zone, None)], Claim.NO_DATABASE, False),
    ],
)
def test_who_has_not_answered_matters_only_where_it_could_change_something(rows, claim, is_final):
    decision = decide([Row(*row) for row in rows])
    assert (decision.claim, decision.is_final) == (claim, is_final)
    assert decision.failure is None


candidates = st.sampled_from([zone, database, short, long])
outcomes = st.sampled_from([TCP, WEB, ORDERS, NOTHING, DEAD, DOUBT, None])


@given(st.lists(st.tuples(candidates, outcomes), max_size=5), st.data())
def test_a_final_decision_is_not_changed_by_later_answers(rows, data):
    decision = decide([Row(*row) for row in rows])
    if not decision.is_final:
        return
    answered = [
        Row(c, data.draw(outcomes.filter(bool)) if outcome is None else outcome)
        for c, outcome in rows
    ]
    later = decide(answered)
    assert (later.claim, later.index) == (decision.claim, decision.index)

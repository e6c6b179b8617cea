"""Whom the cluster lets through to which app and database."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from demo.cluster.config import parse_cluster_file
from demo.cluster.errors import AccessError, ClusterFileError, NotFoundError
from demo.cluster.faults import Faults
from demo.cluster.identity import AppRoute, DatabaseRoute
from demo.cluster.state import AppSession, authorize_app, authorize_database, make_state
from demo.cluster.webauthn import make_security_key

FILE = """
[[clusters]]
name = "root.test"
proxy_addr = "localhost:0"
access_requests = [{ id = "request-1", roles = ["dba", "access"] }]
apps = [{ name = "pg", uri = "tcp://127.0.0.1:5432", public_addr = "pg.root.test" }]
databases = [
  { name = "orders", protocol = "postgres", uri = "127.0.0.1:5432" },
  { name = "guarded", protocol = "postgres", uri = "127.0.0.1:5432", session_mfa = true },
  { name = "vault", protocol = "mysql", uri = "127.0.0.1:3306", allowed_roles = ["dba"] },
]

[[clusters]]
name = "leaf.test"
leaf_of = "root.test"
databases = [{ name = "stock", protocol = "sqlserver", uri = "127.0.0.1:1433" }]
"""
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def root():
    root, leaf = (
        make_state(cluster, "", make_security_key(), NOW)
        for cluster in parse_cluster_file(FILE).clusters
    )
    leaf.root = root
    root.leaves[leaf.name] = leaf
    return root


def identity(root, name, protocol="postgres", **changes):
    return replace(
        root.login_identity(NOW),
        **{
            "roles": ("access",),
            "usage": ("usage:db",),
            "route_to_database": DatabaseRoute(name, protocol),
            **changes,
        },
    )


def test_database_of_the_root_and_of_a_leaf(root):
    assert authorize_database(root, identity(root, "orders"), "postgres", NOW).name == "orders"
    at_leaf = identity(root, "stock", "sqlserver", route_to_cluster="leaf.test")
    assert authorize_database(root, at_leaf, "sqlserver", NOW).name == "stock"


def test_certificate_without_usage_may_lead_to_a_database(root):
    assert authorize_database(root, identity(root, "orders", usage=()), "postgres", NOW)


@pytest.mark.parametrize(
    ("name", "changes", "connection", "error"),
    [
        ("orders", {"route_to_database": None}, "postgres", AccessError),
        ("orders", {"usage": ("usage:apps",)}, "postgres", AccessError),
        ("orders", {"expires": NOW}, "postgres", AccessError),
        ("orders", {"not_before": NOW + timedelta(minutes=1)}, "postgres", AccessError),
        ("orders", {"roles": ("other",)}, "postgres", AccessError),
        ("orders", {"protocol": "mysql"}, "mysql", AccessError),
        ("orders", {"protocol": "mysql"}, "postgres", AccessError),
        ("orders", {}, "mysql", AccessError),
        ("guarded", {}, "postgres", AccessError),
        ("vault", {"protocol": "mysql"}, "mysql", AccessError),
        ("gone", {}, "postgres", NotFoundError),
        ("stock", {"protocol": "sqlserver"}, "sqlserver", NotFoundError),
        ("orders", {"route_to_cluster": "other.test"}, "postgres", NotFoundError),
        ("orders", {"route_to_cluster": ""}, "postgres", NotFoundError),
    ],
    ids=str,
)
def test_database_that_may_not_be_reached(root, name, changes, connection, error):
    with pytest.raises(error):
        authorize_database(root, identity(root, name, **changes), connection, NOW)


def test_second_factor_and_role_open_what_demands_them(root):
    verified = identity(root, "guarded", mfa_verified="device")
    assert authorize_database(root, verified, "postgres", NOW)
    dba = identity(root, "vault", "mysql", roles=("dba",))
    assert authorize_database(root, dba, "mysql", NOW)


def test_database_of_an_offline_leaf_is_not_found(root):
    at_leaf = identity(root, "stock", "sqlserver", route_to_cluster="leaf.test")
    root.faults = Faults(leaf_offline=frozenset({"leaf.test"}))
    try:
        with pytest.raises(NotFoundError):
            authorize_database(root, at_leaf, "sqlserver", NOW)
    finally:
        root.faults = Faults()


def test_certificates_for_apps_and_databases_are_not_interchangeable(root):
    session = root.sessions.create(AppSession("alice", NOW + timedelta(hours=1)), NOW)
    route = AppRoute("pg", "pg.root.test", "root.test", session)
    both = identity(root, "orders", route_to_app=route)
    assert authorize_app(root, replace(both, usage=("usage:apps",)), NOW).name == "pg"
    with pytest.raises(AccessError):
        authorize_app(root, both, NOW)
    with pytest.raises(AccessError):
        authorize_database(root, replace(both, usage=("usage:apps",)), "postgres", NOW)


def test_login_has_the_roles_of_its_access_requests(root):
    made = root.login_identity(NOW)
    assert (made.roles, made.access_requests) == (("access", "dba"), ("request-1",))
    assert root.roles_with(()) == ("access",)
    with pytest.raises(NotFoundError):
        root.roles_with(("request-2",))


def test_clock_of_the_cluster_is_its_own(root):
    root.faults = Faults(clock_seconds=3600)
    try:
        assert abs(root.now() - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=1)
    finally:
        root.faults = Faults()


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ('mfa_devices = ["fax"]', "mfa_devices"),
        ("home_layout = 15", "home_layout"),
        ("generated_apps = -1", "generated_apps"),
        ('access_requests = [{ id = "a", roles = [] }]', "roles"),
        (
            'access_requests = [{ id = "a", roles = ["x"] }, { id = "a", roles = ["y"] }]',
            "access_requests",
        ),
    ],
)
def test_impossible_keys_are_named(keys, named):
    text = f'[[clusters]]\nname = "root.test"\nproxy_addr = "localhost:0"\n{keys}\n'
    with pytest.raises(ClusterFileError, match=named):
        parse_cluster_file(text)

"""What a connection to a port of a name means: every row of the table, and what is remembered."""

import pytest
from glue_fakes import PROFILE, WEB_PORT, app_target, cluster_target, database_target

from ipc.messages import Refusal
from workers.proxy.teleport.targets import NoSuchName, NotOurs, WebApp
from workers.proxy.undecided import (
    MEANINGS,
    Meaning,
    Port,
    WebNames,
    error_of,
    meaning_of,
)

PORTS = {Port.WEB: WEB_PORT, Port.SSH: 22, Port.OTHER: 5432}
WEB = WebApp(PROFILE, "grafana")
ROWS = [
    (app_target(), Port.WEB, Meaning.DIAL),
    (app_target(), Port.SSH, Meaning.DIAL),
    (app_target(), Port.OTHER, Meaning.DIAL),
    (database_target(), Port.WEB, Meaning.DIAL),
    (database_target(), Port.SSH, Meaning.DIAL),
    (database_target(), Port.OTHER, Meaning.DIAL),
    (cluster_target(), Port.WEB, Meaning.RELAY_FOR_NOW),
    (cluster_target(), Port.SSH, Meaning.SSH),
    (cluster_target(), Port.OTHER, Meaning.NO_APP),
    (WEB, Port.WEB, Meaning.RELAY),
    (WEB, Port.SSH, Meaning.WEB_ONLY),
    (WEB, Port.OTHER, Meaning.WEB_ONLY),
    (NotOurs(), Port.WEB, Meaning.GONE),
    (NotOurs(), Port.SSH, Meaning.GONE),
    (NotOurs(), Port.OTHER, Meaning.GONE),
    (NoSuchName(), Port.WEB, Meaning.GONE),
    (NoSuchName(), Port.SSH, Meaning.GONE),
    (NoSuchName(), Port.OTHER, Meaning.GONE),
]


@pytest.mark.parametrize(
    ("found", "port", "meaning"), ROWS, ids=[f"{type(f).__name__}-{p.name}" for f, p, _ in ROWS]
)
def test_row(found, port, meaning):
    assert meaning_of(found, PORTS[port], WEB_PORT) is meaning


def test_every_row_is_tested():
    assert {(type(found), port) for found, port, _ in ROWS} == MEANINGS.keys()


def test_web_port_counts_before_ssh_and_may_be_unknown():
    assert meaning_of(cluster_target(), 22, 22) is Meaning.RELAY_FOR_NOW
    assert meaning_of(WEB, 443, None) is Meaning.WEB_ONLY


@pytest.mark.parametrize(
    ("meaning", "refusal", "words"),
    [
        (Meaning.SSH, Refusal.INTERNAL, "another worker"),
        (Meaning.NO_APP, Refusal.UNKNOWN_APP, "no app and no database"),
        (Meaning.WEB_ONLY, Refusal.PORT_NOT_ALLOWED, f"port {WEB_PORT} alone"),
        (Meaning.GONE, Refusal.UNKNOWN_APP, "any more"),
    ],
)
def test_refused_meaning_has_a_reason(meaning, refusal, words):
    error = error_of(meaning, WEB_PORT)
    assert error.refusal is refusal
    assert words in str(error)


def test_web_name_is_remembered_for_its_time():
    names = WebNames(seconds=15)
    assert names.profile_of("x.test", 443, 0.0) is None
    names.remember("x.test", 443, "p", 100.0)
    assert names.profile_of("x.test", 443, 114.9) == "p"
    assert names.profile_of("x.test", 443, 115.0) is None
    assert names.profile_of("x.test", 80, 100.0) is None
    assert names.profile_of("y.test", 443, 100.0) is None


def test_web_names_of_a_profile_are_forgotten_together():
    names = WebNames()
    names.remember("x.test", 443, "p", 0.0)
    names.remember("y.test", 443, "q", 0.0)
    names.forget("p")
    assert names.profile_of("x.test", 443, 1.0) is None
    assert names.profile_of("y.test", 443, 1.0) == "q"


def test_web_names_have_a_limit():
    names = WebNames(max_names=2)
    for name in ("a", "b", "a", "c"):
        names.remember(name, 443, "p", 0.0)
    known = [name for name in "abc" if names.profile_of(name, 443, 1.0)]
    assert known == ["a", "c"]

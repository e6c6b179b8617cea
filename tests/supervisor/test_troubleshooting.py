"""docs/troubleshooting.md and the catalogue of reasons against the code that makes the sentences."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc.messages import Cluster, ClusterState, Refusal
from supervisor import reasons, status_report
from supervisor.cli import status_view
from supervisor.reasons import WORDINGS, ReasonId, reason_id, reason_ids
from supervisor.run import ObservedRun
from supervisor.status import Health, Status

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "troubleshooting.md"
PARTS = ("You see: ", "Why: ", "Do: ", "Check: ")

OSCONFIG = "supervisor/osconfig"
# Who makes sentences for `vnet status`, and what of theirs is none although it reads like one.
MAKERS: dict[str, set[str]] = {
    "ipc/cluster_report.py": set(),
    "supervisor/access.py": {"X: correct it, then run: vnet reload"},  # follows a problem
    "supervisor/cluster_follower.py": set(),
    "supervisor/clusters.py": set(),
    "supervisor/forwarding.py": {
        # Clauses.
        (
            "it overlaps the virtual range X: give one of them other addresses (VNet's own address alone"
            " may be listed: X)"
        ),
        (
            "packets are rewritten here, which does not keep their source: have this host masquerade what"
            " goes to X, and list X instead"
        ),
    },
    "supervisor/metrics_endpoint.py": set(),
    "supervisor/network_watch.py": set(),
    # Follows what is not answered: a way to a worker.
    "supervisor/probe_blame.py": set(),
    "supervisor/status.py": set(),
    "supervisor/waiting_start.py": {
        "not a request: X",
        "only root and X may do that: run it with sudo",
        "X Until then it can be stopped only, and restarted by its service manager.",
    },
    f"{OSCONFIG}/choose.py": set(),
    f"{OSCONFIG}/file_state.py": set(),
    # What was undone.
    f"{OSCONFIG}/journal.py": {"X is done.", "X is as it was.", "X is restored."},
    f"{OSCONFIG}/macos_resolver.py": set(),
    # The first line of a file.
    f"{OSCONFIG}/networkmanager.py": {"# VNet's zones. Removed when VNet stops."},
    # An error at the start.
    f"{OSCONFIG}/os_settings.py": {"X: stop it (vnet stop), or set --state-dir"},
    f"{OSCONFIG}/resolv_conf_backend.py": set(),
    f"{OSCONFIG}/resolvconf_backend.py": set(),
    f"{OSCONFIG}/resolved.py": set(),
    "workers/proxy/ssh/housekeeping.py": {
        # Behind "SSH clients are not set up".
        "X holds no public key: remove it, and VNet makes a new pair",
        "X is no Ed25519 key without password: remove it, and VNet makes a new one",
    },
    # What is wrong with one profile is its cluster's problem: the state tells the kind.
    "workers/proxy/teleport/home.py": {
        "X: X: run tsh login --proxy=X",
        "X: no host authority of cluster X: X",
        "the login expired at X: run tsh login --proxy=X",
        (
            "X: the private key is in a hardware token, which VNet cannot use: ask your administrator"
            " for a login without hardware key policy"
        ),
    },
}
# Sentences without a sign of one, by who makes them.
PLAIN = {
    "X has not been read yet: wait": "workers/proxy/teleport/client.py",
    "security.allow_users: the system knows no user X": "supervisor/access.py",
    "security.allow_users and allow_groups cannot be looked up (X)": "supervisor/access.py",
}
# Every list of sentences that the status is made of has its makers above.
LISTS = {
    "range_problems", "network_problems", "probe_problems", "os_problems", "metrics_problems",
    "access_problems", "access_warnings", "forwarding_warnings",
}  # fmt: skip
# Who words what UNTRUSTED goes by.
TRUST = ("auth_client.py", "carriers.py", "channel.py")


@functools.cache
def texts_in(path: str) -> tuple[str, ...]:
    """Every text of a module but docstrings and log lines; what is filled in is X."""
    tree = ast.parse((ROOT / path).read_text())
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant() as docstring):
                inner.add(docstring)
            case ast.JoinedStr():
                inner |= set(ast.walk(node)) - {node}
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "logger"))):
                inner |= set(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str() as text) if node not in inner:
                found.append(text)
            case ast.JoinedStr() if node not in inner:
                found.append(
                    "".join(
                        getattr(part, "value", "X") if isinstance(part, ast.Constant) else "X"
                        for part in node.values
                    )
                )
    return tuple(found)


def sentences_in(path: str) -> list[str]:
    """What reads like a sentence of its own: some words, with a stop or a colon."""
    return [
        text
        for text in map(str.strip, texts_in(path))
        if len(re.findall(r"[a-z]{2,}", text)) >= 2
        and "\n" not in text
        and (text.endswith(".") or ": " in text)
    ]


def headings(part: str) -> dict[str, str]:
    """The sections of one part of the guide, with their texts."""
    text = GUIDE.read_text().split(f"\n## {part}\n")[1].split("\n## ")[0]
    _, *sections = text.split("\n### ")
    return {section.partition("\n")[0]: section.partition("\n")[2] for section in sections}


# -- the code against the catalogue --


@pytest.mark.parametrize("path", MAKERS)
def test_every_sentence_that_the_status_may_show_has_a_kind(path):
    unknown = {text for text in sentences_in(path) if reason_id(text) is ReasonId.OTHER}
    assert unknown - MAKERS[path] == set(), (
        "a kind in supervisor/reasons.py and a section in docs/troubleshooting.md are missing, or the"
        " text belongs into MAKERS as none of a status"
    )


@pytest.mark.parametrize(("text", "path"), PLAIN.items())
def test_sentences_without_a_stop_have_a_kind_too(text, path):
    assert any(reasons._fits(text.replace("X", "*"), found) for found in texts_in(path)), "gone"
    assert reason_id(text) is not ReasonId.OTHER


@pytest.mark.parametrize(
    ("kind", "wording"), [(kind, wording) for kind, wordings in WORDINGS for wording in wordings]
)
def test_every_wording_is_one_that_the_code_makes(kind, wording):
    assert reason_id(wording.replace("*", "x")) is kind, "another kind is found first"
    made = [text for path in [*MAKERS, *PLAIN.values()] for text in texts_in(path)]
    assert any(reasons._fits(wording, text) for text in made)


@pytest.mark.parametrize("wording", reasons._UNTRUSTED)
def test_every_wording_of_distrust_is_one_that_the_code_makes(wording):
    made = [text for name in TRUST for text in texts_in(f"workers/proxy/teleport/{name}")]
    assert any(reasons._fits(wording, text) for text in made)


def test_no_list_of_sentences_is_without_makers():
    tree = ast.parse(Path(status_report.__file__).read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    lists = {name for name in read if name.endswith(("_problems", "_warnings"))}
    assert lists == LISTS, "whoever makes these belongs into MAKERS"
    offered = {name for name in dir(ObservedRun) if name.endswith(("_problems", "_warnings"))}
    assert offered == LISTS


# -- what is known of a reason --


def cluster(state: ClusterState, problem: str) -> Cluster:
    return Cluster(
        name="c", profile="p", leaf_of=None, state=state, user="alice", expires=None, zones=[],
        ranges=[], problem=problem,
    )  # fmt: skip


@pytest.mark.parametrize("state", ClusterState)
def test_the_state_of_a_cluster_tells_the_kind_whatever_its_words_are(state):
    words = "The workers are starting: wait."
    [kind] = reason_ids([words], [cluster(state, words)])
    assert kind not in (ReasonId.OTHER, ReasonId.STARTING)


def test_an_untrusted_cluster_is_told_from_an_unreachable_one():
    texts = [
        "c: the server's certificate is not trusted (expired): if the cluster's authority was rotated, run x",
        "c cannot be reached at p:443: Connection refused",
    ]
    found = reason_ids(texts, [cluster(ClusterState.UNREACHABLE, text) for text in texts])
    assert found == ["cluster-untrusted", "cluster-unreachable"]


@given(st.lists(st.text(max_size=200), max_size=5))
def test_any_words_have_one_kind_each(texts):
    assert len(reason_ids(texts, ())) == len(texts)


def test_what_fits_a_wording():
    assert reasons._fits("a", "a")
    assert not reasons._fits("a", "ab")
    assert reasons._fits("The * is *: wait.", "The worker is starting: wait.")
    assert not reasons._fits("*ab*ba*", "aba"), "the same letters do not count twice"
    assert not reasons._fits("ab*ba", "aba")
    assert reasons._fits("* cannot be read (*): run", "x cannot be read (y): run")


def test_words_that_were_chosen_to_be_slow_are_looked_at_once():
    """A worker chooses up to 500 characters; each wording may take a look at each of them, no more."""

    class Counted(str):
        __slots__ = ()
        looks = 0

        def find(self, *arguments):
            Counted.looks += 1
            return super().find(*arguments)

    text = Counted("x is left out: " * 33)
    assert reason_id(text) is ReasonId.OTHER
    pieces = sum(wording.count("*") for _, wordings in WORDINGS for wording in wordings)
    assert Counted.looks <= pieces


# -- the guide --


def test_the_guide_has_a_section_for_every_kind_of_reason_and_no_other():
    assert list(headings("Reasons")) == [kind.value for kind in ReasonId]


def test_the_guide_has_a_section_for_every_refusal_and_no_other():
    refusals = [refusal.value for refusal in Refusal if refusal is not Refusal.PROBE]
    assert sorted(headings("Refused connections")) == sorted([*refusals, "http_refused"])


@pytest.mark.parametrize("part", ["Common problems", "Reasons", "Refused connections"])
def test_every_section_says_what_is_seen_why_what_to_do_and_what_to_check(part):
    for heading, text in headings(part).items():
        starts = [paragraph.partition(": ")[0] + ": " for paragraph in text.split("\n\n")]
        found = [start.strip("\n") for start in starts if start.strip("\n") in PARTS]
        assert tuple(found) == PARTS, heading
        assert "`" in text.split("Check: ")[1], f"{heading}: a command to check with"


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links(path: Path) -> Iterator[tuple[Path, str]]:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        yield (path.parent / name if name else path), anchor


def test_links_of_the_guide_lead_somewhere():
    found = list(links(GUIDE))
    assert len(found) > 20
    for path, anchor in found:
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), (path.name, anchor)


# -- the status --


def test_status_names_the_sections_once_and_only_when_something_is_wrong():
    degraded = Status(
        health=Health.DEGRADED,
        reasons=["a: b", "c: d", "e: f"],
        reason_ids=["firewall", "login-expired", "firewall"],
    )
    shown = [line.strip() for line in status_view.lines(degraded)]
    assert "see docs/troubleshooting.md: firewall, login-expired" in shown
    starting = msgspec.structs.replace(degraded, health=Health.STARTING)
    assert not any("troubleshooting" in line for line in status_view.lines(starting))

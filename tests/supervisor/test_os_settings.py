"""The thread that sets up the resolver, and `vnet repair`."""

import logging
import selectors
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from run_fakes import NETWORK, make_workers
from run_fakes import settings as supervisor_settings

from supervisor.cli import repair
from supervisor.exits import ConflictError, ExitStatus
from supervisor.host import Host
from supervisor.nameservers import Nameservers
from supervisor.osconfig import journal as journal_module
from supervisor.osconfig import os_settings
from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.choose import Facts
from supervisor.osconfig.journal import Journal
from supervisor.osconfig.os_settings import OsSettings
from supervisor.osconfig.resolv_conf_backend import ResolvConfBackend
from supervisor.osconfig.wish import ResolverWish
from supervisor.supervisor import Supervisor

SERVER = bytes([100, 64, 0, 2])


def wish(*zones: str) -> ResolverWish:
    return ResolverWish("vnet0", 7, zones, (SERVER,))


def wait_until(look: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Recorder:
    """A back end that notes what it is told; `gate` lets it go on."""

    name = "resolved"

    def __init__(self) -> None:
        self.said: list[object] = []
        self.error: Exception | None = None
        self.found: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def apply(self, wanted: ResolverWish) -> None:
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        self.said.append(wanted.zones)

    def undo(self) -> None:
        assert self.gate.wait(20)
        self.said.append("undo")

    def upstream(self):
        return [("192.0.2.1", 53, "")]

    def check(self) -> list[str]:
        return self.found


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(os_settings, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(os_settings, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(journal_module, "LOCK_SECONDS", 0.0)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "state"
    path.mkdir()
    return path


@pytest.fixture
def make(state, quick, recorder):
    made: list[OsSettings] = []

    def make(wanted: str = "resolv.conf", **options) -> OsSettings:
        options = {
            "make": lambda _name, _journal: recorder,
            "look": lambda _journal: Facts(),
        } | options
        made.append(OsSettings(wanted, state, **options))
        return made[-1]

    yield make
    recorder.gate.set()
    for each in made:
        each.close()


def test_zones_are_set_up_follow_logins_and_are_undone_at_the_end(make, recorder):
    settings = make()
    assert settings.backend_name == "none"
    settings.want(wish("one.test"))
    wait_until(lambda: recorder.said == [("one.test",)])
    wait_until(lambda: settings.upstream() == [("192.0.2.1", 53, "")])
    assert settings.backend_name == "resolv.conf"
    settings.want(wish("one.test", "two.test"))
    wait_until(lambda: recorder.said[1:] == [("one.test", "two.test")])
    settings.want(wish())
    wait_until(lambda: recorder.said[2:] == ["undo"])
    wait_until(lambda: settings.upstream() is None)
    settings.close()
    assert recorder.said[3:] == ["undo"]


def test_the_nameservers_are_told_before_programs_are_sent_to_vnet(make, recorder):
    """Otherwise VNet asks for a moment who asks it in turn."""
    settings = make(on_upstream=lambda: recorder.said.append(settings.upstream()))
    settings.want(wish("one.test"))
    wait_until(lambda: recorder.said == [[("192.0.2.1", 53, "")], ("one.test",)])
    settings.want(wish("one.test", "two.test"))
    wait_until(lambda: recorder.said[2:] == [("one.test", "two.test")])
    settings.want(wish())
    wait_until(lambda: recorder.said[3:] == ["undo", None])


def test_a_zone_makes_the_status_wait_in_the_turn_in_which_it_is_heard(make, recorder):
    run = Supervisor(supervisor_settings(), logging.NullHandler())
    run.workers |= make_workers("dns")
    run._os_settings = make()
    run._host = Host.__new__(Host)
    run._host.network = NETWORK
    run._host.clusters = SimpleNamespace(zones=[])  # type: ignore[assignment]
    run._host._os_settings = run._os_settings
    run._host._is_served = lambda: True
    recorder.gate.clear()
    hear = SimpleNamespace(take=lambda *_: run._host.clusters.zones.append("one.test"))
    run._conversation = hear  # type: ignore[assignment]
    speaker = SimpleNamespace(is_talking=True, receive=lambda _now: ["a report"])
    run._talk(speaker, selectors.EVENT_READ)  # type: ignore[arg-type]
    assert run.os_problems == ["The system's resolver is being set up: wait."]
    recorder.gate.set()
    wait_until(lambda: run.os_problems == [])


def test_the_supervisor_never_waits_and_only_the_last_wish_counts(make, recorder):
    settings = make()
    recorder.gate.clear()
    settings.want(wish("one.test"))
    began = time.monotonic()
    for number in range(100):
        settings.want(wish(f"zone-{number}.test"))
    assert time.monotonic() - began < 10  # the gate is waited for twice as long
    assert settings.problems == ["The system's resolver is being set up: wait."]
    recorder.gate.set()
    wait_until(lambda: recorder.said[-1:] == [("zone-99.test",)])
    assert len(recorder.said) <= 2
    wait_until(lambda: settings.problems == [])


def test_what_fails_is_a_problem_and_is_tried_again(make, recorder):
    settings = make()
    recorder.error = OsConfigError("It cannot be done: do something.")
    settings.want(wish("one.test"))
    wait_until(lambda: settings.problems == ["It cannot be done: do something."])
    recorder.error = RuntimeError("a fault")
    wait_until(lambda: "a fault; report that" in settings.problems[0])
    recorder.error = PermissionError(13, "Permission denied", "/etc/file")
    wait_until(lambda: "(/etc/file: Permission denied): mend that" in settings.problems[0])
    recorder.error = None
    wait_until(lambda: recorder.said == [("one.test",)])
    wait_until(lambda: settings.problems == [])
    recorder.found = ["Someone is in the way."]
    wait_until(lambda: settings.problems == ["Someone is in the way."])
    recorder.found = []
    wait_until(lambda: settings.problems == [])


def test_what_only_one_look_has_found_is_no_problem(make, recorder, monkeypatch):
    """A service may be restarted just then, and VNet sets it up again a moment later."""
    settings = make()
    gone, restarts = ["It is gone: do something."], OsConfigError("It does not run: start it.")
    steps = [gone, [], gone, gone, [], restarts, [], restarts, restarts]
    told = []

    def check() -> list[str]:
        told.append(settings.problems)  # after the step before
        step = steps[len(told) - 1] if len(told) <= len(steps) else []
        if isinstance(step, OsConfigError):
            raise step
        return step

    monkeypatch.setattr(recorder, "check", check)
    settings.want(wish("one.test"))
    wait_until(lambda: len(told) > len(steps) + 1)
    assert told[: len(steps) + 2] == [[], [], [], [], gone, [], [], [], [], [str(restarts)], []]


def test_what_each_look_finds_in_other_words_is_a_problem(make, recorder, monkeypatch):
    """A program says its process id, for example."""
    settings = make()
    told = []

    def check() -> list[str]:
        told.append(settings.problems)  # after the look before
        raise OsConfigError(f"resolvconf[{len(told)}] has failed: run it by hand.")

    monkeypatch.setattr(recorder, "check", check)
    settings.want(wish("one.test"))
    wait_until(lambda: len(told) > 4)
    after = [[f"resolvconf[{number}] has failed: run it by hand."] for number in (2, 3, 4)]
    assert told[:5] == [[], [], *after]


def test_a_new_complaint_beside_one_that_stays_is_doubted(make, recorder, monkeypatch):
    settings = make()
    old, new = "It is gone: do something.", "It is empty: fill it."
    steps = [[old], [old], [old, new], [old], [old, new], [old, new]]
    told = []

    def check() -> list[str]:
        told.append(settings.problems)  # after the step before
        return steps[min(len(told), len(steps)) - 1]

    monkeypatch.setattr(recorder, "check", check)
    settings.want(wish("one.test"))
    wait_until(lambda: len(told) > len(steps))
    assert told[: len(steps) + 1] == [[], [], [old], [old], [old], [old], [old, new]]


def test_a_back_end_that_is_impossible_leaves_vnet_running_with_a_reason(make, recorder):
    settings = make("resolved")
    settings.want(wish("one.test"))
    wait_until(lambda: "is not possible" in "".join(settings.problems))
    assert settings.backend_name == "none"


def test_a_system_that_cannot_be_asked_leaves_vnet_running_with_a_reason(make):
    def look(_journal):
        raise ValueError("nonsense")

    settings = make("auto", look=look)
    settings.want(wish("one.test"))
    wait_until(lambda: "nonsense" in "".join(settings.problems))


def test_none_touches_nothing_but_what_an_earlier_vnet_left(make, recorder, state, tmp_path):
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    left_by_a_dead_vnet(state, path)
    settings = make("none")
    assert path.read_text() == "nameserver 192.0.2.1\n"
    settings.want(wish("one.test"))
    settings.close()
    assert recorder.said == []
    assert settings.problems == []


def test_two_vnets_with_one_state_directory_are_a_conflict(make):
    make()
    with pytest.raises(ConflictError, match="set --state-dir"):
        make()


def test_a_state_directory_that_cannot_be_used_costs_the_resolver_only(make, state, recorder):
    (state / "os-lock").mkdir()
    settings = make()
    assert "cannot be used" in settings.problems[0]
    settings.want(wish("one.test"))
    settings.close()
    assert recorder.said == []


def test_while_it_is_held_nothing_is_changed(make, recorder):
    settings = make()
    settings.want(wish("one.test"))
    wait_until(lambda: recorder.said)
    wait_until(settings.hold)
    settings.want(wish("two.test"))
    time.sleep(0.1)
    assert recorder.said == [("one.test",)]
    settings.release()
    wait_until(lambda: recorder.said[1:] == [("two.test",)])


def test_an_end_that_takes_too_long_is_left_to_the_next_start(make, recorder, monkeypatch):
    monkeypatch.setattr(os_settings, "CLOSE_SECONDS", 0.05)
    settings = make()
    settings.want(wish("one.test"))
    wait_until(lambda: recorder.said)
    recorder.gate.clear()
    began = time.monotonic()
    settings.close()
    assert time.monotonic() - began < 5


def test_the_nameservers_of_the_back_end_come_before_those_of_the_file():
    known: list[tuple[str, int, str]] | None = [("192.0.2.1", 53, ""), ("100.64.0.2", 53, "")]
    found = Nameservers([], [SERVER], lambda: known)
    assert [server.address for server in found.upstream] == [bytes([192, 0, 2, 1])]
    known = [("192.0.2.9", 53, "")]
    assert found.has_changed(float("inf"))
    assert [server.address for server in found.upstream] == [bytes([192, 0, 2, 9])]
    configured = Nameservers(["192.0.2.77"], [SERVER], lambda: known)
    assert [server.address for server in configured.upstream] == [bytes([192, 0, 2, 77])]


# -- vnet repair --


def left_by_a_dead_vnet(state, path) -> None:
    journal = Journal(state)
    ResolvConfBackend(journal, path).apply(wish("one.test"))
    journal.close()
    assert "100.64.0.2" in path.read_text()


@pytest.fixture
def resolv_conf(state, tmp_path, quick):
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 192.0.2.1\n")
    left_by_a_dead_vnet(state, path)
    return path


@pytest.fixture
def as_root(monkeypatch):
    monkeypatch.setattr(repair.os, "geteuid", lambda: 0)
    monkeypatch.setattr(repair.os, "fchown", lambda *_arguments: None)


def test_repair_says_what_it_has_undone(as_root, state, resolv_conf, capsys):
    assert repair.repair(state) is ExitStatus.OK
    assert capsys.readouterr().out == f"undone: {resolv_conf} is restored.\n"
    assert resolv_conf.read_text() == "nameserver 192.0.2.1\n"
    assert repair.repair(state) is ExitStatus.OK
    assert capsys.readouterr().out == "there is nothing to undo\n"


def test_repair_says_what_it_has_left_and_why(as_root, state, resolv_conf, capsys):
    resolv_conf.write_text("nameserver 192.0.2.200\n")
    assert repair.repair(state) is ExitStatus.DEGRADED
    out = capsys.readouterr().out
    assert out.startswith(f"left: {resolv_conf} was changed by another program")
    assert resolv_conf.read_text() == "nameserver 192.0.2.200\n"


def test_repair_without_anything_to_repair(as_root, tmp_path, capsys):
    assert repair.repair(tmp_path / "no-such-directory") is ExitStatus.OK
    assert capsys.readouterr().out == "there is nothing to undo\n"


def test_repair_leaves_a_running_vnet_alone(as_root, make, state, resolv_conf):
    make("none")
    with pytest.raises(repair.RepairError, match="stop it first") as caught:
        repair.repair(state)
    assert caught.value.status is ExitStatus.CONFLICT


def test_repair_is_for_root(monkeypatch, state):
    monkeypatch.setattr(repair.os, "geteuid", lambda: 1000)
    with pytest.raises(repair.RepairError, match="sudo") as caught:
        repair.repair(state)
    assert caught.value.status is ExitStatus.NOT_PERMITTED

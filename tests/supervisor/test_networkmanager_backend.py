"""NetworkManager's dnsmasq: the file it reads, and what NetworkManager is told; on a real bus."""

import itertools
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bus_bed import FakeNetworkManager, PrivateBus
from fault_steps import dying, kill_self, tree

from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.dbus import SystemBus
from supervisor.osconfig.journal import JOURNAL, Journal, Outcome
from supervisor.osconfig.networkmanager import (
    UNDO_CALLS,
    NetworkManagerBackend,
    drop_in_text,
    leave_alone,
)
from supervisor.osconfig.wish import ResolverWish

V4, V6 = bytes((100, 64, 0, 2)), bytes((0xFD, *[0] * 14, 2))
WISH = ResolverWish("vnet0", 7, ("corp.example.test", "db.example.test"), (V4, V6))
TEXT = """\
# VNet's zones. Removed when VNet stops.
server=/corp.example.test/100.64.0.2
server=/corp.example.test/fd00::2
rebind-domain-ok=/corp.example.test/
server=/db.example.test/100.64.0.2
server=/db.example.test/fd00::2
rebind-domain-ok=/db.example.test/
"""
RELOAD = ("org.freedesktop.NetworkManager", "Reload", (4,))
# The limit of 2 s, and what a busy machine adds.
BOUNDED_SECONDS = 4.0


@pytest.fixture
def bus(tmp_path, monkeypatch):
    found = PrivateBus(tmp_path)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", found.address)
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture
def manager(bus):
    with FakeNetworkManager(bus.address) as found:
        yield found


@pytest.fixture
def system_bus(bus):
    found = SystemBus(bus.environment)
    yield found
    found.close()


@pytest.fixture
def journal(tmp_path, bus):
    (tmp_path / "state").mkdir()
    found = Journal(tmp_path / "state", UNDO_CALLS)
    yield found
    found.close()


@pytest.fixture
def drop_in(tmp_path):
    (tmp_path / "dnsmasq.d").mkdir()
    return tmp_path / "dnsmasq.d/vnet.conf"


@pytest.fixture
def backend(system_bus, journal, drop_in, tmp_path):
    return NetworkManagerBackend(system_bus, journal, drop_in, tmp_path / "uplinks")


def test_the_file_names_a_server_for_each_zone():
    assert drop_in_text(WISH) == TEXT


def test_without_zones_or_for_the_root_there_is_no_file():
    assert drop_in_text(replace(WISH, zones=())) == ""
    assert drop_in_text(replace(WISH, zones=("", "com"))) == ""
    assert drop_in_text(replace(WISH, servers=())) == ""


def test_the_file_is_written_then_read_and_gone_after_the_undo(backend, manager, drop_in, tmp_path):
    seen = []
    manager.answers["Reload"] = lambda _body, _path: seen.append(drop_in.exists()) or ("", ())
    backend.apply(WISH)
    assert drop_in.read_text() == TEXT
    assert backend.check() == []
    backend.undo()
    assert seen == [True, False]
    assert not drop_in.exists()
    assert not (tmp_path / "state" / JOURNAL).exists()
    backend.undo()
    assert manager.calls.count(RELOAD) == 2


def test_dnsmasq_is_started_anew_only_when_something_changes(backend, manager, drop_in):
    backend.apply(WISH)
    backend.apply(WISH)
    backend.apply(replace(WISH, index=9))
    assert manager.calls.count(RELOAD) == 1
    backend.apply(replace(WISH, zones=("new.example.test",)))
    assert "/new.example.test/" in drop_in.read_text()
    assert "corp" not in drop_in.read_text()
    assert manager.calls.count(RELOAD) == 2
    backend.apply(replace(WISH, zones=()))
    assert not drop_in.exists()
    assert manager.calls.count(RELOAD) == 3
    assert backend.check() == []


def test_a_file_that_was_there_comes_back(backend, manager, drop_in):
    drop_in.write_text("server=/old.example.test/192.0.2.1\n")
    drop_in.chmod(0o640)
    backend.apply(WISH)
    assert drop_in.read_text() == TEXT
    backend.undo()
    assert drop_in.read_text() == "server=/old.example.test/192.0.2.1\n"
    assert drop_in.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("step", ["entry written", "file written", "never"])
def test_after_a_crash_the_next_start_undoes_it(backend, journal, manager, drop_in, tmp_path, step):
    class CrashError(Exception):
        pass

    def crash(reached):
        if reached == step:
            raise CrashError

    journal.reached = crash
    try:
        backend.apply(WISH)
    except CrashError:
        assert step != "never"
    journal.close()
    next_start = Journal(tmp_path / "state", UNDO_CALLS)
    try:
        assert {undone.outcome for undone in next_start.undo()} == {Outcome.UNDONE}
    finally:
        journal._lock = next_start._lock  # closed by the fixture
    assert not drop_in.exists()
    assert manager.calls[-1] == RELOAD


def applied_and_undone(bus: PrivateBus, directory: Path, step: int) -> bool:
    """In a process that is killed right before this step; whether it has come to its end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            journal = Journal(directory / "state", UNDO_CALLS)
            backend = NetworkManagerBackend(
                SystemBus(bus.environment),
                journal,
                directory / "dnsmasq.d/vnet.conf",
                directory / "uplinks",
            )
            with dying(step, die=kill_self):
                backend.apply(WISH)
                backend.apply(replace(WISH, zones=("new.example.test",)))
                backend.undo()
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended) in (0, -signal.SIGKILL)
    return ended == 0


@pytest.mark.parametrize("before", ["", "server=/old.example.test/192.0.2.1\n"])
def test_killed_at_each_step_the_next_start_restores_all(bus, manager, drop_in, tmp_path, before):
    if before:
        drop_in.write_text(before)
        drop_in.chmod(0o640)
    (tmp_path / "state").mkdir()
    was = tree(drop_in.parent)
    for step in itertools.count():
        is_over = applied_and_undone(bus, tmp_path, step)
        next_start = Journal(tmp_path / "state", UNDO_CALLS)
        outcomes = {undone.outcome for undone in next_start.undo()}
        next_start.close()
        assert outcomes <= {Outcome.UNDONE}, step
        assert tree(drop_in.parent) == was, step
        if is_over:
            break
    assert 10 < step < 99


def test_an_undo_without_network_manager_leaves_nothing(backend, manager, drop_in, tmp_path):
    backend.apply(WISH)
    manager.stop()
    backend.undo()
    assert not drop_in.exists()
    assert not (tmp_path / "state" / JOURNAL).exists()


def test_a_network_manager_that_hangs_costs_2_seconds_and_is_told(backend, manager):
    manager.hanging = {"*"}
    began = time.monotonic()
    with pytest.raises(OsConfigError, match="does not answer"):
        backend.apply(WISH)
    assert time.monotonic() - began < BOUNDED_SECONDS
    manager.hanging = set()
    assert backend.check() == []
    assert manager.calls.count(RELOAD) == 1


def test_a_reload_that_fails_is_tried_again(backend, manager, drop_in):
    works = manager.answers.pop("Reload")
    with pytest.raises(OsConfigError, match="dnsmasq is not told"):
        backend.apply(WISH)
    manager.answers["Reload"] = works
    assert backend.check() == []
    backend.apply(WISH)
    assert manager.calls.count(RELOAD) == 2
    assert drop_in.read_text() == TEXT


def test_another_mode_is_told_and_nothing_written(backend, manager, drop_in):
    manager.dns["Mode"] = ("s", "default")
    with pytest.raises(OsConfigError, match="DNS mode is 'default', not 'dnsmasq'"):
        backend.apply(WISH)
    assert not drop_in.exists()


def test_a_missing_directory_is_told(backend, manager, drop_in):
    drop_in.parent.rmdir()
    with pytest.raises(OsConfigError, match="make it"):
        backend.apply(WISH)


def test_what_others_do_meanwhile_is_told(backend, manager, drop_in):
    backend.apply(WISH)
    drop_in.write_text("server=/other.example.test/192.0.2.1\n")
    (sentence,) = backend.check()
    assert "was changed by another program" in sentence
    manager.dns["Mode"] = ("s", "default")
    assert "not 'dnsmasq'" in backend.check()[0]
    manager.stop()
    assert "does not run" in backend.check()[0]


def test_upstream_are_the_servers_that_dnsmasq_asks(backend, manager, tmp_path):
    assert backend.upstream() is None
    (tmp_path / "uplinks").write_text(
        "nameserver 127.0.0.1\nnameserver 100.64.0.2\nnameserver 192.0.2.53\nnameserver fe80::1%eth7\n"
    )
    backend.apply(WISH)
    assert backend.upstream() == [("192.0.2.53", 53, ""), ("fe80::1", 53, "eth7")]


def test_vnets_interface_is_not_managed(backend, manager):
    backend.apply(WISH)
    assert manager.devices == {"vnet0": False}
    sets = manager.members().count("Set")
    backend.undo()
    backend.apply(WISH)
    assert manager.members().count("Set") == sets == 1


def test_an_interface_that_network_manager_does_not_know_is_nothing_to_tell(
    system_bus, manager, caplog
):
    leave_alone(system_bus.within(), "vnet9")
    assert caplog.text == ""
    assert manager.devices == {"vnet0": True}

"""The decisions of the confinement, without a kernel."""

import os
from pathlib import Path

import pytest
from run_fakes import NETWORK, USER, settings

from ipc.permits import Role
from supervisor.config import parse
from supervisor.configure import Surroundings
from supervisor.confinement import identities
from supervisor.confinement.awaited import Awaited
from supervisor.confinement.identities import NOBODY, assign
from supervisor.confinement.landlock_rules import (
    NEWEST_VERSION,
    READ,
    FileRight,
    FileRule,
    NetRight,
    Reach,
    Scope,
    fitted,
    ruleset,
    shortcomings,
)
from supervisor.confinement.reach import reach_of
from supervisor.privileges import Identity

SLOTS = ["tun", "proxy-0", "proxy-1", "dns"]
PROGRAM = (Path("/opt/vnet"),)


def around(**changed: object) -> Surroundings:
    values: dict[str, object] = {
        "network": NETWORK,
        "upstream": [],
        "keys": {},
        "bus_dir": Path("/run/vnet/bus"),
        "book_path": Path("/var/lib/vnet/alice/book.sqlite"),
        "prompts_dir": Path("/run/vnet/mfa"),
    }
    return Surroundings(**values | changed)  # type: ignore[arg-type]


# -- who --


def test_each_worker_without_files_is_a_user_of_its_own():
    found = assign(SLOTS, USER, [7, 8, 9])
    assert found.bus_group == 7
    assert {slot: (i.uid, i.gid, i.extra_group) for slot, i in found.of.items()} == {
        "tun": (8, 8, 7),
        "proxy-0": (USER.uid, USER.gid, 7),
        "proxy-1": (USER.uid, USER.gid, 7),
        "dns": (9, 9, 7),
    }


def test_metrics_is_not_let_into_the_bus_directory():
    found = assign([*SLOTS, "metrics"], USER, [7, 8, 9, 10])
    assert found.of["metrics"] == Identity(10, 10, 10)
    assert found.of["tun"].extra_group == found.bus_group == 7


def test_without_numbers_nobody_is_left():
    found = assign(SLOTS, USER, [7])
    assert found.of["tun"].uid == found.of["dns"].uid == NOBODY


def test_numbers_of_users_groups_and_processes_are_not_free(monkeypatch):
    taken = set(identities.FREE_NUMBERS) - {64_200}
    assert identities.free_numbers(taken) == [64_200]
    status = "Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \nVmPeak:\t 11 kB\n"
    assert set(identities._numbers_of_process(status)) == set(range(1, 11))


def test_numbers_outside_the_user_namespace_are_not_used(monkeypatch):
    """As for root in a container that has only itself."""
    monkeypatch.setattr(identities, "_read", lambda _path: "         0       1000          1\n")
    monkeypatch.setattr(identities.os, "geteuid", lambda: 0)
    found = identities.choose(SLOTS, USER)
    assert found.bus_group is None
    assert {identity.uid for identity in found.of.values()} == {os.getuid()}


def test_another_user_than_root_stays_who_it_is(monkeypatch):
    monkeypatch.setattr(identities.os, "geteuid", lambda: 1000)
    found = identities.choose(SLOTS, USER)
    assert found.bus_group is None
    assert {identity.uid for identity in found.of.values()} == {os.getuid()}


# -- files --


def test_only_proxies_reach_files_but_for_the_spare_descriptor():
    assert ruleset(Role.TUN, Reach(), PROGRAM).rules == ()
    assert ruleset(Role.METRICS, Reach(), PROGRAM).rules == ()
    [rule] = ruleset(Role.DNS, Reach(), PROGRAM).rules
    assert (rule.path, rule.rights) == (Path("/dev/null"), FileRight.READ_FILE)


def test_proxy_may_change_only_its_state():
    reach = reach_of("proxy-1", settings(), around())
    rules = ruleset(Role.PROXY, reach, PROGRAM).rules
    changing = {rule.path for rule in rules if rule.rights & ~READ}
    assert changing == {Path("/var/lib/vnet/alice"), Path("/run/vnet/mfa")}
    readable = {rule.path for rule in rules}
    assert {Path("/home/alice/.tsh"), Path("/opt/vnet"), Path("/etc")} <= readable
    assert not readable & {Path("/"), Path("/home"), Path("/home/alice"), Path("/proc")}


def test_proxy_may_read_its_ca_file():
    def awaited(text: str) -> set[Path]:
        config = parse(f'[teleport]\nca_file = "{text}"\n')
        rules = reach_of("proxy-0", settings(config), around()).rules
        return {rule.path for rule in rules if rule.is_awaited}

    home = Path("/home/alice/.tsh")
    assert awaited("/etc/ca.pem") == {home, Path("/etc/ca.pem")}
    assert awaited("/home/alice/.tsh/ca.pem") == {home}


def test_only_those_that_are_joined_get_a_place_on_the_bus():
    slots = [*SLOTS, "metrics"]
    bus_dirs = {slot: reach_of(slot, settings(), around()).bus_dir for slot in slots}
    bus = Path("/run/vnet/bus")
    assert bus_dirs == {"tun": bus, "proxy-0": bus, "proxy-1": bus, "dns": None, "metrics": None}


def test_execution_is_never_allowed():
    for role in set(Role) - {Role.SUPERVISOR}:
        wanted = ruleset(role, reach_of("proxy-0", settings(), around()), PROGRAM)
        assert not any(rule.rights & FileRight.EXECUTE for rule in wanted.rules)


def test_rights_of_a_newer_kernel_are_left_out():
    wanted = ruleset(Role.TUN, Reach(), ())
    assert fitted(wanted, 1).files == FileRight((1 << 13) - 1)
    assert (fitted(wanted, 3).net, fitted(wanted, 5).scope) == (NetRight(0), Scope(0))
    assert fitted(wanted, NEWEST_VERSION) == fitted(wanted, NEWEST_VERSION + 50) == wanted


@pytest.mark.parametrize("version", range(1, NEWEST_VERSION + 1))
def test_what_an_older_landlock_lacks_is_told(version):
    told = " ".join(shortcomings(version))
    assert ("TCP ports" in told) == (version < 4)
    assert ("signals" in told) == (version < 6)


# -- what comes later --


def test_new_path_is_noticed_and_a_vanished_one_is_not(tmp_path):
    home, other = tmp_path / "tsh", tmp_path / "other"
    awaited = Awaited([FileRule(home, READ, is_awaited=True), FileRule(other, READ)])
    other.mkdir()
    assert awaited.what_is_new() is None
    home.mkdir()
    assert awaited.what_is_new() == home
    awaited = Awaited([FileRule(home, READ, is_awaited=True)])
    (home / "file").touch()
    assert awaited.what_is_new() is None
    home.rename(tmp_path / "away")
    assert awaited.what_is_new() is None
    home.mkdir()
    assert awaited.what_is_new() == home

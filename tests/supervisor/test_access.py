"""Whom the configuration means, and whether this system says who connects."""

import errno
import grp
import os
import pwd
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import codec
from ipc import messages as m
from ipc.permits import Role
from ipc.socket_owner import Owner
from supervisor import access as module
from supervisor.access import (
    Account,
    Security,
    UnansweredError,
    allowed,
    ask_system,
    lookup_socket,
    resolvers,
    try_out,
)
from supervisor.config import SecurityConfig
from supervisor.exits import MisconfiguredError
from supervisor.reasons import ReasonId, reason_id
from supervisor.settings import User

VNET_SUPERVISOR = str(Path(sys.executable).with_name("vnet-supervisor"))
PASSWD = """root:x:0:0:root:/root:/bin/bash
systemd-resolve:x:990:990:systemd Resolver:/:/usr/sbin/nologin
dnsmasq:x:991:65534::/var/lib/misc:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
named
"""
USER = User(name="alice", uid=1000, gid=1000, home=Path("/home/alice"))


class FakeAccounts:
    def __init__(self) -> None:
        self.known = [
            Account("root", 0, 0),
            Account("alice", 1000, 1000),
            Account("bob", 1001, 1001),
            Account("carol", 1002, 500),
            Account("dave", 1003, 1003),
            Account("nobody", 65534, 65534),
        ]
        self.groups = {"devs": (500, ["bob", "gone"]), "empty": (501, [])}
        self.enumerated = 0

    def user(self, name: str) -> Account | None:
        return next((user for user in self.known if user.name == name), None)

    def group(self, name: str) -> tuple[int, list[str]] | None:
        return self.groups.get(name)

    def users(self) -> Iterable[Account]:
        self.enumerated += 1
        return self.known


@pytest.fixture(autouse=True)
def _another_system(monkeypatch, tmp_path):
    """Without user namespaces, and with resolvers of its own."""
    monkeypatch.setattr(module, "unmapped_uid", lambda: None)
    (tmp_path / "passwd").write_text(PASSWD)
    monkeypatch.setattr(module, "_PASSWD", tmp_path / "passwd")


def test_listed_and_primary_members_of_groups_are_meant():
    accounts = FakeAccounts()
    found = allowed(SecurityConfig(allow_users=["dave"], allow_groups=["devs", "empty"]), accounts)
    assert found.uids == {1001, 1002, 1003}
    assert found.problems == []


def test_users_are_enumerated_only_for_groups():
    accounts = FakeAccounts()
    allowed(SecurityConfig(allow_users=["dave"]), accounts)
    assert accounts.enumerated == 0


def test_unknown_names_are_problems_with_their_keys():
    accounts = FakeAccounts()
    config = SecurityConfig(allow_users=["bob", "zoe"], allow_groups=["nope", "devs"])
    found = allowed(config, accounts)
    assert found.problems == [
        "security.allow_users: the system knows no user 'zoe'",
        "security.allow_groups: the system knows no group 'nope'",
    ]
    assert found.uids == {1001, 1002}


@pytest.mark.parametrize("name", ["zoe-that-is-not-there", "", "a\0b", "x" * 5000])
def test_names_that_no_system_has_are_a_configuration_error(name):
    for config in (SecurityConfig(allow_users=[name]), SecurityConfig(allow_groups=[name])):
        with pytest.raises(MisconfiguredError) as raised:
            module.check(config)
        assert len(raised.value.problems) == 1
        assert raised.value.problems[0].startswith("security.allow_")


def test_too_many_users_are_a_problem_and_the_vnet_user_stays():
    accounts = FakeAccounts()
    accounts.known += [Account(f"u{n}", n, 500) for n in range(2, 10_100) if n != 1000]
    config = SecurityConfig(allow_groups=["devs"])
    [problem] = allowed(config, accounts).problems
    assert problem.startswith("security.allow_groups:")
    user = User(name="alice", uid=4_000_000, gid=1, home=Path("/"))
    found = Security(user, accounts=accounts).look_up(config, 1, "none")
    assert len(found.uids) == 10_000
    assert {0, 4_000_000} < set(found.uids)


def test_the_systems_own_accounts_are_asked():
    name = pwd.getpwuid(0).pw_name
    config = SecurityConfig(allow_users=[name], allow_groups=[grp.getgrgid(0).gr_name])
    module.check(config)
    found = ask_system(config)
    assert 0 in found.uids
    assert found == allowed(config, module.SystemAccounts())


def test_a_name_service_that_hangs_is_not_waited_for(monkeypatch):
    """The supervisor's loop waits meanwhile, and its watchdog for the loop."""
    sleeping = (sys.executable, "-c", "import time; time.sleep(600)")
    monkeypatch.setattr(module, "_LOOKUP", sleeping)
    monkeypatch.setattr(module, "LOOKUP_SECONDS", 0.2)
    config = SecurityConfig(allow_users=["bob"])
    with pytest.raises(UnansweredError, match=r"not answered within 0\.2 s"):
        module.check(config)
    security = Security(USER)
    assert security.look_up(config, 1, "none").uids == [0, 1000]
    [warning] = security.warnings
    assert reason_id(warning) is ReasonId.USER_UNKNOWN
    assert warning.endswith("run: vnet reload")


@pytest.mark.parametrize("program", ["raise SystemExit(1)", "print('[]')", "pass"])
def test_an_answer_that_is_none_is_no_configuration_error(monkeypatch, program):
    monkeypatch.setattr(module, "_LOOKUP", (sys.executable, "-c", program))
    with pytest.raises(UnansweredError, match="cannot be looked up"):
        module.check(SecurityConfig(allow_groups=["devs"]))


def test_nobody_is_asked_when_nobody_is_named(monkeypatch):
    monkeypatch.setattr(module, "_LOOKUP", ("/nowhere/python",))
    module.check(SecurityConfig())
    assert Security(USER).look_up(SecurityConfig(), 1, "none").uids == [0, 1000]


def test_who_was_found_stays_while_the_system_does_not_answer(monkeypatch):
    name = pwd.getpwuid(1).pw_name
    config, other = SecurityConfig(allow_users=[name]), SecurityConfig(allow_users=[name, "root"])
    security = Security(USER)
    assert security.look_up(config, 1, "none").uids == [0, 1000, 1]
    monkeypatch.setattr(module, "_LOOKUP", ("/nowhere/python",))
    assert security.look_up(config, 1, "none").uids == [0, 1000, 1]
    assert len(security.warnings) == 1
    assert security.look_up(other, 1, "none").uids == [0, 1000]


def test_numbers_that_no_user_has_are_left_out(tmp_path):
    """The kernel calls a socket without a user like the number -1 here, and a message has no room for more."""
    accounts = FakeAccounts()
    accounts.known.append(Account("broken", -1, 1))
    (tmp_path / "passwd").write_text(f"named:x:{'9' * 30}:1::/:/\n{PASSWD}")
    security = Security(USER, accounts=accounts)
    found = security.look_up(SecurityConfig(allow_users=["broken", "bob"]), 1, "none")
    assert (found.uids, found.resolvers) == ([0, 1000, 1001], [990, 991])
    changed = m.SecurityChanged(access=found, http=m.HttpRules())
    assert codec.decode(codec.encode(changed), Role.SUPERVISOR, Role.DNS) == changed


def test_resolvers_ask_for_all_and_nobody_only_for_networkmanager():
    assert resolvers(PASSWD, "resolved") == {990, 991}
    assert resolvers(PASSWD, "networkmanager") == {990, 991, 65534}


@given(st.text(), st.text(":0123456789\u0664", max_size=20))
def test_any_list_of_accounts_is_read(before, after):
    lines = f"{before}\nunbound:{after}\n{PASSWD}"
    assert resolvers(lines, "none") >= {990, 991}


def test_the_vnet_user_and_root_may_always_connect():
    security = Security(USER, accounts=FakeAccounts())
    found = security.look_up(SecurityConfig(allow_users=["bob"]), 7, "resolved")
    assert (found.uids, found.user, found.interface) == ([0, 1000, 1001], "alice", 7)
    assert found.resolvers == [990, 991]
    assert found.can_tell
    assert found.is_checked
    assert security.problems == security.warnings == []
    assert security.back_end == "resolved"


def test_an_account_that_is_gone_is_a_warning_while_vnet_runs():
    accounts = FakeAccounts()
    security = Security(USER, accounts=accounts)
    config = SecurityConfig(allow_users=["bob", "dave"])
    security.look_up(config, 1, "none")
    accounts.known = [user for user in accounts.known if user.name != "bob"]
    assert security.look_up(config, 1, "none").uids == [0, 1000, 1003]
    assert security.warnings == [
        "security.allow_users: the system knows no user 'bob': correct it, then run: vnet reload"
    ]
    assert security.problems == []


def test_in_a_user_namespace_nobody_is_never_allowed(monkeypatch):
    monkeypatch.setattr(module, "unmapped_uid", lambda: 65534)
    security = Security(USER, accounts=FakeAccounts())
    config = SecurityConfig(allow_users=["nobody", "bob"])
    found = security.look_up(config, 1, "networkmanager")
    assert found.uids == [0, 1000, 1001]
    assert found.resolvers == [990, 991]


def test_a_kernel_that_cannot_tell_lets_nobody_in_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(module, "why_unable", lambda: "it does not find TCP sockets")
    security = Security(USER, accounts=FakeAccounts())
    found = security.look_up(SecurityConfig(), 1, "none")
    assert not found.can_tell
    assert found.is_checked
    [problem] = security.problems
    assert "it does not find TCP sockets" in problem
    assert "modprobe -a tcp_diag udp_diag" in problem
    monkeypatch.setattr(module, "why_unable", lambda: "")
    assert security.look_up(SecurityConfig(), 1, "none").can_tell
    assert security.problems == []


def test_macos_that_cannot_tell_lets_all_in_and_says_so(monkeypatch):
    monkeypatch.setattr(module, "_IS_MACOS", True)
    monkeypatch.setattr(module, "why_unable", lambda: "sysctl says no")
    security = Security(USER, accounts=FakeAccounts())
    assert not security.look_up(SecurityConfig(), 1, "none").is_checked
    assert security.problems == []
    [warning] = security.warnings
    assert "all of its users may" in warning


def test_this_kernel_tells():
    assert module.why_unable() == ""


OWN = Owner(os.geteuid(), 1, 1)


@pytest.mark.parametrize(
    ("tcp", "udp", "why"),
    [
        (OWN, OWN, ""),
        (None, OWN, "it does not find TCP sockets"),
        (OWN, None, "it does not find UDP sockets"),
        (OWN._replace(uid=77), OWN, f"it calls uid {os.geteuid()} the uid 77"),
        (OSError(errno.EPERM, "not for you"), OWN, "not for you"),
    ],
)
def test_the_trial_takes_nothing_but_the_right_answer(tcp, udp, why):
    def ask(answer):
        def asked(*_ends: object) -> Owner | None:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return asked

    assert try_out(ask(tcp), ask(udp)) == why


def test_only_those_who_ask_get_a_socket_each_and_one_of_their_own():
    with (
        lookup_socket("tun", can_tell=True) as none,
        lookup_socket("metrics", can_tell=True) as none_either,
    ):
        assert none == none_either == []
    if sys.platform != "linux":
        return
    with (
        lookup_socket("proxy-0", can_tell=True) as one,
        lookup_socket("ssh", can_tell=True) as other,
        lookup_socket("dns", can_tell=False) as third,
    ):
        assert len({*one, *other, *third}) == 3
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(one[0])


def test_where_the_kernel_does_not_tell_a_socket_that_cannot_be_made_is_told(monkeypatch, caplog):
    def fail() -> None:
        raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")

    monkeypatch.setattr(module.SocketDiag, "open", fail)
    with lookup_socket("proxy-0", can_tell=False) as none:
        assert none == []
    assert "proxy-0 cannot ask which user connects" in caplog.text


@pytest.mark.parametrize(("key", "kind"), [("allow_users", "user"), ("allow_groups", "group")])
def test_check_config_finds_names_that_are_unknown(tmp_path, key, kind):
    path = tmp_path / "vnet.toml"
    path.write_text(f'[security]\n{key} = ["zoe-that-is-not-there"]\n')
    done = subprocess.run(
        [VNET_SUPERVISOR, "--check-config", "--config", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"vnet-supervisor: security.{key}: the system knows no {kind} 'zoe-that-is-not-there'\n"
    )

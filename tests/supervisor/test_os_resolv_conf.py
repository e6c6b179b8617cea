"""`/etc/resolv.conf`: the text, and the back end that follows what others do with the file."""

import os
from pathlib import Path

import pytest
from fault_steps import mount_point, tree
from hypothesis import given
from hypothesis import strategies as st

from supervisor.osconfig.backend import OsConfigError
from supervisor.osconfig.journal import Journal
from supervisor.osconfig.resolv_conf import compose, nameservers, without_vnet
from supervisor.osconfig.resolv_conf_backend import FIGHT_SECONDS, MAX_FIGHTS, ResolvConfBackend
from supervisor.osconfig.wish import ResolverWish

OWN = ("100.64.0.2", "fd60:67ec:4325::2")
WISH = ResolverWish(
    "vnet0",
    7,
    ("demo.test",),
    (bytes([100, 64, 0, 2]), bytes.fromhex("fd6067ec4325") + bytes(9) + b"\x02"),
)
BEFORE = """\
# by hand
nameserver 192.0.2.1
nameserver fe80::1%eth0
nameserver 192.0.2.3
search corp.test example.org
options ndots:2 edns0
"""
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
lines = st.one_of(
    addresses.map("nameserver {}".format),
    st.sampled_from(
        ["search a.test b.test", "options rotate", "options edns0", "sortlist 1.2.3.4"]
    ),
    st.sampled_from(["# comment", "; other", "", "nameserver", "nameserver not-one", "  "]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
texts = st.lists(lines, max_size=12).map("\n".join)


class Etc:
    """An `/etc` of our own with the back end for it."""

    def __init__(self, directory: Path) -> None:
        self.etc, self.state = directory / "etc", directory / "state"
        for made in (self.etc, self.state):
            made.mkdir()
        self.path = self.etc / "resolv.conf"
        self.now = 0.0
        self.journal = Journal(self.state)
        self.backend = self.make()

    def make(self) -> ResolvConfBackend:
        return ResolvConfBackend(
            self.journal,
            self.path,
            uplinks=self.etc / "uplinks",
            lists_others=True,
            clock=lambda: self.now,
        )

    def start_again(self) -> list[str]:
        """Another VNet after one that died: what it undoes."""
        self.journal.close()
        self.journal = Journal(self.state)
        self.backend = self.make()
        return [undone.text for undone in self.journal.undo()]

    def check_twice(self) -> list[str]:
        return self.backend.check() + self.backend.check()

    @property
    def servers(self) -> list[str]:
        text = self.path.read_text(errors="surrogateescape")
        return [host for host, _ in nameservers(text)]

    @property
    def upstream(self) -> list[str]:
        return [host for host, _, _ in self.backend.upstream() or ()]


@pytest.fixture
def etc(tmp_path):
    made = Etc(tmp_path)
    yield made
    made.journal.close()


def test_vnet_is_first_and_the_rest_stays():
    others = [("192.0.2.1", ""), ("fe80::1", "eth0"), ("192.0.2.3", "")]
    assert compose(BEFORE, OWN, others).splitlines()[1:] == [
        "nameserver 100.64.0.2",
        "nameserver 192.0.2.1",
        "nameserver fe80::1%eth0",
        "search corp.test example.org",
        "options ndots:2 edns0",
    ]


@pytest.mark.parametrize(
    ("before", "others"),
    [("options rotate\nnameserver 192.0.2.1\n", [("192.0.2.1", "")]), (BEFORE, [])],
)
def test_only_vnet_is_named_where_others_would_be_asked_in_turn(before, others):
    assert [host for host, _ in nameservers(compose(before, OWN, others))] == list(OWN)


@given(texts, st.lists(st.tuples(addresses, st.just("")), max_size=9))
def test_whatever_the_file_is_vnet_is_asked_first_and_other_lines_stay(before, others):
    made = compose(before, OWN, others)
    servers = nameservers(made)
    assert servers[0] == (OWN[0], "")
    assert sum(line.split()[:1] == ["nameserver"] for line in made.splitlines()) <= 3
    kept = [line for line in before.splitlines() if line.split() and line.split()[0][0] not in "#;"]
    kept = [line for line in kept if line.split()[0] != "nameserver"]
    assert [line for line in made.splitlines()[1:] if not line.startswith("nameserver ")] == kept
    assert not {host for host, _ in nameservers(without_vnet(made, OWN))} & set(OWN)


@given(texts)
def test_a_file_without_vnet_stays_to_the_byte_when_vnet_is_taken_out_of_it(text):
    own = [host for host in OWN if host not in text]
    assert without_vnet(text, own) == text


def test_the_old_nameservers_become_upstream(etc):
    etc.path.write_text(BEFORE)
    etc.backend.apply(WISH)
    assert etc.servers == ["100.64.0.2", "192.0.2.1", "fe80::1"]
    assert etc.backend.upstream() == [
        ("192.0.2.1", 53, ""),
        ("fe80::1", 53, "eth0"),
        ("192.0.2.3", 53, ""),
    ]


def test_vnet_never_asks_itself(etc):
    etc.path.write_text("nameserver 100.64.0.2\nnameserver 192.0.2.1\n")
    etc.backend.apply(WISH)
    assert etc.upstream == ["192.0.2.1"]
    etc.backend.undo()
    # It was a leftover of a VNet whose journal is lost.
    assert etc.path.read_text() == "nameserver 192.0.2.1\n"


def test_where_the_stub_of_systemd_resolved_is_named_its_uplinks_are_asked(etc):
    """It would read VNet's address in this file and ask VNet in turn."""
    etc.path.write_text("nameserver 127.0.0.53\noptions edns0 trust-ad\n")
    (etc.etc / "uplinks").write_text("nameserver 192.0.2.1\nnameserver 100.64.0.2\n")
    etc.backend.apply(WISH)
    assert etc.servers == ["100.64.0.2", "192.0.2.1"]
    assert etc.upstream == ["192.0.2.1"]


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o755])
def test_a_file_comes_back_with_mode_and_owner(etc, mode):
    etc.path.write_bytes(b"nameserver 192.0.2.1\r\n\xff\xfe no newline")
    etc.path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(etc.path, 4711, 4712)
    before = tree(etc.etc)
    etc.backend.apply(WISH)
    assert etc.servers[0] == "100.64.0.2"
    assert etc.path.stat().st_mode & 0o7777 == mode
    etc.backend.undo()
    etc.backend.undo()
    assert tree(etc.etc) == before
    assert not (etc.state / "os-changes.json").exists()
    assert not (etc.state / "os-backup").exists()


@pytest.mark.parametrize("target", ["../run/resolv.conf", "missing"])
def test_a_link_comes_back_and_its_target_is_never_touched(etc, target):
    (etc.etc.parent / "run").mkdir()
    real = etc.etc.parent / "run/resolv.conf"
    real.write_text(BEFORE)
    etc.path.symlink_to(target)
    before = tree(etc.etc.parent / "run"), tree(etc.etc)
    etc.backend.apply(WISH)
    assert etc.servers[0] == "100.64.0.2"
    assert not etc.path.is_symlink()
    etc.backend.undo()
    assert (tree(etc.etc.parent / "run"), tree(etc.etc)) == before


def test_what_the_owner_of_a_links_target_writes_becomes_upstream(etc):
    real = etc.etc / "real"
    real.write_text("nameserver 192.0.2.1\n")
    etc.path.symlink_to("real")
    etc.backend.apply(WISH)
    real.write_text("nameserver 192.0.2.9\nsearch new.test\n")
    assert etc.backend.check() == []
    assert etc.upstream == ["192.0.2.9"]
    assert etc.servers == ["100.64.0.2", "192.0.2.9"]
    assert "search new.test" in etc.path.read_text()


def test_without_a_file_one_is_made_and_removed(etc):
    etc.backend.apply(WISH)
    assert etc.servers == list(OWN)
    etc.backend.undo()
    assert not etc.path.exists()


def test_a_mount_point_is_written_in_place(etc):
    etc.path.write_text(BEFORE * 3)
    before, inode = tree(etc.etc), etc.path.stat().st_ino
    with mount_point(etc.path):
        etc.backend.apply(WISH)
        assert etc.servers[0] == "100.64.0.2"
        assert etc.path.stat().st_ino == inode
        etc.backend.undo()
    assert tree(etc.etc) == before


def test_at_a_mount_point_the_kernel_may_take_a_part_at_a_time(etc, monkeypatch):
    """As when the disk is nearly full."""
    etc.path.write_text(BEFORE * 3)
    before, pwrite = tree(etc.etc), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    with mount_point(etc.path):
        etc.backend.apply(WISH)
        assert etc.servers[0] == "100.64.0.2"
        assert "\0" not in etc.path.read_text()
        etc.backend.undo()
    assert tree(etc.etc) == before


@pytest.mark.parametrize("how", ["replaced", "in place", "link"])
def test_what_a_dhcp_client_writes_becomes_upstream_and_is_what_comes_back(etc, how):
    etc.path.write_text(BEFORE)
    etc.backend.apply(WISH)
    new = "nameserver 192.0.2.200\nsearch other.test\n"
    match how:
        case "replaced":
            (etc.etc / "tmp").write_text(new)
            (etc.etc / "tmp").replace(etc.path)
        case "in place":
            etc.path.write_text(new)
        case _:
            (etc.etc / "dhcp").write_text(new)
            etc.path.unlink()
            etc.path.symlink_to("dhcp")
    newest = tree(etc.etc)
    assert etc.check_twice() == []
    assert etc.servers == ["100.64.0.2", "192.0.2.200"]
    assert etc.upstream == ["192.0.2.200"]
    etc.backend.undo()
    assert tree(etc.etc) == newest


def test_a_file_with_the_same_bytes_and_another_mode_is_someone_elses(etc):
    etc.path.write_text(BEFORE)
    etc.path.chmod(0o600)
    etc.backend.apply(WISH)
    etc.path.unlink()
    etc.path.write_text(BEFORE)
    newest = tree(etc.etc)
    etc.check_twice()
    assert etc.servers[0] == "100.64.0.2"
    etc.backend.undo()
    assert tree(etc.etc) == newest


def test_a_file_that_someone_empties_is_theirs(etc):
    (etc.etc / "real").write_text("nameserver 192.0.2.1\n")
    etc.path.symlink_to("real")
    etc.backend.apply(WISH)
    etc.path.write_text("")
    newest = tree(etc.etc)
    etc.check_twice()
    assert etc.servers[0] == "100.64.0.2"
    etc.backend.undo()
    assert tree(etc.etc) == newest


def test_a_program_that_still_writes_is_not_disturbed(etc):
    etc.path.write_text(BEFORE)
    etc.backend.apply(WISH)
    for text in ("", "nameserver 192", "nameserver 192.0.2.200\n"):
        etc.path.write_text(text)
        etc.backend.check()
        assert etc.path.read_text() == text
    etc.backend.check()
    assert etc.servers == ["100.64.0.2", "192.0.2.200"]


def test_what_was_written_right_before_the_end_stays_without_vnet(etc):
    etc.path.write_text(BEFORE)
    etc.backend.apply(WISH)
    etc.path.write_text(etc.path.read_text() + "nameserver 192.0.2.200\n")
    etc.backend.undo()
    assert "100.64.0.2" not in etc.servers
    assert "192.0.2.200" in etc.servers


def test_a_program_that_insists_wins_and_is_named_as_a_problem(etc):
    etc.path.write_text(BEFORE)
    etc.backend.apply(WISH)
    for number in range(MAX_FIGHTS):
        etc.path.write_text(f"nameserver 192.0.2.{number}\n")
        assert etc.check_twice() == []
    etc.path.write_text("nameserver 192.0.2.99\n")
    [problem] = etc.check_twice()
    assert "again and again" in problem
    assert etc.servers == ["192.0.2.99"]
    etc.now += FIGHT_SECONDS + 1
    assert etc.backend.check() == []
    assert etc.servers == ["100.64.0.2", "192.0.2.99"]


def test_a_file_that_someone_changed_after_vnet_died_is_left_and_reported(etc):
    etc.path.write_text(BEFORE)
    etc.backend.apply(WISH)
    etc.path.write_text("nameserver 192.0.2.77\n")
    [said] = etc.start_again()
    assert "changed by another program" in said
    assert etc.path.read_text() == "nameserver 192.0.2.77\n"
    assert etc.start_again() == []


def test_the_next_vnet_restores_the_file_of_one_that_died(etc):
    etc.path.write_text(BEFORE)
    before = tree(etc.etc)
    etc.backend.apply(WISH)
    assert etc.start_again() == [f"{etc.path} is restored."]
    assert tree(etc.etc) == before


def test_a_program_that_goes_on_in_place_knows_the_upstream_and_the_file(etc):
    etc.path.write_text(BEFORE)
    before = tree(etc.etc)
    etc.backend.apply(WISH)
    applied = tree(etc.etc)
    etc.journal.close()
    etc.journal = Journal(etc.state)
    etc.backend = etc.make()
    assert etc.upstream == ["192.0.2.1", "fe80::1", "192.0.2.3"]
    etc.backend.apply(WISH)
    assert tree(etc.etc) == applied
    etc.backend.undo()
    assert tree(etc.etc) == before


def test_a_directory_in_the_way_is_an_error_that_says_what_to_do(etc):
    etc.path.mkdir()
    with pytest.raises(OsConfigError, match="neither a file nor a symbolic link: make it one"):
        etc.backend.apply(WISH)

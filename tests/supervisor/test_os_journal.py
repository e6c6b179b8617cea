"""The journal: whoever dies at whatever step, the next one restores everything."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from fault_steps import Died, dying, mount_point, tree
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from supervisor.osconfig import journal as journal_module
from supervisor.osconfig.journal import ChangedByOthersError, InUseError, Journal, Outcome
from supervisor.osconfig.resolv_conf_backend import ResolvConfBackend
from supervisor.osconfig.wish import ResolverWish

WISH = ResolverWish("vnet0", 7, ("demo.test",), (bytes([100, 64, 0, 2]),))
contents = st.sampled_from(
    [
        b"",
        b"nameserver 192.0.2.1\n",
        b"nameserver 192.0.2.2\nsearch a.test\n" * 9,
        b"\xff\x00no line",
    ]
)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


class Deaths(RuleBasedStateMachine):
    """`/etc` as all others than VNet have left it, against what is there after VNet's end."""

    @initialize(is_mount=st.booleans(), first=contents)
    def begin(self, is_mount, first):
        self.directory = Path(tempfile.mkdtemp())
        self.etc, self.state = self.directory / "etc", self.directory / "state"
        self.etc.mkdir()
        self.state.mkdir()
        self.path = self.etc / "resolv.conf"
        self.is_mount = is_mount
        (self.etc / "target").write_bytes(b"nameserver 192.0.2.9\n")
        self.path.write_bytes(first)
        self.path.chmod(0o640)
        self.journal = None
        self.restart()
        self.foreign = tree(self.etc)

    def restart(self):
        if self.journal is not None:
            self.journal.close()
        self.journal = Journal(self.state)
        self.backend = ResolvConfBackend(
            self.journal,
            self.path,
            uplinks=self.etc / "none",
            lists_others=True,
            clock=lambda: 0.0,
        )

    def do(self, work):
        if self.is_mount:
            with mount_point(self.path):
                work()
        else:
            work()

    @rule()
    def apply(self):
        self.do(lambda: self.backend.apply(WISH))

    @rule()
    def look(self):
        self.do(self.backend.check)
        self.do(self.backend.check)

    @rule(content=contents, kind=st.sampled_from(["file", "new", "link", "none", "target"]))
    def others_write(self, content, kind):
        """Someone else; VNet has seen it before anything else happens, or sees it never."""
        before = self.path.is_symlink()
        if kind == "target":
            (self.etc / "target").write_bytes(content)
            self.foreign["target"] = tree(self.etc)["target"]
            return
        if self.is_mount or (kind == "file" and not before and self.path.exists()):
            self.path.write_bytes(content)
        else:
            self.path.unlink(missing_ok=True)
            if kind == "link":
                self.path.symlink_to("target")
            elif kind != "none":
                self.path.write_bytes(content)
        self.foreign = tree(self.etc)

    @rule()
    def undo(self):
        self.do(self.backend.undo)
        assert tree(self.etc) == self.foreign
        assert self.journal.changes == []

    @rule(
        step=st.integers(0, 40),
        again=st.integers(0, 40),
        what=st.sampled_from(["apply", "check", "undo"]),
    )
    def die(self, step, again, what):
        """At one step of the work, and again at one of the repair."""
        work = {
            "apply": lambda: self.backend.apply(WISH),
            "check": lambda: (self.backend.check(), self.backend.check()),
            "undo": self.backend.undo,
        }[what]
        try:
            with dying(step):
                self.do(work)
        except Died:
            pass
        self.restart()
        try:
            with dying(again):
                self.do(self.journal.undo)
        except Died:
            pass
        self.restart()
        self.do(self.journal.undo)
        assert tree(self.etc) == self.foreign
        assert sorted(path.name for path in self.state.iterdir()) == ["os-lock"]

    @invariant()
    def a_name_is_asked_of_vnet_or_of_whom_others_say(self):
        if hasattr(self, "path") and self.path.exists() and not self.journal.changes:
            assert b"100.64.0.2" not in self.path.read_bytes()

    def teardown(self):
        if hasattr(self, "directory"):
            self.journal.close()
            shutil.rmtree(self.directory)


TestDeaths = Deaths.TestCase
TestDeaths.settings = settings(max_examples=150, stateful_step_count=12)


@pytest.mark.parametrize("kind", ["file", "mount", "link", "missing"])
def test_death_at_every_step_of_applying_and_of_undoing_leaves_nothing(tmp_path, kind):
    number = 0
    for step in range(200):
        directory = tmp_path / str(step)
        machine = Deaths()
        machine.begin(kind == "mount", b"nameserver 192.0.2.1\nsearch old.test\n" * 5)
        shutil.rmtree(directory, ignore_errors=True)
        if kind in ("link", "missing"):
            machine.path.unlink()
            if kind == "link":
                machine.path.symlink_to("target")
            machine.foreign = tree(machine.etc)
        survived = False
        try:
            with dying(step) as done:
                machine.do(lambda machine=machine: machine.backend.apply(WISH))
                machine.do(machine.backend.undo)
            survived = True
        except Died:
            pass
        machine.restart()
        machine.do(machine.journal.undo)
        assert tree(machine.etc) == machine.foreign, (step, done)
        machine.teardown()
        number = len(done)
        if survived:
            break
    assert 10 < number < 199


@pytest.fixture
def journal(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "LOCK_SECONDS", 0.0)
    calls: list[str] = []
    made = Journal(tmp_path, {"call": lambda arguments: calls.append(arguments["what"])})
    made.calls = calls
    yield made
    made.close()


def test_only_one_may_change_the_system(journal, tmp_path):
    with pytest.raises(InUseError, match="a VNet runs with"):
        Journal(tmp_path)


def test_changes_are_undone_backwards_and_only_those_of_the_back_end(journal, tmp_path):
    path = tmp_path / "file"
    journal.note("a", "call", what="reload")
    journal.note("a", "call", what="reload")
    journal.write("a", path, b"ours")
    journal.note("b", "call", what="other")
    said = [undone.text for undone in journal.undo({"a"})]
    assert said == [f"{path} is restored.", "call is done."]
    assert journal.calls == ["reload"]
    assert journal.backends() == {"b"}
    journal.undo()
    assert journal.calls == ["reload", "other"]


def test_a_file_of_ours_that_someone_changed_is_not_written_again(journal, tmp_path):
    path = tmp_path / "file"
    journal.write("a", path, b"ours")
    path.write_bytes(b"theirs")
    with pytest.raises(
        ChangedByOthersError, match=r"file was changed by .*: remove it and restart"
    ):
        journal.write("a", path, b"ours again")
    [left] = journal.undo()
    assert left.outcome is Outcome.LEFT
    assert path.read_bytes() == b"theirs"


def test_what_cannot_be_undone_now_is_tried_again(tmp_path):
    answers = [OSError("not now"), None]

    def call(_arguments):
        if (error := answers.pop(0)) is not None:
            raise error

    made = Journal(tmp_path, {"call": call})
    made.note("a", "call")
    [failed] = made.undo()
    assert failed.outcome is Outcome.FAILED
    assert "cannot be undone (not now): mend that" in failed.text
    [done] = made.undo()
    assert done.outcome is Outcome.UNDONE
    made.close()


@pytest.mark.parametrize("text", ["{", "[]", '{"schema":1,"changes":[{"type":"magic"}]}', "\x00"])
def test_a_journal_that_cannot_be_read_is_kept_aside_and_reported(tmp_path, text):
    (tmp_path / "os-changes.json").write_text(text)
    made = Journal(tmp_path)
    [left] = made.undo()
    assert left.outcome is Outcome.LEFT
    assert "cannot be read" in left.text
    assert (tmp_path / "os-changes.unreadable").read_text() == text
    assert made.undo() == []
    made.close()


def test_a_damaged_backup_is_never_put_in_place(journal, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    journal.write("a", path, b"ours")
    [backup] = (tmp_path / "os-backup").iterdir()
    backup.write_bytes(b"rubbish")
    [left] = journal.undo()
    assert left.outcome is Outcome.LEFT
    assert "damaged" in left.text
    assert path.read_bytes() == b"ours"


def test_nobody_else_can_read_the_backups(journal, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    journal.write("a", path, b"ours")
    [backup] = (tmp_path / "os-backup").iterdir()
    assert (tmp_path / "os-backup").stat().st_mode & 0o777 == 0o700
    assert backup.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "os-changes.json").stat().st_mode & 0o777 == 0o600
    assert json.loads((tmp_path / "os-changes.json").read_text())["schema"] == 1

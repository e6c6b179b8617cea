"""`vnet diag` as a command: whom it asks, what it does with the answer, and where the report goes."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from control_bed import answering
from run_fakes import FakeRun, settings

from ipc import messages as m
from supervisor import config as configuration
from supervisor.cli import diag
from supervisor.clusters import ClusterView
from supervisor.commands import Commands
from supervisor.diag import markdown, run
from supervisor.diag.facts import HomeFacts, VnetFacts
from supervisor.diag.findings import FindingId, finding
from supervisor.diag.model import AttemptStatus, CheckAttempt, NetworkStackAttempt, Report, checked
from supervisor.exits import ExitStatus
from supervisor.settings import User


def options(directory: Path, **changed: object) -> diag.Options:
    values: dict[str, object] = {
        "run_dir": directory,
        "state_dir": directory / "state",
        "config": None,
        "as_json": False,
        "output": None,
    }
    return diag.Options(**values | changed)  # type: ignore[arg-type]


@pytest.fixture
def subjects(monkeypatch) -> list[run.Subject]:
    """What would be diagnosed; the report has one problem."""
    seen: list[run.Subject] = []
    found = checked([finding(FindingId.ROUTE_CONFLICT, "It is in the way.", "Move it.")])

    def diagnose(
        subject: run.Subject, _clients: object, _now: object, progress: Callable[[str], None]
    ) -> Report:
        seen.append(subject)
        progress("routes")
        check = CheckAttempt(id="routes", status=AttemptStatus.OK, error="", check_report=found)
        return Report(
            created_at="2026-01-31T12:00:00Z",
            version="1",
            network_stack_attempt=NetworkStackAttempt(status=AttemptStatus.ERROR, error="none"),
            checks=[check],
        )

    monkeypatch.setattr(diag.run, "diagnose", diagnose)
    # What this machine's own configuration says is not the test's.
    monkeypatch.setattr(configuration, "DEFAULT_PATH", Path("/nonexistent/vnet.toml"))
    return seen


# -- what a supervisor tells --


def test_supervisor_tells_root_and_the_vnet_user_what_it_knows():
    expired = msgspec.structs.replace(
        FakeRun().report.clusters[0], state=m.ClusterState.LOGIN_EXPIRED, problem="It expired."
    )
    fake = FakeRun(
        os_reasons=["it runs"],
        os_problems=["os"],
        network_problems=["net"],
        report=ClusterView([expired], ""),
    )
    commands = Commands(fake)
    for uid in (0, fake.settings.user.uid):
        answer = commands.answer(uid, b'{"command":"diag"}')
        assert isinstance(answer, bytes)
        known = msgspec.json.decode(answer, type=VnetFacts)
        assert known.os_reasons == ["it runs"]
        assert (known.os_problems, known.network_problems) == (["os"], ["net"])
        assert known.login_problems == ["It expired."]
        assert known.teleport_home == "/home/alice/.tsh"
        assert known.status.network is not None
    refusal = json.loads(bytes(commands.answer(99_999, b'{"command":"diag"}')))  # type: ignore[arg-type]
    assert refusal["status"] == ExitStatus.NOT_PERMITTED
    assert refusal.keys() == {"status", "text"}


def test_running_vnet_says_whose_logins_are_meant(tmp_path, subjects, capsys):
    root = User(name="root", uid=0, gid=0, home=Path("/root"))
    places = {"teleport_home": Path("/elsewhere"), "state_dir": Path("/state")}
    fake = FakeRun(settings=settings(user=root, **places))
    commands = Commands(fake)
    with answering(tmp_path, lambda _uid, line: commands.answer(0, line)):
        assert diag.diagnose(options(tmp_path), {}) is ExitStatus.DEGRADED
    [subject] = subjects
    assert subject.vnet is not None
    assert subject.user.name == "root"
    assert (subject.teleport_home, subject.state_dir) == (Path("/elsewhere"), Path("/state"))
    assert "It is in the way." in capsys.readouterr().out


def test_without_a_vnet_the_callers_own_logins_are_meant(tmp_path, subjects):
    diag.diagnose(options(tmp_path), {"TELEPORT_HOME": "/mine"})
    [subject] = subjects
    assert (subject.vnet, subject.is_silent) == (None, False)
    assert (subject.teleport_home, subject.state_dir) == (Path("/mine"), tmp_path / "state")


@pytest.mark.parametrize(
    "said",
    [
        b'{"status":2,"text":"not a request: Invalid value"}\n',
        b"{}\n",
        b'{"status":77,"text":""}\n',
    ],
    ids=["an older version", "nothing", "no status"],
)
def test_vnet_that_does_not_know_the_question_is_silent(tmp_path, subjects, said):
    with answering(tmp_path, lambda _uid, _line: said):
        diag.diagnose(options(tmp_path), {})
    [subject] = subjects
    assert (subject.vnet, subject.is_silent) == (None, True)
    assert subject.error


def test_refusal_is_the_end(tmp_path, subjects):
    said = b'{"status":4,"text":"only root and alice may do that"}\n'
    output = tmp_path / "report"
    with answering(tmp_path, lambda _uid, _line: said), pytest.raises(diag.DiagError) as caught:
        diag.diagnose(options(tmp_path, output=output), {})
    assert caught.value.status is ExitStatus.NOT_PERMITTED
    assert not subjects
    assert not output.exists()


def test_wrong_configuration_that_was_named_is_said(tmp_path, subjects):
    wrong = tmp_path / "vnet.toml"
    wrong.write_text("usr = 1\n")
    with pytest.raises(diag.DiagError, match="usr") as caught:
        diag.diagnose(options(tmp_path, config=wrong), {})
    assert caught.value.status is ExitStatus.USAGE


# -- where the report goes --


def test_named_file_is_replaced_and_only_for_the_owner(tmp_path, subjects, capsys):
    path = tmp_path / "report.md"
    assert diag.diagnose(options(tmp_path, output=path), {}) is ExitStatus.DEGRADED
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("x" * 100_000)
    diag.diagnose(options(tmp_path, output=path), {})
    assert path.read_text().startswith("# VNet diagnostic report")
    assert "xxx" not in path.read_text()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(path) in printed.err


def test_folder_gets_a_file_of_the_usual_name(tmp_path, subjects):
    folder = tmp_path / "reports"
    folder.mkdir()
    diag.diagnose(options(tmp_path, output=folder, as_json=True), {})
    [path] = folder.iterdir()
    assert path.name.startswith("vnet_diag_report_")
    assert path.suffix == ".json"
    assert json.loads(path.read_text())["schema"] == 1


def test_nothing_is_left_of_a_report_that_was_given_up(tmp_path, subjects, monkeypatch):
    def interrupted(*_: object) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(diag.run, "diagnose", interrupted)
    there = tmp_path / "there"
    there.write_text("earlier")
    for path in (tmp_path / "new", there):
        with pytest.raises(KeyboardInterrupt):
            diag.diagnose(options(tmp_path, output=path), {})
    assert not (tmp_path / "new").exists()
    assert there.read_text() == "earlier"


def test_link_is_not_followed(tmp_path, subjects, monkeypatch):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(diag.DiagError) as caught:
        diag.diagnose(options(tmp_path, output=tmp_path / "link"), {})
    assert caught.value.status is ExitStatus.USAGE
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setattr(diag, "file_name", lambda _created, _suffix: "known")
    (folder / "known").symlink_to(target)
    with pytest.raises(diag.DiagError):
        diag.diagnose(options(tmp_path, output=folder), {})
    assert target.read_text() == "mine"


@pytest.mark.parametrize("place", ["missing/report.txt", "file/report.txt"])
def test_place_that_is_none_is_said_before_anything_is_done(tmp_path, subjects, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(diag.DiagError) as caught:
        diag.diagnose(options(tmp_path, output=tmp_path / place), {})
    assert caught.value.status is ExitStatus.USAGE
    assert "--output" in str(caught.value)
    assert not subjects


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_and_leaves_nothing_behind(
    tmp_path, subjects, monkeypatch, capsys
):
    diag.diagnose(options(tmp_path), {})
    assert capsys.readouterr().err == ""
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    diag.diagnose(options(tmp_path), {})
    assert "routes" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_what_still_hangs_does_not_keep_the_command_from_ending():
    program = (
        "import concurrent.futures, threading;"
        "from supervisor.cli.diag import leave;"
        "from supervisor.exits import ExitStatus;"
        "concurrent.futures.ThreadPoolExecutor().submit(threading.Event().wait);"
        "print('the report'); leave(ExitStatus.DEGRADED)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"the report\n")


# -- a whole diagnosis, with everything that could fail failing --


def test_faults_of_single_checks_do_not_cost_the_rest(tmp_path, monkeypatch):
    def fail(*_arguments: object) -> None:
        raise RuntimeError("a fault with token=canary9")

    for name in ("gather_ssh", "gather_leftovers", "gather_ports", "gather_resolver"):
        monkeypatch.setattr(run.gather, name, fail)
    monkeypatch.setattr(run, "TOTAL_SECONDS", 3.0)
    never = threading.Event()
    subject = run.Subject(
        vnet=None,
        error="",
        is_silent=False,
        user=settings().user,
        teleport_home=tmp_path,
        state_dir=tmp_path,
        os_wanted="auto",
        version="1",
    )

    def wait() -> tuple[()]:
        never.wait(30)
        return ()

    clients = run.Clients(lambda: HomeFacts(str(tmp_path), "no profile"), wait)
    report = run.diagnose(subject, clients, datetime.now(UTC), lambda _name: None)
    never.set()
    errors = {check.id: check.error for check in report.checks if check.error}
    assert set(errors) == {
        "routes", "dns", "ipv6", "ssh", "leftovers", "ports", "resolver", "proxies",
    }  # fmt: skip
    assert "internal error: RuntimeError" in errors["ssh"]
    assert "canary9" not in msgspec.json.encode(report).decode()
    assert errors["proxies"] == "no result within 3 s"
    assert errors["routes"] == "VNet is not running"
    found = {finding.id for finding in report.findings}
    assert {FindingId.VNET_NOT_RUNNING, FindingId.LOGIN_MISSING} <= found
    assert report.has_issues
    # Each check has a title in the text.
    assert markdown.render(report, "now").count("\n---\n") == len(report.checks) == 12

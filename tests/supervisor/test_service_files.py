"""The files of the service: unit, polkit rule, launchd job, and how they are known again."""

import plistlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from supervisor.cli import service
from supervisor.cli.service import ServiceError
from supervisor.exits import ExitStatus
from supervisor.osconfig import launchd, polkit_rule
from supervisor.osconfig.own_files import Comment, Origin, OwnFile, origin
from supervisor.osconfig.systemd_unit import PACKAGED, TEMPLATE, Programs, instance, unit

ELSEWHERE = Programs(Path("/opt/vnet/bin/vnet-supervisor"), Path("/opt/vnet/bin/vnet"))


@pytest.mark.parametrize(
    "user", ["alice", "alice-smith", "a.b_c", "alice@example.com", r"DOM\alice"]
)
def test_an_instance_is_named_after_its_user_unchanged(user):
    assert instance(user) == f"vnet@{user}.service"


@pytest.mark.parametrize("user", ["", "alice smith", "host$", "a/b", "%i", "-x", "ünal", "a" * 250])
def test_a_user_whose_name_is_no_unit_name_is_refused(user):
    with pytest.raises(ValueError, match="cannot be the name of a systemd unit"):
        instance(user)


@pytest.mark.parametrize("path", ["/opt/my vnet/bin/x", "/opt/%i/x", "/opt/$HOME/x", "/opt/a\nb"])
def test_a_program_that_a_unit_cannot_name_is_refused(path):
    with pytest.raises(ValueError, match="cannot stand in a systemd unit"):
        unit(Programs(Path(path), Path(path)))


def settings(text: str) -> dict[str, list[str]]:
    """Each setting of a unit with its values in order."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"(?m)^(\w+)=(.*)$", text):
        found.setdefault(name, []).append(value)
    return found


def test_the_unit_runs_the_programs_for_the_user_it_is_named_after_and_never_for_root():
    found = settings(unit(ELSEWHERE))
    assert found["ExecStart"] == ["/opt/vnet/bin/vnet-supervisor --user=%i --not-root"]
    assert found["ExecReload"] == ["/opt/vnet/bin/vnet reload"]
    assert found["Type"] == ["notify"]
    assert found["Restart"] == ["on-failure"]


def test_what_does_not_get_better_by_itself_is_not_tried_again():
    [prevented] = settings(unit(PACKAGED))["RestartPreventExitStatus"]
    wanted = {ExitStatus.USAGE, ExitStatus.NOT_PERMITTED, ExitStatus.CONFLICT}
    assert {int(word) for word in prevented.split()} == wanted


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_understands_the_unit(tmp_path):
    # Programs that are there, so that only the text is judged.
    text = unit(Programs(Path("/usr/bin/true"), Path("/usr/bin/true")))
    (tmp_path / TEMPLATE).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", tmp_path / TEMPLATE],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    about_us = [line for line in done.stderr.splitlines() if "vnet@" in line]
    assert done.returncode == 0, done.stderr
    assert about_us == []


def test_the_rule_names_one_unit_of_one_action():
    text = polkit_rule.rule()
    assert text.count("org.freedesktop.systemd1.manage-units") == 1
    assert '"vnet@" + subject.user + ".service"' in text
    assert "subject.local && subject.active" in text


def test_the_launchd_job_starts_the_supervisor_for_its_user_again_and_again():
    job = plistlib.loads(launchd.plist(ELSEWHERE, "alice smith").encode())
    program = ["/opt/vnet/bin/vnet-supervisor", "--user=alice smith", "--not-root"]
    assert job["ProgramArguments"] == program
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["Label"] == launchd.PLIST.stem
    assert launchd.start_commands() == [["launchctl", "bootstrap", "system", str(launchd.PLIST)]]
    assert launchd.stop_commands() == [["launchctl", "bootout", f"system/{job['Label']}"]]


@pytest.mark.parametrize("comment", Comment)
def test_a_file_is_known_again_until_somebody_changes_it(comment):
    file = OwnFile(Path("/x"), "first line\nsecond line\n", comment)
    assert origin(file.marked) is Origin.OURS
    assert origin(file.marked.replace("second", "other")) is Origin.CHANGED
    assert origin(file.marked + "more\n") is Origin.CHANGED
    assert origin(file.marked + file.marked) is Origin.CHANGED
    assert origin(file.text) is Origin.FOREIGN


def test_a_marked_plist_is_a_plist_still():
    [file] = service.files(ELSEWHERE, "alice", is_root=False, system="darwin")
    assert plistlib.loads(file.marked.encode())["Label"] == launchd.LABEL


def test_root_needs_a_file_of_its_own():
    def paths(*, is_root: bool) -> list[Path]:
        found = service.files(ELSEWHERE, "root", is_root=is_root, system="linux")
        return [file.path for file in found]

    assert Path("/etc/systemd/system/vnet@root.service.d/vnet.conf") in paths(is_root=True)
    assert len(paths(is_root=False)) == 3


@pytest.mark.parametrize(
    ("user", "problem"),
    [
        ("root", "is root"),
        ("no-such-user-here", "knows no user"),
        ("a b", "name of a systemd unit"),
    ],
)
def test_users_whom_the_service_cannot_serve_are_refused(user, problem):
    with pytest.raises(ServiceError, match=problem) as caught:
        service.check_user(user, force=False)
    assert caught.value.status == ExitStatus.USAGE


def test_a_program_that_others_can_change_is_found(tmp_path):
    program = tmp_path / "bin" / "vnet-supervisor"
    program.parent.mkdir()
    program.touch()
    assert not service.unsafe([Path("/usr/bin/env")])
    program.chmod(0o666)
    found = service.unsafe([program])
    assert found
    assert str(program).startswith(found)

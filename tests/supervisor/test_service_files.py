"""The files of the service: unit, polkit rule, launchd job, and how they are known again."""

import plistlib
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from supervisor import config
from supervisor import settings as settings_module
from supervisor.cli import service
from supervisor.cli.service import Served, ServiceError
from supervisor.exits import ExitStatus
from supervisor.osconfig import launchd, polkit_rule
from supervisor.osconfig.own_files import Comment, Origin, OwnFile, origin
from supervisor.osconfig.systemd_unit import (
    PACKAGED,
    TEMPLATE,
    Programs,
    drop_in,
    instance,
    unit,
)

ALICE = Served("alice", is_root=False, tsh_home=Path("/home/alice/.tsh"))
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
    programs = Programs(Path("/usr/bin/true"), Path("/usr/bin/true"))
    text = unit(programs) + drop_in(programs, "root", Path('/srv/a "b" 1%'), is_root=True)
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
    [file] = service.files(ELSEWHERE, ALICE, system="darwin")
    assert plistlib.loads(file.marked.encode())["Label"] == launchd.LABEL


def drop_ins(served: Served) -> dict[str, list[str]]:
    """The settings of the user's own file, which comes after the three for all."""
    found = service.files(ELSEWHERE, served, system="linux")[3:]
    assert [file.path for file in found] in (
        [],
        [Path(f"/etc/systemd/system/vnet@{served.name}.service.d/vnet.conf")],
    )
    return settings("".join(file.text for file in found))


def test_the_usual_tsh_home_is_the_only_one_of_a_home_that_the_unit_may_write_to():
    found = settings(unit(PACKAGED))
    assert found["ProtectHome"] == ["read-only"]
    in_homes = [path for path in found["ReadWritePaths"] if "home" in path]
    assert in_homes == ["-/home/%i/.tsh"]
    assert drop_ins(ALICE) == {}


def test_root_needs_a_file_with_another_command_and_its_own_tsh_home():
    assert drop_ins(Served("root", is_root=True, tsh_home=Path("/root/.tsh"))) == {
        "ExecStart": ["", "/opt/vnet/bin/vnet-supervisor --user=%i"],
        "ReadWritePaths": ['"-/root/.tsh"'],
    }


@pytest.mark.parametrize(
    ("home", "written"),
    [
        ("/srv/homes/alice/.tsh", '"-/srv/homes/alice/.tsh"'),
        ("/home/alice/tsh of work", '"-/home/alice/tsh of work"'),
        ('/srv/100%/a"b\\c', '"-/srv/100%%/a\\"b\\\\c"'),
    ],
)
def test_a_tsh_home_elsewhere_may_be_written_to_and_nothing_else(home, written):
    assert drop_ins(replace(ALICE, tsh_home=Path(home))) == {"ReadWritePaths": [written]}


@pytest.mark.parametrize("home", ["tsh", "/srv/a\nb"])
def test_a_tsh_home_that_a_unit_cannot_name_is_refused(home):
    with pytest.raises(ServiceError, match="cannot stand in a systemd unit") as caught:
        service.files(ELSEWHERE, replace(ALICE, tsh_home=Path(home)), system="linux")
    assert caught.value.status == ExitStatus.USAGE


def test_where_the_tsh_home_lies_is_read_as_the_service_will_read_it(tmp_path, monkeypatch):
    me = settings_module.find_user(None, {"SUDO_USER": ""})
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "vnet.toml")
    monkeypatch.setattr(service, "service_environment", dict)
    assert service.check_user(me.name, force=True).tsh_home == me.home / ".tsh"
    (tmp_path / "vnet.toml").write_text('teleport_home = "~/work/tsh"\n')
    assert service.check_user(me.name, force=True).tsh_home == me.home / "work/tsh"
    monkeypatch.setattr(service, "service_environment", lambda: {"TELEPORT_HOME": "/srv/tsh"})
    assert service.check_user(me.name, force=True).tsh_home == Path("/srv/tsh")
    (tmp_path / "vnet.toml").write_text("colour = 1\n")
    with pytest.raises(ServiceError, match="colour"):
        service.check_user(me.name, force=True)


def test_the_file_of_variables_is_read_like_systemd_reads_it(tmp_path):
    path = tmp_path / "environment"
    assert service.service_environment(path) == {}
    path.write_text("# TELEPORT_HOME=/no\n;X=1\n\nTELEPORT_HOME='/srv/a b'\nEMPTY=\nBAD='\nY\n")
    assert service.service_environment(path) == {"TELEPORT_HOME": "/srv/a b", "EMPTY": ""}


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


def test_uninstall_takes_its_own_away_and_nothing_that_is_only_called_like_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(service, "UNITS", tmp_path)
    monkeypatch.setattr(service, "RULES", tmp_path / "rules")
    commands = []
    monkeypatch.setattr(service, "_command", lambda *words: commands.append(words))
    for name in ("_require_root", "_require_systemd", "_repair"):
        monkeypatch.setattr(service, name, lambda: None)
    monkeypatch.setattr(service.sys, "platform", "linux")
    wants, drop_ins = tmp_path / "multi-user.target.wants", tmp_path / "vnet@alice.service.d"
    wants.mkdir()
    drop_ins.mkdir()
    names = ("vnet@alice.service", service.REPAIR, "vnet-of-others.service", "vnets@alice.service")
    for name in names:
        (wants / name).symlink_to(tmp_path / name)
    served = replace(ALICE, tsh_home=Path("/srv/tsh"))
    wanted = service.files(ELSEWHERE, served, system="linux")
    service._write([file for file in wanted if file.path.parent != service.RULES], force=False)
    foreign = tmp_path / "vnet@bob.service.d" / "vnet.conf"
    foreign.parent.mkdir()
    foreign.write_text("[Service]\n")
    with pytest.raises(ServiceError, match=re.escape(str(foreign))) as caught:
        service.uninstall()
    assert caught.value.status is ExitStatus.CONFLICT
    left = {path.name for path in wants.iterdir()}
    assert left == {"vnet-of-others.service", "vnets@alice.service"}
    assert {path.name for path in tmp_path.iterdir()} == {wants.name, foreign.parent.name}
    assert commands == [("systemctl", "stop", "vnet@*.service"), ("systemctl", "daemon-reload")]
    capsys.readouterr()


def test_a_program_that_others_can_change_is_found(tmp_path):
    program = tmp_path / "bin" / "vnet-supervisor"
    program.parent.mkdir()
    program.touch()
    assert not service.unsafe([Path("/usr/bin/env")])
    program.chmod(0o666)
    found = service.unsafe([program])
    assert found
    assert str(program).startswith(found)

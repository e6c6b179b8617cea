"""`vnet ssh-config`: the user's own configuration is changed once, at its top, and nothing is lost."""

import fcntl
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from supervisor.cli import putty
from supervisor.cli.ssh_config import SshPlaces, include_line, install_include, notes
from supervisor.cli.teleport_access import CommandError
from supervisor.exits import ExitStatus
from supervisor.ssh_config_include import Inclusion, find_inclusion

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="no OpenSSH client")
needs_putty = pytest.mark.skipif(shutil.which("puttygen") is None, reason="no putty-tools")


@pytest.fixture
def places(tmp_path):
    home = tmp_path / "alice"
    home.mkdir()
    return SshPlaces(home, home / ".tsh")


def written(places: SshPlaces, data: bytes = b"", mode: int = 0o600) -> Path:
    path = places.user_config
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def mode_of(path: Path) -> int:
    return path.lstat().st_mode & 0o777


def failure(places: SshPlaces) -> CommandError:
    with pytest.raises(CommandError) as caught:
        install_include(places)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_user_without_a_configuration_gets_one(places):
    said = install_include(places)
    assert said == f"{places.user_config} includes {places.vnet_config} now."
    comment, line, empty = places.user_config.read_text().split("\n", 2)
    assert comment.startswith("# ")
    assert (line, empty) == (f'Include "{places.vnet_config}"', "\n")
    assert mode_of(places.user_config) == 0o600
    assert mode_of(places.user_config.parent) == 0o700
    assert [path.name for path in places.user_config.parent.iterdir()] == ["config"]


def test_what_was_there_follows_byte_by_byte_and_is_kept_aside(places):
    old = b"Host a\r\n  User \xff\xfe\n# no newline at the end"
    path = written(places, old, 0o640)
    said = install_include(places)
    new = path.read_bytes()
    assert new.endswith(b"\n\n" + old)
    assert new.splitlines()[1] == f'Include "{places.vnet_config}"'.encode()
    backup = path.with_name("config.vnet-backup")
    assert (backup.read_bytes(), mode_of(backup)) == (old, 0o640)
    assert mode_of(path) == 0o640
    assert str(backup) in said


def test_a_second_time_changes_nothing(places):
    path = written(places, b"User bob\n")
    install_include(places)
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino
    backup = path.with_name("config.vnet-backup").stat().st_mtime_ns
    assert "already" in install_include(places)
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino) == before
    assert path.with_name("config.vnet-backup").stat().st_mtime_ns == backup


def test_an_empty_configuration_is_not_kept_aside(places):
    path = written(places, b"", 0o644)
    backup = path.with_name("config.vnet-backup")
    backup.write_text("of an earlier day")
    assert "backup" not in install_include(places)
    assert backup.read_text() == "of an earlier day"
    assert mode_of(path) == 0o644


def test_a_line_of_the_users_own_is_enough(places):
    written(places, b"include ~/.tsh/vnet_ssh_config\n")
    assert "already" in install_include(places)


def test_a_line_below_a_host_is_not_enough(places):
    old = f"Host a\n  Include {places.vnet_config}\n"
    path = written(places, old.encode())
    assert "already" not in install_include(places)
    assert path.read_text().splitlines()[1] == f'Include "{places.vnet_config}"'
    assert path.read_text().endswith(old)
    assert "already" in install_include(places)


def test_a_link_stays_and_its_target_is_changed(places, tmp_path):
    target = tmp_path / "dotfiles" / "ssh"
    target.parent.mkdir()
    target.write_bytes(b"User bob\n")
    places.user_config.parent.mkdir()
    places.user_config.symlink_to("../../dotfiles/ssh")
    install_include(places)
    assert places.user_config.is_symlink()
    found = find_inclusion(target.read_text(), places.vnet_config, places.user_home)
    assert found is Inclusion.FOR_ALL_HOSTS
    backup = places.user_config.with_name("config.vnet-backup")
    assert (backup.read_bytes(), backup.is_symlink()) == (b"User bob\n", False)


def test_a_link_to_nothing_gets_its_target(places, tmp_path):
    target = tmp_path / "ssh"
    places.user_config.parent.mkdir()
    places.user_config.symlink_to(target)
    install_include(places)
    assert places.user_config.is_symlink()
    assert mode_of(target) == 0o600


def test_a_huge_configuration_is_left_alone(places):
    path = written(places, b"#" * (1024 * 1024))
    assert "make it shorter" in str(failure(places))
    assert path.stat().st_size == 1024 * 1024
    path.write_bytes(b"#" * (1024 * 1024 - 1))
    assert "now" in install_include(places)


def test_another_program_that_has_the_lock_is_not_waited_for(places):
    path = written(places, b"User bob\n")
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert failure(places).status is ExitStatus.CONFLICT
        assert path.read_bytes() == b"User bob\n"
    assert "now" in install_include(places)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_left_alone(places, make):
    places.user_config.parent.mkdir()
    make(places.user_config)
    assert "make it one" in str(failure(places))


def test_links_in_a_circle_and_a_file_as_directory_are_one_sentence(places):
    places.user_config.parent.mkdir()
    places.user_config.symlink_to("config")
    assert "cannot be changed" in str(failure(places))
    shutil.rmtree(places.user_config.parent)
    places.user_config.parent.write_text("")
    assert "cannot be changed" in str(failure(places))


@pytest.mark.parametrize("name", ["a*", "a?", "[a]", "a\\b", "a%h", "${A}", "a\nb"])
def test_a_path_that_openssh_reads_otherwise_is_refused(places, name):
    odd = SshPlaces(places.user_home, places.user_home / name)
    assert "TELEPORT_HOME" in str(failure(odd))
    assert not places.user_config.exists()


@needs_ssh
@pytest.mark.parametrize(
    "name", [".tsh", "with a blank", "it's", 'a"b', "a#b", "a=b", "$A", "{a}~"]
)
def test_openssh_reads_what_was_installed(places, name):
    odd = SshPlaces(places.user_home, places.user_home / name)
    odd.teleport_home.mkdir()
    odd.vnet_config.write_text("Host *.demo.test\n  User through-vnet\n")
    written(odd, b"Host *\n  User bob\n")
    install_include(odd)
    found = find_inclusion(odd.user_config.read_text(), odd.vnet_config, odd.user_home)
    assert found is Inclusion.FOR_ALL_HOSTS
    for host, user in (("n.demo.test", "through-vnet"), ("n.other.test", "bob")):
        command = ["ssh", "-G", "-F", str(odd.user_config), host]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"user {user}" in told.splitlines()


def test_the_notes_say_what_is_missing(places):
    home = places.teleport_home
    assert "tsh login" in next(notes(places))
    home.mkdir()
    assert "has not run" in next(notes(places))
    (home / "id_vnet.pub").touch()
    assert "does not run" in next(notes(places))
    places.vnet_config.touch()
    assert list(notes(places)) == []


def command(*arguments: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    program = "from supervisor.cli.app import main; main()"
    environment = {"PATH": os.environ["PATH"], "TELEPORT_HOME": str(home), **more}
    return subprocess.run(
        [sys.executable, "-c", program, "ssh-config", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )


def test_the_command_prints_the_line_and_what_is_missing(tmp_path):
    done = command(home=tmp_path / "tsh")
    assert done.returncode == 0, done.stderr
    assert done.stdout == include_line(tmp_path / "tsh" / "vnet_ssh_config") + "\n"
    assert done.stderr.startswith("vnet: there is no ")
    done = command("--putty", home=tmp_path / "tsh")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith("start VNet, which makes it\n")


# The user that find_user finds lives in the directory that is given; the command becomes that user.
AS_NOBODY = """
import sys
from pathlib import Path
from supervisor import settings
from supervisor.cli import ssh_config
home = Path(sys.argv[1])
settings.find_user = lambda *_: settings.User("nobody", int(sys.argv[2]), int(sys.argv[3]), home)
ssh_config.run(None, {"TELEPORT_HOME": str(home / ".tsh")}, install=True, putty=True)
"""


@pytest.mark.root
def test_under_sudo_everything_is_the_users_and_done_with_the_users_rights():
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_keys(home / ".tsh")
        for path in (home, *home.rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        arguments = [str(home), str(nobody.pw_uid), str(nobody.pw_gid)]
        for expected in (0, 1):
            done = subprocess.run(
                [sys.executable, "-c", AS_NOBODY, *arguments],
                capture_output=True,
                text=True,
                check=False,
                cwd=Path(__file__).parents[2],
            )
            assert done.returncode == expected, done.stderr
            assert {path.stat().st_uid for path in home.rglob("*")} == {nobody.pw_uid}
            # What root could still do, such as writing here, this user cannot.
            shutil.rmtree(home / ".ssh", ignore_errors=True)
            home.chmod(0o500)
        assert "cannot be changed: Permission denied" in done.stderr


# -- PuTTY --


def make_keys(home: Path) -> tuple[Ed25519PrivateKey, Ed25519PrivateKey]:
    home.mkdir(exist_ok=True)
    keys = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    for name, key in zip(("id_vnet", "vnet_host_key"), keys, strict=True):
        text = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        (home / name).write_bytes(text)
        (home / name).chmod(0o600)
    return keys


def session(folder: Path) -> dict[str, str]:
    lines = (folder / "sessions" / "VNet").read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_a_session_for_putty(places):
    _, host_key = make_keys(places.teleport_home)
    lines = putty.write_session(places.teleport_home, places.user_home, {})
    folder = places.user_home / ".putty"
    assert str(folder / "sessions" / "VNet") in lines[0]
    found = session(folder)
    assert found["PublicKeyFile"] == str(folder / "id_vnet.ppk")
    assert found["SSHManualHostKeys"] == putty.fingerprint(host_key.public_key())
    assert (found["Protocol"], found["PortNumber"]) == ("ssh", "22")
    assert mode_of(folder / "id_vnet.ppk") == mode_of(folder / "sessions" / "VNet") == 0o600
    assert mode_of(folder) == mode_of(folder / "sessions") == 0o700


def test_other_settings_of_the_session_stay(places):
    make_keys(places.teleport_home)
    where = places.user_home / ".putty" / "sessions" / "VNet"
    where.parent.mkdir(parents=True)
    where.write_text("Font=server:fixed=1\nPortNumber=2222\nPublicKeyFile=/old\n")
    putty.write_session(places.teleport_home, places.user_home, {})
    found = session(places.user_home / ".putty")
    assert (found["Font"], found["PortNumber"]) == ("server:fixed=1", "2222")
    assert found["PublicKeyFile"].endswith("id_vnet.ppk")
    before = where.read_text()
    putty.write_session(places.teleport_home, places.user_home, {})
    assert where.read_text() == before


def test_odd_characters_in_a_putty_session_stay():
    old = "WinTitle=a\x0cb\x1cc\u2028d\x85e\n\nFont=x"
    new = putty.session_text(old, {"TryAgent": "0"}, {})
    assert new == f"{old}\nTryAgent=0\n"
    assert putty.session_text(new, {"TryAgent": "0"}, {}) == new
    assert putty.session_text("", {"TryAgent": "0"}, {}) == "TryAgent=0\n"


def test_where_putty_keeps_its_files(tmp_path):
    home = tmp_path
    assert putty.putty_folder(home, {}) == home / ".putty"
    (home / ".config" / "putty").mkdir(parents=True)
    assert putty.putty_folder(home, {}) == home / ".config" / "putty"
    assert putty.putty_folder(home, {"XDG_CONFIG_HOME": str(home / "x")}) == home / ".putty"
    assert putty.putty_folder(home, {"PUTTYDIR": str(home / "p")}) == home / "p"


@pytest.mark.parametrize("data", [b"", b"nonsense", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAA\n"])
def test_a_key_that_is_none_is_one_sentence(places, data):
    make_keys(places.teleport_home)
    (places.teleport_home / "id_vnet").write_bytes(data)
    with pytest.raises(CommandError, match=r"id_vnet is no Ed25519 key"):
        putty.write_session(places.teleport_home, places.user_home, {})
    assert not (places.user_home / ".putty").exists()


@needs_putty
def test_puttygen_reads_the_key(places):
    identity, _ = make_keys(places.teleport_home)
    putty.write_session(places.teleport_home, places.user_home, {})
    path = places.user_home / ".putty" / "id_vnet.ppk"
    back = places.user_home / "back"
    environment = {"PATH": os.environ["PATH"], "HOME": str(places.user_home)}
    subprocess.run(
        ["puttygen", str(path), "-O", "private-openssh-new", "-o", str(back)],
        check=True,
        env=environment,
        timeout=30,
    )
    found = serialization.load_ssh_private_key(back.read_bytes(), None)
    assert isinstance(found, Ed25519PrivateKey)
    assert found.private_bytes_raw() == identity.private_bytes_raw()

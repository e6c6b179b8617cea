"""Which lines include a file: by our reading, and by OpenSSH's."""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.ssh_config_include import Inclusion, find_inclusion

HOME = Path("/home/alice")
WANTED = HOME / ".tsh" / "vnet_ssh_config"

INCLUDED = [
    'Include "/home/alice/.tsh/vnet_ssh_config"',
    "Include /home/alice/.tsh/vnet_ssh_config",
    "\t include\t/home/alice/.tsh/vnet_ssh_config  ",
    "INCLUDE ~/.tsh/vnet_ssh_config",
    'Include "~/.tsh/vnet_ssh_config"',
    "Include '/home/alice/.tsh/vnet_ssh_config' # VNet",
    "Include /a /home/alice/.tsh/vnet_ssh_config /b",
    "Include /home/alice//.tsh/./x/../vnet_ssh_config",
    "Include=/home/alice/.tsh/vnet_ssh_config",
    "Include = ~/.tsh/vnet_ssh_config",
    "User bob\nInclude ~/.tsh/vnet_ssh_config\r\nHost a",
    r"Include /home/al\ice/.tsh/vnet_ssh_config /home/alice/.tsh/vnet_ssh_config",
    'Include /home/alice/".tsh"/vnet_ssh_config',
]
NOT_INCLUDED = [
    "",
    "# Include /home/alice/.tsh/vnet_ssh_config",
    "Include",
    "Include # /home/alice/.tsh/vnet_ssh_config",
    "IncludeX /home/alice/.tsh/vnet_ssh_config",
    "Include /home/alice/.tsh/vnet_ssh_config2",
    "Include /home/alice/.tsh/*",
    'Include "/home/alice/.tsh/vnet_ssh_config',
    "Include '/home/alice/.tsh/vnet_ssh_config\"",
    "Include .tsh/vnet_ssh_config",
    "Include ~alice/.tsh/vnet_ssh_config",
    "Include %d/.tsh/vnet_ssh_config",
    "Include ${HOME}/.tsh/vnet_ssh_config",
    "Include /home/alice/.tsh/vnet_ssh_config#comment",
    r"Include /home/alice/\~/.tsh/vnet_ssh_config",
    "User Include /home/alice/.tsh/vnet_ssh_config",
]


def is_included(text: str, wanted: Path = WANTED) -> bool:
    return find_inclusion(text, wanted, HOME) is not Inclusion.NOT


@pytest.mark.parametrize("text", INCLUDED)
def test_included(text):
    assert is_included(text)


@pytest.mark.parametrize("text", NOT_INCLUDED)
def test_not_included(text):
    assert not is_included(text)


def test_a_path_with_blanks_quotes_and_backslashes():
    wanted = Path("/home/al ice/it's\"\\x/vnet_ssh_config")
    assert is_included(r'Include "/home/al ice/it\'s\"\\x/vnet_ssh_config"', wanted)
    assert is_included(r"Include /home/al\ ice/it\'s\"\\x/vnet_ssh_config", wanted)
    assert not is_included("Include /home/al ice/it's\"\\x/vnet_ssh_config", wanted)


LINE = "Include ~/.tsh/vnet_ssh_config\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", Inclusion.NOT),
        (LINE, Inclusion.FOR_ALL_HOSTS),
        (f"Host a\n{LINE}", Inclusion.FOR_SOME_HOSTS),
        (f"Match user bob\n{LINE}", Inclusion.FOR_SOME_HOSTS),
        (f"Host a\n{LINE}Host *\n{LINE}", Inclusion.FOR_ALL_HOSTS),
        (f"Host a\nMatch ALL\n{LINE}", Inclusion.FOR_ALL_HOSTS),
        (f"Host * !a\n{LINE}", Inclusion.FOR_SOME_HOSTS),
        (f"{LINE}Host a\n{LINE}", Inclusion.FOR_ALL_HOSTS),
    ],
)
def test_an_include_below_a_host_line_is_for_that_host(text, found):
    assert find_inclusion(text, WANTED, HOME) is found


@given(st.text(alphabet=" \t\n\\'\"#~=IncludeHostMatch/*.", max_size=80))
def test_any_text_has_an_answer(text):
    assert not is_included(text, Path("/nowhere/at all"))


needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="no OpenSSH client")
USER_HOME = Path(pwd.getpwuid(os.getuid()).pw_dir)


def openssh_reads(config: Path) -> bool:
    """Whether OpenSSH comes to the line `User included`."""
    done = subprocess.run(
        ["ssh", "-G", "-F", str(config), "some.test"], capture_output=True, text=True, check=False
    )
    return "\nuser included\n" in f"\n{done.stdout}"


# As INCLUDED and NOT_INCLUDED; {path} is the file, {up} leads from the user's home to the root.
LINES = [
    ('Include "{path}"', True),
    ("include\t{path} \r", True),
    ("Include = {path}", True),
    ("Include={path}", True),
    ("Include ~/{up}{path}", True),
    ('Include "~/{up}{path}"', True),
    ("Include '{path}' # VNet", True),
    ("Include /nowhere {path}", True),
    ("Include /{path}", True),
    ("Include {folder}/./x/../included", True),
    ('Include {folder}/"included"', True),
    ("Host *\n  Include {path}", True),
    ("Match all\n  Include {path}", True),
    ("Host other.test\n  Include {path}", False),
    ("Host * !some.test\n  Include {path}", False),
    ("#Include {path}", False),
    ("Include /nowhere # {path}", False),
    ("Include {path}#", False),
    ('Include "{path}', False),
    ("Include {path}2", False),
    ("Include {folder}/'included\"", False),
    ("Includes {path}", False),
]


@needs_ssh
@pytest.mark.parametrize(("line", "expected"), LINES)
def test_openssh_reads_the_lines_alike(tmp_path, line, expected):
    folder = tmp_path / "a folder" if '"{path}"' in line else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "x").mkdir()
    path = folder / "included"
    path.write_text("User included\n")
    up = "../" * (len(USER_HOME.parts) - 1)
    text = line.format(path=path, folder=folder, up=up.rstrip("/")) + "\n"
    config = tmp_path / "config"
    config.write_text(text)
    assert openssh_reads(config) is expected
    ours = find_inclusion(text, path, USER_HOME)
    assert (ours is Inclusion.FOR_ALL_HOSTS) is expected

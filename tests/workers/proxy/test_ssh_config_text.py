"""What OpenSSH is told: exact texts, and what `ssh -G` makes of them."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.proxy.ssh.config_text import (
    BANNER,
    UnwritablePathError,
    authority_in,
    client_config,
    host_patterns,
    known_hosts,
)

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="no OpenSSH client")
HOME = Path("/home/alice/.tsh")


def options(text: str, host: str, tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "config"
    path.write_text(text)
    done = subprocess.run(
        ["ssh", "-G", "-F", str(path), host], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def test_the_whole_text():
    assert client_config(HOME, ["leaf.test", "demo.test", "leaf.test"]) == (
        BANNER
        + """
Host *.demo.test *.leaf.test *.demo.test. *.leaf.test.
    IdentityFile "/home/alice/.tsh/id_vnet"
    GlobalKnownHostsFile "/home/alice/.tsh/vnet_known_hosts"
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    IdentitiesOnly yes
"""
    )
    assert all(line.startswith("# ") for line in BANNER.splitlines())
    assert len(BANNER.splitlines()) == 4


def test_without_a_cluster_there_are_only_comments():
    for clusters in ([], ["", ".", "*", "a b"]):
        text = client_config(HOME, clusters)
        assert text.startswith(BANNER)
        assert text != BANNER
        assert not [line for line in text.splitlines() if line and not line.startswith("#")]


def test_names_of_clusters_are_foreign_text():
    evil = ["x\n  ProxyCommand evil", "*", "!a.test", "a,b", "a b", '"', "#", "a\0", "é.test"]
    assert host_patterns(evil) == []
    assert host_patterns([*evil, ".Demo.Test.", "my_cluster"]) == [
        "*.demo.test",
        "*.my_cluster",
        "*.demo.test.",
        "*.my_cluster.",
    ]


@given(st.lists(st.text(max_size=20), max_size=5))
def test_a_pattern_is_a_star_and_a_name(names):
    for pattern in host_patterns(names):
        assert set(pattern.removeprefix("*.")) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-")


def test_known_hosts_are_an_authority_and_a_key():
    assert known_hosts(b"ssh-ed25519 AAAA", b"ssh-ed25519 BBBB") == (
        b"@cert-authority * ssh-ed25519 AAAA\n* ssh-ed25519 BBBB\n"
    )


def test_a_predecessors_authority_is_found_and_stands_behind_the_own_one():
    first = known_hosts(b"ssh-ed25519 " + b"A" * 68, b"ssh-ed25519 " + b"B" * 68)
    found = authority_in(first)
    assert found == b"ssh-ed25519 " + b"A" * 68
    second = known_hosts(b"ssh-ed25519 " + b"C" * 68, b"ssh-ed25519 " + b"B" * 68, found)
    assert second.splitlines()[2] == b"@cert-authority * " + found
    assert authority_in(second) == b"ssh-ed25519 " + b"C" * 68
    for text in (b"", b"* ssh-ed25519 AAAA\n", b"@cert-authority *.evil ssh-ed25519 AAAA\n"):
        assert authority_in(text) == b""


@needs_ssh
def test_openssh_applies_it_to_hosts_of_clusters_only(tmp_path):
    text = client_config(HOME, ["demo.test", "leaf.test"])
    for host in ("n.demo.test", "a.b.demo.test", "n.leaf.demo.test", "n.leaf.test", "n.demo.test."):
        found = options(text, host, tmp_path)
        assert found["identityfile"] == "/home/alice/.tsh/id_vnet"
        assert found["globalknownhostsfile"] == "/home/alice/.tsh/vnet_known_hosts"
        assert found["userknownhostsfile"] == "/dev/null"
        assert found["stricthostkeychecking"] in ("yes", "true")
        assert found["identitiesonly"] == "yes"
    for host in ("demo.test", "other.test", "xdemo.test"):
        assert options(text, host, tmp_path)["identitiesonly"] == "no"
    assert options(client_config(HOME, []), "n.demo.test", tmp_path)["identitiesonly"] == "no"


@needs_ssh
def test_openssh_reads_thousands_of_leaves(tmp_path):
    text = client_config(HOME, [f"leaf{index}.example.com" for index in range(3000)])
    assert options(text, "n.leaf2999.example.com", tmp_path)["identitiesonly"] == "yes"


@pytest.mark.parametrize("name", ["${HOME}", "a\nb", "a\rb"])
def test_a_path_that_cannot_be_written_down_is_named(name):
    with pytest.raises(UnwritablePathError, match="TELEPORT_HOME"):
        client_config(Path("/tmp") / name, ["demo.test"])

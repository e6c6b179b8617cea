"""What `vnet demo` and `vnet demo-cluster` promise to whoever calls them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_bed import VNET, scratch_directory
from private_bed import descendants, is_running, lines_of, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]


def vnet_demo(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [VNET, "demo", *arguments], input=stdin, capture_output=True, timeout=90, check=False
    )


# As a machine has them: what is mounted further down shows here too, unless that is prevented.
_STAND_IN = "mount --make-rshared / && ip link set lo up && echo up && exec cat"


class StandIn:
    """Network and mounts in the place of the machine's own, which others change at the same time."""

    def __init__(self, pid: int) -> None:
        """`pid` is that of a process in both namespaces."""
        self._pid = pid

    def command(self, *arguments: str) -> list[str]:
        """A command line that becomes this program, in them."""
        return ["nsenter", f"--target={self._pid}", "--net", "--mount", "--", *arguments]

    def look(self) -> tuple[str, str, list[str], str]:
        """What a demo must leave as it is: interfaces, routes, mounts, resolver."""
        links, routes = (
            subprocess.run(self.command("ip", "-o", *what), capture_output=True, check=True).stdout
            for what in (("link",), ("route", "show", "table", "all"))
        )
        seen = Path(f"/proc/{self._pid}")
        mounts = (seen / "mounts").read_text().splitlines()
        return (
            links.decode(),
            routes.decode(),
            sorted(line.split()[1] for line in mounts),
            (seen / "root/etc/resolv.conf").read_text(),
        )


@pytest.fixture
def outside() -> Iterator[StandIn]:
    """What is around a demo."""
    with subprocess.Popen(
        ["unshare", "--net", "--mount", "sh", "-c", _STAND_IN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield StandIn(process.pid)
        finally:
            process.kill()


def start_sleeping_demo(outside: StandIn) -> subprocess.Popen[bytes]:
    """A demo whose COMMAND has started and sleeps."""
    command = (VNET, "demo", "--", "sh", "-c", "echo up; exec sleep 300")
    process = subprocess.Popen(outside.command(*command), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def test_input_output_and_exit_status_are_those_of_the_command():
    done = vnet_demo("--", "sh", "-c", "tr a-z A-Z; echo oops >&2; exit 7", stdin=b"hello\n")
    assert done.returncode == 7
    assert done.stdout == b"HELLO\n"
    assert b"oops\n" in done.stderr


def test_a_command_that_is_not_there_is_127():
    done = vnet_demo("--", "/does/not/exist", "--flag")
    assert done.returncode == 127
    assert done.stdout == b""
    assert "/does/not/exist" in lines_of(done.stderr)[-1]


def test_the_status_of_a_command_that_a_signal_ends_is_the_shells():
    assert vnet_demo("--", "sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("option", "text", "complaint"),
    [
        ("--cluster", "[[clusters]]\nname = 3\n", "name"),
        ("--cluster", "not toml at all", "cluster"),
        ("--cluster", None, "No such file"),
        ("--config", "[network]\nmtu = 70000\n", "network.mtu"),
        ("--config", "mtu = = 3", "config"),
        ("--config", None, "No such file"),
    ],
)
def test_a_demo_that_cannot_be_set_up_is_125_with_one_line(tmp_path, option, text, complaint):
    path = tmp_path / f"{option.strip('-')}.toml"
    if text is not None:
        path.write_text(text)
    done = vnet_demo(option, str(path), "--", "echo", "never")
    assert done.returncode == 125
    assert done.stdout == b""
    [line] = lines_of(done.stderr)
    assert line.startswith("vnet demo: ")
    assert complaint in line
    assert "Traceback" not in line


def test_the_command_gets_the_environment_and_a_path_with_vnet(bed):
    environment = bed.environment
    assert environment["HOME"] == os.environ["HOME"]
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert bed.path(environment["VNET_RUN_DIR"]).is_dir()
    assert (
        bed.path(
            environment["TELEPORT_HOME"],
        )
        .joinpath("current-profile")
        .is_file()
    )
    assert bed.output("sh", "-c", "command -v vnet") == f"{VNET}\n"


def test_the_command_runs_in_the_callers_directory(tmp_path):
    done = subprocess.run(
        [VNET, "demo", "--", "pwd"], cwd=tmp_path, capture_output=True, timeout=90, check=True
    )
    assert done.stdout.decode() == f"{tmp_path}\n"


def test_sigterm_ends_the_demo_and_leaves_nothing(outside):
    before = outside.look()
    with start_sleeping_demo(outside) as process:
        below = descendants(process.pid)
        assert len(below) >= 8  # watcher, init, cluster, supervisor, five workers, command
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM
    wait_until(lambda: not any(map(is_running, below)), "every process has ended")
    assert outside.look() == before


def test_sigkill_of_the_demo_leaves_nothing(outside):
    before = outside.look()
    with start_sleeping_demo(outside) as process:
        below = descendants(process.pid)
        process.kill()
        wait_until(lambda: not any(map(is_running, below)), "every process has ended")
    assert outside.look() == before


def test_sigint_ends_a_demo_without_a_command():
    with subprocess.Popen(
        [VNET, "demo"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert b"try: curl http://" in process.stderr.readline()
        below = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    wait_until(lambda: not any(map(is_running, below)), "every process has ended")


def test_the_default_demo_has_the_promised_apps():
    script = """
    set -e
    curl -sS http://hello.demo.test/ | grep -q 'Hello from VNet'
    exec 3<>/dev/tcp/ports.demo.test/8003; read -r port <&3; test "$port" = 8003
    exec 4<>/dev/tcp/echo.demo.test/7; echo ping >&4; read -r word <&4; test "$word" = ping
    """
    done = vnet_demo("--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr.decode()


CLUSTER_ON_LOOPBACK = """
[[clusters]]
name = "alone.test"
proxy_addr = "localhost:0"
custom_dns_zones = ["alone.test"]

[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"
public_addr = "echo.alone.test"
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_demo_cluster_writes_a_home_and_stops_cleanly(number):
    with scratch_directory() as directory:
        file, home = directory / "cluster.toml", directory / "home"
        file.write_text(CLUSTER_ON_LOOPBACK)
        with subprocess.Popen(
            [VNET, "demo-cluster", "--cluster", str(file), "--home", str(home)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                assert process.stderr is not None
                assert str(home).encode() in process.stderr.readline()
                assert (home / "current-profile").read_text() == "localhost\n"
                assert (home / "localhost.yaml").is_file()
                assert (home / "keys" / "localhost" / "alice.crt").is_file()
                process.send_signal(number)
                assert process.wait(10) == 0
                assert process.stderr.read() == b""
            finally:
                process.kill()


def test_demo_cluster_leaves_a_real_login_alone(tmp_path):
    (tmp_path / "teleport.example.com.yaml").write_text("user: alice\n")
    done = subprocess.run(
        [VNET, "demo-cluster", "--home", str(tmp_path)],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 125
    assert "real login" in lines_of(done.stderr)[0]
    assert (tmp_path / "teleport.example.com.yaml").read_text() == "user: alice\n"

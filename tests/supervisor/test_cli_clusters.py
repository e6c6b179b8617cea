"""`vnet ls` and `vnet proxy` as programs, with the embedded cluster of `vnet demo-cluster`."""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.cluster.totp import totp_code

VNET = [sys.executable, "-c", "from supervisor.cli.app import main; main()"]
DEADLINE_SECONDS = 30.0

CLUSTERS = """
[[clusters]]
name = "root.test"
proxy_addr = "localhost:0"
custom_dns_zones = ["corp.test"]
mfa_devices = ["totp"]
[[clusters.apps]]
name = "hello"
uri = "tcp://hello.backend.internal:80"
public_addr = "hello.corp.test"
[[clusters.apps]]
name = "ports"
uri = "tcp://ports.backend.internal"
tcp_ports = [{ port = 8000, end_port = 8010 }]
[[clusters.apps]]
name = "guarded"
uri = "tcp://echo.backend.internal:7"
session_mfa = true
[[clusters.apps]]
name = "wiki"
uri = "http://127.0.0.1:1"
[[clusters.databases]]
name = "orders"
protocol = "postgres"
uri = "127.0.0.1:1"
[[clusters]]
name = "leaf.test"
leaf_of = "root.test"
[[clusters.apps]]
name = "hello"
uri = "tcp://hello.backend.internal:80"
public_addr = "hello.leaf.test"
"""


class Bed:
    """A cluster that runs, and how to use it."""

    def __init__(self, directory: Path) -> None:
        self.home = directory / "tsh"
        self.config = directory / "vnet.toml"
        self.config.write_text(f'[teleport]\nca_file = "{self.home / "web-ca.pem"}"\n')
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name not in {"SUDO_USER", "NO_COLOR", "COLUMNS"} and "proxy" not in name.lower()
        } | {"TELEPORT_HOME": str(self.home), "TERM": "xterm"}

    def run(self, *arguments, **changes):
        return subprocess.run(
            [*VNET, *arguments],
            env=self.environment | changes,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )

    def ls(self, *arguments):
        done = self.run("ls", "--config", str(self.config), "--json", *arguments)
        return done.returncode, json.loads(done.stdout)

    @contextlib.contextmanager
    def proxy(self, *arguments, stdin=subprocess.DEVNULL):
        """A running `vnet proxy`, and its local port."""
        process = subprocess.Popen(
            [*VNET, "proxy", "--config", str(self.config), *arguments],
            env=self.environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            line = process.stdout.readline()
            match = re.fullmatch(r"127\.0\.0\.1:(\d+) -> \S+\n", line)
            assert match, (line, process.communicate(timeout=DEADLINE_SECONDS))
            yield process, int(match[1])
        finally:
            process.kill()
            process.communicate()

    @contextlib.contextmanager
    def fault(self, text):
        """A fault that has taken effect when the work begins, and passed when it is done."""
        faults = self.home / "faults"
        before = self.ls()
        faults.write_text(text)
        self._until(lambda: self.ls() != before)
        try:
            yield
        finally:
            faults.write_text("")
        self._until(lambda: self.ls() == before)

    def _until(self, condition):
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clusters")
    made = Bed(directory)
    file = directory / "clusters.toml"
    file.write_text(CLUSTERS)
    log = directory / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*VNET, "demo-cluster", "--cluster", str(file), "--home", str(made.home)],
            stderr=output,
        )
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while "the cluster runs" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield made
    finally:
        process.terminate()
        process.wait(DEADLINE_SECONDS)


def test_ls_prints_json(bed):
    status, listing = bed.ls()
    assert status == 0
    assert (listing["schema"], listing["problems"]) == (1, [])
    assert [(row["kind"], row["name"], row["cluster"]) for row in listing["resources"]] == [
        ("app", "guarded", "root.test"),
        ("app", "hello", "leaf.test"),
        ("app", "hello", "root.test"),
        ("app", "ports", "root.test"),
        ("app", "wiki", "root.test"),
        ("db", "orders", "root.test"),
    ]
    assert listing["resources"][2] == {
        "kind": "app",
        "name": "hello",
        "cluster": "root.test",
        "profile": "localhost",
        "address": "hello.corp.test",
        "ports": "any",
        "protocol": "tcp",
        "through_vnet": True,
        "note": "",
    }


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--kind", "db"], ["orders"]),
        (["--kind", "db", "--kind", "app", "--search", "or"], ["hello", "ports", "orders"]),
        (["--search", "HELLO leaf"], ["hello"]),
        (["--cluster", "leaf.test"], ["hello"]),
        (["--search", "nothing-like-it"], []),
    ],
)
def test_ls_chooses(bed, arguments, found):
    status, listing = bed.ls(*arguments)
    assert status == 0
    assert [row["name"] for row in listing["resources"]] == found


def test_ls_into_a_pipe_is_the_whole_table_and_nothing_else(bed):
    done = bed.run("ls", COLUMNS="20")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["KIND", "NAME", "ADDRESS", "PORTS", "CLUSTER"]
    assert len(lines) == 7
    assert "\x1b" not in done.stdout
    assert "8000-8010" in done.stdout


@pytest.mark.parametrize("no_color", ["", "1"])
def test_ls_on_a_terminal_fits_it(bed, no_color):
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*VNET, "ls"],
        env=bed.environment | {"COLUMNS": "60", "NO_COLOR": no_color},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        text = read_all(ours)
    assert process.returncode == 0
    assert ("\x1b[1m" in text) is (no_color == "")
    lines = re.sub(r"\x1b\[\d+m", "", text).splitlines()
    assert max(map(len, lines)) <= 60
    assert any(line.startswith("wiki: a web app") for line in lines)


def read_all(descriptor):
    text = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(descriptor, 4096):
            text += piece
    os.close(descriptor)
    return text.decode()


def test_ls_says_what_cannot_be_asked_and_shows_the_rest(bed):
    with bed.fault("leaf_offline leaf.test"):
        done = bed.run("ls")
    assert done.returncode == 1
    assert "hello.corp.test" in done.stdout
    assert done.stderr.startswith("vnet: leaf.test cannot be asked: ")
    assert done.stderr.count("\n") == 1


def test_an_expired_login_says_what_to_do(bed):
    with bed.fault("expire_login"):
        listed, proxied = bed.run("ls"), bed.run("proxy", "hello.corp.test")
    assert (listed.returncode, listed.stdout) == (1, "")
    assert "tsh login --proxy=localhost" in listed.stderr
    assert proxied.returncode == 1
    assert "tsh login --proxy=localhost" in proxied.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["ls", "--kind", "apps"], 2, "'apps' is no kind: use one of app, db, node"),
        (["ls", "--cluster", "none.test"], 2, "lead to leaf.test, root.test"),
        (["ls", "--config", "/none.toml"], 2, "/none.toml does not exist"),
        (["proxy", "none"], 2, "vnet ls shows"),
        (["proxy", "hello"], 2, "hello.corp.test in root.test; hello.leaf.test in leaf.test"),
        (["proxy", "wiki"], 2, "open https://wiki.localhost"),
        (["proxy", "ports", "--port", "7"], 2, "it has 8000-8010"),
        (["proxy", "hello.corp.test"], 1, "name its authority as ca_file"),
    ],
)
def test_errors_are_one_line_each(bed, arguments, status, text):
    done = bed.run(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert text in done.stderr
    assert done.stderr.startswith("vnet: ")
    assert done.stderr.count("\n") == 1


def test_a_home_without_logins(bed, tmp_path):
    done = bed.run("ls", TELEPORT_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "run tsh login" in done.stderr


@pytest.mark.parametrize("address", ["hello.corp.test", "hello.leaf.test"])
def test_proxy_carries_curl(bed, address):
    with bed.proxy(address) as (_, port):
        for _ in range(2):
            page = subprocess.run(
                ["curl", "-sS", "--noproxy", "*", f"http://127.0.0.1:{port}/there"],
                capture_output=True,
                text=True,
                timeout=DEADLINE_SECONDS,
                check=False,
            )
            assert "You asked for" in page.stdout, page.stderr
            assert "/there" in page.stdout


@pytest.mark.skipif(shutil.which("psql") is None, reason="no psql")
def test_proxy_carries_psql_as_far_as_the_database(bed):
    """Its database does not run here: the refusal is the cluster's, in PostgreSQL's protocol."""
    with bed.proxy("orders.db.localhost") as (_, port):
        done = subprocess.run(
            ["psql", f"host=127.0.0.1 port={port} user=alice dbname=shop", "-c", "select 1"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )
    assert done.returncode == 2
    assert "Connect call failed ('127.0.0.1', 1)" in done.stderr


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_proxy_uses_the_port_it_is_given_and_ends_in_order(bed, number):
    wanted = free_port()
    with bed.proxy("ports", str(wanted), "--port", "8005") as (process, port):
        assert port == wanted
        with socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as connection:
            assert connection.recv(4) == b"8005"
            process.send_signal(number)
            assert process.wait(DEADLINE_SECONDS) == 0
            assert process.stderr.read() == ""


def test_a_port_that_is_in_use_is_a_conflict(bed):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = bed.run("proxy", "ports", str(other.getsockname()[1]))
    assert done.returncode == 6
    assert "is in use" in done.stderr


def wait_for(process, text):
    """What it says on standard error, up to this text."""
    said = ""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while text not in said:
        readable, _, _ = select.select([process.stderr], [], [], deadline - time.monotonic())
        assert readable, said
        piece = os.read(process.stderr.fileno(), 4096).decode()
        assert piece, said
        said += piece
    return said


def test_proxy_asks_for_a_second_factor_in_its_terminal(bed):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*VNET, "proxy", "--config", str(bed.config), "guarded"],
        env=bed.environment,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    try:
        assert "app guarded in root.test" in wait_for(process, "code (")
        os.write(ours, b"000000\n")
        wait_for(process, "not taken")
        secret = (bed.home / "totp-secret").read_text().strip()
        os.write(ours, totp_code(secret, time.time()).encode() + b"\n")
        line = process.stdout.readline().decode()
        port = int(re.match(r"127\.0\.0\.1:(\d+) -> guarded\.localhost\n", line)[1])
        with socket.create_connection(("127.0.0.1", port), DEADLINE_SECONDS) as connection:
            connection.sendall(b"hello")
            assert connection.recv(5) == b"hello"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_SECONDS) == 0
    finally:
        process.kill()
        process.communicate()
        os.close(ours)


def test_without_a_terminal_there_is_no_second_factor(bed):
    done = bed.run("proxy", "--config", str(bed.config), "guarded")
    assert done.returncode == 1
    assert "needs a second factor" in done.stderr.splitlines()[-1]

"""`vnet connections` in a whole VNet: what connects, from which program, how fast, and why not."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_bed import VNET, demo_bed
from private_bed import Bed, children, inner_pid, lines_of, read_exactly, wait_until
from sshd_bed import ssh_command
from sshd_server import own_user

pytestmark = [pytest.mark.root, pytest.mark.e2e]

LOGIN = own_user()
OWN_PORT = 7001
OWN, PORTS = "own.teleport.list.test", "ports.teleport.list.test"
CLUSTER = f"""
[[clusters]]
name = "list.test"
proxy_addr = "teleport.list.test:3080"
logins = ["{LOGIN}"]
nodes = [{{ hostname = "node1" }}, {{ hostname = "node2" }}]
apps = [
  {{ name = "own", uri = "tcp://127.0.0.1:{OWN_PORT}" }},
  {{ name = "refused", uri = "tcp://127.0.0.1:{OWN_PORT}" }},
  {{ name = "ports", uri = "tcp://ports.backend.internal", tcp_ports = [{{ port = 8000, end_port = 8010 }}] }},
]
"""
CONFIG = """
[proxy]
workers = 1
max_connections = 5
[supervisor]
restart_max = 1000
restart_window_seconds = 1
"""
READ_ALL = """
import socket, sys
end = socket.create_connection((sys.argv[1], int(sys.argv[2])))
while end.recv(65536):
    pass
"""
PIECE = bytes(20_000)

Row = dict[str, Any]


@pytest.fixture(scope="module")
def module_bed() -> Iterator[Bed]:
    """One proxy with room for five connections."""
    with demo_bed(CLUSTER, CONFIG) as bed:
        yield bed


@pytest.fixture
def listed(module_bed) -> Bed:
    module_bed.wait_for_health("healthy")
    return module_bed


def connections(bed: Bed) -> dict[str, Any]:
    """What `vnet connections --json` prints."""
    return json.loads(bed.output(VNET, "connections", "--json"))


def row(bed: Bed, fits: Callable[[Row], bool], what: str) -> Row:
    """The newest connection that fits."""

    def look() -> Row | None:
        return next((r for r in connections(bed)["connections"] if fits(r)), None)

    return wait_until(look, what)


def all_have_ended(bed: Bed) -> None:
    """Returns when nothing is connected."""
    wait_until(lambda: not any(t["active"] for t in connections(bed)["targets"]), "all has ended")


def target(found: dict[str, Any], name: str) -> Row:
    return next(t for t in found["targets"] if t["name"] == name)


def id_is_in_the_log(bed: Bed, wanted: Row, words: str) -> bool:
    lines = map(json.loads, lines_of(bed.output(VNET, "logs", "--json")))
    return any(line["connection"] == wanted["id"] and words in line["message"] for line in lines)


def wait_for_line(bed: Bed, wanted: Row, words: str) -> None:
    """Returns when the log tells of it. The log comes through a pipe of its own."""
    wait_until(lambda: id_is_in_the_log(bed, wanted, words), "the log tells of it")


def test_download_shows_with_program_rates_and_bytes_and_then_its_end(listed):
    bed = listed

    def serve(connection) -> None:
        # 200 KB a second.
        while True:
            connection.sendall(PIECE)
            wait_until_readable(connection)

    def wait_until_readable(connection) -> None:
        connection.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            connection.recv(1)
        connection.settimeout(20)

    with (
        bed.listening(OWN_PORT, serve),
        bed.running(sys.executable, "-c", READ_ALL, OWN, "7000", log_name="reader") as process,
    ):

        def is_fast(r: Row) -> bool:
            # One that has been seen once has no rate yet, and its program is found out a moment later.
            known = r["received_per_second"] and r["pid"] is not None
            return bool(r["name"] == OWN and r["state"] == "active" and known)

        first = row(bed, is_fast, "the download goes on")
        [reader] = wait_until(lambda: children(process.pid), "the program runs")
        assert first["pid"] == inner_pid(Path(f"/proc/{reader}"))
        assert Path(first["program"]).name == Path(sys.executable).resolve().name
        assert first["uid"] == os.getuid()
        assert (first["kind"], first["worker"], first["port"]) == ("app", "proxy-0", 7000)
        assert (first["profile"], first["leaf"]) == ("teleport.list.test", "")
        assert 1000 < first["received_per_second"] < 2_000_000
        assert first["sent_per_second"] == 0
        assert first["bytes_received"] > 0
        again = row(
            bed,
            lambda r: r["id"] == first["id"] and r["bytes_received"] > first["bytes_received"],
            "more comes",
        )

        def totals() -> Row | None:
            found = target(connections(bed), OWN)
            return found if found["received_per_second"] else None

        found = wait_until(totals, "the totals have a rate")
        assert (found["active"], found["kind"], found["port"]) == (1, "app", None)

        def is_shown() -> bool:
            text = bed.output(VNET, "connections")
            return f" {first['pid']} " in text and first["id"] in text

        wait_until(is_shown, "the text has both")
    ended = row(bed, lambda r: r["id"] == first["id"] and r["state"] == "done", "it has ended")
    assert ended["bytes_received"] >= again["bytes_received"]
    assert ended["ended"] > ended["started"]
    assert ended["pid"] is None
    assert target(connections(bed), OWN)["active"] == 0


def test_refused_ones_show_with_their_reasons(listed):
    bed = listed
    bed.seconds_until_refused(PORTS, 9999)
    port = row(bed, lambda r: r["port"] == 9999, "a port that the app does not have")
    assert (port["state"], port["refusal"]) == ("failed", "port_not_allowed")
    assert "8000-8010" in port["error"]
    wait_for_line(bed, port, "port_not_allowed")

    with bed.faults("refuse_certs"):
        bed.seconds_until_refused("refused.teleport.list.test", 80)
    certificate = row(bed, lambda r: r["name"].startswith("refused."), "a refused certificate")
    assert (certificate["kind"], certificate["refusal"]) == ("app", "certificate_refused")
    wait_for_line(bed, certificate, "certificate_refused")

    with bed.faults("node_offline node2"):
        bed.seconds_until_refused("node2.list.test", 22)
    node = row(bed, lambda r: r["name"] == "node2.list.test", "a node that is offline")
    assert (node["kind"], node["worker"], node["refusal"]) == ("ssh", "ssh", "node_unreachable")
    assert node["error"]

    all_have_ended(bed)
    with contextlib.ExitStack() as ends:
        address = bed.resolve(PORTS)[0]
        for _ in range(5):
            end = ends.enter_context(bed.connect(address, 8000))
            assert read_exactly(end, 5) == b"8000\n"
        bed.seconds_until_refused(address, 8001)
        found = connections(bed)
    newest = next(r for r in found["connections"] if r["state"] == "failed")
    assert (newest["refusal"], newest["port"], newest["name"]) == ("too_many", 8001, "")
    # This process is in another pid namespace: only its user can be seen.
    active = [r for r in found["connections"] if r["state"] == "active"]
    assert [(r["uid"], r["pid"]) for r in active if r["port"] == 8000] == [(os.getuid(), None)] * 5
    ports = next(t for t in found["targets"] if t["name"] == PORTS and t["port"] == 8000)
    assert (ports["active"], ports["failed"]) == (5, 0)
    others = next(t for t in found["targets"] if t["name"] == PORTS and t["port"] is None)
    assert others["ok"] == 0
    assert others["failed"] >= 1
    # The next test needs room.
    all_have_ended(bed)


def test_ssh_session_shows(listed):
    bed = listed
    command = ssh_command(bed, "-l", LOGIN, "node1.list.test", "sleep 1000")
    with bed.running(*command):
        session = row(
            bed,
            lambda r: (
                r["name"] == "node1.list.test" and r["bytes_received"] > 1000 and r["program"]
            ),
            "the session is open",
        )
    assert (session["kind"], session["worker"], session["state"]) == ("ssh", "ssh", "active")
    assert Path(session["program"]).name == "ssh"
    assert session["port"] == 22


def test_connections_of_a_worker_that_is_drained_stay_in_the_list(listed):
    bed = listed
    with bed.connect(PORTS, 8005) as end:
        assert read_exactly(end, 5) == b"8005\n"
        old = row(bed, lambda r: r["port"] == 8005 and r["state"] == "active", "a connection")
        pid = bed.worker("proxy-0")["pid"]
        bed.output(VNET, "restart", "proxy-0", "--drain")
        bed.wait_for_successor("proxy-0", pid)
        with bed.connect(PORTS, 8006) as other:
            assert read_exactly(other, 5) == b"8006\n"
            found = connections(bed)["connections"]
        of_ports = [r for r in found if r["name"] == PORTS]
        assert {r["port"] for r in of_ports if r["state"] == "active"} == {8005, 8006}
        assert any(r["id"] == old["id"] for r in found)


def test_watching_survives_a_killed_worker(listed):
    bed = listed
    pid = bed.worker("proxy-0")["pid"]
    with bed.running(VNET, "connections", "--json", "--watch", log_name="watch"):
        log = bed.directory / "watch.log"
        wait_until(lambda: log.exists() and log.read_text(), "it watches")
        bed.kill(pid)
        bed.wait_for_successor("proxy-0", pid)
        bed.seconds_until_refused(PORTS, 9998)

        def is_told() -> bool:
            whole, _, _ = log.read_text().rpartition("\n")
            lines = [json.loads(line) for line in whole.splitlines()]
            return any(r["port"] == 9998 for line in lines for r in line["connections"])

        wait_until(is_told, "what happens after it is told")


# Imported first: whoever it becomes may not be able to read the program.
LIST_AS_NOBODY = """
import os, pwd, sys
from pathlib import Path
from supervisor.cli import connections
from supervisor.cli.control_client import AskError
entry = pwd.getpwnam("nobody")
os.setgroups([])
os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
try:
    status = connections.run(Path(os.environ["VNET_RUN_DIR"]), watch=False, as_json=False)
except AskError as error:
    status = error.status
    print(error, file=sys.stderr)
raise SystemExit(int(status))
"""


def test_others_may_not_look(listed):
    done = listed.run(sys.executable, "-c", LIST_AS_NOBODY)
    assert done.returncode == 4
    assert b"as root or as the VNet user" in done.stderr

"""The log of a whole VNet: one id follows a connection, one command follows them all."""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_bed import VNET, demo_bed
from private_bed import Bed, lines_of, read_exactly, wait_until
from shared_cluster import CLUSTER, CONFIG

from supervisor.spawn import DUMP_SIGNAL

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ECHO = "echo.teleport.e2e.test"
PORTS = "ports.teleport.e2e.test"

Line = dict[str, Any]


@pytest.fixture(scope="module")
def log_bed() -> Iterator[Bed]:
    """A demo that logs all it can; its workers are killed."""
    with demo_bed(CLUSTER, CONFIG) as bed:
        bed.output(VNET, "log-level", "debug")
        yield bed


@pytest.fixture
def told(log_bed) -> Bed:
    """The same, healthy."""
    log_bed.wait_for_health("healthy")
    return log_bed


def lines(bed: Bed, *options: str) -> list[Line]:
    """What `vnet logs --json` prints."""
    return [json.loads(line) for line in lines_of(bed.output(VNET, "logs", "--json", *options))]


def line_about(found: list[Line], words: str) -> Line | None:
    return next((line for line in reversed(found) if words in line["message"]), None)


def history(bed: Bed, words: str, until: Callable[[list[str]], bool]) -> list[tuple[str, str]]:
    """(worker, message) of all that is said of the connection of which one line says `words`."""

    def look() -> list[tuple[str, str]]:
        found = lines(bed)
        if (line := line_about(found, words)) is None:
            return []
        assert line["connection"]
        about_it = [
            (other["worker"], other["message"])
            for other in found
            if other["connection"] == line["connection"]
        ]
        return about_it if until([message for _, message in about_it]) else []

    return wait_until(look, f"lines about {words}")


def test_an_admitted_connection_is_followed_from_tun_to_its_end_by_one_id(told):
    address = told.resolve(ECHO)[0]
    owner = told.owner_of(address)
    with told.connect(address, 7) as end:
        local_port = end.getsockname()[1]
        end.sendall(b"hello")
        assert read_exactly(end, 5) == b"hello"
    about_it = history(
        told, f"port {local_port} to {address} port 7: held", lambda said: len(said) >= 4
    )
    assert {worker for worker, _ in about_it} == {"tun", owner}
    # Two processes, two pipes: only of one process it is sure what it has said first.
    held, admitted_by = (message for worker, message in about_it if worker == "tun")
    admitted, ended = (message for worker, message in about_it if worker == owner)
    assert held.endswith(": held")
    assert f"admitted by {owner}" in admitted_by
    assert f"connection to {ECHO} at {address}:7 admitted" in admitted
    assert f"connection to {ECHO} ended" in ended


def test_a_refused_connection_is_followed_through_tun_and_proxy_by_one_id(told):
    address = told.resolve(PORTS)[0]
    owner = told.owner_of(address)
    with told.open_socket() as end, pytest.raises(ConnectionRefusedError):
        end.connect((address, 7999))
    about_it = history(
        told,
        f"to {PORTS} at {address}:7999 refused (port_not_allowed)",
        lambda said: sum("refused" in message for message in said) == 2,
    )
    assert {worker for worker, _ in about_it} == {"tun", owner}
    assert any(f"refused (port_not_allowed) by {owner}" in message for _, message in about_it)
    assert any(message.endswith(": held") for _, message in about_it)


def test_refusal_is_told_at_info_with_its_id_also_in_the_text(told):
    address = told.resolve(PORTS)[0]
    with told.open_socket() as end, pytest.raises(ConnectionRefusedError):
        end.connect((address, 7998))

    def look() -> re.Match[str] | None:
        return re.search(
            rf"INFO proxy-\d\[\d+\] c[a-z2-7]{{8}}: connection to {PORTS} at {address}:7998 refused",
            told.output(VNET, "logs", "--level", "info"),
        )

    wait_until(look, "the refusal")
    assert "DEBUG" not in told.output(VNET, "logs", "--level", "info")


def test_a_follower_sees_a_worker_being_replaced(told):
    pid = told.worker("dns")["pid"]
    seen = told.directory / "follow.log"

    def said(worker: str) -> list[Line]:
        whole, _, _ = seen.read_bytes().rpartition(b"\n")
        found = [json.loads(line) for line in lines_of(whole)]
        return [line for line in found if line["worker"] == worker]

    with told.running(VNET, "logs", "--follow", "--json", log_name="follow"):
        wait_until(lambda: seen.read_bytes().endswith(b"\n"), "the lines so far")
        told.kill(pid)
        told.wait_for_successor("dns", pid)
        successor = told.worker("dns")["pid"]

        def is_seen() -> bool:
            begun = line_about(said("dns"), "serving DNS")
            return bool(
                line_about(said("supervisor"), "dns ended with SIGKILL")
                and begun
                and begun["pid"] == successor
            )

        wait_until(is_seen, "the follower sees it")


def test_the_stack_of_a_worker_comes_out_under_its_name(told):
    pid = told.worker("proxy-1")["pid"]
    told.kill(pid, DUMP_SIGNAL)

    def is_told() -> bool:
        # In pieces, if the worker had to wait for a processor while it wrote.
        pieces = [
            line["message"] for line in lines(told, "--worker", "proxy-1") if line["pid"] == pid
        ]
        stack = "\n".join(pieces)
        return "most recent call first" in stack and "workers/runtime.py" in stack

    wait_until(is_told, "the stack")
    assert told.worker("proxy-1")["pid"] == pid


def test_a_worker_that_is_frozen_leaves_the_supervisor_its_log(told):
    pid = told.worker("dns")["pid"]
    told.kill(pid, signal.SIGSTOP)
    try:
        # The command itself waits no longer than 2 s.
        assert lines(told)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it hangs for the supervisor after 5 s
            told.kill(pid, signal.SIGCONT)


# Not the command: the checkout may lie where other users cannot go.
ASK_AS_NOBODY = """
import os, socket, sys
os.setgid(65534)
os.setuid(65534)
end = socket.socket(socket.AF_UNIX)
end.connect(os.environ["VNET_RUN_DIR"] + "/control.sock")
end.sendall(sys.argv[1].encode() + bytes([10]))
print(end.makefile().readline())
"""


@pytest.mark.parametrize(
    "request_line",
    ['{"command":"logs"}', '{"command":"log-level","level":"debug","next_start":true}'],
)
def test_another_user_gets_nothing(told, request_line):
    answer = json.loads(told.output(sys.executable, "-c", ASK_AS_NOBODY, request_line))
    assert answer["status"] == 4
    assert answer["text"].startswith("only root")
    assert set(answer) == {"status", "text"}


def test_a_wrong_worker_is_told_the_right_ones(told):
    done = told.run(VNET, "logs", "--worker", "proxy-7")
    assert done.returncode == 2
    for name in ("supervisor", "tun", "dns", "proxy-0", "proxy-1", "ssh"):
        assert name in done.stderr.decode()


def test_workers_do_not_hold_the_supervisors_standard_error(told):
    status = told.status()

    def standard_error(pid: int) -> str:
        return str(Path(f"/proc/{told.outer_pid(pid)}/fd/2").readlink())

    of_supervisor = standard_error(status["supervisor"]["pid"])
    for worker in status["workers"]:
        found = standard_error(worker["pid"])
        assert found.startswith("pipe:")
        assert found != of_supervisor

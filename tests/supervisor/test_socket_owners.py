"""Whose a connection is, asked of this machine's kernel."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.cli import socket_owners as module
from supervisor.cli.socket_owners import Ends, SocketOwner, owners

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")

ROOT = Path(__file__).parents[2]
CONNECT = """
import socket, sys
end = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
print(end.getsockname()[1], flush=True)
sys.stdin.read()
"""


def ends_of(end: socket.socket) -> Ends:
    (address, port), (peer_address, peer_port) = end.getsockname()[:2], end.getpeername()[:2]
    plain = [text.removeprefix("::ffff:") for text in (address, peer_address)]
    return Ends(plain[0], port, plain[1], peer_port)


@pytest.fixture(params=["IPv4", "IPv6", "IPv4 by an IPv6 socket"])
def connected(request):
    """A connection of this process."""
    host = "::1" if request.param == "IPv6" else "127.0.0.1"
    family = socket.AF_INET if request.param == "IPv4" else socket.AF_INET6
    to = "::ffff:127.0.0.1" if request.param.startswith("IPv4 by") else host
    listening = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, 0), family=listening) as server,
        socket.socket(family) as end,
    ):
        end.connect((to, server.getsockname()[1]))
        yield end


def test_own_connection_is_found_until_it_is_closed(connected):
    ends = ends_of(connected)
    own = SocketOwner(os.getuid(), os.getpid(), str(Path("/proc/self/exe").readlink()))
    assert owners([ends]) == {ends: own}
    other = ends._replace(port=ends.port ^ 1)
    assert other not in owners([ends, other])
    connected.close()
    assert owners([ends]) == {}


def test_the_listener_at_the_same_address_is_not_taken_for_it():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert owners([Ends("127.0.0.1", port, "127.0.0.1", 1)]) == {}


def test_a_program_is_found_among_the_others():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with subprocess.Popen(
            [sys.executable, "-c", CONNECT, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            ends = Ends("127.0.0.1", int(process.stdout.readline()), "127.0.0.1", port)
            found = owners([ends])[ends]
            assert found.pid == process.pid
            assert found.program == str(Path(f"/proc/{process.pid}/exe").readlink())
            process.communicate("")


AS_NOBODY = """
import json, os, sys
from supervisor.cli.socket_owners import Ends, owners
os.setgroups([])
os.setuid(65534)
ends = Ends(*json.loads(sys.argv[1]))
print(owners([ends])[ends])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_processes_of_others_stay_hidden_but_not_their_user(connected):
    arguments = [sys.executable, "-c", AS_NOBODY, json.dumps(ends_of(connected))]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"{SocketOwner(0, None, None)}\n"


def test_what_is_no_address_is_left_out(connected):
    ends = ends_of(connected)
    odd = [
        Ends("", 1, "", 2),
        Ends("100.64.0.1", 1, "fd00::1", 2),
        Ends("x" * 45, 1, "::", 2),
        Ends("::", 1, "1.2.3.4", 2),
    ]
    assert list(owners([*odd, ends])) == [ends]


def test_so_many_and_no_more(connected, monkeypatch):
    monkeypatch.setattr(module, "MAX_QUESTIONS", 2)
    ends = ends_of(connected)
    others = [ends._replace(port=port) for port in (1, 2)]
    assert owners([*others, ends]) == {}
    assert owners([others[0], ends])


def test_looking_through_processes_ends_in_time(connected, monkeypatch):
    monkeypatch.setattr(module, "PROC_SECONDS", -1)
    ends = ends_of(connected)
    assert owners([ends]) == {ends: SocketOwner(os.getuid(), None, None)}

"""Who may connect on a machine with several users: each SYN is its user's, whatever the ports were before."""

import contextlib
import json
import os
import pwd
import random
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from database_servers import postgres_in
from demo_bed import VNET, demo_bed
from private_bed import AT_ONCE_SECONDS, Bed, lines_of, wait_until
from sshd_server import own_user
from two_users import CONNECTED, LEFT, REFUSED, attempts, one_after_the_other, own_address

from supervisor.namespace import inside

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ALLOWED, STRANGER, THIRD = "games", "daemon", "news"
USERS = {name: pwd.getpwnam(name).pw_uid for name in (ALLOWED, STRANGER, THIRD)} | {"root": 0}
ECHO, PG = "echo.teleport.users.test", "pg.teleport.users.test"
# Nobody has connected to it before the one test that needs this.
LATE = "late.teleport.users.test"
NODE = "node1.users.test"
CLUSTER = f"""
[[clusters]]
name = "users.test"
proxy_addr = "teleport.users.test:3080"
logins = ["{own_user()}"]
nodes = [{{ hostname = "node1" }}]
apps = [
  {{ name = "echo", uri = "tcp://echo.backend.internal:7" }},
  {{ name = "late", uri = "tcp://echo.backend.internal:7" }},
  {{ name = "pg", uri = "tcp://127.0.0.1:5432" }},
]
"""
CONFIG = f"""
[security]
allow_users = ["{ALLOWED}"]
[supervisor]
restart_max = 1000
restart_window_seconds = 1
"""
# netinet/tcp.h; Python has no names for them.
TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE = 30, 34
# A refusal takes a few milliseconds; nothing that it could wait for by mistake is as quick as this. On a busy
# machine a few of many may have to wait for a processor.
REFUSAL_SECONDS = 1.0
SLOWER_REFUSALS = 2


@pytest.fixture(scope="module")
def users_bed() -> Iterator[Bed]:
    """A demo in which one user more than root may connect."""
    with demo_bed(CLUSTER, CONFIG) as bed:
        yield bed


@pytest.fixture
def bed(users_bed) -> Iterator[Bed]:
    """The same, with the configuration that it began with."""
    users_bed.wait_for_health("healthy")
    path = config_path(users_bed)
    before = path.read_text()
    yield users_bed
    if path.read_text() != before:
        path.write_text(before)
        users_bed.reload()


def config_path(bed: Bed) -> Path:
    return bed.path(Path(bed.environment["VNET_RUN_DIR"]).with_name("vnet.toml"))


def use_security(bed: Bed, lines: str) -> str:
    """Writes the section anew and reloads; what `vnet reload` says."""
    path = config_path(bed)
    path.write_text(path.read_text().replace(f'allow_users = ["{ALLOWED}"]', lines))
    return bed.reload()


def place(bed: Bed, name: str = ECHO, port: int = 7, kind: str = "A") -> dict[str, Any]:
    return {"address": bed.resolve(name, kind)[0], "port": port}


def outcomes(bed: Bed, wanted: dict[str, Any], *names: str) -> list[str]:
    return one_after_the_other(bed, USERS, *((name, wanted) for name in names))


def refused_users(bed: Bed) -> int:
    return int(bed.status()["security"]["users_refused"])


def test_root_and_allowed_users_connect_and_others_are_refused_at_once(bed):
    wanted = place(bed)
    who = [ALLOWED, "root", *[STRANGER] * 50, ALLOWED]
    [lane] = attempts(bed, USERS, [[(name, wanted) for name in who]])
    assert [outcome for _, outcome, _ in lane] == [
        REFUSED if name == STRANGER else CONNECTED for name in who
    ]
    times = sorted(seconds for name, _, seconds in lane if name == STRANGER)
    print(f"refused after {times[25] * 1000:.1f} ms (median), {times[-1] * 1000:.1f} ms (longest)")
    assert times[-1 - SLOWER_REFUSALS] < REFUSAL_SECONDS
    assert times[-1] < AT_ONCE_SECONDS


def test_psql_of_another_user_is_refused(bed):
    address = bed.resolve(PG)[0]
    command = ["psql", "-X", "-A", "-t", "-c", "select 6 * 7", "-d"]
    where = f"host={address} port=5432 user=postgres dbname=postgres sslmode=disable"
    with postgres_in(bed):
        assert bed.output(*command, where, user=ALLOWED).strip() == "42"
        refused = bed.run(*command, where, user=STRANGER)
    assert refused.returncode == 2
    assert b"Connection refused" in refused.stderr


def test_users_who_take_each_others_ports_are_told_apart_in_a_thousand_connections(bed):
    wanted = place(bed)
    wanted["source"] = own_address(bed, wanted["address"])
    chance = random.Random(4)
    lanes = []
    for number in range(8):
        mine = wanted | {"source_port": 20_000 + number}
        left = mine | {"leaves": True}
        steps = []
        for _ in range(125):
            pair = [(ALLOWED, mine), (STRANGER, mine)]
            chance.shuffle(pair)
            # Somebody whose SYN is out, and who makes room for the other.
            leaving = [(name, left) for name in (ALLOWED, STRANGER) if chance.random() < 0.3]
            chance.shuffle(leaving)
            steps += [*leaving[:1], pair[0], *leaving[1:], pair[1]]
        lanes.append(steps)
    right = {ALLOWED: {CONNECTED, LEFT}, STRANGER: {REFUSED, LEFT}}
    found = [result for lane in attempts(bed, USERS, lanes, timeout=240) for result in lane]
    assert [result for result in found if result[1] not in right[result[0]]] == []
    assert sum(outcome == CONNECTED for _, outcome, _ in found) == 1000
    assert sum(outcome == REFUSED for _, outcome, _ in found) == 1000


def test_a_stranger_beside_an_allowed_user_at_the_same_port_is_not_taken_for_that_one(bed):
    # A socket that is bound to the interface may have the same ends as one that is not.
    wanted = place(bed)
    mine = wanted | {"source": own_address(bed, wanted["address"]), "source_port": 21_000}
    interface = bed.status()["network"]["interface"]
    theirs = mine | {"device": interface, "seconds": 5}
    lanes = [[(STRANGER, theirs)] * 400, [(STRANGER, theirs)] * 400, [(ALLOWED, mine)] * 100]
    strangers, others, allowed = attempts(bed, USERS, lanes, timeout=240)
    reached = [r for r in (*strangers, *others) if r[1].startswith((CONNECTED, "cut"))]
    assert reached == []
    assert CONNECTED in {outcome for _, outcome, _ in allowed}
    assert outcomes(bed, mine | {"device": interface}, ALLOWED, STRANGER) == [CONNECTED, REFUSED]


def silent_attempt(bed: Bed, user: str, wanted: dict[str, Any]) -> socket.socket:
    """A socket in SYN_SENT whose SYN is sent with its first data (RFC 7413, as far as the name goes)."""
    with inside(bed._namespace):
        os.seteuid(USERS[user])
        try:
            end = socket.socket()
        finally:
            os.seteuid(0)
    if "device" in wanted:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, wanted["device"].encode())
    end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for option in (TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE):
        end.setsockopt(socket.IPPROTO_TCP, option, 1)
    end.bind((wanted["source"], wanted["source_port"]))
    end.connect((wanted["address"], wanted["port"]))
    end.settimeout(20)
    return end


def test_who_stood_behind_an_allowed_user_gets_nothing_when_that_one_leaves(bed):
    wanted = place(bed, LATE)
    mine = wanted | {"source": own_address(bed, wanted["address"]), "source_port": 21_500}
    interface = bed.status()["network"]["interface"]

    def is_dialled() -> bool:
        listed = json.loads(bed.output(VNET, "connections", "--json"))["connections"]
        return any(row["client_port"] == 21_500 for row in listed if row["state"] == "dialling")

    with contextlib.ExitStack() as closing:
        stranger = closing.enter_context(
            silent_attempt(bed, STRANGER, mine | {"device": interface})
        )
        allowed = closing.enter_context(silent_attempt(bed, ALLOWED, mine))
        with bed.faults("hang"):
            stranger.setblocking(False)
            stranger.send(b"a piece of data")
            wait_until(is_dialled, "it is taken for the allowed user's")
            allowed.close()
        stranger.settimeout(20)
        with pytest.raises(ConnectionRefusedError):
            stranger.recv(100)


def test_ports_that_wait_for_old_packets_belong_to_nobody(bed):
    bed.output("sysctl", "-q", "-w", "net.ipv4.tcp_tw_reuse=1")
    wanted = place(bed)
    mine = wanted | {"source": own_address(bed, wanted["address"]), "source_port": 22_000}
    assert outcomes(bed, mine | {"waits": True}, "root") == [CONNECTED]
    ends = f"sport = :22000 and dst = {wanted['address']}"
    wait_until(lambda: "TIME-WAIT" in bed.output("ss", "-tan", ends), "root's end waits")

    def attempt() -> str:
        # The kernel gives such ports away after a second.
        [outcome] = outcomes(bed, mine, STRANGER)
        return "" if outcome.startswith("error") else outcome

    assert wait_until(attempt, "the stranger has the port") == REFUSED


def test_what_is_left_of_an_attempt_lets_nobody_in(bed):
    wanted = place(bed)
    mine = wanted | {"source": own_address(bed, wanted["address"]), "source_port": 23_000}
    left = mine | {"leaves": True}
    steps = [(ALLOWED, left), (STRANGER, mine), ("root", left), (STRANGER, mine)] * 20
    assert one_after_the_other(bed, USERS, *steps) == [LEFT, REFUSED] * 40
    steps = [(STRANGER, left), (ALLOWED, mine)] * 20
    assert one_after_the_other(bed, USERS, *steps) == [LEFT, CONNECTED] * 20


def test_ipv6_and_ipv4_by_ipv6_sockets(bed):
    who = (ALLOWED, STRANGER, "root", STRANGER)
    right = [CONNECTED, REFUSED, CONNECTED, REFUSED]
    assert outcomes(bed, place(bed, kind="AAAA"), *who) == right
    assert outcomes(bed, place(bed) | {"v6": True}, *who) == right


def test_another_address_of_the_machine_lets_nobody_in(bed):
    bed.output("ip", "address", "add", "10.99.0.1/32", "dev", "lo")
    try:
        wanted = place(bed) | {"source": "10.99.0.1", "seconds": 1}
        [outcome] = outcomes(bed, wanted, STRANGER)
    finally:
        bed.output("ip", "address", "del", "10.99.0.1/32", "dev", "lo")
    assert outcome == REFUSED or outcome.startswith("error")


def test_hosts_are_for_the_same_users(bed):
    wanted = place(bed, NODE, 22) | {"reads": "SSH-"}
    assert outcomes(bed, wanted, ALLOWED, STRANGER, "root") == [CONNECTED, REFUSED, CONNECTED]


def test_status_log_and_list_say_who_was_refused(bed):
    wanted = place(bed)
    before = refused_users(bed)
    assert outcomes(bed, wanted, STRANGER, STRANGER) == [REFUSED] * 2
    # Heartbeats bring the number, also that of the test before.
    wait_until(lambda: refused_users(bed) >= before + 2, "status counts")
    status = bed.status()
    assert status["health"] == "healthy"
    assert status["warnings"] == []
    assert status["security"]["user_check"] == "on"
    assert re.search(
        r"security: \d+ connections of users who may not connect refused",
        bed.output(VNET, "status"),
    )
    listed = json.loads(bed.output(VNET, "connections", "--json"))["connections"]
    mine = next(row for row in listed if row["refusal"] == "user_not_allowed")
    assert mine["name"] == ECHO
    assert mine["error"].startswith(f"connection from uid {USERS[STRANGER]} (port ")
    assert mine["error"].endswith("only root and those in security.allow_users may connect")
    log = [json.loads(line)["message"] for line in lines_of(bed.output(VNET, "logs", "--json"))]
    assert any(f"connection from uid {USERS[STRANGER]} to {ECHO} at" in line for line in log)


def test_reload_adds_users_and_members_and_takes_them_away_again(bed):
    wanted = place(bed)
    who = (ALLOWED, STRANGER, THIRD)
    assert outcomes(bed, wanted, *who) == [CONNECTED, REFUSED, REFUSED]
    said = use_security(bed, f'allow_users = ["{STRANGER}"]')
    assert "in force now: security.allow_users" in said
    assert outcomes(bed, wanted, *who) == [REFUSED, CONNECTED, REFUSED]
    config = config_path(bed)
    text = config.read_text()
    # Whose primary group it is.
    config.write_text(text.replace(f'allow_users = ["{STRANGER}"]', f'allow_groups = ["{THIRD}"]'))
    bed.reload()
    assert outcomes(bed, wanted, *who) == [REFUSED, REFUSED, CONNECTED]


def test_members_that_a_group_has_got_may_connect_after_a_hangup_signal(bed):
    wanted = place(bed)
    use_security(bed, f'allow_users = ["{ALLOWED}"]\nallow_groups = ["tape"]')
    assert outcomes(bed, wanted, STRANGER) == [REFUSED]
    groups = bed.directory / "group"
    lines = Path("/etc/group").read_text().splitlines()
    groups.write_text(
        "".join(
            f"{line}{STRANGER}\n"
            if line.startswith("tape:") and line.endswith(":")
            else f"{line}\n"
            for line in lines
        )
    )
    bed.output("mount", "--bind", str(groups), "/etc/group")
    try:
        bed.kill(bed.status()["supervisor"]["pid"], signal.SIGHUP)
        wait_until(lambda: outcomes(bed, wanted, STRANGER) == [CONNECTED], "the member may connect")
    finally:
        bed.output("umount", "/etc/group")
    bed.reload()
    assert outcomes(bed, wanted, STRANGER, ALLOWED) == [REFUSED, CONNECTED]


def test_a_name_that_the_system_does_not_know_is_not_taken_over(bed):
    path = config_path(bed)
    path.write_text(path.read_text().replace(ALLOWED, "zoe-that-is-not-there"))
    done = bed.run(VNET, "reload")
    assert done.returncode == 2
    assert b"security.allow_users: the system knows no user" in done.stdout + done.stderr
    assert outcomes(bed, place(bed), ALLOWED, STRANGER) == [CONNECTED, REFUSED]


@pytest.mark.parametrize("command", [("proxy-0",), ("proxy-1",), ("all",)])
@pytest.mark.parametrize("drain", [True, False])
def test_successors_tell_users_apart(bed, command, drain):
    wanted = place(bed)
    pids = bed.pids()
    bed.output(VNET, "restart", *command, *(["--drain"] if drain else []), timeout=120)
    for name in ("proxy-0", "proxy-1") if command == ("all",) else command:
        bed.wait_for_successor(name, pids[name])
    bed.wait_for_health("healthy")
    who = (STRANGER, ALLOWED, STRANGER, "root")
    assert outcomes(bed, wanted, *who) == [REFUSED, CONNECTED, REFUSED, CONNECTED]


def test_a_killed_proxy_comes_back_with_its_own_way_to_ask(bed):
    wanted = place(bed)
    for name in ("proxy-0", "proxy-1"):
        pid = bed.worker(name)["pid"]
        bed.kill(pid)
        bed.wait_for_successor(name, pid)
    assert outcomes(bed, wanted, STRANGER, ALLOWED) == [REFUSED, CONNECTED]


def test_each_worker_asks_with_a_socket_of_its_own(bed):
    wanted = place(bed)
    outcomes(bed, wanted, ALLOWED)
    outcomes(bed, place(bed, NODE, 22) | {"reads": "SSH-"}, ALLOWED)
    sockets = []
    for name in (bed.owner_of(wanted["address"]), "ssh", "dns"):
        directory = Path(f"/proc/{bed.outer_pid(bed.worker(name)['pid'])}/fd")
        links = set()
        for entry in directory.iterdir():
            # Those of connections and questions may be closed just now.
            with contextlib.suppress(FileNotFoundError):
                links.add(str(entry.readlink()))
        sockets.append(netlink_sockets(bed) & links)
    assert [len(own) for own in sockets] == [1, 1, 1]
    assert len(set.union(*sockets)) == 3


def netlink_sockets(bed: Bed) -> set[str]:
    """Those of the private network that were used, as links of descriptors."""
    rows = Path(f"/proc/{bed.init}/net/netlink").read_text().splitlines()
    return {f"socket:[{row.split()[-1]}]" for row in rows[1:]}

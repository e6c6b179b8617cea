"""Workers killed at bad moments, and that nothing leaks."""

import contextlib
import errno
import hashlib
import itertools
import random
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from demo_bed import demo_bed
from dnslib import RCODE
from private_bed import AT_ONCE_SECONDS, Bed, read_all, read_exactly, wait_until
from shared_cluster import CLUSTER, CONFIG

from ipc.addresses import owner_of_name

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ECHO, OWN, PORTS = (f"{app}.teleport.e2e.test" for app in ("echo", "own", "ports"))
WORKERS = ("tun", "proxy-0", "proxy-1", "ssh", "dns")
DATA = random.Random(3).randbytes(16 << 20)
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
# After this long without one dns asks another proxy.
SIGN_OF_LIFE_SECONDS = 0.3


@pytest.fixture(scope="module")
def crash_bed() -> Iterator[Bed]:
    """A demo whose workers are killed."""
    with demo_bed(CLUSTER, CONFIG) as bed:
        yield bed


@pytest.fixture
def shaken(crash_bed) -> Bed:
    """The same, healthy again."""
    crash_bed.wait_for_health("healthy")
    return crash_bed


def kill_worker(bed: Bed, name: str) -> int:
    """SIGKILL for a worker; its process id was the one returned."""
    pid = int(bed.worker(name)["pid"])
    bed.kill(pid)
    return pid


def echo(bed: Bed, text: bytes = b"hello") -> bytes:
    with bed.connect(ECHO, 7) as end:
        end.sendall(text)
        end.shutdown(socket.SHUT_WR)
        return read_all(end)


def test_after_a_killed_idle_proxy_the_next_connect_works(shaken):
    bed = shaken
    address = bed.resolve(ECHO)[0]
    owner = bed.owner_of(address)
    assert echo(bed) == b"hello"
    pid = kill_worker(bed, owner)
    # Not refused: the SYN is held until the successor is there.
    with bed.connect(address, 7) as end:
        end.sendall(b"again")
        assert read_exactly(end, 5) == b"again"
    assert bed.worker(owner)["pid"] != pid
    assert bed.resolve(ECHO) == [address]
    assert bed.worker(owner)["last_exit"]["signal"] == "SIGKILL"


def test_a_killed_proxy_resets_its_connections_and_none_hangs(shaken):
    bed = shaken
    address = bed.resolve(ECHO)[0]
    owner = bed.owner_of(address)
    with bed.connect(address, 7) as end:
        end.sendall(b"hello")
        assert read_exactly(end, 5) == b"hello"
        pid = kill_worker(bed, owner)
        # Not an ordinary end, which would look as if nothing more had been to come.
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    bed.wait_for_successor(owner, pid)


def test_the_other_proxy_carries_on_when_one_is_killed(shaken):
    bed = shaken
    with bed.connect(ECHO, 7) as end:
        owner = bed.owner_of(bed.resolve(ECHO)[0])
        victim = "proxy-1" if owner == "proxy-0" else "proxy-0"
        pid = kill_worker(bed, victim)
        end.sendall(b"still here")
        assert read_exactly(end, 10) == b"still here"
    bed.wait_for_successor(victim, pid)


def test_a_proxy_killed_between_verdict_and_accept_costs_one_reconnect(shaken):
    """Stopped right after it has dialled, then killed: what it admitted is reset, nothing hangs."""
    bed = shaken
    address = bed.resolve(ECHO)[0]
    owner = bed.owner_of(address)
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02):
        pid = int(bed.worker(owner)["pid"])
        end = bed.open_socket(timeout=20)
        with end:
            outcome: list[bytes] = []

            def talk(end: socket.socket = end, outcome: list[bytes] = outcome) -> None:
                try:
                    end.connect((address, 7))
                    end.sendall(b"hello")
                    end.shutdown(socket.SHUT_WR)
                    outcome.append(read_all(end))
                except OSError as error:
                    # A socket that was reset before its shutdown is not connected any more.
                    if not isinstance(error, ConnectionError) and error.errno != errno.ENOTCONN:
                        raise
                    outcome.append(b"reset")

            thread = threading.Thread(target=talk)
            thread.start()
            time.sleep(delay)  # where in the dial it dies is the point, and different each time
            bed.kill(pid)
            thread.join(15)
        assert outcome in ([b"hello"], [b"reset"])
        bed.wait_for_successor(owner, pid)
        assert echo(bed) == b"hello"
    assert bed.resolve(ECHO) == [address]


def test_a_transfer_survives_the_death_of_tun(shaken):
    bed = shaken
    received: list[bytes] = []

    with bed.connect(ECHO, 7, timeout=40) as end:

        def send() -> None:
            end.sendall(DATA)
            end.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        received.append(read_exactly(end, 1 << 20))
        for _ in range(2):
            pid = kill_worker(bed, "tun")
            bed.wait_for_successor("tun", pid)
            received.append(read_exactly(end, 1 << 20))
        received.append(read_all(end))
        thread.join()
    assert hashlib.sha256(b"".join(received)).digest() == hashlib.sha256(DATA).digest()


def test_after_a_killed_tun_new_connections_work(shaken):
    pid = kill_worker(shaken, "tun")
    assert echo(shaken) == b"hello"
    shaken.wait_for_successor("tun", pid)


def test_after_a_killed_dns_the_next_query_works(shaken):
    bed = shaken
    before = bed.resolve(ECHO)
    pid = kill_worker(bed, "dns")
    # It waits in the socket for the successor.
    assert bed.resolve(ECHO) == before
    bed.wait_for_successor("dns", pid)
    assert re.search(r"status: NOERROR", bed.output("dig", "+tcp", ECHO))


RANGED = """
[[clusters]]
name = "ranged.test"
proxy_addr = "teleport.ranged.test:443"
custom_dns_zones = ["ranged.test"]
ipv4_cidr_range = "10.99.0.0/16"
[[clusters.apps]]
name = "echo"
uri = "tcp://echo.backend.internal:7"
public_addr = "echo.ranged.test"
"""


def test_the_range_of_a_cluster_stays_routed_over_the_death_of_proxies_and_cluster():
    """A new proxy knows nothing of its clusters until they answer, and now they do not."""
    with demo_bed(RANGED, "[supervisor]\nheartbeat_seconds = 0.2\n") as bed:
        # A range that is not routed soon after the first question for it is done without.
        bed.wait_for_health("healthy")
        address = bed.resolve("echo.ranged.test")[0]
        assert address.startswith("10.99.")
        routed = bed.log().count("virtual ranges:")
        with bed.faults("proxy_down"):
            for name in ("proxy-0", "proxy-1"):
                pid = bed.worker(name)["pid"]
                bed.kill(pid)
                bed.wait_for_successor(name, pid)
            bed.wait_for_health("degraded")
            assert bed.resolve("echo.ranged.test")[0] == address
            assert bed.seconds_until_refused(address, 7) < AT_ONCE_SECONDS
            assert "10.99.0.0/16 dev vnet0" in bed.output("ip", "route")
        bed.wait_for_health("healthy")
        assert bed.log().count("virtual ranges:") == routed


def test_a_worker_that_hangs_is_replaced(shaken):
    bed = shaken
    pid = int(bed.worker("dns")["pid"])
    bed.kill(pid, signal.SIGSTOP)
    bed.wait_for_successor("dns", pid)
    assert bed.resolve(ECHO)


def test_new_names_do_not_wait_for_a_proxy_that_hangs(shaken):
    bed = shaken
    names = (f"new-{number}.teleport.e2e.test" for number in range(1000))
    asked = list(itertools.islice((name for name in names if owner_of_name(name, 2) == 0), 6))
    bed.ask(asked.pop())
    pid, seen = int(bed.worker("proxy-0")["pid"]), len(bed.log())
    bed.kill(pid, signal.SIGSTOP)
    took = []
    for name in asked:
        began = time.monotonic()
        assert bed.ask(name).header.rcode in (RCODE.NOERROR, RCODE.NXDOMAIN)
        took.append(time.monotonic() - began)
    # The first of them waits for a sign of life, and the others not even that. The machine may be busy with
    # something else in one of them, and hardly in all.
    wait_until(
        lambda: "proxy-0 does not answer, others are asked" in bed.log()[seen:], "it is told"
    )
    assert min(took[1:]) < SIGN_OF_LIFE_SECONDS
    bed.wait_for_successor("proxy-0", pid)


def test_vnet_is_degraded_while_a_worker_is_away_and_healthy_afterwards(shaken):
    bed = shaken

    def is_seen_away() -> bool:
        # Again each time: it is not away for long, and on a busy machine nobody may look just then.
        if pid := bed.worker("dns")["pid"]:
            with contextlib.suppress(ProcessLookupError):
                bed.kill(pid)
        return bed.health() == "degraded"

    wait_until(is_seen_away, "VNet is degraded")
    bed.wait_for_health("healthy")
    assert bed.worker("dns")["state"] == "ready"


# -- leaks --


def a_round(bed: Bed) -> None:
    """Every odd end that a connection can come to."""
    with bed.listening(7001, _reset):
        for _ in range(5):
            with bed.connect(OWN, 80) as end, contextlib.suppress(ConnectionError):
                end.sendall(b"hello")
                read_all(end)
    with bed.listening(7001, _close_early):
        for _ in range(5):
            with bed.connect(OWN, 80) as end, contextlib.suppress(ConnectionError):
                read_all(end)
    for _ in range(5):
        assert echo(bed) == b"hello"
        bed.connect(ECHO, 7).close()
        with bed.connect(ECHO, 7) as end:
            end.sendall(DATA[:100_000])
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        bed.seconds_until_refused(PORTS, 9000)
        bed.seconds_until_refused("100.127.254.253", 80)
        with bed.connect("nobody.teleport.e2e.test", 9) as end, contextlib.suppress(OSError):
            read_all(end)
        # Gone before its SYN is answered.
        with bed.open_socket() as end:
            end.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                end.connect((bed.resolve(ECHO)[0], 7))
    # One after the other: it would ask for IPv4 only when IPv6 takes long, and leave a listener more behind.
    for family in ("-4", "-6"):
        bed.output("curl", family, "-sS", "http://page.teleport.e2e.test/")
    bed.output("dig", "+tcp", "example.org")


def _reset(connection: socket.socket) -> None:
    connection.recv(10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def _close_early(connection: socket.socket) -> None:
    connection.sendall(b"goodbye")


def in_use(bed: Bed) -> dict[str, int]:
    """Descriptors of each process, listeners and open connections."""
    found = {name: bed.open_files(name) for name in (*WORKERS, "supervisor")}
    found["connections"] = bed.status()["connections"]["active"]
    return found


def test_no_round_of_failures_leaves_a_descriptor_or_a_connection_behind(shaken):
    bed = shaken
    a_round(bed)  # what is opened once and kept is open now
    wait_until(lambda: bed.status()["connections"]["active"] == 0, "nothing is open")
    time.sleep(1)
    before = in_use(bed)
    for _ in range(3):
        a_round(bed)

    def is_as_before() -> bool:
        now = in_use(bed)
        return all(now[name] <= before[name] for name in before)

    try:
        # What was admitted and never accepted is dropped after 10 s.
        wait_until(is_as_before, "everything is closed")
    except AssertionError as error:
        raise AssertionError(f"before {before}, after {in_use(bed)}") from error


def test_no_killed_worker_leaves_a_descriptor_of_the_supervisor_behind(shaken):
    bed = shaken
    assert echo(bed) == b"hello"
    before = bed.open_files("supervisor")
    for name in WORKERS:
        bed.wait_for_successor(name, kill_worker(bed, name))
        assert echo(bed) == b"hello"
    wait_until(lambda: bed.open_files("supervisor") <= before, "everything is closed")

"""Workers replaced under load with `vnet restart --drain`: nothing is cut, refused or lost."""

import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from demo_bed import VNET, demo_bed
from private_bed import Bed, read_all, read_exactly, wait_until
from shared_cluster import CLUSTER, CONFIG

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ECHO = "echo.teleport.e2e.test"
DATA = random.Random(5).randbytes(24 << 20)
# What a proxy may take to hand over, and a kernel to repeat a SYN that was read and not answered.
LONGEST_SECONDS = 6.0
# Every worker is replaced, one after the other.
RESTART_SECONDS = 120


@pytest.fixture(scope="module")
def drain_bed() -> Iterator[Bed]:
    """A demo whose workers are replaced."""
    with demo_bed(CLUSTER, CONFIG) as bed:
        yield bed


@pytest.fixture
def bed(drain_bed) -> Bed:
    """The same, healthy again and with one process for each worker."""
    drain_bed.wait_for_health("healthy")
    wait_until(lambda: len(drain_bed.status()["workers"]) == 5, "nothing drains any more")
    return drain_bed


class Loop:
    """Does something again and again in threads until told to stop; one failure ends it."""

    def __init__(self, act: Callable[[], None], threads: int) -> None:
        self.times: list[float] = []
        self.failures: list[BaseException] = []
        self._act = act
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._stopping.is_set() and not self.failures:
            began = time.monotonic()
            try:
                self._act()
            except Exception as error:  # noqa: BLE001  # told by `check` in the test's own thread
                self.failures.append(error)
            self.times.append(time.monotonic() - began)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)

    def wait_for_more(self, count: int) -> None:
        """Returns once it was done so many times more, or has failed."""
        before = len(self.times)
        wait_until(lambda: self.failures or len(self.times) >= before + count, "it goes on")

    def check(self) -> None:
        assert self.failures == []
        assert max(self.times) < LONGEST_SECONDS


@contextmanager
def again_and_again(act: Callable[[], None], threads: int = 3) -> Iterator[Loop]:
    loop = Loop(act, threads)
    loop.start()
    try:
        loop.wait_for_more(10)
        yield loop
        loop.wait_for_more(10)
    finally:
        loop.stop()
    loop.check()


class Transfer:
    """DATA on its way to the echo server and back, read as far as the test wants."""

    def __init__(self, bed: Bed) -> None:
        self._end = bed.connect(ECHO, 7, timeout=40)
        self._received = bytearray()
        self._sender = threading.Thread(target=self._send)
        self._sender.start()

    def _send(self) -> None:
        self._end.sendall(DATA)
        self._end.shutdown(socket.SHUT_WR)

    def read(self, count: int) -> None:
        piece = read_exactly(self._end, count)
        assert len(piece) == count
        self._received += piece

    def finish(self) -> None:
        with self._end:
            self._received += read_all(self._end)
            self._sender.join()
        assert hashlib.sha256(self._received).digest() == hashlib.sha256(DATA).digest()


def rows(bed: Bed, name: str) -> list[dict[str, Any]]:
    """All processes of a worker in the status, the present one first."""
    return [worker for worker in bed.status()["workers"] if worker["name"] == name]


def echo(bed: Bed, address: str) -> None:
    with bed.connect(address, 7) as end:
        end.sendall(b"hello")
        end.shutdown(socket.SHUT_WR)
        assert read_all(end) == b"hello"


def replace(bed: Bed, name: str) -> int:
    """`vnet restart --drain`; the process id of the predecessor."""
    pid = int(bed.worker(name)["pid"])
    text = bed.output(VNET, "restart", name, "--drain")
    now = bed.worker(name)
    assert now["state"] == "ready"
    assert now["pid"] != pid
    assert str(now["pid"]) in text
    return pid


def test_download_lives_on_in_a_proxy_that_drains_and_new_connections_go_to_its_successor(bed):
    address = bed.resolve(ECHO)[0]
    owner = bed.owner_of(address)
    transfer = Transfer(bed)
    transfer.read(1 << 20)
    with again_and_again(lambda: echo(bed, address)):
        pid = replace(bed, owner)
        present, leaving = rows(bed, owner)
        assert (leaving["pid"], leaving["state"]) == (pid, "draining")
        assert present["pid"] != pid
        assert "draining" in bed.output(VNET, "status")
        transfer.read(1 << 20)
    transfer.finish()
    wait_until(lambda: len(rows(bed, owner)) == 1, "the old proxy has ended")
    assert bed.worker(owner)["restarts"] == 0
    assert bed.resolve(ECHO) == [address]
    wait_until(lambda: bed.health() == "healthy", "VNet is healthy")


def test_proxies_follow_each_other_again_and_again_and_nothing_is_refused(bed):
    address = bed.resolve(ECHO)[0]
    owner = bed.owner_of(address)
    with again_and_again(lambda: echo(bed, address), threads=6) as connects:
        for _ in range(3):
            replace(bed, owner)
            connects.wait_for_more(20)
    wait_until(lambda: len(rows(bed, owner)) == 1, "the old proxies have ended")


def test_idle_proxy_is_gone_at_once(bed):
    echo(bed, bed.resolve(ECHO)[0])
    for name in ("proxy-0", "proxy-1"):
        replace(bed, name)
    wait_until(lambda: len(bed.status()["workers"]) == 5, "the old proxies have ended")
    echo(bed, bed.resolve(ECHO)[0])


def test_transfer_and_connects_go_on_while_tun_is_replaced(bed):
    address = bed.resolve(ECHO)[0]
    transfer = Transfer(bed)
    transfer.read(1 << 20)
    with again_and_again(lambda: echo(bed, address)):
        for _ in range(2):
            replace(bed, "tun")
            transfer.read(1 << 20)
    transfer.finish()
    wait_until(lambda: len(rows(bed, "tun")) == 1, "the old one has ended")


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_no_query_is_lost_while_dns_is_replaced(bed, transport):
    address = bed.resolve(ECHO)

    def ask() -> None:
        if transport == "udp":
            # Once: a lost one would fail after ten seconds.
            assert bed.resolve(ECHO) == address
        else:
            assert bed.output("dig", "+tcp", "+short", "+tries=1", ECHO).split() == address

    with again_and_again(ask) as queries:
        for _ in range(3):
            replace(bed, "dns")
            queries.wait_for_more(5)
    wait_until(lambda: len(rows(bed, "dns")) == 1, "the old one has ended")


def test_restart_without_drain_cuts_what_still_drains(bed):
    address = bed.resolve(ECHO)[0]
    owner = bed.owner_of(address)
    with bed.connect(address, 7) as end:
        end.sendall(b"hello")
        assert read_exactly(end, 5) == b"hello"
        pid = replace(bed, owner)
        assert [row["pid"] for row in rows(bed, owner)][1:] == [pid]
        end.sendall(b"again")
        assert read_exactly(end, 5) == b"again"
        bed.output(VNET, "restart", owner)
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    wait_until(lambda: len(rows(bed, owner)) == 1, "the old one has ended")


def test_whole_vnet_is_replaced_under_a_transfer(bed):
    address = bed.resolve(ECHO)[0]
    transfer = Transfer(bed)
    transfer.read(1 << 20)
    before = bed.pids()
    with again_and_again(lambda: echo(bed, address)):
        bed.output(VNET, "restart", "all", "--drain", timeout=RESTART_SECONDS)
        transfer.read(1 << 20)
    assert not set(before.values()) & {bed.worker(name)["pid"] for name in before}
    transfer.finish()
    wait_until(lambda: len(bed.status()["workers"]) == 5, "the old ones have ended")

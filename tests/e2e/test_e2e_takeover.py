"""What is left when a supervisor dies, and what its successor goes on with."""

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dnslib
import pytest
from demo_bed import SUPERVISOR, demo_bed, stop
from private_bed import Bed, children, is_running, read_exactly, wait_until
from shared_cluster import CLUSTER, CONFIG

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ECHO = "echo.teleport.e2e.test"
# A machine with nothing else to do needs less than two; this one may be busy with other tests.
BACK_SECONDS = 20.0


@pytest.fixture
def doomed() -> Iterator[Bed]:
    """A demo whose supervisor may be killed: the demo itself ends with its command."""
    with demo_bed(CLUSTER, CONFIG) as bed:
        bed.wait_for_health("healthy")
        yield bed


def links(bed: Bed) -> dict[str, int]:
    """Index of each interface by name."""
    found = json.loads(bed.output("ip", "-json", "link"))
    return {link["ifname"]: link["ifindex"] for link in found}


def idle_connections(bed: Bed, number: int) -> list[socket.socket]:
    ends = [bed.connect(ECHO, 7) for _ in range(number)]
    for end in ends:
        end.sendall(b"hello")
        assert read_exactly(end, 5) == b"hello"
    return ends


def require_reset(ends: list[socket.socket], began: float) -> None:
    """Each of these idle connections is reset: nobody could do that later, when tun has gone as well."""
    for end in ends:
        end.settimeout(10)
        with end, pytest.raises(ConnectionResetError):
            end.recv(1)
    print(f"old connections were reset after {time.monotonic() - began:.2f} s")


def test_idle_connections_are_reset_when_the_supervisor_is_killed(doomed):
    bed = doomed
    ends = idle_connections(bed, 20)
    status = bed.status()
    workers = [bed.outer_pid(worker["pid"]) for worker in status["workers"]]
    supervisor = bed.outer_pid(status["supervisor"]["pid"])
    began = time.monotonic()
    bed.kill(status["supervisor"]["pid"])
    require_reset(ends, began)
    wait_until(lambda: not any(map(is_running, [supervisor, *workers])), "they have ended")
    wait_until(lambda: "vnet0" not in links(bed), "the interface is gone")


# -- with a service manager that keeps descriptors --


class Service:
    """VNet as a service of the bed; `path` is the record of its manager."""

    def __init__(self, bed: Bed, path: Path) -> None:
        self.bed = bed
        self.path = path

    def events(self, kind: str) -> list:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [event[kind] for event in map(json.loads, lines) if kind in event]

    def kill_supervisor(self, before: Callable[[], object] | None = None) -> float:
        """Returns when it and its proxies are gone; when it was killed, monotonic seconds.

        What `before` does it does not notice any more.
        """
        supervisor = self.bed.outer_pid(self.bed.status()["supervisor"]["pid"])
        # tun lives a moment longer.
        processes = [supervisor, *children(supervisor)[1:]]
        if before is not None:
            os.kill(supervisor, signal.SIGSTOP)
            before()
        began = time.monotonic()
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, processes)), "it is dead")
        return began


@pytest.fixture(scope="module")
def place() -> Iterator[Bed]:
    """A demo whose own VNet has given way to those that a service manager starts."""
    with demo_bed(CLUSTER, CONFIG) as bed:
        bed.wait_for_health("healthy")
        bed.output("vnet", "stop")
        wait_until_gone(bed)
        yield bed


def wait_until_gone(bed: Bed) -> None:
    bed.wait_until_ended()
    wait_until(lambda: not any("vnet" in name for name in links(bed)), "its interface is gone")


_numbers = itertools.count()


@contextlib.contextmanager
def service_in(bed: Bed) -> Iterator[Service]:
    """A VNet that a service manager has started, with a record and a log of its own."""
    directory = Path(bed.environment["VNET_RUN_DIR"]).parent
    config = bed.path(directory / "vnet.toml")
    before, name = config.read_text(), f"service-{next(_numbers)}"
    record = bed.directory / f"{name}.json"
    arguments = ["--config", f"{directory}/vnet.toml", "--user", "root"]
    arguments += ["--run-dir", f"{directory}/run", "--state-dir", f"{directory}/state"]
    bed.logs[:] = [bed.directory / f"{name}.log"]
    script = str(Path(__file__).with_name("service_manager.py"))
    program = [sys.executable, script, str(record), SUPERVISOR, *arguments]
    with bed.running(*program, log_name=name) as process:
        try:
            bed.wait_for_health("healthy")
            yield Service(bed, record)
        finally:
            stop(process)
            config.write_text(before)
    wait_until_gone(bed)


@pytest.fixture
def service(place) -> Iterator[Service]:
    with service_in(place) as service:
        yield service


def seconds_until_echo(bed: Bed, began: float) -> float:
    """How long it took until a name was resolved and a new connection carried bytes."""

    def address() -> str:
        # It waits in a socket that is kept, as long as nobody reads it: no question is lost. On a busy machine
        # it may be answered with a failure before a proxy is there, as late as programs wait for an answer.
        answer = bed.ask(ECHO, timeout=BACK_SECONDS)
        assert answer.header.rcode in (dnslib.RCODE.NOERROR, dnslib.RCODE.SERVFAIL)
        return str(answer.rr[0].rdata) if answer.rr else ""

    with bed.connect(wait_until(address, "the name has an address"), 7, timeout=30) as end:
        end.sendall(b"again")
        assert read_exactly(end, 5) == b"again"
    return time.monotonic() - began


def test_the_link_stays_up_when_a_killed_supervisor_is_started_again(service):
    bed = service.bed
    before = links(bed)["vnet0"]
    routes = bed.output("ip", "route", "show", "dev", "vnet0")
    took = []
    with bed.running("ip", "monitor", "link", "address", "route", log_name="monitor"):
        for _ in range(3):
            ends = idle_connections(bed, 5)
            began = service.kill_supervisor()
            require_reset(ends, began)
            took.append(seconds_until_echo(bed, began))
            bed.wait_for_health("healthy")
            assert links(bed)["vnet0"] == before
            assert bed.output("ip", "route", "show", "dev", "vnet0") == routes
    print("new connections worked after", ", ".join(f"{seconds:.2f} s" for seconds in took))
    assert min(took) < BACK_SECONDS
    seen = (bed.directory / "monitor.log").read_text()
    assert "Deleted" not in seen
    assert "state DOWN" not in seen
    assert len(service.events("started")) == 4
    assert all(len(names) == 8 for names in service.events("stored")[1:])
    assert bed.log().count("stays up") == 3


def test_an_orderly_end_takes_the_link_down_and_empties_the_store(place):
    with service_in(place) as service:
        assert "vnet0" in links(place)
    assert service.events("ended") == [0]
    assert service.events("left") == [[]]
    assert "vnet0" not in links(place)


def test_a_link_that_does_not_fit_any_more_is_made_anew(service):
    bed = service.bed
    before = links(bed)["vnet0"]
    path = bed.path(Path(bed.environment["VNET_RUN_DIR"]).parent / "vnet.toml")
    path.write_text(path.read_text() + '\n[network]\ninterface = "vnet7"\nipv6 = "off"\n')
    service.kill_supervisor()
    bed.wait_for_health("healthy")
    now = links(bed)
    assert "vnet0" not in now
    assert now["vnet7"] != before
    assert "made anew" in bed.log()
    assert seconds_until_echo(bed, time.monotonic())
    # The new one is kept now: without the sockets of IPv6.
    service.kill_supervisor()
    assert seconds_until_echo(bed, time.monotonic())
    assert links(bed)["vnet7"] == now["vnet7"]
    assert len(service.events("stored")[-1]) == 6


def test_what_was_taken_from_the_link_meanwhile_is_mended(service):
    bed = service.bed
    before = links(bed)["vnet0"]

    def take_away() -> None:
        bed.output("ip", "address", "flush", "dev", "vnet0")
        bed.output("ip", "link", "set", "vnet0", "down")

    service.kill_supervisor(take_away)
    bed.wait_for_health("healthy")
    assert seconds_until_echo(bed, time.monotonic())
    assert links(bed)["vnet0"] == before


def test_a_deleted_link_is_made_anew(service):
    bed = service.bed
    # Otherwise it ends by itself, perhaps before it is killed: the manager of this test then leaves it so.
    service.kill_supervisor(lambda: bed.output("ip", "link", "del", "vnet0"))
    wait_until(lambda: bed.health() == "healthy" and "vnet0" in links(bed), "it is back")
    assert seconds_until_echo(bed, time.monotonic())


def test_an_upgrade_in_place_keeps_the_link_for_a_successor(service):
    bed = service.bed
    pid = bed.status()["supervisor"]["pid"]
    before = links(bed)["vnet0"]
    bed.output("vnet", "restart", "all", "--drain", timeout=120)
    assert bed.status()["supervisor"]["pid"] == pid
    bed.wait_for_health("healthy")
    service.kill_supervisor()
    assert seconds_until_echo(bed, time.monotonic())
    assert links(bed)["vnet0"] == before
    assert service.events("started")[0] == pid

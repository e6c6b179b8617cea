"""One worker of a whole system is compromised: the others, and what passes through them, are not."""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import hostile_bus
import pytest
from hostile_demo import hostile_demo
from hostile_trigger import order
from private_bed import PATIENCE_SECONDS, Bed, read_exactly, wait_until

from ipc.addresses import owner_of_name
from supervisor.patience import MAX_BELIEVED

pytestmark = [pytest.mark.root, pytest.mark.e2e]

ECHO = "echo.teleport.e2e.test"
BLOCK = random.Random(8).randbytes(64 * 1024)
# What a receiver may keep of an attack that is over: the allocator's, and a connection or two.
MEMORY_BYTES = 64 << 20
DESCRIPTORS = 12


class Transfer:
    """Bytes that go to the echo app and back for as long as the block lasts."""

    def __init__(self, bed: Bed, address: str) -> None:
        self.blocks = 0
        self.error: BaseException | None = None
        self._end = bed.connect(address, 7, timeout=PATIENCE_SECONDS)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with self._end as end:
                while not self._stopping.is_set():
                    end.sendall(BLOCK)
                    assert read_exactly(end, len(BLOCK)) == BLOCK
                    self.blocks += 1
                end.shutdown(socket.SHUT_WR)
                assert not end.recv(1)
        except (OSError, AssertionError) as error:
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(PATIENCE_SECONDS + 5)
        assert self.error is None, self.error
        assert self.blocks > 0


def measures(bed: Bed, names: list[str]) -> dict[str, tuple[int, int]]:
    """Memory in bytes and open descriptors of workers and supervisor."""
    found = {}
    for name in names:
        status = bed.status()
        pid = status["supervisor"]["pid"] if name == "supervisor" else bed.worker(name)["pid"]
        fields = Path(f"/proc/{bed.outer_pid(pid)}/status").read_text()
        rss = next(line for line in fields.splitlines() if line.startswith("VmRSS:")).split()[1]
        found[name] = (int(rss) * 1024, bed.open_files(name))
    return found


@contextlib.contextmanager
def nothing_else_falls(bed: Bed, others: list[str], address: str) -> Iterator[None]:
    """The others keep process and counters, answer, and keep nothing; a transfer goes on."""
    before = {name: bed.worker(name) for name in others}
    used = measures(bed, [*others, "supervisor"])
    with Transfer(bed, address):
        yield
        # A question that the supervisor does not answer raises.
        after = {name: bed.worker(name) for name in others}
    for name in others:
        assert after[name]["pid"] == before[name]["pid"], name
        assert after[name]["restarts"] == before[name]["restarts"], name

    def is_as_before() -> bool:
        now = measures(bed, [*others, "supervisor"])
        return all(
            now[name][0] < used[name][0] + MEMORY_BYTES
            and now[name][1] <= used[name][1] + DESCRIPTORS
            for name in now
        )

    try:
        wait_until(is_as_before, "nothing is kept")
    except AssertionError as error:
        raise AssertionError(f"{used} before, {measures(bed, [*used])} after") from error


# -- dns --


@pytest.fixture(scope="module")
def dns_bed() -> Iterator[Bed]:
    """A demo with a hostile dns."""
    with hostile_demo("dns") as bed:
        yield bed


@pytest.fixture
def healthy_dns(dns_bed) -> Bed:
    dns_bed.wait_for_health("healthy")
    return dns_bed


def order_dns(bed: Bed, attack: str, pid: int) -> None:
    with bed.open_socket(kind=socket.SOCK_DGRAM) as end:
        end.connect((bed.dns_server, 53))
        end.send(order(attack, pid))


def answers(bed: Bed) -> bool:
    """Whether dns answers; a question to one that is killed just then is lost."""
    try:
        return bool(bed.resolve(ECHO))
    except TimeoutError:
        return False


OTHERS = ["tun", "proxy-0", "proxy-1"]
# What cannot be laid at anybody's door, or is permitted, however much of it there is.
BORNE = {
    "huge",
    "replay",
    "deaf",
    "unknown_key",
    "no_mechanism",
    "plain_password",
    "many_connections",
    "half_handshakes",
    "many_handshakes",
    "garbage_on_the_wire",
}


@pytest.mark.parametrize("attack", sorted(hostile_bus.ATTACKS.keys() - BORNE))
def test_dns_that_breaks_the_rules_of_the_bus_is_replaced_alone(healthy_dns, attack):
    bed = healthy_dns
    pid = bed.worker("dns")["pid"]
    seen = len(bed.log())
    with nothing_else_falls(bed, OTHERS, bed.resolve(ECHO)[0]):

        def is_replaced() -> bool:
            # Again: each proxy tells of a breach once a second at most.
            order_dns(bed, attack, pid)
            time.sleep(0.5)
            return bool(bed.worker("dns")["pid"] not in (pid, None))

        wait_until(is_replaced, "dns is replaced")
        bed.wait_for_successor("dns", pid)
        wait_until(lambda: answers(bed), "dns answers")
    log = bed.log()[seen:]
    assert "dns is killed: proxy-" in log
    assert "dns misbehaves on the bus" in log


@pytest.mark.parametrize("attack", [*sorted(BORNE), "at_tun"])
def test_attack_of_dns_that_cannot_be_told_from_bad_luck_is_borne(healthy_dns, attack):
    bed = healthy_dns
    seen = len(bed.log())
    with nothing_else_falls(bed, OTHERS, bed.resolve(ECHO)[0]):

        def is_over() -> bool:
            # The others answer meanwhile: a question to a dns that is busy with evil may be lost.
            bed.status()
            return f"attack {attack} is over" in bed.log()[seen:]

        order_dns(bed, attack, bed.worker("dns")["pid"])
        wait_until(is_over, "it has attacked", 60)
        bed.connect(bed.resolve(ECHO)[0], 7).close()
        assert bed.resolve(ECHO)
    assert f"attack {attack} fails" not in bed.log()[seen:]


def test_dns_that_never_stops_is_given_up(healthy_dns):
    """Both proxies say so, and more often than one alone is believed."""
    bed = healthy_dns
    with hostile_demo("dns", "[supervisor]\nrestart_max = 2\n") as other:
        address = other.resolve(ECHO)[0]
        with nothing_else_falls(other, OTHERS, address):

            def is_given_up() -> bool:
                found = other.worker("dns")
                if found["state"] == "ready":
                    order_dns(other, "random_bytes", found["pid"])
                return bool(other.worker("dns")["state"] == "failed")

            wait_until(is_given_up, "dns is given up")
            other.connect(address, 7).close()
        assert "dns ended with SIGKILL too often and is given up" in other.log()
    assert bed.resolve(ECHO)


# -- tun --


@pytest.fixture(scope="module")
def tun_bed() -> Iterator[Bed]:
    """A demo with a hostile tun."""
    with hostile_demo("tun") as bed:
        yield bed


def order_tun(bed: Bed, attack: str, pid: int) -> None:
    with bed.open_socket(kind=socket.SOCK_DGRAM) as end:
        # An address between which and us nothing has passed: tun looks at each packet.
        end.connect(("100.127.9.9", 9))
        end.send(order(attack, pid))


PROXIES = ["proxy-0", "proxy-1", "dns"]


@pytest.mark.parametrize(
    "attack", ["own_words_of_proxies", "words_of_dns", "random_bytes", "many_parts"]
)
def test_tun_that_breaks_the_rules_of_the_bus_is_replaced_under_a_transfer(tun_bed, attack):
    bed = tun_bed
    bed.wait_for_health("healthy")
    pid = bed.worker("tun")["pid"]
    with nothing_else_falls(bed, PROXIES, bed.resolve(ECHO)[0]):

        def is_replaced() -> bool:
            order_tun(bed, attack, pid)
            time.sleep(0.5)
            return bool(bed.worker("tun")["pid"] not in (pid, None))

        wait_until(is_replaced, "tun is replaced")
        bed.wait_for_successor("tun", pid)
        bed.connect(bed.resolve(ECHO)[0], 7).close()
    assert "tun misbehaves on the bus" in bed.log()


@pytest.mark.parametrize("attack", ["dial_requests", "flow_ids_again"])
def test_connections_that_tun_invents_take_nothing_from_those_that_there_are(tun_bed, attack):
    bed = tun_bed
    bed.wait_for_health("healthy")
    seen = len(bed.log())
    with nothing_else_falls(bed, [*PROXIES, "tun"], bed.resolve(ECHO)[0]):
        order_tun(bed, attack, bed.worker("tun")["pid"])
        wait_until(lambda: f"attack {attack} is over" in bed.log()[seen:], "it has attacked")
        bed.connect(bed.resolve(ECHO)[0], 7).close()


# -- a proxy --


@pytest.fixture(scope="module")
def proxy_bed() -> Iterator[Bed]:
    """A demo with hostile proxies."""
    with hostile_demo("proxy") as bed:
        yield bed


class Attack:
    """Orders an attack from one proxy; `victim` is an address of the other one."""

    def __init__(self, bed: Bed, name: str) -> None:
        self.victim = bed.resolve(ECHO)[0]
        honest = int(bed.owner_of(self.victim)[-1])
        self.honest, self.hostile = f"proxy-{honest}", f"proxy-{1 - honest}"
        self.pid = bed.worker(self.hostile)["pid"]
        self.others = ["tun", "dns", self.honest]
        self._bed, self._name = bed, name
        below = f"{name.replace('_', '-')}.{self.pid}.upstream.test"
        self._names = (
            found
            for number in range(1000)
            if owner_of_name(found := f"vnet-attack-{number}.{below}", 2) == 1 - honest
        )

    def begin(self) -> None:
        self._bed.ask(next(self._names))


@pytest.fixture
def healthy_proxies(proxy_bed) -> Bed:
    proxy_bed.wait_for_health("healthy")
    return proxy_bed


def test_proxy_that_wants_every_listener_leaves_the_others_theirs(healthy_proxies):
    bed = healthy_proxies
    attack = Attack(bed, "listeners")
    # The supervisor keeps its listeners as long as it runs: they are not measured.
    with Transfer(bed, attack.victim):
        attack.begin()
        wait_until(lambda: "listeners already" in bed.log(), "it has got all it gets", 60)
        for port in (80, 9):
            bed.connect(bed.resolve("own.teleport.e2e.test")[0], port).close()
    assert bed.worker(attack.honest)["restarts"] == 0


def test_proxy_that_claims_the_worlds_addresses_gets_none(healthy_proxies):
    bed = healthy_proxies
    attack = Attack(bed, "claims")
    before = set(bed.output("ip", "route").splitlines())
    with nothing_else_falls(bed, attack.others, attack.victim):
        attack.begin()
        wait_until(lambda: "attack claims is over" in bed.log(), "it has attacked")
        bed.connect(attack.victim, 7).close()
        assert bed.ask("unknown.upstream.test")
        wait_until(lambda: "127.0.0.0/8" in " ".join(bed.status()["reasons"]), "it is told")

        def added() -> set[str]:
            return set(bed.output("ip", "route").splitlines()) - before

        # Only what no one else has.
        wait_until(added, "there is another route")
        assert all(line.startswith("10.66.0.0/16 dev vnet0 ") for line in added())
        zones = bed.status()["network"]["dns_zones"]
        assert not {"..", ".", "/etc/passwd", "a b.test"} & set(zones)
    # What it has said is forgotten with it.
    bed.kill(attack.pid)
    bed.wait_for_successor(attack.hostile, attack.pid)
    bed.wait_for_health("healthy")


def test_proxy_that_accuses_tun_for_ever_is_replaced_itself(healthy_proxies):
    bed = healthy_proxies
    attack = Attack(bed, "accusations")
    restarts = bed.worker("tun")["restarts"]
    with Transfer(bed, attack.victim):
        attack.begin()
        bed.wait_for_successor(attack.hostile, attack.pid)
        bed.wait_for_health("healthy")
    # Once, unless it is still speaking when the next tun is ready.
    assert 1 <= bed.worker("tun")["restarts"] - restarts <= MAX_BELIEVED
    assert f"{attack.hostile} is killed: it accuses others too often" in bed.log()
    assert "\x1b" not in bed.log()


def test_verdicts_on_connections_of_others_are_not_listened_to(healthy_proxies):
    bed = healthy_proxies
    attack = Attack(bed, "verdicts")
    with nothing_else_falls(bed, attack.others, attack.victim):
        attack.begin()
        bed.connect(attack.victim, 7).close()
        assert bed.seconds_until_refused("ports.teleport.e2e.test", 9000) < PATIENCE_SECONDS

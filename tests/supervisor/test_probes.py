"""Real probes out of a real TUN device; the test plays everything behind it."""

import contextlib
import os
import struct
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from run_fakes import NETWORK

from ipc.probe_ports import FIRST_PROBE_PORT
from supervisor import devices, diagnostic_query, namespace
from supervisor.devices import Links
from supervisor.probe_blame import Ready
from supervisor.probes import MAX_OPEN, Prober
from workers.tun.packet import parse_packet
from workers.tun.reset import build_reset

pytestmark = pytest.mark.root

SLOTS = ("tun", "proxy-0", "proxy-1", "dns")
ALL = frozenset(SLOTS[1:])
PORTS = {FIRST_PROBE_PORT: "proxy-0", FIRST_PROBE_PORT + 1: "proxy-1", 53: "dns"}
HANG = 5.0
STEP = 0.25


class Wire:
    """The outer device, with whatever is behind it; time is the test's own."""

    def __init__(self, *, is_up: bool = True) -> None:
        self.links = Links()
        self.device = devices.make_tun(NETWORK.interface)
        if is_up:
            self.bring_up()
        self.prober = Prober(
            NETWORK, self.device.fileno(), heartbeat_seconds=1.0, hang_seconds=HANG
        )
        self.now = 1000.0
        self.started = dict.fromkeys(SLOTS, 0.0)
        self.counters: dict[str, dict[str, int]] = {slot: {} for slot in SLOTS}
        self.asked: list[str] = []

    def bring_up(self) -> None:
        self.links.bring_up(NETWORK.interface)
        self.links.add_address(NETWORK.interface, NETWORK.tun_ipv4)
        self.links.add_route(NETWORK.interface, NETWORK.ranges[0], NETWORK.tun_ipv4)

    def serve(self, answering: frozenset[str], *, forged: bool = False) -> None:
        """Reads what waits; these answer it."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data = os.read(self.device.fileno(), 65535)
                packet = parse_packet(data)
                if packet.destination != NETWORK.dns_ipv4 or packet.protocol not in (6, 17):
                    continue  # the kernel's own: greetings of IPv6, answers that came too late
                source_port, port = struct.unpack_from(">HH", data, 20)
                slot = PORTS[port]
                self.asked.append(slot)
                if packet.tcp is not None:
                    self.counters["tun"]["probes"] = self.counters["tun"].get("probes", 0) + 1
                if slot not in answering:
                    continue
                if packet.tcp is not None:
                    os.write(self.device.fileno(), build_reset(packet))
                else:
                    text = diagnostic_query.answer(data[28:], NETWORK.dns_ipv4)
                    text = text[:-1] + b"\xff" if forged else text
                    os.write(self.device.fileno(), udp_answer(packet, source_port, text))

    def live(
        self, seconds: float, answering: frozenset[str] | None, *, forged: bool = False
    ) -> list[str]:
        """Turns of the loop; `None` for a tun that reads nothing. Who was suspected."""
        found = []
        end = self.now + seconds
        while self.now < end:
            self.now += STEP
            ready = {
                slot: Ready(started_at, dict(self.counters[slot]))
                for slot, started_at in self.started.items()
            }
            found += [suspect.slot for suspect in self.prober.tick(self.now, ready)]
            if answering is not None:
                self.serve(answering, forged=forged)
        return found

    def close(self) -> None:
        self.prober.close()
        self.device.close()
        self.links.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def udp_answer(packet, port: int, text: bytes) -> bytes:
    datagram = struct.pack(">4H", 53, port, 8 + len(text), 0) + text
    head = struct.pack(
        ">BBHHHBBH4s4s",
        *(0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0),
        *(packet.destination, packet.source),
    )
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return head[:10] + checksum.to_bytes(2) + head[12:] + datagram


def in_own_network(story: Callable[[Wire], None], *, is_up: bool = True) -> None:
    """Runs it in a child with a network namespace of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            namespace._check(namespace._libc.unshare(namespace.CLONE_NEWNET))
            with contextlib.closing(Wire(is_up=is_up)) as wire:
                story(wire)
            os._exit(0)
        except BaseException:  # noqa: BLE001  # shown, and the parent fails
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_every_way_is_asked_once_per_heartbeat_while_all_answer():
    def story(wire: Wire) -> None:
        assert wire.live(20, ALL) == []
        counts = {slot: wire.asked.count(slot) for slot in ALL}
        assert all(18 <= count <= 21 for count in counts.values()), counts
        assert wire.prober.problems == []

    in_own_network(story)


@pytest.mark.parametrize(
    ("answering", "expected"),
    [(ALL - {"dns"}, ["dns"]), (ALL - {"proxy-1"}, ["proxy-1"]), (None, ["tun"])],
)
def test_silent_worker_is_suspected(answering, expected):
    def story(wire: Wire) -> None:
        assert wire.live(3, ALL) == []
        assert wire.live(HANG - 1, answering) == []
        assert wire.live(2.5, answering) == expected

    in_own_network(story)


def test_wrong_answer_of_dns_is_none():
    def story(wire: Wire) -> None:
        wire.live(3, ALL)
        assert wire.live(HANG + 1, ALL, forged=True) == ["dns"]

    in_own_network(story)


def test_answer_that_takes_seconds_is_one():
    def story(wire: Wire) -> None:
        for _ in range(5):
            assert wire.live(HANG - 1, None) == []
            wire.serve(ALL)
            assert wire.live(STEP, ALL) == []
        assert wire.prober.problems == []

    in_own_network(story)


def test_interface_that_is_down_or_gone_costs_nobody_and_is_told():
    def story(wire: Wire) -> None:
        before = open_descriptors()
        assert wire.live(HANG + 1, ALL) == []
        (problem,) = wire.prober.problems
        assert NETWORK.interface in problem
        assert open_descriptors() <= before
        wire.bring_up()
        assert wire.live(HANG, ALL) == []
        assert wire.prober.problems == []
        wire.device.close()
        assert wire.live(3 * HANG, None) == []
        (problem,) = wire.prober.problems
        assert "No such device" in problem

    in_own_network(story, is_up=False)


def test_sockets_are_bounded_and_closed():
    def story(wire: Wire) -> None:
        wire.live(3, ALL)
        before = open_descriptors()
        most = 0
        for _ in range(100):
            wire.live(STEP, None)
            most = max(most, open_descriptors())
        assert most - before <= (MAX_OPEN + 1) * len(ALL)
        wire.live(5, ALL)
        assert open_descriptors() <= before
        table = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        assert table == []  # nor does a port stay taken
        wire.live(1, None)
        wire.prober.close()
        wire.prober.close()
        assert open_descriptors() <= before

    in_own_network(story)


def test_probing_costs_next_to_nothing():
    def story(wire: Wire) -> None:
        ready = {slot: Ready(0.0) for slot in SLOTS}
        seconds, spent = 250, 0.0
        for _ in range(int(seconds / STEP)):
            wire.now += STEP
            began = time.process_time()
            wire.prober.tick(wire.now, ready)
            spent += time.process_time() - began
            wire.serve(ALL)
        # Of a CPU; measured: 0.0002.
        assert spent / seconds < 0.01

    in_own_network(story)

"""The whole worker on datagram sockets in place of TUN devices: one datagram is one packet."""

import asyncio
import errno
import os
import socket

import pytest
import uvloop
from fake_runtime import CONFIG, FakeBus, admit, no_answer, refuse_with, running_worker, until
from msgspec.structs import replace
from tun_bed import DNS_IPV4, NETWORK, PREFIX, TUN_IPV4, TUN_IPV6
from tun_packets import ACK, RST, SYN, SYN_ACK, ipv4, ipv6, tcp_segment

from ipc.addresses import owner_of_address
from ipc.bus import Sender
from ipc.messages import DialVerdict, NetworkChanged, Refusal
from ipc.probe_ports import probe_port
from workers.tun import doorkeeper, last_packets
from workers.tun.icmp import ERRORS_AT_ONCE
from workers.tun.packet import parse_packet
from workers.tun.pump import Device, Direction
from workers.tun.uninvited import Uninvited

APP = b"\x64\x40\0\x09"
APP_IPV6 = PREFIX[:8] + bytes(4) + APP
SYN_PACKET = ipv4(TUN_IPV4, APP, tcp_segment(SYN))
DATA_PACKET = ipv4(TUN_IPV4, APP, tcp_segment(ACK, payload=b"data"))


class Wire:
    """The far ends of both devices."""

    def __init__(self):
        self.host, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.inner, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ends = (outer, inner)
        for end in (self.host, self.inner, outer, inner):
            end.setblocking(False)

    @property
    def descriptors(self):
        return [end.fileno() for end in self.ends]

    def close(self):
        for end in (self.host, self.inner, *self.ends):
            end.close()


def run(story, *, decide=admit, config=CONFIG):
    """Runs `story(wire, bus, runtime)` beside the worker."""

    async def main():
        wire, bus = Wire(), FakeBus(decide)
        try:
            async with running_worker(wire.descriptors, bus, config) as runtime:
                await asyncio.wait_for(story(wire, bus, runtime), 10)
        finally:
            wire.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def receive(end):
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(end, 70000), 5)


def test_packets_cross_unchanged_in_both_directions():
    async def story(wire, bus, runtime):
        wire.host.send(DATA_PACKET)
        assert await receive(wire.inner) == DATA_PACKET
        answer = ipv4(APP, TUN_IPV4, tcp_segment(ACK, ports=(443, 40000), payload=b"x" * 9000))
        wire.inner.send(answer)
        assert await receive(wire.host) == answer
        await until(lambda: runtime.counters["packets_to_outer"])
        assert runtime.counters["packets_to_inner"] == 1
        assert runtime.counters["bytes_to_outer"] == len(answer)
        assert bus.asked == []

    run(story)


@pytest.mark.parametrize(
    ("source", "app", "build"), [(TUN_IPV4, APP, ipv4), (TUN_IPV6, APP_IPV6, ipv6)]
)
def test_syn_passes_once_the_owner_of_the_address_admits_it(source, app, build):
    packet = build(source, app, tcp_segment(SYN, ports=(40000, 443)))

    async def story(wire, bus, runtime):
        wire.host.send(packet)
        assert await receive(wire.inner) == packet
        ((slot, request),) = bus.asked
        assert slot == f"proxy-{owner_of_address(app, 2)}"
        assert (request.source, request.source_port) == (source, 40000)
        assert (request.destination, request.destination_port) == (app, 443)
        assert (runtime.counters["syns"], runtime.counters["admitted"]) == (1, 1)
        assert runtime.counters["pending_now"] == 0

    run(story)


def test_refused_syn_is_reset_and_counted_by_reason():
    async def story(wire, bus, runtime):
        wire.host.send(SYN_PACKET)
        packet = parse_packet(await receive(wire.host))
        assert packet.tcp.flags & RST
        assert runtime.counters["refused_unknown_address"] == 1

    run(story, decide=refuse_with(Refusal.UNKNOWN_ADDRESS))


def test_data_passes_while_a_syn_is_held():
    async def story(wire, bus, runtime):
        wire.host.send(SYN_PACKET)
        wire.host.send(SYN_PACKET)
        wire.host.send(DATA_PACKET)
        assert await receive(wire.inner) == DATA_PACKET
        assert len(bus.asked) == 1
        assert (runtime.counters["pending_now"], runtime.counters["syns_repeated"]) == (1, 1)

    run(story, decide=no_answer)


def test_syn_without_verdict_is_refused_at_the_deadline():
    async def story(wire, bus, runtime):
        wire.host.send(SYN_PACKET)
        packet = parse_packet(await receive(wire.host))
        assert packet.tcp.flags & RST
        ((_, abandoned),) = bus.abandoned
        assert abandoned.flow_id == bus.asked[0][1].flow_id
        assert runtime.counters["refused_timed_out"] == 1

    run(story, decide=no_answer, config=replace(CONFIG, pending_seconds=0.05))


def test_more_syns_than_allowed_are_refused_at_once():
    async def story(wire, bus, runtime):
        for port in (1, 2, 3):
            wire.host.send(ipv4(TUN_IPV4, APP, tcp_segment(SYN, ports=(port, 443))))
        packet = parse_packet(await receive(wire.host))
        assert packet.tcp.destination_port == 3
        assert runtime.counters["refused_too_many"] == 1
        assert runtime.counters["pending_now"] == 2

    run(story, decide=no_answer, config=replace(CONFIG, max_pending=2))


@pytest.mark.parametrize("trouble", ["connected", "busy"])
def test_syn_waits_for_a_proxy_that_is_away_or_busy(trouble):
    async def story(wire, bus, runtime):
        bus.connected, bus.busy = trouble != "connected", trouble == "busy"
        wire.host.send(SYN_PACKET)
        await until(lambda: runtime.counters["pending_now"] == 1)
        assert bus.asked == []
        bus.connected, bus.busy = True, False
        assert await receive(wire.inner) == SYN_PACKET
        assert len(bus.asked) == 1

    run(story)


def test_restarted_proxy_is_asked_again_for_its_own_flows_only():
    async def story(wire, bus, runtime):
        apps = [b"\x64\x40\0" + bytes([last]) for last in range(10, 16)]
        for app in apps:
            wire.host.send(ipv4(TUN_IPV4, app, tcp_segment(SYN)))
        await until(lambda: len(bus.asked) == 6)
        before = list(bus.asked)
        bus.decide = admit
        bus.say_hello()
        assert bus.asked[6:] == sorted(before, key=lambda asked: asked[0])
        for _ in apps:
            await receive(wire.inner)

    run(story, decide=no_answer)


def test_syn_held_for_a_second_factor_is_asked_again_and_passes_when_the_verdict_comes(monkeypatch):
    """The first verdict may have been lost with a full queue."""
    monkeypatch.setattr(doorkeeper, "_REMIND_SECONDS", 0.02)

    async def story(wire, bus, runtime):
        wire.host.send(SYN_PACKET)
        await until(lambda: len(bus.asked) >= 3)
        assert len({request.flow_id for _, request in bus.asked}) == 1
        assert runtime.counters["syns"] == runtime.counters["pending_now"] == 1
        bus.decide = admit
        assert await receive(wire.inner) == SYN_PACKET
        asked = len(bus.asked)
        wire.host.send(DATA_PACKET)
        await receive(wire.inner)
        assert len(bus.asked) == asked

    run(story, decide=no_answer)


@pytest.mark.parametrize("was_asked", [False, True])
def test_nobody_waits_a_prompts_time_for_a_proxy_that_does_not_come_back(
    monkeypatch, caplog, was_asked
):
    monkeypatch.setattr(doorkeeper, "_REMIND_SECONDS", 0.02)
    monkeypatch.setattr(doorkeeper, "_UNASKED_SECONDS", 0.1)

    async def story(wire, bus, runtime):
        bus.connected = was_asked
        for port in (1, 2, 3):
            wire.host.send(ipv4(TUN_IPV4, APP, tcp_segment(SYN, ports=(port, 443))))
        await until(lambda: runtime.counters["pending_now"] == 3)
        if was_asked:
            await until(lambda: len(bus.asked) >= 3)
        bus.connected = False
        for _ in range(3):
            packet = parse_packet(await receive(wire.host))
            assert packet.tcp.flags & RST
        assert runtime.counters["refused_internal"] == 3
        assert runtime.counters["pending_now"] == 0
        lines = [record.getMessage() for record in caplog.records if "refused" in record.message]
        assert sum(int(line.rpartition(" ")[2]) for line in lines) == 3

    run(story, decide=no_answer, config=replace(CONFIG, pending_seconds=120.0))


def test_many_syns_held_for_long_take_no_more_than_their_number(monkeypatch):
    monkeypatch.setattr(doorkeeper, "_REMIND_SECONDS", 0.01)

    async def story(wire, bus, runtime):
        for port in range(1, 41):
            wire.host.send(ipv4(TUN_IPV4, APP, tcp_segment(SYN, ports=(port, 443))))
        await until(lambda: runtime.counters["syns"] == 40)
        assert runtime.counters["pending_now"] == 16
        assert runtime.counters["refused_too_many"] == 24
        await until(lambda: len(bus.asked) >= 3 * 16)
        bus.decide = admit
        bus.say_hello()
        for _ in range(16):
            await receive(wire.inner)

    run(story, decide=no_answer, config=replace(CONFIG, pending_seconds=120.0))


def test_proxy_of_another_version_is_not_asked():
    async def story(wire, bus, runtime):
        wire.host.send(SYN_PACKET)
        await until(lambda: bus.asked)
        bus.say_hello(version=2)
        assert len(bus.asked) == 1

    run(story, decide=no_answer)


def test_verdict_of_a_proxy_that_does_not_own_the_flow_is_ignored():
    async def story(wire, bus, runtime):
        wire.host.send(SYN_PACKET)
        await until(lambda: bus.asked)
        ((slot, request),) = bus.asked
        other = "proxy-1" if slot == "proxy-0" else "proxy-0"
        bus.deliver(other, DialVerdict(flow_id=request.flow_id))
        assert runtime.counters["verdicts_ignored"] == 1
        assert runtime.counters["pending_now"] == 1
        bus.deliver(slot, DialVerdict(flow_id=request.flow_id))
        assert await receive(wire.inner) == SYN_PACKET

    run(story, decide=no_answer)


def test_verdict_of_a_proxy_that_has_a_successor_is_ignored():
    async def story(wire, bus, runtime):
        wire.host.send(SYN_PACKET)
        await until(lambda: bus.asked)
        ((slot, request),) = bus.asked
        predecessor = bus.senders[slot]
        bus.say_hello()
        assert bus.asked == [(slot, request)] * 2
        # It accepts nothing any more, so what it has admitted would be reset.
        bus.on_message(predecessor, DialVerdict(flow_id=request.flow_id))
        assert runtime.counters["verdicts_ignored"] == 1
        assert runtime.counters["pending_now"] == 1
        bus.deliver(slot, DialVerdict(flow_id=request.flow_id))
        assert await receive(wire.inner) == SYN_PACKET

    run(story, decide=no_answer)


def test_word_of_a_proxy_that_has_not_said_hello_changes_nothing():
    async def story(wire, bus, runtime):
        wire.host.send(SYN_PACKET)
        await until(lambda: bus.asked)
        ((slot, request),) = bus.asked
        bus.on_message(Sender(slot, b"another"), DialVerdict(flow_id=request.flow_id))
        assert runtime.counters["verdicts_ignored"] == 1
        wire.host.send(ipv4(TUN_IPV4, APP, tcp_segment(SYN, ports=(2, 443))))
        await until(lambda: len(bus.asked) == 2)  # who said hello is still asked

    run(story, decide=no_answer)


STANDBY = replace(CONFIG, common=replace(CONFIG.common, is_standby=True))


def test_standby_moves_nothing_before_it_takes_over():
    async def story(wire, bus, runtime):
        wire.host.send(DATA_PACKET)
        wire.host.send(SYN_PACKET)
        await asyncio.sleep(0.05)
        assert runtime.counters["packets_to_inner"] == runtime.counters["syns"] == 0
        runtime.on_message(NetworkChanged(network=NETWORK), [])
        runtime.may_begin.set()
        assert [await receive(wire.inner) for _ in range(2)] == [DATA_PACKET, SYN_PACKET]

    run(story, config=STANDBY)


def test_one_that_drains_leaves_everything_to_its_successor_and_ends():
    async def main():
        wire, bus, later = Wire(), FakeBus(no_answer), FakeBus(admit)
        try:
            async with running_worker(wire.descriptors, bus) as old:
                wire.host.send(SYN_PACKET)
                await until(lambda: bus.asked)
                async with running_worker(wire.descriptors, later, STANDBY) as successor:
                    old.draining.set()
                    await until(lambda: old.has_handed_over)
                    assert bus.is_closed
                    wire.host.send(DATA_PACKET)
                    wire.host.send(SYN_PACKET)  # as the program's kernel repeats it
                    await asyncio.sleep(0.02)
                    assert old.counters["packets_to_inner"] == 0
                    successor.may_begin.set()
                    assert await receive(wire.inner) == DATA_PACKET
                    assert await receive(wire.inner) == SYN_PACKET
        finally:
            wire.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_resets_of_proxies_that_outlive_the_supervisor_reach_the_programs(monkeypatch):
    """On a busy machine a proxy may be killed and not yet gone for longer than tun would stay."""
    monkeypatch.setattr(last_packets, "_set_hard_limit", lambda: None)
    monkeypatch.setattr(last_packets, "LAST_SECONDS", 0.1)

    async def main():
        wire, bus = Wire(), FakeBus(no_answer)
        try:
            async with running_worker(wire.descriptors, bus) as runtime:
                bus.busy = True
                runtime.lost_supervisor()
                await asyncio.sleep(0.15)
                bus.busy = False
                await until(lambda: len(bus.abandoned) >= 10)
                reset = ipv4(APP, TUN_IPV4, tcp_segment(RST, ports=(443, 40000)))
                wire.inner.send(reset)
                assert await receive(wire.host) == reset
                bus.connected = False
        finally:
            wire.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_dropped_packets_are_counted_by_reason():
    packets = {
        "dropped_foreign_source": ipv4(b"\xc0\0\2\1", APP, tcp_segment(ACK)),
        "dropped_malformed": b"\x45garbage",
        "malformed_truncated": b"\x45garbage",
        "dropped_noise": ipv4(TUN_IPV4, b"\xe0\0\0\1", bytes(8), protocol=17),
        "dropped_oversized_syn": ipv4(TUN_IPV4, APP, tcp_segment(SYN, payload=bytes(4000))),
        "dropped_fragmented_tcp": ipv4(TUN_IPV4, APP, bytes(8), fragment=0x2001),
    }

    async def story(wire, bus, runtime):
        for name, packet in packets.items():
            before = runtime.counters[name]
            wire.host.send(packet)
            await until(lambda name=name, before=before: runtime.counters[name] == before + 1)
        wire.host.send(DATA_PACKET)
        assert await receive(wire.inner) == DATA_PACKET

    run(story)


ELSEWHERE, ELSEWHERE6 = b"\xc0\0\2\1", b"\x20\1\x0d\xb8" + bytes(11) + b"\1"
UNINVITED = {
    "attempt": (ipv4(ELSEWHERE, APP, tcp_segment(SYN)), RST | ACK),
    "attempt to the dns server": (ipv4(ELSEWHERE, DNS_IPV4, tcp_segment(SYN)), RST | ACK),
    "open connection": (ipv4(ELSEWHERE, APP, tcp_segment(ACK)), RST),
    "ipv6": (ipv6(ELSEWHERE6, APP_IPV6, tcp_segment(SYN)), RST | ACK),
}


@pytest.mark.parametrize("name", UNINVITED)
def test_connection_from_elsewhere_is_reset(name):
    data, flags = UNINVITED[name]

    async def story(wire, bus, runtime):
        wire.host.send(data)
        packet, asked = parse_packet(await receive(wire.host)), parse_packet(data)
        assert (packet.source, packet.destination) == (asked.destination, asked.source)
        assert (packet.tcp.source_port, packet.tcp.destination_port) == (443, 40000)
        assert packet.tcp.flags == flags
        assert bus.asked == []
        assert runtime.counters["turned_away"] == runtime.counters["dropped_foreign_source"] == 1

    run(story)


QUESTION = ipv4(ELSEWHERE, DNS_IPV4, b"\x9c\x40\0\x35\0\x0c\0\0what", protocol=17)


def test_question_from_elsewhere_is_refused():
    async def story(wire, bus, runtime):
        wire.host.send(QUESTION)
        error = await receive(wire.host)
        assert (error[12:20], error[9], error[20:22]) == (DNS_IPV4 + ELSEWHERE, 1, b"\3\3")
        assert error[28:] == QUESTION

    run(story)


def test_errors_for_questions_from_elsewhere_are_limited_and_resets_are_not():
    counters = {}
    uninvited = Uninvited(counters, lambda: 1000.0)
    question, attempt = parse_packet(QUESTION), parse_packet(UNINVITED["attempt"][0])
    answered = [uninvited.answer(QUESTION, question) is not None for _ in range(200)]
    assert sum(answered) == ERRORS_AT_ONCE
    for _ in range(200):
        assert uninvited.answer(UNINVITED["attempt"][0], attempt) is not None
    assert counters["turned_away"] == ERRORS_AT_ONCE + 200


NOT_ANSWERED = {
    "a reset": ipv4(ELSEWHERE, APP, tcp_segment(RST)),
    "to elsewhere": ipv4(ELSEWHERE, ELSEWHERE, tcp_segment(SYN)),
    "from a virtual address": ipv4(APP, APP, tcp_segment(SYN)),
    "a fragment": ipv4(ELSEWHERE, APP, tcp_segment(SYN), fragment=0x2000),
    "source routed": ipv4(ELSEWHERE, APP, tcp_segment(SYN), options=b"\x83\7\4\x7f\0\0\1\0"),
    "an echo request": ipv4(ELSEWHERE, APP, b"\x08\0\0\0\0\0\0\0", protocol=1),
}


@pytest.mark.parametrize("name", NOT_ANSWERED)
def test_what_else_comes_from_elsewhere_is_dropped(name):
    async def story(wire, bus, runtime):
        wire.host.send(NOT_ANSWERED[name])
        await until(lambda: runtime.counters["dropped_foreign_source"] == 1)
        assert runtime.counters["turned_away"] == runtime.counters["packets_to_outer"] == 0

    run(story)


def test_forwarded_networks_follow_the_supervisor():
    listed = NetworkChanged(network=replace(NETWORK, forwarded_from=["192.0.2.0/24"]))
    data = ipv4(ELSEWHERE, APP, tcp_segment(ACK, payload=b"data"))
    answer = ipv4(APP, ELSEWHERE, tcp_segment(ACK))

    async def story(wire, bus, runtime):
        runtime.on_message(listed, [])
        for _ in range(2):  # the second without being parsed
            wire.host.send(data)
            assert await receive(wire.inner) == data
            wire.inner.send(answer)
            assert await receive(wire.host) == answer
        runtime.on_message(NetworkChanged(network=NETWORK), [])
        wire.inner.send(answer)
        wire.host.send(data)
        assert parse_packet(await receive(wire.host)).tcp.flags == RST
        await until(lambda: runtime.counters["dropped_foreign_destination"] == 1)

    run(story)


def test_connection_attempt_out_of_the_inner_namespace_is_dropped():
    async def story(wire, bus, runtime):
        wire.inner.send(ipv4(APP, TUN_IPV4, tcp_segment(SYN)))
        answer = ipv4(APP, TUN_IPV4, tcp_segment(SYN_ACK))
        wire.inner.send(answer)
        assert await receive(wire.host) == answer
        assert runtime.counters["dropped_inner_syn"] == 1

    run(story)


def test_new_range_is_served_and_a_removed_one_is_not():
    new_app = b"\x0a\x40\0\x09"
    packet = ipv4(TUN_IPV4, new_app, tcp_segment(SYN))

    async def story(wire, bus, runtime):
        wire.host.send(packet)
        await until(lambda: runtime.counters["dropped_foreign_destination"] == 1)
        wire.host.send(DATA_PACKET)
        await receive(wire.inner)
        runtime.on_message(NetworkChanged(network=replace(NETWORK, ranges=["10.64.0.0/16"])), [])
        wire.host.send(packet)
        assert await receive(wire.inner) == packet
        wire.host.send(DATA_PACKET)
        await until(lambda: runtime.counters["dropped_foreign_destination"] == 2)

    run(story)


def test_flow_ids_of_a_successor_differ():
    seen = []

    async def story(wire, bus, runtime):
        wire.host.send(SYN_PACKET)
        await receive(wire.inner)
        seen.append(bus.asked[0][1].flow_id)

    run(story)
    run(story)
    assert seen[0] != seen[1]


def test_device_that_is_full_loses_packets_and_nothing_queues():
    async def story(wire, bus, runtime):
        sent = 0
        while not runtime.counters["dropped_device_full"]:
            try:
                wire.host.send(DATA_PACKET)
                sent += 1
            except BlockingIOError:
                pass
            await asyncio.sleep(0)
        await until(
            lambda: (
                runtime.counters["packets_to_inner"] + runtime.counters["dropped_device_full"]
                == sent
            )
        )
        for _ in range(runtime.counters["packets_to_inner"]):
            assert wire.inner.recv(70000) == DATA_PACKET
        with pytest.raises(BlockingIOError):
            wire.inner.recv(1)
        wire.host.send(DATA_PACKET)
        assert await receive(wire.inner) == DATA_PACKET

    run(story)


def test_one_wake_moves_no_more_than_a_batch():
    async def story():
        wire, counters = Wire(), {}
        try:
            outer, inner = (
                Device(name, descriptor, counters)
                for name, descriptor in zip(("outer", "inner"), wire.descriptors, strict=True)
            )
            for _ in range(5):
                wire.host.send(DATA_PACKET)
            direction = Direction(
                outer, inner, lambda _buffer, _length: True, lambda _data: None, batch=2
            )
            direction.start(asyncio.get_running_loop())
            moved = []
            while sum(moved) < 5:
                before = counters["packets_to_inner"]
                await asyncio.sleep(0)
                moved.append(counters["packets_to_inner"] - before)
            direction.stop()
            assert max(moved) == 2
        finally:
            wire.close()

    asyncio.run(story())


def test_broken_device_is_reported_once_until_it_works_again(caplog):
    counters = {}
    device = Device("inner", os.open("/dev/null", os.O_RDONLY), counters)
    try:
        for _ in range(3):
            device.count_dropped(OSError(errno.EIO, "Input/output error"))
        device.write(b"x")
        assert counters["dropped_device_down"] == 3
        assert counters["dropped_device_refused"] == 1
        assert len(caplog.records) == 1
        device.count_written(1, 1)
        device.count_dropped(OSError(errno.EIO, "Input/output error"))
        assert len(caplog.records) == 2
    finally:
        os.close(device.descriptor)


def probe(index, source_port=40000):
    return ipv4(
        TUN_IPV4, DNS_IPV4, tcp_segment(SYN, ports=(source_port, probe_port(f"proxy-{index}")))
    )


@pytest.mark.parametrize("index", [0, 1])
def test_probe_is_put_to_its_proxy_and_only_that_answers_it(index):
    async def story(wire, bus, runtime):
        wire.host.send(probe(index))
        await until(lambda: bus.asked)
        ((slot, request),) = bus.asked
        assert slot == f"proxy-{index}"
        assert request.destination_port == probe_port(f"proxy-{index}")
        bus.deliver(f"proxy-{1 - index}", DialVerdict(flow_id=request.flow_id))
        assert runtime.counters["pending_now"] == 1
        bus.deliver(slot, DialVerdict(flow_id=request.flow_id, refusal=Refusal.PROBE))
        packet = parse_packet(await receive(wire.host))
        assert packet.tcp.flags & RST
        assert packet.tcp.source_port == probe_port(f"proxy-{index}")
        assert (runtime.counters["probes"], runtime.counters["refused_probe"]) == (1, 1)

    run(story, decide=no_answer)


@pytest.mark.parametrize("decide", [admit, refuse_with(Refusal.TOO_MANY)])
def test_probe_is_never_let_in_whatever_the_proxy_says(decide):
    async def story(wire, bus, runtime):
        wire.host.send(probe(0))
        assert parse_packet(await receive(wire.host)).tcp.flags & RST
        wire.host.send(probe(0))  # the same attempt once more
        assert parse_packet(await receive(wire.host)).tcp.flags & RST
        assert runtime.counters["refused_probe"] == 1
        assert runtime.counters["admitted"] == 0

    run(story, decide=decide)


def test_ports_beside_those_of_the_probes_are_not_gated():
    async def story(wire, bus, runtime):
        for port in (53, probe_port("ssh") - 1, probe_port("proxy-2")):
            syn = ipv4(TUN_IPV4, DNS_IPV4, tcp_segment(SYN, ports=(40000, port)))
            wire.host.send(syn)
            assert await receive(wire.inner) == syn
        assert bus.asked == []

    run(story)


def test_probe_of_a_hung_proxy_is_held_although_programs_have_taken_every_place(monkeypatch):
    """The refusal for lack of place would look like the proxy's answer."""
    monkeypatch.setattr(doorkeeper, "_PROBE_RESERVE", 2)

    async def story(wire, bus, runtime):
        for port in (1, 2):
            wire.host.send(ipv4(TUN_IPV4, APP, tcp_segment(SYN, ports=(port, 443))))
        for port in (1, 2, 3):
            wire.host.send(probe(0, port))
        packet = parse_packet(await receive(wire.host))
        assert (packet.tcp.source_port, packet.tcp.destination_port) == (probe_port("proxy-0"), 3)
        assert runtime.counters["pending_now"] == 4
        # Nor does a flood of them take more than that.
        wire.host.send(ipv4(TUN_IPV4, APP, tcp_segment(SYN, ports=(3, 443))))
        packet = parse_packet(await receive(wire.host))
        assert packet.tcp.source_port == 443
        assert runtime.counters["refused_too_many"] == 2

    run(story, decide=no_answer, config=replace(CONFIG, max_pending=2))


def test_probe_of_a_proxy_that_does_not_come_back_is_no_refused_connection_in_the_log(
    monkeypatch, caplog
):
    monkeypatch.setattr(doorkeeper, "_UNASKED_SECONDS", 0.1)

    async def story(wire, bus, runtime):
        bus.connected = False
        wire.host.send(probe(0))
        assert parse_packet(await receive(wire.host)).tcp.flags & RST
        assert [record for record in caplog.records if "refused" in record.getMessage()] == []

    run(story)

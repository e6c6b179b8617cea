"""A worker's surroundings, with the test in the supervisor's place."""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from ipc import messages as m
from ipc.channel import Channel, make_pair
from ipc.curve import make_key_pair
from ipc.errors import BusyError, ForbiddenMessageError, MalformedMessageError, PeerGoneError
from ipc.permits import Role
from workers import runtime as module
from workers.runtime import Runtime

NETWORK = m.Network(
    interface="vnet0",
    mtu=65535,
    ranges=["100.64.0.0/10"],
    tun_ipv4=b"\x64\x40\0\1",
    dns_ipv4=b"\x64\x40\0\2",
    ipv6_prefix=None,
    tun_ipv6=None,
    dns_ipv6=None,
)


def configuration(bus_dir: Path, *, is_standby: bool = False) -> m.ConfigureDns:
    public, secret = make_key_pair()
    peers = {"proxy-0": make_key_pair()[0]}
    common = m.Common(
        slot="dns",
        proxies=1,
        bus_dir=str(bus_dir),
        keys=m.BusKeys(public=public, secret=secret, peers=peers),
        heartbeat_seconds=0.02,
        log_level="INFO",
        is_standby=is_standby,
    )
    return m.ConfigureDns(common=common, network=NETWORK, upstream=[], ttl_seconds=10)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


class Bed:
    def __init__(self, directory: Path, *, is_standby: bool = False) -> None:
        self._ends = make_pair()
        self.supervisor = Channel(self._ends[0], Role.SUPERVISOR, Role.DNS, takes_descriptors=False)
        self.channel = Channel(self._ends[1], Role.DNS, Role.SUPERVISOR, takes_descriptors=True)
        self.config = configuration(directory, is_standby=is_standby)
        self.runtime: Runtime[m.ConfigureDns] = Runtime(
            self.channel, self.config, [], asyncio.get_running_loop()
        )

    def heard(self) -> list[m.AnyMessage]:
        """What the supervisor can read now, without heartbeats."""
        found = []
        while (received := self.supervisor.receive()) is not None:
            if not isinstance(received[0], m.Heartbeat):
                found.append(received[0])
        return found

    def close(self) -> None:
        self.runtime.close()
        for end in self._ends:
            end.close()


@pytest.fixture
def run(tmp_path):
    def run_scenario(scenario, *, is_standby: bool = False) -> None:
        async def main() -> None:
            bed = Bed(tmp_path, is_standby=is_standby)
            try:
                await scenario(bed)
            finally:
                bed.close()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    level, handler = logging.getLogger().level, signal.getsignal(signal.SIGTERM)
    yield run_scenario
    logging.getLogger().setLevel(level)
    signal.signal(signal.SIGTERM, handler)


def test_heartbeats_carry_the_counters_of_the_moment(run):
    async def scenario(bed: Bed) -> None:
        bed.runtime.counters["queries"] = 1
        bed.runtime.start()
        assert bed.supervisor.receive() == (m.Heartbeat(counters={"queries": 1}), [])
        bed.runtime.counters["queries"] = 2
        beats: list[m.AnyMessage] = []

        def beat_came() -> bool:
            received = bed.supervisor.receive()
            beats.extend([] if received is None else [received[0]])
            return len(beats) == 3

        await until(beat_came)
        assert beats == [m.Heartbeat(counters={"queries": 2})] * 3

    run(scenario)


def test_new_path_makes_the_worker_ask_for_a_successor_once(run):
    async def scenario(bed: Bed) -> None:
        found = iter([None, None, Path("/home/alice/.tsh")])
        bed.supervisor = Channel(bed._ends[0], Role.SUPERVISOR, Role.PROXY, takes_descriptors=False)
        bed.runtime._what_is_new = lambda: next(found)
        bed.runtime.start()
        heard: list[m.AnyMessage] = []

        def has_asked() -> bool:
            heard.extend(bed.heard())
            return bool(heard)

        await until(has_asked)
        await asyncio.sleep(0.1)  # five beats, in which a further look would raise StopIteration
        heard.extend(bed.heard())
        [message] = heard
        assert isinstance(message, m.NeedsRestart)
        assert "/home/alice/.tsh" in message.reason

    run(scenario)


def test_no_successor_is_wanted_by_a_standby_nor_by_one_that_has_one(run):
    async def scenario(bed: Bed) -> None:
        bed.supervisor = Channel(bed._ends[0], Role.SUPERVISOR, Role.PROXY, takes_descriptors=False)
        looks = 0

        def look() -> Path | None:
            nonlocal looks
            looks += 1
            if looks == 2:
                bed.supervisor.send(m.Drain(deadline_seconds=1))
                drained.wait(10)
                return Path("/home/alice/.tsh")
            return None

        drained = threading.Event()
        bed.runtime._what_is_new = look
        bed.runtime.start()
        await asyncio.sleep(0.1)  # five beats
        assert looks == 0
        bed.supervisor.send(m.TakeOver())
        await until(lambda: looks == 2)
        await bed.runtime.draining.wait()
        drained.set()
        await asyncio.sleep(0.1)
        assert bed.heard() == []
        assert looks == 2

    run(scenario, is_standby=True)


def test_stuck_loop_sends_no_heartbeat(run):
    async def scenario(bed: Bed) -> None:
        import time

        bed.runtime.start()
        bed.supervisor.receive()
        time.sleep(0.2)  # ten beats long
        assert bed.supervisor.receive() is None

    run(scenario)


def test_ready_is_said_at_once(run):
    async def scenario(bed: Bed) -> None:
        bed.runtime.ready()
        assert bed.heard() == [m.Ready()]

    run(scenario)


def test_standby_is_ready_at_once_and_begins_when_it_is_told(run):
    async def scenario(bed: Bed) -> None:
        bed.runtime.start()
        begun = asyncio.create_task(bed.runtime.taken_over())
        heard: list[m.AnyMessage] = []
        await until(lambda: heard.extend(bed.heard()) or heard)
        assert heard == [m.Ready()]
        bed.supervisor.send(m.NetworkChanged(network=NETWORK))
        await asyncio.sleep(0.05)
        assert not begun.done()
        bed.supervisor.send(m.TakeOver())
        await begun
        bed.runtime.ready()
        assert bed.heard() == []

    run(scenario, is_standby=True)


def test_worker_without_a_predecessor_begins_before_it_is_ready(run):
    async def scenario(bed: Bed) -> None:
        await bed.runtime.taken_over()
        assert bed.heard() == []

    run(scenario)


def test_drain_is_passed_on_and_the_handover_is_said(run):
    async def scenario(bed: Bed) -> None:
        bed.runtime.start()
        bed.supervisor.send(m.Drain(deadline_seconds=90))
        await bed.runtime.draining.wait()
        assert bed.runtime.drain_seconds == 90
        assert not bed.runtime.stopping.is_set()
        bed.heard()
        bed.runtime.handed_over()
        assert bed.heard() == [m.HandedOver()]

    run(scenario)


@pytest.mark.parametrize("told", [[], [m.Drain(deadline_seconds=90)]])
def test_stop_ends_whatever_a_worker_does(run, told):
    async def scenario(bed: Bed) -> None:
        ended = []

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        bed.runtime.start()
        working = asyncio.create_task(bed.runtime.until_stopped(work()))
        for message in (*told, m.Stop(grace_seconds=1)):
            bed.supervisor.send(message)
        async with asyncio.timeout(10):
            await working
        assert ended == [True]

    run(scenario)


def test_work_may_end_by_itself_or_fail(run):
    async def scenario(bed: Bed) -> None:
        async def fail() -> None:
            raise ZeroDivisionError

        await bed.runtime.until_stopped(asyncio.sleep(0))
        with pytest.raises(ZeroDivisionError):
            await bed.runtime.until_stopped(fail())
        assert len(asyncio.all_tasks()) == 1

    run(scenario)


@pytest.mark.parametrize(
    ("is_standby", "message"),
    [(True, m.Drain(deadline_seconds=1)), (False, m.TakeOver())],
)
def test_worker_that_is_told_what_makes_no_sense_ends(run, is_standby, message):
    async def scenario(bed: Bed) -> None:
        bed.runtime.start()
        bed.supervisor.send(message)
        async with asyncio.timeout(10):
            await bed.runtime.stopping.wait()
        assert not bed.runtime.draining.is_set()

    run(scenario, is_standby=is_standby)


@pytest.mark.parametrize("order", ["stop", "signal", "close", "second configuration", "garbage"])
def test_worker_stops_when_told_and_when_the_supervisor_is_of_no_use(run, order):
    async def scenario(bed: Bed) -> None:
        bed.runtime.start()
        match order:
            case "stop":
                bed.supervisor.send(m.Stop(grace_seconds=1))
            case "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            case "close":
                bed.supervisor.close()
            case "second configuration":
                bed.supervisor.send(bed.config)
            case _:
                os.write(bed.supervisor.fileno(), b"\xc1")
        async with asyncio.timeout(10):
            await bed.runtime.stopping.wait()

    run(scenario)


def test_messages_and_their_descriptors_reach_the_worker(run):
    async def scenario(bed: Bed) -> None:
        found: list[tuple[m.AnyMessage, list[int]]] = []
        bed.runtime.on_message = lambda message, descriptors: found.append((message, descriptors))
        bed.runtime.start()
        bed.supervisor.send(m.NetworkChanged(network=NETWORK), [0])
        await until(lambda: found)
        [(message, [descriptor])] = found
        assert message == m.NetworkChanged(network=NETWORK)
        os.close(descriptor)

    run(scenario)


def test_log_level_is_taken_over(run):
    async def scenario(bed: Bed) -> None:
        bed.runtime.start()
        bed.supervisor.send(m.SetLogLevel(level="ERROR"))
        await until(lambda: logging.getLogger().level == logging.ERROR)

    run(scenario)


def test_busy_supervisor_gets_everything_later_and_in_order(run):
    async def scenario(bed: Bed) -> None:
        sent = [m.PeerMisbehaved(slot=f"proxy-{n}", reason="r" * 500) for n in range(2000)]
        for message in sent:
            bed.runtime.send(message)
        heard: list[m.AnyMessage] = []

        def all_came() -> bool:
            heard.extend(bed.heard())
            return len(heard) == len(sent)

        await until(all_came)
        assert heard == sent

    run(scenario)


def test_supervisor_that_never_reads_is_an_error_in_the_end(run, monkeypatch):
    monkeypatch.setattr(module, "MAX_OUTBOX", 10)

    def send_many(bed: Bed) -> None:
        for _ in range(10_000):
            bed.runtime.send(m.PeerMisbehaved(slot="dns", reason="r" * 500))

    async def scenario(bed: Bed) -> None:
        with pytest.raises(BusyError):
            send_many(bed)

    run(scenario)


def test_too_large_message_is_dropped_and_the_worker_lives_on(run, caplog):
    async def scenario(bed: Bed) -> None:
        bed.runtime.send(m.PeerMisbehaved(slot="dns", reason="r" * 300_000))
        bed.runtime.ready()
        assert bed.heard() == [m.Ready()]
        assert not bed.runtime.stopping.is_set()
        assert "PeerMisbehaved has" in caplog.text

    run(scenario)


def test_flood_of_breaches_is_reported_once(run, monkeypatch):
    monkeypatch.setattr(module, "REPORT_SECONDS", 1000.0)

    async def scenario(bed: Bed) -> None:
        for _ in range(100):
            bed.runtime._report_breach("proxy-0", ForbiddenMessageError("x" * 900))
        bed.runtime._report_breach("proxy-1", MalformedMessageError("y"))
        assert bed.heard() == [
            m.PeerMisbehaved(slot="proxy-0", reason="x" * 500),
            m.PeerMisbehaved(slot="proxy-1", reason="y"),
        ]

    run(scenario)


def test_one_report_for_each_second(run, monkeypatch):
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.0)

    async def scenario(bed: Bed) -> None:
        for _ in range(3):
            bed.runtime._report_breach("proxy-0", MalformedMessageError("x"))
        assert len(bed.heard()) == 3

    run(scenario)


@pytest.mark.parametrize("first", ["configuration", "something else", "nothing"])
def test_first_message_must_be_the_configuration(run, first):
    async def scenario(bed: Bed) -> None:
        reading = asyncio.create_task(
            module._first_message(bed.channel, asyncio.get_running_loop())
        )
        await asyncio.sleep(0)
        if first == "configuration":
            bed.supervisor.send(bed.config)
            assert await reading == (bed.config, [])
        elif first == "something else":
            bed.supervisor.send(m.SetLogLevel(level="INFO"))
            with pytest.raises(MalformedMessageError, match="before the configuration"):
                await reading
        else:
            bed.supervisor.close()
            with pytest.raises(PeerGoneError):
                await reading

    run(scenario)


def test_bus_of_a_worker_is_closed_with_it(run, tmp_path):
    async def scenario(bed: Bed) -> None:
        bed.runtime.serve_bus(lambda _sender, _message: None)
        bed.runtime.join_bus("proxy-0", lambda _message: None)
        assert (tmp_path / "dns").is_socket()
        with contextlib.suppress(BusyError):
            bed.runtime.ready()

    run(scenario)

"""One proxy follows another: real workers, bus and gate; see `handover_bed`."""

import asyncio
import random
import signal
import time
from collections.abc import Iterator

import pytest
import uvloop
from handover_bed import ADDRESS, OWNER, Bed, Program, StubNaming, StubTeleport, until

from ipc import messages as m
from workers.dns.resolver import Resolver
from workers.proxy import worker as module

SLOW_SECONDS = 2.0  # for what must take milliseconds, on a busy machine


@pytest.fixture
def play(monkeypatch, tmp_path) -> Iterator[object]:
    monkeypatch.setattr(module, "Teleport", StubTeleport)
    monkeypatch.setattr(module, "Naming", StubNaming)
    monkeypatch.setattr(StubTeleport, "made", [], raising=False)
    monkeypatch.setattr(StubTeleport, "asked", [], raising=False)
    monkeypatch.setattr(StubTeleport, "dial_gate", None)

    def run(scene) -> None:
        async def main() -> None:
            async with Bed(tmp_path) as bed, asyncio.timeout(60):
                await scene(bed)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


def test_connection_lives_on_in_the_old_proxy_which_ends_with_it(play):
    async def scene(bed: Bed) -> None:
        program = await bed.connect()
        await program.exchange(b"before")
        began = time.monotonic()
        old = await bed.replace()
        new = await bed.connect()
        assert time.monotonic() - began < SLOW_SECONDS
        for one in (program, new):
            await one.exchange(b"after" * 1000)
        assert not old.task.done()
        # It goes on telling what it has.
        await until(lambda: old.counters.get("connections_now") == 1)
        await until(lambda: old.counters["listeners_now"] == 0)
        program.close()
        async with asyncio.timeout(10):
            await old.task
        await new.exchange(b"still")
        new.close()

    play(scene)


def test_no_connect_fails_or_waits_long_while_proxies_follow_each_other(play):
    async def scene(bed: Bed) -> None:
        chance = random.Random(7)
        stopping = asyncio.Event()
        longest, connects = 0.0, 0

        async def come_and_go() -> None:
            nonlocal longest, connects
            while not stopping.is_set():
                began = time.monotonic()
                program = await bed.connect()
                longest = max(longest, time.monotonic() - began)
                connects += 1
                for _ in range(chance.choice((0, 1, 1, 5))):
                    await program.exchange(chance.randbytes(chance.randrange(1, 5000)))
                program.close()

        async def stay() -> None:
            program = await bed.connect()
            while not stopping.is_set():
                await program.exchange(chance.randbytes(2000))
                await asyncio.sleep(0.005)
            program.close()

        programs = [asyncio.ensure_future(come_and_go()) for _ in range(12)]
        programs += [asyncio.ensure_future(stay()) for _ in range(3)]
        for _ in range(6):
            before = connects
            await until(lambda before=before: connects > before + 30)
            await bed.replace()
        stopping.set()
        await asyncio.gather(*programs)
        assert longest < module.HANDOVER_SECONDS
        orphaned = sum(
            process.runtime.counters["connections_orphaned"] for process in bed.processes
        )
        assert orphaned == 0
        async with asyncio.timeout(20):
            await asyncio.gather(*(process.task for process in bed.processes[:-1]))

    play(scene)


def test_dial_under_way_ends_with_the_old_proxy_and_later_ones_wait_for_the_successor(play):
    async def scene(bed: Bed) -> None:
        StubTeleport.dial_gate = asyncio.Event()
        early = asyncio.ensure_future(bed.connect())
        await until(lambda: bed.tun.counters["pending_now"] == 1)
        await until(lambda: bed.present.runtime.counters["dialling_now"] or _count(bed))
        old = bed.present
        replacing = asyncio.ensure_future(bed.replace())
        await until(old.runtime.draining.is_set)
        late = asyncio.ensure_future(bed.connect())
        await until(lambda: bed.tun.counters["pending_now"] == 2)
        assert not old.has_said(m.HandedOver)
        StubTeleport.dial_gate.set()
        programs = [await early, await late]
        await replacing
        for program in programs:
            await program.exchange(b"hello")
        totals = [p.runtime.counters["connections_total"] for p in bed.processes]
        assert totals == [1, 1]
        for program in programs:
            program.close()

    play(scene)


async def _exchange_for_ever(program: Program) -> None:
    while True:
        await program.exchange(b"hello")


def _count(bed: Bed) -> int:
    """How many dials wait at the gate, which the counters tell half a second later."""
    gate = StubTeleport.dial_gate
    return len(gate._waiters) if gate is not None else 0


def test_dial_that_takes_too_long_is_made_again_by_the_successor(play, monkeypatch):
    monkeypatch.setattr(module, "HANDOVER_SECONDS", 0.1)

    async def scene(bed: Bed) -> None:
        StubTeleport.dial_gate = asyncio.Event()
        connecting = asyncio.ensure_future(bed.connect())
        await until(lambda: _count(bed) == 1)
        await bed.replace()
        await until(lambda: _count(bed) == 1)
        StubTeleport.dial_gate.set()
        program = await connecting
        await program.exchange(b"hello")
        program.close()
        assert bed.tun.counters["admitted"] == 1
        assert sum(bed.tun.counters[f"refused_{reason}"] for reason in m.Refusal) == 0

    play(scene)


def test_every_question_of_dns_is_answered_meanwhile(play):
    async def scene(bed: Bed) -> None:
        stopping = asyncio.Event()
        answers = 0

        async def ask(number: int) -> None:
            nonlocal answers
            while not stopping.is_set():
                answer = await resolver.resolve_name(f"{number}.test")
                assert answer is not None
                assert answer.ipv4 == ADDRESS
                answers += 1
                await asyncio.sleep(0)

        resolver = Resolver(lambda _index, message: client.send(message), 1)
        client = bed.dns(resolver)
        asking = [asyncio.ensure_future(ask(number)) for number in range(8)]
        for _ in range(4):
            before = answers
            await until(lambda before=before: answers > before + 100)
            await bed.replace()
        before = answers
        await until(lambda: answers > before + 100)
        stopping.set()
        await asyncio.gather(*asking)
        resolver.close()

    play(scene)


def test_standby_does_nothing_before_it_takes_over(play):
    async def scene(bed: Bed) -> None:
        socket = bed.directory / "mfa" / "proxy-0.sock"
        inode = socket.stat().st_ino
        standby = bed.start(is_standby=True)
        await standby.says(m.Ready)
        StubTeleport.made[-1].on_change()
        program = await bed.connect()
        await program.exchange(b"hello")
        program.close()
        assert bed.tun.hellos == 1
        assert socket.stat().st_ino == inode
        kinds = {type(message) for message in standby.heard}
        assert kinds <= {m.Ready, m.Heartbeat}
        old = bed.present
        old.channel.send(m.Drain(deadline_seconds=60.0))
        await old.says(m.HandedOver)
        assert not socket.exists()
        standby.channel.send(m.TakeOver())
        await standby.says(m.ClustersReported)
        await until(lambda: bed.tun.hellos == 2)
        assert socket.exists()
        await old.task
        assert socket.exists()

    play(scene)


def test_successor_waits_for_the_first_answers_of_the_clusters_but_not_for_long(play, monkeypatch):
    monkeypatch.setattr(module, "WARM_UP_SECONDS", 0.3)
    unasked = m.Cluster(
        name="example.test",
        profile="teleport.example.test",
        leaf_of=None,
        state=m.ClusterState.OK,
        user="alice",
        expires=None,
        zones=[],
        ranges=[],
        is_configured=False,
    )

    async def scene(bed: Bed) -> None:
        StubTeleport.asked = [unasked]
        slow = bed.start(is_standby=True)
        await until(lambda: StubTeleport.made[1:])
        assert not slow.has_said(m.Ready)
        await slow.says(m.Ready)  # without an answer, after a while
        slow.runtime.stopping.set()
        await slow.task
        monkeypatch.setattr(module, "WARM_UP_SECONDS", 60.0)
        quick = bed.start(is_standby=True)
        await until(lambda: StubTeleport.made[2:])
        StubTeleport.asked = []
        StubTeleport.made[2].on_change()
        await quick.says(m.Ready)

    play(scene)


def test_old_proxy_reports_nothing_and_says_no_hello_to_a_new_tun(play):
    async def scene(bed: Bed) -> None:
        program = await bed.connect()
        old = await bed.replace()
        await until(lambda: bed.tun.hellos == 2)
        said = len([one for one in old.heard if not isinstance(one, m.Heartbeat)])
        StubTeleport.made[0].on_change()
        bed.restart_tun()
        new = await bed.connect()
        await new.exchange(b"hello")
        assert bed.tun.hellos == 1
        await program.exchange(b"hello")
        assert len([one for one in old.heard if not isinstance(one, m.Heartbeat)]) == said
        program.close()
        new.close()

    play(scene)


@pytest.mark.parametrize("end", ["logout", "stop"])
def test_old_proxy_is_cut_by_a_logout_and_by_stop(play, end):
    async def scene(bed: Bed) -> None:
        cut: Program = await bed.connect()
        await cut.exchange(b"hello")
        old = await bed.replace()
        kept = await bed.connect()
        assert not StubTeleport.made[0].is_closed
        if end == "logout":
            StubTeleport.made[0].on_owner_gone(OWNER)
        else:
            old.channel.send(m.Stop(grace_seconds=3.0))
        with pytest.raises(ConnectionResetError):
            await _exchange_for_ever(cut)
        async with asyncio.timeout(10):
            await old.task
        await kept.exchange(b"hello")
        cut.close()
        kept.close()

    play(scene)

"""How the worker of a slot is replaced, without any process."""

from dataclasses import dataclass, field

import pytest

from supervisor.crew import HANDOVER_SECONDS, MAX_LEAVERS, CannotReplaceError, Crew
from supervisor.worker_states import ALIVE, WorkerState

READY, STARTING, DRAINING = WorkerState.READY, WorkerState.STARTING, WorkerState.DRAINING
BACKOFF, STOPPED = WorkerState.BACKOFF, WorkerState.STOPPED


@dataclass(eq=False)
class PretendWorker:
    """What a crew sees of a worker."""

    slot: str
    state: WorkerState = READY
    is_standby: bool = False
    started_at: float = 0.0
    pid: int = 1
    said: list[object] = field(default_factory=list)

    @property
    def is_alive(self) -> bool:
        return self.state in ALIVE

    def order_drain(self, now, deadline):
        assert self.state is READY
        self.state = DRAINING
        self.said.append(("drain", deadline))

    def order_stop(self, now):
        self.state = DRAINING if self.is_alive else STOPPED
        self.said.append("stop")

    def kill(self, why):
        self.said.append("kill")


class World:
    """A crew and what it did."""

    def __init__(self, *slots):
        self.cannot_start = False
        self.took_over = []
        self.crew = Crew(
            {slot: PretendWorker(slot) for slot in slots or ("proxy-0", "proxy-1")},
            make_successor=lambda worker: PretendWorker(worker.slot, STOPPED, is_standby=True),
            start=self._start,
            take_over=self.took_over.append,
        )

    def _start(self, worker):
        worker.state = STOPPED if self.cannot_start else STARTING

    def standby(self, slot="proxy-0"):
        return self.crew.standbys[slot]

    def get_ready(self, worker):
        worker.state = READY
        self.crew.became_ready(worker, 1.0)

    def end(self, worker, state=STOPPED, now=2.0):
        worker.state = state
        self.crew.ended(worker, now)

    def swapped(self, slot="proxy-0"):
        """(old, successor), the old one asked to hand over."""
        old = self.crew.active[slot]
        self.crew.replace([slot], 60.0)
        successor = self.standby(slot)
        self.get_ready(successor)
        return old, successor


def test_the_successor_begins_only_when_the_old_one_has_handed_over():
    world = World()
    old, successor = world.swapped()
    assert old.said == [("drain", 60.0)]
    assert world.crew.active["proxy-0"] is successor
    assert world.crew.leavers == [old]
    assert world.took_over == []
    assert world.crew.handed_over(old)
    assert world.took_over == [successor]
    world.end(old)
    assert list(world.crew) == list(world.crew.active.values())


def test_the_present_one_works_on_until_the_successor_is_ready():
    world = World()
    old = world.crew.active["proxy-0"]
    world.crew.replace(["proxy-0"], 60.0)
    assert world.crew.active["proxy-0"] is old
    assert old.said == []
    assert world.crew.waits(world.standby())
    assert not world.crew.waits(old)


def test_a_successor_that_fails_changes_nothing():
    world = World()
    old = world.crew.active["proxy-0"]
    world.crew.replace(["proxy-0", "proxy-1"], 60.0)
    world.end(world.standby())
    world.crew.tick(3.0)
    assert old.said == []
    assert list(world.crew) == list(world.crew.active.values())
    assert not world.crew.is_replacing("proxy-1"), "it would fail the same way"


def test_a_successor_that_cannot_be_forked_changes_nothing():
    world = World()
    world.cannot_start = True
    world.crew.replace(["proxy-0"], 60.0)
    assert not world.crew.standbys
    assert world.crew.active["proxy-0"].said == []


def test_slots_are_replaced_one_after_the_other():
    world = World()
    old, _ = (world.crew.active["proxy-0"], world.crew.replace(["proxy-0", "proxy-1"], 60.0))
    assert list(world.crew.standbys) == ["proxy-0"]
    world.get_ready(world.standby())
    assert not world.crew.standbys
    world.crew.handed_over(old)
    assert list(world.crew.standbys) == ["proxy-1"]


def test_an_old_one_that_does_not_hand_over_is_killed_and_the_successor_begins():
    world = World()
    old, successor = world.swapped()
    world.crew.tick(1.0 + HANDOVER_SECONDS)
    assert world.took_over == []
    world.crew.tick(1.1 + HANDOVER_SECONDS)
    assert "kill" in old.said
    assert world.took_over == [successor]


def test_an_old_one_that_stood_still_with_the_supervisor_has_its_time_to_hand_over():
    world = World()
    old, successor = world.swapped()
    world.crew.tick(3600.0, awake_since=3599.0)
    assert (old.said, world.took_over) == ([("drain", 60.0)], [])
    world.crew.tick(3599.1 + HANDOVER_SECONDS, awake_since=3599.0)
    assert "kill" in old.said
    assert world.took_over == [successor]


def test_an_old_one_that_dies_before_it_hands_over_lets_the_successor_begin():
    world = World()
    old, successor = world.swapped()
    world.end(old)
    assert world.took_over == [successor]
    assert world.crew.leavers == []


def test_when_the_present_one_crashes_the_standby_takes_its_place():
    world = World()
    old = world.crew.active["proxy-0"]
    world.crew.replace(["proxy-0"], 60.0)
    successor = world.standby()
    world.end(old, BACKOFF)
    assert world.crew.active["proxy-0"] is successor
    assert not successor.is_standby
    world.get_ready(successor)
    assert world.took_over == [successor]


def test_a_successor_that_crashes_while_it_waits_is_started_again_and_still_waits():
    world = World()
    old, successor = world.swapped()
    world.end(successor, BACKOFF)
    successor.state = STARTING
    assert world.crew.waits(successor)
    world.get_ready(successor)
    assert world.took_over == []
    world.crew.handed_over(old)
    assert world.took_over == [successor]


def test_nobody_hands_over_unasked():
    world = World()
    assert not world.crew.handed_over(world.crew.active["proxy-0"])
    old, successor = world.swapped()
    assert not world.crew.handed_over(successor)
    assert world.crew.handed_over(old)
    assert not world.crew.handed_over(old), "twice"


def test_a_plain_restart_ends_the_successor_and_what_still_finishes():
    world = World()
    old, _ = world.swapped()
    world.crew.handed_over(old)
    world.crew.replace(["proxy-0"], 60.0)
    standby = world.standby()
    world.crew.give_up_on("proxy-0", 3.0)
    assert not world.crew.standbys
    assert standby.said == ["stop"]
    assert old.said[-1] == "stop"
    assert {standby, old} == set(world.crew.leavers)


def test_old_processes_of_a_slot_are_limited():
    world = World()
    for _ in range(MAX_LEAVERS):
        old, _ = world.swapped()
        world.crew.handed_over(old)
    with pytest.raises(CannotReplaceError, match="vnet restart proxy-0"):
        world.crew.replace(["proxy-1", "proxy-0"], 60.0)
    assert not world.crew.is_replacing("proxy-1"), "all or none"


def test_one_that_is_asked_for_again_is_replaced_again():
    """What is in force may have changed since the first successor was forked."""
    world = World()
    old, first = world.swapped()
    world.crew.replace(["proxy-0"], 60.0)
    world.crew.handed_over(old)
    assert world.standby() is not first


def test_one_that_is_not_ready_is_left_alone():
    world = World()
    world.crew.active["proxy-0"].state = BACKOFF
    world.crew.replace(["proxy-0", "proxy-1"], 60.0)
    assert list(world.crew.standbys) == ["proxy-1"]

"""When what workers were told is in force."""

from dataclasses import dataclass, field

import pytest

from ipc import messages as m
from supervisor.in_force import SYNC_SECONDS, InForce
from supervisor.worker_states import WorkerState


@dataclass(eq=False)
class FakeWorker:
    slot: str
    pid: int = 1
    state: WorkerState = WorkerState.READY
    is_alive: bool = True
    is_new: bool = True
    told: list[m.Message] = field(default_factory=list)
    killed: str = ""

    def knows(self, _kind: type[m.Message]) -> bool:
        return self.is_new

    def send(self, message: m.Message) -> None:
        self.told.append(message)

    def kill(self, why: str) -> None:
        self.killed = why


class Bed:
    def __init__(self) -> None:
        self.in_force = InForce()
        self.workers = [FakeWorker("tun"), FakeWorker("proxy-0")]
        self.late: list[list[str]] = []

    def ask(self, now: float = 0.0) -> None:
        self.in_force.ask(self.workers, now, self.late.append)

    def tick(self, now: float = 0.5) -> list[list[str]]:
        self.in_force.tick(now)
        return self.late

    def answer(self, *slots: str, number: int = 1) -> None:
        for worker in self.workers:
            if worker.slot in slots:
                self.in_force.answered(worker, number)


@pytest.fixture
def bed():
    return Bed()


def test_it_is_in_force_when_all_have_answered(bed):
    bed.ask()
    assert [worker.told for worker in bed.workers] == [[m.Sync(number=1)]] * 2
    bed.answer("tun")
    assert bed.tick() == []
    assert not bed.in_force.is_quiet
    bed.answer("proxy-0")
    assert bed.tick() == [[]]
    assert bed.in_force.is_quiet
    assert bed.tick() == [[]]  # once


def test_who_has_ended_is_not_waited_for_nor_is_its_successor(bed):
    bed.ask()
    bed.answer("tun")
    bed.workers[1].pid = 2
    assert bed.tick() == [[]]
    bed.ask()
    bed.answer("tun", number=2)
    bed.workers[1].is_alive = False
    assert bed.tick() == [[], []]


def test_who_does_not_answer_is_named(bed):
    assert bed.in_force.next_step_at is None
    bed.ask()
    bed.answer("proxy-0")
    assert bed.in_force.next_step_at == SYNC_SECONDS
    assert bed.tick(SYNC_SECONDS - 0.01) == []
    assert bed.tick(SYNC_SECONDS) == [["tun"]]
    bed.answer("tun")  # late, and no fault
    assert not bed.workers[0].killed


@pytest.mark.parametrize("state", [WorkerState.STARTING, WorkerState.STOPPED, WorkerState.FAILED])
def test_who_has_not_begun_is_not_asked(bed, state):
    for worker in bed.workers:
        worker.state = state
    bed.ask()
    assert bed.tick() == [[]]
    assert not any(worker.told for worker in bed.workers)


def test_a_process_of_an_earlier_version_is_not_asked(bed):
    bed.workers[0].is_new = False
    bed.ask()
    bed.answer("proxy-0")
    assert bed.tick() == [[]]


def test_a_later_answer_is_one_to_what_came_before(bed):
    bed.ask()
    bed.ask()
    bed.answer("tun", "proxy-0", number=2)
    assert bed.tick() == [[], []]


@pytest.mark.parametrize("number", [0, 2, 2**62])
def test_an_answer_to_nothing_costs_the_life(bed, number):
    bed.ask()
    bed.answer("tun", number=number)
    assert "which nobody has asked for" in bed.workers[0].killed

"""All worker processes of a run: the present one of each slot, its successor, those that finish.

    present ──────────────────────────── Drain ── HandedOver ── finishes ── ends
                 fork ── Ready (standby) ──┘           └── TakeOver ── present

A slot is replaced without a gap: its successor is forked beside the present worker and gets ready, then
the present one is told to take nothing new, and only when it has handed over does the successor begin.
A successor that fails changes nothing.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from supervisor.worker import Worker
from supervisor.worker_states import WorkerState

log = logging.getLogger(__name__)

# A worker that drains hands over within three seconds (`workers.proxy.worker`); twice that is too long.
HANDOVER_SECONDS = 6.0
# Processes of one slot that finish what they have; each may be as large as a working one.
MAX_LEAVERS = 4


class CannotReplaceError(Exception):
    """This slot is not replaced now; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Handover:
    old: Worker
    give_up_at: float


class Crew:
    """See the module. Times are monotonic seconds.

    `make_successor(worker)` makes the standby of a slot, `start(worker)` forks a worker and configures it
    (as a standby if `waits(worker)`), `take_over(worker)` sends it what it needs to begin.
    """

    def __init__(
        self,
        active: dict[str, Worker],
        *,
        make_successor: Callable[[Worker], Worker],
        start: Callable[[Worker], None],
        take_over: Callable[[Worker], None],
    ) -> None:
        self.active = active
        self.standbys: dict[str, Worker] = {}
        self.leavers: list[Worker] = []
        self._make_successor = make_successor
        self._start = start
        self._take_over = take_over
        self._handovers: dict[str, _Handover] = {}
        # Slots that are replaced one after the other, and for how long their old processes may drain.
        self._queue: deque[tuple[str, float]] = deque()
        self._deadline_seconds = 0.0  # of the replacement that is under way

    def __iter__(self) -> Iterator[Worker]:
        """Every worker: those that work, those that will, those that finish."""
        yield from self.active.values()
        yield from self.standbys.values()
        yield from self.leavers

    def is_active(self, worker: Worker) -> bool:
        """Whether this is the present worker of its slot."""
        return self.active.get(worker.slot) is worker

    def waits(self, worker: Worker) -> bool:
        """Whether a worker that starts now has to wait for another to hand over."""
        return worker.is_standby or worker.slot in self._handovers

    @property
    def is_quiet(self) -> bool:
        """Whether no slot is being replaced."""
        return not (self._queue or self.standbys or self._handovers)

    def is_replacing(self, slot: str) -> bool:
        """Whether a successor of this slot is under way."""
        is_queued = any(slot == queued for queued, _ in self._queue)
        return is_queued or slot in self.standbys or slot in self._handovers

    # -- orders --

    def replace(self, slots: Iterable[str], deadline_seconds: float) -> None:
        """Replaces the workers of these slots, one after the other, in this order.

        Raises:
            CannotReplaceError: one of the slots has too many processes that still finish; none is
                replaced.
        """
        # One that is under way may have been started with what was in force before.
        queued = {slot for slot, _ in self._queue}
        wanted = [slot for slot in slots if slot not in queued]
        self.require_room(wanted)
        self._queue.extend((slot, deadline_seconds) for slot in wanted)
        self._begin_next()

    def require_room(self, slots: Iterable[str]) -> None:
        """Raises CannotReplaceError as `replace` does, which is not done."""
        for slot in slots:
            number = sum(worker.slot == slot for worker in self.leavers)
            if number >= MAX_LEAVERS:
                raise CannotReplaceError(
                    f"{number} earlier processes of {slot} still finish their connections: wait, or"
                    f" cut them with vnet restart {slot}"
                )

    def give_up_on(self, slot: str, now: float) -> None:
        """Ends the successor and all that still finish: the slot is restarted without regard."""
        self._queue = deque(queued for queued in self._queue if queued[0] != slot)
        self._handovers.pop(slot, None)
        for worker in self.leavers:
            if worker.slot == slot:
                worker.order_stop(now)
        if (standby := self.standbys.pop(slot, None)) is not None:
            self._leave(standby, now)

    def dismiss(self, slot: str, now: float) -> None:
        """Ends all processes of a slot that is not wanted any more, if there is one."""
        if slot in self.active:
            self.give_up_on(slot, now)
            self._leave(self.active.pop(slot), now)

    # -- what happens --

    def became_ready(self, worker: Worker, now: float) -> None:
        """A worker is set up; its state says so already."""
        slot = worker.slot
        if self.standbys.get(slot) is worker:
            self._swap(worker, now)
        elif self.is_active(worker) and slot not in self._handovers:
            self._take_over(worker)

    def handed_over(self, worker: Worker) -> bool:
        """A draining worker takes nothing new any more; False if nobody has asked it to."""
        handover = self._handovers.get(worker.slot)
        if handover is None or handover.old is not worker:
            return False
        self._end_handover(worker.slot)
        return True

    def ended(self, worker: Worker, now: float) -> None:
        """A process has been reaped."""
        slot = worker.slot
        if worker in self.leavers:
            self.leavers.remove(worker)
            if not self.handed_over(worker):
                return
            log.info("%s ended before it handed over", slot)
        elif self.standbys.get(slot) is worker:
            del self.standbys[slot]
            # What was asked for all is not done by halves again and again.
            self._queue.clear()
        elif (standby := self.standbys.pop(slot, None)) is not None:
            self._promote(standby, now)
            if standby.state is WorkerState.READY:
                self._take_over(standby)

    def tick(self, now: float, *, awake_since: float = 0.0) -> None:
        """Ends handovers that take too long, and begins what waits its turn.

        Before `awake_since` the supervisor stood still, and perhaps the workers with it.
        """
        for slot, handover in list(self._handovers.items()):
            if now > max(handover.give_up_at, awake_since + HANDOVER_SECONDS):
                log.warning("%s does not hand over and is ended", slot)
                handover.old.kill("it did not hand over in time")
                self._end_handover(slot)
        self._begin_next()

    # -- inside --

    def _begin_next(self) -> None:
        while self._queue and not self.standbys and not self._handovers:
            slot, deadline_seconds = self._queue.popleft()
            present = self.active[slot]
            if present.state is not WorkerState.READY:
                # It has nothing that could be finished, and is about to be new anyway.
                continue
            standby = self._make_successor(present)
            self._deadline_seconds = deadline_seconds
            self.standbys[slot] = standby
            self._start(standby)
            if not standby.is_alive:
                self.ended(standby, standby.started_at)

    def _swap(self, standby: Worker, now: float) -> None:
        slot = standby.slot
        old = self.active[slot]
        if old.state is not WorkerState.READY:
            # It crashed and is to be forked again, or was told to end: this one is there already.
            del self.standbys[slot]
            self._promote(standby, now)
            self._take_over(standby)
            return
        old.order_drain(now, self._deadline_seconds)
        self._handovers[slot] = _Handover(old, now + HANDOVER_SECONDS)
        del self.standbys[slot]
        self._promote(standby, now)
        log.info("%s: process %s follows %s", slot, standby.pid, old.pid)

    def _promote(self, standby: Worker, now: float) -> None:
        old = self.active[standby.slot]
        self.active[standby.slot] = standby
        standby.is_standby = False
        self._leave(old, now)

    def _leave(self, worker: Worker, now: float) -> None:
        if not worker.is_alive:
            return
        self.leavers.append(worker)
        if worker.state is not WorkerState.DRAINING:
            worker.order_stop(now)

    def _end_handover(self, slot: str) -> None:
        del self._handovers[slot]
        present = self.active[slot]
        if present.state is WorkerState.READY:
            self._take_over(present)
        self._begin_next()

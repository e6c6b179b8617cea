"""Finds out when what workers were told is in force.

news, Sync(7)  -->  each worker that has begun its work
Synced(7)      <--  when it has taken the news over
all have answered, or ended, or SYNC_SECONDS are over  -->  then(the slots that have not answered)
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from ipc import messages as m
from supervisor.worker import Worker
from supervisor.worker_states import WorkerState

log = logging.getLogger(__name__)

# Far more than a worker takes that is not stopped or stuck, and less than whoever waits for a command.
SYNC_SECONDS: Final = 1.0
# Who only gets ready has the news before the first connection. One that drains has what it had.
_ASKED_STATES: Final = (WorkerState.READY, WorkerState.DRAINING)

# Slots that have not answered in time.
Then: TypeAlias = Callable[[list[str]], None]


@dataclass(slots=True)
class _Asked:
    number: int
    # With the process that was asked: another one has begun with the news.
    waits_for: dict[Worker, int | None]
    until: float
    then: Then


class InForce:
    """See the module. `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._number = 0
        self._asked: list[_Asked] = []

    @property
    def is_quiet(self) -> bool:
        """Whether nobody is waited for."""
        return not self._asked

    @property
    def next_step_at(self) -> float | None:
        """When `tick` is due, if nobody answers before."""
        return min((asked.until for asked in self._asked), default=None)

    def ask(self, workers: Iterable[Worker], now: float, then: Then) -> None:
        """`then` is called by `tick`, once, when all that these were told until now is in force."""
        self._number += 1
        asked = [w for w in workers if w.state in _ASKED_STATES and w.knows(m.Sync)]
        # Those that are not alive any more are dropped by `tick`.
        for worker in asked:
            worker.send(m.Sync(number=self._number))
        waits_for = {worker: worker.pid for worker in asked}
        self._asked.append(_Asked(self._number, waits_for, now + SYNC_SECONDS, then))

    def answered(self, worker: Worker, number: int) -> None:
        """A worker has taken over what it was told; nonsense costs its life."""
        if not 0 < number <= self._number:
            worker.kill(f"it says Synced({number}), which nobody has asked for")
            return
        for asked in self._asked:
            if asked.number <= number:
                asked.waits_for.pop(worker, None)

    def tick(self, now: float) -> None:
        """Calls whoever need not wait any more."""
        for asked in list(self._asked):
            slots = [w.slot for w, pid in asked.waits_for.items() if w.is_alive and w.pid == pid]
            if not slots or now >= asked.until:
                self._asked.remove(asked)
                asked.then(slots)

"""The life of one worker slot as a table. Pure; docs/architecture.md is drawn from it.

What the table lacks is a bug of the supervisor and raises.
"""

from enum import StrEnum
from typing import Final


class WorkerState(StrEnum):
    """Where a worker slot is in its life; the words of `vnet status`."""

    STARTING = "starting"  # forked, not ready yet
    READY = "ready"  # has said so
    BACKOFF = "backoff"  # has crashed; waits to be forked again
    DRAINING = "draining"  # was told to end, at once or when what it has is finished
    FAILED = "failed"  # crashed too often; waits for `vnet restart`
    STOPPED = "stopped"  # ended as told, or was never started


class WorkerEvent(StrEnum):
    """What can happen to a slot."""

    SPAWNED = "spawned"
    BECAME_READY = "became ready"
    CRASHED = "crashed"
    CRASHED_TOO_OFTEN = "crashed too often"
    STOP_ORDERED = "stop ordered"
    EXITED = "exited as told"
    SUCCESSOR_ENDED = "ended before it took over"


_S, _E = WorkerState, WorkerEvent

TRANSITIONS: Final[dict[tuple[WorkerState, WorkerEvent], WorkerState]] = {
    (_S.STOPPED, _E.SPAWNED): _S.STARTING,
    (_S.BACKOFF, _E.SPAWNED): _S.STARTING,
    (_S.FAILED, _E.SPAWNED): _S.STARTING,
    (_S.STARTING, _E.BECAME_READY): _S.READY,
    (_S.STARTING, _E.CRASHED): _S.BACKOFF,
    (_S.READY, _E.CRASHED): _S.BACKOFF,
    (_S.STARTING, _E.CRASHED_TOO_OFTEN): _S.FAILED,
    (_S.READY, _E.CRASHED_TOO_OFTEN): _S.FAILED,
    (_S.STARTING, _E.STOP_ORDERED): _S.DRAINING,
    (_S.READY, _E.STOP_ORDERED): _S.DRAINING,
    # Told to end, it may still say that it became ready; the order stands.
    (_S.DRAINING, _E.BECAME_READY): _S.DRAINING,
    (_S.DRAINING, _E.STOP_ORDERED): _S.DRAINING,
    # A successor that fails is not tried again by itself: the present worker goes on.
    (_S.STARTING, _E.SUCCESSOR_ENDED): _S.STOPPED,
    (_S.READY, _E.SUCCESSOR_ENDED): _S.STOPPED,
    (_S.BACKOFF, _E.STOP_ORDERED): _S.STOPPED,
    (_S.FAILED, _E.STOP_ORDERED): _S.STOPPED,
    (_S.STOPPED, _E.STOP_ORDERED): _S.STOPPED,
    # However it ends, it was told to.
    (_S.DRAINING, _E.EXITED): _S.STOPPED,
}

# States in which a process exists.
ALIVE: Final = frozenset({WorkerState.STARTING, WorkerState.READY, WorkerState.DRAINING})


class ImpossibleTransitionError(Exception):
    """The table has no row for this: a bug of the supervisor."""


def after(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """The state that follows.

    Raises:
        ImpossibleTransitionError: the table lacks it.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError as error:
        raise ImpossibleTransitionError(f"{event} while {state}") from error

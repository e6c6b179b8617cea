"""What workers say to the supervisor, and what follows from it."""

import logging
import math
import time
from collections.abc import Callable, Mapping

from ipc import messages as m
from supervisor.cluster_follower import ClusterFollower
from supervisor.crew import Crew
from supervisor.in_force import InForce
from supervisor.listeners import ListenerRefusedError, Listeners
from supervisor.worker import Worker
from supervisor.worker_states import WorkerState

log = logging.getLogger(__name__)

# Refused listeners of one worker are told this often at most.
WARN_SECONDS = 1.0


class Conversation:
    """Takes the messages of all workers. `keys` says who talks with whom on the bus."""

    def __init__(
        self,
        crew: Crew,
        listeners: Listeners,
        follower: ClusterFollower,
        in_force: InForce,
        *,
        keys: Mapping[str, m.BusKeys],
        network: Callable[[], m.Network],
    ) -> None:
        self._crew = crew
        self._listeners = listeners
        self._follower = follower
        self._in_force = in_force
        self._keys = keys
        self._network = network
        # Monotonic seconds of the latest warning about a listener, by slot.
        self._warned_at: dict[str, float] = {}

    def take(self, worker: Worker, message: m.AnyMessage) -> None:
        """Carries out one message; what may not be said costs the speaker's life."""
        now = time.monotonic()
        match message:
            case m.Confined():
                worker.was_confined(message)
            case m.NeedsRestart():
                self._restart(worker, message, now)
            case m.Ready():
                self._became_ready(worker, now)
            case m.HandedOver():
                if not self._crew.handed_over(worker):
                    worker.kill("it hands over what nobody has asked for")
            case m.Heartbeat():
                worker.heard(now, message.counters)
            case m.Synced():
                self._in_force.answered(worker, message.number)
            case m.OpenListener():
                self._open_listener(worker, message.address, message.port)
            case m.CloseListener():
                self._listeners.close(worker.slot, message.address, message.port)
            case m.ClustersReported():
                # A successor says it again when it takes over.
                if self._crew.is_active(worker):
                    self._follower.hear(worker, message)
            case m.PeerMisbehaved():
                self._replace_accused(worker, message, now)
            case _:
                worker.kill(f"it sent {type(message).__name__}")

    def _restart(self, worker: Worker, message: m.NeedsRestart, now: float) -> None:
        # Once: a repeated wish must not put off the end of the process.
        if worker.state not in (WorkerState.STARTING, WorkerState.READY):
            return
        if not worker.patience.grants_restart(now):
            worker.kill(f"it wants to be restarted too often: {message.reason}")
            return
        log.info("%s is restarted: %s", worker.slot, message.reason)
        worker.comes_back = True
        worker.order_stop(now)

    def _became_ready(self, worker: Worker, now: float) -> None:
        if worker.state not in (WorkerState.STARTING, WorkerState.DRAINING):
            worker.kill("it became ready twice")
            return
        is_early = worker.state is WorkerState.STARTING
        worker.became_ready(now)
        log.info("%s is ready after %.2f s", worker.slot, now - worker.started_at)
        if is_early:
            self._crew.became_ready(worker, now)

    def _replace_accused(self, reporter: Worker, message: m.PeerMisbehaved, now: float) -> None:
        if message.slot not in self._keys[reporter.slot].peers:
            reporter.kill(f"it accuses {message.slot}, with whom it does not talk")
            return
        if not reporter.patience.may_accuse(now):
            reporter.kill("it accuses others too often")
            return
        accused = self._crew.active[message.slot]
        if accused.state is WorkerState.STARTING or accused.pid is None or accused.is_killed:
            # It has said nothing yet, or was accused by another: who is meant is gone.
            log.info("%s says of %s's predecessor: %s", reporter.slot, accused.slot, message.reason)
        elif not reporter.patience.believes(now):
            log.warning(
                "%s is not replaced, but %s says: %s", accused.slot, reporter.slot, message.reason
            )
        else:
            accused.kill(f"{reporter.slot} says: {message.reason}")

    def _open_listener(self, worker: Worker, address: bytes, port: int) -> None:
        try:
            descriptor = self._listeners.open(worker.slot, self._network(), address, port)
        except ListenerRefusedError as error:
            self._warn_of_listener(worker.slot, port, str(error))
            reason = str(error)[:500]
            worker.send(m.ListenerRefused(address=address, port=port, reason=reason))
        else:
            worker.send(m.ListenerOpened(address=address, port=port), [descriptor])

    def _warn_of_listener(self, slot: str, port: int, why: str) -> None:
        # A worker that asks for nonsense by the thousand must not fill the log as well.
        now = time.monotonic()
        if now - self._warned_at.get(slot, -math.inf) >= WARN_SECONDS:
            self._warned_at[slot] = now
            log.warning("%s gets no listener on port %d: %s", slot, port, why)

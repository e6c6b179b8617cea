"""One worker slot: its state, its process when there is one, and what is known of it."""

import logging
import os
import random
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ipc.errors import BusyError, ConversationError, PeerGoneError
from ipc.messages import AnyMessage, Confined, Message, Stop
from supervisor import worker_states
from supervisor.allowance import Allowance
from supervisor.confinement.landlock_rules import Reach
from supervisor.privileges import Identity
from supervisor.restart_policy import RestartLimits, RestartPolicy
from supervisor.spawn import Spawned, spawn
from supervisor.worker_states import ALIVE, WorkerEvent, WorkerState

log = logging.getLogger(__name__)

# Messages for a worker that does not read; listeners of a large address book come at once.
MAX_OUTBOX = 20_000
# What a worker may say, in bytes; an honest one says a few thousand per second, and more when it
# has just started. A message counts as MESSAGE_BYTES at least, for the work that it makes.
BYTES_PER_SECOND = 256 * 1024
BURST_BYTES = 4 * 1024 * 1024
MESSAGE_BYTES = 256
# One look at a worker's channel reads about so much before the others get their turn.
TURN_BYTES = 32 * 1024
# A process whose channel has ended ends by itself in this time.
HANG_UP_SECONDS = 1.0
# SIGKILL takes milliseconds, unless the process is stuck in the kernel.
UNKILLABLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class LastExit:
    """How the last process of a slot ended, for `vnet status`."""

    status: int | None
    signal: str | None

    @classmethod
    def of(cls, wait_status: int) -> "LastExit":
        """From the status of waitpid(2)."""
        code = os.waitstatus_to_exitcode(wait_status)
        if code >= 0:
            return cls(status=code, signal=None)
        try:
            return cls(status=None, signal=signal.Signals(-code).name)
        except ValueError:
            return cls(status=None, signal=f"signal {-code}")

    def __str__(self) -> str:
        return f"status {self.status}" if self.signal is None else str(self.signal)


class Worker:
    """See the module. Times are monotonic seconds."""

    def __init__(
        self, slot: str, identity: Identity, limits: RestartLimits, reach: Reach | None = None
    ) -> None:
        self.slot = slot
        self.state = WorkerState.STOPPED
        self.restarts = 0
        self.last_exit: LastExit | None = None
        self.counters: dict[str, int] = {}
        # What the present process has said of its confinement; None until then.
        self.confinement: Confined | None = None
        self.started_at = 0.0
        self.last_heartbeat = 0.0
        self.restart_at: float | None = None
        # When a worker that was told to end is killed.
        self.kill_at: float | None = None
        # Set while a stop is part of a restart.
        self.comes_back = False
        self._identity = identity
        self._reach = reach or Reach()
        self._policy = RestartPolicy(limits)
        self._process: Spawned | None = None
        self._has_hung_up = False
        self._is_killed = False
        self._killed_at = 0.0
        self._allowance = Allowance(BYTES_PER_SECOND, BURST_BYTES, 0.0)
        # Descriptors that wait here are copies: the originals may be closed before they are sent,
        # and their numbers given to something that is not for this worker.
        self._outbox: deque[tuple[Message, tuple[int, ...]]] = deque()

    @property
    def is_alive(self) -> bool:
        return self.state in ALIVE

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def fileno(self) -> int:
        """Descriptor of the channel; only while a process exists."""
        assert self._process is not None
        return self._process.channel.fileno()

    @property
    def wants_to_write(self) -> bool:
        return bool(self._outbox)

    @property
    def is_talking(self) -> bool:
        """Whether a process exists whose channel is open at the other end."""
        return self._process is not None and not self._has_hung_up

    def start(self, now: float, log_handler: logging.Handler) -> None:
        """Forks a process for this slot; if that cannot be done it counts as a crash."""
        self._move(WorkerEvent.SPAWNED)
        self.restart_at = self.kill_at = None
        self.comes_back = False
        self.started_at = self.last_heartbeat = now
        self.counters = {}
        self.confinement = None
        self._has_hung_up = self._is_killed = False
        self._allowance = Allowance(BYTES_PER_SECOND, BURST_BYTES, now)
        try:
            self._process = spawn(self.slot, self._identity, self._reach, log_handler)
        except OSError as error:
            log.error("%s cannot be started: %s", self.slot, error)
            self.last_exit = None
            self._decide_what_follows(now)
        else:
            log.info("%s starts as process %d", self.slot, self._process.pid)

    def was_confined(self, report: Confined) -> None:
        """Its first message; one that says it again is killed, for then others may speak in it."""
        if self.confinement is None:
            self.confinement = report
        else:
            self.kill("it says twice that it is confined")

    def became_ready(self, now: float) -> None:
        self._move(WorkerEvent.BECAME_READY)
        self.last_heartbeat = now

    def heard(self, now: float, counters: dict[str, int]) -> None:
        """A heartbeat came."""
        self.last_heartbeat = now
        self.counters = counters

    def order_stop(self, now: float, grace_seconds: float) -> None:
        """Tells the worker to end; without a process it is stopped at once."""
        had_process = self.is_alive
        self._move(WorkerEvent.STOP_ORDERED)
        self.restart_at = None
        if had_process:
            self.kill_at = now + grace_seconds
            self.send(Stop(grace_seconds=grace_seconds))

    def forget_crashes(self) -> None:
        self._policy.forget()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Sends in order; what cannot be sent now waits. A full queue kills the worker."""
        if self._process is None:
            return
        if len(self._outbox) >= MAX_OUTBOX:
            self.kill("it does not read its channel")
            return
        try:
            self._outbox.append((message, _copies(descriptors)))
        except OSError as error:
            self.kill(f"no descriptor is left for what it waits for: {error}")
            return
        if len(self._outbox) == 1:
            self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as the worker reads."""
        assert self._process is not None
        try:
            while self._outbox:
                message, descriptors = self._outbox[0]
                self._process.channel.send(message, descriptors)
                self._outbox.popleft()
                _close(descriptors)
        except BusyError:
            return
        except ConversationError as error:
            # Its exit is noticed by SIGCHLD; nothing more is to be said.
            log.debug("%s: %s", self.slot, error)
            self._empty_outbox()

    def receive(self, now: float) -> list[AnyMessage]:
        """What the worker has said; one that says what it may not, or hangs up, is killed."""
        messages: list[AnyMessage] = []
        if self._process is None:
            return messages
        channel, spent = self._process.channel, 0
        try:
            while spent < TURN_BYTES:
                before = channel.received_bytes
                received = channel.receive()
                if received is None:
                    break
                messages.append(received[0])
                spent += max(MESSAGE_BYTES, channel.received_bytes - before)
        except PeerGoneError:
            # It has ended or is about to, and without a channel it is of no use.
            self._has_hung_up = True
            self.kill_at = self.kill_at or now + HANG_UP_SECONDS
        except ConversationError as error:
            self._has_hung_up = True
            self.kill(str(error))
        if not self._allowance.spend(spent, now):
            self._has_hung_up = True
            self.kill("it floods its channel")
        return messages

    def kill(self, why: str) -> None:
        """Ends the process with SIGKILL; its exit is handled when it comes."""
        if self._process is not None and not self._is_killed:
            self._is_killed = True
            self._killed_at = time.monotonic()
            log.warning("%s is killed: %s", self.slot, why)
            os.kill(self._process.pid, signal.SIGKILL)

    def is_unkillable(self, now: float) -> bool:
        """Whether it was killed long ago and is still there, stuck in the kernel."""
        is_waited_for = self._process is not None and self._is_killed
        return is_waited_for and now - self._killed_at > UNKILLABLE_SECONDS

    def has_ended(self) -> bool:
        """Whether the process is over and waits to be reaped."""
        if self._process is None:
            return False
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags) is not None

    def reap(self, now: float) -> None:
        """Collects the ended process and decides what follows."""
        assert self._process is not None
        _, wait_status = os.waitpid(self._process.pid, 0)
        self.last_exit = LastExit.of(wait_status)
        self._process.channel.close()
        self._process = None
        self._empty_outbox()
        self._decide_what_follows(now)

    def _decide_what_follows(self, now: float) -> None:
        if self.state is WorkerState.DRAINING:
            self._move(WorkerEvent.EXITED)
            log.info("%s ended", self.slot)
            return
        how = "did not start" if self.last_exit is None else f"ended with {self.last_exit}"
        delay = self._policy.crashed(now, random.random())  # noqa: S311  # jitter, no secret
        if delay is None:
            self._move(WorkerEvent.CRASHED_TOO_OFTEN)
            log.error("%s %s too often and is given up", self.slot, how)
            return
        self._move(WorkerEvent.CRASHED)
        self.restarts += 1
        self.restart_at = now + delay
        log.error("%s %s, restart in %.2f s", self.slot, how, delay)

    def _empty_outbox(self) -> None:
        while self._outbox:
            _close(self._outbox.popleft()[1])

    def _move(self, event: WorkerEvent) -> None:
        self.state = worker_states.after(self.state, event)


def _copies(descriptors: Sequence[int]) -> tuple[int, ...]:
    """Duplicates of all, or OSError and none."""
    made: list[int] = []
    try:
        made.extend(os.dup(descriptor) for descriptor in descriptors)
    except OSError:
        _close(made)
        raise
    return tuple(made)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

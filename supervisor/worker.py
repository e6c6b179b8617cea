"""One worker slot: its state, its process when there is one, and what is known of it."""

import contextlib
import logging
import os
import random
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ipc import codec, order
from ipc.errors import BusyError, ConversationError, PeerGoneError
from ipc.messages import AnyMessage, Confined, Drain, ListenerOpened, Message, Stop
from ipc.order import Stage
from ipc.permits import Role, role_of
from supervisor import worker_states
from supervisor.allowance import Allowance
from supervisor.confinement.landlock_rules import Reach
from supervisor.handover import KeptExit, KeptMessage, KeptWorker
from supervisor.patience import Patience
from supervisor.privileges import Identity
from supervisor.restart_policy import RestartLimits, RestartPolicy
from supervisor.spawn import DUMP_SIGNAL, Spawned, spawn
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
# A worker that has not said READY by then never will; imports take about one second.
START_SECONDS = 30.0
# How long workers may take to end before they are killed.
GRACE_SECONDS = 3.0
# A worker that hangs has this long to write its stack, then as long to end by SIGTERM.
DUMP_SECONDS = 0.5
TERM_SECONDS = 0.5
# A process whose channel has ended ends by itself in this time.
HANG_UP_SECONDS = 1.0
# SIGKILL takes milliseconds, unless the process is stuck in the kernel.
UNKILLABLE_SECONDS = 10.0
# How often those who were killed are looked at when there is no loop any more.
_REAP_SECONDS = 0.01


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
    """See the module. Times are monotonic seconds.

    While a worker is replaced its slot has two of these: `is_standby` is set on the successor until it
    takes over.
    """

    def __init__(
        self, slot: str, identity: Identity, limits: RestartLimits, reach: Reach | None = None
    ) -> None:
        self.slot = slot
        self.is_standby = False
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
        # When a worker that finishes what it has is told to end at once.
        self.drains_until: float | None = None
        # Set while this process must not begin, because another has not handed over.
        self.waits_for_take_over = False
        # Set while a stop is part of a restart.
        self.comes_back = False
        self._identity = identity
        self._reach = reach or Reach()
        self._policy = RestartPolicy(limits)
        self._process: Spawned | None = None
        # What it may say now.
        self._stage = Stage.FORKED
        # What it understands (`ipc.order`).
        self._conversation = order.CONVERSATION
        # How often it may have itself or others restarted.
        self.patience = Patience(limits.restart_max)
        self._has_hung_up = False
        self._is_killed = False
        self._killed_at = 0.0
        # Signals that follow the first one to a hung process: when, and which.
        self._escalation: deque[tuple[float, signal.Signals]] = deque()
        self._allowance = Allowance(BYTES_PER_SECOND, BURST_BYTES, 0.0)
        # Descriptors that wait here are copies: the originals may be closed before they are sent,
        # and their numbers given to something that is not for this worker.
        self._outbox: deque[tuple[Message, tuple[int, ...]]] = deque()
        # A worker that asks for a listener again and again, and reads nothing, must not use up the
        # descriptors of all.
        self._waiting_listeners: set[Message] = set()

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
    def is_killed(self) -> bool:
        """Whether its process is about to end by our SIGKILL."""
        return self._process is not None and self._is_killed

    @property
    def is_being_ended(self) -> bool:
        """Whether its process hangs or was killed: it is not to be counted on."""
        return self.is_killed or bool(self._escalation)

    @property
    def is_talking(self) -> bool:
        """Whether a process exists whose channel is open at the other end."""
        return self._process is not None and not self._has_hung_up

    def successor(self, identity: Identity, reach: Reach) -> "Worker":
        """A standby for this slot; the history of crashes is one."""
        made = Worker(self.slot, identity, self._policy.limits, reach)
        made.is_standby = True
        made.restarts = self.restarts
        made.last_exit = self.last_exit
        made.patience = self.patience.for_successor()
        made._policy = self._policy
        return made

    @classmethod
    def adopt(
        cls,
        kept: KeptWorker,
        identity: Identity,
        limits: RestartLimits,
        reach: Reach,
        log_handler: logging.Handler,
    ) -> "Worker":
        """Goes on with a slot and its process as an earlier program of this process has left it.

        Raises:
            OSError: no thread or descriptor is left.
        """
        made = cls(kept.slot, identity, limits, reach)
        made.state, made._stage = kept.state, kept.stage
        made.restarts = kept.restarts
        if kept.last_exit is not None:
            made.last_exit = LastExit(kept.last_exit.status, kept.last_exit.signal)
        made.counters = kept.counters
        made.confinement = kept.confinement
        made.started_at, made.last_heartbeat = kept.started_at, kept.last_heartbeat
        made.restart_at, made.kill_at = kept.restart_at, kept.kill_at
        made.drains_until = kept.drains_until
        made.waits_for_take_over = kept.waits_for_take_over
        made.comes_back = kept.comes_back
        made._policy = RestartPolicy(limits, kept.crashes)
        made._has_hung_up = kept.has_hung_up
        made._is_killed, made._killed_at = kept.killed_at is not None, kept.killed_at or 0.0
        if kept.process is not None:
            made._process = Spawned.adopt(kept.process, kept.slot, log_handler)
            made._conversation = kept.process.conversation
            made._queue_again(kept.process.waiting)
        return made

    def _queue_again(self, waiting: Sequence[KeptMessage]) -> None:
        for kept in waiting:
            try:
                message = codec.decode(kept.data, Role.SUPERVISOR, role_of(self.slot))
            except ConversationError as error:
                _close(kept.descriptors)
                self.kill(f"what it was to be told is not understood any more: {error}")
                continue
            self._outbox.append((message, tuple(kept.descriptors)))
            if isinstance(message, ListenerOpened):
                self._waiting_listeners.add(message)

    def keep(self, *, lets_go: bool) -> KeptWorker:
        """Everything of it, for `adopt`; `lets_go` ends the threads that read its log."""
        process = None
        if self._process is not None:
            waiting = [
                KeptMessage(data=codec.encode(message), descriptors=list(descriptors))
                for message, descriptors in self._outbox
            ]
            process = msgspec.structs.replace(
                self._process.keep(lets_go=lets_go),
                waiting=waiting,
                conversation=self._conversation,
            )
        last = self.last_exit
        return KeptWorker(
            slot=self.slot,
            state=self.state,
            stage=self._stage,
            process=process,
            restarts=self.restarts,
            last_exit=None if last is None else KeptExit(status=last.status, signal=last.signal),
            counters=self.counters,
            confinement=self.confinement,
            started_at=self.started_at,
            last_heartbeat=self.last_heartbeat,
            restart_at=self.restart_at,
            kill_at=self.kill_at,
            drains_until=self.drains_until,
            waits_for_take_over=self.waits_for_take_over,
            comes_back=self.comes_back,
            crashes=self._policy.crashes,
            has_hung_up=self._has_hung_up,
            killed_at=self._killed_at if self._is_killed else None,
        )

    def hear_again(self, kept: KeptWorker, log_handler: logging.Handler) -> None:
        """After `keep` has let go in vain: its log is read again."""
        if self._process is None or kept.process is None:
            return
        try:
            self._process = self._process.heard_again(kept.process, self.slot, log_handler)
        except OSError as error:
            self.kill(str(error))

    def start(self, now: float, log_handler: logging.Handler) -> None:
        """Forks a process for this slot; if that cannot be done it counts as a crash."""
        self._move(WorkerEvent.SPAWNED)
        self.restart_at = self.kill_at = self.drains_until = None
        self.comes_back = False
        self._escalation.clear()
        self.started_at = self.last_heartbeat = now
        self.counters = {}
        self.confinement = None
        self._stage = Stage.FORKED
        self._conversation = order.CONVERSATION
        self.patience.begin()
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

    def order_stop(self, now: float) -> None:
        """Tells the worker to end; without a process it is stopped at once."""
        had_process = self.is_alive
        self._move(WorkerEvent.STOP_ORDERED)
        self.restart_at = self.drains_until = None
        if had_process:
            self.kill_at = now + GRACE_SECONDS
            self.send(Stop(grace_seconds=GRACE_SECONDS))

    def order_drain(self, now: float, deadline_seconds: float) -> None:
        """Tells the worker to finish what it has and to take nothing new; only while it is ready."""
        self._move(WorkerEvent.STOP_ORDERED)
        self.comes_back = False
        self.drains_until = now + deadline_seconds
        self._stage = Stage.DRAINING
        self.send(Drain(deadline_seconds=deadline_seconds))

    def forget_crashes(self) -> None:
        self._policy.forget()

    def use_limits(self, limits: RestartLimits) -> None:
        """From now on; crashes of the past still count."""
        self._policy.limits = limits
        self.patience.use_restart_max(limits.restart_max)

    def watch(
        self, now: float, hang_seconds: float, *, heard_until: float, awake_since: float
    ) -> None:
        """Does what is due about a worker that is silent, or does not end as it was told.

        What it said before `heard_until` (monotonic seconds) has been received. Before `awake_since` the
        supervisor stood still, and perhaps the worker with it.
        """
        is_beating = self.state is WorkerState.READY or self.drains_until is not None
        if self._process is not None and (breach := self._process.log_receiver.breach):
            self.kill(breach)
        if self._escalation:
            self._escalate(now)
        elif is_beating and heard_until - max(self.last_heartbeat, awake_since) > hang_seconds:
            self.end_hung(now, f"no heartbeat for {hang_seconds:g} s")
        elif (
            self.state is WorkerState.STARTING
            and heard_until - max(self.started_at, awake_since) > START_SECONDS
        ):
            self.end_hung(now, f"not ready after {START_SECONDS:g} s")
        elif self.drains_until is not None and now > self.drains_until:
            log.warning("%s has not finished in time and is ended", self.slot)
            self.order_stop(now)
        elif self.kill_at is not None and now > self.kill_at:
            self.kill_at = None
            self.kill("it did not end in time")

    def end_hung(self, now: float, why: str) -> None:
        """Has a worker that does not work write its stack, then ends it: a crash."""
        if self._process is None or self.is_being_ended:
            return
        if _is_stopped(self._process.pid):
            # It would write its stack, and end by SIGTERM, only when it goes on.
            log.error("%s is stopped, by a SIGSTOP or a debugger: %s", self.slot, why)
            self.kill("it is stopped")
            return
        log.error("%s hangs, its stack follows: %s", self.slot, why)
        self._escalation.extend(
            (
                (now + DUMP_SECONDS, signal.SIGTERM),
                (now + DUMP_SECONDS + TERM_SECONDS, signal.SIGKILL),
            )
        )
        os.kill(self._process.pid, DUMP_SIGNAL)

    @property
    def next_step_at(self) -> float | None:
        """When `watch` has something to do about a hung process, or None."""
        return self._escalation[0][0] if self._escalation else None

    def _escalate(self, now: float) -> None:
        while self._process is not None and self._escalation and now >= self._escalation[0][0]:
            _, number = self._escalation.popleft()
            if number is signal.SIGKILL:
                self.kill("it hangs")
            else:
                os.kill(self._process.pid, number)

    def knows(self, kind: type[Message]) -> bool:
        """Whether the process is of a version that knows such messages."""
        return order.SINCE.get(kind, 0) <= self._conversation

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Sends in order; what cannot be sent now waits. A full queue kills the worker.

        A process of an earlier version is not told what it would not understand.
        """
        if not self.knows(type(message)):
            log.debug("%s does not know %s yet", self.slot, type(message).__name__)
            return
        is_opened = isinstance(message, ListenerOpened)
        if self._process is None or (is_opened and message in self._waiting_listeners):
            return
        if len(self._outbox) >= MAX_OUTBOX:
            self.kill("it does not read its channel")
            return
        try:
            self._outbox.append((message, _copies(descriptors)))
        except OSError as error:
            self.kill(f"no descriptor is left for what it waits for: {error}")
            return
        if is_opened:
            self._waiting_listeners.add(message)
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
                if isinstance(message, ListenerOpened):
                    self._waiting_listeners.discard(message)
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
                self._stage = order.after_saying(self._stage, received[0])
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
            # After a fault it may have been reaped without that being noted.
            with contextlib.suppress(ProcessLookupError):
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
        self._escalation.clear()
        self._decide_what_follows(now)

    def collect_killed(self) -> bool:
        """Forgets a process that has ended; False while it has not. Decides nothing."""
        if self._process is None:
            return True
        try:
            if os.waitpid(self._process.pid, os.WNOHANG) == (0, 0):
                return False
        except ChildProcessError:
            log.debug("%s has been reaped already", self.slot)
        process, self._process = self._process, None
        process.channel.close()
        self._empty_outbox()
        return True

    def _decide_what_follows(self, now: float) -> None:
        self.kill_at = self.drains_until = None
        if self.state is WorkerState.DRAINING:
            self._move(WorkerEvent.EXITED)
            log.info("%s ended", self.slot)
            return
        how = "did not start" if self.last_exit is None else f"ended with {self.last_exit}"
        if self.is_standby:
            self._move(WorkerEvent.SUCCESSOR_ENDED)
            log.error("%s is not replaced: its successor %s", self.slot, how)
            return
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
        self._waiting_listeners.clear()
        while self._outbox:
            _close(self._outbox.popleft()[1])

    def _move(self, event: WorkerEvent) -> None:
        self.state = worker_states.after(self.state, event)


def put_down(workers: Sequence[Worker], why: str) -> None:
    """Kills and reaps without the supervisor's loop; one that is stuck in the kernel is left."""
    for worker in workers:
        worker.kill(why)
    deadline = time.monotonic() + UNKILLABLE_SECONDS
    for worker in workers:
        while not worker.collect_killed():
            if time.monotonic() > deadline:
                log.error("process %s of %s does not end", worker.pid, worker.slot)
                break
            time.sleep(_REAP_SECONDS)


def _copies(descriptors: Sequence[int]) -> tuple[int, ...]:
    """Duplicates of all, or OSError and none."""
    made: list[int] = []
    try:
        made.extend(os.dup(descriptor) for descriptor in descriptors)
    except OSError:
        _close(made)
        raise
    return tuple(made)


def _is_stopped(pid: int) -> bool:
    """Whether a child stands still by a signal or a debugger, proc_pid_stat(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)

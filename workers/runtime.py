"""What every worker process does the same way: channel, heartbeat, bus, stopping.

`run` is what the forked child calls after it has given up its rights; it starts the event loop and the
`main` of the worker's own module. A worker ends when it is told to, and when its supervisor is
gone.

A standby gets ready beside a worker that still does the work, and begins when it is told to take over.
A worker that is told to drain takes nothing new, says that it has handed over, and ends by itself when
it has finished what it has. Stop ends either at once.
"""

import asyncio
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Generic, TypeVar

import uvloop

from ipc.bus import BusClient, BusContext, BusServer, Sender
from ipc.channel import Channel
from ipc.errors import BusyError, ConversationError, MalformedMessageError
from ipc.log_limit import tell_suppressed
from ipc.messages import (
    AnyMessage,
    Common,
    ConfigureDns,
    ConfigureMetrics,
    ConfigureProxy,
    ConfigureTun,
    Drain,
    HandedOver,
    Heartbeat,
    Message,
    NeedsRestart,
    PeerMisbehaved,
    Ready,
    SetLogLevel,
    Stop,
    Sync,
    Synced,
    TakeOver,
)
from ipc.order import ACCUSATION_SECONDS, MAX_ACCUSATIONS, Duty, after_being_told
from ipc.permits import Role, role_of
from ipc.window import Window
from workers import (
    memory_limit,
    preload,  # noqa: F401  # for its effect: see the module
)

log = logging.getLogger(__name__)

C = TypeVar("C", ConfigureTun, ConfigureDns, ConfigureProxy, ConfigureMetrics)
Configure = ConfigureTun | ConfigureDns | ConfigureProxy | ConfigureMetrics
# Messages that wait for a supervisor that is busy; it reads within milliseconds, so a full queue
# means that something is broken beyond repair.
MAX_OUTBOX = 10_000
# One report makes the supervisor replace a peer; the others of a flood say nothing new.
REPORT_SECONDS = 1.0

# A path that has come after the worker was confined, so that it may not read it; may block.
WhatIsNew = Callable[[], Path | None]


class Runtime(Generic[C]):
    """One worker's surroundings; see the module."""

    def __init__(
        self,
        channel: Channel,
        config: C,
        descriptors: list[int],
        loop: asyncio.AbstractEventLoop,
        listening: socket.socket | None = None,
        what_is_new: WhatIsNew | None = None,
    ) -> None:
        """`listening` is this worker's own socket of the bus, made before it was confined."""
        self.config: C = config
        self.descriptors = descriptors
        self.counters: dict[str, int] = {}
        self.stopping = asyncio.Event()
        self.draining = asyncio.Event()
        # How long a worker that drains may take to finish what it has; the supervisor ends it then.
        self.drain_seconds = 0.0
        self.on_message: Callable[[AnyMessage, list[int]], None] = _ignore
        self._channel = channel
        self._parent_pid = os.getppid()
        self._has_lost_supervisor = False
        self._loop = loop
        self._outbox: deque[Message] = deque()
        self._listening = listening
        self._what_is_new = what_is_new
        self._look: asyncio.Future[Path | None] | None = None
        self._bus: BusContext | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._reported_at: dict[str, float] = {}
        # A worker that says it more often is taken for a liar.
        self._accusations = Window(MAX_ACCUSATIONS, ACCUSATION_SECONDS)
        self._duty = after_being_told(Duty.WAITING, config)
        self._is_ready = False
        self._may_begin = asyncio.Event()
        if self._duty is Duty.WORKING:
            self._may_begin.set()

    # -- for the worker --

    @property
    def is_orphaned(self) -> bool:
        """Whether the supervisor is gone, rather than that it said stop."""
        return self._has_lost_supervisor or os.getppid() != self._parent_pid

    def lost_supervisor(self) -> None:
        """The supervisor is gone: the worker has to stop."""
        self._has_lost_supervisor = True
        self.stopping.set()

    def ready(self) -> None:
        """Tells the supervisor, once, that the work has begun or may begin."""
        if not self._is_ready:
            self._is_ready = True
            self.send(Ready())

    async def taken_over(self) -> None:
        """Returns when the work may begin: at once, or when the predecessor of a standby has stopped.

        A standby that waits here is ready.
        """
        if not self._may_begin.is_set():
            self.ready()
            await self._may_begin.wait()

    def handed_over(self) -> None:
        """Tells the supervisor that this worker takes nothing new, and has closed what it borrowed."""
        self.send(HandedOver())

    async def until_stopped(self, work: Coroutine[None, None, None]) -> None:
        """Runs `work` to its end, or until the worker has to stop, which cancels it."""
        working = self._loop.create_task(work)
        stopped = self._loop.create_task(self.stopping.wait())
        try:
            await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            stopped.cancel()
            await asyncio.wait({working, stopped})
        if not working.cancelled():
            working.result()  # raises what `work` has raised

    def send(self, message: Message) -> None:
        """Sends to the supervisor; waits its turn in a queue when it is busy."""
        if len(self._outbox) >= MAX_OUTBOX:
            raise BusyError("the supervisor has not read for too long")
        self._outbox.append(message)
        if len(self._outbox) == 1:
            self._flush()

    def serve_bus(self, on_message: Callable[[Sender, AnyMessage], None]) -> BusServer:
        """Binds this worker's bus socket; `on_message` gets the sender first."""
        return self._bus_context().serve(on_message, self._report_breach)

    def join_bus(
        self,
        server_slot: str,
        on_message: Callable[[AnyMessage], None],
        on_connect: Callable[[], None] = lambda: None,
        on_disconnect: Callable[[], None] = lambda: None,
    ) -> BusClient:
        """Connects to another worker's bus socket.

        `on_connect` follows each handshake, `on_disconnect` the loss of a connection that had one.
        """
        return self._bus_context().join(
            server_slot, on_message, self._report_breach, on_connect, on_disconnect
        )

    # -- for `run` --

    def start(self) -> None:
        """Begins to listen to the supervisor and to send heartbeats."""
        self._loop.add_reader(self._channel.fileno(), self._receive)
        self._loop.add_signal_handler(signal.SIGTERM, self.stopping.set)
        self._beat()

    def close(self) -> None:
        """Ends heartbeat, channel and bus."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        if self._bus is not None:
            self._bus.close()

    def _bus_context(self) -> BusContext:
        if self._bus is None:
            common: Common = self.config.common
            self._bus = BusContext(Path(common.bus_dir), common.slot, common.keys, self._listening)
        return self._bus

    def _report_breach(self, slot: str, error: ConversationError) -> None:
        now = self._loop.time()
        if now - self._reported_at.get(slot, -REPORT_SECONDS) < REPORT_SECONDS:
            return
        self._reported_at[slot] = now
        log.error("%s misbehaves on the bus: %s", slot, error)
        if self._accusations.take(now):
            self.send(PeerMisbehaved(slot=slot, reason=str(error)[:500]))

    def _beat(self) -> None:
        tell_suppressed()
        # Skipped while the queue is not empty: the supervisor is told nothing new by it.
        if not self._outbox:
            self.send(Heartbeat(counters=dict(self.counters)))
        if self._what_is_new is not None and self._look is None and self._wants_successors:
            # In a thread: the file system may hang.
            self._look = self._loop.run_in_executor(None, self._what_is_new)
            self._look.add_done_callback(self._looked)
        self._heartbeat = self._loop.call_later(self.config.common.heartbeat_seconds, self._beat)

    @property
    def _wants_successors(self) -> bool:
        """A standby asks when it has taken over, and one that drains has a successor."""
        return self._duty is Duty.WORKING and not self.stopping.is_set()

    def _looked(self, look: "asyncio.Future[Path | None]") -> None:
        if look.cancelled():
            return
        path = look.result()
        if path is None:
            self._look = None
        elif self._wants_successors:
            # Once is enough, so there is no further look.
            self.send(
                NeedsRestart(reason=f"{path} is new, and it may read only what it knew"[:500])
            )

    def _flush(self) -> None:
        try:
            while self._outbox:
                self._send_first()
                self._outbox.popleft()
        except BusyError:
            self._loop.add_writer(self._channel.fileno(), self._flush)
            return
        except ConversationError as error:
            log.debug("the supervisor is gone: %s", error)
            self._outbox.clear()
            self.lost_supervisor()
        self._loop.remove_writer(self._channel.fileno())

    def _send_first(self) -> None:
        try:
            self._channel.send(self._outbox[0])
        except MalformedMessageError as error:
            # A fault of this worker, not of the channel; the others still want to be sent.
            log.error("a message to the supervisor was dropped: %s", error)

    def _receive(self) -> None:
        try:
            while (received := self._channel.receive()) is not None:
                self._take(*received)
        except ConversationError as error:
            log.debug("the supervisor is gone: %s", error)
            self._loop.remove_reader(self._channel.fileno())
            self.lost_supervisor()

    def _take(self, message: AnyMessage, descriptors: list[int]) -> None:
        self._duty = after_being_told(self._duty, message)
        if isinstance(message, Stop):
            self.stopping.set()
        elif isinstance(message, Drain):
            self.drain_seconds = message.deadline_seconds
            self.draining.set()
        elif isinstance(message, TakeOver):
            self._may_begin.set()
        elif isinstance(message, SetLogLevel):
            logging.getLogger().setLevel(message.level)
        elif isinstance(message, Sync):
            self.send(Synced(number=message.number))
        else:
            self.on_message(message, descriptors)


def _ignore(message: AnyMessage, _descriptors: list[int]) -> None:
    log.debug("%s came before the worker was set up", type(message).__name__)


def run(
    slot: str,
    end: socket.socket,
    main: Callable[[Runtime[C]], Awaitable[None]],
    listening: socket.socket | None = None,
    what_is_new: WhatIsNew | None = None,
) -> None:
    """Runs a worker to its end; `end` is its side of the channel, `listening` its socket of the bus.

    Raises whatever the worker's main raises: a bug ends the process and the supervisor starts
    another.
    """
    channel = Channel(end, role_of(slot), Role.SUPERVISOR, takes_descriptors=True)
    # The supervisor ends its workers itself, in its own order; a Ctrl-C goes to all of them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(channel, main, listening, what_is_new))


async def _run(
    channel: Channel,
    main: Callable[[Runtime[C]], Awaitable[None]],
    listening: socket.socket | None,
    what_is_new: WhatIsNew | None,
) -> None:
    loop = asyncio.get_running_loop()
    config, descriptors = await _first_message(channel, loop)
    runtime: Runtime[C] = Runtime(channel, config, descriptors, loop, listening, what_is_new)  # type: ignore[arg-type]  # the permit table lets only this role's configuration through
    logging.getLogger().setLevel(config.common.log_level)
    most = memory_limit.most_bytes(config, memory_limit.machine_bytes())
    memory_limit.limit_memory(most)
    runtime.start()
    try:
        await main(runtime)
    finally:
        runtime.close()


async def _first_message(
    channel: Channel, loop: asyncio.AbstractEventLoop
) -> tuple[Configure, list[int]]:
    readable = asyncio.Event()
    loop.add_reader(channel.fileno(), readable.set)
    try:
        while (received := channel.receive()) is None:
            await readable.wait()
            readable.clear()
    finally:
        loop.remove_reader(channel.fileno())
    message, descriptors = received
    if not isinstance(message, Configure):
        raise MalformedMessageError(f"{type(message).__name__} came before the configuration")
    return message, descriptors

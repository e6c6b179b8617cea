"""What every worker process does the same way: channel, heartbeat, bus, stopping.

`run` is what the forked child calls after it has given up its rights; it starts the event loop and the
`main` of the worker's own module. A worker ends when it is told to, and when its supervisor is
gone.
"""

import asyncio
import logging
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, TypeVar

import uvloop

from ipc.bus import BusClient, BusContext, BusServer
from ipc.channel import Channel
from ipc.errors import BusyError, ConversationError, MalformedMessageError
from ipc.messages import (
    AnyMessage,
    Common,
    ConfigureDns,
    ConfigureProxy,
    ConfigureTun,
    Heartbeat,
    Message,
    NeedsRestart,
    PeerMisbehaved,
    Ready,
    SetLogLevel,
    Stop,
)
from ipc.permits import Role, role_of
from workers import preload  # noqa: F401  # for its effect: see the module

log = logging.getLogger(__name__)

C = TypeVar("C", ConfigureTun, ConfigureDns, ConfigureProxy)
Configure = ConfigureTun | ConfigureDns | ConfigureProxy
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
        self.on_message: Callable[[AnyMessage, list[int]], None] = _ignore
        self._channel = channel
        self._loop = loop
        self._outbox: deque[Message] = deque()
        self._listening = listening
        self._what_is_new = what_is_new
        self._look: asyncio.Future[Path | None] | None = None
        self._bus: BusContext | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._reported_at: dict[str, float] = {}

    # -- for the worker --

    def ready(self) -> None:
        """Tells the supervisor that the work has begun."""
        self.send(Ready())

    def send(self, message: Message) -> None:
        """Sends to the supervisor; waits its turn in a queue when it is busy."""
        if len(self._outbox) >= MAX_OUTBOX:
            raise BusyError("the supervisor has not read for too long")
        self._outbox.append(message)
        if len(self._outbox) == 1:
            self._flush()

    def serve_bus(self, on_message: Callable[[str, AnyMessage], None]) -> BusServer:
        """Binds this worker's bus socket; `on_message` gets the sender's slot first."""
        return self._bus_context().serve(on_message, self._report_breach)

    def join_bus(
        self,
        server_slot: str,
        on_message: Callable[[AnyMessage], None],
        on_connect: Callable[[], None] = lambda: None,
    ) -> BusClient:
        """Connects to another worker's bus socket; `on_connect` follows each handshake."""
        return self._bus_context().join(server_slot, on_message, self._report_breach, on_connect)

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
        self.send(PeerMisbehaved(slot=slot, reason=str(error)[:500]))

    def _beat(self) -> None:
        # Skipped while the queue is not empty: the supervisor is told nothing new by it.
        if not self._outbox:
            self.send(Heartbeat(counters=dict(self.counters)))
        if self._what_is_new is not None and self._look is None:
            # In a thread: the file system may hang.
            self._look = self._loop.run_in_executor(None, self._what_is_new)
            self._look.add_done_callback(self._looked)
        self._heartbeat = self._loop.call_later(self.config.common.heartbeat_seconds, self._beat)

    def _looked(self, look: "asyncio.Future[Path | None]") -> None:
        if look.cancelled():
            return
        path = look.result()
        if path is None:
            self._look = None
        elif not self.stopping.is_set():
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
            self.stopping.set()
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
            self.stopping.set()

    def _take(self, message: AnyMessage, descriptors: list[int]) -> None:
        if isinstance(message, Stop):
            self.stopping.set()
        elif isinstance(message, SetLogLevel):
            logging.getLogger().setLevel(message.level)
        elif isinstance(message, Configure):
            raise MalformedMessageError("configured twice")
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

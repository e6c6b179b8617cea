"""The surroundings of the TUN worker without a supervisor, and a proxy that is a function."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tun_bed import NETWORK

from ipc.bus import Sender
from ipc.errors import BusyError, PeerGoneError
from ipc.messages import (
    BusKeys,
    Common,
    ConfigureTun,
    DialAbandoned,
    DialRequest,
    DialVerdict,
    ProxyHello,
    RedirectsChanged,
)
from workers.runtime import Runtime
from workers.tun import worker

CONFIG = ConfigureTun(
    common=Common(
        slot="tun",
        proxies=2,
        bus_dir="/nonexistent",
        keys=BusKeys(public="x" * 40, secret="x" * 40, peers={}),
        heartbeat_seconds=1.0,
        log_level="INFO",
    ),
    network=NETWORK,
    max_pending=16,
    pending_seconds=5.0,
)


class FakeBus:
    """Plays the bus and every proxy on it.

    `decide` is called with each DialRequest and returns a verdict or None for "no answer".
    """

    def __init__(self, decide: Callable[[DialRequest], DialVerdict | None]) -> None:
        self.decide = decide
        self.connected = True
        self.busy = False
        self.asked: list[tuple[str, DialRequest]] = []
        self.abandoned: list[tuple[str, DialAbandoned]] = []
        self.on_message: Callable[[Sender, object], None] = lambda _sender, _message: None
        self.senders = {slot: Sender(slot, b"0") for slot in ("proxy-0", "proxy-1")}
        self.is_closed = False

    def deliver(self, slot, message):
        self.on_message(self.senders[slot], message)

    def close(self):
        self.is_closed = True

    def send(self, to, message):
        slot = to.slot
        if not self.connected or to != self.senders[slot]:
            raise PeerGoneError(f"{slot} is gone")
        if self.busy:
            raise BusyError(f"{slot} does not read")
        if isinstance(message, DialAbandoned):
            self.abandoned.append((slot, message))
            return
        self.asked.append((slot, message))
        verdict = self.decide(message)
        if verdict is not None:
            asyncio.get_running_loop().call_soon(self.deliver, slot, verdict)

    def say_hello(self, version=1):
        """Both proxies have joined anew."""
        self.connected = True
        for slot, before in list(self.senders.items()):
            self.senders[slot] = Sender(slot, before.route + b"+")
            self.deliver(slot, ProxyHello(version=version))


class FakeRuntime:
    def __init__(self, descriptors, bus, config=CONFIG):
        self.config = config
        self.descriptors = descriptors
        self.counters: dict[str, int] = {}
        self.stopping = asyncio.Event()
        self.draining = asyncio.Event()
        self.may_begin = asyncio.Event()
        self.has_handed_over = False
        self.is_orphaned = False
        self._loop = asyncio.get_running_loop()
        if not config.common.is_standby:
            self.may_begin.set()
        self.on_message = None
        self.is_ready = asyncio.Event()
        self.bus = bus

    def ready(self):
        self.is_ready.set()

    async def taken_over(self):
        if not self.may_begin.is_set():
            self.ready()
            await self.may_begin.wait()

    def lost_supervisor(self):
        self.is_orphaned = True
        self.stopping.set()

    def handed_over(self):
        self.has_handed_over = True

    until_stopped = Runtime.until_stopped

    def serve_bus(self, on_message):
        self.bus.on_message = on_message
        return self.bus


@asynccontextmanager
async def running_worker(
    descriptors, bus, config=CONFIG, redirects=None
) -> AsyncIterator[FakeRuntime]:
    """The real worker on these descriptors until the end of the block.

    `redirects` is the whole table for one that rewrites.
    """
    runtime = FakeRuntime(descriptors, bus, config)
    task = asyncio.create_task(worker.main(runtime))
    if redirects is not None:
        await asyncio.sleep(0)
        runtime.on_message(RedirectsChanged(redirects=redirects, is_complete=True), [])
    await runtime.is_ready.wait()
    bus.say_hello()
    try:
        yield runtime
    finally:
        runtime.stopping.set()
        await task


def admit(request):
    return DialVerdict(flow_id=request.flow_id)


def no_answer(_request):
    return None


def refuse_with(reason):
    return lambda request: DialVerdict(flow_id=request.flow_id, refusal=reason)


async def until(condition, seconds=5.0):
    """Waits until `condition()` holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)

"""The surroundings of the TUN worker without a supervisor, and a proxy that is a function."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from tun_bed import NETWORK

from ipc.errors import BusyError, PeerGoneError
from ipc.messages import (
    BusKeys,
    Common,
    ConfigureTun,
    DialAbandoned,
    DialRequest,
    DialVerdict,
    ProxyHello,
)
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
        self.deliver: Callable[[str, object], None] = lambda _slot, _message: None

    def send(self, slot, message):
        if not self.connected:
            raise PeerGoneError(f"{slot} has not joined")
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
        self.connected = True
        for slot in ("proxy-0", "proxy-1"):
            self.deliver(slot, ProxyHello(version=version))


class FakeRuntime:
    def __init__(self, descriptors, bus, config=CONFIG):
        self.config = config
        self.descriptors = descriptors
        self.counters: dict[str, int] = {}
        self.stopping = asyncio.Event()
        self.on_message = None
        self.is_ready = asyncio.Event()
        self.bus = bus

    def ready(self):
        self.is_ready.set()

    def serve_bus(self, on_message):
        self.bus.deliver = on_message
        return self.bus


@asynccontextmanager
async def running_worker(descriptors, bus, config=CONFIG) -> AsyncIterator[FakeRuntime]:
    """The real worker on these descriptors until the end of the block."""
    runtime = FakeRuntime(descriptors, bus, config)
    task = asyncio.create_task(worker.main(runtime))
    await runtime.is_ready.wait()
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

"""Runs programs through real relays on the loopback, and counts what is left behind.

program (thread, plain socket) --> listener, dial, Relay (event loop) --> Peer (threads, TLS)
"""

import asyncio
import gc
import hashlib
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import uvloop
from tls_peers import DEADLINE_SECONDS, SERVER_NAME, Peer, client_context

from workers.proxy.dial import dial
from workers.proxy.dial_plan import DialPlan, TlsPlan
from workers.proxy.guarded_relay import GuardedRelay
from workers.proxy.http_guard.guard import Guard
from workers.proxy.reactor import Reactor
from workers.proxy.relay import Relay, RelayOutcome
from workers.proxy.upstream import Upstream


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def assert_no_more_descriptors_than(before: int) -> None:
    """Waits for the peer's threads, which close their side in their own time."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while open_descriptors() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def _warm_up() -> None:
    await asyncio.to_thread(gc.collect)


# libuv opens a few descriptors for the process once, with the first loop.
with asyncio.Runner(loop_factory=uvloop.new_event_loop) as _runner:
    _runner.run(_warm_up())


class Bed:
    """Listener, relays and their outcomes, inside a running event loop."""

    def __init__(
        self, plan: DialPlan, max_pending_bytes: int, make_guard: Callable[[], Guard] | None = None
    ) -> None:
        self.reactor = Reactor(asyncio.get_running_loop())
        self.memory = self.reactor.memory
        self.relays: list[Relay] = []
        self.outcomes: list[RelayOutcome] = []
        self.max_pending_bytes = max_pending_bytes
        self._make_guard = make_guard
        self._plan = plan
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listener.setblocking(False)
        self.address = self._listener.getsockname()

    async def dial(self) -> Upstream:
        return await dial(self._plan, 20.0, self.reactor)

    async def accept(self) -> None:
        """Dials first, as the product does, then joins the next program to it."""
        self.start(await self.dial(), await self.accept_local())

    async def accept_local(self) -> socket.socket:
        local, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        return local

    def start(self, upstream: Upstream, local: socket.socket) -> Relay:
        ends = (self.reactor, local, upstream, self.outcomes.append)
        if self._make_guard is None:
            relay = Relay(*ends, self.max_pending_bytes)
        else:
            relay = GuardedRelay(*ends, self._make_guard(), self.max_pending_bytes)
        self.relays.append(relay)
        relay.start()
        return relay

    async def ended(self, count: int = 1) -> None:
        """Waits until so many relays are over."""
        await until(lambda: len(self.outcomes) == count)

    def close(self) -> None:
        self._listener.close()
        watched = len(self.reactor)
        self.reactor.close()
        assert not watched


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # polled: conditions live in threads and in the kernel
            await asyncio.sleep(0.002)


def tls_plan(port: int, context: ssl.SSLContext) -> DialPlan:
    return DialPlan("127.0.0.1", port, TlsPlan(context, SERVER_NAME))


def program(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=DEADLINE_SECONDS)


def receive_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def digest(data: bytes) -> bytes:
    """Megabytes that differ would make a long message."""
    return hashlib.sha256(data).digest()


async def one_program(bed: Bed, talk: Callable[[socket.socket], object]):
    """One relayed program, `talk(connection)` in a thread; its result and the relay's outcome."""

    def run():
        with program(bed.address) as connection:
            return talk(connection)

    accepted = asyncio.create_task(bed.accept())
    result = await asyncio.to_thread(run)
    await accepted
    await bed.ended()
    return result, bed.outcomes[0]


def run_in_bed(
    peer: Peer,
    scenario,
    *,
    alpn: str = "teleport-tcp",
    context: ssl.SSLContext | None = None,
    plan: DialPlan | None = None,
    max_pending_bytes: int = 64 * 1024,
    make_guard: Callable[[], Guard] | None = None,
    loop_factory=uvloop.new_event_loop,
):
    """Runs `await scenario(bed)` and checks that nothing is left open."""
    if plan is None:
        plan = tls_plan(peer.port, context or client_context(alpn))

    async def main():
        bed = Bed(plan, max_pending_bytes, make_guard)
        try:
            result = await scenario(bed)
        finally:
            bed.close()
        await until(lambda: len(asyncio.all_tasks()) == 1)
        return result

    before = open_descriptors()
    with peer, asyncio.Runner(loop_factory=loop_factory) as runner:
        result = runner.run(main())
    assert_no_more_descriptors_than(before)
    return result

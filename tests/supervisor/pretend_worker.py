"""Worker modules that do nothing but misbehave in one way each.

A test sets `BEHAVIOURS` before the supervisor forks; the forked worker finds it in its copy of the
memory.
"""

import asyncio
import mmap
import os
import signal
import time
from collections.abc import Awaitable, Callable

from ipc import messages as m
from ipc.permits import Role, role_of
from workers.runtime import Runtime

AnyRuntime = Runtime  # of whichever configuration
Behaviour = Callable[[AnyRuntime], Awaitable[None]]

BEHAVIOURS: dict[str, Behaviour] = {}


class Marker:
    """A flag and a small count in memory that a test shares with the workers.

    Workers can open no file.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2)
        self.is_set = True

    @property
    def count(self) -> int:
        return self._memory[1]

    def add_one(self) -> None:
        self._memory[1] += 1

    @property
    def is_set(self) -> bool:
        return self._memory[0] == 1

    @is_set.setter
    def is_set(self, value: bool) -> None:
        self._memory[0] = int(value)


async def main(runtime: AnyRuntime) -> None:
    await BEHAVIOURS.get(runtime.config.common.slot, work)(runtime)


async def work(runtime: AnyRuntime) -> None:
    """What a good worker does."""
    if role_of(runtime.config.common.slot) is Role.PROXY:
        runtime.send(m.ClustersReported(clusters=[]))
    runtime.ready()
    await runtime.stopping.wait()


async def never_ready(runtime: AnyRuntime) -> None:
    await runtime.stopping.wait()


async def hang(runtime: AnyRuntime) -> None:
    runtime.ready()
    await asyncio.sleep(0.2)
    time.sleep(1000)  # the loop is stuck


async def ignore_stop(runtime: AnyRuntime) -> None:
    runtime.ready()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    await asyncio.sleep(1000)


def drain_while(marker: Marker) -> Behaviour:
    """Hands over when it is told to drain, and ends when the marker is not set any more."""

    async def behave(runtime: AnyRuntime) -> None:
        if role_of(runtime.config.common.slot) is Role.PROXY:
            runtime.send(m.ClustersReported(clusters=[]))
        await runtime.taken_over()
        runtime.ready()
        while not (runtime.draining.is_set() or runtime.stopping.is_set()):
            await asyncio.sleep(0.01)
        if runtime.draining.is_set():
            runtime.handed_over()
        while marker.is_set and not runtime.stopping.is_set():
            await asyncio.sleep(0.01)

    return behave


def once(marker: Marker, odd: Behaviour) -> Behaviour:
    """`odd` at the first start, a good worker afterwards. `marker` is set until the first start."""

    async def behave(runtime: AnyRuntime) -> None:
        if marker.is_set:
            marker.is_set = False
            await odd(runtime)
        else:
            await work(runtime)

    return behave


def crash_while(marker: Marker) -> Behaviour:
    """Ends with status 9 as long as it is set."""

    async def behave(runtime: AnyRuntime) -> None:
        if marker.is_set:
            os._exit(9)
        await work(runtime)

    return behave


def send_raw(*datagrams: bytes, after: Marker | None = None) -> Behaviour:
    """Becomes ready, writes these to its channel (once `after` is not set) and lives on."""

    async def behave(runtime: AnyRuntime) -> None:
        if role_of(runtime.config.common.slot) is Role.PROXY:
            runtime.send(m.ClustersReported(clusters=[]))
        runtime.ready()
        await asyncio.sleep(0.05)
        while after is not None and after.is_set:
            await asyncio.sleep(0.01)
        for datagram in datagrams:
            os.write(runtime._channel.fileno(), datagram)
        await runtime.stopping.wait()

    return behave


def hang_up(action: Callable[[AnyRuntime], None]) -> Behaviour:
    """Becomes ready and does something once."""

    async def behave(runtime: AnyRuntime) -> None:
        runtime.ready()
        await asyncio.sleep(0.05)
        action(runtime)
        await asyncio.sleep(1000)

    return behave


def flood(datagram: bytes) -> Behaviour:
    """Becomes ready and then sends as fast as the channel takes it."""

    async def behave(runtime: AnyRuntime) -> None:
        await asyncio.sleep(0)
        runtime.ready()
        descriptor = runtime._channel.fileno()
        os.set_blocking(descriptor, True)
        while True:
            os.write(descriptor, datagram)

    return behave

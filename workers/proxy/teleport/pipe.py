"""Puts a tunnel behind a socket, so that an event loop's TLS can run through it.

    TLS -- near socket = far socket -- pump -- FarEnd (WebSocket frames, gRPC messages)

Neither asyncio nor uvloop runs TLS over anything but a socket. gRPC traffic is small, so the extra
copy through the kernel costs nothing that matters; back-pressure comes with it.
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

# Teleport cuts its frames at this size (`api/client/proxy/transport/transportv1/client.go`).
CHUNK_BYTES = 16 * 1024
# A far end that takes nothing for so long is dead. Longer than any call's deadline.
STALL_SECONDS = 30.0

# The event loop alone keeps only weak references to tasks.
_running: set[asyncio.Task[None]] = set()


def _no_fault() -> BaseException | None:
    return None


@dataclass(frozen=True, slots=True)
class Line:
    """A connected, non-blocking stream socket towards a TLS server.

    `fault` tells why what is behind the socket ended, if it ended by an error.
    """

    sock: socket.socket
    fault: Callable[[], BaseException | None] = _no_fault


class FarEnd(Protocol):
    """The way through a tunnel. Every method may raise; the tunnel is then over."""

    async def send(self, data: bytes) -> None:
        """Returns when there is room for more."""

    async def receive(self) -> bytes:
        """What came next; empty at the end."""

    async def end(self) -> None:
        """Tells the far end that nothing more will be sent."""


def open_pipe(work: Callable[[socket.socket], Coroutine[Any, Any, None]]) -> Line:
    """A socket whose other end `work` serves in a task; the task ends soon after the socket.

    An exception of `work` becomes the line's fault.
    """
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    faults: list[BaseException] = []

    async def run() -> None:
        try:
            await work(far)
        except Exception as error:  # noqa: BLE001 - whoever uses the line raises it
            faults.append(error)
        finally:
            far.close()  # after the fault is known: closing wakes who asks for it

    task = asyncio.create_task(run())
    _running.add(task)
    task.add_done_callback(_running.discard)
    return Line(near, lambda: faults[0] if faults else None)


async def pump(near: socket.socket, far: FarEnd) -> None:
    """Carries bytes both ways until either end is closed. Raises what the far end raises."""
    down = asyncio.create_task(_downward(near, far))
    up = asyncio.create_task(_upward(near, far))
    try:
        await asyncio.wait((down, up), return_when=asyncio.FIRST_COMPLETED)
    finally:
        down.cancel()
        up.cancel()
        outcomes = await asyncio.gather(down, up, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome


async def _upward(near: socket.socket, far: FarEnd) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            data = await loop.sock_recv(near, CHUNK_BYTES)
        except OSError:
            data = b""  # whoever has the near end let go of it
        async with asyncio.timeout(STALL_SECONDS):
            if not data:
                await far.end()
                return
            await far.send(data)


async def _downward(near: socket.socket, far: FarEnd) -> None:
    loop = asyncio.get_running_loop()
    while data := await far.receive():
        try:
            await loop.sock_sendall(near, data)
        except OSError:
            return

"""A tunnel behind a socket: bytes both ways, back-pressure, and no end without the other."""

import asyncio
import os

import pytest
import uvloop
from auth_bed import open_files
from teleport_fakes import until

from workers.proxy.teleport import pipe
from workers.proxy.teleport.pipe import open_pipe, pump

LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


class Far:
    """A far end that gives back what it takes, while the gate is open."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.gate.set()
        self.taken = 0
        self.is_ended = False
        self._queue = asyncio.Queue(4)

    async def send(self, data):
        await self.gate.wait()
        self.taken += len(data)
        await self._queue.put(data)

    async def receive(self):
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def end(self):
        self.is_ended = True

    def put(self, item):
        self._queue.put_nowait(item)


async def is_over():
    await until(lambda: not pipe._running)


@LOOPS
def test_bytes_come_back_in_order_and_nothing_is_left(run):
    async def scenario():
        files = open_files()
        far, loop = Far(), asyncio.get_running_loop()
        near = open_pipe(lambda sock: pump(sock, far)).sock
        data = os.urandom(1_000_000)
        sending = asyncio.create_task(loop.sock_sendall(near, data))
        back = bytearray()
        while len(back) < len(data):
            back += await loop.sock_recv(near, 65536)
        await sending
        assert back == data
        near.close()
        await is_over()
        assert far.is_ended
        assert open_files() == files

    run(scenario())


@LOOPS
def test_a_far_end_that_takes_nothing_holds_the_near_end_up(run):
    async def scenario():
        far, loop = Far(), asyncio.get_running_loop()
        far.gate.clear()
        near = open_pipe(lambda sock: pump(sock, far)).sock
        sent = 0
        for _ in range(10):
            try:
                while True:
                    sent += near.send(bytes(65536))
            except BlockingIOError:
                await asyncio.sleep(0.01)
        assert sent < 1_000_000
        far.gate.set()
        received = 0
        while received < sent:
            received += len(await loop.sock_recv(near, 65536))
        near.close()
        await is_over()

    run(scenario())


def test_a_far_end_that_takes_nothing_for_long_is_given_up(monkeypatch):
    monkeypatch.setattr(pipe, "STALL_SECONDS", 0.05)

    async def scenario():
        far, loop = Far(), asyncio.get_running_loop()
        far.gate.clear()
        line = open_pipe(lambda sock: pump(sock, far))
        await loop.sock_sendall(line.sock, b"x")
        assert await loop.sock_recv(line.sock, 1) == b""
        assert isinstance(line.fault(), TimeoutError)
        line.sock.close()
        await is_over()

    asyncio.run(scenario())


@LOOPS
def test_the_fault_is_known_when_the_near_end_is_closed(run):
    async def scenario():
        far, loop = Far(), asyncio.get_running_loop()
        line = open_pipe(lambda sock: pump(sock, far))
        assert line.fault() is None
        far.put(b"last words")
        far.put(ValueError("broken"))
        assert await loop.sock_recv(line.sock, 100) == b"last words"
        assert await loop.sock_recv(line.sock, 100) == b""
        assert str(line.fault()) == "broken"
        line.sock.close()
        await is_over()

    run(scenario())


@LOOPS
def test_the_end_of_the_far_end_is_no_fault(run):
    async def scenario():
        far, loop = Far(), asyncio.get_running_loop()
        line = open_pipe(lambda sock: pump(sock, far))
        far.put(b"")
        assert await loop.sock_recv(line.sock, 100) == b""
        assert line.fault() is None
        line.sock.close()
        await is_over()

    run(scenario())


def test_a_near_end_that_is_gone_ends_a_far_end_that_is_silent():
    async def scenario():
        far = Far()
        near = open_pipe(lambda sock: pump(sock, far)).sock
        await asyncio.sleep(0)
        near.close()
        await is_over()
        assert far.is_ended

    asyncio.run(scenario())


def test_work_that_fails_at_once_closes_the_line():
    async def fail(sock):
        raise OSError("no way")

    async def scenario():
        line = open_pipe(fail)
        assert await asyncio.get_running_loop().sock_recv(line.sock, 1) == b""
        assert str(line.fault()) == "no way"
        line.sock.close()

    asyncio.run(scenario())

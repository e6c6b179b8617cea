import asyncio
import os
import socket

import pytest
import uvloop
from relay_bed import until

from workers.proxy.endpoint import Endpoint
from workers.proxy.reactor import Reactor

LOOPS = pytest.mark.parametrize("loop_factory", [uvloop.new_event_loop, asyncio.new_event_loop])


def run(talk, loop_factory=uvloop.new_event_loop):
    """Runs `await talk(endpoint, other)` on a connected pair; checks that nothing is watched."""

    async def main():
        reactor = Reactor(asyncio.get_running_loop())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            other = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        ours.setblocking(False)
        endpoint = Endpoint(reactor, ours)
        with other:
            await talk(endpoint, other)
        endpoint.close()
        assert not len(reactor)
        reactor.close()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


def nothing() -> None:
    pass


@LOOPS
def test_what_the_kernel_does_not_take_is_sent_later_and_in_order(loop_factory):
    pieces = [os.urandom(100_000) for _ in range(100)]

    async def talk(endpoint, other):
        cleared = asyncio.Event()
        endpoint.attach(nothing, cleared.set, lambda error: None)
        shared = bytearray(100_000)
        for piece in pieces:
            shared[:] = piece
            endpoint.send(memoryview(shared))  # the next piece overwrites it
        assert endpoint.pending_bytes
        received = asyncio.create_task(asyncio.to_thread(receive, other, 10_000_000))
        await cleared.wait()
        assert not endpoint.pending_bytes
        assert await received == b"".join(pieces)

    run(talk, loop_factory)


def receive(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        data += sock.recv(1 << 20)
    return bytes(data)


@LOOPS
def test_a_reset_behind_data_is_seen_after_the_data(loop_factory):
    seen = []

    async def talk(endpoint, other):
        def read():
            try:
                seen.append(endpoint.socket.recv(4))
            except ConnectionResetError:
                seen.append("reset")
                endpoint.pause()

        endpoint.attach(read, nothing, lambda error: None)
        other.sendall(b"12345678")
        reset(other)
        endpoint.resume()
        await until(lambda: "reset" in seen)

    run(talk, loop_factory)
    assert seen in (["reset"], [b"1234", b"5678", "reset"])


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def test_a_paused_endpoint_is_not_read_but_its_death_is_told_once():
    reads, errors = [], []

    async def talk(endpoint, other):
        endpoint.attach(lambda: reads.append(1), nothing, errors.append)
        endpoint.resume()
        endpoint.pause()
        other.sendall(b"x")
        await asyncio.sleep(0.02)
        assert not reads
        assert not errors
        reset(other)
        await until(lambda: bool(errors))
        await asyncio.sleep(0.02)
        assert len(errors) == 1
        endpoint.resume()  # what came before the reset can still be read
        await until(lambda: bool(reads))

    run(talk)


def test_a_failed_send_is_told_and_drops_what_was_pending():
    errors = []

    async def talk(endpoint, other):
        endpoint.attach(nothing, nothing, errors.append)
        endpoint.send(bytes(20_000_000))
        assert endpoint.pending_bytes
        reset(other)
        await until(lambda: bool(errors))
        assert not endpoint.pending_bytes

    run(talk)


def test_reset_sends_rst():
    async def talk(endpoint, other):
        endpoint.reset()
        with pytest.raises(ConnectionResetError):
            other.recv(1)

    run(talk)

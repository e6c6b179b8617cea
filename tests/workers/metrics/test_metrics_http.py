"""Who is answered what at the metrics socket: requests alone, then real connections."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from workers.metrics import server as server_module
from workers.metrics.http_answer import Answer, answer, is_own
from workers.metrics.server import MAX_CLIENTS, MAX_HEAD_BYTES, MetricsServer

NAMES = frozenset({"localhost", "box"})
GET = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9464\r\n\r\n"


def render(accept: str) -> tuple[str, bytes]:
    return "text/plain", f"figures for {accept}\n".encode()


def ask(head: bytes) -> tuple[int, bytes, bytes]:
    """Status, header, body."""
    found = answer(head, NAMES, render)
    header, _, body = found.response.partition(b"\r\n\r\n")
    assert header.startswith(f"HTTP/1.1 {found.status.value} ".encode())
    return found.status.value, header, body


def request(line: str, *fields: str) -> bytes:
    return "\r\n".join([line, *fields, "", ""]).encode()


def test_metrics_are_given_in_the_format_that_is_accepted():
    status, header, body = ask(
        request("GET /metrics HTTP/1.1", "hOST:  box:9464 ", "Accept: a/b", "accept:c/d")
    )
    assert (status, body) == (200, b"figures for a/b,c/d\n")
    assert b"Content-Length: %d" % len(body) in header
    assert b"Connection: close" in header


def test_head_has_the_length_and_no_body():
    _, header, body = ask(request("HEAD /metrics HTTP/1.1", "Host: [::1]:9464"))
    assert body == b""
    assert b"Content-Length: 13" in header


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("GET / HTTP/1.1", 200, b"at /metrics"),
        ("GET /metrics?name[]=x HTTP/1.1", 200, b"figures"),
        ("GET /metricsx HTTP/1.1", 404, b"only /metrics"),
        ("GET http://127.0.0.1/metrics HTTP/1.1", 404, b"only /metrics"),
        ("POST /metrics HTTP/1.1", 405, b"Use GET"),
        ("OPTIONS * HTTP/1.1", 405, b"Use GET"),
        ("CONNECT evil.test:443 HTTP/1.1", 405, b"Use GET"),
        ("GET /metrics HTTP/2.0", 400, b"no HTTP/1"),
        ("GET  /metrics HTTP/1.1", 400, b"no HTTP/1"),
        ("GET /metrics", 400, b"no HTTP/1"),
        ("\x16\x03\x01", 400, b"no HTTP/1"),
    ],
)
def test_each_request_is_answered_by_its_line(line, status, says):
    found, _, body = ask(request(line, "Host: localhost"))
    assert found == status
    assert says in body


@pytest.mark.parametrize(
    "fields",
    [
        ["Host: box", "no colon"],
        ["Host: box", " folded: x"],
        ["Host : box"],
        ["Host: box", ": x"],
        ["Host: box\nX: y"],
        ["Host: box", "X: a\rb"],
        ["Host: box", "X: a\0b"],
        [],
        ["Host: box", "Host: box"],
        ["Host: box", "host: localhost"],
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(fields):
    assert ask(request("GET /metrics HTTP/1.1", *fields))[0] == 400


def test_host_is_not_needed_in_http_1_0_and_is_looked_at_when_it_is_there():
    assert ask(request("GET /metrics HTTP/1.0"))[0] == 200
    assert ask(request("GET /metrics HTTP/1.0", "Host: evil.test"))[0] == 421


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "192.0.2.7:80", "[::1]", "[fd00::1]:9464", "LocalHost:1", "box.", "BOX:", "box"],
)
def test_own_hosts(host):
    assert is_own(host, NAMES)


@pytest.mark.parametrize(
    "host",
    [
        *("", "evil.test", "box.evil.test", "localhost.evil.test:9464", "evilbox", "box..", "."),
        *("127.0.0.1.evil.test", "127.1", "0x7f000001", "1.2.3.4.5", "[evil]", "[::1", "::1"),
        *("evil@127.0.0.1", "127.0.0.1/x", "127.0.0.1, evil.test", "127.0.0.1:80:80", "[::1]x"),
        *("127.0.0.1:http", "[127.0.0.1]", "::1]", "localhost evil"),
    ],
)
def test_foreign_hosts_are_misdirected(host):
    """A page elsewhere whose name leads here (DNS rebinding) can send no other than its own."""
    assert not is_own(host, NAMES)
    found = ask(request("GET /metrics HTTP/1.1", f"Host: {host}"))
    assert found[0] == 421
    assert b"figures" not in found[2]


def test_long_lines_of_any_kind_take_no_time():
    began = time.monotonic()
    for piece in (" ", "\t", "a", "a.", ":", "[", "0", "\xff"):
        filler = piece * (MAX_HEAD_BYTES // len(piece))
        for fields in ([f"Host:{filler}\n"], ["Host: box", f"{filler}"], [f"Host: {filler}]"]):
            ask(request("GET /metrics HTTP/1.1", *fields))
        ask(request(f"GET {filler} HTTP/1.1", "Host: box"))
        ask(request(f"{filler} /metrics HTTP/1.1", "Host: box"))
    assert time.monotonic() - began < 5


@given(st.binary(max_size=300))
def test_whatever_comes_has_an_answer(data):
    status, _, body = ask(data + b"\r\n\r\n")
    assert status in (200, 400, 404, 405, 421)
    assert body


# -- connections --


class Serving:
    """A server on loopback, and what it has counted."""

    def __init__(self, address: tuple[str, int], counters: dict[str, int]) -> None:
        self.address = address
        self.counters = counters

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address)

    async def ask(self, data: bytes = GET) -> bytes:
        reader, writer = await self.open()
        writer.write(data)
        with contextlib.suppress(OSError):
            await writer.drain()
        found = b""
        with contextlib.suppress(OSError):
            found = await reader.read(-1)
        writer.close()
        return found

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)


def serve(
    work: Callable[[Serving, MetricsServer], Awaitable[None]],
    answered: Callable[[bytes], Answer] | None = None,
) -> None:
    async def main() -> None:
        counters: dict[str, int] = {}
        faults: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
        listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        server = MetricsServer(
            listening, answered or (lambda head: answer(head, NAMES, render)), counters
        )
        address = listening.getsockname()
        await server.start()
        try:
            await work(Serving(address, counters), server)
        finally:
            server.stop_accepting()
            await server.finish(0)
        # Nothing is left of it.
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait(left, timeout=5) if left else None
        assert faults == []

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_a_request_is_answered_and_the_connection_ends():
    async def work(serving: Serving, _server: MetricsServer) -> None:
        assert (await serving.ask()).endswith(b"figures for \n")
        await serving.until(lambda: serving.counters["clients_now"] == 0)
        assert serving.counters["answered"] == 1

    serve(work)


def test_request_that_is_too_long_is_told_so_though_more_of_it_comes():
    async def work(serving: Serving, _server: MetricsServer) -> None:
        found = await serving.ask(b"GET /" + b"a" * (MAX_HEAD_BYTES + 30_000))
        assert found.startswith(b"HTTP/1.1 431 ")
        assert serving.counters["refused"] == 1

    serve(work)


def test_request_may_come_byte_by_byte():
    async def work(serving: Serving, _server: MetricsServer) -> None:
        reader, writer = await serving.open()
        for byte in GET:
            writer.write(bytes([byte]))
            await writer.drain()
        assert b"figures" in await reader.read(-1)
        writer.close()

    serve(work)


def test_who_says_nothing_is_cut_and_disturbs_nobody(monkeypatch):
    monkeypatch.setattr(server_module, "CLIENT_SECONDS", 1.5)

    async def work(serving: Serving, _server: MetricsServer) -> None:
        silent = [await serving.open() for _ in range(5)]
        silent[0][1].write(b"GET /metrics HT")
        assert b"figures" in await serving.ask()
        for reader, writer in silent:
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read(-1) == b""
            writer.close()
        assert serving.counters["given_up"] == 5

    serve(work)


def test_two_hundred_connections_that_say_nothing_keep_nobody_out():
    async def work(serving: Serving, _server: MetricsServer) -> None:
        idle = [await serving.open() for _ in range(200)]
        await serving.until(lambda: serving.counters["given_up"] >= 200 - MAX_CLIENTS)
        assert serving.counters["clients_now"] <= MAX_CLIENTS
        for _ in range(3):
            assert b"figures" in await serving.ask()
        # The last to come are still there: the oldest were sent away.
        reader, writer = idle[-1]
        writer.write(GET)
        assert b"figures" in await reader.read(-1)
        for _, writer in idle:
            writer.close()

    serve(work)


def test_who_does_not_read_is_cut(monkeypatch):
    monkeypatch.setattr(server_module, "CLIENT_SECONDS", 0.5)
    large = Answer(answer(GET, NAMES, render).status, b"x" * (64 << 20))

    async def work(serving: Serving, _server: MetricsServer) -> None:
        with socket.create_connection(serving.address) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            end.sendall(GET)
            await serving.until(lambda: serving.counters["given_up"] == 1)
        assert serving.counters["clients_now"] == 0

    serve(work, lambda _head: large)


def test_server_that_finishes_takes_nobody_new_and_answers_whom_it_has():
    async def work(serving: Serving, server: MetricsServer) -> None:
        reader, writer = await serving.open()
        await serving.until(lambda: serving.counters["clients_now"] == 1)
        server.stop_accepting()
        finishing = asyncio.create_task(server.finish(10))
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await serving.open()
        writer.write(GET)
        assert b"figures" in await reader.read(-1)
        writer.close()
        await asyncio.wait_for(finishing, 5)

    serve(work)


@pytest.mark.parametrize("turns", range(6))
def test_connection_that_comes_as_the_server_finishes_is_answered_or_left_to_a_successor(turns):
    async def main() -> None:
        counters: dict[str, int] = {}
        with contextlib.ExitStack() as closing:
            listening = socket.create_server(("127.0.0.1", 0))
            successors = closing.enter_context(listening.dup())
            successors.setblocking(False)
            server = MetricsServer(listening, lambda head: answer(head, NAMES, render), counters)
            await server.start()
            client = closing.enter_context(socket.create_connection(successors.getsockname()))
            client.sendall(GET)
            client.shutdown(socket.SHUT_WR)
            for _ in range(turns):
                await asyncio.sleep(0)
            server.stop_accepting()
            await server.finish(10)
            # At once: the process ends here.
            left = 0
            with contextlib.suppress(BlockingIOError):
                successors.accept()[0].close()
                left = 1
        assert counters["answered"] + left == 1

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())

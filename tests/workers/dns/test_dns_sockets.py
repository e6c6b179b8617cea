"""UDP and TCP servers on loopback, with fake proxies and upstream servers behind them."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from dns_fakes import (
    FakeNames,
    FakeUpstreams,
    ask_udp,
    connect_tcp,
    forwarded_answer,
    frame,
    has_ipv6_loopback,
    make_network,
    make_query,
    read_frame,
    run,
    unchecked,
    wait_until,
)
from dnslib import DNSRecord

from ipc.messages import NameOutcome
from workers.dns.service import DnsService, Limits
from workers.dns.tally import Tally
from workers.dns.tcp import TcpLimits, TcpServer
from workers.dns.udp import BATCH, UdpServer

NAME = "pg.root.example.test"
FOREIGN = "www.example.test"


class Front:
    """Both servers on one service; `udp` and `tcp` are their ports."""

    def __init__(self, limits: Limits | None, tcp_limits: TcpLimits | None, address: str) -> None:
        self.names = FakeNames()
        self.names.give(NAME, "100.64.0.7")
        self.upstreams = FakeUpstreams()
        self.counters: dict[str, int] = {}
        tally = Tally(self.counters)
        self.service = DnsService(make_network(), 10, self.names, self.upstreams, tally, limits)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        datagrams.bind((address, 0))
        datagrams.setblocking(False)
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        self.udp: int = datagrams.getsockname()[1]
        self.tcp: int = listener.getsockname()[1]
        self.udp_server = UdpServer(datagrams, self.service, unchecked(tally), tally)
        self.tcp_server = TcpServer(listener, self.service, unchecked(tally), tally, tcp_limits)


@contextlib.asynccontextmanager
async def serving(
    limits: Limits | None = None,
    tcp_limits: TcpLimits | None = None,
    address: str = "127.0.0.1",
) -> AsyncIterator[Front]:
    front = Front(limits, tcp_limits, address)
    front.udp_server.start()
    await front.tcp_server.start()
    try:
        yield front
    finally:
        front.udp_server.close()
        await front.tcp_server.close()
        front.service.close()
        await wait_until(lambda: front.counters["in_flight_now"] == 0)
        assert front.counters["tcp_connections_now"] == 0


def first_address(data: bytes) -> str:
    return str(DNSRecord.parse(data).rr[0].rdata)


def test_udp_answers_own_and_foreign_names() -> None:
    async def main() -> None:
        async with serving() as front:
            for id_ in (1, 2):
                own = await ask_udp(front.udp, make_query(NAME, id_=id_))
                assert (own[:2], first_address(own)) == (bytes([0, id_]), "100.64.0.7")
            foreign = make_query(FOREIGN)
            assert await ask_udp(front.udp, foreign) == forwarded_answer(foreign)
            assert front.counters["cache_hits"] == 1
            await wait_until(lambda: front.counters["latency_count"] == 3)

    run(main())


def test_name_that_nothing_has_is_nxdomain_over_udp_and_tcp() -> None:
    async def main() -> None:
        async with serving() as front:
            name = "orders.db.root.example.test"
            front.names.set_outcome(name, NameOutcome.NO_SUCH_NAME, valid_seconds=60)
            reader, writer = await connect_tcp(front.tcp)
            for id_ in (1, 2):
                query = make_query(name, id_=id_)
                writer.write(frame(query))
                for data in (await ask_udp(front.udp, query), await read_frame(reader)):
                    record = DNSRecord.parse(data)
                    assert (record.header.id, record.header.rcode, record.rr) == (id_, 3, [])
                    assert str(record.auth[0].rname) == "db.root.example.test."
            writer.close()
            assert front.upstreams.asked == []

    run(main())


@pytest.mark.skipif(not has_ipv6_loopback(), reason="no IPv6 loopback address here")
def test_udp_answers_over_ipv6() -> None:
    async def main() -> None:
        async with serving(address="::1") as front:
            for name in (NAME, NAME, FOREIGN):
                assert first_address(await ask_udp(front.udp, make_query(name), "::1"))

    run(main())


@pytest.mark.parametrize("data", [bytes(4), b"\1\2\1\0" + bytes(5000)])
def test_udp_answers_broken_messages(data: bytes) -> None:
    async def main() -> None:
        async with serving() as front:
            answer = await ask_udp(front.udp, data)
            assert (answer[:2], answer[3] & 15) == (data[:2], 1)

    run(main())


def test_more_datagrams_than_a_batch_are_all_answered() -> None:
    async def main() -> None:
        async with serving() as front:
            loop = asyncio.get_running_loop()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.connect(("127.0.0.1", front.udp))
                wanted = {bytes([1, n]) for n in range(2 * BATCH)}
                for id_ in wanted:
                    sock.send(make_query(NAME, id_=int.from_bytes(id_)))
                got = {(await loop.sock_recv(sock, 512))[:2] for _ in wanted}
            assert got == wanted
            assert front.names.asked.count(NAME) >= 1

    run(main())


def test_udp_answers_when_too_much_is_under_way() -> None:
    async def main() -> None:
        async with serving(Limits(in_flight=1)) as front:
            front.upstreams.gate = asyncio.Event()
            held = asyncio.ensure_future(ask_udp(front.udp, make_query(FOREIGN)))
            await wait_until(lambda: front.counters["in_flight_now"] == 1)
            answer = await ask_udp(front.udp, make_query("other.example.test"))
            assert DNSRecord.parse(answer).header.rcode == 2
            front.upstreams.gate.set()
            await held

    run(main())


def test_answer_that_cannot_be_sent_is_counted() -> None:
    async def main() -> None:
        async with serving() as front:
            front.udp_server._send(bytes(70000), ("127.0.0.1", 9))
            assert front.counters["send_failures"] == 1
            front.udp_server.close()
            front.udp_server._send(b"late", ("127.0.0.1", 9))
            assert front.counters["send_failures"] == 2

    run(main())


def test_tcp_answers_several_questions_on_one_connection_as_they_become_ready() -> None:
    async def main() -> None:
        async with serving() as front:
            front.upstreams.gate = asyncio.Event()
            reader, writer = await connect_tcp(front.tcp)
            slow, quick = make_query(FOREIGN, id_=1), make_query(NAME, id_=2)
            writer.write(frame(slow) + frame(quick))
            assert (await read_frame(reader))[:2] == b"\0\2"
            front.upstreams.gate.set()
            assert await read_frame(reader) == forwarded_answer(slow)
            writer.close()

    run(main())


def test_tcp_message_may_arrive_byte_by_byte() -> None:
    async def main() -> None:
        async with serving() as front:
            reader, writer = await connect_tcp(front.tcp)
            for byte in frame(make_query(NAME)):
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            assert first_address(await read_frame(reader)) == "100.64.0.7"
            writer.close()

    run(main())


def test_tcp_client_that_half_closes_still_gets_its_answers() -> None:
    async def main() -> None:
        async with serving() as front:
            front.upstreams.gate = asyncio.Event()
            reader, writer = await connect_tcp(front.tcp)
            writer.write(frame(make_query(FOREIGN)))
            writer.write_eof()
            await wait_until(lambda: bool(front.upstreams.asked))
            front.upstreams.gate.set()
            assert await read_frame(reader) == forwarded_answer(make_query(FOREIGN))
            assert await reader.read() == b""
            writer.close()

    run(main())


def test_tcp_broken_message_is_answered_and_the_connection_goes_on() -> None:
    async def main() -> None:
        async with serving() as front:
            reader, writer = await connect_tcp(front.tcp)
            writer.write(frame(bytes(5000)) + frame(b"") + frame(make_query(NAME)))
            assert (await read_frame(reader))[3] & 15 == 1
            assert first_address(await read_frame(reader)) == "100.64.0.7"
            writer.close()

    run(main())


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\x20abc"])
def test_idle_tcp_connection_is_closed(sent: bytes) -> None:
    async def main() -> None:
        async with serving(tcp_limits=TcpLimits(idle_seconds=0.05)) as front:
            reader, writer = await connect_tcp(front.tcp)
            writer.write(sent)
            with contextlib.suppress(ConnectionResetError):  # what is sent may come too late
                assert await reader.read() == b""
            writer.close()

    run(main())


def test_questions_under_way_on_one_connection_are_bounded() -> None:
    async def main() -> None:
        async with serving(tcp_limits=TcpLimits(questions=3)) as front:
            front.upstreams.gate = asyncio.Event()
            reader, writer = await connect_tcp(front.tcp)
            for number in range(10):
                writer.write(frame(make_query(f"n{number}.test", id_=number)))
            await wait_until(lambda: len(front.upstreams.asked) == 3)
            await ask_udp(front.udp, make_query(NAME))
            assert len(front.upstreams.asked) == 3
            front.upstreams.gate.set()
            ids = {(await read_frame(reader))[1] for _ in range(10)}
            assert ids == set(range(10))
            writer.close()

    run(main())


def test_idle_connection_makes_room_for_a_new_one() -> None:
    async def main() -> None:
        async with serving(tcp_limits=TcpLimits(connections=2)) as front:
            first, second, third = [await connect_tcp(front.tcp) for _ in range(3)]
            assert await first[0].read() == b""
            for reader, writer in (second, third):
                writer.write(frame(make_query(NAME)))
                assert first_address(await read_frame(reader)) == "100.64.0.7"
            for _, writer in (first, second, third):
                writer.close()

    run(main())


def test_busy_connections_are_not_given_up_for_a_new_one() -> None:
    async def main() -> None:
        async with serving(tcp_limits=TcpLimits(connections=1)) as front:
            front.upstreams.gate = asyncio.Event()
            reader, writer = await connect_tcp(front.tcp)
            writer.write(frame(make_query(FOREIGN)))
            await wait_until(lambda: bool(front.upstreams.asked))
            other, other_writer = await connect_tcp(front.tcp)
            with contextlib.suppress(ConnectionResetError):
                assert await other.read() == b""
            assert front.counters["overloads"] == 1
            front.upstreams.gate.set()
            assert await read_frame(reader) == forwarded_answer(make_query(FOREIGN))
            writer.close()
            other_writer.close()

    run(main())


def test_client_that_does_not_read_is_cut_off_and_little_is_kept_for_it() -> None:
    async def main() -> None:
        async with serving(tcp_limits=TcpLimits(write_seconds=0.1)) as front:
            front.upstreams.respond = lambda data: forwarded_answer(data) + bytes(60000)
            loop = asyncio.get_running_loop()
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.setblocking(False)
                await loop.sock_connect(sock, ("127.0.0.1", front.tcp))
                with contextlib.suppress(ConnectionError):
                    for _ in range(400):
                        await loop.sock_sendall(sock, frame(make_query(FOREIGN)))
                await wait_until(lambda: front.counters["tcp_connections_now"] == 0)
            # Socket buffers of the kernel (a few megabytes at most) and our own bound.
            assert len(front.upstreams.asked) < 200

    run(main())


def test_client_that_goes_away_leaves_nothing() -> None:
    async def main() -> None:
        async with serving() as front:
            front.upstreams.gate = asyncio.Event()
            _, writer = await connect_tcp(front.tcp)
            writer.write(frame(make_query(FOREIGN)))
            await wait_until(lambda: bool(front.upstreams.asked))
            writer.transport.abort()
            front.upstreams.gate.set()
            await wait_until(lambda: front.counters["tcp_connections_now"] == 0)

    run(main())


# -- handing over to a successor that has the same sockets --


def test_answers_to_what_was_read_leave_after_reading_has_stopped() -> None:
    async def main() -> None:
        async with serving() as front:
            front.upstreams.gate = asyncio.Event()
            early = asyncio.ensure_future(ask_udp(front.udp, make_query(FOREIGN)))
            await wait_until(lambda: bool(front.upstreams.asked))
            front.udp_server.stop_reading()
            late = asyncio.ensure_future(ask_udp(front.udp, make_query(NAME)))
            front.upstreams.gate.set()
            assert await early == forwarded_answer(make_query(FOREIGN))
            await asyncio.wait_for(front.service.finished(), 5)
            assert front.counters["queries"] == 1
            front.udp_server.start()  # as the successor does
            assert first_address(await late) == "100.64.0.7"

    run(main())


def test_tcp_connections_end_with_the_answers_to_what_they_have_asked() -> None:
    async def main() -> None:
        async with serving() as front:
            front.upstreams.gate = asyncio.Event()
            idle, busy, new = [await connect_tcp(front.tcp) for _ in range(3)]
            idle[1].write(frame(make_query(NAME)))
            await read_frame(idle[0])
            busy[1].write(frame(make_query(FOREIGN)))
            await wait_until(lambda: bool(front.upstreams.asked))
            front.tcp_server.stop_accepting()
            ended = asyncio.ensure_future(front.tcp_server.finished())
            assert await idle[0].read() == b""
            new[1].write(frame(make_query(NAME)))
            assert first_address(await read_frame(new[0])) == "100.64.0.7"
            assert await new[0].read() == b""
            assert not ended.done()
            front.upstreams.gate.set()
            assert await read_frame(busy[0]) == forwarded_answer(make_query(FOREIGN))
            assert await busy[0].read() == b""
            await asyncio.wait_for(ended, 5)
            for _, writer in (idle, busy, new):
                writer.close()

    run(main())


def test_question_of_which_a_part_has_come_is_answered() -> None:
    async def main() -> None:
        async with serving() as front:
            reader, writer = await connect_tcp(front.tcp)
            writer.write(frame(make_query(NAME)))
            await read_frame(reader)
            query = frame(make_query(NAME))
            writer.write(query[:7])
            connection = next(iter(front.tcp_server._connections))
            await wait_until(lambda: connection._idling is None)
            front.tcp_server.stop_accepting()
            writer.write(query[7:])
            assert first_address(await read_frame(reader)) == "100.64.0.7"
            assert await reader.read() == b""
            writer.close()

    run(main())


@pytest.mark.parametrize("turns", range(7))
def test_connection_that_is_just_accepted_is_served_or_left_to_the_successor(turns: int) -> None:
    async def main() -> None:
        async with serving() as front:
            with (
                front.tcp_server._socket.dup() as successor,
                socket.create_connection(("127.0.0.1", front.tcp)) as client,
            ):
                successor.setblocking(False)
                client.sendall(frame(make_query(NAME)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                front.tcp_server.stop_accepting()
                await front.tcp_server.finished()
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    assert first_address(client.recv(4096)[2:]) == "100.64.0.7"
                    return
                successor.accept()[0].close()

    run(main())


def test_no_query_is_lost_while_one_server_follows_the_other() -> None:
    """Two services on copies of the same sockets, as two processes have them."""

    async def main() -> None:
        async with serving() as front:
            udp = socket.socket(fileno=front.udp_server._socket.dup().detach())
            tcp = socket.socket(fileno=front.tcp_server._socket.dup().detach())
            tally = Tally({})
            service = DnsService(make_network(), 10, front.names, front.upstreams, tally)
            askers = unchecked(tally)
            successor = (
                UdpServer(udp, service, askers, tally),
                TcpServer(tcp, service, askers, tally),
            )
            stopping, answered = asyncio.Event(), 0

            async def ask(number: int) -> None:
                nonlocal answered
                while not stopping.is_set():
                    query = make_query(FOREIGN if number % 2 else NAME)
                    if number < 4:
                        answer = await ask_udp(front.udp, query)
                    else:
                        reader, writer = await connect_tcp(front.tcp)
                        writer.write(frame(query))
                        answer = await read_frame(reader)
                        writer.close()
                    assert first_address(answer)
                    answered += 1

            asking = [asyncio.ensure_future(ask(number)) for number in range(8)]
            await wait_until(lambda: answered > 200)
            front.udp_server.stop_reading()
            front.tcp_server.stop_accepting()
            successor[0].start()
            await successor[1].start()
            await front.tcp_server.finished()
            await front.service.finished()
            before = answered
            await wait_until(lambda: answered > before + 200)
            stopping.set()
            await asyncio.gather(*asking)
            assert tally.counters["queries"] >= 200
            successor[0].close()
            await successor[1].close()

    run(main())

"""Forwarding to real sockets on loopback."""

import asyncio
import socket
from ipaddress import ip_address

import pytest
from dns_fakes import (
    FakeServer,
    forwarded_answer,
    has_ipv6_loopback,
    make_query,
    run,
    wait_until,
)
from dnslib import DNSRecord

from workers.dns.message import Rcode, parse, refuse
from workers.dns.race import Patience
from workers.dns.servers import Server
from workers.dns.tally import Tally
from workers.dns.upstream import MAX_MISMATCHES, Forwarder

QUERY = parse(make_query("www.example.test", id_=4242, edns=1232))
QUICK = Patience(total_seconds=2.0, retry_seconds=0.1, grace_seconds=0.3)


def make_forwarder(*servers: Server, patience: Patience = QUICK, **more: int) -> Forwarder:
    forwarder = Forwarder(Tally({}), patience=patience, **more)
    forwarder.servers = servers
    return forwarder


def good(data: bytes, _transport: str) -> list[bytes]:
    return [forwarded_answer(data)]


def refusing(rcode: Rcode):
    return lambda data, _transport: [refuse(parse(data), rcode)]


def silent(_data: bytes, _transport: str) -> list[bytes]:
    return []


def truncated(data: bytes, transport: str) -> list[bytes]:
    answer = forwarded_answer(data)
    return [answer if transport == "tcp" else answer[:2] + bytes([answer[2] | 2]) + answer[3:]]


def test_question_and_answer_travel_byte_for_byte_but_for_the_id() -> None:
    async def main() -> None:
        async with FakeServer(good) as fake:
            forwarder = make_forwarder(fake.server)
            answer = await forwarder.forward(QUERY, over_tcp=False)
            assert answer == forwarded_answer(QUERY.data)
            assert fake.received[0][0][2:] == QUERY.data[2:]
            assert forwarder._open_sockets == 0

    run(main())


def test_ids_and_source_ports_towards_upstream_differ_from_query_to_query() -> None:
    async def main() -> None:
        async with FakeServer(good) as fake:
            forwarder = make_forwarder(fake.server)
            for _ in range(30):
                await forwarder.forward(QUERY, over_tcp=False)
            assert len({data[:2] for data, _, _ in fake.received}) > 25
            assert len({port for _, _, port in fake.received}) > 20

    run(main())


def test_good_answer_wins_over_faster_bad_ones() -> None:
    async def main() -> None:
        bad = FakeServer(refusing(Rcode.SERVFAIL))
        async with bad, FakeServer(refusing(Rcode.REFUSED)) as worse, FakeServer(good) as fake:
            forwarder = make_forwarder(bad.server, worse.server, fake.server)
            assert await forwarder.forward(QUERY, over_tcp=False) == forwarded_answer(QUERY.data)

    run(main())


def test_bad_answer_is_passed_on_when_there_is_no_other() -> None:
    async def main() -> None:
        async with FakeServer(refusing(Rcode.REFUSED)) as fake:
            answer = await make_forwarder(fake.server).forward(QUERY, over_tcp=False)
            assert answer is not None
            assert DNSRecord.parse(answer).header.rcode == Rcode.REFUSED
            assert answer[:2] == QUERY.data[:2]

    run(main())


def test_lost_datagram_is_sent_again_from_a_fresh_socket() -> None:
    async def main() -> None:
        def second_time(data: bytes, _transport: str) -> list[bytes]:
            return [forwarded_answer(data)] if len(fake.received) > 1 else []

        async with FakeServer(second_time) as fake:
            answer = await make_forwarder(fake.server).forward(QUERY, over_tcp=False)
            assert answer is not None
            (first, _, first_port), (second, _, second_port) = fake.received
            assert first_port != second_port
            assert first[2:] == second[2:]

    run(main())


def test_forged_answers_are_not_taken() -> None:
    async def main() -> None:
        def forge(data: bytes, _transport: str) -> list[bytes]:
            wrong_id = bytes([data[0] ^ 1]) + forwarded_answer(data)[1:]
            other = data.replace(b"www", b"wwx")
            return [wrong_id, forwarded_answer(other), data, b"", forwarded_answer(data)]

        async with FakeServer(forge) as fake:
            forwarder = make_forwarder(fake.server)
            assert await forwarder.forward(QUERY, over_tcp=False) == forwarded_answer(QUERY.data)
            assert forwarder._tally.counters["upstream_mismatches"] == 4

    run(main())


def test_flood_of_forged_answers_ends_the_try() -> None:
    async def main() -> None:
        def flood(data: bytes, _transport: str) -> list[bytes]:
            return [b"\0" * 12] * MAX_MISMATCHES + [forwarded_answer(data)]

        async with FakeServer(flood) as fake:
            forwarder = make_forwarder(fake.server)
            assert await forwarder.forward(QUERY, over_tcp=False) is None
            assert forwarder._tally.counters["upstream_failures"] == 1

    run(main())


def test_silence_ends_after_the_total_time_without_leaving_sockets() -> None:
    async def main() -> None:
        async with FakeServer(silent) as fake:
            patience = Patience(total_seconds=1.5, retry_seconds=0.1, grace_seconds=0.1)
            forwarder = make_forwarder(fake.server, patience=patience)
            assert await forwarder.forward(QUERY, over_tcp=False) is None
            assert len(fake.received) == 2
            assert forwarder._open_sockets == 0

    run(main())


def test_port_where_nobody_listens_is_given_up_early() -> None:
    async def main() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        patience = Patience(total_seconds=25, retry_seconds=0.05)
        forwarder = make_forwarder(Server(ip_address("127.0.0.1"), port, ""), patience=patience)
        assert await forwarder.forward(QUERY, over_tcp=False) is None
        assert forwarder._open_sockets == 0

    run(main())


@pytest.mark.parametrize("scope", ["", "no-such-interface"])
def test_no_usable_server_is_no_answer(scope: str) -> None:
    servers = [Server(ip_address("fe80::1"), 53, scope)] if scope else []
    forwarder = make_forwarder(*servers)
    assert run(forwarder.forward(QUERY, over_tcp=False)) is None


def test_truncated_answer_is_asked_for_again_over_tcp_for_a_tcp_client() -> None:
    async def main() -> None:
        async with FakeServer(truncated) as fake:
            forwarder = make_forwarder(fake.server)
            answer = await forwarder.forward(QUERY, over_tcp=True)
            assert answer == forwarded_answer(QUERY.data)
            assert [transport for _, transport, _ in fake.received] == ["udp", "tcp"]
            assert forwarder._open_sockets == 0

    run(main())


@pytest.mark.skipif(not has_ipv6_loopback(), reason="no IPv6 loopback address here")
def test_ipv6_server_is_asked_over_udp_and_tcp() -> None:
    async def main() -> None:
        async with FakeServer(truncated, "::1") as fake:
            answer = await make_forwarder(fake.server).forward(QUERY, over_tcp=True)
            assert answer == forwarded_answer(QUERY.data)
            assert [transport for _, transport, _ in fake.received] == ["udp", "tcp"]

    run(main())


def test_truncated_answer_is_passed_on_to_a_udp_client() -> None:
    async def main() -> None:
        async with FakeServer(truncated) as fake:
            answer = await make_forwarder(fake.server).forward(QUERY, over_tcp=False)
            assert answer is not None
            assert DNSRecord.parse(answer).header.tc == 1
            assert [transport for _, transport, _ in fake.received] == ["udp"]

    run(main())


def test_broken_tcp_answer_is_none_and_the_next_server_is_asked() -> None:
    async def main() -> None:
        def broken(data: bytes, transport: str) -> list[bytes]:
            return [b"\0" * 12] if transport == "tcp" else truncated(data, transport)

        async with FakeServer(broken) as first, FakeServer(truncated) as second:
            forwarder = make_forwarder(first.server)
            assert await forwarder.forward(QUERY, over_tcp=True) is None
            forwarder = make_forwarder(first.server, second.server)
            answer = await forwarder.forward(QUERY, over_tcp=True)
            assert answer == forwarded_answer(QUERY.data)

    run(main())


def test_sockets_are_bounded_and_the_overflow_is_no_answer() -> None:
    async def main() -> None:
        async with FakeServer(silent) as fake:
            patience = Patience(total_seconds=20, retry_seconds=0.01)
            forwarder = make_forwarder(fake.server, patience=patience, max_sockets=2)
            first = asyncio.ensure_future(forwarder.forward(QUERY, over_tcp=False))
            await wait_until(lambda: forwarder._open_sockets == 2)
            assert await forwarder.forward(QUERY, over_tcp=False) is None
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            assert forwarder._open_sockets == 0

    run(main())

"""Who may know what VNet's names stand for: with a kernel that says what it is told, and with the real one."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from dns_fakes import (
    PREFIX,
    FakeNames,
    FakeUpstreams,
    frame,
    has_ipv6_loopback,
    make_network,
    make_query,
    packed,
    read_frame,
    run,
    wait_until,
)
from dnslib import DNSRecord
from msgspec.structs import replace

from ipc.messages import Access, NameOutcome
from ipc.socket_owner import UNKNOWN, Owner, SocketDiag
from workers.dns.askers import CONNECTED, Askers, End
from workers.dns.message import Query
from workers.dns.service import DnsService
from workers.dns.tally import Tally
from workers.dns.tcp import TcpServer
from workers.dns.udp import UdpServer

NAME = "pg.root.example.test"
MISSING = "orders.db.root.example.test"
FOREIGN = "www.example.test"
ALICE, RESOLVER, STRANGER = 1000, 990, 12345
ACCESS = Access(uids=[0, ALICE], user="alice", resolvers=[RESOLVER])
FORWARDED = replace(make_network(), forwarded_from=["172.30.0.0/24", "fd12::/64"])
OWN: End = ("100.64.0.2", 53)
OWN6: End = ("fd60:67ec:4325::2", 53, 0, 0)
PROGRAM: End = ("100.64.0.1", 40000)
CONTAINER: End = ("172.30.0.9", 40000)


class FakeKernel:
    """Says that every socket belongs to `uid`; None: there is no socket."""

    def __init__(self, uid: int | None) -> None:
        self.interface = 0
        self.is_closed = False
        self.uid = uid
        self.asked: list[object] = []
        self.error: OSError | None = None

    def tcp_owner(self, *ends: bytes | int, states: int) -> Owner | None:
        return self._say("tcp", *ends, states)

    def udp_owner(self, *ends: bytes | int) -> Owner | None:
        return self._say("udp", *ends)

    def close(self) -> None:
        self.is_closed = True

    def _say(self, *asked: object) -> Owner | None:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error
        return None if self.uid is None else Owner(self.uid, 7, 1)


def askers(uid: int | None, access: Access = ACCESS) -> tuple[Askers, FakeKernel, dict[str, int]]:
    counters: dict[str, int] = {}
    kernel = FakeKernel(uid)
    return Askers(FORWARDED, access, kernel, Tally(counters)), kernel, counters


WHO = {
    "the vnet user": (ALICE, PROGRAM, True),
    "root": (0, PROGRAM, True),
    "the resolver": (RESOLVER, PROGRAM, True),
    "a stranger": (STRANGER, PROGRAM, False),
    "who cannot be told": (UNKNOWN, PROGRAM, False),
    "no socket": (None, PROGRAM, False),
    "a container": (None, CONTAINER, True),
    "a container, ipv6": (None, ("fd12::9", 40000, 0, 0), True),
    "beside the listed network": (None, ("172.30.1.9", 40000), False),
    "ipv6 that begins like a listed network": (None, ("ac1e::9", 40000, 0, 0), False),
    "a stranger who has an address of the container's network": (STRANGER, CONTAINER, False),
    "the vnet user there": (ALICE, CONTAINER, True),
    "who cannot be told there": (UNKNOWN, CONTAINER, False),
}


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_who_may_know(who: str, kind: str) -> None:
    uid, peer, may = WHO[who]
    found, kernel, counters = askers(uid)
    own = OWN6 if ":" in peer[0] else OWN
    asker = (found.of_datagram if kind == "udp" else found.of_connection)(peer, own)
    assert asker() is may
    ends = (packed(peer[0]), peer[1], packed(own[0]), 53)
    assert kernel.asked == [("udp", *ends) if kind == "udp" else ("tcp", *ends, CONNECTED)]
    assert counters["refused_users"] == (not may)


@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_what_the_kernel_does_not_say_is_refused(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    found, kernel, _ = askers(None)
    kernel.error = OSError(errno.EBADF, "Bad file descriptor")
    # Also where a socket is not needed.
    asker = (found.of_datagram if kind == "udp" else found.of_connection)(CONTAINER, OWN)
    assert not asker()
    assert "Bad file descriptor" in caplog.text


def test_without_a_kernel_to_ask_nobody_may_know() -> None:
    found = Askers(FORWARDED, ACCESS, None, Tally({}))
    assert not found.of_datagram(PROGRAM, OWN)()
    assert not found.of_connection(CONTAINER, OWN)()
    found, kernel, _ = askers(ALICE, replace(ACCESS, can_tell=False))
    assert not found.of_datagram(PROGRAM, OWN)()
    assert kernel.asked == []


def test_where_nothing_is_checked_everybody_may_know_and_the_kernel_is_left_alone() -> None:
    found, kernel, _ = askers(STRANGER, replace(ACCESS, is_checked=False))
    connection = found.of_connection(PROGRAM, OWN)
    assert connection()
    assert found.of_datagram(PROGRAM, OWN)()
    assert kernel.asked == []
    # A connection of that time stays unknown.
    found.change_access(ACCESS)
    assert not connection()


def test_changed_access_and_networks_hold_for_open_connections() -> None:
    found, kernel, _ = askers(STRANGER)
    connection = found.of_connection(PROGRAM, OWN)
    assert not connection()
    found.change_access(replace(ACCESS, uids=[STRANGER]))
    assert connection()
    assert len(kernel.asked) == 1
    found.change_access(replace(ACCESS, interface=7))
    assert kernel.interface == 7
    assert not connection()
    kernel.uid = None
    connection = found.of_connection(CONTAINER, OWN)
    assert connection()
    found.change_network(make_network())
    assert not connection()


def test_rewritten_packets_are_looked_for_as_the_program_sent_them() -> None:
    found, kernel, _ = askers(ALICE)
    rewritten: list[tuple[End, bytes, bytes]] = [
        (OWN, packed("100.64.0.1"), packed("100.64.0.2")),
        (OWN6, PREFIX[:15] + b"\1", PREFIX[:15] + b"\2"),
    ]
    for (address, *_), program, server in rewritten:
        peer, own = (address, 40000), ("100.64.0.1", 33333)
        assert found.of_datagram(peer, own)()
        assert kernel.asked.pop() == ("udp", program, 40000, server, 53)
        assert found.of_connection(peer, own)()
        assert kernel.asked.pop() == ("tcp", program, 40000, server, 53, CONNECTED)


def test_refusals_are_told_once_for_each_user(caplog: pytest.LogCaptureFixture) -> None:
    found, kernel, counters = askers(STRANGER)
    with caplog.at_level(logging.WARNING):
        for uid in (STRANGER, STRANGER, 7, STRANGER, None, UNKNOWN):
            kernel.uid = uid
            assert not found.of_datagram(PROGRAM, OWN)()
    assert counters["refused_users"] == 6
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4
    assert "uid 12345; only alice, root" in told[0]
    assert "100.64.0.1 port 40000" in told[0]
    assert "allow_forwarded_from" in told[2]


# -- which answers --


class Setup:
    """A service whose asker may know nothing until `may` is set; `looked` counts the looks."""

    def __init__(self) -> None:
        self.names = FakeNames()
        self.names.give(NAME, "100.64.0.7")
        self.names.set_outcome(MISSING, NameOutcome.NO_SUCH_NAME, 60)
        self.names.set_outcome("broken.example.test", NameOutcome.FAILED, 60)
        self.counters: dict[str, int] = {}
        tally = Tally(self.counters)
        self.service = DnsService(make_network(), 10, self.names, FakeUpstreams(), tally)
        self.may = False
        self.looked = 0

    def may_know(self) -> bool:
        self.looked += 1
        return self.may

    async def ask(self, data: bytes) -> bytes:
        reply = self.service.at_once(data, 1000.0, self.may_know)
        if isinstance(reply, Query):
            done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            self.service.begin(reply, self.may_know, done.set_result, over_tcp=False)
            return await done
        assert reply is not None
        return reply


OURS = [
    (NAME, "A"),
    (NAME, "AAAA"),
    (NAME, "TXT"),
    (MISSING, "A"),
    ("7.0.64.100.in-addr.arpa", "PTR"),
    ("8.0.64.100.in-addr.arpa", "PTR"),
    ("64.100.in-addr.arpa", "SOA"),
    ("x.0.64.100.in-addr.arpa", "PTR"),
]
OTHERS = [
    (FOREIGN, "A", 0),
    ("vnet-diag-0123.example.test", "A", 0),
    ("broken.example.test", "A", 2),
    (NAME, "AXFR", 5),
]


@pytest.mark.parametrize("edns", [None, 1232])
@pytest.mark.parametrize(("name", "kind"), OURS)
def test_nothing_is_told_of_our_names_and_the_next_asker_is_none_the_worse(
    name: str, kind: str, edns: int | None
) -> None:
    async def main() -> None:
        setup, plain = Setup(), Setup()
        plain.may = True
        query = make_query(name, kind, edns=edns)
        expected = await plain.ask(query)
        for number in (1, 2):
            refused = await setup.ask(query)
            record = DNSRecord.parse(refused)
            assert record.header.rcode == 5
            assert (record.rr, record.auth) == ([], [])
            assert record.q == DNSRecord.parse(query).q
            assert len(record.ar) == (edns is not None)
            assert setup.looked == number
        setup.may = True
        assert await setup.ask(query) == expected
        setup.may = False
        assert DNSRecord.parse(await setup.ask(query)).header.rcode == 5
        assert setup.counters["answers_refused"] == 3
        counted = ("answers_own", "answers_nodata", "answers_nxdomain")
        assert sum(setup.counters[counter] for counter in counted) == 1

    run(main())


@pytest.mark.parametrize(("name", "kind", "rcode"), OTHERS)
def test_everything_else_is_for_everybody(name: str, kind: str, rcode: int) -> None:
    async def main() -> None:
        setup = Setup()
        for _ in range(2):
            answer = await setup.ask(make_query(name, kind))
            assert DNSRecord.parse(answer).header.rcode == rcode
        assert setup.looked == 0

    run(main())


# -- the real kernel --


@contextlib.contextmanager
def user(uid: int) -> Iterator[None]:
    """What is made in the block belongs to another user."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


class Front:
    """Both servers at one address of loopback, with the real kernel."""

    def __init__(self, address: str, access: Access) -> None:
        self.names = FakeNames()
        self.names.give(NAME, "100.64.0.7")
        self.counters: dict[str, int] = {}
        tally = Tally(self.counters)
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.kernel = SocketDiag.open()
        self.askers = Askers(
            make_network(), access, SocketDiag(self.kernel, access.interface), tally
        )
        self.service = DnsService(make_network(), 10, self.names, FakeUpstreams(), tally)
        datagrams = socket.socket(self.family, socket.SOCK_DGRAM)
        datagrams.bind((address, 0))
        datagrams.setblocking(False)
        listener = socket.create_server((address, 0), family=self.family)
        listener.setblocking(False)
        self.udp, self.tcp = datagrams.getsockname()[:2], listener.getsockname()[:2]
        self.udp_server = UdpServer(datagrams, self.service, self.askers, tally)
        self.tcp_server = TcpServer(listener, self.service, self.askers, tally)

    def client(self, kind: socket.SocketKind, uid: int = 0) -> socket.socket:
        """A socket of this user."""
        with user(uid):
            end = socket.socket(self.family, kind)
        end.setblocking(False)
        return end

    async def ask(self, end: socket.socket, name: str = NAME) -> int:
        """The response code for one question."""
        loop = asyncio.get_running_loop()
        end.sendto(make_query(name), self.udp)
        return int(DNSRecord.parse(await loop.sock_recv(end, 4096)).header.rcode)


@contextlib.asynccontextmanager
async def serving(address: str = "127.0.0.1", access: Access = ACCESS) -> AsyncIterator[Front]:
    front = Front(address, access)
    front.udp_server.start()
    await front.tcp_server.start()
    try:
        yield front
    finally:
        front.udp_server.close()
        await front.tcp_server.close()
        front.service.close()
        front.kernel.close()


def on_loopback(function: Callable[[str], None]) -> Callable[[str], None]:
    """For both families, as far as there are both; needs other users."""
    addresses = ["127.0.0.1", *(["::1"] if has_ipv6_loopback() else [])]
    marked: Callable[[str], None] = pytest.mark.parametrize("address", addresses)(function)
    rooted: Callable[[str], None] = pytest.mark.root(marked)
    return rooted


@on_loopback
def test_datagrams_of_users_are_told_apart(address: str) -> None:
    async def main() -> None:
        async with serving(address) as front:
            for _ in range(2):  # from a proxy, then from what is remembered
                for uid, rcode in ((STRANGER, 5), (ALICE, 0), (RESOLVER, 0), (0, 0)):
                    with front.client(socket.SOCK_DGRAM, uid) as end:
                        assert await front.ask(end) == rcode
                        assert await front.ask(end, FOREIGN) == 0
                        end.connect(front.udp)
                        assert await front.ask(end) == rcode
            assert front.counters["refused_users"] == 4

    run(main())


@on_loopback
def test_resolver_that_asks_through_the_interface_is_known(address: str) -> None:
    """As systemd-resolved does for the servers of a link."""
    access = replace(ACCESS, interface=socket.if_nametoindex("lo"))

    async def main() -> None:
        async with serving(address, access) as front:
            for uid, rcode in ((RESOLVER, 0), (STRANGER, 5)):
                with front.client(socket.SOCK_DGRAM, uid) as end:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
                    assert await front.ask(end) == rcode

    run(main())


@on_loopback
def test_port_that_goes_from_user_to_user_belongs_to_the_last(address: str) -> None:
    async def main() -> None:
        async with serving(address) as front:
            with front.client(socket.SOCK_DGRAM) as end:
                end.bind((address, 0))
                port = end.getsockname()[1]
            for turn in range(50):
                uid = (ALICE, STRANGER)[turn % 2]
                with front.client(socket.SOCK_DGRAM, uid) as end:
                    end.bind((address, port))
                    assert await front.ask(end) == (0 if uid == ALICE else 5)

    run(main())


@on_loopback
def test_answer_that_comes_late_is_for_who_has_the_port_then(address: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with serving(address) as front:
            front.names.gate = asyncio.Event()
            with front.client(socket.SOCK_DGRAM, ALICE) as end:
                end.sendto(make_query(NAME), front.udp)
                port = end.getsockname()[1]
                await wait_until(lambda: bool(front.names.asked))
            with front.client(socket.SOCK_DGRAM, STRANGER) as end:
                end.bind((address, port))
                front.names.gate.set()
                answer = DNSRecord.parse(await loop.sock_recv(end, 4096))
                assert (answer.header.rcode, answer.rr) == (5, [])

    run(main())


@on_loopback
def test_connections_of_users_are_told_apart(address: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with serving(address) as front:
            for uid, rcode in ((STRANGER, 5), (ALICE, 0), (RESOLVER, 0), (STRANGER, 5)):
                end = front.client(socket.SOCK_STREAM, uid)
                await loop.sock_connect(end, front.tcp)
                reader, writer = await asyncio.open_connection(sock=end)
                for name, expected in ((NAME, rcode), (FOREIGN, 0), (NAME, rcode)):
                    writer.write(frame(make_query(name)))
                    answer = await read_frame(reader)
                    assert DNSRecord.parse(answer).header.rcode == expected
                # One that has said all it has to say still gets its answer.
                writer.write(frame(make_query(NAME)))
                writer.write_eof()
                assert DNSRecord.parse(await read_frame(reader)).header.rcode == rcode
                writer.close()
            assert front.counters["refused_users"] == 6

    run(main())


@pytest.mark.root
def test_one_that_half_closes_before_it_is_accepted_is_known() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        front = Front("127.0.0.1", ACCESS)
        front.udp_server.close()
        with front.client(socket.SOCK_STREAM, ALICE) as end:
            await loop.sock_connect(end, front.tcp)
            await loop.sock_sendall(end, frame(make_query(NAME)))
            end.shutdown(socket.SHUT_WR)
            gone = front.client(socket.SOCK_STREAM, ALICE)
            await loop.sock_connect(gone, front.tcp)
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1] + [0] * 7))
            gone.close()  # a reset, before anybody has accepted it
            await front.tcp_server.start()
            answer = await loop.sock_recv(end, 4096)
            assert DNSRecord.parse(answer[2:]).header.rcode == 0
        await wait_until(lambda: front.counters["tcp_connections_now"] == 0)
        await front.tcp_server.close()
        front.kernel.close()

    run(main())


@pytest.mark.root
def test_kernel_that_is_gone_refuses() -> None:
    async def main() -> None:
        async with serving() as front:
            with front.client(socket.SOCK_DGRAM, ALICE) as end:
                assert await front.ask(end) == 0
                front.kernel.close()
                assert await front.ask(end) == 5
                assert await front.ask(end, FOREIGN) == 0

    run(main())

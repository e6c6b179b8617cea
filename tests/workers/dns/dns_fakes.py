"""Stand-ins and small tools for the tests of the dns worker."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from ipaddress import ip_address
from typing import Any, Self, TypeVar

import uvloop
from dnslib import EDNS0, QTYPE, RR, A, DNSHeader, DNSQuestion, DNSRecord

from ipc.messages import Access, AddressResolved, NameOutcome, NameResolved, Network
from workers.dns.askers import Askers
from workers.dns.message import Query
from workers.dns.servers import Server
from workers.dns.tally import Tally

T = TypeVar("T")

PREFIX = bytes.fromhex("fd6067ec43250000") + bytes(8)


def run(main: Coroutine[Any, Any, T]) -> T:
    """On the loop the worker really uses, with a bound on the time."""

    async def bounded() -> T:
        return await asyncio.wait_for(main, 30)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


def packed(text: str) -> bytes:
    return ip_address(text).packed


def make_network(*ranges: str, ipv6: bool = True) -> Network:
    return Network(
        interface="vnet0",
        mtu=65535,
        ranges=list(ranges) or ["100.64.0.0/10"],
        tun_ipv4=packed("100.64.0.1"),
        dns_ipv4=packed("100.64.0.2"),
        ipv6_prefix=PREFIX if ipv6 else None,
        tun_ipv6=PREFIX[:15] + b"\x01" if ipv6 else None,
        dns_ipv6=PREFIX[:15] + b"\x02" if ipv6 else None,
    )


def make_query(
    name: str, qtype: str = "A", *, id_: int = 4711, edns: int | None = None, **edns_more: object
) -> bytes:
    """A query as a stub resolver sends it; `edns` is the payload size it says."""
    record = DNSRecord(DNSHeader(id=id_, rd=1, qr=0), q=DNSQuestion(name, getattr(QTYPE, qtype)))
    if edns is not None:
        record.add_ar(EDNS0(udp_len=edns, **edns_more))
    return bytes(record.pack())


def everybody() -> bool:
    """Who asks may know."""
    return True


def unchecked(tally: Tally) -> Askers:
    """As on a system that cannot tell who asks."""
    return Askers(make_network(), Access(uids=[], is_checked=False), None, tally)


def forwarded_answer(data: bytes, text: str = "192.0.2.7") -> bytes:
    """What an ordinary upstream server would say to `data`."""
    record = DNSRecord.parse(data).reply(aa=0)
    record.add_answer(RR(record.q.qname, QTYPE.A, ttl=60, rdata=A(text)))
    return bytes(record.pack())


class FakeNames:
    """Proxies that know `names`; `gate`, when set, holds every answer back."""

    def __init__(self) -> None:
        self.names: dict[str, NameResolved | None] = {}
        self.addresses: dict[bytes, str] = {}
        self.asked: list[str | bytes] = []
        self.gate: asyncio.Event | None = None
        self.address_answers = True

    def give(self, name: str, ipv4: str, valid_seconds: float = 60.0) -> None:
        self.names[name] = NameResolved(
            request_id=0,
            outcome=NameOutcome.ADDRESS,
            ipv4=packed(ipv4),
            valid_seconds=valid_seconds,
        )
        self.addresses[packed(ipv4)] = name

    def set_outcome(self, name: str, outcome: NameOutcome, valid_seconds: float = 0.0) -> None:
        self.names[name] = NameResolved(request_id=0, outcome=outcome, valid_seconds=valid_seconds)

    async def resolve_name(self, name: str) -> NameResolved | None:
        self.asked.append(name)
        if self.gate is not None:
            await self.gate.wait()
        foreign = NameResolved(request_id=0, outcome=NameOutcome.NOT_OURS, valid_seconds=60)
        return self.names.get(name.lower(), foreign)

    async def resolve_address(self, ipv4: bytes) -> AddressResolved | None:
        self.asked.append(ipv4)
        if not self.address_answers:
            return None
        return AddressResolved(request_id=0, name=self.addresses.get(ipv4))


class FakeUpstreams:
    """Upstream servers that answer with `respond`, or not at all."""

    def __init__(self, respond: Callable[[bytes], bytes | None] = forwarded_answer) -> None:
        self.respond = respond
        self.asked: list[bytes] = []
        self.gate: asyncio.Event | None = None

    async def forward(self, query: Query, *, over_tcp: bool) -> bytes | None:
        self.asked.append(query.data)
        if self.gate is not None:
            await self.gate.wait()
        return self.respond(query.data)


class FakeServer:
    """An upstream DNS server on loopback, UDP and TCP on one port.

    `respond(data, transport)` gives the datagrams to send back.
    """

    def __init__(
        self, respond: Callable[[bytes, str], list[bytes]], address: str = "127.0.0.1"
    ) -> None:
        self._address = address
        self._respond = respond
        self.received: list[tuple[bytes, str, int]] = []
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._udp = socket.socket(family, socket.SOCK_DGRAM)
        self._tcp = socket.socket(family, socket.SOCK_STREAM)
        for _ in range(20):
            self._tcp.bind((address, 0))
            try:
                self._udp.bind(self._tcp.getsockname())
                break
            except OSError:
                self._tcp.close()
                self._tcp = socket.socket(family, socket.SOCK_STREAM)
        self._udp.setblocking(False)
        self.port: int = self._udp.getsockname()[1]
        self._server: asyncio.Server | None = None

    @property
    def server(self) -> Server:
        return Server(ip_address(self._address), self.port, "")

    async def __aenter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._udp.fileno(), self._on_datagram)
        self._server = await asyncio.start_server(self._on_connection, sock=self._tcp)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._udp.fileno())
        self._udp.close()
        if self._server is not None:
            self._server.close()

    def _on_datagram(self) -> None:
        data, peer = self._udp.recvfrom(65535)
        self.received.append((data, "udp", peer[1]))
        for answer in self._respond(data, "udp"):
            self._udp.sendto(answer, peer)

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        data = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        self.received.append((data, "tcp", writer.get_extra_info("peername")[1]))
        for answer in self._respond(data, "tcp"):
            writer.write(len(answer).to_bytes(2) + answer)
        writer.close()


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def wait_until(condition: Callable[[], bool]) -> None:
    """Until the condition holds; `run` bounds the time."""
    while not condition():
        await asyncio.sleep(0.001)


async def ask_udp(port: int, data: bytes, address: str = "127.0.0.1") -> bytes:
    """The answer to one datagram sent to a server on loopback."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect((address, port))
        sock.send(data)
        return await loop.sock_recv(sock, 65535)


async def connect_tcp(
    port: int,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(2) + data


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(2)))

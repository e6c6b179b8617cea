"""The whole worker in this process: real sockets, the channel and the bus played by the test."""

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

from dns_fakes import (
    PREFIX,
    FakeServer,
    ask_udp,
    connect_tcp,
    forwarded_answer,
    frame,
    make_network,
    make_query,
    packed,
    read_frame,
    run,
    wait_until,
)
from dnslib import DNSRecord

from ipc.addresses import ipv6_twin
from ipc.messages import (
    Access,
    AddressResolved,
    AnyMessage,
    BusKeys,
    Common,
    ConfigureDns,
    HttpRules,
    NameOutcome,
    NameResolved,
    NamesChanged,
    NetworkChanged,
    ResolveAddress,
    ResolveName,
    SecurityChanged,
    Upstream,
    UpstreamChanged,
)
from ipc.socket_owner import SocketDiag
from workers.dns import worker
from workers.runtime import Runtime

NAME = "pg.root.example.test"
KEY = "k" * 40


class FakeBus:
    """One proxy: knows NAME, calls everything else foreign."""

    def __init__(self, on_message: Callable[[AnyMessage], None]) -> None:
        self._on_message = on_message
        self.received: list[AnyMessage] = []

    def send(self, message: AnyMessage) -> None:
        self.received.append(message)
        asyncio.get_running_loop().call_soon(self._on_message, self._answer(message))

    def _answer(self, message: AnyMessage) -> AnyMessage:
        if isinstance(message, ResolveAddress):
            known = message.ipv4 == packed("100.64.0.7")
            return AddressResolved(request_id=message.request_id, name=NAME if known else None)
        assert isinstance(message, ResolveName)
        is_ours = message.name == NAME
        return NameResolved(
            request_id=message.request_id,
            outcome=NameOutcome.ADDRESS if is_ours else NameOutcome.NOT_OURS,
            ipv4=packed("100.64.0.7") if is_ours else None,
            valid_seconds=60,
        )


class FakeRuntime:
    """What the worker sees of its runtime."""

    until_stopped = Runtime.until_stopped

    def __init__(self, upstream: list[Upstream], *, is_standby: bool = False) -> None:
        keys = BusKeys(public=KEY, secret=KEY, peers={})
        self.config = ConfigureDns(
            common=Common(
                slot="dns",
                proxies=2,
                bus_dir="",
                keys=keys,
                heartbeat_seconds=1,
                log_level="INFO",
            ),
            network=make_network(),
            upstream=upstream,
            ttl_seconds=10,
            access=Access(uids=[os.geteuid()]),
        )
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("127.0.0.1", 0))
        listener = socket.create_server(("127.0.0.1", 0))
        self.udp: int = datagrams.getsockname()[1]
        self.tcp: int = listener.getsockname()[1]
        for sock in (datagrams, listener):
            sock.setblocking(False)
        self.descriptors = [datagrams.detach(), listener.detach(), SocketDiag.open().detach()]
        self.counters: dict[str, int] = {}
        self.stopping = asyncio.Event()
        self.draining = asyncio.Event()
        self.drain_seconds = 60.0
        self.has_handed_over = False
        self.may_begin = asyncio.Event()
        if not is_standby:
            self.may_begin.set()
        self._loop = asyncio.get_running_loop()
        self.is_ready = False
        self.buses: dict[str, FakeBus] = {}
        self.on_message: Callable[[Any, list[int]], None]

    def ready(self) -> None:
        self.is_ready = True

    async def taken_over(self) -> None:
        if not self.may_begin.is_set():
            self.ready()
            await self.may_begin.wait()

    def handed_over(self) -> None:
        self.has_handed_over = True

    def join_bus(
        self,
        slot: str,
        on_message: Callable[[AnyMessage], None],
        on_connect: Callable[[], None],
        on_disconnect: Callable[[], None],  # tested on the resolver alone
    ) -> FakeBus:
        self.buses[slot] = FakeBus(on_message)
        self._loop.call_soon(on_connect)
        return self.buses[slot]


def rcode(answer: bytes) -> int:
    return int(DNSRecord.parse(answer).header.rcode)


def test_worker_serves_follows_changes_and_stops() -> None:
    async def main() -> None:
        async with FakeServer(lambda data, _: [forwarded_answer(data)]) as fake:
            upstream = [Upstream(address=packed("127.0.0.1"), port=fake.port)]
            runtime = FakeRuntime(upstream)
            task = asyncio.ensure_future(worker.main(runtime))  # type: ignore[arg-type]
            await wait_until(lambda: runtime.is_ready)
            assert sorted(runtime.buses) == ["proxy-0", "proxy-1"]

            own = DNSRecord.parse(await ask_udp(runtime.udp, make_query(NAME, "AAAA")))
            assert packed(str(own.rr[0].rdata)) == ipv6_twin(PREFIX, packed("100.64.0.7"))
            reader, writer = await connect_tcp(runtime.tcp)
            writer.write(frame(make_query("7.0.64.100.in-addr.arpa", "PTR")))
            assert str(DNSRecord.parse(await read_frame(reader)).rr[0].rdata) == NAME + "."
            foreign = make_query("www.example.test")
            assert await ask_udp(runtime.udp, foreign) == forwarded_answer(foreign)

            # Answers are given again until names may have changed.
            asked = [sum(len(bus.received) for bus in runtime.buses.values())]
            for _ in range(2):
                assert await ask_udp(runtime.udp, make_query(NAME, "AAAA")) == own.pack()
                asked.append(sum(len(bus.received) for bus in runtime.buses.values()))
                runtime.on_message(NamesChanged(), [])
            assert [count - asked[0] for count in asked] == [0, 0, 1]

            # Who may not connect any more is told nothing, over a connection that is open neither.
            runtime.on_message(SecurityChanged(access=Access(uids=[]), http=HttpRules()), [])
            assert rcode(await ask_udp(runtime.udp, make_query(NAME, "AAAA"))) == 5
            writer.write(frame(make_query(NAME)))
            assert rcode(await read_frame(reader)) == 5
            assert await ask_udp(runtime.udp, foreign) == forwarded_answer(foreign)
            assert runtime.counters["refused_users"] == 2
            everybody = Access(uids=[], is_checked=False)
            runtime.on_message(SecurityChanged(access=everybody, http=HttpRules()), [])
            assert rcode(await ask_udp(runtime.udp, make_query(NAME, "AAAA"))) == 0

            runtime.on_message(UpstreamChanged(upstream=[]), [])
            answer = DNSRecord.parse(await ask_udp(runtime.udp, foreign))
            assert answer.header.rcode == 2
            runtime.on_message(NetworkChanged(network=make_network(ipv6=False)), [])
            own = DNSRecord.parse(await ask_udp(runtime.udp, make_query(NAME, "AAAA")))
            assert own.rr == []
            assert runtime.counters["answers_nodata"] == 1
            assert runtime.counters["upstream_failures"] == 1

            runtime.stopping.set()
            await task
            # A TCP connection that is open at the end does not hold the worker up.
            assert await reader.read() == b""
            writer.close()

    run(main())


def test_standby_answers_when_it_has_taken_over_and_one_that_drains_finishes() -> None:
    async def main() -> None:
        async with FakeServer(lambda _data, _: []) as fake:
            upstream = [Upstream(address=packed("127.0.0.1"), port=fake.port)]
            runtime = FakeRuntime(upstream, is_standby=True)
            task = asyncio.ensure_future(worker.main(runtime))  # type: ignore[arg-type]
            await wait_until(lambda: runtime.is_ready)
            own = asyncio.ensure_future(ask_udp(runtime.udp, make_query(NAME)))
            reader, writer = await connect_tcp(runtime.tcp)
            writer.write(frame(make_query(NAME)))
            await asyncio.sleep(0.05)
            assert runtime.counters["queries"] == 0
            runtime.may_begin.set()
            assert DNSRecord.parse(await own).rr
            assert DNSRecord.parse(await read_frame(reader)).rr

            # A question that its server does not answer: SERVFAIL when all its time is over.
            foreign = asyncio.ensure_future(ask_udp(runtime.udp, make_query("www.example.test")))
            await wait_until(lambda: bool(fake.received))
            runtime.draining.set()
            await wait_until(lambda: runtime.has_handed_over)
            assert not task.done()
            assert await reader.read() == b""
            writer.close()
            assert DNSRecord.parse(await foreign).header.rcode == 2
            await task
            assert not runtime.stopping.is_set()

    run(main())


def test_one_that_drains_does_not_wait_for_ever_and_stops_when_told() -> None:
    async def main() -> None:
        async with FakeServer(lambda _data, _: []) as fake:
            upstream = [Upstream(address=packed("127.0.0.1"), port=fake.port)]
            for end in ("deadline", "stop"):
                fake.received.clear()
                runtime = FakeRuntime(upstream)
                runtime.drain_seconds = 0.05 if end == "deadline" else 60.0
                task = asyncio.ensure_future(worker.main(runtime))  # type: ignore[arg-type]
                await wait_until(lambda runtime=runtime: runtime.is_ready)
                foreign = asyncio.ensure_future(
                    ask_udp(runtime.udp, make_query("www.example.test"))
                )
                await wait_until(lambda: bool(fake.received))
                runtime.draining.set()
                await wait_until(lambda runtime=runtime: runtime.has_handed_over)
                if end == "stop":
                    runtime.stopping.set()
                await asyncio.wait_for(task, 2)
                foreign.cancel()

    run(main())

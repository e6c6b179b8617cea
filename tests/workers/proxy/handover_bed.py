"""Proxies of one slot after one another, the gate of tun, and the test in the supervisor's place.

    programs ── held SYN ── Doorkeeper ──bus── ProxyWorker ── dials ── echo server
        └────── connect, once the SYN is let through ── listener ── accepts ──┘

All of it on loopback: the listener's address is the virtual one. The supervisor's copy of the listener
is the test's.
"""

import asyncio
import contextlib
import os
import socket
import struct
from ipaddress import IPv4Address
from pathlib import Path
from typing import Self

import msgspec
from glue_fakes import NETWORK, OWNER, PROFILE, FakeTeleport, app_target

from ipc import bus_socket
from ipc import messages as m
from ipc.bus import BusClient, BusContext
from ipc.channel import Channel, make_pair
from ipc.curve import make_key_pair
from ipc.permits import Role
from workers.proxy import worker
from workers.proxy.book import BookTarget, Entry
from workers.proxy.dial_plan import DialPlan
from workers.proxy.naming_outcome import Answer, given
from workers.runtime import Runtime
from workers.tun.doorkeeper import Doorkeeper
from workers.tun.packet import Packet, parse_packet
from workers.tun.syn_gate import SynGate

ADDRESS = b"\x7f\0\0\1"
SYN, RESET = 0x02, 0x04
SLOTS = ("tun", "dns", "proxy-0", "ssh")


async def until(condition, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


class StubTeleport(FakeTeleport):
    """Clusters that have answered; made by the worker itself."""

    dial_gate: "asyncio.Event | None" = None
    port = 0
    made: "list[StubTeleport]"
    asked: "list[m.Cluster]"

    def __init__(self, _home, settings, *, on_change) -> None:
        super().__init__()
        self.prompter = settings.prompter
        self.on_change = on_change
        self.on_owner_gone = None
        self.problem = ""
        self.is_closed = False
        self.made.append(self)

    def states(self) -> list[m.Cluster]:
        return list(self.asked)

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self.is_closed = True

    async def plan(self, _target, _port: int) -> DialPlan:
        if self.dial_gate is not None:
            await self.dial_gate.wait()
        return DialPlan("127.0.0.1", self.port, None)


class StubNaming:
    """One name behind every address."""

    def __init__(self, *_: object) -> None:
        pass

    def entry_of(self, _ipv4: bytes) -> Entry:
        target = BookTarget(profile=PROFILE, leaf="", cluster="example.test", resource="pg")
        return Entry("pg.example.test", IPv4Address("127.0.0.1"), target)

    async def meaning_of(self, _entry: Entry) -> object:
        return app_target()

    async def resolve(self, _name: str) -> Answer:
        return given(ADDRESS)


class Proxy:
    """One process of the bed's slot, seen from the supervisor."""

    def __init__(self, bed: "Bed", *, is_standby: bool) -> None:
        self._bed = bed
        self._ends = make_pair()
        self.channel = Channel(self._ends[0], Role.SUPERVISOR, Role.PROXY, takes_descriptors=False)
        self.heard: list[m.AnyMessage] = []
        bed.loop.add_reader(self.channel.fileno(), self._receive)
        self.runtime: Runtime[m.ConfigureProxy] = Runtime(
            Channel(self._ends[1], Role.PROXY, Role.SUPERVISOR, takes_descriptors=True),
            bed.config(is_standby=is_standby),
            [],
            bed.loop,
            bus_socket.listen(bed.directory, bed.slot),
        )
        self.runtime.start()
        self.task = bed.loop.create_task(self._run())

    async def _run(self) -> None:
        try:
            await worker.main(self.runtime)
        finally:
            self.runtime.close()

    def _receive(self) -> None:
        while (received := self.channel.receive()) is not None:
            message = received[0]
            self.heard.append(message)
            if isinstance(message, m.OpenListener):
                self.open_listener()

    def open_listener(self) -> None:
        opened = m.ListenerOpened(address=ADDRESS, port=self._bed.port)
        self.channel.send(opened, [self._bed.listener.fileno()])

    @property
    def counters(self) -> dict[str, int]:
        """Those of the last heartbeat."""
        return next(one.counters for one in reversed(self.heard) if isinstance(one, m.Heartbeat))

    def has_said(self, kind: type[m.Message]) -> bool:
        return any(isinstance(message, kind) for message in self.heard)

    async def says(self, kind: type[m.Message]) -> None:
        await until(lambda: self.has_said(kind))

    def close(self) -> None:
        self._bed.loop.remove_reader(self.channel.fileno())
        for end in self._ends:
            end.close()


class Tun:
    """The gate of the tun worker and its end of the bus."""

    def __init__(self, bed: "Bed") -> None:
        self.hellos = 0
        self.counters: dict[str, int] = {}
        self._context = BusContext(
            bed.directory, "tun", bed.keys_of("tun"), bus_socket.listen(bed.directory, "tun")
        )
        server = self._context.serve(self._hear, lambda *breach: bed.breaches.append(breach))
        self.doorkeeper = Doorkeeper(
            gate=SynGate(
                max_pending=1000,
                pending_seconds=60.0,
                max_remembered=1000,
                remembered_seconds=8.0,
                first_flow_id=int.from_bytes(os.urandom(4)),
            ),
            proxies=1,
            dns_ipv4=NETWORK.dns_ipv4,
            send=server.send,
            write_inner=lambda packet: bed.programs.pop(_port(packet)).set_result(True),
            write_outer=lambda packet: bed.programs.pop(_port(packet)).set_result(False),
            counters=self.counters,
            loop=bed.loop,
        )

    def _hear(self, sender, message) -> None:
        self.hellos += isinstance(message, m.ProxyHello)
        self.doorkeeper.receive_message(sender, message)

    def close(self) -> None:
        self.doorkeeper.stop()
        self._context.close()


class Bed:
    def __init__(self, directory: Path, slot: str = "proxy-0") -> None:
        self.loop = asyncio.get_running_loop()
        self.directory = directory
        self.slot = slot
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self.listener.getsockname()[1]
        self._pairs = {slot: make_key_pair() for slot in SLOTS}
        self.breaches: list[object] = []
        # By the program's port: whether its SYN was let through.
        self.programs: dict[int, asyncio.Future[bool]] = {}
        self.processes: list[Proxy] = []
        self._connected: list[Program] = []
        self.tun = Tun(self)
        self._dns = BusContext(directory, "dns", self.keys_of("dns"))

    async def __aenter__(self) -> Self:
        self._echo = await asyncio.start_server(_echo, "127.0.0.1", 0)
        StubTeleport.port = self._echo.sockets[0].getsockname()[1]
        self.present = self.start(is_standby=False)
        await self.present.says(m.Ready)
        return self

    async def __aexit__(self, *_: object) -> None:
        for program in self._connected:
            program.close()
        for process in self.processes:
            process.runtime.stopping.set()
        ended = await asyncio.gather(
            *(process.task for process in self.processes), return_exceptions=True
        )
        for process in self.processes:
            process.close()
        self.tun.close()
        self._dns.close()
        self._echo.close()
        self.listener.close()
        assert ended == [None] * len(ended)
        assert self.breaches == []

    def keys_of(self, slot: str) -> m.BusKeys:
        public, secret = self._pairs[slot]
        peers = {other: pair[0] for other, pair in self._pairs.items() if other != slot}
        return m.BusKeys(public=public, secret=secret, peers=peers)

    def config(self, *, is_standby: bool) -> m.ConfigureProxy:
        common = m.Common(
            slot=self.slot,
            proxies=1,
            bus_dir=str(self.directory),
            keys=self.keys_of(self.slot),
            heartbeat_seconds=0.05,
            log_level="INFO",
            is_standby=is_standby,
        )
        prompts = self.directory / "mfa"
        prompts.mkdir(exist_ok=True)
        return m.ConfigureProxy(
            common=common,
            network=msgspec.structs.replace(NETWORK),
            teleport_home=str(self.directory / "tsh"),
            book_path=str(self.directory / "book.sqlite"),
            prompts_dir=str(prompts),
            max_connections=1000,
            max_listeners=100,
            ca_file="",
            insecure=False,
            mfa_seconds=60.0,
            # Its programs' SYNs are made up.
            access=m.Access(uids=[], is_checked=False),
        )

    # -- the supervisor --

    def start(self, *, is_standby: bool) -> Proxy:
        process = Proxy(self, is_standby=is_standby)
        self.processes.append(process)
        return process

    async def replace(self) -> Proxy:
        """A successor takes over; returns the old process, which has handed over."""
        successor = self.start(is_standby=True)
        await successor.says(m.Ready)
        old, self.present = self.present, successor
        old.channel.send(m.Drain(deadline_seconds=600.0))
        await old.says(m.HandedOver)
        successor.open_listener()
        successor.channel.send(m.TakeOver())
        return old

    def restart_tun(self) -> None:
        self.tun.close()
        self.tun = Tun(self)

    def dns(self, resolver) -> BusClient:
        """The dns worker's way to the proxies."""
        return self._dns.join(
            "proxy-0",
            lambda message: resolver.on_message(0, message),
            lambda *breach: self.breaches.append(breach),
            lambda: resolver.on_connect(0),
            lambda: resolver.on_disconnect(0),
        )

    # -- programs --

    async def connect(self) -> "Program":
        """Raises ConnectionRefusedError, as the program would see it."""
        program = Program(self.loop)
        self._connected.append(program)
        admitted = self.programs[program.port] = self.loop.create_future()
        self.tun.doorkeeper.receive_syn(*_syn(program.port, self.port))
        await program.connect(admitted, self.port)
        return program


class Program:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._end = socket.socket()
        self._end.bind(("127.0.0.1", 0))
        self._end.setblocking(False)
        self.port: int = self._end.getsockname()[1]

    async def connect(self, admitted: "asyncio.Future[bool]", port: int) -> None:
        if not await admitted:
            raise ConnectionRefusedError
        await self._loop.sock_connect(self._end, ("127.0.0.1", port))

    async def exchange(self, data: bytes) -> None:
        """Sends, and gets the same back; raises ConnectionError."""
        await self._loop.sock_sendall(self._end, data)
        received = b""
        while len(received) < len(data):
            piece = await self._loop.sock_recv(self._end, len(data) - len(received))
            if not piece:
                raise ConnectionResetError("ended early")
            received += piece
        assert received == data

    def close(self) -> None:
        self._end.close()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def _syn(source_port: int, destination_port: int) -> tuple[bytes, Packet]:
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40, 7, 0x4000, 64, 6, 0, ADDRESS, ADDRESS)
    segment = struct.pack(">HHIIBBHHH", source_port, destination_port, 1, 0, 5 << 4, SYN, 1, 0, 0)
    packet = parse_packet(header + segment)
    assert isinstance(packet, Packet)
    return header + segment, packet


def _port(packet: bytes) -> int:
    """The program's port, of its SYN or of a reset for it."""
    is_reset = packet[33] & RESET
    return int.from_bytes(packet[22:24] if is_reset else packet[20:22])


__all__ = ["ADDRESS", "OWNER", "Bed", "Proxy", "StubNaming", "StubTeleport", "until"]

"""Verdicts and joining, with a dial, a relay and listeners of the test's own."""

import asyncio
import gc
import socket
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from glue_fakes import FakeTeleport, app_target

from ipc.messages import DialRequest, DialVerdict, Refusal
from workers.proxy import admission as module
from workers.proxy import dial
from workers.proxy.admission import Admission
from workers.proxy.book import BookUnavailableError
from workers.proxy.listeners import NoListenerError
from workers.proxy.naming import UnknownAddressError
from workers.proxy.relay import RelayEnd, RelayOutcome
from workers.proxy.teleport.errors import PortNotAllowedError, RefusedError, UnreachableError

PARAMETERS = SimpleNamespace(
    host="proxy.example.test",
    port=443,
    ssl_context=None,
    server_hostname="proxy.example.test",
    is_conn_upgrade_required=False,
)


class FakeUpstream:
    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class FakeRelay:
    """Owns both ends until the test ends it."""

    made: "list[FakeRelay]"
    ends_at_once = False

    def __init__(self, _reactor, local, upstream, on_end) -> None:
        self.local, self.upstream, self._on_end = local, upstream, on_end
        self.is_over = False
        self.bytes_up, self.bytes_down = 5, 7
        self.made.append(self)

    def start(self) -> None:
        if self.ends_at_once:
            self.end(RelayEnd.BROKEN)

    def abort(self) -> None:
        self.end(RelayEnd.ABORTED)

    def end(self, end: RelayEnd = RelayEnd.PROGRAM_CLOSED) -> None:
        self.is_over = True
        self.local.close()
        self.upstream.close()
        self._on_end(RelayOutcome(end, self.bytes_up, self.bytes_down, ""))


class FakeListeners:
    def __init__(self) -> None:
        self.error: Exception | None = None

    async def ensure(self, _address: bytes, _port: int) -> None:
        if self.error is not None:
            raise self.error


class FakeNaming:
    def __init__(self) -> None:
        self.error: Exception | None = None

    async def target_of(self, _ipv4: bytes):
        if self.error is not None:
            raise self.error
        return "pg.example.test", app_target()


class Bed:
    def __init__(self, max_connections: int = 10) -> None:
        self.verdicts: list[DialVerdict] = []
        self.naming, self.teleport, self.listeners = FakeNaming(), FakeTeleport(), FakeListeners()
        self.teleport.dial_result = PARAMETERS
        self.counters: dict[str, int] = {}
        self.dialled: list[FakeUpstream] = []
        self.dial_result: Exception | asyncio.Event | None = None
        self.admission = Admission(
            naming=self.naming,
            teleport=self.teleport,
            reactor=None,
            answer=self.verdicts.append,
            counters=self.counters,
            max_connections=max_connections,
        )
        self.admission.listeners = self.listeners
        self.listener = socket.create_server(("127.0.0.1", 0))

    async def dial(self, *_, **__):
        if isinstance(self.dial_result, Exception):
            raise self.dial_result
        if isinstance(self.dial_result, asyncio.Event):
            await self.dial_result.wait()
        upstream = FakeUpstream()
        self.dialled.append(upstream)
        return upstream

    def program(self) -> socket.socket:
        """A program's socket, bound but not connected."""
        program = socket.socket()
        program.bind(("127.0.0.1", 0))
        return program

    def request(self, program: socket.socket, flow_id: int = 1) -> DialRequest:
        return DialRequest(
            flow_id=flow_id,
            source=b"\x7f\0\0\1",
            source_port=program.getsockname()[1],
            destination=b"\x7f\0\0\1",
            destination_port=self.listener.getsockname()[1],
        )

    def connect(self, program: socket.socket) -> None:
        """The program connects, and its connection is accepted."""
        program.connect(self.listener.getsockname())
        connection, _ = self.listener.accept()
        connection.setblocking(False)
        self.admission.accepted(connection)

    async def verdict(self, program: socket.socket, flow_id: int = 1) -> Refusal | None:
        self.admission.request(self.request(program, flow_id))
        await until(lambda: any(verdict.flow_id == flow_id for verdict in self.verdicts))
        return self.verdicts[-1].refusal

    def count(self, name: str) -> int:
        self.admission.count()
        return self.counters[name]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def run(monkeypatch):
    """Runs a scenario in a bed; nothing may be left open by it."""
    FakeRelay.made = []
    monkeypatch.setattr(FakeRelay, "ends_at_once", False)
    monkeypatch.setattr(module, "Relay", FakeRelay)

    def run_scenario(scenario, **options) -> None:
        async def main() -> None:
            bed = Bed(**options)
            monkeypatch.setattr(module.dial, "dial", bed.dial)
            with bed.listener, bed.program() as program:
                try:
                    await scenario(bed, program)
                finally:
                    await bed.admission.close()
                assert len(asyncio.all_tasks()) == 1
                assert all(upstream.is_closed for upstream in bed.dialled)
                for name in ("connections_now", "dialling_now", "waiting_now"):
                    assert bed.count(name) == 0

        before = open_descriptors()
        asyncio.run(main())
        assert open_descriptors() == before

    return run_scenario


def open_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_admitted_connection_finds_its_upstream(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        assert await bed.verdict(program) is None
        assert bed.count("waiting_now") == 1
        bed.connect(program)
        [relay] = FakeRelay.made
        assert relay.upstream is bed.dialled[0]
        assert (bed.count("waiting_now"), bed.count("connections_now")) == (0, 1)
        relay.end()
        assert (bed.count("connections_now"), bed.count("connections_total")) == (0, 1)
        assert (bed.count("bytes_sent"), bed.count("bytes_received")) == (5, 7)

    run(scenario)


def test_relay_that_ends_at_its_start_is_not_kept(run, monkeypatch):
    monkeypatch.setattr(FakeRelay, "ends_at_once", True)

    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        bed.connect(program)
        assert bed.count("connections_now") == 0

    run(scenario)


@pytest.mark.parametrize(
    ("part", "error", "refusal"),
    [
        ("naming", UnknownAddressError("x"), Refusal.UNKNOWN_ADDRESS),
        ("naming", UnreachableError("x"), Refusal.CLUSTER_UNREACHABLE),
        ("naming", BookUnavailableError("x"), Refusal.INTERNAL),
        ("naming", ZeroDivisionError("a bug"), Refusal.INTERNAL),
        ("teleport", PortNotAllowedError("x"), Refusal.PORT_NOT_ALLOWED),
        ("teleport", RefusedError("x"), Refusal.CERTIFICATE_REFUSED),
        ("listeners", NoListenerError("x"), Refusal.INTERNAL),
        ("dial", dial.ProxyUnreachableError("x"), Refusal.CLUSTER_UNREACHABLE),
        ("dial", dial.ProxyUntrustedError("x"), Refusal.CLUSTER_UNREACHABLE),
        ("dial", dial.DialTimedOutError("x"), Refusal.TIMED_OUT),
        ("dial", dial.DialRefusedError("x"), Refusal.CERTIFICATE_REFUSED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_whatever_fails_the_program_is_refused_with_the_right_reason(run, part, error, refusal):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        if part == "dial":
            bed.dial_result = error
        elif part == "teleport":
            bed.teleport.dial_result = error
        else:
            getattr(bed, part).error = error
        assert await bed.verdict(program) is refusal
        assert bed.count("connections_failed") == 1
        assert bed.count("waiting_now") == 0

    run(scenario)


def test_proxy_behind_a_load_balancer_is_refused_in_this_version(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.teleport.dial_result = SimpleNamespace(
            **vars(PARAMETERS) | {"is_conn_upgrade_required": True}
        )
        assert await bed.verdict(program) is Refusal.CLUSTER_UNREACHABLE

    run(scenario)


def test_abandoned_dial_ends_without_a_verdict(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.dial_result = asyncio.Event()
        bed.admission.request(bed.request(program))
        await until(lambda: bed.count("dialling_now") == 1)
        bed.admission.abandon(1)
        bed.admission.abandon(99)  # one nobody knows
        await until(lambda: bed.count("dialling_now") == 0)
        assert bed.verdicts == []
        assert bed.count("connections_failed") == 0

    run(scenario)


def test_repeated_request_is_dialled_once(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.dial_result = asyncio.Event()
        for _ in range(3):
            bed.admission.request(bed.request(program))
        bed.dial_result.set()
        await until(lambda: bed.verdicts)
        assert len(bed.dialled) == 1
        assert len(bed.verdicts) == 1

    run(scenario)


def test_second_admission_of_a_flow_replaces_the_first(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program, flow_id=1)
        await bed.verdict(program, flow_id=2)
        assert [upstream.is_closed for upstream in bed.dialled] == [True, False]
        bed.connect(program)
        assert FakeRelay.made[0].upstream is bed.dialled[1]

    run(scenario)


def test_connection_that_nobody_admitted_is_reset(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.connect(program)
        program.settimeout(10)
        with pytest.raises(ConnectionResetError):
            program.recv(1)
        assert bed.count("connections_orphaned") == 1
        assert not FakeRelay.made

    run(scenario)


def test_connection_that_is_gone_when_it_is_accepted_does_no_harm(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        program.connect(bed.listener.getsockname())
        program.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        program.close()
        connection, _ = bed.listener.accept()
        bed.admission.accepted(connection)
        assert bed.count("connections_now") + bed.count("connections_orphaned") == 1

    run(scenario)


def test_program_that_never_comes_costs_its_upstream_after_a_while(run, monkeypatch):
    monkeypatch.setattr(module, "ACCEPT_SECONDS", 0.01)

    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        await until(lambda: bed.dialled[0].is_closed)
        assert bed.count("waiting_now") == 0
        bed.connect(program)  # too late
        assert bed.count("connections_orphaned") == 1

    run(scenario)


def test_limit_counts_dials_waiting_and_relays_and_full_is_answered(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program, flow_id=1)
        bed.connect(program)
        with bed.program() as second, bed.program() as third, bed.program() as fourth:
            await bed.verdict(second, flow_id=2)
            bed.dial_result = asyncio.Event()
            bed.admission.request(bed.request(third, flow_id=3))
            assert await bed.verdict(fourth, flow_id=4) is Refusal.TOO_MANY
            FakeRelay.made[0].end()
            bed.dial_result.set()
            assert await bed.verdict(fourth, flow_id=5) is None

    run(scenario, max_connections=3)


def test_expected_place_is_known_until_the_program_comes(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        port = bed.listener.getsockname()[1]
        assert not bed.admission.is_expected(b"\x7f\0\0\1", port)
        await bed.verdict(program)
        assert bed.admission.is_expected(b"\x7f\0\0\1", port)
        assert not bed.admission.is_expected(b"\x7f\0\0\1", port + 1)
        bed.connect(program)
        assert not bed.admission.is_expected(b"\x7f\0\0\1", port)

    run(scenario)


def test_close_ends_dials_waiting_and_relays(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program, flow_id=1)
        bed.connect(program)
        with bed.program() as second, bed.program() as third:
            await bed.verdict(second, flow_id=2)
            bed.dial_result = asyncio.Event()
            bed.admission.request(bed.request(third, flow_id=3))
            await asyncio.sleep(0)
            await bed.admission.close()
        assert FakeRelay.made[0].is_over

    run(scenario)

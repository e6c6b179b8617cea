"""Verdicts and joining, with a dial, a relay and listeners of the test's own."""

import asyncio
import dataclasses
import gc
import logging
import socket
import struct
from ipaddress import IPv4Address
from pathlib import Path

import msgspec
import pytest
from glue_fakes import (
    NETWORK,
    OWNER,
    PLAN,
    PROFILE,
    SSH_PLAN,
    WEB_PLAN,
    WEB_PORT,
    FakeTeleport,
    app_target,
    cluster_target,
    database_target,
)

from ipc.connection_id import connection_id
from ipc.connection_list import LIVE, ConnectionTold
from ipc.messages import Access, DialRequest, DialVerdict, HttpRules, Refusal
from ipc.socket_owner import SYN_SENT, UNKNOWN
from ipc.socket_owner import Owner as SocketOwner
from workers.proxy import admission as module
from workers.proxy import dial, undecided
from workers.proxy.admission import Admission
from workers.proxy.book import BookTarget, BookUnavailableError, Entry
from workers.proxy.dial_plan import DialPlan
from workers.proxy.http_guard.refusal import Refused
from workers.proxy.listeners import NoListenerError
from workers.proxy.naming import UnknownAddressError
from workers.proxy.relay import RelayEnd, RelayOutcome
from workers.proxy.teleport.apps import PortRange
from workers.proxy.teleport.errors import (
    LoginExpiredError,
    PortNotAllowedError,
    RefusedError,
    UnreachableError,
)
from workers.proxy.teleport.targets import (
    AppTarget,
    ClusterTarget,
    NoSuchName,
    NotOurs,
    Owner,
    Resolution,
    WebApp,
)
from workers.proxy.who import Doorbell

PROBED = (b"\x64\x40\0\2", 47_001)
ALICE, MALLORY = 1000, 1001


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

    def end(self, end: RelayEnd = RelayEnd.PROGRAM_CLOSED, error: str = "") -> None:
        self.is_over = True
        self.local.close()
        self.upstream.close()
        self._on_end(RelayOutcome(end, self.bytes_up, self.bytes_down, error))


class FakeGuardedRelay(FakeRelay):
    """A relay whose program is looked at."""

    made: "list[FakeGuardedRelay]"

    def __init__(self, reactor, local, upstream, on_end, guard) -> None:
        super().__init__(reactor, local, upstream, on_end)
        self.guard = guard
        self.refused: Refused | None = None

    def refuse(self, refused: Refused) -> None:
        self.refused = refused
        self.end(RelayEnd.HTTP_REFUSED, "refused")


class FakeSession(FakeRelay):
    """An SSH session."""

    made: "list[FakeSession]"

    def __init__(self, reactor, local, upstream, *, name, about, credentials, on_end) -> None:
        super().__init__(reactor, local, upstream, on_end)
        self.name, self.about, self.credentials = name, about, credentials


class FakeKernel:
    """Says that every socket is this user's; None: there is none."""

    interface = 0

    def __init__(self, uid: int | None) -> None:
        self.uid = uid
        self.asked: list[int] = []

    def tcp_owner(self, *_ends: object, states: int) -> SocketOwner | None:
        self.asked.append(states)
        return None if self.uid is None else SocketOwner(self.uid, 1, 2)

    def close(self) -> None:
        pass


class FakeListeners:
    def __init__(self) -> None:
        self.error: Exception | None = None

    async def ensure(self, _address: bytes, _port: int) -> None:
        if self.error is not None:
            raise self.error


class FakeNaming:
    """Every address has one name, which stands for `found`."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.found: Resolution = app_target()
        self.asked = 0

    def entry_of(self, _ipv4: bytes) -> Entry:
        if self.error is not None:
            raise self.error
        target = BookTarget(profile=PROFILE, leaf="", cluster="example.test", resource="pg")
        return Entry("pg.example.test", IPv4Address("127.0.0.1"), target)

    async def meaning_of(self, _entry: Entry) -> Resolution:
        self.asked += 1
        return self.found


class Bed:
    def __init__(
        self,
        max_connections: int = 10,
        max_long_waits: int = 100,
        *,
        has_ssh: bool = False,
        kernel: FakeKernel | None = None,
    ) -> None:
        self.verdicts: list[DialVerdict] = []
        self.naming, self.teleport, self.listeners = FakeNaming(), FakeTeleport(), FakeListeners()
        self.counters: dict[str, int] = {}
        self.dialled: list[FakeUpstream] = []
        self.plans: list[DialPlan] = []
        self.deadlines: list[float] = []
        # One per dial; after the last each dial succeeds.
        self.dial_results: list[Exception | asyncio.Event] = []
        access = Access(uids=[0, ALICE], user="alice", is_checked=kernel is not None)
        self.admission = Admission(
            doorbell=Doorbell(NETWORK, access, kernel),
            naming=self.naming,
            teleport=self.teleport,
            reactor=None,
            answer=self.verdicts.append,
            is_probe=lambda address, port: (address, port) == PROBED,
            counters=self.counters,
            max_connections=max_connections,
            max_long_waits=max_long_waits,
            open_ssh=FakeSession if has_ssh else None,
            http=HttpRules(is_checked=False),
        )
        self.admission.listeners = self.listeners
        self.listener = socket.create_server(("127.0.0.1", 0))

    async def dial(self, plan: DialPlan, timeout_seconds: float, *_, **__) -> FakeUpstream:
        self.plans.append(plan)
        self.deadlines.append(timeout_seconds)
        result = self.dial_results.pop(0) if self.dial_results else None
        if isinstance(result, Exception):
            raise result
        if isinstance(result, asyncio.Event):
            await result.wait()
        upstream = FakeUpstream()
        self.dialled.append(upstream)
        return upstream

    @property
    def place(self) -> tuple[bytes, int]:
        return b"\x7f\0\0\1", self.listener.getsockname()[1]

    def program(self) -> socket.socket:
        """A program's socket, bound but not connected."""
        program = socket.socket()
        program.bind(("127.0.0.1", 0))
        return program

    def request(
        self, program: socket.socket, flow_id: int = 1, port: int | None = None
    ) -> DialRequest:
        return DialRequest(
            flow_id=flow_id,
            source=b"\x7f\0\0\1",
            source_port=program.getsockname()[1],
            destination=b"\x7f\0\0\1",
            destination_port=self.listener.getsockname()[1] if port is None else port,
        )

    def connect(self, program: socket.socket) -> None:
        """The program connects, and its connection is accepted."""
        program.connect(self.listener.getsockname())
        connection, _ = self.listener.accept()
        connection.setblocking(False)
        self.admission.accepted(connection, self.place)

    async def verdict(
        self, program: socket.socket, flow_id: int = 1, port: int | None = None
    ) -> Refusal | None:
        self.admission.request(self.request(program, flow_id, port))
        return await self.answer(flow_id)

    async def answer(self, flow_id: int) -> Refusal | None:
        """The verdict on a flow that was asked about."""
        await until(lambda: any(verdict.flow_id == flow_id for verdict in self.verdicts))
        [verdict] = [verdict for verdict in self.verdicts if verdict.flow_id == flow_id]
        return verdict.refusal

    def count(self, name: str) -> int:
        self.admission.count()
        return self.counters[name]

    def told(self) -> list[ConnectionTold]:
        """What `vnet connections` is told."""
        lines = self.admission.ledger.lines()
        return [line for line in lines if isinstance(line, ConnectionTold)]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def run(monkeypatch):
    """Runs a scenario in a bed; nothing may be left open by it."""
    FakeRelay.made = []
    FakeSession.made = []
    FakeGuardedRelay.made = []
    monkeypatch.setattr(FakeRelay, "ends_at_once", False)
    monkeypatch.setattr(module, "Relay", FakeRelay)
    monkeypatch.setattr(module, "GuardedRelay", FakeGuardedRelay)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)

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
                for told in bed.told():
                    assert told.state not in LIVE, "the list of connections keeps what is over"

        before = open_descriptors()
        asyncio.run(main())
        assert open_descriptors() <= before  # one of a test before may be closed meanwhile

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
        ("dial", dial.NodeUnreachableError("x"), Refusal.NODE_UNREACHABLE),
        ("dial", dial.SshUnsupportedError("x"), Refusal.NODE_UNREACHABLE),
        ("dial", dial.NodeDeniedError("x"), Refusal.ACCESS_DENIED),
        ("dial", dial.LoginRefusedError("x"), Refusal.NOT_LOGGED_IN),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_whatever_fails_the_program_is_refused_with_the_right_reason(run, part, error, refusal):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        if part == "dial":
            bed.dial_results = [error, error]
        elif part == "teleport":
            bed.teleport.plan_result = error
        else:
            getattr(bed, part).error = error
        assert await bed.verdict(program) is refusal
        assert bed.count("connections_failed") == 1
        assert bed.count("waiting_now") == 0

    run(scenario)


@pytest.mark.parametrize(
    ("error", "is_doubted"),
    [
        (dial.ProxyUnreachableError, True),
        (dial.DialTimedOutError, True),
        (dial.ProxyUntrustedError, True),
        (dial.DialRefusedError, False),
        (dial.NodeUnreachableError, False),
    ],
)
@pytest.mark.parametrize("found", [app_target(), WebApp(PROFILE, "web")], ids=["app", "web"])
def test_a_proxy_that_is_not_reached_is_asked_how_it_is(run, found, error, is_doubted):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = found
        bed.dial_results = [error("x"), error("x")]
        assert await bed.verdict(program, port=WEB_PORT) is not None
        assert bed.teleport.doubted == ([PROFILE] if is_doubted else [])

    run(scenario)


def test_abandoned_dial_ends_without_a_verdict(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.dial_results = [asyncio.Event()]
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
        held = asyncio.Event()
        bed.dial_results = [held]
        for _ in range(3):
            bed.admission.request(bed.request(program))
        held.set()
        await until(lambda: bed.verdicts)
        assert len(bed.dialled) == 1
        assert len(bed.verdicts) == 1

    run(scenario)


def test_question_asked_again_after_the_verdict_is_answered_without_another_dial(run):
    """The verdict may have been lost; tun asks until it has one."""

    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        bed.admission.request(bed.request(program))
        assert bed.verdicts == [DialVerdict(flow_id=1)] * 2
        assert len(bed.dialled) == 1
        bed.connect(program)
        assert FakeRelay.made[0].upstream is bed.dialled[0]

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
        bed.admission.accepted(connection, bed.place)
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
            held = asyncio.Event()
            bed.dial_results = [held]
            bed.admission.request(bed.request(third, flow_id=3))
            assert await bed.verdict(fourth, flow_id=4) is Refusal.TOO_MANY
            FakeRelay.made[0].end()
            held.set()
            assert await bed.verdict(fourth, flow_id=5) is None

    run(scenario, max_connections=3)


def test_connection_counts_once_from_its_verdict_on(run):
    """The program's next SYN may come before anything else happens here."""

    async def scenario(bed: Bed, program: socket.socket) -> None:
        def answer(verdict: DialVerdict) -> None:
            bed.verdicts.append(verdict)
            if verdict.flow_id == 1:
                bed.admission.request(bed.request(program, 2, port=1))

        bed.admission._answer = answer
        assert await bed.verdict(program) is None
        assert await bed.answer(2) is None

    run(scenario, max_connections=2)


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
            bed.dial_results = [asyncio.Event()]
            bed.admission.request(bed.request(third, flow_id=3))
            await asyncio.sleep(0)
            await bed.admission.close()
        assert FakeRelay.made[0].is_over

    run(scenario)


@pytest.mark.parametrize("target", [app_target(), database_target()])
def test_app_and_database_are_dialled_with_the_plan_for_their_port(run, target):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = target
        assert await bed.verdict(program, port=WEB_PORT) is None
        assert bed.teleport.planned == [(target, WEB_PORT)]
        assert bed.plans == [PLAN]

    run(scenario)


@pytest.mark.parametrize(
    ("found", "port", "refusal", "sentence"),
    [
        (cluster_target(), 22, Refusal.INTERNAL, "SSH is the work of another worker"),
        (cluster_target(), 5432, Refusal.UNKNOWN_APP, "no app and no database has this name"),
        (WebApp(PROFILE, "x"), 5432, Refusal.PORT_NOT_ALLOWED, f"port {WEB_PORT} alone"),
        (WebApp("gone", "x"), WEB_PORT, Refusal.PORT_NOT_ALLOWED, "no port"),
        (NotOurs(), WEB_PORT, Refusal.UNKNOWN_APP, "no app any more"),
        (NoSuchName(), WEB_PORT, Refusal.UNKNOWN_APP, "no app any more"),
    ],
)
def test_other_names_are_refused_with_the_reason(run, caplog, found, port, refusal, sentence):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = found
        assert await bed.verdict(program, port=port) is refusal
        assert f"pg.example.test at 127.0.0.1:{port} refused ({refusal}): " in caplog.text
        assert sentence in caplog.text
        assert bed.plans == []

    with caplog.at_level(logging.INFO):
        run(scenario)


# -- SSH --


@pytest.fixture
def run_ssh(run, monkeypatch):
    """Runs a scenario in a bed of the worker of SSH, whose listener has the port of SSH."""

    def run_scenario(scenario) -> None:
        async def at_its_port(bed: Bed, program: socket.socket) -> None:
            monkeypatch.setattr(undecided, "SSH_PORT", bed.listener.getsockname()[1])
            await scenario(bed, program)

        run(at_its_port, has_ssh=True)

    return run_scenario


def test_ssh_reaches_the_host_before_the_accept_and_logs_in_later(run_ssh):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = cluster_target()
        assert await bed.verdict(program) is None
        assert bed.teleport.planned == [(cluster_target(), 22)]
        assert bed.plans == [SSH_PLAN]
        bed.connect(program)
        [session] = FakeSession.made
        assert FakeRelay.made == []
        assert session.upstream is bed.dialled[0]
        assert session.name == "pg.example.test"
        assert session.about == {"connection": connection_id(1)}
        assert bed.teleport.logins == []
        assert await session.credentials("root") == "credentials of root"
        assert bed.teleport.logins == [(cluster_target(), "root")]
        assert bed.count("connections_now") == 1
        session.end()
        assert bed.count("connections_now") == 0
        assert (bed.count("bytes_sent"), bed.count("bytes_received")) == (5, 7)

    run_ssh(scenario)


def test_an_app_at_port_22_is_relayed_by_the_ssh_worker_as_well(run_ssh):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        assert await bed.verdict(program) is None
        bed.connect(program)
        assert len(FakeRelay.made) == 1
        assert FakeSession.made == []
        FakeRelay.made[0].end()

    run_ssh(scenario)


def test_a_host_that_is_not_reached_is_dialled_once_and_refused_with_the_reason(run_ssh, caplog):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = cluster_target()
        bed.dial_results = [dial.NodeUnreachableError("SSH host node: it is offline")]
        assert await bed.verdict(program) is Refusal.NODE_UNREACHABLE
        assert "refused (node_unreachable): SSH host node: it is offline" in caplog.text
        assert len(bed.plans) == 1

    with caplog.at_level(logging.INFO):
        run_ssh(scenario)


def test_ssh_without_a_login_is_refused(run_ssh):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = cluster_target()
        bed.teleport.ssh_plan_result = LoginExpiredError("x")
        assert await bed.verdict(program) is Refusal.NOT_LOGGED_IN
        assert bed.plans == []

    run_ssh(scenario)


def test_ssh_sessions_are_cut_finished_and_closed_like_relays(run_ssh):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = cluster_target()
        await bed.verdict(program)
        bed.connect(program)
        bed.admission.cut(OWNER)
        assert FakeSession.made[0].is_over
        with bed.program() as second:
            await bed.verdict(second, flow_id=2)
            bed.connect(second)
            await bed.admission.hand_over(1.0)
            assert not FakeSession.made[1].is_over
            finishing = asyncio.create_task(bed.admission.finished())
            await asyncio.sleep(0)
            assert not finishing.done()
            FakeSession.made[1].end()
            await finishing

    run_ssh(scenario)


def test_the_oldest_ssh_session_without_a_login_makes_room(run_ssh, monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_STRANGERS", 2)

    async def scenario(bed: Bed, _: socket.socket) -> None:
        bed.naming.found = cluster_target()

        async def come(flow_id: int) -> FakeSession:
            with bed.program() as program:
                assert await bed.verdict(program, flow_id) is None
                bed.connect(program)
            return FakeSession.made[-1]

        known = await come(1)
        await known.credentials("root")
        first, second = await come(2), await come(3)
        third = await come(4)
        assert [one.is_over for one in (known, first, second, third)] == [False, True, False, False]
        assert "2 SSH connections have not logged in" in caplog.text
        second.end()
        await come(5)
        assert not third.is_over

    run_ssh(scenario)


def test_ssh_sessions_without_a_login_take_half_of_the_room(run, monkeypatch):
    async def scenario(bed: Bed, _: socket.socket) -> None:
        monkeypatch.setattr(undecided, "SSH_PORT", bed.listener.getsockname()[1])
        bed.naming.found = cluster_target()
        for flow_id in range(1, 10):
            with bed.program() as program:
                assert await bed.verdict(program, flow_id) is None
                bed.connect(program)
        assert bed.count("connections_now") == 3
        assert [session.is_over for session in FakeSession.made] == [True] * 6 + [False] * 3

    run(scenario, has_ssh=True, max_connections=6)


def test_why_an_ssh_session_failed_is_in_the_log(run_ssh, caplog):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = cluster_target()
        await bed.verdict(program)
        bed.connect(program)
        [session] = FakeSession.made
        session.end(RelayEnd.BROKEN, "access denied to root connecting to node")
        assert "access denied to root connecting to node" in caplog.text
        assert getattr(caplog.records[-1], "connection", "") == connection_id(1)

    with caplog.at_level(logging.INFO):
        run_ssh(scenario)


@pytest.mark.parametrize(("found", "asked"), [(cluster_target(), 1), (WebApp(PROFILE, "x"), 3)])
def test_web_port_of_an_undecided_name_is_relayed_and_asked_for_once(run, found, asked):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = found
        for flow_id in (1, 2, 3):
            assert await bed.verdict(program, flow_id, port=WEB_PORT) is None
        assert bed.plans == [WEB_PLAN] * 3
        assert bed.naming.asked == asked
        assert await bed.verdict(program, 4, port=80) is not None
        assert bed.naming.asked == asked + 1

    run(scenario)


def test_web_relay_ends_with_its_profile(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = cluster_target()
        assert await bed.verdict(program, port=WEB_PORT) is None
        bed.teleport.owners.clear()
        assert await bed.verdict(program, 2, port=WEB_PORT) is Refusal.UNKNOWN_APP
        bed.admission.cut(OWNER)
        bed.naming.found = NotOurs()
        assert await bed.verdict(program, 3, port=WEB_PORT) is Refusal.UNKNOWN_APP
        assert bed.naming.asked == 2

    run(scenario)


@pytest.mark.parametrize("error", [dial.ProxyUnreachableError, dial.DialRefusedError])
def test_proxy_that_restarts_is_dialled_once_more_within_the_same_time(run, error):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.dial_results = [error("connection closed")]
        assert await bed.verdict(program) is None
        assert len(bed.plans) == 2
        assert bed.deadlines[1] <= bed.deadlines[0] == module.DIAL_SECONDS
        assert len(bed.teleport.planned) == 1
        bed.dial_results = [error("closed"), error("closed"), error("closed")]
        assert await bed.verdict(program, 2) is not None
        assert len(bed.plans) == 4

    run(scenario)


@pytest.mark.parametrize(
    "error", [dial.DialTimedOutError, dial.ProxyUntrustedError, dial.HandshakeFailedError]
)
def test_other_failures_are_not_tried_again(run, error):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.dial_results = [error("x")]
        assert await bed.verdict(program) is not None
        assert len(bed.plans) == 1

    run(scenario)


def test_dial_that_used_up_its_time_is_not_tried_again(run, monkeypatch):
    monkeypatch.setattr(module, "DIAL_SECONDS", 0.0)

    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.dial_results = [dial.ProxyUnreachableError("x")]
        assert await bed.verdict(program) is Refusal.CLUSTER_UNREACHABLE
        assert len(bed.plans) == 1

    run(scenario)


def test_end_of_a_login_cuts_all_that_was_made_with_it_and_nothing_else(run, caplog):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        other = dataclasses.replace(OWNER, user="bob")
        await bed.verdict(program, 1)
        bed.connect(program)
        with bed.program() as web, bed.program() as waiting, bed.program() as bobs:
            bed.naming.found = WebApp(PROFILE, "x")
            port = bed.listener.getsockname()[1]
            bed.teleport.web_port = lambda _profile: port
            await bed.verdict(web, 2)
            bed.connect(web)
            bed.naming.found = app_target()
            await bed.verdict(waiting, 3)
            bed.teleport.plan_result = asyncio.Event()
            bed.admission.request(bed.request(waiting, 4, port=1))
            await until(lambda: len(bed.teleport.planned) == 3)
            bed.teleport.owners[PROFILE] = other
            bed.admission.request(bed.request(bobs, 5, port=2))
            await until(lambda: len(bed.teleport.planned) == 4)

            bed.admission.cut(Owner("another", "alice", "example.test"))
            assert not any(relay.is_over for relay in FakeRelay.made)
            bed.admission.cut(OWNER)
            assert [relay.is_over for relay in FakeRelay.made] == [True, False]
            assert bed.dialled[2].is_closed
            assert await bed.answer(4) is Refusal.NOT_LOGGED_IN
            await until(lambda: bed.count("dialling_now") == 1)
            bed.teleport.plan_result.set()
            assert await bed.answer(5) is None
            assert [v.flow_id for v in bed.verdicts].count(4) == 1
            bed.connect(waiting)  # too late: nothing waits for it any more
            assert bed.count("connections_orphaned") == 1
        lines = [line for line in caplog.text.splitlines() if "cuts connections" in line]
        assert len(lines) == 1
        assert lines[0].endswith(
            "the login of alice at teleport.example.test has ended, which cuts connections: 3"
        )

    with caplog.at_level(logging.INFO):
        run(scenario)


def test_those_who_wait_for_a_second_factor_leave_room_for_others(run, monkeypatch):
    monkeypatch.setattr(module, "THIN_SECONDS", 0.01)

    async def scenario(bed: Bed, program: socket.socket) -> None:
        waits = bed.admission._long_waits
        waits._long_seconds = 0.05
        bed.teleport.plan_result = asyncio.Event()
        for flow_id in range(1, 9):
            bed.admission.request(bed.request(program, flow_id, port=flow_id))
        await until(lambda: len(bed.verdicts) == 5)
        assert {v.refusal for v in bed.verdicts} == {Refusal.TOO_MANY}
        # The first ones stay; another one finds no place.
        assert sorted(v.flow_id for v in bed.verdicts) == [4, 5, 6, 7, 8]
        await until(lambda: bed.count("dialling_now") == 3)
        assert await bed.verdict(program, 9, port=9) is Refusal.TOO_MANY
        bed.teleport.plan_result.set()
        for flow_id in (1, 2, 3):
            assert await bed.answer(flow_id) is None
        assert len(waits) == 0
        assert await bed.verdict(program, 10, port=10) is None

    run(scenario, max_connections=100, max_long_waits=3)


def test_the_same_refusal_is_told_once_and_counted(run, caplog):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = NotOurs()
        for flow_id in range(1, 1001):
            await bed.verdict(program, flow_id)
        assert bed.count("connections_failed") == 1000
        lines = [line for line in caplog.text.splitlines() if "refused (" in line]
        assert len(lines) == 1

    with caplog.at_level(logging.INFO):
        run(scenario, max_connections=2000)


def test_each_refusal_is_told_at_debug_with_the_id_of_its_connection(run, caplog):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = NotOurs()
        for flow_id in (1, 2, 3):
            await bed.verdict(program, flow_id)
        told = [
            (record.levelname, record.connection)
            for record in caplog.records
            if "refused (" in record.getMessage()
        ]
        assert told == [
            ("INFO", connection_id(1)),
            ("DEBUG", connection_id(2)),
            ("DEBUG", connection_id(3)),
        ]

    with caplog.at_level(logging.DEBUG):
        run(scenario)


def test_probe_is_refused_at_once_and_is_no_connection(run, caplog):
    caplog.set_level(logging.INFO)

    async def scenario(bed, program):
        bed.dial_results.append(asyncio.Event())
        bed.admission.request(bed.request(program))
        address, port = PROBED
        probe = msgspec.structs.replace(
            bed.request(program, flow_id=2), destination=address, destination_port=port
        )
        bed.admission.request(probe)
        # Above the limit on connections too, and without a turn of the loop.
        assert bed.verdicts == [DialVerdict(flow_id=2, refusal=Refusal.PROBE)]
        bed.admission.request(msgspec.structs.replace(probe, destination_port=port + 1, flow_id=3))
        assert bed.verdicts[1:] == [DialVerdict(flow_id=3, refusal=Refusal.TOO_MANY)]
        assert bed.counters["probes"] == bed.counters["connections_failed"] == 1
        assert [record for record in caplog.records if "probe" in record.getMessage()] == []
        bed.admission.abandon(1)

    run(scenario, max_connections=1)


# -- handing over to a successor --


def test_handover_with_nothing_under_way_takes_no_time(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        bed.connect(program)
        began = asyncio.get_running_loop().time()
        await bed.admission.hand_over(60.0)
        assert asyncio.get_running_loop().time() - began < 10.0
        assert bed.admission.connections == 1
        assert not FakeRelay.made[0].is_over
        finished = asyncio.ensure_future(bed.admission.finished())
        await asyncio.sleep(0)
        assert not finished.done()
        FakeRelay.made[0].end()
        await finished

    run(scenario)


def test_handover_waits_for_dials_and_for_what_they_admit(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        held = asyncio.Event()
        bed.dial_results = [held]
        bed.admission.request(bed.request(program, 1))
        await until(lambda: bed.plans)
        handover = asyncio.ensure_future(bed.admission.hand_over(60.0))
        await asyncio.sleep(0)
        # For its successor, which tun asks again.
        bed.admission.request(bed.request(program, 2, port=1))
        held.set()
        assert await bed.answer(1) is None
        bed.admission.request(bed.request(program, 1))  # the verdict was lost
        assert bed.verdicts == [DialVerdict(flow_id=1)] * 2
        await asyncio.sleep(0.01)
        assert not handover.done()
        bed.connect(program)
        await handover
        assert len(bed.dialled) == 1
        assert bed.count("connections_now") == 1

    run(scenario)


def test_what_takes_too_long_at_the_handover_is_given_up_without_a_verdict(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program, 1)  # its program never comes
        with bed.program() as slow, bed.program() as second_factor:
            bed.dial_results = [asyncio.Event()]
            bed.admission.request(bed.request(slow, 2))
            await until(lambda: len(bed.plans) == 2)
            bed.teleport.plan_result = asyncio.Event()
            bed.admission.request(bed.request(second_factor, 3))
            await until(lambda: len(bed.teleport.planned) == 3)
            await bed.admission.hand_over(0.05)
        assert [verdict.flow_id for verdict in bed.verdicts] == [1]
        assert bed.count("dialling_now") == bed.count("waiting_now") == 0
        assert bed.dialled[0].is_closed
        assert bed.count("connections_failed") == 0
        await bed.admission.finished()

    run(scenario)


def test_end_of_a_login_still_cuts_after_the_handover(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        bed.connect(program)
        await bed.admission.hand_over(60.0)
        finished = asyncio.ensure_future(bed.admission.finished())
        bed.admission.cut(OWNER)
        await finished
        assert FakeRelay.made[0].is_over

    run(scenario)


# -- what `vnet connections` is told --


def app_with_ports(first: int, last: int) -> AppTarget:
    target = app_target()
    app = dataclasses.replace(target.app, ports=(PortRange(first, last),))
    return dataclasses.replace(target, app=app)


@pytest.mark.parametrize(
    ("found", "port", "counted"),
    [
        (app_target(), None, ("app", PROFILE, "", "pg.example.test", None)),
        (app_with_ports(22, 30), 22, ("app", PROFILE, "", "pg.example.test", 22)),
        # Ports that an app does not have are counted together.
        (app_with_ports(1, 5), 22, ("app", PROFILE, "", "pg.example.test", None)),
        (database_target(), None, ("database", PROFILE, "", "pg.example.test", None)),
        (cluster_target(), 22, ("ssh", PROFILE, "", "pg.example.test", None)),
        (cluster_target(), WEB_PORT, ("web", PROFILE, "", "pg.example.test", None)),
        (WebApp(PROFILE, "web"), WEB_PORT, ("web", PROFILE, "", "pg.example.test", None)),
    ],
)
def test_connection_is_counted_by_what_it_leads_to(run, found, port, counted):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.naming.found = found
        assert await bed.verdict(program, port=port) is None
        [target] = [line for line in bed.admission.ledger.lines() if hasattr(line, "dialling")]
        assert (target.kind, target.profile, target.leaf, target.name, target.port) == counted
        [told] = bed.told()
        assert (told.state, told.id) == ("dialling", connection_id(1))

    run(scenario, has_ssh=True)


def test_list_follows_a_connection(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        bed.connect(program)
        [told] = bed.told()
        assert (told.state, told.bytes_sent, told.bytes_received) == ("active", 5, 7)
        FakeRelay.made[0].end(RelayEnd.APP_RESET, "gone")
        [told] = bed.told()
        assert (told.state, told.end, told.error) == ("done", "app_reset", "gone")

    run(scenario)


def test_list_follows_a_relay_that_ends_at_its_start(run, monkeypatch):
    monkeypatch.setattr(FakeRelay, "ends_at_once", True)

    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        bed.connect(program)
        assert [(told.state, told.end) for told in bed.told()] == [("done", "broken")]

    run(scenario)


def test_list_has_what_was_refused_and_why(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        bed.teleport.plan_result = RefusedError("the role says no")
        await bed.verdict(program)
        bed.naming.error = UnknownAddressError("no name has it")
        await bed.verdict(program, 2)
        seen = [(told.name, told.refusal, told.error) for told in bed.told()]
        assert seen == [
            ("pg.example.test", "certificate_refused", "the role says no"),
            ("", "unknown_address", "no name has it"),
        ]

    run(scenario)


def test_list_has_what_was_too_much(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        with bed.program() as other:
            assert await bed.verdict(other, 2) is Refusal.TOO_MANY
        assert [told.refusal for told in bed.told()] == [None, "too_many"]

    run(scenario, max_connections=1)


def test_list_has_what_nobody_waited_for(run, monkeypatch):
    monkeypatch.setattr(module, "ACCEPT_SECONDS", 0.01)

    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        await until(lambda: not bed.count("waiting_now"))
        bed.dial_results = [asyncio.Event()]
        bed.admission.request(bed.request(program, 2))
        bed.admission.abandon(2)
        told = bed.told()
        assert [line.state for line in told] == ["cancelled", "cancelled"]
        assert "never came" in told[0].error
        assert "given up" in told[1].error
        await until(lambda: not bed.count("dialling_now"))

    run(scenario)


def test_list_says_that_a_login_has_ended(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        await bed.verdict(program)
        bed.admission.cut(OWNER)
        [told] = bed.told()
        assert told.state == "cancelled"
        assert "login of alice" in told.error

    run(scenario)


def test_probes_are_not_in_the_list(run):
    async def scenario(bed: Bed, program: socket.socket) -> None:
        request = bed.request(program)
        probe = msgspec.structs.replace(request, destination=PROBED[0], destination_port=PROBED[1])
        bed.admission.request(probe)
        assert bed.told() == []

    run(scenario)


def test_a_stranger_gets_a_refusal_at_once_and_sets_nothing_going(run, caplog):
    kernel = FakeKernel(MALLORY)

    async def scenario(bed, program):
        caplog.set_level(logging.INFO, module.__name__)
        bed.teleport.plan_result = LoginExpiredError("nobody asks")
        bed.admission.request(bed.request(program))
        # Without a turn of the loop.
        [verdict] = bed.verdicts
        assert verdict == DialVerdict(flow_id=1, refusal=Refusal.USER_NOT_ALLOWED)
        assert bed.naming.asked == 0
        assert bed.teleport.planned == bed.teleport.spellings == bed.plans == []
        assert bed.count("refused_users") == bed.count("connections_failed") == 1
        [told] = bed.told()
        port = program.getsockname()[1]
        assert told.error == (
            f"connection from uid 1001 (port {port}): only alice, root and those in"
            " security.allow_users may connect"
        )
        assert (told.name, told.profile) == ("pg.example.test", PROFILE)
        assert told.refusal is Refusal.USER_NOT_ALLOWED
        [line] = [r.message for r in caplog.records if r.levelno == logging.INFO]
        assert line.startswith("connection from uid 1001 to pg.example.test at 127.0.0.1:")
        assert "only alice, root and" in line
        kernel.uid = ALICE
        bed.teleport.plan_result = PLAN
        assert await bed.verdict(program, flow_id=2) is None
        bed.connect(program)
        FakeRelay.made[0].end()

    run(scenario, kernel=kernel)


def test_who_has_the_end_when_all_is_ready_is_who_counts(run, caplog):
    kernel = FakeKernel(ALICE)

    async def scenario(bed, program):
        caplog.set_level(logging.INFO, module.__name__)
        for flow_id, (uid, refusal) in enumerate(
            [
                (MALLORY, Refusal.USER_NOT_ALLOWED),
                (None, Refusal.TIMED_OUT),
                (UNKNOWN, Refusal.TIMED_OUT),
            ],
            1,
        ):
            kernel.uid, gate = ALICE, asyncio.Event()
            bed.dial_results = [gate]
            bed.admission.request(bed.request(program, flow_id))
            await until(lambda number=flow_id: len(bed.plans) == number)
            kernel.uid = uid
            gate.set()
            assert await bed.answer(flow_id) is refusal
            assert bed.dialled[-1].is_closed
        assert kernel.asked == [SYN_SENT] * 6
        assert bed.count("refused_users") == bed.count("connections_failed") == 1
        assert bed.count("waiting_now") == 0
        told = bed.told()
        assert [line.state for line in told] == ["failed", "cancelled", "cancelled"]
        assert {line.name for line in told} == {"pg.example.test"}
        # Whoever presses Ctrl+C is no stranger.
        assert [r.message for r in caplog.records if "refused" in r.message] == [
            r.message for r in caplog.records if "from uid 1001" in r.message
        ]
        await until(lambda: not bed.count("dialling_now"))

    run(scenario, kernel=kernel)


@pytest.mark.parametrize("uid", [MALLORY, ALICE, None, UNKNOWN])
def test_who_has_the_end_when_it_is_accepted_gets_the_connection_if_it_may(run, uid):
    kernel = FakeKernel(ALICE)

    async def scenario(bed, program):
        assert await bed.verdict(program) is None
        kernel.uid = uid
        bed.connect(program)
        # Of a program that has said all it has to say nothing can be found out.
        is_refused = uid == MALLORY
        assert bed.count("connections_failed") == bed.count("refused_users") == is_refused
        assert bed.count("connections_total") == (not is_refused)
        assert len(FakeRelay.made) == (not is_refused)
        assert bed.count("waiting_now") == 0
        assert len(bed.verdicts) == 1
        [told] = bed.told()
        assert (told.refusal is Refusal.USER_NOT_ALLOWED) == is_refused
        if is_refused:
            assert bed.dialled[0].is_closed
            with pytest.raises(ConnectionResetError):
                program.recv(1)
        else:
            FakeRelay.made[0].end()

    run(scenario, kernel=kernel)


def test_a_stranger_is_refused_before_the_limit_and_at_an_address_without_a_name(run):
    async def scenario(bed, program):
        bed.naming.error = UnknownAddressError("no name was given this address")
        assert await bed.verdict(program) is Refusal.USER_NOT_ALLOWED
        bed.naming.error = BookUnavailableError("the file is gone")
        assert await bed.verdict(program, flow_id=2) is Refusal.USER_NOT_ALLOWED
        assert {told.name for told in bed.told()} == {""}

    run(scenario, kernel=FakeKernel(MALLORY), max_connections=0)


def test_a_probe_is_answered_whoever_sends_it(run):
    async def scenario(bed, program):
        request = DialRequest(
            flow_id=1,
            source=b"\x7f\0\0\1",
            source_port=1,
            destination=PROBED[0],
            destination_port=PROBED[1],
        )
        bed.admission.request(request)
        assert bed.verdicts == [DialVerdict(flow_id=1, refusal=Refusal.PROBE)]

    run(scenario, kernel=FakeKernel(MALLORY))


def test_strangers_do_not_fill_the_log_nor_keep_others_from_it(run, caplog):
    kernel = FakeKernel(MALLORY)

    async def scenario(bed, program):
        caplog.set_level(logging.INFO, module.__name__)
        for number in range(1000):
            kernel.uid = MALLORY + number
            bed.admission.request(bed.request(program, flow_id=1 + number))
        told = [r for r in caplog.records if r.levelno == logging.INFO]
        assert len(told) == module.MAX_KINDS_OF_STRANGERS
        kernel.uid = ALICE
        bed.teleport.plan_result = LoginExpiredError("log in")
        assert await bed.verdict(program, flow_id=2000) is Refusal.NOT_LOGGED_IN
        assert "log in" in caplog.records[-1].message

    run(scenario, kernel=kernel)


@pytest.mark.parametrize(
    ("found", "is_looked_at"),
    [
        (app_target(), True),
        (database_target(), False),
        (WebApp(PROFILE, "page"), True),
        (cluster_target(), True),  # the second time without asking
    ],
)
def test_what_may_be_http_is_looked_at(run, found, is_looked_at):
    async def scenario(bed, _):
        bed.admission.http = HttpRules()
        bed.naming.found = found
        if isinstance(found, WebApp | ClusterTarget):
            bed.teleport.web_port = lambda _profile: bed.place[1]
        for flow_id in (1, 2):
            with bed.program() as program:
                assert await bed.verdict(program, flow_id) is None
                bed.connect(program)
                made, others = FakeGuardedRelay.made, FakeRelay.made
                wanted = (flow_id, 0) if is_looked_at else (0, flow_id)
                assert (len(made), len(others)) == wanted
                (made or others)[-1].end()

    run(scenario)


def test_rules_are_those_in_force_when_the_connection_is_accepted(run):
    async def scenario(bed, program):
        bed.admission.http = HttpRules()
        assert await bed.verdict(program) is None
        bed.admission.http = HttpRules(hosts={"pg.example.test": ["*"]})
        bed.connect(program)
        assert not FakeGuardedRelay.made
        FakeRelay.made[0].end()

    run(scenario)


def test_refused_requests_are_counted_and_told_once_without_what_moves_a_cursor(run, caplog):
    async def scenario(bed, _):
        caplog.set_level(logging.INFO, module.__name__)
        bed.admission.http = HttpRules()
        refused = Refused(421, "the Host is not a name of the app", "evil\x1b[2J" + "x" * 300, b"")
        for flow_id in range(1, 4):
            with bed.program() as program:
                assert await bed.verdict(program, flow_id) is None
                bed.connect(program)
                FakeGuardedRelay.made[-1].refuse(refused)
        assert bed.count("http_refused") == 3
        [line] = [r.message for r in caplog.records if r.levelno == logging.INFO]
        assert line.startswith("HTTP request for Host 'evil [2Jxxx")
        assert line.endswith("...' at pg.example.test refused: the Host is not a name of the app")
        assert line.isprintable()
        assert len(line) < 250
        assert {told.end for told in bed.told()} == {"http_refused"}

    run(scenario)

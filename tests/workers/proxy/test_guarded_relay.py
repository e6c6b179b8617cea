"""Relays whose programs are looked at: what reaches the app, what the program is told, and how all ends."""

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time

import pytest
from relay_bed import digest, one_program, program, receive_all, run_in_bed, until
from tls_peers import FarConnection, Peer, unframe

from ipc.messages import HttpRules
from workers.proxy import guarded_relay
from workers.proxy.http_guard import guard as guard_module
from workers.proxy.http_guard.guard import Guard, Step
from workers.proxy.http_guard.refusal import Refused
from workers.proxy.http_guard.rules import rules_for
from workers.proxy.relay import RelayEnd

PING = pytest.mark.parametrize("is_ping", [False, True], ids=["plain", "ping"])
MEGABYTES = os.urandom(1 << 20) * 5
NAME = "app.demo.test"
RIGHT = b"GET / HTTP/1.1\r\nHost: app.demo.test\r\n\r\n"
WRONG = b"GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: app.demo.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def real_guard() -> Guard:
    rules = rules_for(NAME, HttpRules())
    assert rules is not None
    return Guard(rules)


class ScriptedGuard:
    """Says what the test has written down: one step for each question."""

    def __init__(self, *steps: Step, wants_answers: bool = False) -> None:
        self.steps = list(steps)
        self.wants_answers = wants_answers
        self.asked: list[tuple[str, bytes]] = []

    def _next(self, question: str, data: bytes | memoryview = b"") -> Step:
        self.asked.append((question, bytes(data)))
        return self.steps.pop(0)

    def from_program(self, data: bytes | memoryview) -> Step:
        return self._next("program", data)

    def from_app(self, data: bytes | memoryview) -> Step:
        self.wants_answers = False
        return self._next("app", data)

    def timed_out(self) -> Step:
        return self._next("time")

    def ended(self) -> Step:
        return self._next("end")


def relay_one(handler, talk, *, is_ping: bool = False, guard=real_guard, **options):
    """One guarded relay; what `talk` returned, and the outcome."""
    return run_in_bed(
        # A refusal may come before the far end is ready.
        Peer(handler, is_ping=is_ping, ignored_errors=(ConnectionError,)),
        lambda bed: one_program(bed, talk),
        alpn="teleport-tcp-ping" if is_ping else "teleport-tcp",
        make_guard=guard,
        **options,
    )


def read_to_the_end(seen: list[bytes], is_ping: bool):
    """A far end that keeps what it gets, without frames. A refusal may reset it."""

    def read(far: FarConnection) -> None:
        data = b""
        with contextlib.suppress(ConnectionError):
            while more := far.recv():
                data += more
        seen.append(unframe(data) if is_ping else data)
        with contextlib.suppress(ConnectionError):
            far.close_notify()

    return read


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def push(connection: socket.socket, data: bytes) -> None:
    """More than is taken of anybody."""
    for _ in range(100):
        connection.sendall(data)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- what passes --


@PING
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_right_requests_reach_the_app_as_they_are(is_ping, piece):
    seen: list[bytes] = []
    sent = RIGHT * 3 + b"POST / HTTP/1.1\r\nhost: APP.demo.test:80\r\ncontent-length: 2\r\n\r\nhi"

    def talk(connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(sent), piece):
            connection.sendall(sent[start : start + piece])
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    received, outcome = relay_one(read_to_the_end(seen, is_ping), talk, is_ping=is_ping)
    assert (received, seen) == (b"", [sent])
    assert (outcome.end, outcome.bytes_up) == (RelayEnd.PROGRAM_CLOSED, len(sent))


@PING
def test_a_large_body_passes_whole_to_an_app_that_is_slow(is_ping):
    seen: list[bytes] = []
    head = b"PUT / HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n" % (
        NAME.encode(),
        len(MEGABYTES),
    )
    has_begun = threading.Event()

    def read(far: FarConnection) -> None:
        assert has_begun.wait(20)
        read_to_the_end(seen, is_ping)(far)

    def talk(connection):
        sender = threading.Timer(0.1, has_begun.set)
        sender.start()
        connection.sendall(head + MEGABYTES + RIGHT)
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    _, outcome = relay_one(read, talk, is_ping=is_ping)
    assert digest(seen[0]) == digest(head + MEGABYTES + RIGHT)
    assert outcome.bytes_up == len(seen[0])


@PING
def test_what_is_no_http_passes_both_ways_and_the_guard_is_dropped(is_ping):
    def echo(far: FarConnection) -> None:
        while data := far.recv():
            far.send_raw(data)
        far.close_notify()

    async def scenario(bed):
        def talk():
            with program(bed.address) as connection:
                received = []
                reader = threading.Thread(target=lambda: received.append(receive_all(connection)))
                reader.start()
                connection.sendall(b"\x00\x01" + MEGABYTES)
                connection.shutdown(socket.SHUT_WR)
                reader.join()
                return received[0]

        talking = asyncio.create_task(asyncio.to_thread(talk))
        await bed.accept()
        await until(lambda: bed.relays[0].bytes_up > 0)
        assert bed.relays[0]._guard is None
        received = await talking
        await bed.ended()
        return received, bed.outcomes[0]

    received, outcome = run_in_bed(
        Peer(echo, is_ping=is_ping),
        scenario,
        alpn="teleport-tcp-ping" if is_ping else "teleport-tcp",
        make_guard=real_guard,
    )
    assert digest(received) == digest(b"\x00\x01" + MEGABYTES)
    assert outcome.end is RelayEnd.PROGRAM_CLOSED


def test_letters_that_may_become_a_request_are_passed_on_after_a_moment():
    def answer(far: FarConnection) -> None:
        far.send(b"got " + far.recv())
        far.recv_all()
        far.close_notify()

    def talk(connection):
        began = time.monotonic()
        connection.sendall(b"PING")
        received = connection.recv(100)
        return received, time.monotonic() - began

    (received, seconds), _ = relay_one(answer, talk)
    assert received == b"got PING"
    assert 0.1 < seconds < 5


@PING
def test_letters_before_the_programs_end_are_passed_on_at_once(is_ping):
    seen: list[bytes] = []

    def talk(connection):
        connection.sendall(b"QUIT")
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    _, outcome = relay_one(read_to_the_end(seen, is_ping), talk, is_ping=is_ping)
    assert seen == [b"QUIT"]
    assert outcome.end is RelayEnd.PROGRAM_CLOSED


def test_an_app_that_speaks_first_is_heard_while_a_head_is_held():
    heard = threading.Event()
    seen: list[bytes] = []

    def speak(far: FarConnection) -> None:
        far.send(b"220 hello")
        assert heard.wait(20)
        read_to_the_end(seen, False)(far)

    def talk(connection):
        connection.sendall(RIGHT[:20])
        assert connection.recv(100) == b"220 hello"
        heard.set()
        connection.sendall(RIGHT[20:])
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    relay_one(speak, talk)
    assert seen == [RIGHT]


def test_an_app_that_ends_first_still_gets_the_rest_of_a_head():
    seen: list[bytes] = []

    def end(far: FarConnection) -> None:
        far.close_notify()
        seen.append(far.recv_all())

    def talk(connection):
        connection.sendall(RIGHT[:20])
        assert receive_all(connection) == b""
        connection.sendall(RIGHT[20:])

    _, outcome = relay_one(end, talk)
    assert seen == [RIGHT]
    assert outcome.end is RelayEnd.APP_CLOSED


# -- what is refused --


@PING
@pytest.mark.parametrize("kind", ["at once", "more follows", "bytes", "after its end"])
def test_refused_program_gets_the_answer_and_the_app_not_one_byte(is_ping, kind, monkeypatch):
    # Letters that come slowly would pass ahead.
    monkeypatch.setattr(guard_module, "UNDECIDED_SECONDS", 20.0)
    seen: list[bytes] = []
    body = MEGABYTES if kind == "more follows" else b""

    def talk(connection):
        if kind == "bytes":
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(len(WRONG)):
                connection.sendall(WRONG[start : start + 1])
        else:
            connection.sendall(WRONG + body)
        if kind == "after its end":
            connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    answer, outcome = relay_one(read_to_the_end(seen, is_ping), talk, is_ping=is_ping)
    assert answer.startswith(b"HTTP/1.1 421 ")
    assert b"\r\nConnection: close\r\n" in answer
    head, _, text = answer.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(text)}".encode() in head
    assert not any(seen)
    assert outcome.end is RelayEnd.HTTP_REFUSED
    assert "Host 'evil.test': " in outcome.error
    assert (outcome.bytes_up, outcome.bytes_down) == (0, 0)


def test_end_of_the_program_within_a_head_is_refused():
    seen: list[bytes] = []

    def talk(connection):
        connection.sendall(RIGHT[:-2])
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    answer, outcome = relay_one(read_to_the_end(seen, False), talk)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert not any(seen)
    assert outcome.end is RelayEnd.HTTP_REFUSED
    assert outcome.error == "the program ended before its head was whole"


def test_wrong_request_after_a_right_one_resets_both():
    seen: list[bytes] = []

    def serve(far: FarConnection) -> None:
        seen.append(far.recv())
        far.send(ANSWER)
        with pytest.raises(ConnectionResetError):
            seen.append(far.recv())

    def talk(connection):
        connection.sendall(RIGHT)
        assert connection.recv(1000) == ANSWER
        connection.sendall(WRONG)
        with pytest.raises(ConnectionResetError):
            connection.recv(1000)

    _, outcome = relay_one(serve, talk)
    assert seen == [RIGHT]
    assert (outcome.end, outcome.bytes_up) == (RelayEnd.HTTP_REFUSED, len(RIGHT))


def test_no_answer_is_mixed_with_what_the_app_said_first():
    def speak(far: FarConnection) -> None:
        far.send(b"220 hello")
        with pytest.raises(ConnectionResetError):
            far.recv()

    def talk(connection):
        assert connection.recv(100) == b"220 hello"
        connection.sendall(WRONG)
        with pytest.raises(ConnectionResetError):
            connection.recv(100)

    _, outcome = relay_one(speak, talk)
    assert outcome.end is RelayEnd.HTTP_REFUSED


def test_refused_program_that_goes_on_and_on_is_reset(monkeypatch):
    monkeypatch.setattr(guarded_relay, "PARTING_SECONDS", 20.0)

    def talk(connection):
        with pytest.raises(ConnectionError):
            push(connection, WRONG + MEGABYTES)

    _, outcome = relay_one(read_to_the_end([], False), talk)
    assert outcome.end is RelayEnd.HTTP_REFUSED


def test_refused_program_that_stays_is_let_go_after_a_while(monkeypatch):
    monkeypatch.setattr(guarded_relay, "PARTING_SECONDS", 0.2)

    async def scenario(bed):
        with program(bed.address) as connection:
            connection.sendall(WRONG)
            await bed.accept()
            await bed.ended()
            return bed.outcomes[0], await asyncio.to_thread(receive_all, connection)

    peer = Peer(read_to_the_end([], False), ignored_errors=(ConnectionError,))
    outcome, answer = run_in_bed(peer, scenario, make_guard=real_guard)
    assert outcome.end is RelayEnd.HTTP_REFUSED
    assert answer.startswith(b"HTTP/1.1 421 ")


def test_refused_program_is_answered_also_if_the_proxy_stood_still():
    async def scenario(bed):
        with program(bed.address) as connection:
            sending = asyncio.create_task(
                asyncio.to_thread(connection.sendall, WRONG + 2 * MEGABYTES)
            )
            await bed.accept()
            await until(lambda: bed.relays[0].refused is not None)
            time.sleep(
                guarded_relay.PARTING_SECONDS + 0.1
            )  # that the loop stands still is what is tested
            await sending
            connection.shutdown(socket.SHUT_WR)
            answer = await asyncio.to_thread(receive_all, connection)
            await bed.ended()
            return answer

    peer = Peer(read_to_the_end([], False), ignored_errors=(ConnectionError,))
    assert run_in_bed(peer, scenario, make_guard=real_guard).startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("what", ["held", "parting"])
def test_abort_ends_everything_at_once(what):
    async def scenario(bed):
        with program(bed.address) as connection:
            connection.sendall(WRONG if what == "parting" else RIGHT[:20])
            await bed.accept()
            relay = bed.relays[0]
            if what == "parting":
                assert (await asyncio.to_thread(receive_all, connection)).startswith(b"HTTP/1.1 4")
            else:
                await until(lambda: relay._held_bytes == 20)
            relay.abort()
            assert relay._timer is None
            assert len(bed.outcomes) == 1
            with pytest.raises(ConnectionError):
                await asyncio.to_thread(push, connection, MEGABYTES)
        return bed.outcomes[0]

    seen: list[bytes] = []
    peer = Peer(read_to_the_end(seen, False), ignored_errors=(ConnectionError,))
    outcome = run_in_bed(peer, scenario, make_guard=real_guard)
    assert not any(seen)
    assert outcome.end is (RelayEnd.HTTP_REFUSED if what == "parting" else RelayEnd.ABORTED)


def test_program_that_dies_within_a_head_resets_the_app():
    def talk(connection):
        assert connection.recv(10) == b"ready"
        connection.sendall(RIGHT[:20])
        reset(connection)

    def far_end(far: FarConnection) -> None:
        far.send(b"ready")
        with pytest.raises(ConnectionResetError):
            far.recv()

    _, outcome = relay_one(far_end, talk)
    assert outcome.end is RelayEnd.PROGRAM_RESET


# -- a change of protocol --


@PING
def test_what_follows_an_upgrade_waits_for_the_apps_answer(is_ping):
    seen: list[bytes] = []
    may_answer = threading.Event()
    frame = b"\x81\x85\0\0\0\0hello"

    def serve(far: FarConnection) -> None:
        data = b""
        while UPGRADE not in (unframe(data) if is_ping else data):
            data += far.recv()
        assert may_answer.wait(20)
        assert not far.has_unread
        far.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")
        read_to_the_end(seen, is_ping)(far)

    def talk(connection):
        connection.sendall(UPGRADE + frame)
        may_answer.set()
        assert connection.recv(1000).startswith(b"HTTP/1.1 101 ")
        connection.sendall(MEGABYTES)
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    _, outcome = relay_one(serve, talk, is_ping=is_ping)
    assert digest(seen[0]) == digest(frame + MEGABYTES)
    assert outcome.end is RelayEnd.PROGRAM_CLOSED


def test_a_request_behind_a_refused_upgrade_is_checked():
    seen: list[bytes] = []

    def serve(far: FarConnection) -> None:
        seen.append(far.recv())
        far.send(ANSWER)
        with pytest.raises(ConnectionResetError):
            seen.append(far.recv())

    def talk(connection):
        connection.sendall(UPGRADE + WRONG)
        with pytest.raises(ConnectionResetError):
            receive_all(connection)

    _, outcome = relay_one(serve, talk)
    assert seen == [UPGRADE]
    assert outcome.end is RelayEnd.HTTP_REFUSED


@pytest.mark.parametrize("program_ends", [False, True])
def test_an_app_that_never_answers_an_upgrade_gets_nothing_more(program_ends):
    seen: list[bytes] = []

    def serve(far: FarConnection) -> None:
        seen.append(far.recv())
        far.close_notify()
        seen.append(far.recv_all())

    def talk(connection):
        connection.sendall(UPGRADE + WRONG)
        if program_ends:
            connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    _, outcome = relay_one(serve, talk)
    assert seen == [UPGRADE, b""]
    assert outcome.end is RelayEnd.APP_CLOSED


# -- what the guard says, one by one --


def scripted(*steps: Step, wants_answers: bool = False):
    guard = ScriptedGuard(*steps, wants_answers=wants_answers)
    return guard, lambda: guard


def test_more_is_not_read_than_may_be_held():
    """The program is slowed down; it goes on when the app has answered."""
    guard, make = scripted(wants_answers=True)

    def hold(data):
        guard.asked.append(("program", bytes(data)))
        return Step()

    guard.from_program = hold
    guard.from_app = lambda data: (
        setattr(guard, "wants_answers", False)
        or setattr(guard, "from_program", lambda more: Step(bytes(more)))
        or Step(b"".join(piece for _, piece in guard.asked))
    )
    may_answer = threading.Event()
    seen: list[bytes] = []

    def serve(far: FarConnection) -> None:
        assert may_answer.wait(20)
        far.send(b"go")
        read_to_the_end(seen, False)(far)

    async def scenario(bed):
        def talk():
            with program(bed.address) as connection:
                connection.sendall(MEGABYTES * 4)
                connection.shutdown(socket.SHUT_WR)
                return receive_all(connection)

        talking = asyncio.create_task(asyncio.to_thread(talk))
        await bed.accept()
        relay = bed.relays[0]
        await until(lambda: relay._held_bytes > bed.max_pending_bytes)
        read_bytes = len(bed.memory.read_buffer)
        for _ in range(50):
            await asyncio.sleep(0)
        assert relay._held_bytes <= bed.max_pending_bytes + read_bytes
        may_answer.set()
        await talking
        await bed.ended()
        return bed.outcomes[0]

    outcome = run_in_bed(Peer(serve), scenario, make_guard=make)
    assert digest(seen[0]) == digest(MEGABYTES * 4)
    assert outcome.end is RelayEnd.PROGRAM_CLOSED


def test_deadline_does_not_run_while_the_app_takes_nothing():
    """The program cannot send the rest: this relay does not read it."""
    beds = []
    unsent: list[int] = []  # what waited for the app each time

    class SlowGuard(ScriptedGuard):
        def from_program(self, data):
            return Step(bytes(data), deadline_seconds=0.05)

        def timed_out(self):
            unsent.append(beds[0].relays[0]._unsent_bytes)
            return Step()

    may_read = threading.Event()
    seen: list[bytes] = []

    def serve(far: FarConnection) -> None:
        assert may_read.wait(20)
        read_to_the_end(seen, False)(far)

    def talk(connection):
        threading.Timer(0.5, may_read.set).start()
        connection.sendall(MEGABYTES * 4)
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    async def scenario(bed):
        beds.append(bed)
        return await one_program(bed, talk)

    _, outcome = run_in_bed(Peer(serve), scenario, make_guard=SlowGuard)
    assert outcome.end is RelayEnd.PROGRAM_CLOSED
    assert len(seen[0]) == 4 * len(MEGABYTES)
    # The program itself may have been late.
    assert not any(unsent)


def test_what_comes_before_the_wrong_request_still_passes():
    refusal = Refused(421, "wrong", "evil.test", b"")
    guard, make = scripted(Step(b"before", refusal))
    seen: list[bytes] = []

    def serve(far: FarConnection) -> None:
        far.send(b"ready")
        seen.append(far.recv())
        with pytest.raises(ConnectionResetError):
            far.recv()

    def talk(connection):
        assert connection.recv(10) == b"ready"
        connection.sendall(b"before and after")
        with pytest.raises(ConnectionResetError):
            connection.recv(10)

    _, outcome = relay_one(serve, talk, guard=make)
    assert outcome.end is RelayEnd.HTTP_REFUSED
    assert outcome.error == "Host 'evil.test': wrong"
    assert seen in ([b"before"], [])
    assert guard.asked == [("program", b"before and after")]


def test_step_takes_the_deadline_of_the_step_before_away():
    guard, make = scripted(Step(deadline_seconds=1.0), Step(b"ab"))

    def talk(connection):
        connection.sendall(b"a")
        wait_until(lambda: len(guard.asked) == 1)
        connection.sendall(b"b")
        assert connection.recv(10) == b"ok"
        connection.settimeout(1.3)
        with pytest.raises(TimeoutError):
            connection.recv(10)

    def serve(far: FarConnection) -> None:
        far.send(b"ok" if far.recv() == b"ab" else b"no")
        far.recv_all()
        far.close_notify()

    relay_one(serve, talk, guard=make)
    assert guard.asked == [("program", b"a"), ("program", b"b")]

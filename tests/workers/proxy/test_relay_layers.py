"""Relays with every layer: what holds for one holds for all."""

import asyncio
import hashlib
import os
import socket
import ssl
import threading

import pytest
from relay_bed import digest, one_program, program, receive_all, run_in_bed, tls_plan, until
from tls_peers import Peer, client_context, stranger
from tunnel_peers import (
    PlainFar,
    TunnelPeer,
    accept_upgrade,
    frame,
    plain_plan,
    reset,
    tunnel_plan,
)

from workers.proxy.reactor import Reactor
from workers.proxy.relay import RelayEnd
from workers.proxy.tls import TlsMemory

KINDS = ["plain", "tls", "tls with ping", "tunnel", "tunnel with ping"]
# For what test_relay.py tests with every version of TLS and event loop.
NOT_TLS = [kind for kind in KINDS if not kind.startswith("tls")]
MEGABYTES = os.urandom(1 << 20) * 10


def make(kind: str, handler, **options):
    """A far end of that kind and the plan to reach it."""
    if kind == "plain":
        peer = Peer(lambda sock: handler(PlainFar(sock)), is_tls=False, **options)
        return peer, plain_plan(peer.port)
    is_ping = "ping" in kind
    alpn = "teleport-tcp-ping" if is_ping else "teleport-tcp"
    if "tls" in kind:
        tls_peer = Peer(handler, is_ping=is_ping, **options)
        return tls_peer, tls_plan(tls_peer.port, client_context(alpn))
    peer = TunnelPeer(handler, is_ping=is_ping, **options)
    return peer, tunnel_plan(peer.port, alpn)


def shrink(sock: socket.socket) -> None:
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 64 * 1024)


def relay_one(kind: str, handler, talk, **options):
    peer, plan = make(kind, handler, **options)
    return run_in_bed(peer, lambda bed: one_program(bed, talk), plan=plan)


@pytest.mark.parametrize("kind", NOT_TLS)
def test_the_program_may_end_first_and_still_get_megabytes(kind):
    def answer_after_the_end(far) -> None:
        seen = digest(far.recv_all())
        far.send(MEGABYTES + seen)
        far.close_notify()

    def talk(connection):
        connection.sendall(MEGABYTES)
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    answer, outcome = relay_one(kind, answer_after_the_end, talk)
    assert digest(answer) == digest(MEGABYTES + digest(MEGABYTES))
    assert outcome.end is RelayEnd.PROGRAM_CLOSED
    assert (outcome.bytes_up, outcome.bytes_down) == (len(MEGABYTES), len(MEGABYTES) + 32)
    assert not outcome.error


@pytest.mark.parametrize("kind", NOT_TLS)
def test_the_app_may_end_first_and_still_get_megabytes(kind):
    seen = []

    def end_then_read(far) -> None:
        far.send(MEGABYTES)
        far.close_notify()
        seen.append(digest(far.recv_all()))

    def talk(connection):
        received = receive_all(connection)
        connection.sendall(MEGABYTES)
        return received

    received, outcome = relay_one(kind, end_then_read, talk)
    assert digest(received) == digest(MEGABYTES)
    assert seen == [digest(MEGABYTES)]
    assert outcome.end is RelayEnd.APP_CLOSED


@pytest.mark.parametrize("kind", ["plain", "tunnel"])
def test_both_directions_run_at_once(kind):
    def echo(far) -> None:
        while data := far.recv():
            far.send(data)
        far.close_notify()

    def talk(connection):
        received = []
        reader = threading.Thread(target=lambda: received.append(receive_all(connection)))
        reader.start()
        connection.sendall(MEGABYTES)
        connection.shutdown(socket.SHUT_WR)
        reader.join()
        return received[0]

    received, _ = relay_one(kind, echo, talk)
    assert digest(received) == digest(MEGABYTES)


def test_tls_1_2_in_tls_1_2():
    def echo(far) -> None:
        far.send(far.recv_all())
        far.close_notify()

    def talk(connection):
        connection.sendall(MEGABYTES)
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    received, _ = relay_one("tunnel", echo, talk, version="TLSv1_2")
    assert digest(received) == digest(MEGABYTES)


def test_pings_are_answered_while_nothing_else_moves():
    def ping(far) -> None:
        for expected in (b"ping 1", b"ping 2"):
            far.socket.outer.send_raw(far.socket.ping_frame())
            assert far.socket.read_frame() == (0xA, expected)
        far.send(b"done")

    received, _ = relay_one("tunnel", ping, receive_all)
    assert received == b"done"


def test_both_ends_in_order_end_the_websocket_too():
    closed = []

    def end(far) -> None:
        far.recv_all()
        far.send(b"bye")
        far.close_notify()
        closed.append((far.socket.recv(100), far.socket.is_closed_by_client))

    def talk(connection):
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    assert relay_one("tunnel", end, talk)[0] == b"bye"
    assert closed == [(b"", True)]


@pytest.mark.parametrize("how", ["websocket", "outer TLS", "tcp"])
def test_an_end_without_inner_close_notify_is_the_apps_end(how):
    def send_and_leave(far) -> None:
        far.send(MEGABYTES)
        if how == "websocket":
            far.socket.end()
        elif how == "outer TLS":
            far.socket.outer.close_notify()

    received, outcome = relay_one(
        "tunnel", send_and_leave, receive_all, ignored_errors=(ssl.SSLError,)
    )
    assert digest(received) == digest(MEGABYTES)
    assert outcome.end is RelayEnd.APP_CLOSED


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_by_the_app_resets_the_program(kind):
    def leave(far) -> None:
        far.recv()
        far.reset()

    def talk(connection):
        connection.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)

    _, outcome = relay_one(kind, leave, talk)
    assert outcome.end is RelayEnd.APP_RESET
    assert "reset" in outcome.error


def test_a_reset_in_the_middle_of_a_frame_resets_the_program():
    def cut(far) -> None:
        far.send(b"x")
        record = b"\x17\x03\x03\x40\x00" + bytes(0x4000)
        far.socket.outer.send_raw(frame(0x2, record)[:10_000])
        far.recv()
        far.reset()

    def talk(connection):
        assert connection.recv(10) == b"x"
        connection.sendall(b"y")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)

    _, outcome = relay_one("tunnel", cut, talk)
    assert outcome.end is RelayEnd.APP_RESET


@pytest.mark.parametrize("kind", KINDS)
def test_a_vanished_program_resets_the_app(kind):
    def expect_reset(far) -> None:
        far.send(b"ready")
        with pytest.raises(ConnectionResetError):
            far.recv_all()

    def talk(connection):
        connection.recv(100)
        connection.sendall(b"data right before the reset")
        reset(connection)

    _, outcome = relay_one(kind, expect_reset, talk)
    assert outcome.end is RelayEnd.PROGRAM_RESET


@pytest.mark.parametrize("kind", ["plain", "tls", "tunnel"])
def test_an_app_that_speaks_first_and_closes_before_the_program_comes_is_heard(kind):
    async def scenario(bed):
        upstream = await bed.dial()
        lost = asyncio.Event()
        upstream.watch(lost.set)
        await lost.wait()
        with program(bed.address) as connection:
            bed.start(upstream, await bed.accept_local())
            received = await asyncio.to_thread(receive_all, connection)
        await bed.ended()
        return received

    peer, plan = make(kind, lambda far: far.send(b"hello"))
    assert run_in_bed(peer, scenario, plan=plan) == b"hello"


@pytest.mark.parametrize("kind", ["plain", "tls", "tunnel"])
def test_early_data_beyond_the_limit_waits_in_the_kernel(kind):
    def greet(far) -> None:
        far.send(MEGABYTES)
        far.close_notify()

    async def scenario(bed):
        upstream = await bed.dial()
        await until(lambda: len(upstream._early) >= 64 * 1024)
        await asyncio.sleep(0.05)
        assert len(upstream._early) < 64 * 1024 + len(bed.memory.plaintext)
        assert not upstream.is_lost
        with program(bed.address) as connection:
            bed.start(upstream, await bed.accept_local())
            received = await asyncio.to_thread(receive_all, connection)
        await bed.ended()
        return received

    peer, plan = make(kind, greet)
    assert digest(run_in_bed(peer, scenario, plan=plan)) == digest(MEGABYTES)


@pytest.mark.parametrize("kind", KINDS)
def test_an_upstream_that_nobody_takes_is_ended_in_order(kind):
    ends = []

    async def scenario(bed):
        upstream = await bed.dial()
        upstream.close()
        await until(lambda: bool(ends))

    peer, plan = make(kind, lambda far: ends.append(far.recv()))
    run_in_bed(peer, scenario, plan=plan)
    assert ends == [b""]


@pytest.mark.parametrize("kind", ["plain", "tls", "tunnel"])
def test_loss_is_noticed_while_the_upstream_waits(kind):
    may_leave = threading.Event()

    def leave(far) -> None:
        may_leave.wait()
        far.reset()

    async def scenario(bed):
        upstream = await bed.dial()
        lost = asyncio.Event()
        upstream.watch(lost.set)
        assert not upstream.is_lost
        may_leave.set()
        await lost.wait()
        assert "reset" in upstream.error
        upstream.close()

    peer, plan = make(kind, leave)
    run_in_bed(peer, scenario, plan=plan)


def test_a_refused_client_certificate_is_reported_through_the_tunnel():
    async def scenario(bed):
        upstream = await bed.dial()
        lost = asyncio.Event()
        upstream.watch(lost.set)
        await lost.wait()
        upstream.close()
        return upstream.error

    peer = TunnelPeer(lambda far: None, ignored_errors=(ssl.SSLError,))
    plan = tunnel_plan(peer.port, context=client_context(issuer=stranger()))
    assert "alert" in run_in_bed(peer, scenario, plan=plan)


@pytest.mark.parametrize(
    "noise",
    [frame(0x1, b"text"), frame(0x9, bytes(126)), frame(0x2, b"no TLS record at all" * 10)],
    ids=["text frame", "long ping", "no TLS inside"],
)
def test_a_broken_stream_inside_the_tunnel_resets_the_program(noise):
    def corrupt(far) -> None:
        far.socket.outer.send_raw(noise)
        with pytest.raises(ConnectionResetError):
            far.socket.outer.recv()

    def talk(connection):
        with pytest.raises(ConnectionResetError):
            connection.recv(1)

    _, outcome = relay_one("tunnel", corrupt, talk)
    assert outcome.end is RelayEnd.BROKEN
    assert outcome.error


def repeat_for_ever(send, data: bytes) -> None:
    while True:
        send(data)


def test_a_far_end_that_pings_without_end_and_reads_nothing_is_left(monkeypatch):
    """Answers to pings have no other limit: they are not the program's."""
    monkeypatch.setattr("workers.proxy.relay.MAX_UNREAD_BYTES", 20_000)

    def flood(far) -> None:
        with pytest.raises(ConnectionError):
            repeat_for_ever(far.socket.outer.send_raw, frame(0x9, bytes(125)))

    async def scenario(bed):
        bed.reactor.close()
        bed.reactor = Reactor(asyncio.get_running_loop(), TlsMemory(1024))  # a few pings a read
        with program(bed.address) as connection:
            upstream = await bed.dial()
            shrink(upstream.endpoint.socket)
            bed.start(upstream, await bed.accept_local())
            await bed.ended()
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        return bed.outcomes[0]

    peer, plan = make("tunnel", flood)
    peer._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    outcome = run_in_bed(peer, scenario, plan=plan, max_pending_bytes=0)
    assert outcome.end is RelayEnd.BROKEN
    assert "does not read" in outcome.error


async def _stalled(sent_so_far):
    """Waits until a sender makes no more progress; returns how far it got."""
    last, looks = -1, 0
    # Many short looks: of a long one it may get nothing on a busy machine.
    while looks < 30 or last == 0:
        await asyncio.sleep(0.01)
        now = sent_so_far()
        last, looks = now, looks + 1 if now == last else 0
    return last


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_program_slows_the_app(kind):
    sent = []

    def push(far) -> None:
        shrink(far.socket)
        for _ in range(400):
            far.send(MEGABYTES[:100_000])
            sent.append(100_000)
        far.close_notify()

    async def scenario(bed):
        with program(bed.address) as connection:
            shrink(connection)
            await bed.accept()
            relay = bed.relays[0]
            assert await _stalled(lambda: sum(sent)) < 40_000_000
            pending = relay._local.pending_bytes
            assert 0 < pending <= bed.max_pending_bytes + len(bed.memory.plaintext)
            received = await asyncio.to_thread(receive_all, connection)
        await bed.ended()
        return received

    peer, plan = make(kind, push)
    received = run_in_bed(peer, scenario, plan=plan)
    assert digest(received) == digest(MEGABYTES[:100_000] * 400)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_app_slows_the_program(kind):
    may_read = threading.Event()
    seen = []

    def read_late(far) -> None:
        shrink(far.socket)
        may_read.wait()
        seen.append(digest(far.recv_all()))
        far.close_notify()

    async def scenario(bed):
        sent = []

        def push(connection):
            for _ in range(100):
                connection.sendall(MEGABYTES[:400_000])
                sent.append(400_000)
            connection.shutdown(socket.SHUT_WR)
            return receive_all(connection)

        with program(bed.address) as connection:
            shrink(connection)
            await bed.accept()
            pushing = asyncio.create_task(asyncio.to_thread(push, connection))
            assert await _stalled(lambda: sum(sent)) < 40_000_000
            pending = bed.relays[0]._remote.pending_bytes
            assert 0 < pending <= bed.max_pending_bytes + 2 * len(bed.memory.plaintext)
            may_read.set()
            await pushing
        await bed.ended()

    peer, plan = make(kind, read_late)
    run_in_bed(peer, scenario, plan=plan)
    assert seen == [digest(MEGABYTES[:400_000] * 100)]


def test_what_comes_with_the_answer_to_the_upgrade_is_not_lost():
    """A ping right behind the head, in the same record."""

    def greet(outer, request) -> bool:
        return accept_upgrade(outer, request, behind=frame(0x9, b"early") + frame(0x2, b""))

    def answer(far) -> None:
        far.send(far.recv_all())
        assert b"early" in far.socket.pongs
        far.close_notify()

    def talk(connection):
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    assert relay_one("tunnel", answer, talk, greet=greet)[0] == b"hello"


def test_tunnels_and_others_share_the_memory_of_one_loop():
    def echo(far) -> None:
        far.send(far.recv_all())
        far.close_notify()

    count = 30

    async def scenario(bed):
        def talk(index):
            message = hashlib.sha256(bytes([index])).digest() * 20_000
            with program(bed.address) as connection:
                connection.sendall(message)
                connection.shutdown(socket.SHUT_WR)
                return receive_all(connection) == message

        plans = [bed._plan, plain_plan(plain.port)]
        results = asyncio.gather(*(asyncio.to_thread(talk, n) for n in range(count)))
        for index in range(count):
            bed._plan = plans[index % 2]
            await bed.accept()
        assert all(await results)
        await bed.ended(count)

    plain, _ = make("plain", echo)
    peer, plan = make("tunnel", echo)
    with plain:
        run_in_bed(peer, scenario, plan=plan)

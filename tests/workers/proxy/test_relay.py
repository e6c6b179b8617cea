"""Relays to a Teleport proxy by TLS routing. What holds for every layer: test_relay_layers.py."""

import asyncio
import hashlib
import os
import socket
import ssl
import struct
import threading

import pytest
import uvloop
from relay_bed import digest, one_program, program, receive_all, run_in_bed
from tls_peers import FarConnection, Peer, client_context, server_context, stranger, unframe

from workers.proxy.relay import RelayEnd

MEGABYTES = os.urandom(1 << 20) * 5
PING = pytest.mark.parametrize("is_ping", [False, True], ids=["plain", "ping"])
LOOPS = pytest.mark.parametrize("loop_factory", [uvloop.new_event_loop, asyncio.new_event_loop])


def alpn(is_ping: bool) -> str:
    return "teleport-tcp-ping" if is_ping else "teleport-tcp"


def reset_on_close(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def push_for_ever(send) -> None:
    while True:
        send(MEGABYTES)


@PING
@LOOPS
def test_the_program_may_end_first_and_still_get_megabytes(is_ping, loop_factory):
    def answer_after_the_end(far: FarConnection) -> None:
        seen = digest(far.recv_all())
        far.send(MEGABYTES + seen)
        far.close_notify()

    def talk(connection):
        connection.sendall(MEGABYTES)
        connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)

    answer, outcome = run_in_bed(
        Peer(answer_after_the_end, is_ping=is_ping),
        lambda bed: one_program(bed, talk),
        alpn=alpn(is_ping),
        loop_factory=loop_factory,
    )
    assert digest(answer) == digest(MEGABYTES + digest(MEGABYTES))
    assert outcome.end is RelayEnd.PROGRAM_CLOSED
    assert (outcome.bytes_up, outcome.bytes_down) == (len(MEGABYTES), len(MEGABYTES) + 32)
    assert not outcome.error


@PING
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_the_app_may_end_first_and_still_get_megabytes(is_ping, version):
    seen = []

    def end_then_read(far: FarConnection) -> None:
        far.send(MEGABYTES)
        far.close_notify()
        seen.append(digest(far.recv_all()))

    def talk(connection):
        received = receive_all(connection)
        connection.sendall(MEGABYTES)
        return received

    peer = Peer(end_then_read, server_context(alpn(is_ping), version), is_ping=is_ping)
    received, outcome = run_in_bed(peer, lambda bed: one_program(bed, talk), alpn=alpn(is_ping))
    assert digest(received) == digest(MEGABYTES)
    assert seen == [digest(MEGABYTES)]
    assert outcome.end is RelayEnd.APP_CLOSED


@PING
def test_both_directions_run_at_once(is_ping):
    def echo(far: FarConnection) -> None:
        while data := far.recv():
            far.send_raw(data)
        far.close_notify()

    def talk(connection):
        received = []
        reader = threading.Thread(target=lambda: received.append(receive_all(connection)))
        reader.start()
        connection.sendall(MEGABYTES)
        connection.shutdown(socket.SHUT_WR)
        reader.join()
        return received[0]

    # The echo sends the program's own frames back.
    received, _ = run_in_bed(
        Peer(echo, is_ping=is_ping), lambda bed: one_program(bed, talk), alpn=alpn(is_ping)
    )
    assert digest(received) == digest(MEGABYTES)


def test_what_the_program_sends_is_framed():
    seen = []

    def read(far: FarConnection) -> None:
        seen.append(b"".join(iter(far.recv, b"")))
        far.close_notify()

    def talk(connection):
        connection.sendall(b"abc")
        connection.shutdown(socket.SHUT_WR)
        receive_all(connection)

    run_in_bed(Peer(read, is_ping=True), lambda bed: one_program(bed, talk), alpn=alpn(True))
    assert unframe(seen[0]) == b"abc"
    assert seen == [b"\0\0\0\3abc"]


def test_an_end_without_close_notify_is_the_apps_end():
    def send_and_leave(far: FarConnection) -> None:
        far.send(MEGABYTES)  # the socket is closed on return

    received, outcome = run_in_bed(Peer(send_and_leave), lambda bed: one_program(bed, receive_all))
    assert digest(received) == digest(MEGABYTES)
    assert outcome.end is RelayEnd.APP_CLOSED


def test_a_program_that_dies_after_its_end_is_noticed_while_the_app_is_silent():
    def wait(far: FarConnection) -> None:
        far.send(b"ready")
        far.recv()
        # The relay is over although nothing was sent down.
        far.socket.recv(1000)

    def talk(connection):
        connection.recv(100)
        connection.shutdown(socket.SHUT_WR)
        reset_on_close(connection)

    _, outcome = run_in_bed(Peer(wait), lambda bed: one_program(bed, talk))
    assert outcome.end is RelayEnd.PROGRAM_CLOSED


def test_an_app_that_dies_after_its_end_is_noticed_while_the_program_is_silent():
    def end_then_die(far: FarConnection) -> None:
        far.close_notify()
        far.reset()

    async def scenario(bed):
        with program(bed.address):
            await bed.accept()
            await bed.ended()
        return bed.outcomes[0]

    outcome = run_in_bed(Peer(end_then_die), scenario)
    assert outcome.end in {RelayEnd.APP_CLOSED, RelayEnd.APP_RESET, RelayEnd.BROKEN}


def test_a_program_that_closes_while_the_app_sends_ends_the_relay():
    def send_for_ever(far: FarConnection) -> None:
        with pytest.raises(ConnectionError):
            push_for_ever(far.send)

    def talk(connection):
        connection.recv(1000)

    _, outcome = run_in_bed(Peer(send_for_ever), lambda bed: one_program(bed, talk))
    assert outcome.end in {RelayEnd.PROGRAM_CLOSED, RelayEnd.PROGRAM_RESET}


def test_an_app_that_answers_and_closes_while_the_program_sends_is_heard():
    def answer_early(far: FarConnection) -> None:
        far.recv()
        far.send(b"too large")
        # Closing with unread data sends a reset behind the answer.

    def talk(connection):
        with pytest.raises(ConnectionError):
            push_for_ever(connection.sendall)

    _, outcome = run_in_bed(Peer(answer_early), lambda bed: one_program(bed, talk))
    assert outcome.bytes_down in {0, 9}
    assert outcome.end in {RelayEnd.APP_CLOSED, RelayEnd.APP_RESET}


def test_a_reset_that_a_write_finds_first_is_no_end():
    """The kernel tells once; the read behind it would see an ordinary end."""

    def reset(far: FarConnection) -> None:
        far.recv()
        far.reset()

    def talk(connection):
        with pytest.raises(ConnectionError):
            push_for_ever(connection.sendall)

    _, outcome = run_in_bed(Peer(reset), lambda bed: one_program(bed, talk))
    assert outcome.end is RelayEnd.APP_RESET


def test_an_end_inside_a_ping_frame_is_no_end():
    def cut(far: FarConnection) -> None:
        far.send_raw(b"\0\0\0\5abc")
        far.close_notify()
        with pytest.raises(ConnectionResetError):
            far.recv()

    def talk(connection):
        with pytest.raises(ConnectionResetError):
            receive_all(connection)

    _, outcome = run_in_bed(
        Peer(cut, is_ping=True), lambda bed: one_program(bed, talk), alpn=alpn(True)
    )
    assert outcome.end is RelayEnd.BROKEN
    assert "ping frame" in outcome.error


def test_a_refused_client_certificate_is_reported():
    """TLS 1.3: the dial succeeds, the alert comes behind it."""

    async def scenario(bed):
        upstream = await bed.dial()
        lost = asyncio.Event()
        upstream.watch(lost.set)
        await lost.wait()
        assert "alert" in upstream.error
        with program(bed.address) as connection:
            bed.start(upstream, await bed.accept_local())
            with pytest.raises(ConnectionResetError):
                await asyncio.to_thread(connection.recv, 1)
        return bed.outcomes[0]

    peer = Peer(lambda far: None, ignored_errors=(ssl.SSLError,))
    outcome = run_in_bed(peer, scenario, context=client_context(issuer=stranger()))
    assert outcome.end is RelayEnd.BROKEN
    assert "alert" in outcome.error


def test_a_corrupted_stream_resets_the_program():
    def corrupt(far: FarConnection) -> None:
        far.socket.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ConnectionResetError):
            far.socket.recv(1000)

    def talk(connection):
        with pytest.raises(ConnectionResetError):
            connection.recv(1)

    _, outcome = run_in_bed(Peer(corrupt), lambda bed: one_program(bed, talk))
    assert outcome.end is RelayEnd.BROKEN
    assert outcome.error.startswith("TLS failed")


def test_abort_resets_the_program():
    def hold(far: FarConnection) -> None:
        far.send(b"x")
        with pytest.raises(ConnectionResetError):
            far.recv()

    async def scenario(bed):
        with program(bed.address) as connection:
            await bed.accept()
            await asyncio.to_thread(connection.recv, 1)
            bed.relays[0].abort()
            bed.relays[0].abort()
            with pytest.raises(ConnectionResetError):
                await asyncio.to_thread(connection.recv, 1)
        return bed.outcomes

    (outcome,) = run_in_bed(Peer(hold), scenario)
    assert outcome.end is RelayEnd.ABORTED


def test_a_hundred_relays_at_once_do_not_mix():
    def echo(far: FarConnection) -> None:
        far.send(far.recv_all())
        far.close_notify()

    count = 100

    async def scenario(bed):
        def talk(index):
            message = hashlib.sha256(bytes([index])).digest() * 2000
            with program(bed.address) as connection:
                connection.sendall(message)
                connection.shutdown(socket.SHUT_WR)
                return receive_all(connection) == message

        with_threads = asyncio.gather(*(asyncio.to_thread(talk, n) for n in range(count)))
        for _ in range(count):
            await bed.accept()
        assert all(await with_threads)
        await bed.ended(count)

    run_in_bed(Peer(echo), scenario)

"""Connections as programs make them: half-close, many at once, refusals, ends at odd moments."""

import contextlib
import hashlib
import random
import socket
import ssl
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from private_bed import AT_ONCE_SECONDS, Bed, read_all, read_exactly, wait_until

pytestmark = [pytest.mark.root, pytest.mark.e2e]

OWN, OWN_PORT = "own.teleport.e2e.test", 7001
ECHO = "echo.teleport.e2e.test"
PORTS = "ports.teleport.e2e.test"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
UP = random.Random(1).randbytes(8 << 20)
DOWN = random.Random(2).randbytes(6 << 20)


def sending(end: socket.socket, data: bytes) -> threading.Thread:
    """Sends in a thread, then ends this direction only."""

    def send() -> None:
        end.sendall(data)
        end.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", ["A", "AAAA"])
def test_a_client_that_half_closes_still_gets_its_answer(bed, kind):
    def serve(connection: socket.socket) -> None:
        received = read_all(connection)
        connection.sendall(hashlib.sha256(received).digest() + DOWN)

    with bed.listening(OWN_PORT, serve), bed.connect(bed.resolve(OWN, kind)[0], 80) as end:
        thread = sending(end, UP)
        answer = read_all(end)
        thread.join()
    assert answer[:32] == hashlib.sha256(UP).digest()
    assert answer[32:] == DOWN


def test_a_server_that_half_closes_first_still_hears_its_client(bed):
    heard: list[bytes] = []
    is_over = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.sendall(DOWN)
        connection.shutdown(socket.SHUT_WR)
        heard.append(hashlib.sha256(read_all(connection)).digest())
        is_over.set()

    with bed.listening(OWN_PORT, serve), bed.connect(OWN, 80) as end:
        assert read_all(end) == DOWN
        end.sendall(UP)
        end.shutdown(socket.SHUT_WR)
        assert is_over.wait(20)
    assert heard == [hashlib.sha256(UP).digest()]


def test_both_directions_at_once_carry_every_byte(bed):
    with bed.connect(ECHO, 7) as end:
        thread = sending(end, UP)
        assert read_all(end) == UP
        thread.join()


def test_a_slow_reader_loses_nothing(bed):
    much = UP * 8
    # The time limit of a socket is one for all of sendall, with the stall that this test makes.
    with bed.connect(ECHO, 7, timeout=60) as end:
        thread = sending(end, much)
        # The buffers on the way are full long before the end; then the sender has to wait.
        wait_until(lambda: not _moves(bed), "the transfer stalls")
        assert thread.is_alive()
        assert hashlib.sha256(read_all(end)).digest() == hashlib.sha256(much).digest()
        thread.join()


def _moves(bed: Bed) -> bool:
    before = bed.status()["connections"]["bytes_sent"]
    time.sleep(1.2)  # counters come with the heartbeat, once a second
    return bool(bed.status()["connections"]["bytes_sent"] != before)


def test_200_short_connections_in_parallel_all_succeed(bed):
    address = bed.resolve(ECHO)[0]
    start = threading.Barrier(200)

    def exchange(number: int) -> bytes:
        text = f"connection {number}".encode()
        start.wait(30)
        with bed.connect(address, 7, timeout=30) as end:
            end.sendall(text)
            end.shutdown(socket.SHUT_WR)
            return read_all(end)

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(exchange, range(200)))
    assert answers == [f"connection {number}".encode() for number in range(200)]


@pytest.mark.parametrize("port", [8000, 8005, 8010])
@pytest.mark.parametrize("kind", ["A", "AAAA"])
def test_each_port_of_a_multi_port_app_is_its_own(bed, port, kind):
    with bed.connect(bed.resolve(PORTS, kind)[0], port) as end:
        assert read_exactly(end, 5) == f"{port}\n".encode()


@pytest.mark.parametrize("port", [1, 7999, 8011, 65535])
def test_a_port_that_the_app_does_not_have_is_refused_at_once(bed, port):
    address = bed.resolve(PORTS)[0]
    assert bed.seconds_until_refused(address, port) < AT_ONCE_SECONDS
    wait_until(lambda: f"{address}:{port} refused (port_not_allowed)" in bed.log(), "a log line")


@pytest.mark.parametrize("kind", ["A", "AAAA"])
@pytest.mark.parametrize("name", ["node.e2e.test", "nothing.teleport.e2e.test"])
def test_a_name_below_the_clusters_leads_to_the_web_proxy_and_nowhere_else(bed, name, kind):
    address = bed.resolve(name, kind)[0]
    for port, reason in (
        (80, "no app and no database has this name"),
        (22, "refused (node_unreachable)"),
    ):
        assert bed.seconds_until_refused(address, port) < AT_ONCE_SECONDS
        wait_until(lambda reason=reason: reason in bed.log(), "a log line")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        bed.connect(address, 3080) as end,
        context.wrap_socket(end, server_hostname="teleport.e2e.test") as web,
    ):
        web.sendall(b"GET /webapi/ping HTTP/1.1\r\nHost: teleport.e2e.test\r\n\r\n")
        assert web.recv(4096).startswith(b"HTTP/1.1 200")


def test_an_unassigned_address_is_refused_at_once(bed):
    prefix = bed.status()["network"]["ipv6_prefix"]
    for address in ("100.127.254.253", f"{prefix}647f:fefd"):
        assert bed.seconds_until_refused(address, 80) < AT_ONCE_SECONDS
        wait_until(lambda: "refused (unknown_address)" in bed.log(), "a log line")


def test_an_address_that_vnet_never_gives_out_is_refused_at_once(bed):
    """Network and broadcast address of the range, and VNet's own on a port nobody serves."""
    for address in ("100.127.255.255", "100.64.0.2", "100.64.0.1"):
        assert bed.seconds_until_refused(address, 80) < AT_ONCE_SECONDS


def test_an_app_whose_server_is_down_ends_the_connection(bed):
    with bed.connect("nobody.teleport.e2e.test", 9) as end, contextlib.suppress(ConnectionError):
        assert read_all(end) == b""


def test_an_app_that_closes_early_ends_the_connection(bed):
    def serve(connection: socket.socket) -> None:
        connection.sendall(b"goodbye")

    with bed.listening(OWN_PORT, serve), bed.connect(OWN, 80) as end:
        assert read_all(end) == b"goodbye"


def test_an_app_that_resets_ends_the_connection(bed):
    def serve(connection: socket.socket) -> None:
        connection.recv(10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    with bed.listening(OWN_PORT, serve), bed.connect(OWN, 80) as end:
        end.sendall(b"hello")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            assert read_all(end) == b""
        assert time.monotonic() - began < AT_ONCE_SECONDS


def test_a_client_that_resets_is_noticed_by_the_app(bed):
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.sendall(b"!")
        with contextlib.suppress(OSError):
            read_all(connection)
        ended.set()

    with bed.listening(OWN_PORT, serve):
        with bed.connect(OWN, 80) as end:
            assert read_exactly(end, 1) == b"!"
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        assert ended.wait(10)

"""The whole worker where packets are rewritten: on a datagram socket, and on a real TUN device."""

import asyncio
import hashlib
import os
import socket
import threading

import pytest
import uvloop
from checksums import sealed
from fake_runtime import CONFIG, FakeBus, FakeRuntime, admit, no_answer, running_worker, until
from msgspec.structs import replace
from tun_bed import NETWORK, PREFIX, TUN_IPV4, make_bed, needs_tun
from tun_packets import ACK, RST, SYN, ipv4, ipv6, tcp_segment

from ipc.messages import DataPlaneKind, NetworkChanged, Redirect, RedirectsChanged
from workers.tun import worker
from workers.tun.packet import parse_packet

APP = b"\x64\x40\0\x09"
LISTENER = 33333
REDIRECT = Redirect(address=APP, port=443, local_port=LISTENER)
REWRITING = replace(CONFIG, data_plane=DataPlaneKind.REWRITING)
WITH_HEADER = replace(REWRITING, has_family_header=True)
STANDBY = replace(REWRITING, common=replace(CONFIG.common, is_standby=True))
SYN_PACKET = sealed(ipv4(TUN_IPV4, APP, tcp_segment(SYN)))
SYN_REWRITTEN = sealed(ipv4(APP, TUN_IPV4, tcp_segment(SYN, ports=(40000, LISTENER))))
DATA = sealed(ipv4(TUN_IPV4, APP, tcp_segment(ACK, payload=b"data")))
DATA_REWRITTEN = sealed(
    ipv4(APP, TUN_IPV4, tcp_segment(ACK, ports=(40000, LISTENER), payload=b"data"))
)


def run(story, *, decide=admit, config=REWRITING, redirects=(REDIRECT,)):
    """Runs `story(host, bus, runtime)` beside the worker; `host` is the far end of its device."""

    async def main():
        host, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        bus = FakeBus(decide)
        with host, device:
            for end in (host, device):
                end.setblocking(False)
            async with running_worker([device.fileno()], bus, config, list(redirects)) as runtime:
                await asyncio.wait_for(story(host, bus, runtime), 10)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def receive(end):
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(end, 70000), 5)


def test_packets_come_back_rewritten():
    async def story(host, bus, runtime):
        for _ in range(3):  # the closer look, then the fast path
            host.send(DATA)
            assert await receive(host) == DATA_REWRITTEN
        assert runtime.counters["packets_to_outer"] == 3
        assert bus.asked == []

    run(story)


def test_packets_with_a_family_header_keep_it():
    async def story(host, bus, runtime):
        host.send(b"\0\0\0\2" + DATA)
        assert await receive(host) == b"\0\0\0\2" + DATA_REWRITTEN
        syn = sealed(ipv6(NETWORK.tun_ipv6, PREFIX[:8] + bytes(4) + APP, tcp_segment(SYN)))
        host.send(b"\0\0\0\x1e" + syn)
        refusal = await receive(host)
        assert refusal[:4] == b"\0\0\0\x1e"
        assert parse_packet(refusal[4:]).tcp.flags & RST
        host.send(b"\0\0")  # too short for the header
        await until(lambda: runtime.counters["malformed_version"] == 1)

    run(story, config=replace(WITH_HEADER, max_pending=0))


def test_syn_is_held_until_it_is_admitted():
    async def story(host, bus, runtime):
        host.send(SYN_PACKET)
        await until(lambda: bus.asked)
        ((_, request),) = bus.asked
        assert (request.source, request.source_port) == (TUN_IPV4, 40000)
        assert (request.destination, request.destination_port) == (APP, 443)
        bus.decide = admit
        bus.say_hello()
        assert await receive(host) == SYN_REWRITTEN

    run(story, decide=no_answer)


def test_listener_that_is_opened_for_a_held_syn_is_known_in_time():
    async def story(host, bus, runtime):
        host.send(SYN_PACKET)
        await until(lambda: bus.asked)
        runtime.on_message(RedirectsChanged(redirects=[REDIRECT], is_complete=True), [])
        bus.decide = admit
        bus.say_hello()
        assert await receive(host) == SYN_REWRITTEN

    run(story, decide=no_answer, redirects=())


def test_ranges_that_are_gone_are_not_rewritten_any_more():
    async def story(host, bus, runtime):
        host.send(DATA)
        await receive(host)
        runtime.on_message(NetworkChanged(network=replace(NETWORK, ranges=["10.0.0.0/16"])), [])
        host.send(DATA)
        await until(lambda: runtime.counters["dropped_foreign_destination"] == 1)

    run(story)


@pytest.mark.parametrize("config", [REWRITING, STANDBY])
def test_nothing_is_read_before_the_table_is_whole(config):
    """A worker that did would reset the connections that its predecessor has left."""

    async def main():
        host, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with host, device:
            for end in (host, device):
                end.setblocking(False)
            host.send(DATA)
            runtime = FakeRuntime([device.fileno()], FakeBus(admit), config)
            task = asyncio.create_task(worker.main(runtime))
            await asyncio.sleep(0)
            other = replace(REDIRECT, address=b"\x64\x40\0\x0a")
            runtime.on_message(RedirectsChanged(redirects=[other], is_complete=False), [])
            for _ in range(20):
                await asyncio.sleep(0)
            assert not runtime.is_ready.is_set()
            assert runtime.counters["resets"] == runtime.counters["packets_to_outer"] == 0
            runtime.on_message(RedirectsChanged(redirects=[REDIRECT], is_complete=True), [])
            await asyncio.wait_for(runtime.is_ready.wait(), 5)
            runtime.may_begin.set()
            assert await receive(host) == DATA_REWRITTEN
            runtime.stopping.set()
            await task

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# -- with a kernel at the other end --


def own_listener(address):
    """A listening socket as the supervisor opens them for this plane."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"vtun0")
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    listener.listen(128)
    return listener


def serve_echo(listener, names):
    def serve():
        connection, _ = listener.accept()
        with connection:
            names.append((connection.getsockname()[:2], connection.getpeername()[:2]))
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def exchange(program, size):
    """Sends `size` bytes, half-closes, reads to the end: digests of both ways."""
    sent, received = hashlib.sha256(), hashlib.sha256()

    def send():
        block = os.urandom(1 << 20)
        for _ in range(size >> 20):
            program.sendall(block)
            sent.update(block)
        program.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    while data := program.recv(1 << 16):
        received.update(data)
    sender.join()
    return sent.digest(), received.digest()


@needs_tun
@pytest.mark.parametrize(
    ("own", "app"),
    [("100.64.0.1", "100.64.0.9"), ("fd60:67ec:4325::1", "fd60:67ec:4325::6440:9")],
)
def test_transfer_through_one_kernel_survives_workers_that_are_replaced(own, app):
    async def main(bed):
        listener = bed.in_host(lambda: own_listener(own))
        family = listener.family
        port = listener.getsockname()[1]
        table = [Redirect(address=socket.inet_pton(family, app), port=443, local_port=port)]
        names = []
        thread = serve_echo(listener, names)
        descriptors = [bed.outer_tun]
        async with running_worker(descriptors, FakeBus(admit), REWRITING, table) as first:
            program = await asyncio.to_thread(
                bed.in_host, lambda: socket.create_connection((app, 443), timeout=20)
            )
            transfer = asyncio.create_task(asyncio.to_thread(exchange, program, 64 << 20))
            await until(lambda: first.counters["bytes_to_outer"] > 8 << 20)
        async with running_worker(descriptors, FakeBus(no_answer), REWRITING, table) as second:
            sent, received = await asyncio.wait_for(transfer, 60)
            assert second.counters["resets"] == second.counters["dropped_unserved"] == 0
        own_port = program.getsockname()[1]
        program.close()
        assert sent == received
        await asyncio.to_thread(thread.join, 5)
        listener.close()
        assert names == [((own, port), (app, own_port))]

    with make_bed() as bed, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(bed))

"""The worker on real TUN devices between two real kernels; topology in tun_bed."""

import asyncio
import contextlib
import functools
import hashlib
import os
import socket
import subprocess
import threading
import time

import pytest
import uvloop
from fake_runtime import CONFIG, FakeBus, admit, no_answer, refuse_with, running_worker, until
from msgspec.structs import replace
from tun_bed import make_bed, needs_tun

from ipc.messages import Refusal

APPS = {"ipv4": "100.64.0.9", "ipv6": "fd60:67ec:4325::6440:9"}
DNS = {"ipv4": "100.64.0.2", "ipv6": "fd60:67ec:4325::2"}
FAMILY = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
both_families = pytest.mark.parametrize("family", ["ipv4", "ipv6"])


def run(story, *, decide=admit, config=CONFIG):
    """Runs `story(bed, bus, runtime)` beside the worker."""

    async def main(bed):
        bus = FakeBus(decide)
        async with running_worker([bed.outer_tun, bed.inner_tun], bus, config) as runtime:
            await asyncio.wait_for(story(bed, bus, runtime), 60)

    with make_bed() as bed, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(bed))


def connect(bed, address, port=443, *, seconds=10.0):
    """A coroutine: a program in the host stand-in connects."""

    def attempt():
        return socket.create_connection((address, port), timeout=seconds)

    return asyncio.to_thread(bed.in_host, attempt)


def serve_echo(listener):
    """Echoes one connection until its end of file; gives back the accepted socket's names."""
    names = []

    def serve():
        with listener:
            connection, _ = listener.accept()
        with connection:
            names.append((connection.getsockname()[:2], connection.getpeername()[:2]))
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return names, thread


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
@both_families
def test_admitted_connection_echoes_and_half_closes(family):
    async def story(bed, bus, runtime):
        names, thread = serve_echo(bed.listen(APPS[family], 443))
        with await connect(bed, APPS[family]) as program:
            sent, received = await asyncio.to_thread(exchange, program, 8 << 20)
            assert sent == received
            own = program.getsockname()[:2]
        await asyncio.to_thread(thread.join, 5)
        assert names == [((APPS[family], 443), own)]
        ((_, request),) = bus.asked
        assert socket.inet_ntop(FAMILY[family], request.source) == own[0]
        assert request.source_port == own[1]

    run(story)


@needs_tun
@both_families
def test_refused_connection_fails_at_once_with_connection_refused(family):
    async def story(bed, bus, runtime):
        with bed.listen(APPS[family], 443):
            for _ in range(3):
                with pytest.raises(ConnectionRefusedError):
                    await connect(bed, APPS[family])
        # One question each: a program that did not take the reset would have asked again.
        assert len(bus.asked) == 3
        assert runtime.counters["refused_port_not_allowed"] == 3

    run(story, decide=refuse_with(Refusal.PORT_NOT_ALLOWED))


@needs_tun
@both_families
def test_program_sees_nothing_before_the_verdict(family):
    async def story(bed, bus, runtime):
        with bed.listen(APPS[family], 443) as listener:
            attempt = asyncio.create_task(connect(bed, APPS[family]))
            await until(lambda: bus.asked)
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
            assert not attempt.done()
            bus.decide = admit
            bus.say_hello()
            (await attempt).close()
            assert runtime.counters["admitted"] == 1

    run(story, decide=no_answer)


@needs_tun
def test_program_is_refused_when_nobody_answers():
    async def story(bed, bus, runtime):
        with pytest.raises(ConnectionRefusedError):
            await connect(bed, APPS["ipv4"])
        assert len(bus.abandoned) == 1

    run(story, decide=no_answer, config=replace(CONFIG, pending_seconds=0.2))


@needs_tun
@both_families
def test_dns_addresses_are_answered_by_the_inner_kernel_without_asking(family):
    async def story(bed, bus, runtime):
        with pytest.raises(ConnectionRefusedError):
            await connect(bed, DNS[family], 53)
        names, thread = serve_echo(bed.listen(DNS[family], 53))
        with await connect(bed, DNS[family], 53) as program:
            sent, received = await asyncio.to_thread(exchange, program, 1 << 20)
        assert sent == received
        await asyncio.to_thread(thread.join, 5)
        assert names[0][0] == (DNS[family], 53)
        assert bus.asked == []

    run(story)


@needs_tun
@both_families
def test_largest_datagram_crosses_and_comes_back(family):
    # Over IPv6 it is larger than the MTU and travels in fragments.
    size = 65507 if family == "ipv4" else 65527

    def datagram_socket():
        return socket.socket(FAMILY[family], socket.SOCK_DGRAM)

    async def story(bed, bus, runtime):
        with bed.in_inner(datagram_socket) as server, bed.in_host(datagram_socket) as program:
            server.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND; covers IPv6 too
            server.bind((DNS[family], 53))
            server.settimeout(5)
            program.settimeout(5)
            program.sendto(bytes(size), (DNS[family], 53))
            data, peer = await asyncio.to_thread(server.recvfrom, 70000)
            server.sendto(data, peer)
            answer = await asyncio.to_thread(program.recv, 70000)
            assert len(answer) == size

    run(story)


@needs_tun
@both_families
def test_program_that_binds_another_address_of_the_host_is_refused(family):
    other = {"ipv4": "192.0.2.1", "ipv6": "2001:db8::1"}[family]

    def attempt(kind, address, port):
        with socket.socket(FAMILY[family], kind) as program:
            program.settimeout(5)
            program.bind((other, 0))
            program.connect((address, port))
            program.send(b"question")
            program.recv(1)

    async def story(bed, bus, runtime):
        # Without the search for duplicates (RFC 4862 section 5.4) the address is of use at once.
        added = [f"{other}/32"] if family == "ipv4" else [f"{other}/128", "nodad"]
        subprocess.run(["ip", "-n", bed.host, "addr", "add", *added, "dev", "lo"], check=True)
        for kind, address, port in (
            (socket.SOCK_STREAM, APPS[family], 443),
            (socket.SOCK_DGRAM, DNS[family], 53),
        ):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.to_thread(
                    bed.in_host, functools.partial(attempt, kind, address, port)
                )
        assert runtime.counters["turned_away"] >= 2
        assert bus.asked == []

    run(story)


@needs_tun
def test_transfer_survives_workers_that_are_replaced():
    async def main(bed):
        names, thread = serve_echo(bed.listen(APPS["ipv4"], 443))
        descriptors = [bed.outer_tun, bed.inner_tun]
        async with running_worker(descriptors, FakeBus(admit)) as first:
            program = await connect(bed, APPS["ipv4"])
            transfer = asyncio.create_task(asyncio.to_thread(exchange, program, 256 << 20))
            await until(lambda: first.counters["bytes_to_inner"] > 8 << 20)
        for _ in range(3):
            async with running_worker(descriptors, FakeBus(no_answer)) as successor:
                await until(lambda w=successor: w.counters["bytes_to_inner"] > 8 << 20)
        assert not transfer.done()
        async with running_worker(descriptors, FakeBus(no_answer)):
            sent, received = await asyncio.wait_for(transfer, 60)
        program.close()
        assert sent == received
        await asyncio.to_thread(thread.join, 5)
        assert len(names) == 1

    with make_bed() as bed, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(bed))


@needs_tun
def test_transfer_and_new_connections_go_on_while_workers_follow_each_other():
    standby = replace(CONFIG, common=replace(CONFIG.common, is_standby=True))

    async def main(bed):
        names, thread = serve_echo(bed.listen(APPS["ipv4"], 443))
        descriptors = [bed.outer_tun, bed.inner_tun]
        ended, longest = asyncio.Event(), 0.0
        workers = contextlib.AsyncExitStack()

        async def come_and_go():
            nonlocal longest
            while not ended.is_set():
                began = time.monotonic()
                (await connect(bed, APPS["ipv4"], 80)).close()
                longest = max(longest, time.monotonic() - began)

        async with workers:
            present = await workers.enter_async_context(running_worker(descriptors, FakeBus(admit)))
            with bed.listen(APPS["ipv4"], 80):
                program = await connect(bed, APPS["ipv4"])
                transfer = asyncio.create_task(asyncio.to_thread(exchange, program, 128 << 20))
                connecting = asyncio.create_task(come_and_go())
                for _ in range(3):
                    await until(lambda w=present: w.counters["bytes_to_inner"] > 4 << 20)
                    old = present
                    present = await workers.enter_async_context(
                        running_worker(descriptors, FakeBus(admit), standby)
                    )
                    old.draining.set()
                    await until(lambda w=old: w.has_handed_over)
                    present.may_begin.set()
                await until(lambda w=present: w.counters["admitted"] > 3)
                ended.set()
                await connecting
                sent, received = await asyncio.wait_for(transfer, 60)
            program.close()
        assert sent == received
        assert longest < 3.0  # a SYN that was read and is not answered is repeated after a second
        await asyncio.to_thread(thread.join, 5)
        assert len(names) == 1

    with make_bed() as bed, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(bed))


@needs_tun
def test_interface_that_goes_down_and_up_again_works_again(caplog):
    def set_inner(bed, *commands):
        for command in commands:
            subprocess.run(["ip", "-n", bed.inner, *command.split()], check=True)

    async def story(bed, bus, runtime):
        set_inner(bed, "link set vtun1 down")
        attempt = asyncio.create_task(connect(bed, APPS["ipv4"]))
        await until(lambda: runtime.counters["dropped_device_down"] >= 2)
        set_inner(bed, "link set vtun1 up", "route add 100.64.0.1/32 dev vtun1 table local")
        with bed.listen(APPS["ipv4"], 443):
            (await attempt).close()
        assert len([r for r in caplog.records if "TUN device" in r.message]) == 1

    run(story)


@needs_tun
def test_deleted_interface_stops_neither_the_worker_nor_the_machine():
    async def story(bed, bus, runtime):
        subprocess.run(["ip", "-n", bed.inner, "link", "del", "vtun1"], check=True)
        before = os.times()
        with pytest.raises(TimeoutError):
            await connect(bed, APPS["ipv4"], seconds=0.5)
        after = os.times()
        assert after.user + after.system - before.user - before.system < 0.3
        await until(lambda: runtime.counters["dropped_device_down"] >= 1)

    run(story)


@needs_tun
def test_namespaces_of_a_finished_test_are_gone():
    with make_bed() as bed:
        names = (bed.host, bed.inner)
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert not [name for name in names if name in listed.stdout]

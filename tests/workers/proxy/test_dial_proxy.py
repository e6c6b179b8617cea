import asyncio
import errno
import socket
import ssl
import threading

import pytest
import uvloop
from relay_bed import assert_no_more_descriptors_than, open_descriptors, until
from tls_peers import SERVER_NAME, Peer, client_context, server_context, stranger

from workers.proxy.dial import (
    DEFAULT_SETTINGS,
    DialRefusedError,
    DialTimedOutError,
    HandshakeFailedError,
    ProxyUnreachableError,
    ProxyUntrustedError,
    dial,
)
from workers.proxy.dial_plan import DialPlan, TlsPlan
from workers.proxy.proxy_addresses import ProxyAddresses
from workers.proxy.reactor import Reactor


def plan_for(port, context=None, host="127.0.0.1"):
    return DialPlan(host, port, TlsPlan(context or client_context(), SERVER_NAME))


def in_loop(talk, loop_factory=uvloop.new_event_loop):
    """Runs `await talk(reactor)`; nothing may be left open, whatever comes out."""

    async def main():
        reactor = Reactor(asyncio.get_running_loop())
        try:
            return await talk(reactor)
        finally:
            await until(lambda: len(asyncio.all_tasks()) == 1)
            watched = len(reactor)
            reactor.close()
            assert not watched

    before = open_descriptors()
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(main())
    finally:
        assert_no_more_descriptors_than(before)


def run(peer: Peer | None, *, port=0, host="127.0.0.1", context=None, timeout_seconds=20.0):
    """Dials once and closes."""

    async def talk(reactor):
        plan = plan_for(port or peer.port, context, host)
        upstream = await dial(plan, timeout_seconds, reactor)
        negotiated = upstream.alpn, upstream.is_ping
        upstream.close()
        return negotiated

    return in_loop(talk)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize(
    ("alpn", "is_ping"), [("teleport-tcp", False), ("teleport-tcp-ping", True)]
)
def test_the_negotiated_protocol_is_known(version, alpn, is_ping):
    with Peer(lambda far: far.recv(), server_context(alpn, version), is_ping=is_ping) as peer:
        assert run(peer, context=client_context(alpn)) == (alpn, is_ping)


def test_a_port_nobody_listens_on_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ProxyUnreachableError, match=f"127.0.0.1:{port}: Connection refused"):
        run(None, port=port)


def test_an_unknown_name_is_unreachable():
    async def talk(reactor):
        async def fail(*_, **__):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        asyncio.get_running_loop().getaddrinfo = fail
        await dial(plan_for(1, host="proxy.invalid"), 5.0, reactor)

    with pytest.raises(ProxyUnreachableError, match="not known"):
        in_loop(talk, asyncio.new_event_loop)


def test_a_silent_proxy_times_out():
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(DialTimedOutError, match=r"no answer in 0\.2 s"),
    ):
        run(None, port=silent.getsockname()[1], timeout_seconds=0.2)


def test_a_strangers_certificate_is_not_trusted():
    context = ssl.create_default_context(cadata=stranger().pem)
    with (
        Peer(lambda far: None, ignored_errors=(ssl.SSLError,)) as peer,
        pytest.raises(ProxyUntrustedError, match="not trusted"),
    ):
        run(peer, context=context)


def test_no_common_application_protocol_is_a_failed_handshake():
    """OpenSSL's server goes on without one, as a balancer that ends TLS would; Go's alerts."""
    peer = Peer(lambda far: far.recv(), ignored_errors=(ConnectionError,))
    with peer, pytest.raises(HandshakeFailedError, match="no application protocol"):
        run(peer, context=client_context("h2"))


def test_a_refused_certificate_under_tls_1_2_is_a_refusal():
    peer = Peer(
        lambda far: None,
        server_context("teleport-tcp", "TLSv1_2"),
        ignored_errors=(ssl.SSLError,),
    )
    with peer, pytest.raises(DialRefusedError, match="alert"):
        run(peer, context=client_context(issuer=stranger()))


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_proxy_that_closes_in_the_handshake_refuses(is_reset):
    def leave(sock: socket.socket) -> None:
        if not is_reset:  # closing with unread data is a reset
            sock.recv(65536)

    with Peer(leave, is_tls=False) as peer, pytest.raises(DialRefusedError, match="closed"):
        run(peer)


def test_a_server_without_tls_is_a_failed_handshake():
    def greet(sock: socket.socket) -> None:
        sock.sendall(b"220 mail.example.test ESMTP\r\n" * 5)
        while sock.recv(65536):
            pass

    with Peer(greet, is_tls=False) as peer, pytest.raises(HandshakeFailedError):
        run(peer)


def dial_over(addresses, peer_port: int):
    """Dials a name that stands for `addresses` (family, address, port)."""

    async def talk(reactor):
        async def resolve(*_, **__):
            return [
                (family, socket.SOCK_STREAM, 6, "", (address, port))
                for family, address, port in addresses
            ]

        asyncio.get_running_loop().getaddrinfo = resolve
        upstream = await dial(plan_for(peer_port, host="proxy.test"), 10.0, reactor)
        where = upstream.endpoint.socket.getpeername()[:2]
        upstream.close()
        return where

    return in_loop(talk, asyncio.new_event_loop)  # uvloop's loop takes no attributes


def test_a_dead_address_does_not_keep_the_next_from_answering():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = taken.getsockname()[1]
    with Peer(lambda far: far.recv()) as peer:
        addresses = [
            (socket.AF_INET6, "::1", dead),
            (socket.AF_INET, "127.0.0.1", dead),
            (socket.AF_INET, "127.0.0.1", peer.port),
        ]
        assert dial_over(addresses, peer.port) == ("127.0.0.1", peer.port)


def test_a_silent_address_is_overtaken():
    """A full backlog answers no SYN; the next address is tried after the delay."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            assert filler.connect_ex(silent.getsockname()) in {0, errno.EINPROGRESS}
            fillers.append(filler)
        with Peer(lambda far: far.recv()) as peer:
            addresses = [
                (socket.AF_INET, *silent.getsockname()),
                (socket.AF_INET, "127.0.0.1", peer.port),
            ]
            assert dial_over(addresses, peer.port) == ("127.0.0.1", peer.port)
        for filler in fillers:
            filler.close()


def test_a_remembered_address_that_died_is_looked_up_again():
    """A proxy that moved costs one failed attempt, not a connection."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = taken.getsockname()[1]

    with Peer(lambda far: far.recv()) as peer:

        async def talk(reactor):
            ports = [dead, peer.port]

            async def resolve(*_, **__):
                port = ports.pop(0)
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

            asyncio.get_running_loop().getaddrinfo = resolve
            known = ProxyAddresses(remembered_seconds=60)
            await known.find("proxy.test", 443)
            upstream = await dial(plan_for(443, host="proxy.test"), 10.0, reactor, known=known)
            upstream.close()
            return ports

        assert in_loop(talk, asyncio.new_event_loop) == []


def test_all_addresses_dead_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = taken.getsockname()[1]
    with pytest.raises(ProxyUnreachableError):
        dial_over([(socket.AF_INET, "127.0.0.1", dead)] * 3, dead)


def test_a_cancelled_dial_leaves_nothing_open():
    arrived = threading.Event()

    def hang(sock: socket.socket) -> None:
        arrived.set()
        while sock.recv(65536):
            pass

    async def talk(reactor):
        dialling = asyncio.create_task(dial(plan_for(peer.port), 20.0, reactor))
        await asyncio.to_thread(arrived.wait)
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling

    with Peer(hang, is_tls=False) as peer:
        in_loop(talk)


def test_idle_upstreams_keep_alive():
    async def talk(reactor):
        upstream = await dial(plan_for(peer.port), 20.0, reactor)
        sock = upstream.endpoint.socket
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        assert idle == DEFAULT_SETTINGS.keepalive_idle_seconds
        upstream.close()

    with Peer(lambda far: far.recv()) as peer:
        in_loop(talk)

"""All ways to a proxy: bare TCP, a connection upgrade, and each of them through a forward proxy."""

import asyncio
import os
import shutil
import socket
import ssl
import subprocess

import pytest
import uvloop
from forward_proxies import ForwardProxyPeer
from relay_bed import (
    assert_no_more_descriptors_than,
    open_descriptors,
    program,
    receive_all,
    tls_plan,
    until,
)
from tls_peers import SERVER_NAME, Peer, client_context, server_context, stranger
from tunnel_peers import (
    CLOSE_NORMAL,
    PlainFar,
    TunnelPeer,
    accept_upgrade,
    balancer_context,
    close_in_order,
    plain_plan,
    tunnel_plan,
)

from workers.proxy import dial as dial_module
from workers.proxy.dial import (
    DialRefusedError,
    DialTimedOutError,
    HandshakeFailedError,
    ProxyUnreachableError,
    ProxyUntrustedError,
    UpgradeFailedError,
    connect_tcp,
    dial,
)
from workers.proxy.dial_plan import DialPlan, TlsPlan
from workers.proxy.proxy_addresses import ProxyAddresses
from workers.proxy.reactor import Reactor
from workers.proxy.relay import Relay

DATA = os.urandom(1 << 20)


class AllNamesAreLocal(ProxyAddresses):
    """Stands for a resolver."""

    async def find(self, host, port):
        return await super().find("127.0.0.1", port)


@pytest.fixture(autouse=True)
def _trust_of_the_tests(monkeypatch):
    """As if the test CA were one of the system's."""
    monkeypatch.setattr(dial_module, "_system_context", client_context)


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


def dial_once(plan: DialPlan, timeout_seconds: float = 20.0):
    """Dials and closes; returns the negotiated protocol."""

    async def talk(reactor):
        upstream = await dial(plan, timeout_seconds, reactor, known=AllNamesAreLocal())
        alpn = upstream.alpn
        upstream.close()
        return alpn

    return in_loop(talk)


def echo(far) -> None:
    far.send(far.recv_all())
    far.close_notify()


def relay_an_echo(plan: DialPlan) -> None:
    """A program sends, half-closes and gets everything back."""

    async def talk(reactor):
        def use():
            with program(listener.getsockname()) as connection:
                connection.sendall(DATA)
                connection.shutdown(socket.SHUT_WR)
                return receive_all(connection)

        outcomes = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            upstream = await dial(plan, 20.0, reactor, known=AllNamesAreLocal())
            using = asyncio.create_task(asyncio.to_thread(use))
            local, _ = await asyncio.get_running_loop().sock_accept(listener)
            local.setblocking(False)
            Relay(reactor, local, upstream, outcomes.append).start()
            assert await using == DATA
        await until(lambda: bool(outcomes))

    in_loop(talk)


def peer_and_plan(kind: str, handler, http_proxy: str, *, pings: bool = True):
    if kind == "plain":
        peer = Peer(lambda sock: handler(PlainFar(sock)), is_tls=False)
        return peer, plain_plan(peer.port, http_proxy)
    if kind == "tls":
        peer = Peer(handler)
        plan = tls_plan(peer.port, client_context())
        return peer, DialPlan(plan.host, plan.port, plan.tls, None, http_proxy)
    peer = TunnelPeer(handler, pings=pings)
    return peer, tunnel_plan(peer.port, http_proxy=http_proxy)


# -- connection upgrade --


def test_the_protocol_inside_the_upgrade_counts():
    peer = TunnelPeer(lambda far: far.recv(), is_ping=True)
    with peer:
        assert dial_once(tunnel_plan(peer.port, "teleport-tcp-ping")) == "teleport-tcp-ping"
    assert f"Host: 127.0.0.1:{peer.port}\r\n" in peer.requests[0]
    assert "Sec-WebSocket-Protocol: alpn\r\n" in peer.requests[0]


@pytest.mark.parametrize(
    ("answer", "error", "why"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", UpgradeFailedError, "version is too old"),
        (b"HTTP/1.1 502 Bad\r\n\r\n", UpgradeFailedError, "502 Bad Gateway"),
        (b"HTTP/1.1 101 \r\nUpgrade: alpn\r\n\r\n", UpgradeFailedError, "something else"),
        (b"", ProxyUnreachableError, "connection upgrade: connection closed"),
    ],
)
def test_a_web_port_that_does_not_upgrade(answer, error, why):
    def refuse(outer, _request) -> bool:
        if answer:
            outer.send_raw(answer)
        return False

    with (
        TunnelPeer(echo, greet=refuse) as peer,
        pytest.raises(error, match=f"127.0.0.1:{peer.port}: .*{why}"),
    ):
        dial_once(tunnel_plan(peer.port))


def test_a_silent_proxy_behind_the_balancer_times_out():
    def hang(outer, _request) -> bool:
        outer.recv()
        return False

    with (
        TunnelPeer(echo, greet=hang, ignored_errors=(ConnectionError,)) as peer,
        pytest.raises(DialTimedOutError),
    ):
        dial_once(tunnel_plan(peer.port), 0.3)


def test_the_certificates_outside_and_inside_are_both_checked():
    untrusting = ssl.create_default_context(cadata=stranger().pem)
    inner, outer = TlsPlan(client_context(), SERVER_NAME), TlsPlan(untrusting, SERVER_NAME)
    with (
        Peer(echo, balancer_context(), ignored_errors=(ssl.SSLError,)) as peer,
        pytest.raises(ProxyUntrustedError, match="connection upgrade: certificate not trusted"),
    ):
        dial_once(DialPlan("127.0.0.1", peer.port, inner, outer))
    with (
        TunnelPeer(echo, ignored_errors=(ssl.SSLError,)) as peer,
        pytest.raises(ProxyUntrustedError, match=r":\d+: certificate not trusted"),
    ):
        dial_once(tunnel_plan(peer.port, context=untrusting))


def test_a_balancer_that_wants_a_certificate_does_not_refuse_ours():
    peer = Peer(echo, server_context("x", "TLSv1_2"), ignored_errors=(ssl.SSLError,))
    with peer, pytest.raises(HandshakeFailedError, match="connection upgrade"):
        dial_once(tunnel_plan(peer.port))


def test_a_refused_certificate_inside_is_a_refusal():
    inner = server_context("teleport-tcp", "TLSv1_2")
    peer = TunnelPeer(echo, inner=inner, ignored_errors=(ssl.SSLError,))
    with peer, pytest.raises(DialRefusedError, match="alert"):
        dial_once(tunnel_plan(peer.port, context=client_context(issuer=stranger())))


@pytest.mark.parametrize("how", ["close frame", "reset"])
def test_a_proxy_that_closes_in_the_inner_handshake_refuses(how):
    def leave(outer, request) -> bool:
        accept_upgrade(outer, request, behind=CLOSE_NORMAL if how == "close frame" else b"")
        if how == "close frame":
            close_in_order(outer.socket)
        return False

    with (
        TunnelPeer(echo, greet=leave) as peer,
        pytest.raises(DialRefusedError, match="closed during the TLS handshake"),
    ):
        dial_once(tunnel_plan(peer.port))


def test_no_common_protocol_inside_is_a_failed_handshake():
    peer = TunnelPeer(lambda far: far.recv(), ignored_errors=(ConnectionError,))
    with peer, pytest.raises(HandshakeFailedError, match="no application protocol"):
        dial_once(tunnel_plan(peer.port, "h2"))


# -- forward proxies --


@pytest.mark.parametrize("kind", ["plain", "tls", "tunnel"])
@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
def test_every_plan_works_through_a_forward_proxy(kind, is_tls):
    with ForwardProxyPeer(is_tls=is_tls, credentials="user:p@ss") as proxy:
        peer, plan = peer_and_plan(kind, echo, proxy.url("user:p%40ss"))
        with peer:
            relay_an_echo(plan)
    assert proxy.heads[0].startswith(f"CONNECT 127.0.0.1:{peer.port} HTTP/1.1\r\n")


@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
def test_the_name_goes_to_the_forward_proxy_unresolved(is_tls):
    with ForwardProxyPeer(is_tls=is_tls) as proxy, Peer(lambda far: far.recv()) as peer:
        tls = TlsPlan(client_context(), SERVER_NAME)
        dial_once(DialPlan("teleport.invalid", peer.port, tls, None, proxy.url()))
    assert f"Host: teleport.invalid:{peer.port}\r\n" in proxy.heads[0]


@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
def test_bytes_behind_the_answer_are_not_lost(is_tls):
    def greet(far) -> None:
        far.send(b"hello")
        far.recv()

    async def talk(reactor):
        upstream = await dial(plan, 20.0, reactor, known=AllNamesAreLocal())
        await until(lambda: upstream._early == b"hello")
        upstream.close()

    with ForwardProxyPeer(is_tls=is_tls) as proxy:
        peer, plan = peer_and_plan("plain", greet, proxy.url())
        with peer:
            in_loop(talk)


def send(answer: bytes):
    def refuse(client) -> None:
        if answer:
            client.send(answer)

    return refuse


@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 403 Filtered\r\n\r\n", "403 Forbidden"),
        (b"HTTP/1.1 407 Who\r\n\r\n", "user name and password"),
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 5000, "more than"),
        (b"", "closed"),
    ],
)
def test_a_forward_proxy_that_does_not_connect_is_named_without_its_password(is_tls, answer, why):
    with (
        ForwardProxyPeer(
            is_tls=is_tls, answer=send(answer), ignored_errors=(ConnectionError,)
        ) as proxy,
        pytest.raises(ProxyUnreachableError, match=why) as caught,
    ):
        dial_once(tls_plan_through(proxy.url("user:secret")))
    shown = proxy.url()
    assert f"teleport.invalid:443 through the forward proxy {shown}: " in str(caught.value)
    assert "secret" not in str(caught.value)


def tls_plan_through(url: str) -> DialPlan:
    return DialPlan("teleport.invalid", 443, TlsPlan(client_context(), SERVER_NAME), None, url)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_forward_proxy_that_is_not_there(scheme):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ProxyUnreachableError, match=f"{scheme}://proxy.example.test:{port}: Conn"):
        dial_once(tls_plan_through(f"{scheme}://u:secret@proxy.example.test:{port}"))


def test_a_silent_forward_proxy_times_out():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DialTimedOutError, match="through the forward proxy"):
            dial_once(tls_plan_through(url), 0.3)


def test_a_forward_proxy_of_another_kind_is_told():
    with pytest.raises(ProxyUnreachableError, match="set an http:// URL") as caught:
        dial_once(tls_plan_through("socks4://u:secret@proxy.example.test:1080"))
    assert "secret" not in str(caught.value)


def test_an_https_forward_proxy_has_to_be_trusted(monkeypatch):
    untrusting = ssl.create_default_context(cadata=stranger().pem)
    monkeypatch.setattr(dial_module, "_system_context", lambda: untrusting)
    with (
        ForwardProxyPeer(is_tls=True, ignored_errors=(ssl.SSLError,)) as proxy,
        pytest.raises(ProxyUntrustedError, match="forward proxy: certificate not trusted"),
    ):
        dial_once(tls_plan_through(proxy.url()))


# -- connect_tcp --


@pytest.mark.parametrize("way", ["direct", "http", "https"])
@pytest.mark.parametrize("loop_factory", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_a_socket_for_others(way, loop_factory):
    """What asyncio's own streams make of it, with TLS on top as gRPC does."""

    async def talk(_reactor):
        sock = await connect_tcp("127.0.0.1", peer.port, http_proxy=url, known=AllNamesAreLocal())
        assert sock.gettimeout() == 0
        reader, writer = await asyncio.open_connection(
            sock=sock, ssl=client_context(), server_hostname=SERVER_NAME
        )
        writer.write(DATA)
        assert await reader.readexactly(len(DATA)) == DATA
        writer.close()
        await writer.wait_closed()

    def echo_as_it_comes(far) -> None:
        while data := far.recv():
            far.send(data)

    with (
        ForwardProxyPeer(is_tls=way == "https") as proxy,
        Peer(echo_as_it_comes, ignored_errors=(ConnectionError,)) as peer,
    ):
        url = "" if way == "direct" else proxy.url()
        in_loop(talk, loop_factory)


@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
def test_a_socket_for_others_that_cannot_be_made(is_tls):
    async def talk(_reactor):
        await connect_tcp(
            "teleport.invalid", 443, http_proxy=proxy.url("u:secret"), known=AllNamesAreLocal()
        )

    with (
        ForwardProxyPeer(is_tls=is_tls, answer=send(b"HTTP/1.1 403 No\r\n\r\n")) as proxy,
        pytest.raises(ProxyUnreachableError, match="403 Forbidden") as caught,
    ):
        in_loop(talk)
    assert "secret" not in str(caught.value)


def test_a_direct_socket_raises_what_the_system_says():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    async def talk(_reactor):
        await connect_tcp("127.0.0.1", port)

    with pytest.raises(ConnectionRefusedError):
        in_loop(talk)


@pytest.mark.parametrize("is_tls", [False, True], ids=["http", "https"])
def test_a_cancelled_connect_leaves_nothing_open(is_tls):
    async def talk(_reactor):
        connecting = asyncio.create_task(
            connect_tcp("x.invalid", 1, http_proxy=proxy.url(), known=AllNamesAreLocal())
        )
        await until(lambda: bool(proxy.heads))
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting

    def hang(client) -> None:
        client.recv()

    with ForwardProxyPeer(is_tls=is_tls, answer=hang, ignored_errors=(OSError,)) as proxy:
        in_loop(talk)


# -- a real forward proxy --


@pytest.mark.skipif(not shutil.which("tinyproxy"), reason="tinyproxy is not installed")
@pytest.mark.parametrize("kind", ["tls", "tunnel"])  # it does not pass on a FIN alone
def test_tinyproxy_with_a_password(tmp_path, kind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    configuration = tmp_path / "tinyproxy.conf"
    configuration.write_text(
        f"Port {port}\nListen 127.0.0.1\nTimeout 60\nMaxClients 10\nBasicAuth user secret\n"
    )
    server = subprocess.Popen(
        ["tinyproxy", "-d", "-c", configuration],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        asyncio.run(until(lambda: is_listening(port)))
        # It closes both sides when one ends, whether or not pongs are under way.
        url = f"http://user:secret@127.0.0.1:{port}"
        peer, plan = peer_and_plan(kind, echo, url, pings=False)
        with peer:
            relay_an_echo(plan)
            wrong = DialPlan(plan.host, plan.port, plan.tls, None, f"http://127.0.0.1:{port}")
            with pytest.raises(ProxyUnreachableError):
                dial_once(wrong)
    finally:
        server.terminate()
        server.wait(20)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

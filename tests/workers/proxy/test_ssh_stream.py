"""The byte stream to an SSH host, over every way to the proxy."""

import asyncio
import os
import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import uvloop
from forward_proxies import ForwardProxyPeer
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from http2_frames import content_of, data, frame, headers, settings, trailers
from relay_bed import digest, one_program, receive_all, run_in_bed, until
from ssh_keys import SSH_KEY, certificate
from ssh_peers import ALPN, DETAILS, TARGET, Frame, Response, SshProxyPeer, framed, serve_call
from tls_peers import SERVER_NAME, Peer, client_context, server_context, stranger
from tunnel_peers import PlainFar, TunnelPeer, tunnel_plan

from workers.proxy import dial as dial_module
from workers.proxy.dial import (
    DialError,
    DialRefusedError,
    DialTimedOutError,
    HandshakeFailedError,
    LoginRefusedError,
    NodeDeniedError,
    NodeUnreachableError,
    ProxyUnreachableError,
    SshUnsupportedError,
    dial,
)
from workers.proxy.dial_plan import DialPlan, TlsPlan
from workers.proxy.layers import LayerError, Plain
from workers.proxy.proxy_addresses import ProxyAddresses
from workers.proxy.reactor import Reactor
from workers.proxy.relay import RelayEnd
from workers.proxy.ssh.opening import offer_agent
from workers.proxy.ssh_stream import MAX_EARLY_AGENT_BYTES, SshStream
from workers.proxy.teleport.errors import UnreachableError
from workers.proxy.teleport.pb import transport_pb2
from workers.proxy.teleport.ssh_credentials import SshCredentials

MEGABYTES = os.urandom(1 << 20) * 10
MANY_MEGABYTES = MEGABYTES * 4  # more than all buffers on the way
SOME_BYTES = MEGABYTES[:500_000]  # more than the windows of the far end
SETTINGS = settings()
ANSWER = headers()


@pytest.fixture(autouse=True)
def _trust_of_the_tests(monkeypatch):
    """As if the test CA were one of the system's."""
    monkeypatch.setattr(dial_module, "_system_context", client_context)


def exchange(connection: socket.socket, sent: bytes = MEGABYTES) -> bytes:
    """Sends everything while it reads."""
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(receive_all(connection)))
    reader.start()
    connection.sendall(sent)
    connection.shutdown(socket.SHUT_WR)
    reader.join()
    return received[0]


@pytest.mark.parametrize("is_tls", [True, False], ids=["tls", "plain"])
def test_grpclib_gets_and_gives_megabytes_both_ways(is_tls):
    peer = SshProxyPeer(is_tls=is_tls)
    with peer:
        plan = peer.plan()

        async def scenario(bed):
            return await one_program(bed, exchange)

        received, outcome = run_in_bed(NoPeer(), scenario, plan=plan)
    assert digest(received) == digest(MEGABYTES)
    assert outcome.bytes_up == outcome.bytes_down == len(MEGABYTES)
    assert not outcome.error
    assert peer.targets == [("node1:0", "demo.test")]
    assert peer.metadata[0]["version"] == "18.0.0"


class NoPeer:
    """The bed waits for one; the other is around it."""

    port = 0

    def __enter__(self):
        return self

    def __exit__(self, *_exc: object) -> None:
        return


@pytest.mark.parametrize("forward", ["", "http", "https"])
@pytest.mark.parametrize("kind", ["tls", "upgrade"])
def test_every_way_to_the_proxy_carries_it(kind, forward):
    peer: Peer
    if kind == "tls":
        peer = Peer(serve_call, server_context(ALPN))
        tls = TlsPlan(client_context(ALPN), SERVER_NAME)
        plan = DialPlan("127.0.0.1", peer.port, tls, ssh=TARGET)
    else:
        peer = TunnelPeer(serve_call, inner=server_context(ALPN))
        tunnelled = tunnel_plan(peer.port, ALPN)
        plan = replace(tunnelled, ssh=TARGET)
    with ForwardProxyPeer(is_tls=forward == "https") as proxy:
        plan = replace(plan, http_proxy=proxy.url() if forward else "")

        async def scenario(bed):
            bed.dial = lambda: dial(plan, 20.0, bed.reactor, known=AllNamesAreLocal())
            return await one_program(bed, lambda program: exchange(program, SOME_BYTES))

        received, outcome = run_in_bed(peer, scenario)
    assert digest(received) == digest(SOME_BYTES)
    assert outcome.end is RelayEnd.PROGRAM_CLOSED
    assert len(proxy.heads) == bool(forward)
    if isinstance(peer, TunnelPeer):
        # A balancer gives up connections that are silent.
        assert "Sec-WebSocket-Protocol: alpn-ping\r\n" in peer.requests[0]


class AllNamesAreLocal(ProxyAddresses):
    """Stands for a resolver."""

    async def find(self, host, port):
        return await super().find("127.0.0.1", port)


# -- hosts that are not reached --


def dial_error(plan: DialPlan, timeout_seconds: float = 20.0) -> DialError:
    """Why this cannot be dialled; nothing may be left open."""

    async def main():
        reactor = Reactor(asyncio.get_running_loop())
        try:
            with pytest.raises(DialError) as caught:
                await dial(plan, timeout_seconds, reactor)
            assert not len(reactor)
            return caught.value
        finally:
            reactor.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status.NOT_FOUND, NodeUnreachableError),
        (Status.UNAVAILABLE, NodeUnreachableError),
        (Status.FAILED_PRECONDITION, NodeUnreachableError),
        (Status.UNKNOWN, NodeUnreachableError),
        (Status.PERMISSION_DENIED, NodeDeniedError),
        (Status.UNAUTHENTICATED, LoginRefusedError),
        (Status.UNIMPLEMENTED, SshUnsupportedError),
    ],
)
def test_what_the_proxy_says_instead_of_connecting(status, kind):
    async def refuse(_stream):
        raise GRPCError(status, "no such\nhost: n\xf6de \x1b[31m" + "x" * 5000)

    with SshProxyPeer(refuse) as peer:
        error = dial_error(peer.plan())
    assert type(error) is kind
    text = str(error)
    assert text.startswith(
        f"SSH host node1 of cluster demo.test at 127.0.0.1:{peer.port}: no such "
    )
    assert "n\xf6de [31mxxx" in text
    assert text.isprintable()
    assert len(text) < 500


def test_a_status_without_words_is_named():
    async def refuse(_stream):
        raise GRPCError(Status.UNAVAILABLE)

    with SshProxyPeer(refuse) as peer:
        assert str(dial_error(peer.plan())).endswith("UNAVAILABLE")


def test_a_proxy_that_never_answers():
    async def hang(stream):
        await stream.recv_message()

    with SshProxyPeer(hang) as peer:
        assert isinstance(dial_error(peer.plan(), 0.5), DialTimedOutError)


ANSWERS = {
    "another protocol": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "none of HTTP/2"),
    "a page": (SETTINGS + headers([(":status", "403")]), "HTTP status 403"),
    "no gRPC": (SETTINGS + headers([(":status", "200"), ("content-type", "text/html")]), "no gRPC"),
    "garbage": (SETTINGS + ANSWER + data(b"<html>"), "compressed"),
    "no protobuf": (SETTINGS + ANSWER + data(b"\0\0\0\0\1\xff"), "cannot be read"),
    "an end": (SETTINGS + ANSWER + trailers(("grpc-status", "0")), "without saying why"),
    "no status": (
        SETTINGS + trailers(*[(":status", "200"), ("content-type", "application/grpc")]),
        "without saying",
    ),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_are_no_answer(answer):
    sent, why = ANSWERS[answer]

    def answer_so(sock: socket.socket) -> None:
        far = PlainFar(sock)
        far.send(sent)
        far.recv_all()

    with Peer(answer_so, is_tls=False, ignored_errors=(ConnectionError,)) as peer:
        error = dial_error(DialPlan("127.0.0.1", peer.port, None, ssh=TARGET))
    assert isinstance(error, HandshakeFailedError)
    assert why in str(error)


@pytest.mark.parametrize("is_tls", [True, False], ids=["close_notify", "fin"])
@pytest.mark.parametrize("sent", [b"", SETTINGS, SETTINGS + ANSWER + data(b"\0\0\0")])
def test_a_proxy_that_goes_away_is_dialled_again(sent, is_tls):
    """Admission does, for this error."""

    def leave(far) -> None:
        far = far if is_tls else PlainFar(far)
        if sent:
            far.send(sent)
        far.recv()
        far.close_notify()

    context = server_context(ALPN)
    with Peer(leave, context, is_tls=is_tls, ignored_errors=(OSError, AssertionError)) as peer:
        tls = TlsPlan(client_context(ALPN), SERVER_NAME) if is_tls else None
        error = dial_error(DialPlan("127.0.0.1", peer.port, tls, ssh=TARGET))
    assert isinstance(error, ProxyUnreachableError)


@pytest.mark.parametrize("farewell", [frame(7, 0, 0, bytes(8)), frame(3, 0, 1, (7).to_bytes(4))])
def test_a_proxy_that_takes_no_calls_is_dialled_again(farewell):
    stream = SshStream(Plain(), TARGET)
    stream.handshake(b"")
    with pytest.raises(LayerError, match="did not connect to the host: it"):
        stream.handshake(SETTINGS + farewell)


def test_a_refused_certificate_is_told_from_an_unreached_host():
    stranger_plan = TlsPlan(client_context(ALPN, issuer=stranger()), SERVER_NAME)
    with Peer(serve_call, server_context(ALPN), ignored_errors=(OSError,)) as peer:
        error = dial_error(DialPlan("127.0.0.1", peer.port, stranger_plan, ssh=TARGET))
    assert isinstance(error, DialRefusedError)


# -- the established call --


def opened(*more: bytes) -> SshStream:
    """A stream whose host is reached."""
    stream = SshStream(Plain(), TARGET)
    assert not stream.handshake(b"")
    stream.take_records()
    assert stream.handshake(b"".join((SETTINGS, ANSWER, data(framed(DETAILS)), *more)))
    stream.take_records()
    return stream


def ssh(payload: bytes) -> bytes:
    return data(framed(Response(ssh=Frame(payload=payload))))


def test_what_comes_with_the_first_answer_is_not_lost():
    stream = opened(ssh(b"SSH-2.0-"), ssh(b"Go\r\n"))
    assert bytes(stream.decrypt(b"")) == b"SSH-2.0-Go\r\n"
    assert bytes(stream.decrypt(ssh(b"more"))) == b"more"
    # In one message, as some version may do.
    stream = SshStream(Plain(), TARGET)
    stream.handshake(b"")
    both = Response(details=DETAILS.details, ssh=Frame(payload=b"SSH"))
    assert stream.handshake(SETTINGS + ANSWER + data(framed(both)))
    assert bytes(stream.decrypt(b"")) == b"SSH"


def test_messages_without_bytes_are_passed_over():
    stream = opened()
    empty = data(framed(Response())) + ssh(b"") + data(framed(DETAILS))
    assert bytes(stream.decrypt(empty + ssh(b"x") + empty)) == b"x"
    assert not stream.is_receive_ended


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (trailers(("grpc-status", "0")), ""),
        (
            trailers(("grpc-status", "14"), ("grpc-message", "node%0Agone")),
            "the proxy ended the connection: node gone",
        ),
        (trailers(("grpc-status", "2")), "the proxy ended the connection: UNKNOWN"),
        (
            frame(3, 0, 1, (2).to_bytes(4)),
            "the proxy ended the connection: it was broken off (INTERNAL_ERROR)",
        ),
        (data(b"", 1), "the proxy ended the connection: no reason given"),
        (
            data(b"\0\0\0") + trailers(("grpc-status", "0")),
            "the proxy ended the connection inside a message",
        ),
    ],
)
def test_the_end_comes_behind_the_last_bytes_and_says_why(end, reason):
    stream = opened()
    assert bytes(stream.decrypt(ssh(b"last") + end)) == b"last"
    assert stream.is_receive_ended
    assert stream.end_reason == reason
    # What the program still sends goes nowhere.
    assert stream.encrypt(memoryview(b"late")) == b""
    assert stream.pending_bytes == 0


def test_a_relay_waits_for_a_far_end_that_does_not_read():
    """The program is slowed down; what waits here is bounded, and arrives in the end."""
    is_reading = threading.Event()
    received = []

    async def read_late(stream):
        await stream.send_message(DETAILS)
        while not is_reading.is_set():
            await asyncio.sleep(0.01)
        while (request := await stream.recv_message()) is not None:
            received.append(request.ssh.payload)

    def send(connection: socket.socket) -> None:
        connection.sendall(MEGABYTES)
        connection.shutdown(socket.SHUT_WR)
        receive_all(connection)

    async def scenario(bed):
        running = asyncio.create_task(one_program(bed, send))
        await until(lambda: bool(bed.relays) and bed.relays[0].bytes_up > 0)
        [relay] = bed.relays
        before = -1
        while relay.bytes_up != before:  # until it stands still
            before = relay.bytes_up
            await asyncio.sleep(0.1)
        # One window, what may wait, one read; the rest is in the kernel.
        assert relay.bytes_up < 65_535 + bed.max_pending_bytes + len(bed.memory.read_buffer)
        is_reading.set()
        return await running

    with SshProxyPeer(read_late) as peer:
        _, outcome = run_in_bed(NoPeer(), scenario, plan=peer.plan())
    assert digest(b"".join(received)) == digest(MEGABYTES)
    assert outcome.bytes_up == len(MEGABYTES)


def test_leave_for_our_direction_comes_with_what_is_read():
    stream = opened(settings((4, 10)))
    stream.encrypt(memoryview(bytes(20)))
    assert stream.pending_bytes
    stream.decrypt(frame(8, 0, 1, (100_000).to_bytes(4)))
    assert stream.pending_bytes == 0
    assert stream.take_records()


def test_a_program_that_does_not_read_stops_the_far_end():
    """What is sent to it is bounded by buffers and windows, and arrives when it reads."""
    sent = 0

    async def send_all(stream):
        nonlocal sent
        await stream.send_message(DETAILS)
        for start in range(0, len(MANY_MEGABYTES), 50_000):
            piece = MANY_MEGABYTES[start : start + 50_000]
            await stream.send_message(Response(ssh=Frame(payload=piece)))
            sent = start

    def read_late(connection: socket.socket) -> bytes:
        before = -1
        while sent != before:  # until it stands still
            before = sent
            time.sleep(0.2)
        assert sent < len(MANY_MEGABYTES) - 50_000
        return receive_all(connection)

    async def scenario(bed):
        return await one_program(bed, read_late)

    with SshProxyPeer(send_all) as peer:
        received, _ = run_in_bed(NoPeer(), scenario, plan=peer.plan())
    assert digest(received) == digest(MANY_MEGABYTES)


# -- recording proxies --


def test_agent_requests_are_answered_and_kept_apart_from_the_bytes():
    stream = opened(data(framed(Response(agent=Frame(payload=b"early ")))))
    asked = []

    def agent(request: bytes) -> bytes:
        asked.append(request)
        return b"answer"

    agent_frame = data(framed(Response(agent=Frame(payload=b"later"))))
    assert bytes(stream.decrypt(b"")) == b""
    stream.set_agent(agent)
    assert agent_answers(stream.take_records()) == [b"answer"]
    assert bytes(stream.decrypt(ssh(b"a") + agent_frame + ssh(b"b"))) == b"ab"
    assert agent_answers(stream.take_records()) == [b"answer"]
    assert asked == [b"early ", b"later"]


def agent_answers(sent: bytes) -> list[bytes]:
    content = content_of(sent)
    found = []
    while content:
        end = 5 + int.from_bytes(content[1:5])
        found.append(transport_pb2.ProxySSHRequest.FromString(content[5:end]).agent.payload)
        content = content[end:]
    return found


def test_a_proxy_that_wants_an_agent_and_gets_none_is_bounded():
    stream = opened()
    request = data(framed(Response(agent=Frame(payload=bytes(16_000)))))
    with pytest.raises(LayerError, match="SSH agent"):
        stream.decrypt(request * (MAX_EARLY_AGENT_BYTES // 16_000 + 1))


def test_early_agent_requests_that_are_none_fail_the_login():
    upstream = SimpleNamespace(layer=opened(data(framed(Response(agent=Frame(payload=bytes(4)))))))
    made = certificate(SSH_KEY.public_key())
    credentials = SshCredentials(SSH_KEY, made, (), "node1", "root", "demo.test")
    with pytest.raises(UnreachableError, match="agent request of 0 bytes"):
        offer_agent(upstream, credentials)


def test_an_agent_over_a_real_connection():
    """The far end sends what it gets to the agent, and sends back what that says."""

    async def scenario(bed):
        upstream = await bed.dial()
        upstream.layer.set_agent(bytes.upper)
        upstream.endpoint.send(upstream.layer.encrypt(memoryview(b"request")))
        await until(lambda: bool(upstream._early))
        early = upstream.take()
        upstream.close()
        return early

    peer = Peer(
        lambda far: serve_call(far, is_recording=True),
        server_context(ALPN),
        ignored_errors=(ConnectionError,),
    )
    plan = DialPlan("127.0.0.1", peer.port, TlsPlan(client_context(ALPN), SERVER_NAME), ssh=TARGET)
    # The answer is sent when something is received: here by the upstream, which waits to be taken.
    assert run_in_bed(peer, scenario, plan=plan) == b"REQUEST"

"""The way through a load balancer: a WebSocket on the web port, and in it all there is else."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import ssl

import pytest
from cryptography import x509
from embedded_cluster_client import TlsChannel, TlsClient, app_pair, encoded, frame, unframe
from proxy_bed import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    client_frame,
    parse_head,
    read_frame,
    run,
    set_faults,
    tunnel,
    until,
    upgrade_request,
    upgraded,
    web,
)

from demo.cluster.errors import WebSocketError
from demo.cluster.websocket import Event, FrameDecoder, Opcode
from workers.proxy.teleport.pb import auth_grpc, auth_pb2, transport_grpc, transport_pb2

FILE = """
[[clusters]]
name = "root.test"
proxy_addr = "localhost:0"
conn_upgrade_required = {required}
ping_interval_seconds = {ping}
apps = [
  {{ name = "echo", uri = "tcp://echo.backend.internal:7", public_addr = "echo.apps.test" }},
  {{ name = "real", uri = "tcp://127.0.0.1", public_addr = "real.apps.test", tcp_ports = [{{ port = 1024, end_port = 65535 }}] }},
]

[[clusters]]
name = "leaf.test"
leaf_of = "root.test"
"""
BEHIND_BALANCER = FILE.format(required="true", ping=30)
WITHOUT_BALANCER = FILE.format(required="false", ping=30)
PINGING = FILE.format(required="true", ping=0.02)

BOTH = pytest.mark.parametrize("file", [BEHIND_BALANCER, WITHOUT_BALANCER], ids=["required", "not"])


def route(name, target_port=0):
    address = f"{name}.apps.test"
    return {
        "Name": name,
        "PublicAddr": address,
        "ClusterName": "root.test",
        "TargetPort": target_port,
    }


async def app_certificate(home, name="echo", target_port=0):
    """An app certificate, asked for through an upgraded connection."""
    async with tunnel(home, "alpn-ping") as sock:
        direct, home.auth = home.auth, lambda *a, **k: auth_channel(home, sock)
        try:
            return await app_pair(home, route(name, target_port))
        finally:
            home.auth = direct


@contextlib.asynccontextmanager
async def auth_channel(home, sock, cluster="root.test"):
    channel = TlsChannel(sock, home.auth_context(cluster), encoded(home.cluster))
    try:
        yield channel
    finally:
        channel.close()


def inner_context(home, pair, protocol):
    return home.pair_context(pair, [protocol], ca=home.keys / "cas" / "root.test.pem")


def talk(home, sock, context, data, *, is_framed):
    with TlsClient(sock, context, home.proxy_host) as tls:
        tls.send(frame(data) if is_framed else data)
        tls.send_eof()
        received = tls.recv_all()
        return unframe(received)[0] if is_framed else received


# --- How the web port looks from outside ----------------------------------------------------


def negotiated(home, protocols):
    context = (
        home.context(protocols)
        if protocols
        else ssl.create_default_context(cafile=str(home.path / "web-ca.pem"))
    )
    with TlsClient(home.address, context, home.proxy_host) as tls:
        return tls.tls.selected_alpn_protocol()


def test_load_balancer_knows_http_1_1_and_nothing_else(tmp_path):
    async def scenario(home):
        assert home.profile["tls_routing_conn_upgrade_required"] is True
        for offered, expected in (
            (["teleport-tcp-ping", "teleport-tcp"], None),
            ([f"teleport-auth@{encoded('root.test')}", "h2"], None),
            # What tsh finds out with whether an upgrade is required.
            (["teleport-reversetunnel"], None),
            (["teleport-proxy-ssh-grpc", "h2", "http/1.1"], "http/1.1"),
            ([], None),
        ):
            assert await asyncio.to_thread(negotiated, home, offered) == expected
        status, _, body = await asyncio.to_thread(
            web, home, "GET /webapi/find HTTP/1.1\nHost: localhost", alpn=["teleport-tcp"]
        )
        assert status == "HTTP/1.1 200 OK"
        assert json.loads(body)["proxy"]["tls_routing_enabled"] is True

    run(tmp_path, BEHIND_BALANCER, scenario)


@BOTH
def test_opening_handshake_is_answered_as_rfc_6455_has_it(tmp_path, file):
    async def scenario(home):
        key = "dGhlIHNhbXBsZSBub25jZQ=="
        request = upgrade_request("chat, alpn-ping", key=key)
        reader, writer = await asyncio.open_connection(
            *home.address, ssl=home.context(["http/1.1"]), server_hostname="localhost"
        )
        writer.write("".join(f"{line}\r\n" for line in (*request.splitlines(), "")).encode())
        status, headers = parse_head((await reader.readuntil(b"\r\n\r\n")).rstrip())
        assert status == "HTTP/1.1 101 Switching Protocols"
        assert headers == {
            "upgrade": "websocket",
            "connection": "Upgrade",
            "sec-websocket-accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
            "sec-websocket-protocol": "alpn-ping",
        }
        writer.transport.abort()

    run(tmp_path, file, scenario)


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (upgrade_request().replace("GET", "POST"), 405),
        (upgrade_request(without=["Upgrade"]), 404),
        (upgrade_request(Upgrade="alpn"), 404),
        (upgrade_request(without=["Connection"]), 400),
        (upgrade_request(Connection="keep-alive"), 400),
        (upgrade_request(Sec_WebSocket_Version="8"), 400),
        (upgrade_request(without=["Sec-WebSocket-Version"]), 400),
        (upgrade_request(key="short"), 400),
        (upgrade_request(key=base64.b64encode(bytes(15)).decode()), 400),
        (upgrade_request(without=["Sec-WebSocket-Key"]), 400),
        ("GET /webapi/connectionupgrade HTTP/2\nUpgrade: websocket", 400),
    ],
)
def test_request_that_is_no_websocket_handshake_is_refused(tmp_path, request_text, status):
    async def scenario(home):
        line, _, body = await asyncio.to_thread(web, home, request_text)
        assert line.split()[1] == str(status)
        assert json.loads(body)["error"]["message"]

    run(tmp_path, BEHIND_BALANCER, scenario)


@pytest.mark.parametrize("protocol", ["", "chat"])
def test_unknown_sub_protocol_is_refused_inside_the_websocket(tmp_path, protocol):
    async def scenario(home):
        status, headers, rest = await asyncio.to_thread(web, home, upgrade_request(protocol))
        assert status.startswith("HTTP/1.1 101 ")
        assert "sec-websocket-protocol" not in headers
        assert rest == b"\x88\x1e\x03\xebunknown or empty subprotocol"

    run(tmp_path, BEHIND_BALANCER, scenario)


def test_nothing_may_come_before_the_handshake_is_answered(tmp_path):
    async def scenario(home):
        def ask():
            with TlsClient(home.address, home.context(["http/1.1"]), "localhost") as tls:
                lines = (*upgrade_request().splitlines(), "")
                early = client_frame(BINARY, b"early")
                tls.send("".join(f"{line}\r\n" for line in lines).encode() + early)
                return tls.recv_all()

        assert (await asyncio.to_thread(ask)).endswith(b"\r\n\r\n")

    run(tmp_path, BEHIND_BALANCER, scenario)


# --- What is inside -------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("protocol", ["teleport-tcp-ping", "teleport-tcp"])
@pytest.mark.parametrize("key", [bytes(4), b"\x01\xfe\x7f\x80"], ids=["zero", "key"])
def test_app_is_reached_with_a_certificate_of_the_host_authority(tmp_path, file, protocol, key):
    async def scenario(home):
        pair = await app_certificate(home)
        context = inner_context(home, pair, protocol)
        data = os.urandom(100_003)
        async with tunnel(home, key=key) as sock:
            is_framed = protocol == "teleport-tcp-ping"
            echoed = await asyncio.to_thread(talk, home, sock, context, data, is_framed=is_framed)
        assert echoed == data

    run(tmp_path, file, scenario)


def test_inner_certificate_covers_proxy_and_cluster_names(tmp_path):
    async def scenario(home):
        context = home.context(["teleport-tcp"], ca=home.keys / "cas" / "root.test.pem")
        for name in ("localhost", encoded("root.test")):
            async with tunnel(home) as sock:

                def certificate(sock=sock, name=name):
                    with TlsClient(sock, context, name) as tls:
                        return tls.tls.getpeercert(binary_form=True)

                shown = x509.load_der_x509_certificate(await asyncio.to_thread(certificate))
        cluster = x509.ObjectIdentifier("1.3.9999.1.7")
        assert shown.subject.get_attributes_for_oid(cluster)[0].value == "root.test"

    run(tmp_path, BEHIND_BALANCER, scenario)


def test_web_api_is_there_too_but_no_second_upgrade(tmp_path):
    async def scenario(home):
        context = home.context(["http/1.1"], ca=home.keys / "cas" / "root.test.pem")
        for request, status in (
            ("GET /webapi/ping HTTP/1.1\nHost: localhost", b"200"),
            (upgrade_request(), b"404"),
        ):
            async with tunnel(home) as sock:

                def ask(sock=sock, request=request):
                    with TlsClient(sock, context, "localhost") as tls:
                        lines = (*request.splitlines(), "")
                        tls.send("".join(f"{line}\r\n" for line in lines).encode())
                        return tls.recv_all()

                assert (await asyncio.to_thread(ask)).split()[1] == status

    run(tmp_path, BEHIND_BALANCER, scenario)


@pytest.mark.parametrize("cluster", ["root.test", "leaf.test"])
def test_auth_servers_are_reached(tmp_path, cluster):
    async def scenario(home):
        async with tunnel(home, "alpn-ping") as sock, auth_channel(home, sock, cluster) as channel:
            reply = await auth_grpc.AuthServiceStub(channel).Ping(auth_pb2.PingRequest())
            assert reply.ClusterName == cluster

    run(tmp_path, BEHIND_BALANCER, scenario)


def test_transport_service_is_reached(tmp_path):
    async def scenario(home):
        context = home.auth_context("root.test")
        context.set_alpn_protocols(["teleport-proxy-ssh-grpc", "h2"])
        async with tunnel(home, "alpn-ping") as sock:
            channel = TlsChannel(sock, context, encoded("root.test"))
            stub = transport_grpc.TransportServiceStub(channel)
            reply = await stub.GetClusterDetails(transport_pb2.GetClusterDetailsRequest())
            assert reply.HasField("details")
            channel.close()

    run(tmp_path, BEHIND_BALANCER, scenario)


def test_each_direction_ends_by_itself(tmp_path):
    async def scenario(home):
        received = bytearray()
        ended = asyncio.Event()

        async def serve(reader, writer):
            writer.write(b"bye")
            writer.write_eof()
            while data := await reader.read(1000):
                received.extend(data)
            writer.close()
            ended.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        pair = await app_certificate(home, "real", server.sockets[0].getsockname()[1])
        context = inner_context(home, pair, "teleport-tcp")
        async with tunnel(home) as sock:

            def talk_on():
                tls = TlsClient(sock, context, "localhost")
                assert tls.recv_all() == b"bye"
                tls.send(b"still here")
                tls.send_eof()

            await asyncio.to_thread(talk_on)
            await asyncio.wait_for(ended.wait(), 10)
        assert bytes(received) == b"still here"
        server.close()
        await server.wait_closed()

    run(tmp_path, BEHIND_BALANCER, scenario)


def test_ten_megabytes_pass_both_ways(tmp_path):
    async def scenario(home):
        piece, pieces = os.urandom(1 << 20), 10
        digests = []

        async def serve(reader, writer):
            digest = hashlib.sha256()
            while data := await reader.read(1 << 16):
                digest.update(data)
            digests.append(digest.hexdigest())
            for _ in range(pieces):
                writer.write(piece)
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        pair = await app_certificate(home, "real", server.sockets[0].getsockname()[1])
        context = inner_context(home, pair, "teleport-tcp-ping")
        async with tunnel(home) as sock:

            def transfer():
                tls = TlsClient(sock, context, "localhost")
                for _ in range(pieces):
                    tls.send(frame(piece))
                tls.send_eof()
                return unframe(tls.recv_all())[0]

            received = await asyncio.to_thread(transfer)
        assert received == piece * pieces
        assert digests == [hashlib.sha256(piece * pieces).hexdigest()]
        server.close()
        await server.wait_closed()

    run(tmp_path, BEHIND_BALANCER, scenario)


# --- WebSocket frames -----------------------------------------------------------------------


def test_pings_come_with_alpn_ping_only(tmp_path):
    async def scenario(home):
        async with upgraded(home, "alpn-ping") as (reader, writer):
            for _ in range(3):
                assert await asyncio.wait_for(read_frame(reader), 10) == (PING, b"teleport")
            writer.write(client_frame(PONG, b"teleport"))
            assert await asyncio.wait_for(read_frame(reader), 10) == (PING, b"teleport")
        async with upgraded(home, "alpn") as (reader, writer):
            writer.write(client_frame(PING, b"marco"))
            assert await asyncio.wait_for(read_frame(reader), 10) == (PONG, b"marco")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.2)

    run(tmp_path, PINGING, scenario)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (client_frame(BINARY, b"bare", key=None), 1002),
        (client_frame(TEXT, b"text"), 1003),
        (client_frame(BINARY, b"first", fin=0), 1002),
        (client_frame(0, b"rest"), 1002),
        (client_frame(3, b""), 1002),
        (client_frame(BINARY, b"", fin=0xC0), 1002),
        (client_frame(PING, bytes(126)), 1002),
        (b"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0", 1002),
    ],
    ids=["unmasked", "text", "fragment", "rest", "opcode", "reserved", "long ping", "length"],
)
def test_client_that_breaks_the_protocol_is_told_and_closed(tmp_path, sent, code):
    async def scenario(home):
        async with upgraded(home) as (reader, writer):
            writer.write(client_frame(PING, b"x") + sent)
            assert await read_frame(reader) == (PONG, b"x")
            assert await read_frame(reader) == (CLOSE, code.to_bytes(2, "big"))
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert await reader.read() == b""

    run(tmp_path, BEHIND_BALANCER, scenario)


def test_close_frame_is_answered_and_ends_the_connection(tmp_path):
    async def scenario(home):
        async with upgraded(home) as (reader, writer):
            writer.write(client_frame(CLOSE, (1000).to_bytes(2, "big")))
            assert await read_frame(reader) == (CLOSE, (1000).to_bytes(2, "big"))
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert await reader.read() == b""

    run(tmp_path, BEHIND_BALANCER, scenario)


def test_server_closes_with_a_close_frame(tmp_path):
    async def scenario(home):
        pair = await app_certificate(home)
        context = inner_context(home, pair, "nonsense")
        async with upgraded(home) as (reader, writer):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
            # A hello in pieces, with an empty frame among them, is a hello all the same.
            hello = outgoing.read()
            for piece in (hello[:1], b"", hello[1:5], hello[5:]):
                writer.write(client_frame(BINARY, piece, key=b"abcd"))
            assert await read_frame(reader) == (CLOSE, (1000).to_bytes(2, "big"))

    run(tmp_path, BEHIND_BALANCER, scenario)


def test_frames_are_read_in_any_pieces():
    stream = b"".join(
        (
            client_frame(BINARY, b"abc", key=b"1234"),
            client_frame(PING, b"", key=b"1234"),
            client_frame(BINARY, bytes(range(256)) * 3, key=b"\xff\0\xaa\x55"),
            client_frame(PONG, bytes(125), key=b"wxyz"),
            client_frame(BINARY, bytes(70_000), key=b"wxyz"),
        )
    )
    for size in (1, 2, 3, 7, 1000, len(stream)):
        decoder, payload, others = FrameDecoder(), b"", []
        for at in range(0, len(stream), size):
            for event in decoder.feed(stream[at : at + size]):
                if event.opcode is Opcode.BINARY:
                    payload += event.payload
                else:
                    others.append(event)
        assert payload == b"abc" + bytes(range(256)) * 3 + bytes(70_000)
        assert others == [Event(Opcode.PING, b""), Event(Opcode.PONG, bytes(125))]
        assert not decoder.is_inside_frame


def test_mutated_frames_are_read_or_refused():
    import random

    rng = random.Random(6455)
    good = client_frame(BINARY, b"hello") + client_frame(PING, b"x") + client_frame(CLOSE, b"")
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(WebSocketError):
            held = sum(len(event.payload) for event in FrameDecoder().feed(bytes(data)))
            assert held <= len(data)


# --- Faults ---------------------------------------------------------------------------------


def test_new_host_authority_is_shown_inside_at_once(tmp_path):
    async def scenario(home):
        state = home.embedded.states["root.test"]
        old = state.host_ca.tls.certificate
        # Both ways with a certificate of the host authority have been used before.
        for ways in range(2):
            for protocols in (["teleport-tcp"], ["teleport-proxy-ssh-grpc", "h2"]):
                context = home.auth_context("root.test")
                context.set_alpn_protocols(protocols)
                async with tunnel(home) as sock:

                    def certificate(sock=sock, context=context):
                        with TlsClient(sock, context, "localhost") as tls:
                            return tls.tls.getpeercert(binary_form=True)

                    shown = x509.load_der_x509_certificate(await asyncio.to_thread(certificate))
                shown.verify_directly_issued_by(state.host_ca.tls.certificate)
            if not ways:
                set_faults(home, "rotate_ca")
                await until(lambda: state.host_ca.tls.certificate != old)

    run(tmp_path, BEHIND_BALANCER, scenario)


@pytest.mark.parametrize("fault", ["close_apps", "proxy_down"])
def test_faults_end_apps_inside_an_upgraded_connection(tmp_path, fault):
    async def scenario(home):
        pair = await app_certificate(home)
        context = inner_context(home, pair, "teleport-tcp")
        async with tunnel(home) as sock:
            tls = await asyncio.to_thread(TlsClient, sock, context, "localhost")
            tls.send(b"x")
            assert await asyncio.to_thread(tls.recv) == b"x"
            set_faults(home, fault)

            def ending():
                with contextlib.suppress(ssl.SSLError, ConnectionError):
                    return tls.recv_all()
                return b""

            assert await asyncio.to_thread(ending) == b""
        set_faults(home, "")

    run(tmp_path, BEHIND_BALANCER, scenario)


def test_auth_down_ends_upgraded_connections_to_it(tmp_path):
    async def scenario(home):
        async with upgraded(home) as (reader, _), tunnel(home, "alpn-ping") as sock:
            async with auth_channel(home, sock) as channel:
                stub = auth_grpc.AuthServiceStub(channel)
                await stub.Ping(auth_pb2.PingRequest())
                set_faults(home, "auth_down")
                await until(channel._protocol.processor.connection.is_closing)
            # One that is not for it goes on.
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.1)

    run(tmp_path, BEHIND_BALANCER, scenario)

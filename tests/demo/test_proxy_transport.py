"""A proxy without TLS routing, and the transport service it has in its place."""

import asyncio
import contextlib
import json
import os
import socket
import ssl
from contextlib import asynccontextmanager

import pytest
from embedded_cluster_client import (
    VERSION,
    AppPair,
    Home,
    TlsChannel,
    TlsClient,
    app_pair,
    encoded,
)
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from proxy_bed import run, set_faults, until, web

from demo.cluster.streams import abort
from workers.proxy.teleport.pb import auth_grpc, auth_pb2, transport_grpc, transport_pb2

FILE = """
[[clusters]]
name = "root.test"
proxy_addr = "localhost:0"
tls_routing = {tls_routing}
apps = [{{ name = "echo", uri = "tcp://echo.backend.internal:7", public_addr = "echo.apps.test" }}]
nodes = [{{ hostname = "node1" }}]

[[clusters]]
name = "leaf.test"
leaf_of = "root.test"
nodes = [{{ hostname = "node2" }}]
"""
SEPARATE = FILE.format(tls_routing="false")
TLS_ROUTING = FILE.format(tls_routing="true")
ECHO = {"Name": "echo", "PublicAddr": "echo.apps.test", "ClusterName": "root.test"}

ClusterRequest = transport_pb2.ProxyClusterRequest
Frame = transport_pb2.Frame


def ssh_address(home):
    return "127.0.0.1", int(home.profile["ssh_proxy_addr"].rpartition(":")[2])


@asynccontextmanager
async def transport(home, *, address=None, pair=None, sni="root.test", alpn=None):
    """A stub of the transport service, with the login's certificate or another."""
    context = home.auth_context(
        "root.test", certificate=pair and pair.certificate, key=pair and pair.key
    )
    context.set_alpn_protocols(alpn or ["teleport-proxy-ssh-grpc", "h2"])
    channel = TlsChannel(address or ssh_address(home), context, encoded(sni))
    try:
        yield transport_grpc.TransportServiceStub(channel)
    finally:
        channel.close()


@asynccontextmanager
async def cluster_socket(stub, cluster):
    """A socket whose bytes go to a cluster's auth server, through a ProxyCluster stream."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)

    async def up(stream):
        while data := await reader.read(30_000):
            await stream.send_message(ClusterRequest(frame=Frame(payload=data)))
        await stream.end()

    async def down(stream):
        async for reply in stream:
            writer.write(reply.frame.payload)
            await writer.drain()
        writer.write_eof()

    async def carry():
        try:
            async with stub.ProxyCluster.open(metadata=VERSION) as stream:
                await stream.send_message(ClusterRequest(cluster=cluster))
                await asyncio.gather(up(stream), down(stream))
        finally:
            writer.close()

    task = asyncio.create_task(carry())
    try:
        yield ours, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        abort(writer)
        ours.close()


async def ping_through(home, stub, cluster):
    async with cluster_socket(stub, cluster) as (sock, _):
        channel = TlsChannel(sock, home.auth_context(cluster), encoded("root.test"))
        try:
            reply = await auth_grpc.AuthServiceStub(channel).Ping(auth_pb2.PingRequest())
        finally:
            channel.close()
        return reply.ClusterName


@asynccontextmanager
async def refused(status, text=""):
    with pytest.raises(GRPCError) as error:
        yield
    assert error.value.status is status
    assert text in (error.value.message or "")


# --- The two ports --------------------------------------------------------------------------


def test_profile_and_web_api_name_the_ssh_port(tmp_path):
    async def scenario(home):
        assert home.profile["tls_routing_enabled"] is False
        ssh = home.profile["ssh_proxy_addr"]
        assert ssh.startswith("localhost:")
        assert ssh != home.profile["web_proxy_addr"]
        request = "GET /webapi/ping HTTP/1.1\nHost: localhost"
        _, _, body = await asyncio.to_thread(web, home, request)
        proxy = json.loads(body)["proxy"]
        assert proxy["tls_routing_enabled"] is False
        assert proxy["ssh"]["public_addr"] == home.profile["web_proxy_addr"]
        assert proxy["ssh"]["ssh_public_addr"] == ssh
        assert proxy["ssh"]["listen_addr"] == f"0.0.0.0:{ssh_address(home)[1]}"

    run(tmp_path, SEPARATE, scenario)


def test_ssh_port_can_be_named(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = SEPARATE.replace("tls_routing", f"ssh_proxy_port = {port}\ntls_routing", 1)

    async def scenario(home):
        assert home.profile["ssh_proxy_addr"] == f"localhost:{port}"
        socket.create_connection(("127.0.0.1", port)).close()

    run(tmp_path, file, scenario)


def test_with_tls_routing_there_is_one_port(tmp_path):
    async def scenario(home):
        assert home.profile["ssh_proxy_addr"] == home.profile["web_proxy_addr"]

    run(tmp_path, TLS_ROUTING, scenario)


async def certificate_by_stream(home):
    pair = AppPair()
    async with transport(home) as stub, cluster_socket(stub, "root.test") as (sock, _):
        direct = home.auth

        @asynccontextmanager
        async def auth():
            channel = TlsChannel(sock, home.auth_context("root.test"), encoded("root.test"))
            yield channel
            channel.close()

        home.auth = auth
        pair = await app_pair(home, ECHO)
        home.auth = direct
    return pair


def test_apps_are_reached_at_the_web_port_without_tls_routing(tmp_path):
    async def scenario(home):
        pair = await certificate_by_stream(home)

        def talk():
            with home.app(pair, ("teleport-tcp",)) as tls:
                tls.send(b"hello")
                tls.send_eof()
                return tls.recv_all()

        assert await asyncio.to_thread(talk) == b"hello"

    run(tmp_path, SEPARATE, scenario)


def test_auth_is_not_reached_by_alpn_without_tls_routing(tmp_path):
    async def scenario(home):
        context = home.auth_context("root.test")
        context.set_alpn_protocols([f"teleport-auth@{encoded('root.test')}"])
        for address in (home.address, ssh_address(home)):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.to_thread(TlsClient, address, context, encoded("root.test"))

    run(tmp_path, SEPARATE, scenario)


@pytest.mark.parametrize("spoken", [b"SSH-2.0-OpenSSH_9\r\n", b"\x16\x03\x01\xff\xff", b""])
def test_ssh_port_closes_what_is_no_tls(tmp_path, spoken):
    async def scenario(home):
        reader, writer = await asyncio.open_connection(*ssh_address(home))
        writer.write(spoken)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        await writer.wait_closed()

    run(tmp_path, SEPARATE, scenario)


def test_both_ports_go_away_and_come_back(tmp_path):
    async def scenario(home):
        addresses = (home.address, ssh_address(home))

        def can_connect(address):
            with socket.socket() as sock:
                return sock.connect_ex(address) == 0

        set_faults(home, "proxy_down")
        await until(lambda: not any(map(can_connect, addresses)))
        set_faults(home, "")
        await until(lambda: all(map(can_connect, addresses)))
        async with transport(home) as stub:
            assert await ping_through(home, stub, "leaf.test") == "leaf.test"

    run(tmp_path, SEPARATE, scenario)


# --- The transport service ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "place"), [(SEPARATE, "ssh"), (SEPARATE, "web"), (TLS_ROUTING, "web")]
)
def test_service_answers_at_the_ssh_port_and_by_alpn_at_the_web_port(tmp_path, file, place):
    async def scenario(home):
        address = home.address if place == "web" else ssh_address(home)
        async with transport(home, address=address) as stub:
            request = transport_pb2.GetClusterDetailsRequest()
            reply = await stub.GetClusterDetails(request, metadata=VERSION)
            assert not reply.details.fips_enabled
            assert await ping_through(home, stub, "root.test") == "root.test"
            assert await ping_through(home, stub, "leaf.test") == "leaf.test"

    run(tmp_path, file, scenario)


def test_service_prefers_h2_and_shows_a_certificate_of_the_host_authority(tmp_path):
    async def scenario(home):
        context = home.auth_context("root.test")
        for offered, chosen in (
            (["teleport-proxy-ssh-grpc", "h2"], "h2"),
            (["teleport-proxy-ssh-grpc"], "teleport-proxy-ssh-grpc"),
        ):
            context.set_alpn_protocols(offered)

            def negotiated():
                with TlsClient(ssh_address(home), context, "localhost") as tls:
                    return tls.tls.selected_alpn_protocol()

            assert await asyncio.to_thread(negotiated) == chosen
        context.set_alpn_protocols(["http/1.1"])
        with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
            await asyncio.to_thread(TlsClient, ssh_address(home), context, "localhost")

    run(tmp_path, SEPARATE, scenario)


def test_service_needs_a_certificate_of_a_known_user_authority(tmp_path):
    async def scenario(home):
        context = home.context(["h2"], ca=home.keys / "cas" / "root.test.pem")

        def shown_nothing():
            with TlsClient(ssh_address(home), context, "localhost") as tls:
                return tls.recv()

        with pytest.raises(ssl.SSLError):
            await asyncio.to_thread(shown_nothing)
        # A leaf's name in SNI means the leaf's users only.
        with pytest.raises((StreamTerminatedError, OSError)):
            async with transport(home, sni="leaf.test") as stub:
                await stub.GetClusterDetails(transport_pb2.GetClusterDetailsRequest())
        async with transport(home, sni="unknown.test") as stub:
            await stub.GetClusterDetails(transport_pb2.GetClusterDetailsRequest())

    run(tmp_path, SEPARATE, scenario)


def test_certificate_for_an_app_is_none_for_the_service(tmp_path):
    async def scenario(home):
        pair = await certificate_by_stream(home)
        files = AppPair()
        files.certificate, files.key = home.path / "pair.crt", home.path / "pair.key"
        files.certificate.write_bytes(pair.certificate)
        files.key.write_bytes(pair.key)
        async with transport(home, pair=files) as stub, refused(Status.PERMISSION_DENIED):
            await stub.GetClusterDetails(transport_pb2.GetClusterDetailsRequest())

    run(tmp_path, SEPARATE, scenario)


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (ClusterRequest(cluster="other.test"), Status.NOT_FOUND),
        (ClusterRequest(frame=Frame(payload=b"x")), Status.INVALID_ARGUMENT),
        (None, Status.INVALID_ARGUMENT),
    ],
    ids=["unknown", "no cluster", "no message"],
)
def test_stream_to_no_cluster_is_refused(tmp_path, first, status):
    async def scenario(home):
        async with (
            transport(home) as stub,
            refused(status),
            stub.ProxyCluster.open() as stream,
        ):
            await stream.send_request()
            if first is not None:
                await stream.send_message(first)
            await stream.end()
            await stream.recv_message()

    run(tmp_path, SEPARATE, scenario)


def test_end_of_the_client_reaches_the_auth_server_and_ends_the_call(tmp_path):
    async def scenario(home):
        received = bytearray()

        async def serve(reader, writer):
            while data := await reader.read(1000):
                received.extend(data)
            writer.write(b"after your end")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        home.embedded._auth_addresses["leaf.test"] = server.sockets[0].getsockname()
        async with transport(home) as stub, stub.ProxyCluster.open() as stream:
            await stream.send_message(
                ClusterRequest(cluster="leaf.test", frame=Frame(payload=b"a"))
            )
            await stream.send_message(ClusterRequest(frame=Frame(payload=b"b")))
            await stream.end()
            assert [reply.frame.payload async for reply in stream] == [b"after your end"]
        assert received == b"ab"
        server.close()
        await server.wait_closed()

    run(tmp_path, SEPARATE, scenario)


def test_end_of_the_auth_server_ends_the_call_of_a_client_that_goes_on(tmp_path):
    async def scenario(home):
        # As Go's servers do, the stream is reset after the trailers: nobody reads what the client
        # may still send. grpclib tells of whichever it sees first.
        with contextlib.suppress(StreamTerminatedError):
            async with transport(home) as stub, stub.ProxyCluster.open() as stream:
                await stream.send_message(ClusterRequest(cluster="root.test"))
                # No ClientHello: the auth server closes.
                await stream.send_message(
                    ClusterRequest(frame=Frame(payload=b"GET / HTTP/1.0\r\n\r\n"))
                )
                async for _alert in stream:
                    pass
                await stream.recv_trailing_metadata()
                await stream.cancel()

    run(tmp_path, SEPARATE, scenario)


def test_ten_megabytes_pass_both_ways_through_a_stream(tmp_path):
    async def scenario(home):
        async def serve(reader, writer):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        home.embedded._auth_addresses["leaf.test"] = server.sockets[0].getsockname()
        sent = os.urandom(10 << 20)
        async with transport(home) as stub, cluster_socket(stub, "leaf.test") as (sock, _):
            reader, writer = await asyncio.open_connection(sock=sock.dup())

            async def send():
                writer.write(sent)
                await writer.drain()
                writer.write_eof()

            _, received = await asyncio.gather(send(), reader.read(-1))
            assert received == sent
            writer.close()
        server.close()
        await server.wait_closed()

    run(tmp_path, SEPARATE, scenario)


@pytest.mark.parametrize(
    ("host_port", "cluster", "status"),
    [
        ("nowhere:0", "root.test", Status.NOT_FOUND),
        ("node1:0", "leaf.test", Status.NOT_FOUND),
        ("node1:0", "other.test", Status.NOT_FOUND),
        ("node1", "root.test", Status.INVALID_ARGUMENT),
        ("node1:x", "root.test", Status.INVALID_ARGUMENT),
    ],
)
def test_ssh_to_no_node_is_refused(tmp_path, host_port, cluster, status):
    async def scenario(home):
        target = transport_pb2.TargetHost(host_port=host_port, cluster=cluster)
        async with transport(home) as stub, refused(status):
            await stub.ProxySSH([transport_pb2.ProxySSHRequest(dial_target=target)])

    run(tmp_path, SEPARATE, scenario)


def test_ssh_needs_a_target(tmp_path):
    async def scenario(home):
        async with transport(home) as stub, refused(Status.INVALID_ARGUMENT):
            await stub.ProxySSH([transport_pb2.ProxySSHRequest(ssh=Frame(payload=b"x"))])

    run(tmp_path, SEPARATE, scenario)


# --- Faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "goes_on"), [("auth_down", False), ("leaf_offline leaf.test", True)]
)
def test_faults_end_streams_and_keep_new_ones_away(tmp_path, fault, goes_on):
    async def scenario(home):
        async with (
            transport(home) as stub,
            cluster_socket(stub, "leaf.test") as (_, leaf),
            cluster_socket(stub, "root.test") as (sock, root),
        ):
            channel = TlsChannel(sock, home.auth_context("root.test"), encoded("root.test"))
            auth = auth_grpc.AuthServiceStub(channel)
            await auth.Ping(auth_pb2.PingRequest())
            set_faults(home, fault)
            async with refused(Status.UNAVAILABLE, "leaf.test"):
                await asyncio.wait_for(leaf, 10)
            async with (
                refused(Status.UNAVAILABLE, "offline"),
                cluster_socket(stub, "leaf.test") as (_, again),
            ):
                await asyncio.wait_for(again, 10)
            # The connection to the proxy stays.
            await stub.GetClusterDetails(transport_pb2.GetClusterDetailsRequest())
            if goes_on:
                await auth.Ping(auth_pb2.PingRequest())
            else:
                async with refused(Status.UNAVAILABLE):
                    await asyncio.wait_for(root, 10)
            channel.close()
        set_faults(home, "")
        async with transport(home) as stub:

            async def back():
                return await ping_through(home, stub, "leaf.test")

            for _ in range(200):
                try:
                    assert await back() == "leaf.test"
                    break
                except (OSError, GRPCError, StreamTerminatedError):
                    await asyncio.sleep(0.02)
            assert await back() == "leaf.test"

    run(tmp_path, SEPARATE, scenario)


def test_several_roots_have_ports_of_their_own(tmp_path):
    second = SEPARATE.replace("root.test", "two.test").replace("leaf.test", "leaf2.test")
    second = second.replace("localhost", "127.0.0.1").replace("echo.apps", "echo2.apps")

    async def scenario(home):
        names = sorted(path.stem for path in home.path.glob("*.yaml"))
        assert names == ["127.0.0.1", "localhost"]
        (home.path / "current-profile").write_text("127.0.0.1\n")
        other = Home(home.path)
        assert ssh_address(other) != ssh_address(home)
        async with transport(home) as stub:
            assert await ping_through(home, stub, "root.test") == "root.test"
        context = other.auth_context("two.test")
        channel = TlsChannel(ssh_address(other), context, encoded("two.test"))
        stub = transport_grpc.TransportServiceStub(channel)
        await stub.GetClusterDetails(transport_pb2.GetClusterDetailsRequest())
        channel.close()

    run(tmp_path, SEPARATE + second, scenario)

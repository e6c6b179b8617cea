"""Databases through the embedded proxy, as a local proxy's client finds them."""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from embedded_cluster_client import (
    AppPair,
    TlsChannel,
    TlsClient,
    app_pair,
    database_pair,
    encoded,
    frame,
    unframe,
)
from proxy_bed import run, set_faults, tunnel, until

from demo.cluster import mysql

FILE = """
[[clusters]]
name = "root.test"
proxy_addr = "localhost:0"
ping_interval_seconds = {ping}
apps = [{{ name = "echo", uri = "tcp://echo.backend.internal:7", public_addr = "echo.apps.test" }}]
databases = [
  {{ name = "echo", protocol = "postgres", uri = "echo.backend.internal:1" }},
  {{ name = "roach", protocol = "cockroachdb", uri = "echo.backend.internal:1" }},
  {{ name = "documents", protocol = "mongodb", uri = "echo.backend.internal:1" }},
  {{ name = "secret", protocol = "postgres", uri = "echo.backend.internal:1", allowed_roles = ["dba"] }},
  {{ name = "mfa", protocol = "{protocol}", uri = "echo.backend.internal:1", session_mfa = true }},
  {{ name = "away", protocol = "postgres", uri = "nothing.backend.internal:1" }},
  {{ name = "own", protocol = "{protocol}", uri = "127.0.0.1:{port}" }},
]

[[clusters]]
name = "leaf.test"
leaf_of = "root.test"
databases = [{{ name = "leafdb", protocol = "postgres", uri = "echo.backend.internal:1" }}]
"""

SSL_REQUEST = bytes.fromhex("00000008 04d2162f")
GSSENC_REQUEST = bytes.fromhex("00000008 04d21630")
CANCEL_REQUEST = bytes.fromhex("00000010 04d2162e 00000001 00000002")
STARTUP = b"\0\0\0\x1e\0\3\0\0user\0me\0database\0you\0\0"


def file(*, ping=30, protocol="postgres", port=1):
    return FILE.format(ping=ping, protocol=protocol, port=port)


async def pair_for(home, name, protocol="postgres", **changes):
    return await database_pair(home, {"ServiceName": name, "Protocol": protocol}, **changes)


def exchange(home, pair, data, protocol="teleport-postgres"):
    """Sends `data`, ends the direction, and returns what came until the server's end."""
    with home.app(pair, (protocol,)) as tls:
        is_framed = protocol.endswith("-ping")
        # A server that refuses may be gone by now; what it has said is still there.
        with contextlib.suppress(ConnectionError):
            if data:
                tls.send(frame(data) if is_framed else data)
            tls.send_eof()
        received = tls.recv_all()
        return unframe(received)[0] if is_framed else received


# --- PostgreSQL -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["teleport-postgres", "teleport-postgres-ping"])
@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (STARTUP, STARTUP),
        (SSL_REQUEST + STARTUP + b"query", b"N" + STARTUP + b"query"),
        (GSSENC_REQUEST + STARTUP, b"N" + STARTUP),
        (GSSENC_REQUEST + SSL_REQUEST + STARTUP, b"NN" + STARTUP),
        (SSL_REQUEST + GSSENC_REQUEST + STARTUP, b"NN" + STARTUP),
        (CANCEL_REQUEST, CANCEL_REQUEST),
        (SSL_REQUEST + CANCEL_REQUEST, b"N" + CANCEL_REQUEST),
        (SSL_REQUEST + SSL_REQUEST + STARTUP, b"N"),
        (GSSENC_REQUEST + GSSENC_REQUEST, b"N"),
        (b"\0\0\0\x08\0\2\0\0", b""),
        (b"\0\0\xff\xff\0\3\0\0", b""),
        (b"\0\0\0\0", b""),
        (STARTUP[:11], b""),
        (b"", b""),
    ],
    ids=str,
)
def test_start_up_packets_are_taken_until_one_starts_a_session(tmp_path, protocol, sent, answered):
    async def scenario(home):
        pair = await pair_for(home, "echo")
        assert await asyncio.to_thread(exchange, home, pair, sent, protocol) == answered

    run(tmp_path, file(), scenario)


def test_encryption_is_refused_at_once_and_bytes_then_pass(tmp_path):
    async def scenario(home):
        pair = await pair_for(home, "roach", "cockroachdb")

        def talk():
            with home.app(pair, ("teleport-postgres-ping", "teleport-postgres")) as tls:
                tls.send(frame(SSL_REQUEST[:3]))
                tls.send(frame(SSL_REQUEST[3:]))
                assert tls.recv() == frame(b"N")
                data = os.urandom(1 << 20)
                tls.send(frame(STARTUP) + frame(data))
                tls.send_eof()
                assert unframe(tls.recv_all())[0] == STARTUP + data

        await asyncio.to_thread(talk)

    run(tmp_path, file(), scenario)


def test_proxy_pings_before_a_session_begins(tmp_path):
    async def scenario(home):
        pair = await pair_for(home, "echo")

        def wait_for_pings():
            with home.app(pair, ("teleport-postgres-ping",)) as tls:
                received = b""
                while len(received) < 12:
                    received += tls.recv()
                assert received[:12] == bytes(12)
                tls.send(frame(STARTUP))
                tls.send_eof()
                assert unframe(received + tls.recv_all())[0] == STARTUP

        await asyncio.to_thread(wait_for_pings)

    run(tmp_path, file(ping=0.02), scenario)


@pytest.mark.parametrize(
    ("name", "text"),
    [("secret", "denied"), ("mfa", "requires MFA"), ("away", "no built-in backend")],
)
def test_refusal_is_an_error_response_with_a_message_alone(tmp_path, name, text):
    async def scenario(home):
        pair = await pair_for(home, name)
        answer = await asyncio.to_thread(exchange, home, pair, SSL_REQUEST + STARTUP)
        assert answer[:2] == b"NE"
        assert int.from_bytes(answer[2:6], "big") == len(answer) - 2
        assert answer[6:7] == b"M"
        assert answer.endswith(b"\0\0")
        assert text in answer[7:-2].decode()

    run(tmp_path, file(), scenario)


# --- Which database -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "protocol", ["teleport-postgres", "teleport-mysql", "teleport-sqlserver-ping", "teleport-tcp"]
)
def test_certificate_decides_and_not_alpn(tmp_path, protocol):
    async def scenario(home):
        pair = await pair_for(home, "echo")
        answer = await asyncio.to_thread(exchange, home, pair, SSL_REQUEST + STARTUP, protocol)
        assert answer == b"N" + STARTUP

    run(tmp_path, file(), scenario)


def test_other_protocols_pass_as_they_are(tmp_path):
    async def scenario(home):
        pair = await pair_for(home, "documents", "mongodb")
        answer = await asyncio.to_thread(exchange, home, pair, SSL_REQUEST, "teleport-mongodb")
        assert answer == SSL_REQUEST

    run(tmp_path, file(), scenario)


def test_leaf_is_found_by_the_cluster_of_the_certificate(tmp_path):
    async def scenario(home):
        pair = await pair_for(home, "leafdb", RouteToCluster="leaf.test")
        assert await asyncio.to_thread(exchange, home, pair, STARTUP) == STARTUP
        elsewhere = await pair_for(home, "leafdb")
        assert await asyncio.to_thread(exchange, home, elsewhere, STARTUP) == b""
        set_faults(home, "leaf_offline leaf.test")
        await until(lambda: home.embedded.states["root.test"].faults.leaf_offline)
        assert await asyncio.to_thread(exchange, home, pair, STARTUP) == b""

    run(tmp_path, file(), scenario)


def test_certificate_for_no_database_leads_nowhere(tmp_path):
    async def scenario(home):
        login = AppPair()
        login.certificate = (home.keys / "alice.crt").read_bytes()
        login.key = (home.keys / "alice.key").read_bytes()
        address = {"PublicAddr": "echo.apps.test", "ClusterName": "root.test"}
        app = await app_pair(home, {"Name": "echo", **address})
        gone = await pair_for(home, "gone")
        double = await pair_for(home, "echo")
        double.certificate += (home.keys / "cas" / "root.test.pem").read_bytes()
        for pair in (login, app, gone, double):
            assert await asyncio.to_thread(exchange, home, pair, STARTUP) == b""
        context = home.context(["teleport-postgres"])
        with await asyncio.to_thread(TlsClient, home.address, context, "localhost") as tls:
            assert await asyncio.to_thread(tls.recv_all) == b""

    run(tmp_path, file(), scenario)


def test_database_is_reached_through_an_upgraded_connection(tmp_path):
    behind_balancer = file().replace("ping_int", "conn_upgrade_required = true\nping_int", 1)

    async def scenario(home):
        async with tunnel(home, "alpn-ping") as sock:
            home.auth = _auth_through(home, sock)
            pair = await pair_for(home, "echo")
        authority = home.keys / "cas" / "root.test.pem"
        context = home.pair_context(pair, ["teleport-postgres"], ca=authority)
        async with tunnel(home) as sock:

            def talk():
                with TlsClient(sock, context, "localhost") as tls:
                    tls.send(SSL_REQUEST + STARTUP)
                    tls.send_eof()
                    return tls.recv_all()

            assert await asyncio.to_thread(talk) == b"N" + STARTUP

    run(tmp_path, behind_balancer, scenario)


def _auth_through(home, sock):
    @asynccontextmanager
    async def auth():
        channel = TlsChannel(sock, home.auth_context("root.test"), encoded("root.test"))
        yield channel
        channel.close()

    return auth


@pytest.mark.parametrize("fault", ["close_apps", "proxy_down", "leaf_offline leaf.test"])
def test_faults_end_connections_to_databases(tmp_path, fault):
    async def scenario(home):
        pair = await pair_for(home, "leafdb", RouteToCluster="leaf.test")
        with await asyncio.to_thread(home.app, pair, ("teleport-postgres",)) as tls:
            tls.send(STARTUP)
            assert await asyncio.to_thread(tls.recv) == STARTUP
            set_faults(home, fault)

            def ending():
                with contextlib.suppress(ssl.SSLError, ConnectionError):
                    assert tls.recv_all() == b""

            await asyncio.to_thread(ending)
        if fault == "close_apps":
            assert await asyncio.to_thread(exchange, home, pair, STARTUP) == b""

    run(tmp_path, file(), scenario)


# --- MySQL ----------------------------------------------------------------------------------


def packet(sequence, payload):
    return len(payload).to_bytes(3, "little") + bytes([sequence]) + payload


def response(plugin=b"mysql_native_password", capabilities=0, password=b"x" * 20, database=b"shop"):
    flags = capabilities or (
        mysql.PROTOCOL_41
        | mysql.LONG_PASSWORD
        | mysql.SECURE_CONNECTION
        | mysql.PLUGIN_AUTH
        | mysql.CONNECT_WITH_DB
        | mysql.CONNECT_ATTRS
        | mysql.MULTI_STATEMENTS
        | 1 << 24  # a form of packets that was not offered
    )
    head = flags.to_bytes(4, "little") + (1 << 24).to_bytes(4, "little") + b"\x2d" + bytes(23)
    tail = bytes([len(password)]) + password + database + b"\0" + plugin + b"\0\0"
    return head + b"scott\0" + tail


class PretendMysql:
    """A database that greets, keeps the response it gets, answers, and then echoes."""

    OK = b"\0\0\0\2\0\0\0"

    def __init__(self, *answers):
        self.answers = answers or (self.OK,)
        self.responses = []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc):
        self.server.close()
        await self.server.wait_closed()

    async def _serve(self, reader, writer):
        flags = (0xFFFFFFFF).to_bytes(4, "little")
        greeting = b"\x0a11.4\0" + bytes(4) + b"saltsalt\0" + flags[:2] + b"\x2d\2\0" + flags[2:]
        writer.write(packet(0, greeting + b"\x15" + bytes(10) + b"saltsaltsalt\0plugin\0"))
        for answer in self.answers:
            head = await reader.readexactly(4)
            self.responses.append(await reader.readexactly(int.from_bytes(head[:3], "little")))
            writer.write(packet(head[3] + 1, answer))
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()


def run_mysql(tmp_path, pretend, scenario):
    async def with_database(home):
        async with pretend:
            state = home.embedded.states["root.test"]
            database = state.config.databases[-1]
            assert database.name == "own"
            changed = msgspec.structs.replace(database, uri=f"127.0.0.1:{pretend.port}")
            state.config = msgspec.structs.replace(
                state.config, databases=(*state.config.databases[:-1], changed)
            )
            await scenario(home)

    run(tmp_path, file(protocol="mysql"), with_database)


class MysqlClient:
    def __init__(self, home, pair):
        self.tls = home.app(pair, ("teleport-mysql",))
        self.received = b""

    def read(self):
        while len(self.received) < 4 or len(self.received) < 4 + self.received[0]:
            data = self.tls.recv()
            if not data:
                return None
            self.received += data
        end = 4 + int.from_bytes(self.received[:3], "little")
        whole, self.received = self.received[:end], self.received[end:]
        return whole[3], whole[4:]

    def send(self, sequence, payload):
        self.tls.send(packet(sequence, payload))


def test_mysql_is_greeted_by_the_proxy_which_logs_in_without_a_password(tmp_path):
    pretend = PretendMysql()

    async def scenario(home):
        pair = await pair_for(home, "own", "mysql")

        def talk():
            client = MysqlClient(home, pair)
            sequence, greeting = client.read()
            assert sequence == 0
            assert greeting.startswith(b"\x0a8.0.0-Teleport\0")
            assert greeting.endswith(b"mysql_native_password\0")
            low = int.from_bytes(greeting[16 + 13 : 16 + 15], "little")
            assert not low & 0x0800, "TLS is offered"
            client.send(1, response())
            assert client.read() == (2, PretendMysql.OK)
            client.send(0, b"\x03select 1")
            assert client.read() == (0, b"\x03select 1")
            client.tls.close()

        await asyncio.to_thread(talk)
        (seen,) = pretend.responses
        flags = int.from_bytes(seen[:4], "little")
        assert flags & mysql.MULTI_STATEMENTS
        assert not flags & (1 << 24)
        assert seen[32:] == b"scott\0\0shop\0mysql_native_password\0"
        assert seen[8] == 0x2D

    run_mysql(tmp_path, pretend, scenario)


def test_mysql_client_with_another_plugin_is_switched(tmp_path):
    switch = b"\xfecaching_sha2_password\0salt\0"
    pretend = PretendMysql(switch, PretendMysql.OK)

    async def scenario(home):
        pair = await pair_for(home, "own", "mysql")

        def talk():
            client = MysqlClient(home, pair)
            client.read()
            client.send(1, response(plugin=b"caching_sha2_password", password=b""))
            sequence, asked = client.read()
            assert (sequence, asked[:23]) == (2, b"\xfemysql_native_password\0")
            assert len(asked) == 23 + 21
            client.send(3, b"scramble")
            assert client.read() == (4, PretendMysql.OK)
            client.tls.close()

        await asyncio.to_thread(talk)
        assert pretend.responses[1] == b"\0"

    run_mysql(tmp_path, pretend, scenario)


@pytest.mark.parametrize(
    ("name", "answers", "sent", "text"),
    [
        ("mfa", (), response(), b"requires MFA"),
        ("own", (b"\xff\x15\x04#28000Access denied",), response(), b"Access denied"),
        ("own", (b"\xfedialog\0", b"\1more"), response(), b"password of 'scott'"),
        ("own", (), b"\0\x0a\0\0" + bytes(28), b"protocol 4.1"),
        ("own", (), response()[:40], b"password does not end"),
        ("own", (), response()[:35], b"user name does not end"),
    ],
    ids=str,
)
def test_mysql_client_is_told_why_it_is_refused(tmp_path, name, answers, sent, text):
    async def scenario(home):
        pair = await pair_for(home, name, "mysql")

        def talk():
            client = MysqlClient(home, pair)
            client.read()
            client.send(1, sent)
            sequence, answer = client.read()
            assert (sequence, answer[:1], answer[3:4]) == (2, b"\xff", b"#")
            assert text in answer
            assert client.read() is None
            client.tls.close()

        await asyncio.to_thread(talk)

    run_mysql(tmp_path, PretendMysql(*answers), scenario)


# --- SQL Server -----------------------------------------------------------------------------


def tds(kind, body, *, is_last=True):
    return bytes([kind, is_last]) + (len(body) + 8).to_bytes(2, "big") + b"\0\0\1\0" + body


NO_ENCRYPTION = bytes.fromhex(
    "00001a0006 0100200001 0200210001 0300220000 0400220001 ff 0f0007d00000 02 00 00".replace(
        " ", ""
    )
)


def test_sqlserver_prelogin_is_answered_and_login_goes_on(tmp_path):
    seen = []

    async def serve(reader, writer):
        head = await reader.readexactly(8)
        seen.append(head + await reader.readexactly(int.from_bytes(head[2:4], "big") - 8))
        writer.write(tds(4, b"\xff"))
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    async def scenario(home):
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        state = home.embedded.states["root.test"]
        port = server.sockets[0].getsockname()[1]
        own = msgspec.structs.replace(state.config.databases[-1], uri=f"127.0.0.1:{port}")
        state.config = msgspec.structs.replace(state.config, databases=(own,))
        pair = await pair_for(home, "own", "sqlserver")
        login = tds(0x10, b"login", is_last=False) + tds(0x10, b"more")

        def talk():
            with home.app(pair, ("teleport-sqlserver",)) as tls:
                tls.send(tds(0x12, b"whatever"))
                answer = tls.recv()
                tls.send(login + b"batch")
                tls.send_eof()
                return answer, tls.recv_all()

        answer, rest = await asyncio.to_thread(talk)
        assert answer == tds(4, NO_ENCRYPTION)
        assert rest == login + b"batch"
        assert seen == [tds(0x12, NO_ENCRYPTION)]
        server.close()
        await server.wait_closed()

    run(tmp_path, file(protocol="sqlserver"), scenario)


def test_sqlserver_client_is_told_why_it_is_refused(tmp_path):
    async def scenario(home):
        pair = await pair_for(home, "mfa", "sqlserver")
        sent = tds(0x12, b"") + tds(0x10, b"login")
        answer = await asyncio.to_thread(exchange, home, pair, sent, "teleport-sqlserver")
        error = answer[len(tds(4, NO_ENCRYPTION)) :]
        assert error[0] == 4
        assert int.from_bytes(error[2:4], "big") == len(error)
        assert error[8:9] == b"\xaa"
        assert int.from_bytes(error[11:15], "little") == 28353
        assert "requires MFA".encode("utf-16-le") in error
        assert await asyncio.to_thread(exchange, home, pair, STARTUP, "teleport-sqlserver") == b""

    run(tmp_path, file(protocol="sqlserver"), scenario)


# --- Real servers and clients ---------------------------------------------------------------

POSTGRES = next(Path("/usr/lib/postgresql").glob("*/bin"), Path("/usr/lib/postgresql"))


def unprivileged():
    """Database servers refuse to run as root."""
    return {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}


@contextlib.contextmanager
def server_directory():
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="vnet-db-") as name:
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(name, nobody.pw_uid, nobody.pw_gid)
        yield Path(name)


@contextlib.contextmanager
def serving(command, port):
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **unprivileged()
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
                break
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.02)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def free_port():
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return end.getsockname()[1]


@asynccontextmanager
async def local_proxy(home, pair, protocol):
    """A local port, whose connections go to the database."""
    context = home.pair_context(pair, [protocol])

    async def copy(source, target):
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
        target.close()

    async def serve(reader, writer):
        remote = await asyncio.open_connection(
            *home.address, ssl=context, server_hostname=home.proxy_host
        )
        with contextlib.suppress(OSError):
            await asyncio.gather(copy(reader, remote[1]), copy(remote[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


async def output_of(*command, stdin=b"", **environment):
    process = await asyncio.create_subprocess_exec(
        *command, stdin=-1, stdout=-1, stderr=-1, env=os.environ | environment
    )
    out, err = await asyncio.wait_for(process.communicate(stdin), 60)
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.skipif(not (POSTGRES / "postgres").exists(), reason="no PostgreSQL server")
def test_psql_works_against_a_real_server(tmp_path):
    port = free_port()

    async def scenario(home):
        pair = await pair_for(home, "own")
        async with local_proxy(home, pair, "teleport-postgres") as local:
            for mode in ("disable", "prefer"):
                options = (
                    f"host=127.0.0.1 port={local} user=postgres dbname=postgres sslmode={mode}"
                )
                query = "select 6 * 7, length(repeat('x', 3000000))"
                found = await output_of("psql", "-XAt", options, "-c", query)
                assert found.strip() == "42|3000000"
            with pytest.raises(AssertionError, match="server does not support SSL"):
                await output_of("psql", "-XAt", options.replace("prefer", "require"), "-c", query)
        secret = await pair_for(home, "secret")
        async with local_proxy(home, secret, "teleport-postgres") as local:
            options = f"host=127.0.0.1 port={local} user=postgres dbname=postgres"
            with pytest.raises(AssertionError, match="access to database secret is denied"):
                await output_of("psql", "-XAt", options, "-c", "select 1")

    with server_directory() as directory:
        initdb = [POSTGRES / "initdb", "-A", "trust", "-U", "postgres", "--no-sync", "-D"]
        data = directory / "data"
        subprocess.run([*initdb, data], check=True, capture_output=True, **unprivileged())
        options = ["-k", "", "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with serving([POSTGRES / "postgres", "-D", data, "-p", str(port), *options], port):
            run(tmp_path, file(port=port), scenario)


@pytest.mark.skipif(
    not shutil.which("mariadb-install-db") or not shutil.which("mariadb"),
    reason="no MariaDB server",
)
def test_mariadb_client_works_against_a_real_server(tmp_path):
    port = free_port()

    async def scenario(home):
        pair = await pair_for(home, "own", "mysql")
        async with local_proxy(home, pair, "teleport-mysql") as local:
            options = ("--no-defaults", "-h127.0.0.1", f"-P{local}", "-uroot", "-BN")
            query = (
                "select 6 * 7, length(repeat('x', 3000000)); select database(); select version()"
            )
            # Any password will do, for nobody looks at it.
            found = await output_of("mariadb", *options, "-pwrong", "mysql", "-e", query)
            numbers, database, version = found.splitlines()
            assert numbers == "42\t3000000"
            assert database == "mysql"
            assert "MariaDB" in version
            assert (
                len(await output_of("mariadb", *options, "-e", f"select '{'y' * 70000}'")) > 70000
            )
            with pytest.raises(AssertionError, match="Unknown database 'none'"):
                await output_of("mariadb", *options, "none", "-e", "select 1")

    with server_directory() as directory:
        data = f"--datadir={directory / 'data'}"
        quick = ["--no-defaults", data, "--innodb-flush-log-at-trx-commit=0"]
        install = ["mariadb-install-db", *quick, "--auth-root-authentication-method=normal"]
        subprocess.run(
            [*install, "--skip-test-db", "--force"],
            check=True,
            capture_output=True,
            **unprivileged(),
        )
        places = [f"--socket={directory / 's'}", f"--pid-file={directory / 'pid'}"]
        listen = ["--bind-address=127.0.0.1", f"--port={port}", "--skip-name-resolve"]
        with serving(["/usr/sbin/mariadbd", *quick, *places, *listen], port):
            run(tmp_path, file(protocol="mysql", port=port), scenario)

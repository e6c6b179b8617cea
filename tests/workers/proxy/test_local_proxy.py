"""`vnet proxy` in this process, against the embedded cluster on loopback."""

import asyncio
import contextlib
import errno
import os
import re
import socket
import struct

import pytest
import uvloop
from teleport_fakes import until

from demo.cluster.config import App, Cluster, ClusterFile, Database, PortRange, check_clusters
from demo.cluster.server import EmbeddedCluster
from demo.cluster.totp import totp_code
from ipc.prompts import Answer, Decline
from ipc.socket_owner import UNKNOWN, Owner
from workers.proxy import local_proxy
from workers.proxy.dial_errors import ProxyUntrustedError
from workers.proxy.find_by_name import NotFoundByNameError
from workers.proxy.local_peers import LocalPeers, make_local_peers
from workers.proxy.local_proxy import LocalProxy, PortError, choose_port
from workers.proxy.local_session import Wish, serve_by_name
from workers.proxy.teleport.apps import App as TeleportApp
from workers.proxy.teleport.apps import PortRange as Ports
from workers.proxy.teleport.client import default_settings
from workers.proxy.teleport.databases import Database as TeleportDatabase
from workers.proxy.teleport.errors import LoginExpiredError, MfaRequiredError, UnreachableError
from workers.proxy.teleport.targets import AppTarget, DatabaseTarget
from workers.proxy.terminal_prompter import TerminalPrompter

LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
PLACE = {"profile": "p", "root_cluster": "r", "leaf": "", "ipv4_range": None}


def app_target(*ports):
    listed = tuple(Ports(first, last) for first, last in ports) if ports else None
    return AppTarget(app=TeleportApp("pg", "pg.test", "tcp://pg", listed), **PLACE)


DATABASE = DatabaseTarget(database=TeleportDatabase("orders", "postgres"), **PLACE)
MANY = app_target((8000, 8010), (9000, 9000))


@pytest.mark.parametrize(
    ("target", "wanted", "local", "port"),
    [
        (app_target(), None, 5432, 1),
        (DATABASE, None, None, 1),
        (MANY, 8003, 9000, 8003),
        (MANY, None, 9000, 9000),
        (app_target((5432, 5432)), None, 15432, 5432),
    ],
)
def test_the_port_of_the_target(target, wanted, local, port):
    assert choose_port(target, wanted, local) == (port, "")


@pytest.mark.parametrize("local", [None, 80])
def test_a_guessed_port_is_told(local):
    port, note = choose_port(MANY, None, local)
    assert port == 8000
    assert note == "port 8000 of 8000-8010, 9000: choose another with --port"


@pytest.mark.parametrize(
    ("target", "text"),
    [(MANY, "8000-8010, 9000"), (app_target(), "leave --port out"), (DATABASE, "database")],
)
def test_a_port_that_the_target_has_not(target, text):
    with pytest.raises(PortError, match=text):
        choose_port(target, 7, None)


def cluster_file(backend_port=1):
    root = Cluster(
        name="root.test",
        proxy_addr="localhost:0",
        apps=(
            App(name="echo", uri="tcp://echo.backend.internal:7"),
            App(name="dead", uri="tcp://127.0.0.1:1"),
            App(
                name="ports",
                uri="tcp://ports.backend.internal",
                tcp_ports=(PortRange(port=8000, end_port=8010),),
            ),
            App(name="guarded", uri="tcp://echo.backend.internal:7", session_mfa=True),
        ),
        databases=(Database(name="orders", protocol="postgres", uri=f"127.0.0.1:{backend_port}"),),
    )
    far = App(name="far", uri="tcp://echo.backend.internal:7", public_addr="far.nowhere.test")
    leaf = Cluster(name="leaf.test", leaf_of="root.test", apps=(far,))
    return check_clusters(ClusterFile(clusters=(root, leaf)))


class Served:
    """A running `serve_by_name`."""

    def __init__(self, task, port, address, told):
        self.task = task
        self.port = port
        self.address = address
        self.told = told
        self._writers = []

    async def connect(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._writers.append(writer)
        return reader, writer

    async def close(self):
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def served(cluster, home, name, *, ask=None, ca_file=None, **wish):
    told, ready = [], asyncio.get_running_loop().create_future()
    listener = local_proxy.listen(wish.get("local_port") or 0)
    port = listener.getsockname()[1]
    settings = default_settings(
        ca_file=str(cluster.web_ca_file) if ca_file is None else ca_file,
        prompter=TerminalPrompter(ask) if ask else None,
    )
    work = serve_by_name(
        home, settings, Wish(name=name, **wish), listener, ready=ready.set_result, tell=told.append
    )
    task = asyncio.create_task(work)
    try:
        async with asyncio.timeout(20):
            await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            proxy = Served(task, port, ready.result(), told)
            try:
                yield proxy
            finally:
                await proxy.close()
    finally:
        ready.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert listener.fileno() == -1


async def exchange(connection, data, size=None):
    reader, writer = connection
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(size or len(data)), 5)


def run_with_cluster(tmp_path, scenario, run=asyncio.run, **file):
    async def main():
        async with EmbeddedCluster(cluster_file(**file), tmp_path) as cluster:
            await scenario(cluster)

    run(main())


@LOOPS
@pytest.mark.parametrize(
    ("name", "address"), [("echo", "echo.localhost"), ("far", "far.nowhere.test")]
)
def test_bytes_go_both_ways_and_each_end_by_itself(tmp_path, run, name, address):
    async def scenario(cluster):
        async with served(cluster, tmp_path, name) as proxy:
            assert proxy.address == address
            first, second = await proxy.connect(), await proxy.connect()
            assert await exchange(first, b"hello") == b"hello"
            assert await exchange(second, b"x" * 100_000) == b"x" * 100_000
            reader, writer = first
            writer.write(b"last")
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 5) == b"last"
            assert await exchange(second, b"still") == b"still"
            assert proxy.told == []

    run_with_cluster(tmp_path, scenario, run)


@pytest.mark.parametrize(
    ("wish", "answer", "note"),
    [({"target_port": 8003}, b"8003", False), ({}, b"8000", True)],
)
def test_the_target_port_reaches_the_app(tmp_path, wish, answer, note):
    async def scenario(cluster):
        async with served(cluster, tmp_path, "ports", **wish) as proxy:
            reader, _ = await proxy.connect()
            assert await asyncio.wait_for(reader.readexactly(4), 5) == answer
            assert bool(proxy.told) is note

    run_with_cluster(tmp_path, scenario)


def test_a_database_speaks_its_protocol(tmp_path):
    """PostgreSQL: an SSLRequest gets an N, the start-up packet reaches the database."""
    startup = struct.pack("!ii", 8 + 12, 196608) + b"user\0alice\0\0"

    async def scenario():
        async def serve(reader, writer):
            size = struct.unpack("!i", await reader.readexactly(4))[0]
            packet = await reader.readexactly(size - 4)
            writer.write(b"R" + packet)
            await writer.drain()
            writer.close()

        backend = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = backend.sockets[0].getsockname()[1]
        async with (
            EmbeddedCluster(cluster_file(backend_port=port), tmp_path) as cluster,
            served(cluster, tmp_path, "orders.db.localhost") as proxy,
        ):
            connection = await proxy.connect()
            assert await exchange(connection, struct.pack("!ii", 8, 80877103), 1) == b"N"
            answer = await exchange(connection, startup, len(startup) - 3)
            assert answer == b"R" + startup[4:]
        backend.close()

    asyncio.run(scenario())


def test_an_app_that_does_not_run_is_told(tmp_path):
    async def scenario(cluster):
        async with served(cluster, tmp_path, "dead") as proxy:
            reader, writer = await proxy.connect()
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            await until(lambda: proxy.told)
            assert "sent nothing" in proxy.told[0]

    run_with_cluster(tmp_path, scenario)


def test_a_connection_that_cannot_be_dialled_is_reset_and_the_reason_told_once(tmp_path):
    async def scenario(cluster):
        async with served(cluster, tmp_path, "echo") as proxy:
            (tmp_path / "faults").write_text("expire_login")
            await until(lambda: cluster.states["root.test"].faults.expire_login)

            async def attempt():
                # Until the client has seen the expiry it still dials, and the cluster refuses.
                reader, _ = await proxy.connect()
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.wait_for(reader.read(1), 5) == b""
                return [line for line in proxy.told if "was refused" in line]

            while not (refusals := await attempt()):
                pass
            assert "tsh login" in refusals[0]
            assert await attempt() == refusals

    run_with_cluster(tmp_path, scenario)


def test_a_logout_resets_connections(tmp_path):
    async def scenario(cluster):
        async with served(cluster, tmp_path, "echo") as proxy:
            connection = await proxy.connect()
            assert await exchange(connection, b"hello") == b"hello"
            (tmp_path / "faults").write_text("logout")
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(connection[0].read(), 10)
            assert "login of alice at localhost is gone" in proxy.told[0]

    run_with_cluster(tmp_path, scenario)


@pytest.mark.parametrize("codes", [[True], [False, True]], ids=["right", "wrong, then right"])
def test_a_second_factor_is_asked_for_at_the_start(tmp_path, codes):
    prompts = []

    async def scenario(cluster):
        secret = (tmp_path / "totp-secret").read_text().strip()

        async def ask(prompt, _renewed):
            prompts.append(prompt)
            is_right = codes[len(prompts) - 1]
            now = cluster.states["root.test"].now().timestamp()
            return Answer(id=prompt.id, code=totp_code(secret, now) if is_right else "1")

        async with served(cluster, tmp_path, "guarded", ask=ask) as proxy:
            assert await exchange(await proxy.connect(), b"hello") == b"hello"
            assert await exchange(await proxy.connect(), b"again") == b"again"
        assert [(p.target, p.cluster, p.user) for p in prompts] == [
            ("app guarded", "root.test", "alice")
        ] * len(codes)
        assert [bool(p.problem) for p in prompts] == [False, True][: len(codes)]

    run_with_cluster(tmp_path, scenario)


@pytest.mark.parametrize("has_prompter", [False, True])
def test_without_a_second_factor_it_does_not_start(tmp_path, has_prompter):
    async def ask(prompt, _renewed):
        return Decline(id=prompt.id)

    async def scenario(cluster):
        with pytest.raises(MfaRequiredError, match="second factor"):
            async with served(cluster, tmp_path, "guarded", ask=ask if has_prompter else None):
                pass

    run_with_cluster(tmp_path, scenario)


def test_what_is_wrong_is_found_at_the_start(tmp_path):
    async def scenario(cluster):
        with pytest.raises(NotFoundByNameError):
            async with served(cluster, tmp_path, "none"):
                pass
        with pytest.raises(PortError):
            async with served(cluster, tmp_path, "ports", target_port=7):
                pass
        with pytest.raises(ProxyUntrustedError):
            async with served(cluster, tmp_path, "echo", ca_file=""):
                pass

    run_with_cluster(tmp_path, scenario)


@contextlib.asynccontextmanager
async def plain_proxy(plan, **changes):
    told = []
    changes.setdefault("peers", make_local_peers())
    proxy = LocalProxy(listener := local_proxy.listen(0), plan, told.append, **changes)
    serving = asyncio.create_task(proxy.serve())
    try:
        yield proxy, listener.getsockname()[1], told
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await proxy.close()


# -- who may connect, and what HTTP requests pass --

OTHER_USER = 64999
TALK = (
    'exec 3<>"/dev/tcp/127.0.0.1/$1" && echo hello >&3 && read -r -t 5 line <&3; echo "got $line"'
)


@pytest.mark.root
def test_only_the_user_and_root_may_connect(tmp_path):
    async def talk(port, *before):
        talking = await asyncio.create_subprocess_exec(
            *before, "bash", "-c", TALK, "bash", str(port), stdout=asyncio.subprocess.PIPE
        )
        return (await asyncio.wait_for(talking.communicate(), 20))[0].strip()

    async def scenario(cluster):
        async with served(cluster, tmp_path, "echo") as proxy:
            assert await talk(proxy.port) == b"got hello"
            other = f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups"
            assert await talk(proxy.port, "setpriv", *other) == b"got"
            assert f"uid {OTHER_USER}, and only you and root may connect" in proxy.told[0]

    run_with_cluster(tmp_path, scenario)


class Kernel:
    """Says the same of every socket."""

    interface = 0

    def __init__(self, answer):
        self.answer = answer

    def tcp_owner(self, *_ends):
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer

    def close(self):
        pass


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Owner(os.getuid(), 7, 1), ""),
        (Owner(0, 7, 1), ""),
        (Owner(4711, 7, 1), "uid 4711"),
        (Owner(UNKNOWN, 0, 1), "gone"),
        (None, "gone"),
        (OSError(errno.ENOENT, "no such module"), "does not say .*no such module"),
    ],
)
def test_what_is_not_known_to_be_the_users_is_refused(answer, problem):
    peers = LocalPeers(Kernel(answer))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            found = peers.problem(accepted)
    assert re.search(problem, found) if problem else not found


REQUEST = "GET / HTTP/1.1\r\nHost: {}\r\n{}\r\n"


@pytest.mark.parametrize(
    ("host", "more", "wish", "passes"),
    [
        ("localhost:{port}", "", {}, True),
        ("127.0.0.1:{port}", "", {}, True),
        ("echo.localhost", "", {}, True),
        ("localhost", "Origin: http://localhost:3000\r\n", {}, True),
        ("evil.test", "", {}, False),
        ("localhost", "Origin: http://evil.test\r\n", {}, False),
        ("evil.test", "", {"any_host": True}, True),
    ],
)
def test_pages_of_other_sites_do_not_reach_the_app(tmp_path, host, more, wish, passes):
    async def scenario(cluster):
        async with served(cluster, tmp_path, "echo", **wish) as proxy:
            request = REQUEST.format(host.format(port=proxy.port), more).encode()
            answer = await exchange(await proxy.connect(), request, size=12)
            assert (
                answer == request[:12] if passes else answer in (b"HTTP/1.1 421", b"HTTP/1.1 403")
            )
            if not passes:
                await until(lambda: proxy.told)
                assert "--any-host lets all requests pass" in proxy.told[0]

    run_with_cluster(tmp_path, scenario)


def test_more_connections_than_the_limit_are_reset():
    async def never():
        await asyncio.Event().wait()

    async def main():
        async with plain_proxy(never, max_connections=3) as (proxy, port, told):
            kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            await until(lambda: len(proxy) == 3)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 5)
            writer.close()
            assert told == ["a connection was refused: 3 connections are open already"]
            for _, one in kept:
                one.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LoginExpiredError("run tsh login"), "refused: run tsh login"),
        (UnreachableError("no answer"), "refused: no answer"),
        (ValueError("oops"), "internal error: ValueError: oops"),
    ],
)
def test_every_failure_ends_in_a_reset_and_a_line(error, text):
    async def fail():
        raise error

    async def main():
        async with plain_proxy(fail) as (_, port, told):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 5)
            writer.close()
            assert text in told[0]

    asyncio.run(main())


def test_only_this_machine_is_listened_to():
    listener = local_proxy.listen(0)
    try:
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(OSError) as caught:
            local_proxy.listen(port)
        assert caught.value.errno == errno.EADDRINUSE
    finally:
        listener.close()


def test_a_program_that_leaves_while_it_is_dialled_for_leaves_nothing():
    gate = asyncio.Event()

    async def plan():
        await gate.wait()
        raise UnreachableError("too late")

    async def main():
        async with plain_proxy(plan) as (proxy, port, told):
            client = socket.create_connection(("127.0.0.1", port))
            await until(lambda: len(proxy) == 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            gate.set()
            await until(lambda: len(proxy) == 0)
            assert told

    asyncio.run(main())

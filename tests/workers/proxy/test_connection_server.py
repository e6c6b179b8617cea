"""The socket at which `vnet connections` asks a proxy, and what it does with those who misbehave."""

import asyncio
import contextlib
import os
import socket
import stat
import subprocess
import sys

import pytest
import uvloop
from teleport_fakes import until

from ipc import connection_list as c
from ipc.messages import DialRequest, Refusal
from workers.proxy.connection_server import MAX_WATCHERS, ConnectionServer
from workers.proxy.connections import Ledger

# Nothing is said of how long it takes; what has to come at once does so within this.
PATIENCE_SECONDS = 30


class Watcher:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, path):
        return cls(*await asyncio.open_unix_connection(path, limit=c.MAX_LINE_BYTES))

    async def look(self, known=None):
        """All messages of the answer."""
        self.writer.write(c.encode(c.Look(known=known)))
        heard = []
        while not heard or not isinstance(heard[-1], c.Complete | c.Unchanged):
            heard.append(c.decode_from_proxy(await self.reader.readuntil(b"\n")))
        return heard

    async def is_sent_away(self):
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        return True


class Bed:
    def __init__(self, directory):
        self.directory = directory
        self.ledger = Ledger()
        self.servers = []
        self.watchers = []

    async def serve(self, **options):
        server = ConnectionServer(self.directory, "proxy-0", self.ledger, **options)
        await server.start()
        self.servers.append(server)
        return server

    @property
    def sockets(self):
        return sorted(self.directory.glob(f"*{c.SOCKET_ENDING}"))

    async def watch(self):
        self.watchers.append(await Watcher.connect(self.sockets[0]))
        return self.watchers[-1]

    def refuse(self, number=1):
        for flow in range(number):
            request = DialRequest(
                flow_id=flow,
                source=bytes(4),
                source_port=1,
                destination=bytes(4),
                destination_port=2,
            )
            self.ledger.refused(self.ledger.begins(request), Refusal.TIMED_OUT, "too slow")

    async def close(self):
        for server in self.servers:
            await server.close()
        for watcher in self.watchers:
            watcher.writer.close()
            with contextlib.suppress(OSError):
                await watcher.writer.wait_closed()


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request, tmp_path):
    """Runs a scene, under each event loop: workers use uvloop."""

    def run(scene):
        async def main():
            bed = Bed(tmp_path)
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await scene(bed)
            finally:
                await bed.close()
            assert bed.sockets == []

        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())

    return run


def test_everything_is_told_and_then_only_what_is_new(play):
    async def scene(bed):
        await bed.serve()
        bed.refuse()
        watcher = await bed.watch()
        target, connection, done = await watcher.look()
        assert (target.failed, connection.refusal) == (1, Refusal.TIMED_OUT)
        assert done.slot == "proxy-0"
        assert await watcher.look(done.revision) == [c.Unchanged()]
        bed.refuse()
        assert len(await watcher.look(done.revision)) == 4
        other = await bed.watch()
        assert len(await other.look()) == 4

    play(scene)


def test_a_thousand_are_told_completely(play):
    async def scene(bed):
        bed.ledger = Ledger(of_target=10_000)
        await bed.serve()
        bed.refuse(1500)
        watcher = await bed.watch()
        assert len(await watcher.look()) == 1002

    play(scene)


def test_the_socket_is_for_the_vnet_user_alone(play):
    async def scene(bed):
        await bed.serve()
        assert stat.S_IMODE(bed.sockets[0].stat().st_mode) == 0o600

    play(scene)


def test_two_processes_of_one_worker_have_each_their_own(play):
    async def scene(bed):
        old = await bed.serve()
        await bed.serve()
        assert len(bed.sockets) == 2
        await old.close()
        assert len(bed.sockets) == 1
        assert await (await bed.watch()).look()

    play(scene)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_user_is_sent_away(play):
    async def scene(bed):
        await bed.serve()
        bed.directory.chmod(0o755)
        path = bed.sockets[0]
        path.chmod(0o666)
        program = (
            "import os, socket, sys; end = socket.socket(socket.AF_UNIX); os.chdir(sys.argv[1]);"
            "os.setuid(65534); end.connect(sys.argv[2]); print(end.recv(99))"
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, str(path.parent), path.name), stdout=subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert output == b"b''\n"

    play(scene)


@pytest.mark.parametrize(
    "line",
    [b"x\n", b'{"t":"Look","known":-1}\n', b'{"t":"Complete"}\n', b"\xff\n", b"x" * 5000],
)
def test_who_talks_nonsense_is_sent_away_and_the_others_stay(play, line):
    async def scene(bed):
        await bed.serve()
        rude, good = await bed.watch(), await bed.watch()
        rude.writer.write(line)
        assert await rude.is_sent_away()
        assert await good.look()

    play(scene)


def test_so_many_and_no_more(play):
    async def scene(bed):
        await bed.serve()
        watchers = [await bed.watch() for _ in range(MAX_WATCHERS)]
        for watcher in watchers:
            await watcher.look()
        late = await bed.watch()
        assert await late.is_sent_away()
        watchers[0].writer.close()
        await until(lambda: len(bed.servers[0]._watchers) < MAX_WATCHERS)
        assert await (await bed.watch()).look()

    play(scene)


def test_who_asks_nothing_for_a_while_makes_room(play):
    async def scene(bed):
        await bed.serve(patience_seconds=0.1)
        assert await (await bed.watch()).is_sent_away()

    play(scene)


def test_who_does_not_read_is_sent_away(play):
    async def scene(bed):
        bed.ledger = Ledger(of_target=10_000, in_all=10_000)
        await bed.serve(patience_seconds=0.2)
        bed.refuse(10_000)
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(str(bed.sockets[0]))
            end.sendall(c.encode(c.Look()))
            await until(lambda: bed.servers[0]._watchers)
            await until(lambda: not bed.servers[0]._watchers)

    play(scene)


def test_sockets_of_the_dead_are_removed_and_no_others(play):
    async def scene(bed):
        await bed.serve()
        with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as young:
            dead.bind(str(bed.directory / "dead.list"))
            young.bind(str(bed.directory / "young.list"))
        past = 1_000_000_000
        os.utime(bed.directory / "dead.list", (past, past))
        os.utime(bed.sockets[0], (past, past))
        (bed.directory / "proxy-0.sock").touch()
        before = len(bed.sockets)
        await bed.serve()
        assert len(bed.sockets) == before
        assert not (bed.directory / "dead.list").exists()
        (bed.directory / "young.list").unlink()
        (bed.directory / "proxy-0.sock").unlink()

    play(scene)


def test_without_a_directory_the_log_says_so(play, caplog):
    async def scene(bed):
        bed.directory /= "missing"
        server = await bed.serve()
        await server.close()
        assert "vnet connections cannot reach this proxy" in caplog.text

    play(scene)


def test_its_path_is_no_longer_than_that_of_other_sockets():
    # `supervisor.places` leaves room for this one.
    assert len(f"{'0' * 8}{c.SOCKET_ENDING}") <= len("proxy-63.sock")

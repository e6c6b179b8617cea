"""`vnet connections` against the sockets of real proxies' servers, whose connections a test makes up."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import msgspec
import pytest
from control_bed import answering
from run_fakes import FakeRun, settings
from terminal import terminal

from ipc import connection_list as c
from ipc.connection_id import connection_id
from ipc.messages import DialRequest, Refusal
from ipc.prompts import PROMPTS_DIRECTORY
from supervisor.cli import connection_sources
from supervisor.cli import connections as cli
from supervisor.cli.connection_report import ConnectionList
from supervisor.cli.connection_sources import Sources
from supervisor.cli.control_client import AskError
from supervisor.commands import Commands
from supervisor.exits import ExitStatus
from workers.proxy.connection_server import ConnectionServer
from workers.proxy.connections import Ledger, Target

VNET = str(Path(sys.executable).with_name("vnet"))
SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "connections.json"
DEADLINE_SECONDS = 30.0
PG = Target(c.TargetKind.APP, "teleport.test", "", "pg.test")


class Link:
    bytes_up = 1000
    bytes_down = 2_000_000


class Vnet:
    """A control socket and proxies of a running VNet, served by a thread."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.directory = run_dir / PROMPTS_DIRECTORY
        self.directory.mkdir()
        self.loop = asyncio.new_event_loop()
        self._flows = iter(range(1000))
        self._servers: list[ConnectionServer] = []
        self._closing = contextlib.ExitStack()
        thread = threading.Thread(target=self.loop.run_forever)
        thread.start()
        self._closing.callback(self.loop.close)
        self._closing.callback(thread.join)
        self._closing.callback(self.loop.call_soon_threadsafe, self.loop.stop)

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_SECONDS)

    def start(self) -> None:
        """The supervisor."""
        commands = Commands(FakeRun(settings=settings()))
        self._closing.enter_context(
            answering(self.run_dir, lambda _, line: commands.answer(0, line))
        )

    def proxy(self, slot: str = "proxy-0") -> Ledger:
        ledger = Ledger()
        server = ConnectionServer(self.directory, slot, ledger)
        self.run(server.start())
        self._servers.append(server)
        return ledger

    def stop_proxies(self) -> None:
        for server in self._servers:
            self.run(server.close())
        self._servers.clear()

    def begin(self, ledger: Ledger, target: Target | None = PG, program=None):
        """A connection, that of the socket `program` if there is one."""
        source, destination = ("100.64.0.1", 40_000), ("100.64.0.9", 5432)
        if program is not None:
            source, destination = program.getsockname(), program.getpeername()
        request = DialRequest(
            flow_id=next(self._flows),
            source=socket.inet_aton(source[0]),
            source_port=source[1],
            destination=socket.inet_aton(destination[0]),
            destination_port=destination[1],
        )

        async def begin():
            record = ledger.begins(request)
            if target is not None:
                ledger.leads_to(record, target)
            return record

        return self.run(begin())

    def open(self, ledger: Ledger, target: Target = PG, program=None):
        record = self.begin(ledger, target, program)
        self.call(ledger.accepted, record, Link())
        return record

    def refuse(self, ledger: Ledger, why: str = "ports 1-2 alone", target: Target | None = PG):
        record = self.begin(ledger, target)
        self.call(ledger.refused, record, Refusal.PORT_NOT_ALLOWED, why)
        return record

    def call(self, function, *arguments):
        async def work():
            return function(*arguments)

        return self.run(work())

    def close(self) -> None:
        self.stop_proxies()
        self._closing.close()


@pytest.fixture
def vnet(tmp_path):
    made = Vnet(tmp_path)
    yield made
    made.close()


@pytest.fixture
def program():
    """A connected socket of this process."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as end,
    ):
        yield end


def shown(vnet, capsys, *, as_json=True, status=ExitStatus.OK):
    assert cli.run(vnet.run_dir, watch=False, as_json=as_json) is status
    output = capsys.readouterr()
    return (json.loads(output.out) if as_json else output.out), output.err


def test_for_machines(vnet, capsys, program):
    first, second = vnet.proxy("proxy-0"), vnet.proxy("ssh")
    active = vnet.open(first, program=program)
    vnet.refuse(second, target=Target(c.TargetKind.SSH, "teleport.test", "leaf", "node.test"))
    found, _ = shown(vnet, capsys)
    assert found["schema"] == 1
    assert found["problems"] == []
    pg = next(target for target in found["targets"] if target["name"] == "pg.test")
    assert (pg["active"], pg["ok"], pg["failed"]) == (1, 1, 0)
    assert (pg["bytes_sent"], pg["bytes_received"]) == (1000, 2_000_000)
    # There were two looks.
    assert pg["received_per_second"] == 0.0
    one, other = found["connections"]
    assert one["id"] == connection_id(active.request.flow_id)
    assert (one["worker"], one["state"], one["kind"]) == ("proxy-0", "active", "app")
    assert (one["client_port"], one["port"]) == (
        program.getsockname()[1],
        program.getpeername()[1],
    )
    assert (one["uid"], one["pid"]) == (os.getuid(), os.getpid())
    assert one["program"] == str(Path("/proc/self/exe").readlink())
    assert (other["worker"], other["state"], other["leaf"]) == ("ssh", "failed", "leaf")
    assert (other["refusal"], other["error"]) == ("port_not_allowed", "ports 1-2 alone")
    assert other["pid"] is None
    decoded = msgspec.json.decode(json.dumps(found).encode(), type=ConnectionList)
    assert len(decoded.connections) == 2
    described = json.loads(SCHEMA.read_text())["$defs"]
    assert set(found) == set(described["ConnectionList"]["properties"])
    assert set(pg) == set(described["TargetRow"]["properties"])
    assert set(one) == set(described["ConnectionRow"]["properties"])


def test_schema_is_that_of_the_output():
    raw = msgspec.json.encode(msgspec.json.schema(ConnectionList))
    assert SCHEMA.read_text() == msgspec.json.format(raw, indent=2).decode() + "\n"


def test_for_people(vnet, capsys, program):
    ledger = vnet.proxy()
    vnet.open(ledger, program=program)
    failed = vnet.refuse(ledger)
    text, _ = shown(vnet, capsys, as_json=False)
    assert re.search(r"^pg\.test +app +1 +1 +1 +1\.0k +2\.0M +0 +0$", text, re.MULTILINE)
    name = re.escape(Path("/proc/self/exe").readlink().name)
    assert re.search(rf"^active +pg\.test:\d+ +{name} {os.getpid()} ", text, re.MULTILINE)
    assert connection_id(failed.request.flow_id) in text
    assert "  port_not_allowed: ports 1-2 alone\n" in text


def test_one_that_is_younger_than_the_last_look_gets_a_rate(vnet, capsys):
    ledger = vnet.proxy()
    vnet.call(ledger.sample)
    vnet.open(ledger)
    found, _ = shown(vnet, capsys)
    assert found["connections"][0]["received_per_second"] > 0


def test_a_proxy_that_is_slow_the_second_time_is_waited_for(vnet, capsys, monkeypatch):
    """Otherwise a busy machine would hide what the first look has found."""
    at_once, looks = connection_sources._Source.look, []

    async def late(source):
        looks.append(source)
        await asyncio.sleep(0.8 if len(looks) > 1 else 0)
        return await at_once(source)

    vnet.open(vnet.proxy())
    monkeypatch.setattr(connection_sources._Source, "look", late)
    found, _ = shown(vnet, capsys)
    assert found["connections"][0]["received_per_second"] == 0.0
    assert len(looks) == 2


def test_a_proxy_that_is_lost_the_second_time_is_missed_besides_one_that_was_before(
    vnet, capsys, monkeypatch
):
    at_once, looks = connection_sources._Source.look, []

    async def silent(source):
        is_second = source in looks
        looks.append(source)
        found = await at_once(source)
        if is_second or source.told.worker == "proxy-1":
            raise TimeoutError
        return found

    vnet.open(vnet.proxy("proxy-0"))
    vnet.proxy("proxy-1")
    monkeypatch.setattr(connection_sources._Source, "look", silent)
    found, _ = shown(vnet, capsys, status=ExitStatus.DEGRADED)
    assert found["problems"] == [
        "a proxy does not answer: vnet status may say why",
        "proxy-0 does not answer: vnet status may say why",
    ]


def test_what_has_ended_is_told_at_once(vnet, capsys, monkeypatch):
    vnet.refuse(vnet.proxy())
    monkeypatch.setattr(cli, "WATCH_SECONDS", 10_000)
    text, _ = shown(vnet, capsys, as_json=False)
    assert "port_not_allowed" in text


def test_nothing_yet(vnet, capsys):
    vnet.proxy()
    text, _ = shown(vnet, capsys, as_json=False)
    assert text == "no connections yet\n"


def asked(run_dir, **options):
    with pytest.raises(AskError) as raised:
        cli.run(run_dir, **{"watch": False, "as_json": False} | options)
    return raised.value


@pytest.mark.parametrize("watch", [False, True])
def test_vnet_that_does_not_run_is_an_error_at_once(tmp_path, watch):
    error = asked(tmp_path, watch=watch)
    assert error.status is ExitStatus.NOT_RUNNING
    assert "sudo vnet-supervisor" in str(error)


def test_sockets_that_a_killed_vnet_has_left_are_no_vnet(vnet):
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(vnet.directory / "00000000.list"))
        end.listen()
    assert asked(vnet.run_dir).status is ExitStatus.NOT_RUNNING


def test_vnet_without_a_proxy_says_so(vnet, monkeypatch):
    monkeypatch.setattr(cli, "START_SECONDS", 0.1)
    vnet.start()
    error = asked(vnet.run_dir)
    assert error.status is ExitStatus.DEGRADED
    assert "vnet status" in str(error)


def test_a_proxy_that_starts_just_now_is_waited_for(vnet, capsys, monkeypatch):
    monkeypatch.setattr(cli, "START_SECONDS", DEADLINE_SECONDS)
    vnet.start()
    late = threading.Timer(0.2, lambda: vnet.refuse(vnet.proxy()))
    late.start()
    try:
        found, _ = shown(vnet, capsys)
    finally:
        late.join()
    assert found["problems"] == []


@contextlib.contextmanager
def silent_proxy(vnet):
    """One that is stopped: its socket is there and nobody reads."""
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(vnet.directory / "ffffffff.list"))
        end.listen()
        yield


def test_a_proxy_that_is_silent_hides_no_other(vnet, capsys):
    ledger = vnet.proxy()
    vnet.open(ledger)
    vnet.refuse(ledger)
    with silent_proxy(vnet):
        began = time.monotonic()
        found, errors = shown(vnet, capsys, status=ExitStatus.DEGRADED)
        assert time.monotonic() - began < 10
    assert sorted(row["state"] for row in found["connections"]) == ["active", "failed"]
    assert found["problems"] == ["a proxy does not answer: vnet status may say why"]
    assert errors == "vnet: a proxy does not answer: vnet status may say why\n"


def test_a_proxy_that_falls_silent_is_named(vnet):
    answers = [c.encode(c.Complete(slot="proxy-9", revision=0))]

    async def scene():
        async def talk(reader, writer):
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                while await reader.readuntil(b"\n"):
                    writer.write(answers.pop() if answers else b"")
            writer.close()

        sources = Sources(vnet.run_dir)
        async with await asyncio.start_unix_server(talk, vnet.directory / "ffffffff.list"):
            assert await sources.look()
            assert sources.problems == []
            for is_new in (True, False):
                assert await sources.look(0.1) is is_new
                assert sources.problems == ["proxy-9 does not answer: vnet status may say why"]
            await sources.close()

    vnet.run(scene())


def test_nobody_answers(vnet):
    with silent_proxy(vnet):
        error = asked(vnet.run_dir)
    assert error.status is ExitStatus.INTERNAL
    assert "within 2 s" in str(error)


@pytest.mark.parametrize(
    "said",
    [
        b"nonsense\n",
        b'{"t":"Complete","slot":"\x1b","revision":0}\n',
        b"x" * (2 * c.MAX_LINE_BYTES),
        b"",
    ],
)
def test_a_proxy_that_talks_nonsense_is_not_shown(vnet, capsys, said):
    vnet.refuse(vnet.proxy())

    async def start():
        async def talk(_, writer):
            writer.write(said)
            with contextlib.suppress(OSError):
                await writer.drain()
            writer.close()

        return await asyncio.start_unix_server(talk, vnet.directory / "evil.list")

    server = vnet.run(start())
    found, _ = shown(vnet, capsys)
    assert len(found["connections"]) == 1

    async def stop():
        server.close()
        await server.wait_closed()

    vnet.run(stop())


def test_a_proxy_that_talks_without_end_is_left(vnet, capsys, monkeypatch):
    monkeypatch.setattr(c, "MAX_LINES", 50)
    vnet.start()
    monkeypatch.setattr(cli, "START_SECONDS", 0.1)
    ledger = vnet.proxy()
    for number in range(51):
        vnet.refuse(ledger, target=PG._replace(name=str(number)))
    assert asked(vnet.run_dir).status is ExitStatus.DEGRADED


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize("what", ["directory", "socket"])
def test_others_are_told_what_is_missing(vnet, what):
    vnet.proxy()
    vnet.run_dir.chmod(0o755)
    vnet.directory.chmod(0o700 if what == "directory" else 0o755)
    above = [path for path in vnet.run_dir.parents if not path.stat().st_mode & 0o001]
    modes = {path: path.stat().st_mode for path in above}
    for path in above:
        path.chmod(modes[path] | 0o001)
    os.seteuid(65534)
    try:
        error = asked(vnet.run_dir)
    finally:
        os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)
    assert error.status is ExitStatus.NOT_PERMITTED
    assert "as root or as the VNet user" in str(error)


class Watcher:
    """`vnet connections --watch` in a process of its own, in a terminal or not."""

    def __init__(self, vnet: Vnet, *options: str, in_terminal: bool = False) -> None:
        ours, theirs = pty.openpty() if in_terminal else os.pipe()
        self.output = ours
        self.text = ""
        self.errors = vnet.run_dir / "errors"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [VNET, "connections", "--watch", "--run-dir", str(vnet.run_dir), *options],
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=errors,
                env=os.environ | {"COLUMNS": "80", "LINES": "24", "NO_COLOR": "1"},
            )
        os.close(theirs)
        os.set_blocking(ours, False)

    def read_until(self, pattern: str) -> "re.Match[str]":
        """What is printed next that has the pattern; what comes before is dropped."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            assert time.monotonic() < deadline, (pattern, self.text, self.errors.read_text())
            with contextlib.suppress(BlockingIOError):
                self.text += os.read(self.output, 65536).decode()
            time.sleep(0.01)
        self.text = self.text[found.end() :]
        return found

    def line(self) -> dict:
        return json.loads(self.read_until(r"[^\n]*\n")[0])

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(DEADLINE_SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.output)


@pytest.fixture
def watch(vnet):
    with contextlib.ExitStack() as closing:

        def start(*options: str, in_terminal: bool = False) -> Watcher:
            watcher = Watcher(vnet, *options, in_terminal=in_terminal)
            closing.callback(watcher.close)
            return watcher

        yield start


def test_watching_prints_a_line_when_something_has_changed(vnet, watch):
    ledger = vnet.proxy()
    watcher = watch("--json")
    assert watcher.line()["connections"] == []
    vnet.refuse(ledger, "one")
    assert [row["error"] for row in watcher.line()["connections"]] == ["one"]
    vnet.refuse(ledger, "two")
    assert [row["error"] for row in watcher.line()["connections"]] == ["two", "one"]
    assert watcher.end() == 0
    assert watcher.text == ""
    assert watcher.errors.read_text() == ""


def test_watching_tells_the_program_of_what_ended_meanwhile(vnet, watch, program):
    ledger = vnet.proxy()
    record = vnet.begin(ledger, program=program)
    watcher = watch("--json")
    [row] = watcher.line()["connections"]
    assert (row["state"], row["pid"]) == ("dialling", os.getpid())
    vnet.call(ledger.refused, record, Refusal.MFA_REQUIRED, "nobody answered")
    while row["state"] == "dialling":
        [row] = watcher.line()["connections"]
    assert (row["state"], row["pid"]) == ("failed", os.getpid())


def test_watching_survives_a_restart_of_all(vnet, watch):
    vnet.refuse(vnet.proxy(), "before")
    watcher = watch("--json")
    assert watcher.line()["connections"][0]["error"] == "before"
    vnet.stop_proxies()
    while (found := watcher.line())["connections"]:
        pass
    [problem] = found["problems"]
    assert "VNet is not running" in problem
    vnet.refuse(vnet.proxy(), "after")
    while not (found := watcher.line())["connections"]:
        pass
    assert found["connections"][0]["error"] == "after"
    assert found["problems"] == []
    assert watcher.end() == 0


def test_watching_in_a_terminal_draws_in_place(vnet, watch):
    ledger = vnet.proxy()
    for number in range(40):
        vnet.refuse(ledger, f"reason {number}")
    watcher = watch(in_terminal=True)
    frame = watcher.read_until(r"\x1b\[H(.*?)\x1b\[J")[1]
    rows = frame.split("\r\n")[:-1]
    assert len(rows) == 23
    assert all(row.endswith("\x1b[K") for row in rows)
    assert "reason 39" in frame
    assert re.match(r"\.\.\. \d+ more lines: vnet connections", rows[-1])
    vnet.refuse(ledger, "the newest")
    watcher.read_until(r"the newest")
    vnet.stop_proxies()
    watcher.read_until(r"\x1b\[HVNet is not running")
    assert watcher.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_a_watch_gives_the_terminal_back(vnet, number):
    ledger = vnet.proxy()
    for count in range(40):
        vnet.refuse(ledger, f"reason {count}")
    with terminal("connections", "--watch", "--run-dir", str(vnet.run_dir), columns=40) as shown:
        shown.wait_for(lambda display: "more lines: vnet connections" in display.text)
        assert shown.display.modes == {"1049": True, "25": False, "7": False}
        assert (shown.display.scrolled, shown.display.clipped) == (0, 0)
        vnet.stop_proxies()
        shown.wait_for(lambda display: display.rows[0].startswith("VNet is not running"))
        assert "waiting" in shown.display.text
        assert shown.end(number) == (0 if number == signal.SIGINT else 128 + number)
        assert shown.display.modes == {"1049": False, "25": True, "7": True}
        assert "Traceback" not in shown.raw


def test_a_watch_as_json_leaves_the_terminal_alone(vnet):
    vnet.proxy()
    with terminal("connections", "--watch", "--json", "--run-dir", str(vnet.run_dir)) as shown:
        shown.wait_for(lambda display: '"schema":1' in display.text)
        shown.end()
        assert "\x1b" not in shown.raw


def test_a_watch_whose_reader_does_not_read_is_ended_by_a_signal(vnet):
    ledger = vnet.proxy()
    for count in range(60):
        vnet.refuse(ledger, f"reason {count} {'x' * 100}")
    command = [VNET, "connections", "--watch", "--json", "--run-dir", str(vnet.run_dir)]
    reading, writing = os.pipe()
    try:
        room = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        with subprocess.Popen(command, stdout=writing) as watch:
            deadline = time.monotonic() + DEADLINE_SECONDS
            while waiting_bytes(reading) < room:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            watch.terminate()
            try:
                assert watch.wait(DEADLINE_SECONDS) == -signal.SIGTERM
            finally:
                watch.kill()
    finally:
        os.close(reading)
        os.close(writing)


def waiting_bytes(pipe: int) -> int:
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def test_watching_into_a_pipe_prints_the_tables_again(vnet, watch):
    vnet.refuse(vnet.proxy())
    watcher = watch()
    text = watcher.read_until(r".*\n\n\n?")[0]
    assert "\x1b" not in text
    assert "port_not_allowed" in text

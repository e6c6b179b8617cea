"""`vnet logs` and `vnet log-level`, asked of real commands behind a real control socket."""

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from control_bed import answering
from run_fakes import FakeRun, settings

from supervisor import control_messages as cm
from supervisor import main, next_start
from supervisor.cli import logs as cli
from supervisor.cli.control_client import AskError
from supervisor.commands import Commands
from supervisor.exits import ExitStatus
from supervisor.log_book import LogBook, LogEntry

VNET = str(Path(sys.executable).with_name("vnet"))
SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "logs.json"
DEADLINE_SECONDS = 20.0


class Vnet:
    """A control socket with a log book behind it, served by a thread."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.uid = 0
        self.run = FakeRun(settings=settings(state_dir=run_dir), log_book=LogBook("first"))
        self._runs = 0
        self._closing = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        """A run of VNet with a book of its own."""
        self._runs += 1
        self.run.log_book = LogBook(f"run {self._runs}")
        commands = Commands(self.run)
        self._closing.enter_context(
            answering(self.run_dir, lambda _uid, line: commands.answer(self.uid, line))
        )

    def stop(self) -> None:
        self._closing.close()

    def log(self, message: str, worker: str = "dns", level: str = "info", **more: str) -> None:
        entry = LogEntry(
            time="2026-01-31T12:00:00.123Z",
            level=level,
            worker=worker,
            pid=4711,
            logger="workers.x",
            message=message,
            **more,
        )
        self.run.log_book.add(entry)


@pytest.fixture
def vnet(tmp_path):
    made = Vnet(tmp_path)
    yield made
    made.stop()


def show(vnet: Vnet, **changed: object) -> ExitStatus:
    wanted = {"follow": False, "worker": None, "level": cm.Level.DEBUG, "as_json": False}
    return cli.show(vnet.run_dir, **wanted | changed)


def test_lines_for_people(vnet, capsys):
    vnet.log("serving DNS")
    vnet.log("a\x1b[2Jb\nc", worker="proxy-0", level="error", connection="caaaaaaab")
    assert show(vnet) is ExitStatus.OK
    assert capsys.readouterr().out == (
        "2026-01-31T12:00:00.123Z INFO dns[4711]: serving DNS\n"
        "2026-01-31T12:00:00.123Z ERROR proxy-0[4711] caaaaaaab: a\\x1b[2Jb\n    c\n"
    )


def test_lines_for_machines(vnet, capsys):
    vnet.log("a\nb", connection="caaaaaaab")
    vnet.log("c", worker="supervisor")
    assert show(vnet, as_json=True) is ExitStatus.OK
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {
        "schema": 1,
        "sequence": 1,
        "time": "2026-01-31T12:00:00.123Z",
        "level": "info",
        "worker": "dns",
        "pid": 4711,
        "logger": "workers.x",
        "message": "a\nb",
        "connection": "caaaaaaab",
    }
    described = set(json.loads(SCHEMA.read_text())["$defs"]["LogEntry"]["properties"])
    assert set(json.loads(second)) == described


def test_schema_is_that_of_the_lines():
    raw = msgspec.json.encode(msgspec.json.schema(LogEntry))
    assert SCHEMA.read_text() == msgspec.json.format(raw, indent=2).decode() + "\n"


def test_worker_and_level_choose(vnet, capsys):
    for worker in ("dns", "tun", "supervisor"):
        for level in ("debug", "info", "warning", "error"):
            vnet.log(f"{level} of {worker}", worker=worker, level=level)
    show(vnet, worker="tun", level=cm.Level.WARNING)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in lines] == ["warning of tun", "error of tun"]
    show(vnet, worker="supervisor")
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_long_log_comes_in_pieces_and_whole(vnet, capsys):
    for number in range(3000):
        vnet.log(f"{number} {'x' * 400}")
    show(vnet)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == [str(number) for number in range(3000)]


def test_unknown_worker_is_told_the_known_ones(vnet):
    with pytest.raises(AskError) as raised:
        show(vnet, worker="dnss")
    assert raised.value.status == ExitStatus.USAGE
    text = "there is no worker 'dnss'; there are: supervisor, tun, proxy-0, proxy-1, dns"
    assert str(raised.value) == text


def test_others_than_root_and_the_user_see_no_line(vnet, capsys):
    vnet.log("secret")
    vnet.uid = 12345
    with pytest.raises(AskError) as raised:
        show(vnet, follow=True)
    assert raised.value.status == ExitStatus.NOT_PERMITTED
    assert "alice" in str(raised.value)
    assert "secret" not in capsys.readouterr().out
    vnet.uid = vnet.run.settings.user.uid
    show(vnet)
    assert "secret" in capsys.readouterr().out


def test_vnet_that_does_not_run_is_an_error_at_once(tmp_path):
    for follow in (False, True):
        with pytest.raises(AskError) as raised:
            cli.show(tmp_path, follow=follow, worker=None, level=cm.Level.INFO, as_json=False)
        assert raised.value.status == ExitStatus.NOT_RUNNING


class Follower:
    """`vnet logs --follow` in a process of its own."""

    def __init__(self, vnet: Vnet, *options: str) -> None:
        self.errors = vnet.run_dir / "errors"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [VNET, "logs", "--follow", "--run-dir", str(vnet.run_dir), *options],
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def line(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], DEADLINE_SECONDS)[0]
        # Unbuffered, so that select sees what there is.
        data = b""
        while not data.endswith(b"\n"):
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, self.errors.read_text()
            data += byte
        return data.decode().rstrip("\n")

    def wait_for_error(self, text: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while text not in self.errors.read_text():  # polled: another process writes it
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.01)


@contextlib.contextmanager
def following(vnet: Vnet, *options: str) -> Iterator[Follower]:
    follower = Follower(vnet, *options)
    with follower.process:
        try:
            yield follower
        finally:
            follower.process.kill()


def test_follower_sees_what_comes_also_from_the_next_run(vnet):
    vnet.log("before")
    with following(vnet) as follower:
        assert follower.line().endswith("before")
        vnet.log("now")
        assert follower.line().endswith("now")
        vnet.stop()
        follower.wait_for_error("VNet is not running")
        vnet.start()
        # As many lines as have been read of the first book, and one more.
        for text in ("anew", "again", "and on"):
            vnet.log(text)
        assert [follower.line()[-6:] for _ in range(3)] == [": anew", " again", "and on"]
        follower.wait_for_error("VNet was started anew")
        follower.process.send_signal(signal.SIGINT)
        assert follower.process.wait(DEADLINE_SECONDS) == 0
    text = follower.errors.read_text()
    assert "Traceback" not in text
    assert "missing" not in text


def test_follower_is_told_of_a_gap(vnet):
    vnet.run.log_book = LogBook("small", max_lines=10)
    vnet.log("before")
    with following(vnet, "--json") as follower:
        assert json.loads(follower.line())["message"] == "before"
        for number in range(500):
            vnet.log(str(number))
        follower.wait_for_error("lines are missing here")
        while json.loads(follower.line())["message"] != "499":
            pass


def test_follower_whose_reader_has_gone_ends_well(vnet):
    with following(vnet) as follower:
        vnet.log("one")
        follower.line()
        assert follower.process.stdout is not None
        follower.process.stdout.close()
        vnet.log("two")
        assert follower.process.wait(DEADLINE_SECONDS) == 0
    assert follower.errors.read_text() == ""


def test_follower_who_may_no_longer_read_is_told(vnet):
    with following(vnet) as follower:
        vnet.log("one")
        follower.line()
        vnet.uid = 12345
        assert follower.process.wait(DEADLINE_SECONDS) == ExitStatus.NOT_PERMITTED


def test_colour_is_for_terminals(vnet, monkeypatch, capsys):
    vnet.log("bad", level="error")
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(vnet)
    assert " \x1b[31mERROR\x1b[0m dns" in capsys.readouterr().out
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    show(vnet)
    assert "\x1b" not in capsys.readouterr().out


# -- vnet log-level --


def order(vnet: Vnet, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VNET, *arguments, "--run-dir", str(vnet.run_dir)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def level_of_start(state_dir: Path, *flags: str) -> str:
    arguments = ["--config", str(state_dir / "vnet.toml"), "--state-dir", str(state_dir), *flags]
    return main._settings(main.make_parser().parse_args(arguments), None).log_level


@pytest.fixture
def state_dir(tmp_path) -> Path:
    (tmp_path / "vnet.toml").write_text('[dns]\nos_integration = "none"\n')
    return tmp_path


def test_level_for_the_next_start_is_taken_there_and_once(vnet, state_dir):
    level = logging.getLogger().level
    done = order(vnet, "log-level", "debug", "--next-start")
    assert (done.returncode, done.stdout) == (0, "the next start has log level debug\n")
    assert logging.getLogger().level == level
    assert vnet.run.orders == []
    # A start that does not come so far as to be one leaves it for the next.
    assert level_of_start(state_dir) == "DEBUG"
    assert level_of_start(state_dir, "--log-level", "warning") == "WARNING"
    assert level_of_start(state_dir) == "DEBUG"
    next_start.forget_log_level(state_dir)
    assert level_of_start(state_dir) == "INFO"
    next_start.forget_log_level(state_dir)


@pytest.mark.parametrize("text", ["", "all\n", "\xff", "x" * 10_000, "debug\ninfo\n"])
def test_nonsense_left_for_the_next_start_is_no_obstacle(state_dir, text):
    next_start.keep_log_level(state_dir, text)
    assert level_of_start(state_dir) == "INFO"


def test_level_that_cannot_be_kept_is_said(vnet):
    vnet.run.settings = settings(state_dir=vnet.run_dir / "gone")
    done = order(vnet, "log-level", "debug", "--next-start")
    assert done.returncode == ExitStatus.INTERNAL
    assert "cannot be kept" in done.stderr


def test_wrong_level_is_wrong_usage(vnet):
    for arguments in (("log-level", "loud"), ("logs", "--level", "loud")):
        done = order(vnet, *arguments)
        assert done.returncode == ExitStatus.USAGE
        text = "vnet: 'loud' is no level: use debug, info, warning or error\n"
        assert done.stderr == text

"""`vnet status` as a user meets it: a real command, a real control socket, a terminal or none."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

import json_schemas
import msgspec
import pytest
from control_bed import ControlBed
from run_fakes import CLUSTER
from terminal import DEADLINE_SECONDS, VNET, terminal

from ipc import messages as m
from supervisor.cli import control_client, status_view
from supervisor.cli import status as command
from supervisor.cli import text as terminal_text
from supervisor.cli.app import app
from supervisor.clusters import ClusterView
from supervisor.commands import Commands
from supervisor.exits import ExitStatus
from supervisor.status import Health, Status
from supervisor.worker_states import WorkerState

LONG = "a-cluster-with-a-rather-long-name.somewhere-else.example.test"


@pytest.fixture
def bed(tmp_path):
    made = ControlBed(tmp_path)
    yield made
    made.stop()


def vnet(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VNET, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def status(bed, *options: object) -> subprocess.CompletedProcess[str]:
    return vnet("status", *options, "--run-dir", bed.run_dir)


# -- once --


def test_json_is_what_its_schema_says(bed):
    done = status(bed, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    json_schemas.check("status", found)
    assert found["schema"] == 1
    assert json_schemas.unknown_keys("status", found) == set()
    bed.uid = 12345
    json_schemas.check("status", json.loads(status(bed, "--json").stdout))


def test_a_failing_part_is_named_with_what_to_do_and_is_the_exit_status(bed):
    bed.run.workers["dns"].state = WorkerState.FAILED
    done = status(bed)
    assert done.returncode == ExitStatus.DEGRADED
    assert done.stdout.startswith("VNet is degraded\n  The worker dns ")
    assert "run: vnet restart dns" in done.stdout


def test_without_a_terminal_everything_is_there_in_full_and_without_colour(bed):
    bed.run.report = ClusterView([msgspec.structs.replace(CLUSTER, name=LONG)], "")
    bed.run.os_problems = ["Something is wrong, " * 10 + "do this."]
    done = vnet("status", "--run-dir", bed.run_dir, COLUMNS="40")
    assert LONG in done.stdout
    assert f"\n  {bed.run.os_problems[0]}\n" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_in_a_terminal_it_fits(bed, columns):
    clusters = [msgspec.structs.replace(CLUSTER, name=LONG), msgspec.structs.replace(CLUSTER)]
    bed.run.report = ClusterView(clusters, "")
    bed.run.os_problems = ["Something is wrong, " * 10 + "do this."]
    with terminal("status", "--run-dir", str(bed.run_dir), columns=columns, lines=50) as shown:
        assert shown.wait() == ExitStatus.DEGRADED
        # A row that was broken by the terminal would begin in the middle of a word.
        rows = shown.display.rows
        assert "VNet is degraded" in rows[0]
        [cluster] = [row for row in rows if row.startswith("a-cluster")]
        assert " ok " in f"{cluster} "
        assert ("…" in cluster) == (columns < 200)
        assert "\x1b[33m" in shown.raw


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_can_be_refused(bed, env):
    with terminal("status", "--run-dir", str(bed.run_dir), **env) as shown:
        assert shown.wait() == 0
        assert "\x1b" not in shown.raw


def test_foreign_names_break_neither_lines_nor_the_terminal():
    evil = [
        msgspec.structs.replace(CLUSTER, name=name, user=name)
        for name in ("日本語のクラスタ" * 8, "a\x1b[2J\nb\u202ec", "e\u0301" * 60)
    ]
    found = Status(
        health=Health.HEALTHY,
        reasons=["日本語 " * 40],
        clusters=[
            msgspec.convert(c, status_view.ClusterStatus, from_attributes=True) for c in evil
        ],
    )
    for width in (40, 80, 200):
        lines = list(status_view.lines(found, width))
        assert all(terminal_text.columns(line) <= width for line in lines)
        assert all(line.isprintable() for line in lines)
    states = [line for line in status_view.lines(found) if " ok " in line]
    assert len({terminal_text.columns(line[: line.index(" ok ")]) for line in states}) == 1


# -- who does not answer --


def test_nobody_there(tmp_path):
    done = vnet("status", "--run-dir", tmp_path)
    assert (done.returncode, done.stdout) == (ExitStatus.NOT_RUNNING, "")
    assert done.stderr.count("\n") == 1
    assert "start it with sudo vnet-supervisor" in done.stderr


ORDERS = [
    ["reload"], ["stop"], ["restart", "dns"], ["restart", "all", "--drain"], ["logs"],
    ["log-level", "info"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"], *ORDERS], ids=" ".join)
def test_a_stopped_supervisor_holds_nobody_up(tmp_path, arguments):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()
        began = time.monotonic()
        done = vnet(*arguments, "--run-dir", tmp_path)
        took = time.monotonic() - began
    assert done.returncode == ExitStatus.INTERNAL
    assert done.stderr.count("\n") == 1
    assert "did not answer within" in done.stderr
    assert "its supervisor is stopped or hangs" in done.stderr
    # Start and end of Python on a busy machine come to it.
    assert took < 2 + 6
    assert command.ANSWER_SECONDS < control_client.TIMEOUT_SECONDS == 2.0


def test_a_health_check_that_was_left_waiting_often_is_told_the_same(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(tmp_path / "control.sock"))
            done = vnet("status", "--run-dir", tmp_path)
    assert done.returncode == ExitStatus.INTERNAL
    assert "did not answer within" in done.stderr


def test_another_user_sees_health_and_is_told_whose_right_is_missing(bed):
    bed.uid = 12345
    assert status(bed).stdout == "VNet is healthy\n"
    for arguments in ORDERS:
        done = vnet(*arguments, "--run-dir", bed.run_dir)
        if arguments[-1] == "--drain":
            continue  # it looks at the workers first, of which others see none
        assert done.returncode == ExitStatus.NOT_PERMITTED
        assert done.stderr == "vnet: only root and alice may do that: run it with sudo\n"


# -- waiting --


def test_waiting_ends_with_what_there_is(bed):
    bed.run.os_problems = ["It is being set up: wait."]
    began = time.monotonic()
    done = status(bed, "--wait", "0.5")
    assert time.monotonic() - began >= 0.5
    assert done.returncode == ExitStatus.DEGRADED
    bed.run.os_problems = []
    assert status(bed, "--wait", DEADLINE_SECONDS).returncode == 0


def test_an_answer_at_the_end_of_a_wait_may_take_its_time(bed, monkeypatch):
    """Otherwise a VNet on a busy machine would be said to hang."""
    at_once = Commands.answer

    def late(*arguments):
        time.sleep(0.6)
        return at_once(*arguments)

    bed.run.os_problems = ["It is being set up: wait."]
    monkeypatch.setattr(Commands, "answer", late)
    assert command.show(bed.run_dir, wait=0.1, as_json=True) is ExitStatus.DEGRADED


def test_waiting_goes_on_over_a_start(tmp_path):
    with subprocess.Popen(
        [VNET, "status", "--wait", str(DEADLINE_SECONDS), "--run-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as waiting:
        bed = ControlBed(tmp_path)
        try:
            assert waiting.wait(DEADLINE_SECONDS) == 0
        finally:
            waiting.kill()
            bed.stop()


# -- the short way --


@pytest.mark.parametrize(
    ("arguments", "wish"),
    [
        ([], command.Wish()),
        (["--json"], command.Wish(as_json=True)),
        (["--run-dir", "/x", "--json"], command.Wish(as_json=True, run_dir=command.Path("/x"))),
    ],
)
def test_the_short_way_understands_what_the_parser_does(arguments, wish, monkeypatch):
    assert command.plain_wish(arguments) == wish
    seen = []
    monkeypatch.setattr("supervisor.cli.app._show_status", seen.append)
    app(["status", *arguments], standalone_mode=False)
    assert seen == [wish]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["-h"], ["--watch"], ["--wait", "1"], ["--jso"], ["x"], ["--run-dir"], ["--"],
     ["--run-dir", "--json"], ["--json=1"], ["--run-dir=/x"]],
)  # fmt: skip
def test_what_takes_more_than_a_look_goes_the_long_way(arguments):
    assert command.plain_wish(arguments) is None


def test_a_look_loads_no_parser_of_types_and_no_client(bed):
    script = (
        "import sys; from supervisor.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, *sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            "status",
            "--run-dir",
            str(bed.run_dir),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=True,
    )
    code, *modules = done.stderr.split()
    assert code == "0"
    heavy = {"asyncio", "rich", "pydantic", "cryptography", "psutil", "ssl", "uvloop", "email"}
    assert sorted(heavy & set(modules)) == []
    assert not [name for name in modules if name.startswith(("workers", "demo"))]


# -- watching --


def test_watching_draws_in_place_over_a_restart_and_leaves_the_terminal_as_it_was(bed):
    with terminal("status", "--watch", "--run-dir", str(bed.run_dir), lines=40) as shown:
        shown.wait_for(lambda display: "VNet is healthy" in display.text)
        assert shown.display.modes == {"1049": True, "25": False, "7": False}
        bed.stop()
        shown.wait_for(lambda display: "VNet is stopped" in display.rows[0])
        assert "waiting." in shown.display.text
        # Of the longer view before nothing is left.
        assert "WORKER" not in shown.display.text
        bed.start()
        shown.wait_for(lambda display: "VNet is healthy" in display.rows[0])
        assert (shown.display.scrolled, shown.display.clipped) == (0, 0)
        assert "\x1b[2J" not in shown.raw
        assert shown.end() == 0
        assert shown.display.modes == {"1049": False, "25": True, "7": True}
        # The last view stays.
        assert "VNet is healthy" in shown.display.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_it_gives_the_terminal_back(bed, number):
    with terminal("status", "--watch", "--run-dir", str(bed.run_dir)) as shown:
        shown.wait_for(lambda display: "VNet is healthy" in display.text)
        assert shown.end(number) == 128 + number
        assert shown.display.modes == {"1049": False, "25": True, "7": True}


def test_a_terminal_of_another_size_is_drawn_anew(bed):
    bed.run.os_problems = ["Something is wrong, " * 10 + "do this."]
    with terminal(
        "status", "--watch", "--run-dir", str(bed.run_dir), columns=200, lines=40
    ) as shown:
        shown.wait_for(lambda display: "WORKER" in display.text)
        shown.resize(40, 8)
        shown.wait_for(lambda display: "more lines: vnet status" in display.rows[-2])
        shown.resize(100, 40)
        shown.wait_for(lambda display: "dns" in display.text and "do this." in display.text)


def lines_of(process: subprocess.Popen[bytes], text: bytes = b""):
    assert process.stdout is not None
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        while b"\n" in text:
            line, _, text = text.partition(b"\n")
            yield line.decode()
        assert time.monotonic() < deadline
        if select.select([process.stdout], [], [], 0.1)[0]:
            text += os.read(process.stdout.fileno(), 65536)


def test_watching_as_json_is_an_object_a_line_over_a_restart(bed):
    with subprocess.Popen(
        [VNET, "status", "--watch", "--json", "--run-dir", str(bed.run_dir)],
        stdout=subprocess.PIPE,
    ) as watching:
        try:
            found = map(json.loads, lines_of(watching))
            assert next(found)["health"] == "healthy"
            bed.stop()
            while (one := next(found))["health"] != "stopped":
                pass
            json_schemas.check("status", one)
            assert "VNet is not running" in one["reasons"][0]
            bed.start()
            while next(found)["health"] != "healthy":
                pass
            watching.send_signal(signal.SIGINT)
            assert watching.wait(DEADLINE_SECONDS) == 0
        finally:
            watching.kill()


def test_watching_into_a_pipe_is_plain_text_again_and_again(bed):
    with subprocess.Popen(
        [VNET, "status", "--watch", "--run-dir", str(bed.run_dir)], stdout=subprocess.PIPE
    ) as watching:
        try:
            found = lines_of(watching)
            for _ in range(2):
                while (line := next(found)) != "VNet is healthy":
                    assert "\x1b" not in line
        finally:
            watching.kill()


def test_a_cluster_that_is_asked_for_the_first_time_is_no_health_yet(bed):
    bed.run.report = ClusterView([CLUSTER], "", ("demo.test",))
    done = status(bed)
    assert done.returncode == ExitStatus.DEGRADED
    assert done.stdout.startswith(
        "VNet is starting\n  First answers of clusters are due ('demo.test')"
    )
    # No health check fails because of a later login, or a proxy that is started again.
    bed.run.was_healthy = True
    assert status(bed).returncode == ExitStatus.OK
    bed.run.was_healthy = False
    # What is wrong anyway comes first.
    problem = msgspec.structs.replace(CLUSTER, problem="Run tsh login.", state=m.ClusterState.OK)
    bed.run.report = ClusterView([problem], "", ("demo.test",))
    assert status(bed).stdout.startswith("VNet is degraded\n  Run tsh login.")

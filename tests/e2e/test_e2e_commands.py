"""The commands of a running VNet: what they print, whom they answer, and that healthy means usable."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import json_schemas
import pytest
from bare_clusters import UPSTREAM_ADDRESS, cluster_in, upstream_dns
from demo_bed import bare_bed, supervisor_in
from private_bed import Bed, wait_until

from supervisor.cli.control_client import AskError
from supervisor.exits import ExitStatus

pytestmark = [pytest.mark.root, pytest.mark.e2e]

CLUSTER = """
[[clusters]]
name = "root.test"
proxy_addr = "localhost:3080"
custom_dns_zones = ["corp.test"]

[[clusters.apps]]
name = "own"
uri = "tcp://ports.backend.internal:4001"
public_addr = "own.corp.test"
"""
CONFIG = """
[dns]
upstream = ["127.0.0.54"]
os_integration = "none"
[teleport]
ca_file = "{home}/web-ca.pem"
"""
SERVER = "100.64.0.2"


# -- JSON --


@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        ("status", {ExitStatus.OK}),
        ("ls", {ExitStatus.OK}),
        ("connections", {ExitStatus.OK}),
        ("diag", {ExitStatus.OK, ExitStatus.DEGRADED}),
    ],
)
def test_what_commands_print_is_what_their_schemas_say(bed, name, statuses):
    with bed.connect(bed.resolve("echo.teleport.e2e.test")[0], 7):
        done = bed.run("vnet", name, "--json")
    assert done.returncode in statuses, done.stderr
    [line] = done.stdout.splitlines()
    found = json.loads(line)
    json_schemas.check(name, found)
    assert found["schema"] == 1
    assert json_schemas.unknown_keys(name, found) == set()


def test_lines_of_the_log_are_what_their_schema_says(bed):
    lines = bed.output("vnet", "logs", "--json").splitlines()
    assert lines
    for line in lines:
        json_schemas.check("logs", json.loads(line))
        assert json.loads(line)["schema"] == 1


# -- whom they answer --

# Imported first: whoever it becomes may not be able to read the program.
AS_NOBODY = """
import contextlib, importlib, io, os, pkgutil, pwd
import supervisor
for found in pkgutil.walk_packages(supervisor.__path__, "supervisor."):
    importlib.import_module(found.name)
from supervisor.cli import app
with contextlib.redirect_stdout(io.StringIO()):  # loads what reads arguments
    app.app(["restart", "--help"], standalone_mode=False)
entry = pwd.getpwnam("nobody")
os.setgroups([])
os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
app.main()
"""


@pytest.mark.parametrize(
    "arguments",
    ["connections", "logs", "diag", "mfa", "reload", "stop", "restart dns", "log-level info",
     "repair", "service install --user root"],
)  # fmt: skip
def test_another_user_is_told_in_a_line_whose_right_is_missing(bed, arguments):
    done = bed.run(sys.executable, "-c", AS_NOBODY, *arguments.split())
    assert done.returncode == ExitStatus.NOT_PERMITTED
    [line] = done.stderr.decode().splitlines()
    assert "root" in line


# -- healthy means usable --


@pytest.fixture
def started() -> Iterator[tuple[Bed, Path]]:
    """A network with a cluster, and its tsh home as it is seen from here."""
    with bare_bed() as bed, contextlib.ExitStack() as closing:
        closing.enter_context(upstream_dns(bed))
        home = closing.enter_context(
            cluster_in(bed, CLUSTER, Path(bed.environment["TELEPORT_HOME"]))
        )
        yield bed, home


def config(bed: Bed) -> str:
    return CONFIG.format(home=bed.environment["TELEPORT_HOME"])


def test_a_name_that_is_asked_for_as_soon_as_it_is_healthy_is_found(started):
    bed, _ = started
    for run in range(3):
        with supervisor_in(bed, config=config(bed), name=f"vnet-{run}"):
            assert bed.run("vnet", "status", "--wait", "30").returncode == 0
            assert bed.resolve("own.corp.test", server=SERVER) != [UPSTREAM_ADDRESS]


def test_it_is_starting_while_a_cluster_has_neither_answered_nor_failed(started):
    bed, home = started
    (home / "faults").write_text("hang\nother_user shown\n")
    wait_until(lambda: "shown" in (home / "localhost.yaml").read_text(), "the fault is on")

    def seen() -> dict:
        with contextlib.suppress(AskError):
            return bed.status()
        return {"health": "none", "reasons": []}

    with supervisor_in(bed, config=config(bed)):
        healths: list[str] = []

        def is_degraded() -> bool:
            now = seen()
            assert now["health"] != "healthy"
            if any(reason.startswith("First answers of clusters") for reason in now["reasons"]):
                assert now["health"] == "starting"
                assert "'root.test'" in now["reasons"][0]
                healths.append("awaited")
            return now["health"] == "degraded"

        wait_until(is_degraded, "it is given up")
        assert "awaited" in healths
        [reason] = [text for text in seen()["reasons"] if "root.test" in text]
        assert "vnet diag" in reason
        (home / "faults").unlink()
        bed.wait_for_health("healthy")
        assert bed.resolve("own.corp.test", server=SERVER) != [UPSTREAM_ADDRESS]


# -- a supervisor that is stopped --


def test_a_stopped_supervisor_costs_two_seconds_at_most_and_a_watch_goes_on(started):
    bed, _ = started
    with supervisor_in(bed, config=config(bed)) as process:
        assert bed.run("vnet", "status", "--wait", "30").returncode == 0
        pid = bed.outer_pid(bed.status()["supervisor"]["pid"])
        with bed.running("vnet", "status", "--watch", "--json", log_name="watch"):
            log = bed.directory / "watch.log"

            def last() -> str:
                # The last one may not be whole yet.
                text = log.read_text() if log.exists() else ""
                lines = text.rpartition("\n")[0].splitlines()
                return str(json.loads(lines[-1])["health"]) if lines else ""

            wait_until(lambda: last() == "healthy", "it is watched")
            os.kill(pid, signal.SIGSTOP)
            try:
                began = time.monotonic()
                done = bed.run("vnet", "status")
                took = time.monotonic() - began
                wait_until(lambda: last() == "degraded", "the watch says so")
            finally:
                os.kill(pid, signal.SIGCONT)
                # nsenter stops with its child.
                process.send_signal(signal.SIGCONT)
            assert done.returncode == ExitStatus.INTERNAL
            # What it waits for an answer; the start of Python on a busy machine comes to it.
            assert took < 1.5 + 6
            wait_until(lambda: last() == "healthy", "the watch goes on")

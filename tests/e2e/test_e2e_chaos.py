"""A short run of chaos meets its hard aims; how fast things go is no test's business."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.alone, pytest.mark.timeout(240)]

CHAOS = Path(__file__).parents[1] / "chaos" / "chaos.py"


def run(*options: str) -> dict[str, Any]:
    """The report of a run that has met its hard aims."""
    # Not by scripts/chaos: that may build the virtual environment this test runs in anew.
    done = subprocess.run(
        [sys.executable, str(CHAOS), *options],
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"
    (line,) = done.stdout.splitlines()
    return dict(json.loads(line))


def test_a_short_run_is_survived():
    report = run("--events", "11", "--seconds", "40", "--hang-seconds", "3", "--seed", "58")
    # Fewer on a machine that is busy, and enough to have shown something.
    assert report["events"]["all"] >= 6
    assert report["connections"]["completed"] > 50
    assert report["questions"]["asked"] > 200
    # The order of this seed drains and kills the worker ssh.
    assert report["connections"]["ssh"] > 0
    assert report["connections"]["ssh login"] > 0


def test_a_worker_that_crashes_too_often_is_given_up_and_brought_back():
    report = run("--above-limit", "dns", "--seed", "1")
    worker = report["workers"]["dns"]
    assert worker["kills"] > 5
    assert "vnet restart dns" in worker["reason"]
    assert report["connections"]["completed"] > 20
    assert "vnet0" not in Path("/proc/net/dev").read_text()

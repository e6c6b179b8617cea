"""The benchmark still runs; what it measures is no test's business."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bench_figures import Aim, Compare, Figure, medians, percentile, table

BENCH = Path(__file__).with_name("bench.py")


def figure(value: float, aim: Aim | None) -> Figure:
    return Figure("a thing", "ms", value, 10.0, "nothing", aim)


@pytest.mark.parametrize(
    ("value", "aim", "is_met"),
    [
        (5.0, Aim(Compare.RATIO, least=0.5), True),
        (4.9, Aim(Compare.RATIO, least=0.5), False),
        (15.0, Aim(Compare.EXCESS, most=5), True),
        (15.1, Aim(Compare.EXCESS, most=5), False),
        (300.0, Aim(Compare.VALUE, least=300), True),
        (60.1, Aim(Compare.VALUE, most=60), False),
        (60.1, None, None),
    ],
)
def test_aim_is_met_exactly_up_to_its_bound(value, aim, is_met):
    assert figure(value, aim).is_met is is_met


def test_missed_aim_is_shown_in_table_and_json():
    missed = figure(4.0, Aim(Compare.RATIO, least=0.5))
    assert table([missed]).endswith("NOT MET")
    assert missed.as_json()["met"] is False


def test_medians_are_over_the_rounds_that_have_the_key():
    assert medians([{"a": 1.0, "b": 5.0}, {"a": 3.0}, {"a": 2.0}]) == {"a": 2.0, "b": 5.0}


def test_percentile_of_one_value_is_that_value():
    assert percentile([7.0], 99) == 7.0


# By part: figures that it has to have measured. Those that take longest come first.
FIGURES = {
    "ssh": {"ssh cat up", "sftp down", "ssh login alone, p50", "app down beside ssh cat"},
    "clusters": {"fresh name p50, beside a cluster that never answered"},
    "ways": {"one stream up, ping variant", "one stream down, connection upgrade"},
    "dns": {"DNS answers, cached name", "DNS p50, fresh name"},
    "who": {"who connects p99, 5000 sockets", "refused stranger p50, 5000 sockets"},
    "http": {"connect and HTTP request p50, checked", "one stream up, no HTTP, checked"},
    "status": {"vnet status p50, text", "vnet status, supervisor stopped"},
    "list": {"vnet ls of 20000 apps", "fresh name p50, of 20000 apps"},
}


@pytest.mark.root
@pytest.mark.e2e
@pytest.mark.alone
@pytest.mark.timeout(240)
def test_quick_runs_print_one_line_of_json_each_and_leave_no_interface():
    """Two at a time, each in a network of its own: they wait for much of their time."""
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(FIGURES, pool.map(quick_run, FIGURES), strict=True))
    for part, result in found.items():
        assert result.returncode == 0, f"{part}: {result.stderr}"
        (line,) = result.stdout.splitlines()
        assert FIGURES[part] <= {entry["name"] for entry in json.loads(line)["figures"]}
    assert "vnet0" not in Path("/proc/net/dev").read_text()


def quick_run(part: str) -> subprocess.CompletedProcess[str]:
    # Not by scripts/bench: that may build the virtual environment this test runs in anew.
    return subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--only", part],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )

"""`vnet-supervisor` alone: why it does not start, how it ends, what it leaves, who is told what."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest
from demo_bed import SUPERVISOR, bare_bed, stop, supervisor_in, supervisor_pid
from private_bed import (
    PATIENCE_SECONDS,
    Bed,
    as_nobody,
    children,
    is_running,
    lines_of,
    wait_until,
)

from supervisor.cli.control_client import AskError, ask
from supervisor.control_messages import Status, Stop

pytestmark = [pytest.mark.root, pytest.mark.e2e]

UPSTREAM = '[dns]\nupstream = ["127.0.0.54"]\nos_integration = "none"\n'
# With a range and an interface of its own a second VNet does not disturb the first.
OTHER = UPSTREAM + '[network]\ninterface = "vnet9"\nipv4_cidr_range = "100.127.0.0/16"\n'


@pytest.fixture
def empty() -> Iterator[Bed]:
    """A private network without VNet."""
    with bare_bed() as bed:
        yield bed


@pytest.fixture(scope="module")
def running() -> Iterator[Bed]:
    """A private network in which VNet runs for a user who has never logged in."""
    with bare_bed() as bed, supervisor_in(bed):
        bed.wait_for_health("degraded")
        yield bed


def start_in_vain(
    bed: Bed,
    config: str = UPSTREAM,
    run_dir: str = "other",
    state_dir: str = "other-state",
    before: tuple[str, ...] = (),
) -> tuple[int, list[str]]:
    """Starts a supervisor that must not come up: its exit status, its lines."""
    path = bed.directory / "vain.toml"
    path.write_text(config)
    directories = [
        *("--run-dir", str(bed.directory / run_dir)),
        *("--state-dir", str(bed.directory / state_dir)),
    ]
    done = bed.run(*before, SUPERVISOR, "--config", str(path), *directories, timeout=30)
    assert done.stdout == b""
    assert b"Traceback" not in done.stderr
    return done.returncode, lines_of(done.stderr)


def test_a_second_instance_is_a_conflict(running):
    status, [line] = start_in_vain(running, OTHER, run_dir="run")
    assert status == 6
    assert "runs already" in line
    assert str(running.status()["supervisor"]["pid"]) in line
    assert running.health() == "degraded"


def test_a_taken_interface_name_is_a_conflict(running):
    config = UPSTREAM + '[network]\nipv4_cidr_range = "100.127.0.0/16"\n'
    status, [line] = start_in_vain(running, config)
    assert status == 6
    assert "vnet0" in line
    assert "network.interface" in line


def test_a_taken_range_is_a_conflict(running):
    status, [line] = start_in_vain(running, UPSTREAM + '[network]\ninterface = "vnet9"\n')
    assert status == 6
    assert "vnet0 has the route 100.64.0.0/10" in line
    assert "network.ipv4_cidr_range" in line


def test_a_state_directory_in_use_is_a_conflict(running):
    status, [line] = start_in_vain(running, OTHER, state_dir="vnet-state")
    assert status == 6
    assert "--state-dir" in line


def test_two_vnets_with_networks_of_their_own_run_side_by_side(running):
    with supervisor_in(running, config=OTHER, name="vnet-other", run_dir="run-other"):
        run_dir = str(running.directory / "run-other")
        wait_until(
            lambda: json.loads(status(running, run_dir).stdout or b"{}").get("workers"),
            "the second VNet runs",
        )
        assert {"vnet0", "vnet9"} <= interfaces(running)
    assert "vnet9" not in interfaces(running)
    assert running.health() == "degraded"


def test_a_wrong_configuration_names_every_problem(empty):
    config = """
    colour = "blue"
    [network]
    mtu = 70000
    interface = "much-too-long-a-name"
    [proxy]
    workers = "two"
    """
    status, lines = start_in_vain(empty, config)
    assert status == 2
    assert len(lines) == 4
    for line, key in zip(
        sorted(lines), ["colour", "network.interface", "network.mtu", "proxy.workers"], strict=True
    ):
        assert line.startswith(f"vnet-supervisor: {key}: ")


def test_check_config_says_the_same_without_starting(tmp_path):
    path = tmp_path / "vnet.toml"
    path.write_text("[dns]\nttl_seconds = -1\ncolour = 1\n")
    arguments = [SUPERVISOR, "--check-config", "--config", str(path)]
    done = subprocess.run(arguments, capture_output=True, timeout=30, check=False)
    assert done.returncode == 2
    assert len(lines_of(done.stderr)) == 2
    path.write_text(UPSTREAM)
    assert subprocess.run(arguments, capture_output=True, timeout=30, check=False).returncode == 0


def test_without_cap_net_admin_it_says_what_is_missing(empty):
    status, [line] = start_in_vain(
        empty, before=("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    )
    assert status == 4
    assert "CAP_NET_ADMIN" in line


def test_without_the_tun_device_it_says_what_is_missing(empty):
    empty.output("mount", "-t", "tmpfs", "none", "/dev/net")
    status, [line] = start_in_vain(empty)
    assert status == 4
    assert "/dev/net/tun" in line


def interfaces(bed: Bed) -> set[str]:
    shown = json.loads(bed.output("ip", "-json", "link"))
    return {link["ifname"] for link in shown if link["ifname"] == "lo" or "vnet" in link["ifname"]}


def traces(bed: Bed) -> tuple[set[str], str, str, list[str]]:
    """What VNet makes in the system: interfaces, routes of both families, files."""
    return (
        interfaces(bed),
        bed.output("ip", "route", "show", "table", "all"),
        bed.output("ip", "-6", "route", "show", "table", "all"),
        sorted(str(path) for path in bed.directory.glob("run*/**/*")),
    )


def test_sigterm_leaves_no_interface_no_route_and_no_file(empty):
    before = traces(empty)
    with supervisor_in(empty) as process:
        empty.wait_for_health("degraded")
        assert "vnet0" in interfaces(empty)
        assert "100.64.0.0/10 dev vnet0" in empty.output("ip", "route")
        pid = supervisor_pid(process)
        workers = children(pid)
        assert len(workers) == 5
        os.kill(pid, signal.SIGTERM)
        assert process.wait(10) == 0
        assert not any(map(is_running, workers))
    assert traces(empty) == before


def test_sigint_ends_it_like_sigterm(empty):
    with supervisor_in(empty) as process:
        empty.wait_for_health("degraded")
        os.kill(supervisor_pid(process), signal.SIGINT)
        assert process.wait(10) == 0
    assert interfaces(empty) == {"lo"}


def test_vnet_stop_ends_it(empty):
    with supervisor_in(empty) as process:
        empty.wait_for_health("degraded")
        empty.output("vnet", "stop")
        assert process.wait(10) == 0
    assert interfaces(empty) == {"lo"}


def test_after_sigkill_no_worker_is_left_and_a_successor_starts(empty):
    with supervisor_in(empty) as process:
        empty.wait_for_health("degraded")
        pid = supervisor_pid(process)
        workers = children(pid)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, workers)), "the workers have ended")
        process.wait(PATIENCE_SECONDS)
    with supervisor_in(empty):
        empty.wait_for_health("degraded")
        assert all(worker["state"] == "ready" for worker in empty.status()["workers"])


def test_a_signal_during_the_start_ends_it_and_leaves_nothing(empty):
    with supervisor_in(empty) as process:
        wait_until((empty.run_dir / "lock").exists, "it has begun")
        os.kill(supervisor_pid(process), signal.SIGTERM)
        process.wait(15)
    assert interfaces(empty) == {"lo"}
    assert list(empty.directory.glob("run*/**/*")) == []


# -- vnet status --


def status(bed: Bed, run_dir: str = "", *options: str) -> subprocess.CompletedProcess[bytes]:
    where = {"VNET_RUN_DIR": run_dir} if run_dir else {}
    return bed.run("vnet", "status", "--json", *options, env=where, timeout=20)


def test_status_is_0_when_healthy(bed):
    done = status(bed)
    assert done.returncode == 0
    assert json.loads(done.stdout)["health"] == "healthy"


def test_status_is_1_when_degraded_and_says_what_to_do(running):
    done = status(running)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["health"] == "degraded"
    assert any("tsh login" in reason for reason in answer["reasons"])


def test_status_is_3_when_vnet_does_not_run(empty):
    done = status(empty)
    assert done.returncode == 3
    assert done.stdout == b""
    [line] = lines_of(done.stderr)
    assert "not running" in line


def test_status_is_2_for_a_wrong_option(bed):
    assert status(bed, "", "--colour").returncode == 2


def test_status_has_the_keys_of_the_contract(bed):
    answer = json.loads(status(bed).stdout)
    assert answer["schema"] == 1
    assert {"health", "reasons", "supervisor", "workers", "network", "clusters", "connections"} <= (
        answer.keys()
    )
    assert {"pid", "version", "uptime_seconds", "user"} <= answer["supervisor"].keys()
    for worker in answer["workers"]:
        assert {
            *("name", "pid", "state", "restarts", "uptime_seconds", "heartbeat_age_seconds"),
            *("rss_bytes", "cpu_percent", "last_exit"),
        } <= worker.keys()
    assert [w["name"] for w in answer["workers"]] == ["tun", "proxy-0", "proxy-1", "ssh", "dns"]
    assert {
        *("interface", "mtu", "ipv4_cidr_ranges", "ipv6_prefix", "dns_addresses", "dns_zones"),
        *("os_integration", "data_plane"),
    } <= answer["network"].keys()
    [cluster] = answer["clusters"]
    assert {"name", "profile", "leaf_of", "state", "user", "expires"} <= cluster.keys()
    assert (cluster["name"], cluster["profile"]) == ("e2e.test", "teleport.e2e.test")
    assert (cluster["state"], cluster["user"], cluster["leaf_of"]) == ("ok", "alice", None)
    assert answer["connections"].keys() >= {
        *("active", "total", "failed", "bytes_sent", "bytes_received"),
    }
    # Names below the cluster's own name are VNet's too.
    zones = {"teleport.e2e.test", "corp.example.test", "e2e.test"}
    assert set(answer["network"]["dns_zones"]) == zones


def test_status_for_people_names_the_workers_and_fits_80_columns(bed):
    text = bed.output("vnet", "status")
    assert "VNet is healthy" in text
    assert all(name in text for name in ("tun", "proxy-0", "proxy-1", "ssh", "dns"))
    assert max(map(len, text.splitlines())) <= 80


def test_another_user_sees_health_and_reasons_only(running):
    answer = as_nobody(lambda: json.loads(ask(running.directory / "run", Status())))
    assert answer.keys() == {"schema", "health", "reasons", "reason_ids"}
    assert answer["health"] == "degraded"


def test_another_user_may_not_stop_vnet(running):
    answer = as_nobody(lambda: json.loads(ask(running.directory / "run", Stop())))
    assert answer["status"] == 4
    assert running.health() == "degraded"


def test_status_of_a_supervisor_that_hangs_is_5_and_comes_in_time(running):
    pid = running.outer_pid(running.status()["supervisor"]["pid"])
    starter = psutil.Process(pid).parent()
    os.kill(pid, signal.SIGSTOP)
    try:
        # Without the start of the command, which may take long on a busy machine; and that does not look
        # elsewhere each time.
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(AskError, match="did not answer within 2 s"):
                ask(running.run_dir, Status())
            if (seconds := time.monotonic() - began) < 2.5:
                break
        done = status(running)
    finally:
        # nsenter stops itself together with its child.
        wait_until(lambda: starter.status() == psutil.STATUS_STOPPED, "nsenter is stopped")
        starter.send_signal(signal.SIGCONT)
        os.kill(pid, signal.SIGCONT)
    assert seconds < 2.5
    assert done.returncode == 5
    assert len(lines_of(done.stderr)) == 1
    running.wait_for_health("degraded")


def test_status_waits_until_vnet_is_healthy(bed):
    assert status(bed, "", "--wait", "5").returncode == 0


def test_status_waits_no_longer_than_told(running):
    began = time.monotonic()
    assert status(running, "", "--wait", "1").returncode == 1
    assert 1 <= time.monotonic() - began < 15


def test_stopping_twice_is_harmless(empty):
    with supervisor_in(empty) as process:
        empty.wait_for_health("degraded")
        assert stop(process) == 0
        assert stop(process) == 0

"""Metrics of a whole VNet: that they move, who is served, reload, upgrade, taken addresses."""

import contextlib
import signal
import socket
import time
from collections.abc import Iterator

import pytest
from demo_bed import SUPERVISOR, VNET, bare_bed, demo_bed, supervisor_in
from private_bed import Bed, lines_of, read_all, wait_until
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.root, pytest.mark.e2e]

PORT = 9464
CONFIG = f'[dns]\nupstream = ["127.0.0.54"]\nos_integration = "none"\n[metrics]\nlisten = "127.0.0.1:{PORT}"\n'
OFF = CONFIG.replace("listen", "# listen")
ACCEPTED = ("vnet_connections_total", "accepted")


def get(bed: Bed, head: bytes = b"", port: int = PORT) -> bytes:
    """The whole answer."""
    with bed.connect("127.0.0.1", port) as end:
        end.sendall(head or b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        return read_all(end)


def scrape(bed: Bed, port: int = PORT) -> dict[tuple, float]:
    head, _, body = get(bed, port=port).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def wait_for_metric(bed: Bed, name: tuple, least: float) -> dict[tuple, float]:
    found: dict[tuple, float] = {}

    def is_so() -> bool:
        found.update(scrape(bed))
        return found.get(name, -1) >= least

    wait_until(is_so, f"{name} is {least}")
    return found


@pytest.fixture(scope="module")
def metrics_bed() -> Iterator[Bed]:
    """A demo that serves metrics."""
    with demo_bed(config=f'[metrics]\nlisten = "127.0.0.1:{PORT}"\n') as bed:
        yield bed


@pytest.fixture
def bed(metrics_bed) -> Bed:
    metrics_bed.wait_for_health("healthy")
    # Which is so without it, too.
    wait_until(lambda: is_ready(metrics_bed), "the worker is ready")
    return metrics_bed


def scrape_settled(bed: Bed) -> dict[tuple, float]:
    """The figures, with all connections that were accepted until now."""
    bed.wait_for_counters()
    return wait_for_metric(bed, ACCEPTED, bed.status()["connections"]["total"])


def test_figures_follow_what_programs_do(bed):
    before = scrape_settled(bed)
    for _ in range(3):
        # By one family: with two, curl makes a second connection if the first takes 200 ms.
        assert bed.output("curl", "-sS", "-4", "http://hello.demo.test/")
    with contextlib.suppress(AssertionError):
        bed.resolve("no-such-app.demo.test")
    bed.seconds_until_refused("100.127.1.1", 80)  # which nobody was given
    wait_for_metric(bed, ACCEPTED, before[ACCEPTED] + 3)
    refused = ("vnet_connections_total", "unknown_address")
    after = wait_for_metric(bed, refused, before[refused] + 1)
    assert after[ACCEPTED] == before[ACCEPTED] + 3, "probes are no connections"
    for name in (
        ("vnet_connection_bytes_total", "sent"),
        ("vnet_connection_bytes_total", "received"),
        ("vnet_dns_queries_total",),
        ("vnet_dns_answers_total", "own"),
        ("vnet_dns_answer_seconds_count",),
        ("vnet_tun_packets_total", "inner"),
        ("vnet_tun_packets_total", "outer"),
    ):
        after = wait_for_metric(bed, name, before[name] + 1)
    assert after["vnet_certificates_issued_total", "app"] >= 1
    assert after["vnet_health", "healthy"] == 1
    assert after["vnet_listeners",] >= 1
    assert after["vnet_clusters",] >= 1
    clusters = {name[1:]: v for name, v in after.items() if name[0] == "vnet_cluster_state"}
    assert clusters["demo.test", "teleport.demo.test", "ok"] == 1
    expiry = after["vnet_login_expiry_timestamp_seconds", "demo.test", "teleport.demo.test"]
    assert expiry > time.time()


def test_figures_agree_with_the_status(bed):
    status = bed.status()
    wait_for_metric(bed, ("vnet_worker_up", "metrics"), 1)
    # The status may know a heartbeat that the worker is told of with the next figures.
    found = wait_for_metric(bed, ACCEPTED, status["connections"]["total"])
    # Behind the present workers are those that still finish.
    named = list(dict.fromkeys(worker["name"] for worker in status["workers"]))
    assert {name[1] for name in found if name[0] == "vnet_worker_up"} == set(named)
    assert named[-1] == "metrics"


def test_the_worker_has_no_right_that_is_left(bed):
    *others, worker = bed.status()["workers"][: len(bed.pids())]
    assert worker["name"] == "metrics"
    confinement = worker["confinement"]
    assert confinement["capabilities"] == []
    assert confinement["seccomp"] == "allow-list"
    assert confinement["missing"] == []
    assert confinement["uid"] not in [0, *(other["confinement"]["uid"] for other in others)]
    # Connections of the test before may not have ended yet.
    wait_until(lambda: bed.open_files("metrics") < 20, "it has few files")


def test_killed_worker_comes_back_while_connections_go_on(bed):
    pid = bed.worker("metrics")["pid"]
    with bed.connect("echo.demo.test", 7) as end:
        end.sendall(b"before")
        assert end.recv(100) == b"before"
        bed.kill(pid)
        assert scrape(bed)["vnet_worker_up", "tun"] == 1  # waits in the backlog meanwhile
        bed.wait_for_successor("metrics", pid)
        end.sendall(b"after")
        assert end.recv(100) == b"after"
    assert bed.worker("tun")["restarts"] == 0
    bed.wait_for_health("healthy")


def test_who_sends_nonsense_or_nothing_disturbs_nobody(bed):
    pid = bed.worker("metrics")["pid"]
    with contextlib.ExitStack() as held:
        for number in range(200):
            end = held.enter_context(bed.connect("127.0.0.1", PORT))
            if number % 2:
                with contextlib.suppress(OSError):
                    end.sendall(bytes(range(256)) * (number % 7))
        assert scrape(bed)["vnet_worker_up", "tun"] == 1
    assert get(bed, b"\x16\x03\x01\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    with contextlib.suppress(ConnectionError):
        assert get(bed, b"GET /" + b"a" * 20_000).startswith(b"HTTP/1.1 431 ")
    evil = b"GET /metrics HTTP/1.1\r\nHost: evil.test\r\n\r\n"
    assert get(bed, evil).startswith(b"HTTP/1.1 421 ")
    assert bed.worker("metrics")["pid"] == pid
    assert "Traceback" not in bed.log()
    assert bed.open_files("metrics") < 60


def test_upgrade_in_place_keeps_socket_and_totals(bed):
    bed.output("curl", "-sS", "http://hello.demo.test/")
    before = wait_for_metric(bed, ACCEPTED, 1)
    old = bed.status()
    assert b"takes over" in bed.run(VNET, "restart", "all", "--drain", timeout=90).stdout
    found = wait_for_metric(bed, ACCEPTED, before[ACCEPTED])
    assert found["vnet_start_time_seconds",] == before["vnet_start_time_seconds",]
    cpu = ("vnet_worker_cpu_seconds_total", "metrics")
    assert found[cpu] >= before[cpu]
    new = bed.status()
    assert new["supervisor"]["pid"] == old["supervisor"]["pid"]
    assert new["workers"][5]["name"] == "metrics"
    assert new["workers"][5]["pid"] != old["workers"][5]["pid"]
    assert new["workers"][5]["restarts"] == old["workers"][5]["restarts"]


# -- without a cluster: the socket --


def refuses(bed: Bed, port: int = PORT) -> bool:
    try:
        bed.connect("127.0.0.1", port).close()
    except ConnectionRefusedError:
        return True
    return False


def names(bed: Bed) -> list[str]:
    return [worker["name"] for worker in bed.status()["workers"]]


def is_ready(bed: Bed) -> bool:
    # While one follows another there may be none.
    rows = [worker for worker in bed.status()["workers"] if worker["name"] == "metrics"]
    return [row["state"] for row in rows] == ["ready"]


def test_reload_switches_metrics_on_moves_them_and_switches_them_off():
    with bare_bed() as bed, supervisor_in(bed, config=OFF):
        bed.wait_for_health("degraded")  # nobody has logged in
        reasons = bed.status()["reasons"]
        pids = bed.pids()
        assert "metrics" not in pids
        assert refuses(bed)
        path = bed.directory / "vnet.toml"

        def reload(config: str) -> str:
            path.write_text(config)
            return bed.reload()

        assert "in force now: metrics.listen" in reload(CONFIG)
        wait_until(lambda: not refuses(bed), "metrics are served")
        assert scrape(bed)["vnet_worker_up", "tun"] == 1

        moved = CONFIG.replace(str(PORT), str(PORT + 1))
        reload(moved)
        wait_until(lambda: not refuses(bed, PORT + 1), "metrics have moved")
        assert scrape(bed, PORT + 1)["vnet_worker_up", "tun"] == 1
        wait_until(lambda: refuses(bed), "the old process has let go of its address")

        # To one that the old process still has for a moment.
        reload(moved.replace("127.0.0.1", "0.0.0.0"))
        wait_until(lambda: not refuses(bed, PORT + 1), "metrics are served everywhere")
        wait_until(lambda: is_ready(bed), "the worker is ready")
        assert bed.status()["reasons"] == reasons

        with bed.open_socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", PORT))
            other.listen()
            reload(CONFIG)
            wait_until(lambda: len(bed.status()["reasons"]) > len(reasons), "there is a reason")
            [reason] = [text for text in bed.status()["reasons"] if text not in reasons]
            assert reason.startswith(f"Metrics are not served: 127.0.0.1:{PORT} is used by another")
            assert "metrics" not in names(bed)
        wait_until(lambda: not refuses(bed), "the address is taken once it is free")
        wait_until(lambda: bed.status()["reasons"] == reasons, "the reason is gone")

        reload(OFF)
        wait_until(lambda: "metrics" not in names(bed), "the worker is gone")
        wait_until(lambda: refuses(bed), "nobody listens")
        now = bed.pids()
        assert now == pids, "no other worker was touched"


def test_taken_address_is_a_conflict_by_hand_and_a_reason_as_a_service():
    with bare_bed() as bed, contextlib.ExitStack() as taken:
        other = taken.enter_context(bed.open_socket())
        other.bind(("127.0.0.1", PORT))
        other.listen()
        path = bed.directory / "vain.toml"
        path.write_text(CONFIG)
        done = bed.run(
            SUPERVISOR, "--config", str(path), "--run-dir", str(bed.directory / "vain"),
            "--state-dir", str(bed.directory / "vain-state"), timeout=30,
        )  # fmt: skip
        [line] = lines_of(done.stderr)
        assert done.returncode == 6
        assert f"127.0.0.1:{PORT} is used by another program" in line
        assert "metrics.listen" in line
        assert not (bed.directory / "vain").exists()
        assert "vnet0" not in bed.output("ip", "link")

        manager = taken.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(bed.directory / "notify"))
        with supervisor_in(
            bed, config=CONFIG, env={"NOTIFY_SOCKET": str(bed.directory / "notify")}
        ):
            wait_until(
                lambda: (
                    bed.health() == "degraded"
                    and all(worker["state"] == "ready" for worker in bed.status()["workers"])
                ),
                "it works without metrics",
            )
            assert any("Metrics are not served" in text for text in bed.status()["reasons"])
            other.close()
            wait_until(lambda: not refuses(bed), "it is served once the address is free")
            assert scrape(bed)["vnet_worker_up", "dns"] == 1


def test_stopped_worker_is_replaced():
    with bare_bed() as bed, supervisor_in(bed, config=CONFIG):
        bed.wait_for_health("degraded")
        wait_until(lambda: is_ready(bed), "the worker is ready")
        pid = bed.worker("metrics")["pid"]
        bed.kill(pid, signal.SIGSTOP)
        bed.wait_for_successor("metrics", pid)
        assert scrape(bed)["vnet_worker_restarts_total", "metrics"] == 1

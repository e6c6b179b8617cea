"""The metrics worker in a running supervisor, and what it is told; the other workers are pretended."""

import contextlib
import os
import resource
import signal
import socket
import time
import types
import urllib.request
from pathlib import Path

import msgspec
import pretend_worker
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from run_fakes import CLUSTER, FakeRun, make_workers
from supervised_run import SupervisedRun, supervised_run

from ipc import codec, counters
from ipc import messages as m
from ipc.permits import Role
from supervisor import control_messages as cm
from supervisor import metrics_endpoint, metrics_figures, metrics_socket
from supervisor.cli import replacement
from supervisor.clusters import ClusterView
from supervisor.exits import ConflictError, ExitStatus, MisconfiguredError
from supervisor.metrics_endpoint import MetricsEndpoint
from supervisor.metrics_figures import Figures
from supervisor.worker import LastExit
from supervisor.worker_states import WorkerState
from workers.metrics import worker as metrics_worker

READY, FAILED = WorkerState.READY, WorkerState.FAILED


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as end:
        return f"127.0.0.1:{end.getsockname()[1]}"


def scrape(address: str) -> dict[tuple, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def wait_for_metric(run: SupervisedRun, address: str, name: tuple, value: float) -> None:
    def is_so(_found: object) -> bool:
        with contextlib.suppress(OSError):
            return scrape(address).get(name) == value
        return False

    run.wait_for(is_so)


@contextlib.contextmanager
def served_run(directory: Path, **behaviours: pretend_worker.Behaviour):
    """A run with the real metrics worker, and where it serves."""
    address = free_address()
    config = f'[metrics]\nlisten = "{address}"\n'
    behaviours.setdefault("metrics", metrics_worker.main)
    with supervised_run(directory, config, **behaviours) as run:
        yield run, address


def test_metrics_are_served_and_are_the_last_row(directory):
    with served_run(directory) as (run, address):
        run.wait_until_healthy()
        run.wait_for_worker("metrics", state=READY)
        assert [row.name for row in run.status().workers][-1] == "metrics"
        # What it was told first may be from before tun was ready.
        wait_for_metric(run, address, ("vnet_worker_up", "tun"), 1)
        found = scrape(address)
        wait_for_metric(run, address, ("vnet_health", "healthy"), 1)
        wait_for_metric(run, address, ("vnet_worker_up", "metrics"), 1)
        assert found["vnet_worker_resident_memory_bytes", "tun"] > 1_000_000
        first = found["vnet_snapshot_timestamp_seconds",]
        run.wait_for(lambda _: scrape(address)["vnet_snapshot_timestamp_seconds",] > first)
        assert scrape(address)["vnet_start_time_seconds",] == found["vnet_start_time_seconds",]


def test_totals_outlive_the_processes_that_counted_them(directory, marker):
    def count(name: str, number: int) -> pretend_worker.Behaviour:
        async def behave(runtime):
            runtime.counters |= {name: number, "pending_now": 2, "connections_now": 2}
            await pretend_worker.work(runtime)

        return behave

    behaviours = {
        "proxy_0": count("connections_total", 7),
        "proxy_1": count("connections_total", 100),
        "tun": count("refused_unknown_app", 3),
        "dns": count("queries", 2**63 - 1),
    }
    accepted = ("vnet_connections_total", "accepted")
    with served_run(directory, **behaviours) as (run, address):
        run.wait_until_healthy()
        wait_for_metric(run, address, accepted, 107)
        for slot in ("proxy-0", "tun", "dns"):
            os.kill(run.worker(slot).pid, signal.SIGKILL)
        wait_for_metric(run, address, accepted, 114)
        wait_for_metric(run, address, ("vnet_connections_total", "unknown_app"), 6)
        # What a lying worker can bring it to; and it is still told.
        wait_for_metric(run, address, ("vnet_dns_queries_total",), float(2**63))
        wait_for_metric(run, address, ("vnet_connections_active",), 4)
        found = scrape(address)
        assert found["vnet_worker_restarts_total", "proxy-0"] == 1
        assert found["vnet_worker_restarts_total", "proxy-1"] == 0
        assert found["vnet_queue_length", "held_syns"] == 2


def test_killed_worker_comes_back_and_who_asked_meanwhile_is_answered(directory):
    with served_run(directory) as (run, address):
        run.wait_until_healthy()
        old = run.wait_for_worker("metrics", state=READY).pid
        os.kill(old, signal.SIGKILL)
        # The supervisor listens as well, so nobody is refused.
        assert scrape(address)["vnet_worker_up", "tun"] == 1
        assert run.wait_for_worker("metrics", state=READY, restarts=1).pid != old
        run.wait_until_healthy()


def test_replacing_it_loses_no_request(directory):
    with served_run(directory) as (run, address):
        run.wait_until_healthy()
        before = run.wait_for_worker("metrics", state=READY).pid
        host, _, port = address.partition(":")
        # One that is in the middle of its request when the worker is told to drain.
        with socket.create_connection((host, int(port)), timeout=20) as half:
            half.sendall(b"GET /metrics HTTP/1.1\r\n")
            scrape(address)  # a later connection: the half one was accepted
            told: list[str] = []
            assert replacement.replace(run.run_dir, "metrics", told.append) == 0
            half.sendall(f"Host: {address}\r\n\r\n".encode())
            assert half.recv(100).startswith(b"HTTP/1.1 200 ")
        assert scrape(address)["vnet_worker_restarts_total", "metrics"] == 0
        run.wait_for(lambda found: len(found.workers) == 6)
        assert run.worker("metrics").pid != before


def test_worker_that_is_given_up_degrades_and_nothing_else(directory, marker):
    behave = pretend_worker.crash_while(marker)
    with served_run(directory, metrics=behave) as (run, _):
        found = run.wait_for(
            lambda found: found.workers[-1].state is FAILED and found.health == "degraded"
        )
        [reason] = found.reasons
        assert "The worker metrics ended with status 9 too often" in reason
        assert "vnet restart metrics" in reason
        others = [row for row in found.workers if row.name != "metrics"]
        assert {row.state for row in others} == {READY}
        assert sum(row.restarts for row in others) == 0
        assert "VNet is ready after" in run.log
        marker.is_set = False
        run.order(cm.Restart(worker="metrics"))
        run.wait_until_healthy()


def test_nobody_waits_for_it_at_the_start(directory):
    with served_run(directory, metrics=pretend_worker.never_ready) as (run, _):
        found = run.wait_until_healthy()
        assert found.workers[-1].state is WorkerState.STARTING


def test_hung_one_is_replaced(directory, marker):
    behave = pretend_worker.once(marker, pretend_worker.hang)
    with served_run(directory, metrics=behave) as (run, _):
        run.wait_for_worker("metrics", state=READY, restarts=1)
        assert "metrics hangs, its stack follows" in run.log


@pytest.mark.parametrize(
    "message",
    [
        m.PeerMisbehaved(slot="dns", reason="x"),
        m.NeedsRestart(reason="x"),
        m.ClustersReported(clusters=[]),
        m.OpenListener(address=b"\x64\x40\0\5", port=80),
    ],
    ids=lambda message: type(message).__name__,
)
def test_it_may_say_nothing_but_that_it_lives(directory, marker, message):
    behave = pretend_worker.once(marker, pretend_worker.send_raw(codec.encode(message)))
    with served_run(directory, metrics=behave) as (run, _):
        run.wait_for_worker("metrics", state=READY, restarts=1)
        assert f"metrics may not send {type(message).__name__}" in run.log
        assert run.worker("dns").restarts == 0


# -- the socket --


@pytest.mark.parametrize(
    ("listen", "hosts"),
    [
        ("127.0.0.1:{port}", ["127.0.0.1"]),
        ("localhost:{port}", ["127.0.0.1"]),
        ("[::1]:{port}", ["::1"]),
        ("[::]:{port}", ["::1", "127.0.0.1"]),
    ],
)
def test_listens_where_it_was_told(listen, hosts):
    port = free_address().partition(":")[2]
    with metrics_socket.listen(listen.format(port=port)) as end:
        assert not end.getblocking()
        assert not os.get_inheritable(end.fileno())
        for host in hosts:
            socket.create_connection((host, int(port)), timeout=5).close()


def test_address_that_cannot_be_had_says_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConflictError, match="used by another program: end that one") as caught:
            metrics_socket.listen(taken)
        assert caught.value.status is ExitStatus.CONFLICT
    with pytest.raises(MisconfiguredError, match=r"no such address as 192\.0\.2\.1:9464"):
        metrics_socket.listen("192.0.2.1:9464")


def test_address_that_is_taken_is_tried_until_it_is_free():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        endpoint = MetricsEndpoint(address)
        assert not endpoint.is_open(1.0)
        told = f"Metrics are not served: {address} is used by another program: end that one, or "
        assert endpoint.problems == [f"{told}set metrics.listen to another port."]
    assert not endpoint.is_open(1.0 + metrics_endpoint.RETRY_SECONDS / 2)  # not at each turn
    assert endpoint.is_open(1.0 + metrics_endpoint.RETRY_SECONDS)
    assert endpoint.problems == []
    endpoint.close()


def test_another_program_of_this_process_tells_the_same_start():
    """A start that moves by a millisecond would be one to whoever watches for changes."""
    endpoint = MetricsEndpoint(free_address())
    assert endpoint.is_open(0.0)
    assert endpoint.keep().started_at is None
    told = endpoint.figures(ready_run(), "healthy", 1.0).started_at
    kept = endpoint.keep()
    later = MetricsEndpoint(
        endpoint.wanted, msgspec.structs.replace(kept, descriptor=os.dup(kept.descriptor))
    )
    assert later.figures(ready_run(), "healthy", 2.0).started_at == told
    endpoint.close()
    later.close()


@pytest.mark.parametrize("elsewhere", [True, False])
def test_change_that_another_program_of_this_process_finds_is_one(elsewhere):
    """It reads the configuration too; the socket that it is handed is that of the old address."""
    first, second = free_address(), free_address() if elsewhere else ""
    endpoint = MetricsEndpoint(first)
    assert endpoint.is_open(0.0)
    kept = endpoint.keep()
    later = MetricsEndpoint(
        second, msgspec.structs.replace(kept, descriptor=os.dup(kept.descriptor))
    )
    endpoint.close()
    assert later.is_open(1.0)
    assert later.wanted == first
    assert later.use(second, 1.0)
    metrics_socket.listen(first).close()
    assert later.is_open(1.5) is elsewhere
    later.close()


def test_change_frees_the_old_address_and_is_patient_with_the_new_one():
    first = free_address()
    endpoint = MetricsEndpoint(first)
    assert endpoint.is_open(0.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        second = f"127.0.0.1:{other.getsockname()[1]}"
        assert not endpoint.use(first, 1.0)
        assert endpoint.use(second, 1.0)
        assert endpoint.descriptor is None
        metrics_socket.listen(first).close()
        assert not endpoint.is_open(1.5)
        assert endpoint.problems == []
        assert not endpoint.is_open(1.0 + metrics_endpoint.GRACE_SECONDS)
        assert len(endpoint.problems) == 1
    assert endpoint.use("", 10.0)
    assert (endpoint.problems, endpoint.is_open(20.0), endpoint.keep()) == ([], False, None)


# -- the figures --


def ready_run() -> FakeRun:
    run = FakeRun(workers=make_workers("tun", "proxy-0", "dns"))
    for worker in run.workers.values():
        worker.state = READY
    run.started_at = time.monotonic() - 100
    return run


def test_counters_of_all_processes_are_added_and_unknown_ones_left_out():
    run = ready_run()
    run.past_counters = {"proxy.bytes_sent": 1000, "bytes_sent": 5, "proxy.connections_now": 9}
    run.others = list(make_workers("proxy-0").values())
    run.workers["proxy-0"].counters = {"bytes_sent": 30, "connections_now": 2, "x" * 64: 1}
    run.others[0].counters = {"bytes_sent": 4, "connections_now": 1}
    found = Figures().collect(run, "healthy").counters
    assert found["proxy.bytes_sent"] == 1034
    assert set(found) == {n for role in counters.SERVED for n in counters.served(role, {})}


def test_workers_are_shown_by_slot(monkeypatch):
    run = ready_run()
    run.workers["dns"].state = WorkerState.BACKOFF
    run.workers["dns"].restarts = 3
    run.workers["dns"].last_exit = LastExit.of(9)
    run.workers["tun"].last_heartbeat = time.monotonic() - 5
    monkeypatch.setattr(
        metrics_figures.Worker, "pid", property(lambda w: os.getpid() if w.slot == "tun" else None)
    )
    found = {each.slot: each for each in Figures().collect(run, "healthy").workers}
    assert list(found) == ["tun", "proxy-0", "dns"]
    assert (found["dns"].is_up, found["dns"].restarts) == (False, 3)
    assert found["dns"].heartbeat_age_seconds is None
    assert found["tun"].is_up
    assert 5 <= found["tun"].heartbeat_age_seconds < 60
    assert found["tun"].resident_bytes > 1_000_000
    assert found["proxy-0"].resident_bytes == 0


def test_cpu_time_never_falls_when_processes_come_and_go(monkeypatch):
    """A successor beside the old process, then alone: a counter that fell would look like a restart."""
    run = ready_run()
    used = {10: 5000, 11: 1000}
    pids = {id(run.workers["proxy-0"]): 10}
    monkeypatch.setattr(metrics_figures.Worker, "pid", property(lambda w: pids.get(id(w))))
    monkeypatch.setattr(metrics_figures, "_process", lambda pid: pid)
    monkeypatch.setattr(metrics_figures, "_memory", lambda _process: 100)
    monkeypatch.setattr(metrics_figures, "_cpu", lambda process: used.get(process, 0))
    figures = Figures()

    def look() -> m.WorkerFigures:
        found = figures.collect(run, "healthy").workers
        return next(each for each in found if each.slot == "proxy-0")

    assert (look().cpu_seconds, look().resident_bytes) == (5.0, 100)
    [old] = make_workers("proxy-0").values()
    run.others, pids[id(old)] = [old], 10
    pids[id(run.workers["proxy-0"])] = 11
    run.workers["proxy-0"].started_at = 1.0
    assert (look().cpu_seconds, look().resident_bytes) == (6.0, 200)
    used[10] = 5500
    assert look().cpu_seconds == 6.5
    run.others = []
    assert (look().cpu_seconds, look().resident_bytes) == (6.5, 100)
    used[11] = 0  # it has ended, and was not reaped yet
    assert look().cpu_seconds == 6.5
    # Another program of this process; what it adopts ends before it has looked once.
    figures = Figures(figures.past_cpu, figures.started_at, figures.processes())
    assert look().cpu_seconds == 6.5
    figures = Figures(figures.past_cpu, figures.started_at, figures.processes())
    pids.clear()
    assert look().cpu_seconds == 6.5


@pytest.mark.parametrize("times", [(1.13, 0.0), (2.01, 0.0), (0.1, 0.2), (1.01, 1.02)])
def test_cpu_time_does_not_fall_by_a_digit_when_the_process_ends(monkeypatch, times):
    run = ready_run()
    pids = {id(run.workers["dns"]): os.getpid()}
    monkeypatch.setattr(metrics_figures.Worker, "pid", property(lambda w: pids.get(id(w))))
    used = types.SimpleNamespace(user=times[0], system=times[1])
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda _process: used)
    figures = Figures()
    before = figures.collect(run, "healthy").workers[2].cpu_seconds
    assert before == pytest.approx(sum(times))
    pids.clear()
    assert figures.collect(run, "healthy").workers[2].cpu_seconds == before


def test_figures_are_there_when_no_descriptor_is_left(monkeypatch):
    run, figures = ready_run(), Figures()
    before = figures.collect(run, "healthy")
    assert before.resident_bytes > 1_000_000
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as closing:
        # Before any is freed.
        closing.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
        found = figures.collect(run, "healthy")
    assert found.resident_bytes == 0
    # A total that fell would look like a restart.
    assert found.cpu_seconds >= before.cpu_seconds > 0


def test_process_that_could_not_be_looked_at_is_looked_at_again(monkeypatch):
    run = ready_run()
    monkeypatch.setattr(
        metrics_figures.Worker, "pid", property(lambda w: os.getpid() if w.slot == "tun" else None)
    )
    figures = Figures()
    with monkeypatch.context() as full:
        full.setattr(metrics_figures, "_process", lambda _pid: None)  # no descriptor is left
        assert figures.collect(run, "healthy").workers[0].resident_bytes == 0
    assert figures.collect(run, "healthy").workers[0].resident_bytes > 1_000_000


def test_clusters_are_bounded_and_their_times_read():
    run = ready_run()
    many = [
        msgspec.structs.replace(CLUSTER, name=f"c{number}", expires=expires)
        for number, expires in enumerate(["2026-11-22T21:00:00Z", "never", None] * 50)
    ]
    run.report = ClusterView(many, "")
    found = Figures().collect(run, "healthy")
    assert found.cluster_count == 150
    assert len(found.clusters) == 100
    assert [each.expires for each in found.clusters[:3]] == [1795381200.0, None, None]
    assert codec.decode(codec.encode(found), Role.SUPERVISOR, Role.METRICS) == found
    run.report = None
    assert Figures().collect(run, "starting").clusters == []


def test_names_of_any_length_fit_into_a_message():
    """Only a proxy that lies has such; one that is too large would never be told."""
    name = "\U0001f600" * 253
    run = ready_run()
    run.report = ClusterView([msgspec.structs.replace(CLUSTER, name=name, profile=name)] * 150, "")
    found = Figures().collect(run, "healthy")
    assert found.cluster_count == 150
    assert 40 < len(found.clusters) < 100
    assert codec.decode(codec.encode(found), Role.SUPERVISOR, Role.METRICS) == found

import itertools
import json
import logging
import os

import msgspec
import pytest
from run_fakes import CLUSTER, FakeRun, make_workers

from ipc import messages as m
from supervisor import access, status, status_report
from supervisor import control_messages as cm
from supervisor.cli import status_view
from supervisor.clusters import ClusterView
from supervisor.commands import Commands
from supervisor.config import Config
from supervisor.control import Promise
from supervisor.exits import ExitStatus
from supervisor.run import Run
from supervisor.settings import version
from supervisor.status import Health, LastExitStatus, WorkerStatus, judge
from supervisor.status_report import StatusReporter
from supervisor.worker import LastExit
from supervisor.worker_states import WorkerState

# What docs and scripts rely on: `vnet status --json` of the contract, by its keys.
KEYS = {
    "": ["schema", "health", "reasons", "reason_ids", "supervisor", "workers", "network", "clusters", "connections",
        "security", "warnings"],
    "supervisor": ["pid", "version", "uptime_seconds", "user"],
    "workers": [
        "name", "pid", "state", "restarts", "uptime_seconds", "heartbeat_age_seconds",
        "rss_bytes", "cpu_percent", "last_exit", "confinement",
    ],
    "network": [
        "interface", "mtu", "ipv4_cidr_ranges", "ipv6_prefix", "dns_addresses", "dns_zones",
        "os_integration", "data_plane",
    ],
    "clusters": ["name", "profile", "leaf_of", "state", "user", "expires"],
    "connections": ["active", "total", "failed", "bytes_sent", "bytes_received"],
    "security": ["user_check", "http_check", "http_unchecked", "users_refused", "http_refused"],
}  # fmt: skip
QUIET = msgspec.convert({"dns": {"os_integration": "none"}}, Config)


def ready_run(**changed: object) -> FakeRun:
    run = FakeRun(**changed)
    run.settings = msgspec_replace(run.settings, config=QUIET)
    for worker in run.workers.values():
        worker.state = WorkerState.READY
    return run


def msgspec_replace(settings, **changed):
    import dataclasses

    return dataclasses.replace(settings, **changed)


def worker_status(state: WorkerState, last_exit: LastExitStatus | None = None) -> WorkerStatus:
    return WorkerStatus(
        name="dns", pid=1, state=state, restarts=0, uptime_seconds=1.0, heartbeat_age_seconds=0.1,
        rss_bytes=1, cpu_percent=0.0, last_exit=last_exit,
    )  # fmt: skip


def collected(run: Run) -> dict:
    return json.loads(msgspec.json.encode(StatusReporter(run).collect(os.getpid())))


def test_answer_has_the_keys_of_the_contract():
    found = collected(ready_run())
    assert list(found) == KEYS[""]
    for part, keys in KEYS.items():
        value = found[part] if part else found
        assert list(value[0] if isinstance(value, list) else value) == keys
    assert found["schema"] == 1
    assert found["health"] == "healthy"
    assert found["reasons"] == []
    assert [worker["name"] for worker in found["workers"]] == ["tun", "proxy-0", "proxy-1", "dns"]


def test_network_is_shown_as_text():
    assert collected(ready_run())["network"] == {
        "interface": "vnet0",
        "mtu": 65535,
        "ipv4_cidr_ranges": ["100.64.0.0/10"],
        "ipv6_prefix": "fd60:67ec:4325::",
        "dns_addresses": ["100.64.0.2", "fd60:67ec:4325::2"],
        "dns_zones": ["teleport.demo.test", "demo.test"],
        "os_integration": "none",
        "data_plane": "namespace",
    }


def test_running_process_is_measured_and_one_that_is_gone_is_not(monkeypatch):
    run = ready_run()
    pids = {"tun": os.getpid(), "dns": 2**22 + 1}  # the latter is above pid_max
    monkeypatch.setattr(
        status_report.Worker, "pid", property(lambda worker: pids.get(worker.slot)), raising=True
    )
    by_name = {worker["name"]: worker for worker in collected(run)["workers"]}
    assert by_name["tun"]["rss_bytes"] > 1_000_000
    assert by_name["tun"]["cpu_percent"] >= 0
    assert by_name["dns"]["rss_bytes"] is None
    assert by_name["proxy-0"]["pid"] is None


def test_totals_outlive_the_worker_that_counted_them():
    run = ready_run(past_counters={"connections_total": 5, "bytes_sent": 2**63 - 1})
    run.workers["proxy-0"].counters = {"connections_total": 2, "connections_now": 1}
    run.workers["proxy-1"].counters = {"connections_now": 2, "bytes_sent": 2**63 - 1}
    found = collected(run)["connections"]
    assert (found["total"], found["active"]) == (7, 3)
    assert found["bytes_sent"] == 2**64 - 2  # what lying workers can bring it to, and no error


def test_last_exit_is_a_status_or_a_signal():
    run = ready_run()
    run.workers["dns"].last_exit = LastExit.of(9)  # waitpid: killed by signal 9
    run.workers["tun"].last_exit = LastExit.of(70 << 8)
    by_name = {worker["name"]: worker["last_exit"] for worker in collected(run)["workers"]}
    assert by_name["dns"] == {"status": None, "signal": "SIGKILL"}
    assert by_name["tun"] == {"status": 70, "signal": None}
    assert str(LastExit.of(50)) == "signal 50"  # a realtime signal has no name


# -- health --


def health_of(*workers: WorkerStatus, were_ready=True, known=True, clusters=(), others=()):
    return judge(
        workers, clusters, clusters_are_known=known, were_ready=were_ready, other_reasons=others
    )


def test_all_ready_and_clusters_known_is_healthy():
    assert health_of(worker_status(WorkerState.READY)) == (Health.HEALTHY, [])


@pytest.mark.parametrize("state", [state for state in WorkerState if state != "ready"])
def test_worker_that_is_not_ready_makes_it_degraded_once_all_have_been(state):
    health, [reason] = health_of(worker_status(state))
    assert health is Health.DEGRADED
    assert "dns" in reason


@pytest.mark.parametrize("state", [WorkerState.STARTING, WorkerState.BACKOFF, WorkerState.STOPPED])
def test_it_is_starting_until_all_have_been_ready(state):
    health, reasons = health_of(worker_status(state), were_ready=False)
    assert health is Health.STARTING
    assert reasons


def test_worker_that_is_given_up_before_it_was_ever_ready_is_no_start():
    killed = LastExitStatus(status=None, signal="SIGSEGV")
    health, [reason] = health_of(worker_status(WorkerState.FAILED, killed), were_ready=False)
    assert health is Health.DEGRADED
    assert reason.startswith("The worker dns ended with SIGSEGV too often")
    assert "vnet restart dns" in reason


def test_it_is_starting_until_the_clusters_are_known():
    health, reasons = health_of(worker_status(WorkerState.READY), known=False)
    assert health is Health.STARTING
    assert len(reasons) == 1


def test_trouble_of_clusters_and_others_is_told_once_each():
    problem = msgspec.structs.replace(CLUSTER, problem="Run tsh login.")
    found = health_of(
        worker_status(WorkerState.READY), clusters=[problem, problem], others=["Free the disk."]
    )
    assert found == (Health.DEGRADED, ["Run tsh login.", "Free the disk."])


def test_every_reason_is_a_sentence_and_health_never_contradicts_it():
    for state, were_ready, known in itertools.product(WorkerState, (True, False), (True, False)):
        health, reasons = health_of(worker_status(state), were_ready=were_ready, known=known)
        assert (health is Health.HEALTHY) == (reasons == [])
        assert all(reason[0].isupper() for reason in reasons)


def test_what_sets_up_the_resolver_is_named_and_its_problems_are_reasons():
    run = ready_run(os_integration="resolved", os_problems=["Start systemd-resolved."])
    found = collected(run)
    assert found["health"] == "degraded"
    assert found["reasons"] == ["Start systemd-resolved."]
    assert found["network"]["os_integration"] == "resolved"


def test_health_has_its_exit_status():
    assert {health: int(found) for health, found in status.EXIT_OF_HEALTH.items()} == {
        "healthy": 0,
        "degraded": 1,
        "starting": 1,
        "stopped": 3,
    }


@pytest.mark.parametrize("report", [None, ClusterView([], "")])
def test_text_for_people_fits_80_columns(report):
    run = ready_run(report=report)
    decoded = msgspec.convert(collected(run), status.Status)
    lines = list(status_view.lines(decoded))
    assert lines[0].startswith("VNet is ")
    assert max(map(len, lines)) <= 80


def test_what_is_missing_of_the_confinement_is_a_note_and_no_degradation():
    run = ready_run()
    for slot, missing in (
        ("tun", ["this kernel has no Landlock"]),
        ("dns", []),
        ("proxy-0", ["x"]),
    ):
        run.workers[slot].confinement = m.Confined(
            uid=7,
            no_new_privs=True,
            capabilities=[],
            landlock=None,
            seccomp="allow-list",
            missing=missing,
        )
    run.workers["dns"].confinement = run.workers["tun"].confinement
    found = StatusReporter(run).collect(os.getpid())
    assert found.health is Health.HEALTHY
    lines = list(status_view.lines(found))
    assert [line for line in lines if line.startswith("note")] == [
        "note, tun, dns: this kernel has no Landlock",
        "note, proxy-0: x",
    ]
    by_name = {worker["name"]: worker["confinement"] for worker in collected(run)["workers"]}
    assert by_name["proxy-1"] is None
    assert by_name["tun"] == {
        "uid": 7, "no_new_privs": True, "capabilities": [], "landlock": None,
        "seccomp": "allow-list", "missing": ["this kernel has no Landlock"],
    }  # fmt: skip


# -- commands --


@pytest.fixture
def run():
    return ready_run()


def ask(run: FakeRun, request: cm.AnyRequest | bytes, uid: int = 0) -> dict:
    line = request if isinstance(request, bytes) else cm.encode(request)
    answer = Commands(run).answer(uid, line)
    assert answer.endswith(b"\n")
    assert answer.count(b"\n") == 1
    return json.loads(answer)


def test_root_and_the_user_see_everything_and_others_the_summary(run):
    for uid in (0, run.settings.user.uid):
        assert list(ask(run, cm.Status(), uid)) == KEYS[""]
    summary = {"schema": 1, "health": "healthy", "reasons": [], "reason_ids": []}
    assert ask(run, cm.Status(), uid=12345) == summary


@pytest.mark.parametrize(
    "request_",
    [cm.Stop(), cm.Reload(), cm.Restart(worker="dns"), cm.LogLevel(level=cm.Level.DEBUG)],
    ids=lambda request_: type(request_).__name__,
)
def test_others_may_order_nothing(run, request_):
    answer = ask(run, request_, uid=12345)
    assert answer["status"] == ExitStatus.NOT_PERMITTED
    assert "alice" in answer["text"]
    assert run.orders == []


@pytest.mark.parametrize(
    "line",
    [
        b"", b"status", b"{}", b"[]", b"null", b'{"command":"explode"}', b'{"command":1}', b"\xff",
        b'{"command":"restart"}', b'{"command":"restart","worker":""}', b"[" * 3000,
        b'{"command":"log-level","level":"all"}', b'{"command":"log-level","level":"info\\n"}',
    ],
)  # fmt: skip
def test_what_is_no_request_is_answered_as_wrong_usage(run, line):
    answer = ask(run, line)
    assert answer["status"] == ExitStatus.USAGE
    assert run.orders == []


def test_replacing_all_is_an_upgrade_that_is_answered_later(run):
    line = cm.encode(cm.Restart(worker="all", drain=True))
    assert isinstance(Commands(run).answer(0, line), Promise)
    assert run.orders == ["upgrade"]


def test_commands_reach_the_run(run):
    assert ask(run, cm.Stop())["status"] == 0
    assert ask(run, cm.Restart(worker="dns"))["text"] == "restarting dns"
    ask(run, cm.Restart(worker="all"))
    assert ask(run, cm.Restart(worker="proxy-0", drain=True))["status"] == 0
    level = logging.getLogger().level
    ask(run, cm.LogLevel(level=cm.Level.WARNING))
    logging.getLogger().setLevel(level)
    assert run.orders == [
        "stop",
        ("restart", "dns"),
        *(("restart", slot) for slot in run.workers),
        ("replace", ["proxy-0"]),
        ("level", "WARNING"),
    ]


def test_unknown_worker_is_answered_with_those_there_are(run):
    answer = ask(run, cm.Restart(worker="proxy-7"))
    assert answer["status"] == ExitStatus.USAGE
    assert "tun, proxy-0, proxy-1, dns" in answer["text"]
    assert run.orders == []


def test_reload_takes_over_what_it_can_and_names_the_rest(run, tmp_path):
    path = tmp_path / "vnet.toml"
    run.settings = msgspec_replace(run.settings, config=Config(), config_path=path)
    path.write_text('dns.upstream = ["192.0.2.1"]')
    text = "reloaded, in force now: dns.upstream"
    assert ask(run, cm.Reload()) == {"status": 0, "text": text}
    [(_, planned)] = run.orders
    assert planned.config.dns.upstream == ["192.0.2.1"]
    path.write_text('user = "bob"\nnetwork.mtu = 1500\ndns.upstream = []')
    assert ask(run, cm.Reload())["text"].endswith("need a restart of VNet: user, network.mtu")


def test_reload_names_the_workers_that_have_not_taken_it_over(run, tmp_path):
    path = tmp_path / "vnet.toml"
    run.settings = msgspec_replace(run.settings, config=Config(), config_path=path)
    run.late = ["proxy-0", "dns"]
    path.write_text('dns.upstream = ["192.0.2.1"]')
    assert ask(run, cm.Reload())["text"] == (
        "reloaded, in force now: dns.upstream; not taken over yet, see vnet status: proxy-0, dns"
    )


@pytest.mark.parametrize("text", ["network.mtu = 1", "[[["])
def test_wrong_configuration_is_not_taken_over(run, tmp_path, text):
    path = tmp_path / "vnet.toml"
    path.write_text(text)
    run.settings = msgspec_replace(run.settings, config_path=path)
    assert ask(run, cm.Reload())["status"] == ExitStatus.USAGE
    assert run.orders == []


def test_reload_changes_nothing_when_the_system_does_not_say_who_is_meant(
    run, tmp_path, monkeypatch
):
    path = tmp_path / "vnet.toml"
    path.write_text('security.allow_users = ["bob"]')
    run.settings = msgspec_replace(run.settings, config_path=path)
    monkeypatch.setattr(access, "_LOOKUP", ("/nowhere/python",))
    answer = ask(run, cm.Reload())
    assert answer["status"] == ExitStatus.USAGE
    assert answer["text"].startswith("the configuration was not taken over: security.allow_users")
    assert run.orders == []


def test_version_is_that_of_the_package():
    assert collected(ready_run())["supervisor"]["version"] == version()
    assert make_workers("dns")["dns"].pid is None


def test_security_says_what_is_off_and_what_was_refused():
    run = ready_run(past_counters={"refused_users": 3, "http_refused": 1})
    run.workers["proxy-0"].counters = {"refused_users": 2}
    run.workers["proxy-1"].counters = {"http_refused": 5}
    # Questions for names are no connections.
    run.workers["dns"].counters = {"refused_users": 100}
    found = StatusReporter(run).collect(1)
    assert found.security is not None
    assert (found.security.users_refused, found.security.http_refused) == (5, 6)
    assert (found.security.user_check, found.security.http_check) == ("on", "on")
    assert found.security.http_unchecked == []
    assert found.warnings == []
    told = "5 connections of users who may not connect refused, 6 HTTP requests refused"
    assert f"security: {told}" in "\n".join(status_view.lines(found))


def test_security_that_is_off_and_warnings_are_shown_and_degrade_nothing():
    run = ready_run(access_warnings=["Beware of this."], forwarding_warnings=["And of that."])
    rules = {"allow_users": [], "http_hosts": {"b.test": ["*"], "a.test": ["*"], "c.test": ["x"]}}
    config = msgspec.convert({"dns": {"os_integration": "none"}, "security": rules}, Config)
    run.settings = msgspec_replace(run.settings, config=config)
    run.access = m.Access(uids=[], is_checked=False)
    found = StatusReporter(run).collect(1)
    assert found.health is Health.HEALTHY
    assert found.security is not None
    assert found.security.user_check == "off"
    assert found.security.http_unchecked == ["a.test", "b.test"]
    shown = list(status_view.lines(found))
    assert "security: all users may connect, HTTP requests to 2 apps are not checked" in shown
    assert {"warning: Beware of this.", "warning: And of that."} < set(shown)


def test_a_quiet_machine_has_no_line_about_security():
    assert "security" not in "\n".join(status_view.lines(StatusReporter(ready_run()).collect(1)))


def test_a_kernel_that_cannot_tell_degrades():
    run = ready_run(access_problems=["Nobody may connect: do something."])
    found = StatusReporter(run).collect(1)
    assert found.health is Health.DEGRADED
    assert found.reasons == ["Nobody may connect: do something."]

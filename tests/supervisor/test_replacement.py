"""Workers that are replaced without a gap, in a running supervisor with pretended workers."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pretend_worker
import pytest
from supervised_run import SupervisedRun, supervised_run

from supervisor import control_messages as cm
from supervisor import crew
from supervisor.cli import replacement
from supervisor.cli.control_client import AskError
from supervisor.worker_states import WorkerState

READY, DRAINING = WorkerState.READY, WorkerState.DRAINING


def rows(run: SupervisedRun, slot: str) -> list[tuple[int, WorkerState]]:
    return [(row.pid, row.state) for row in run.status().workers if row.name == slot]


def replace(run: SupervisedRun, worker: str) -> list[str]:
    told: list[str] = []
    assert replacement.replace(run.run_dir, worker, told.append) == 0
    return told


def test_the_old_process_finishes_beside_its_successor(directory, marker):
    with supervised_run(directory, proxy_0=pretend_worker.drain_while(marker)) as run:
        run.wait_until_healthy()
        [(old, _)] = rows(run, "proxy-0")
        told = replace(run, "proxy-0")
        (new, state), (draining, finishing) = rows(run, "proxy-0")
        assert (state, draining, finishing) == (READY, old, DRAINING)
        assert told[-1] == f"proxy-0: process {new} follows {old}"
        assert run.status().health == "healthy"
        assert run.worker("proxy-0").restarts == 0, "it is no crash"
        marker.is_set = False
        run.wait_for(lambda _: rows(run, "proxy-0") == [(new, READY)])


def test_all_are_replaced_one_after_the_other(directory, marker):
    marker.is_set = False
    behave = pretend_worker.drain_while(marker)
    with supervised_run(directory, tun=behave, dns=behave, proxy_0=behave, proxy_1=behave) as run:
        before = {row.name: row.pid for row in run.wait_until_healthy().workers}
        told = replace(run, "tun") + replace(run, "dns") + replace(run, "proxy-1")
        assert len(told) == 6
        run.wait_for(lambda found: len(found.workers) == 5)
        after = {row.name: row.pid for row in run.status().workers}
        assert [name for name in before if before[name] == after[name]] == ["proxy-0", "ssh"]


def test_an_old_process_that_does_not_finish_in_time_is_ended(directory, marker):
    config = "drain_seconds = 1"
    with supervised_run(directory, config, proxy_0=pretend_worker.drain_while(marker)) as run:
        run.wait_until_healthy()
        replace(run, "proxy-0")
        run.wait_for(lambda _: len(rows(run, "proxy-0")) == 1)
        assert "proxy-0 has not finished in time and is ended" in run.log


def test_an_old_process_that_hangs_while_it_finishes_is_ended(directory, marker):
    with supervised_run(directory, proxy_0=pretend_worker.drain_while(marker)) as run:
        run.wait_until_healthy()
        [(old, _)] = rows(run, "proxy-0")
        replace(run, "proxy-0")
        os.kill(old, signal.SIGSTOP)
        run.wait_for(lambda _: len(rows(run, "proxy-0")) == 1)
        assert run.worker("proxy-0").restarts == 0


def test_command_waits_for_a_worker_that_takes_long_to_hand_over(monkeypatch):
    """The next one is forked only then; until then nothing is seen to happen."""
    now, handed_over_at = 0.0, 1 + crew.HANDOVER_SECONDS
    told: list[str] = []

    def row(name: str, pid: int, state: WorkerState = READY) -> SimpleNamespace:
        return SimpleNamespace(name=name, pid=pid, state=state)

    def status(*_arguments: object) -> tuple[SimpleNamespace, bytes]:
        if not now:
            rows = [row("proxy-0", 2), row("ssh", 3)]
        elif now < handed_over_at:
            rows = [row("proxy-0", 12), row("ssh", 3), row("proxy-0", 2, DRAINING)]
        elif now < handed_over_at + 1:
            rows = [row("proxy-0", 12), row("ssh", 3), row("ssh", 13, WorkerState.STARTING)]
        else:
            rows = [row("proxy-0", 12), row("ssh", 13)]
        return SimpleNamespace(workers=rows), b""

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    answer = cm.Answer(status=0, text="takes over")
    monkeypatch.setattr(replacement, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(replacement, "ask_status", status)
    monkeypatch.setattr(replacement, "order", lambda *_: answer)
    assert replacement.replace(Path("run"), "all", told.append) == 0
    assert told == [
        "takes over",
        "proxy-0: process 12 follows 2",
        "ssh: process 13 follows 3",
    ]


def test_a_successor_that_fails_leaves_the_present_one_at_work(directory, marker):
    fails_later = pretend_worker.Marker()
    fails_later.is_set = False

    async def behave(runtime):
        if fails_later.is_set:
            os._exit(9)
        await pretend_worker.drain_while(marker)(runtime)

    with supervised_run(directory, proxy_0=behave) as run:
        run.wait_until_healthy()
        before = rows(run, "proxy-0")
        fails_later.is_set = True
        with pytest.raises(AskError, match="not replaced, the present ones go on"):
            replace(run, "proxy-0")
        assert rows(run, "proxy-0") == before
        assert run.status().health == "healthy"
        assert "proxy-0 is not replaced: its successor ended with status 9" in run.log


def test_one_that_does_not_hand_over_is_killed_and_followed(directory):
    async def never(runtime):
        await runtime.taken_over()
        await pretend_worker.work(runtime)

    with supervised_run(directory, dns=never) as run:
        run.wait_until_healthy()
        [(old, _)] = rows(run, "dns")
        replace(run, "dns")
        run.wait_for(lambda _: len(rows(run, "dns")) == 1)
        assert rows(run, "dns")[0][0] != old
        assert "it did not hand over in time" in run.log


def test_a_plain_restart_ends_what_still_finishes(directory, marker):
    with supervised_run(directory, proxy_0=pretend_worker.drain_while(marker)) as run:
        run.wait_until_healthy()
        replace(run, "proxy-0")
        run.order(cm.Restart(worker="proxy-0"))
        run.wait_for(lambda _: [state for _, state in rows(run, "proxy-0")] == [READY])


def test_vnet_stops_with_processes_that_still_finish(directory, marker):
    with supervised_run(directory, proxy_0=pretend_worker.drain_while(marker)) as run:
        run.wait_until_healthy()
        replace(run, "proxy-0")


def test_totals_of_a_process_that_finishes_count_once(directory, marker):
    async def behave(runtime):
        runtime.counters["connections_total"] = 3
        runtime.counters["connections_now"] = 1
        await pretend_worker.drain_while(marker)(runtime)

    with supervised_run(directory, proxy_0=behave) as run:
        run.wait_for(lambda found: found.connections.total == 3)
        replace(run, "proxy-0")
        run.wait_for(lambda found: (found.connections.total, found.connections.active) == (6, 2))
        marker.is_set = False
        run.wait_for(lambda found: (found.connections.total, found.connections.active) == (6, 1))

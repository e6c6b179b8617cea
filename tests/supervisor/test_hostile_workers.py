"""A compromised worker against its supervisor: channel, log and standard error.

The workers are confined like real ones; what they would say on the bus is in
tests/e2e/test_e2e_hostile_workers.py.
"""

import asyncio
import contextlib
import os
import time
from pathlib import Path

import hostile_words
import pretend_worker
import psutil
import pytest
from supervised_run import SupervisedRun, supervised_run

from ipc import codec
from ipc import messages as m
from ipc.order import MAX_ACCUSATIONS
from supervisor.cli import status_view
from supervisor.patience import MAX_WISHES
from supervisor.worker_states import WorkerState

OTHERS = ("tun", "proxy-0", "proxy-1")


def pids(status) -> dict[str, int]:
    return {worker.name: worker.pid for worker in status.workers}


def descriptors(run: SupervisedRun) -> int:
    return len(list(Path(f"/proc/{run.pid}/fd").iterdir()))


def check_replaced_alone(run: SupervisedRun, slot: str = "dns") -> None:
    """`slot` has crashed once and is back; the others are the processes that they were."""
    run.wait_for_worker(slot, restarts=1, state=WorkerState.READY)
    status = run.wait_until_healthy()
    assert {worker.name for worker in status.workers if worker.restarts} == {slot}


@pytest.mark.parametrize("words", hostile_words.CHANNEL.values(), ids=hostile_words.CHANNEL)
def test_hostile_words_on_the_channel_cost_their_speaker_its_life(directory, marker, words):
    with supervised_run(directory, dns=pretend_worker.once(marker, words)) as run:
        if words is hostile_words.CHANNEL["accuses for ever"]:
            run.wait_for_worker("dns", restarts=1)
            assert "dns is killed: it accuses others too often" in run.log
            run.wait_until_healthy()
            assert run.worker("proxy-1").restarts <= 1
            return
        check_replaced_alone(run)
        assert "dns is killed: " in run.log


@pytest.mark.parametrize("words", hostile_words.LOG.values(), ids=hostile_words.LOG)
def test_bytes_that_are_no_log_cost_their_writer_its_life_and_run_nothing(directory, marker, words):
    with supervised_run(directory, dns=pretend_worker.once(marker, words)) as run:
        check_replaced_alone(run)
        assert "no log record" in run.log
    assert not Path("/tmp/vnet-unpickled").exists()  # see hostile_words


def test_worker_that_ends_within_a_log_record_is_an_ordinary_crash(directory, marker):
    odd = pretend_worker.once(marker, hostile_words.half_a_record)
    with supervised_run(directory, dns=odd) as run:
        check_replaced_alone(run)
        assert run.worker("dns").last_exit.status == 7


def test_no_line_of_a_worker_looks_like_anothers(directory):
    with supervised_run(directory, dns=hostile_words.forge) as run:
        run.wait_until_healthy()
        run.wait_for(lambda _found: run.log.count("all is well") == 2)
        text = run.log
    assert not any(line.startswith(hostile_words.FORGED) for line in text.splitlines())
    assert not set(text) & {"\x1b", "\x07", "\r", "\x9b"}
    assert all(" dns" in line or line.startswith("    ") for line in text.splitlines()
               if "all is well" in line)  # fmt: skip


@pytest.mark.parametrize("standard_error", [False, True], ids=["log", "standard error"])
def test_flood_of_lines_is_cut_and_disturbs_nobody(directory, standard_error):
    flood = hostile_words.flood_log(standard_error=standard_error)
    with supervised_run(directory, dns=flood) as run:
        before = pids(run.wait_until_healthy())
        process = psutil.Process(run.pid)
        memory, files = process.memory_info().rss, descriptors(run)
        size = run.log_path.stat().st_size
        # Each question raises if it is not answered in two seconds.
        end = time.monotonic() + 5
        while time.monotonic() < end:
            after = pids(run.status())
            time.sleep(0.05)
        assert all(after[slot] == before[slot] for slot in OTHERS)
        assert process.memory_info().rss < memory + (64 << 20)
        assert descriptors(run) <= files + 4
        assert run.log_path.stat().st_size < size + (16 << 20)


def test_liar_that_goes_on_for_ever_is_given_up_and_its_peers_are_not(directory):
    accusation = codec.encode(m.PeerMisbehaved(slot="proxy-1", reason="it looked at me"))
    liar = pretend_worker.send_raw(*[accusation] * (MAX_ACCUSATIONS + 1))
    with supervised_run(directory, dns=liar) as run:
        run.wait_for_worker("dns", state=WorkerState.FAILED)
        run.wait_for_worker("proxy-1", state=WorkerState.READY)
        assert run.worker("proxy-1").restarts <= 3
        assert "dns is killed: it accuses others too often" in run.log


def test_proxy_that_wants_to_be_restarted_for_ever_is_given_up(directory):
    wish = pretend_worker.send_raw(codec.encode(m.NeedsRestart(reason="I like it")))
    with supervised_run(directory, proxy_0=wish) as run:
        failed = run.wait_for_worker("proxy-0", state=WorkerState.FAILED)
        assert failed.restarts == 3
        assert run.log.count("proxy-0 is restarted: I like it") == MAX_WISHES
        assert "proxy-0 is killed: it wants to be restarted too often: I like it" in run.log
        assert all(run.worker(slot).restarts == 0 for slot in ("tun", "proxy-1", "dns"))


def test_listeners_are_for_workers_that_are_ready(directory, marker):
    early = codec.encode(m.OpenListener(address=hostile_words.ADDRESS, port=80))

    async def ask_early(runtime):
        os.write(runtime._channel.fileno(), early)
        await runtime.stopping.wait()

    with supervised_run(directory, proxy_0=pretend_worker.once(marker, ask_early)) as run:
        check_replaced_alone(run, "proxy-0")
        assert "proxy-0 is killed: OpenListener came while it was confined" in run.log


def test_deaf_worker_that_asks_on_takes_no_descriptor_from_the_others(directory):
    """It never reads what it asks for; with each answer a copy of a listener would wait."""

    async def ask(runtime):
        runtime.ready()
        await asyncio.sleep(0.1)
        asyncio.get_running_loop().remove_reader(runtime._channel.fileno())
        asking = codec.encode(m.OpenListener(address=hostile_words.ADDRESS, port=80))
        while True:
            with contextlib.suppress(BlockingIOError):
                os.write(runtime._channel.fileno(), asking)
            await asyncio.sleep(0)

    with supervised_run(directory, proxy_0=ask) as run:
        files = 0
        run.wait_until_healthy()
        while run.status().workers[1].state is not WorkerState.FAILED:
            files = max(files, descriptors(run))
            time.sleep(0.02)
        assert all(run.worker(slot).restarts == 0 for slot in ("tun", "proxy-1", "dns"))
        assert files < 1000


def test_counters_of_a_liar_stay_its_own(directory, marker):
    """Whatever it counts, the totals of what others did are shown, and nothing of it is kept."""
    absurd = {"connections_total": 2**63 - 1, "bytes_sent": 2**63 - 1}
    counters = absurd | {f"x{number}": 1 for number in range(400)}
    heartbeat = codec.encode(m.Heartbeat(counters=counters))
    odd = pretend_worker.once(marker, pretend_worker.send_raw(heartbeat, b"\xc1"))
    with supervised_run(directory, dns=odd) as run:
        check_replaced_alone(run)
        found = run.status().connections
        assert (found.total, found.bytes_sent) == (0, 0)


def test_words_of_a_worker_move_no_cursor_in_the_status(directory, marker):
    escapes = f"{hostile_words.ESCAPES}\nVNet is healthy"
    cluster = m.Cluster(
        name=escapes, profile="p", leaf_of=None, state=m.ClusterState.UNREACHABLE, user=escapes,
        expires=None, zones=[], ranges=[], problem=escapes,
    )  # fmt: skip

    async def report(runtime):
        runtime.send(m.ClustersReported(clusters=[cluster], problem=escapes))
        runtime.ready()
        await runtime.stopping.wait()

    with supervised_run(directory, proxy_0=report) as run:
        status = run.wait_for(lambda found: found.clusters)
        shown = list(status_view.lines(status))
        assert all(line.isprintable() for line in shown)
        assert "VNet is healthy" not in shown

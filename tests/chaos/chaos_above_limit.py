"""The other run: a worker is killed until the supervisor gives it up, and brought back by command."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import chaos_traffic
from chaos_accounts import Accounts, Cause, Names, Window, carries, settle
from chaos_bed import Bed, load_of, running
from chaos_processes import processes, strays
from chaos_report import Aim
from chaos_run import AFTER_SECONDS, BEFORE_SECONDS, Wish, owner_of, reach_all_apps
from chaos_watch import View, Watcher

from ipc.slots import SSH
from supervisor.status import Health
from supervisor.worker_states import WorkerState

GIVE_UP_SECONDS = 60.0
STAYS_SECONDS = 2.0
HEALTHY_SECONDS = 30.0
WARM_SECONDS = 2.0


def play(directory: Path, wish: Wish, workers: Sequence[str]) -> dict[str, Any]:
    """Each of the workers in turn, in a bed of its own; the aims in the report are objects."""
    with running(directory, wish.hang_seconds) as bed, Watcher(bed.run_dir) as watcher:
        wish.say(f"above the restart limit: {', '.join(workers)}")
        addresses = reach_all_apps(bed)
        bed.start_load(load_of(bed), wish.seed)
        bed.tell_load("run")
        time.sleep(WARM_SECONDS)
        origin = time.monotonic()
        windows: list[Window] = []
        found = {}
        for worker in workers:
            found[worker] = _one(bed, watcher, worker, addresses, windows)
            wish.say(f"{worker}: {found[worker]}")
        bed.tell_load("pause")
        left = strays(processes(), 1, [*bed.helpers, bed.supervisor_pid], watcher.look().pids)
        accounts = settle(chaos_traffic.read(bed.records_path), windows, [], origin)
        watcher.stop()
        status, _ = bed.stop_supervisor()
        return {
            "mode": "above limit",
            "seed": wish.seed,
            "workers": found,
            "connections": accounts.connections | {"bytes": accounts.bytes} | accounts.cut,
            "status": {
                "answers": watcher.answers,
                "unanswered": len(watcher.unanswered),
                "longest": round(watcher.longest_answer, 3),
            },
            "orphans": left,
            "unexplained": accounts.unexplained,
            "aims": list(_aims(found, accounts, watcher, left, status)),
        }


def _one(
    bed: Bed,
    watcher: Watcher,
    worker: str,
    addresses: dict[str, str],
    windows: list[Window],
) -> dict[str, Any]:
    before, began = watcher.look(), time.monotonic()
    others = {row.name: row.pid for row in before.rows if row.name != worker}
    kills = _kill_until_given_up(watcher, worker)
    failed = watcher.wait(lambda view: _state(view, worker) is WorkerState.FAILED, STAYS_SECONDS)
    took = time.monotonic() - began
    others_work = _others_work(bed, worker, addresses)
    time.sleep(STAYS_SECONDS)
    view = watcher.look()
    stays = _state(view, worker) is WorkerState.FAILED
    kept = all(view.active(name).pid == pid for name, pid in others.items())
    answer = bed.vnet("restart", worker)
    restarted = time.monotonic()
    healthy = watcher.wait(lambda view: view.is_well, HEALTHY_SECONDS)
    if healthy is not None:
        reach_all_apps(bed)
    windows.append(_window(worker, began, time.monotonic()))
    return {
        "kills": kills,
        "failed": failed is not None,
        "failed_after": round(took, 2),
        "stays_failed": stays,
        "health": str(view.status.health),
        "reason": next((text for text in view.status.reasons if worker in text), ""),
        "others_kept": kept,
        "others_work": others_work,
        "restart_status": answer.returncode,
        "restart_says": (answer.stdout + answer.stderr).strip(),
        "healthy_after": None if healthy is None else round(healthy.time - restarted, 2),
    }


def _kill_until_given_up(watcher: Watcher, worker: str) -> int:
    """Kills it whenever it is ready; how often."""
    kills, killed = 0, 0

    def is_next(view: View) -> bool:
        state = _state(view, worker)
        is_ready = state is WorkerState.READY and view.pid(worker) != killed
        return is_ready or state is WorkerState.FAILED

    deadline = time.monotonic() + GIVE_UP_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        view = watcher.wait(is_next, left)
        if view is None or _state(view, worker) is WorkerState.FAILED:
            break
        killed = view.pid(worker)
        os.kill(killed, signal.SIGKILL)
        kills += 1
    return kills


def _state(view: View, worker: str) -> WorkerState:
    return view.active(worker).state


def _others_work(bed: Bed, worker: str, addresses: dict[str, str]) -> bool | None:
    """Whether apps of other proxies can be reached by their addresses; None: not without tun."""
    if worker == "tun":
        return None
    others = [address for address in addresses.values() if owner_of(address) != worker]
    try:
        reach_all_apps(bed, others)
    except OSError:
        return False
    return True


def _window(worker: str, began: float, ended: float) -> Window:
    """A carrier that is given up cuts and refuses connections; tun and dns hide every name."""
    is_carrier = carries(worker)
    cause = Cause.KILLED_SSH if worker == SSH else Cause.KILLED_PROXY
    return Window(
        cause=cause if is_carrier else Cause.KILLED_OTHER,
        began=began - BEFORE_SECONDS,
        ended=ended + AFTER_SECONDS,
        worker=worker if is_carrier else "",
        cuts=is_carrier,
        refuses=is_carrier,
        hides=frozenset() if is_carrier else frozenset(Names),
    )


def _aims(
    found: dict[str, dict[str, Any]],
    accounts: Accounts,
    watcher: Watcher,
    left: list[str],
    status: int | None,
) -> Iterator[Aim]:
    def number_of(bad: str, good: object) -> int:
        return sum(one[bad] != good for one in found.values())

    healthy = [one["healthy_after"] for one in found.values()]
    yield Aim("workers not given up", number_of("failed", good=True), 0, is_hard=True)
    yield Aim(
        "workers that came back unasked", number_of("stays_failed", good=True), 0, is_hard=True
    )
    yield Aim("health not degraded", number_of("health", str(Health.DEGRADED)), 0, is_hard=True)
    yield Aim("no reason", sum(not one["reason"] for one in found.values()), 0, is_hard=True)
    yield Aim("others replaced", number_of("others_kept", good=True), 0, is_hard=True)
    broken = sum(one["others_work"] is False for one in found.values())
    yield Aim("others do not work", broken, 0, is_hard=True)
    yield Aim("vnet restart failed", number_of("restart_status", 0), 0, is_hard=True)
    slowest = None if None in healthy else max(healthy)
    yield Aim("healthy after vnet restart, s", slowest, HEALTHY_SECONDS, is_hard=True)
    yield Aim("status unanswered", len(watcher.unanswered), 0, is_hard=True)
    yield Aim("wrong bytes", accounts.wrong_bytes, 0, is_hard=True)
    yield Aim("wrong DNS answers", accounts.wrong_answers, 0, is_hard=True)
    yield Aim("connections cut without a cause", accounts.cut_by_other, 0, is_hard=True)
    yield Aim("orphans", len(left), 0, is_hard=True)
    yield Aim("exit status", status, 0, is_hard=True)

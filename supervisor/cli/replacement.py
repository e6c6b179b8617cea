"""`vnet restart --drain`: orders the replacement and says how it goes."""

import time
from collections.abc import Callable
from pathlib import Path

from supervisor import control_messages as cm
from supervisor.cli.control_client import TIMEOUT_SECONDS, AskError, ask_status, order
from supervisor.cli.progress import Progress
from supervisor.exits import ExitStatus
from supervisor.status import Status, WorkerStatus
from supervisor.worker_states import WorkerState

STEP_SECONDS = 0.1
# The installed version is checked before it takes over (`supervisor.upgrade`), for 35 s at most.
UPGRADE_SECONDS = 40.0
# A supervisor that executes itself anew does not answer for a moment.
SILENT_SECONDS = 10.0
# Between two steps nothing is seen to happen for a moment.
IDLE_SECONDS = 3.0
# Before the next successor is forked, the worker that was followed last hands over (`supervisor.crew`),
# which a connection that waits for a second factor makes it do for seconds.
HANDOVER_SECONDS = 6.0


def replace(run_dir: Path, worker: str, tell: Callable[[str], None]) -> ExitStatus:
    """Replaces a worker, or all; returns when the successors work. Raises AskError."""
    before = _present(ask_status(run_dir, cm.Status())[0])
    seconds = UPGRADE_SECONDS if worker == "all" else TIMEOUT_SECONDS
    with Progress("waiting for VNet"):
        answer = order(run_dir, cm.Restart(worker=worker, drain=True), seconds)
    tell(answer.text)
    wanted = [name for name in before if worker in ("all", name)]
    with Progress("waiting for successors") as progress:

        def tell_between(text: str) -> None:
            progress.hide()
            tell(text)

        return _follow(run_dir, before, wanted, tell_between)


def _follow(
    run_dir: Path, before: dict[str, WorkerStatus], wanted: list[str], tell: Callable[[str], None]
) -> ExitStatus:
    """Returns when all that are wanted have successors. Raises AskError."""
    heard_at = moved_at = time.monotonic()
    longest_idle = IDLE_SECONDS
    while wanted:
        time.sleep(STEP_SECONDS)
        now = time.monotonic()
        try:
            status, _ = ask_status(run_dir, cm.Status())
        except AskError:
            if now - heard_at > SILENT_SECONDS:
                raise
            continue
        heard_at = now
        present = _present(status)
        done = [name for name in wanted if _has_followed(before[name], present.get(name))]
        for name in done:
            tell(f"{name}: process {present[name].pid} follows {before[name].pid}")
            wanted.remove(name)
        if done:
            moved_at, longest_idle = now, HANDOVER_SECONDS + IDLE_SECONDS
        elif any(_is_moving(row) for row in status.workers or ()):
            moved_at, longest_idle = now, IDLE_SECONDS
        elif now - moved_at > longest_idle:
            raise AskError(
                ExitStatus.DEGRADED,
                f"{', '.join(wanted)} not replaced, the present ones go on: see VNet's log",
            )
    return ExitStatus.OK


def _present(status: Status) -> dict[str, WorkerStatus]:
    """The first row of each name is its present worker."""
    rows: dict[str, WorkerStatus] = {}
    for row in status.workers or ():
        rows.setdefault(row.name, row)
    return rows


def _has_followed(old: WorkerStatus, new: WorkerStatus | None) -> bool:
    return new is not None and new.state is WorkerState.READY and new.pid != old.pid


def _is_moving(row: WorkerStatus) -> bool:
    return row.state in (WorkerState.STARTING, WorkerState.BACKOFF)

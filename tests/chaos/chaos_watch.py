"""Looks at `vnet status` all the time, beside everything else, and measures how fast it answers."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from supervisor.cli.control_client import AskError, ask_status
from supervisor.control_messages import Status as AskStatus
from supervisor.status import Health, Status, WorkerStatus
from supervisor.worker_states import WorkerState

LOOK_SECONDS = 0.04


@dataclass(frozen=True, slots=True)
class View:
    """One look. `time` is monotonic seconds, when it was asked for."""

    time: float
    status: Status

    @property
    def rows(self) -> list[WorkerStatus]:
        return self.status.workers or []

    def active(self, name: str) -> WorkerStatus:
        """A worker; the first row with its name, those after it are about to end or to follow it."""
        return next(row for row in self.rows if row.name == name)

    def pid(self, name: str) -> int:
        """Its process, 0 when there is none."""
        return self.active(name).pid or 0

    @property
    def pids(self) -> list[int]:
        return [row.pid for row in self.rows if row.pid is not None]

    @property
    def is_well(self) -> bool:
        """Healthy, and every worker ready."""
        names = {row.name for row in self.rows}
        return self.status.health is Health.HEALTHY and all(
            self.active(name).state is WorkerState.READY for name in names
        )


class Watcher:
    """A thread that asks; used as a context. One answer of 2 s or more counts as none."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._latest: View | None = None
        self.answers = 0
        # When no answer came, and why not.
        self.unanswered: list[tuple[float, str]] = []
        self.longest_answer = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Asks no more; may be called again."""
        self._stopping.set()
        self._thread.join()

    @property
    def latest(self) -> View | None:
        """What was seen last."""
        return self._latest

    def look(self) -> View:
        """Asks now. Raises AskError."""
        began = time.monotonic()
        return View(began, ask_status(self._run_dir, AskStatus())[0])

    def wait(self, condition: Callable[[View], bool], seconds: float) -> View | None:
        """The first look from now on for which it holds, None when there is none in time."""
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            view = self._latest
            if view is not None and view.time >= began and condition(view):
                return view
            time.sleep(LOOK_SECONDS / 4)
        return None

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            began = time.monotonic()
            try:
                self._latest = self.look()
            except AskError as error:
                self.unanswered.append((began, str(error)))
            else:
                self.answers += 1
                self.longest_answer = max(self.longest_answer, time.monotonic() - began)

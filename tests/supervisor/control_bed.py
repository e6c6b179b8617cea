"""A control socket of a VNet that a test makes up, served by a thread."""

import contextlib
import selectors
import threading
from pathlib import Path

from run_fakes import FakeRun, settings

from supervisor.commands import Commands
from supervisor.control import ControlSocket
from supervisor.worker_states import WorkerState


class ControlBed:
    """`run` is what is asked; `uid` is who asks, as VNet sees it."""

    def __init__(self, run_dir: Path, **changed: object) -> None:
        self.run_dir = run_dir
        self.uid = 0
        self.run = FakeRun(settings=settings(state_dir=run_dir), **changed)  # type: ignore[arg-type]
        for worker in self.run.workers.values():
            worker.state = WorkerState.READY
        self._closing = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        """VNet runs, again."""
        commands, selector = Commands(self.run), selectors.DefaultSelector()
        control = ControlSocket(
            self.run_dir / "control.sock",
            selector,
            lambda _uid, line: commands.answer(self.uid, line),
        )
        is_over = threading.Event()

        def serve() -> None:
            while not is_over.is_set():
                for key, events in selector.select(0.01):
                    key.data(events)

        thread = threading.Thread(target=serve)
        for close in (selector.close, control.close, thread.join, is_over.set):
            self._closing.callback(close)
        thread.start()

    def stop(self) -> None:
        self._closing.close()

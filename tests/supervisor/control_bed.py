"""A control socket of a VNet that a test makes up, served by a thread."""

import contextlib
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from run_fakes import FakeRun, settings

from supervisor.commands import Commands
from supervisor.control import ControlSocket, Promise
from supervisor.worker_states import WorkerState


@contextlib.contextmanager
def answering(run_dir: Path, answer: Callable[[int, bytes], bytes | Promise]) -> Iterator[None]:
    """A thread serves a control socket as long as the context lasts."""
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as closing:
        control = ControlSocket(run_dir / "control.sock", selector, answer)
        closing.callback(control.close)
        is_over = threading.Event()

        def serve() -> None:
            while not is_over.is_set():
                for key, events in selector.select(0.01):
                    key.data(events)
                control.drop_silent(time.monotonic())

        thread = threading.Thread(target=serve)
        thread.start()
        closing.callback(thread.join)
        closing.callback(is_over.set)
        yield


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
        commands = Commands(self.run)
        self._closing.enter_context(
            answering(self.run_dir, lambda _uid, line: commands.answer(self.uid, line))
        )

    def stop(self) -> None:
        self._closing.close()

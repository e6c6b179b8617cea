"""The channels of workers in a selector: which are open, and which wait to be written to."""

import functools
import selectors
from collections.abc import Callable, Iterable

from supervisor.worker import Worker


class Channels:
    """`talk(worker, events)` is the data of the selector's keys, but for the worker."""

    def __init__(
        self, selector: selectors.BaseSelector, talk: Callable[[Worker, int], None]
    ) -> None:
        self._selector = selector
        self._talk = talk
        self._events: dict[Worker, int] = {}

    def follow(self, workers: Iterable[Worker]) -> None:
        """Brings the selector in line with how the workers are now."""
        for worker in workers:
            if not worker.is_talking:
                self.forget(worker)
                continue
            wanted = selectors.EVENT_READ
            if worker.wants_to_write:
                wanted |= selectors.EVENT_WRITE
            if wanted != (before := self._events.get(worker)):
                put = self._selector.register if before is None else self._selector.modify
                put(worker, wanted, functools.partial(self._talk, worker))
                self._events[worker] = wanted

    def forget(self, worker: Worker) -> None:
        """Its channel is closed, or about to be."""
        if self._events.pop(worker, None) is not None:
            self._selector.unregister(worker)

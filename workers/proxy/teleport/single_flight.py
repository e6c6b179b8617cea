"""One running task per key, shared by everyone who wants its result."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from workers.proxy.teleport.errors import UnreachableError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Runs at most one task per key at a time.

    Someone who stops waiting does not stop the task: the others, and the cache that it fills, still
    want the result. `close` cancels what runs.
    """

    def __init__(self) -> None:
        self._running: dict[K, asyncio.Task[V]] = {}

    async def run(self, key: K, work: Callable[[], Awaitable[V]]) -> V:
        """The result of `work`, or of the run of it that is under way for `key`.

        Raises:
            UnreachableError: `close` ended the task.
        """
        task = self._running.get(key)
        if task is None:
            task = asyncio.ensure_future(_awaited(work))
            self._running[key] = task
            task.add_done_callback(lambda done: self._finished(key, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is None or current.cancelling():
                raise
            # Not the caller was cancelled but the task, by `close`.
            raise UnreachableError("the login changed while the cluster was asked") from None

    def is_running(self, key: K) -> bool:
        """Whether the task of this key is under way."""
        return key in self._running

    def _finished(self, key: K, task: asyncio.Task[V]) -> None:
        if self._running.get(key) is task:
            del self._running[key]
        if not task.cancelled():
            task.exception()  # taken note of, also when nobody waits any more

    async def close(self) -> None:
        """Cancels what runs and waits until it has ended."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _awaited(work: Callable[[], Awaitable[V]]) -> V:
    return await work()

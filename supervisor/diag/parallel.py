"""Runs several things that may block at once, and waits for none longer than it was told to."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Failed(Generic[T]):
    """In the place of a result: `error` is what was raised, or TimeoutError."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


def run_all(
    jobs: Mapping[str, Callable[[], T]],
    seconds: float,
    progress: Callable[[str], None] = lambda _name: None,
) -> dict[str, T | Failed[T]]:
    """The result of each job, in their order, within `seconds`; `progress` hears of each that is done.

    Each has a thread that does not keep the process from ending: what cannot be interrupted, such as
    a file system that does not answer, goes on and is forgotten.
    """
    done: queue.SimpleQueue[tuple[str, T | Failed[T]]] = queue.SimpleQueue()

    def work(name: str, job: Callable[[], T]) -> None:
        result: T | Failed[T]
        try:
            result = job()
        except Exception as error:  # noqa: BLE001  # told where the result is read
            result = Failed(error)
        done.put((name, result))

    for name, job in jobs.items():
        threading.Thread(target=work, args=(name, job), name=f"diag {name}", daemon=True).start()
    results: dict[str, T | Failed[T]] = {}
    deadline = time.monotonic() + seconds
    while len(results) < len(jobs):
        try:
            name, result = done.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            break
        results[name] = result
        progress(name)
    late: Failed[T] = Failed(TimeoutError(f"no result within {seconds:.0f} s"))
    return {name: results.get(name, late) for name in jobs}

"""Runs a command in an event loop so that a signal ends it in order."""

import asyncio
import signal
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

from supervisor.cli.screen import SIGNALS

T = TypeVar("T")


def run_in_order(work: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run; a signal that ends a process cancels `work`, a second one ends it wherever it is.

    SystemExit follows, with the status that a shell gives for the signal. If the handler of the first raised
    that, as `screen.ended_in_order` does, it could be between two steps of the loop, and a task would never
    be woken again.
    """
    ended_by = 0

    async def live() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def end(number: int, _frame: FrameType | None) -> None:
            nonlocal ended_by
            if ended_by:
                # The loop is not reached, for example because nobody reads what is printed.
                raise SystemExit(128 + number)
            ended_by = number
            loop.call_soon_threadsafe(task.cancel)

        before = [(number, signal.signal(number, end)) for number in SIGNALS]
        try:
            return await work
        finally:
            for number, handler in before:
                signal.signal(number, handler or signal.SIG_DFL)

    try:
        return asyncio.run(live())
    except asyncio.CancelledError:
        if ended_by:
            raise SystemExit(128 + ended_by) from None
        raise

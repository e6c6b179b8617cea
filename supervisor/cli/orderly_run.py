"""Runs a command in an event loop so that a signal ends it in order."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from supervisor.cli.screen import SIGNALS

T = TypeVar("T")


def run_in_order(work: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run; a signal that ends a process cancels `work`.

    SystemExit follows, with the status that a shell gives for the signal. If its handler raised that, as
    `screen.ended_in_order` does, it could be between two steps of the loop, and a task would never be woken
    again.
    """
    ended_by = 0

    async def live() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def end(number: int) -> None:
            nonlocal ended_by
            ended_by = number
            task.cancel()

        before = [(number, signal.getsignal(number)) for number in SIGNALS]
        for number in SIGNALS:
            loop.add_signal_handler(number, end, number)
        try:
            return await work
        finally:
            for number, handler in before:
                loop.remove_signal_handler(number)
                signal.signal(number, handler or signal.SIG_DFL)

    try:
        return asyncio.run(live())
    except asyncio.CancelledError:
        if ended_by:
            raise SystemExit(128 + ended_by) from None
        raise

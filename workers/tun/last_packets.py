"""What tun does when its supervisor has died: it moves packets a moment longer, then ends.

The proxies die with the supervisor, and the inner kernel resets their connections. Without anyone who
carries the resets to the outer device an idle program would wait for ever.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Final

from ipc.orphan import ORPHAN_SIGNAL

# After the proxies are dead, which they are within milliseconds, or on a busy machine somewhat later.
LAST_SECONDS: Final = 0.3
# How often it is looked whether they are.
STEP_SECONDS: Final = 0.02
# So long after the signal the kernel ends this process, whatever it is doing.
HARD_LIMIT_SECONDS: Final = 0.8


@contextlib.contextmanager
def noticing_death(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> Iterator[None]:
    """While the block lasts, the death of the supervisor makes the loop call `stop`.

    The handler is one of Python's, not of the loop: it runs even if the loop is stuck.
    """

    def take(_number: int, _frame: object) -> None:
        _set_hard_limit()
        loop.call_soon_threadsafe(stop)

    signal.signal(ORPHAN_SIGNAL, take)
    try:
        yield
    finally:
        signal.signal(ORPHAN_SIGNAL, signal.SIG_DFL)


async def move_last_packets(have_proxies_gone: Callable[[], bool]) -> None:
    """Lets the pump run on until the proxies have gone, and LAST_SECONDS more."""
    _set_hard_limit()
    while not have_proxies_gone():  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(STEP_SECONDS)
    await asyncio.sleep(LAST_SECONDS)


def _set_hard_limit() -> None:
    if not any(signal.getitimer(signal.ITIMER_REAL)):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, HARD_LIMIT_SECONDS)

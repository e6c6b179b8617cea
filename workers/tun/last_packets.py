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

# The proxies are dead within milliseconds; on a busy machine it takes longer.
LAST_SECONDS: Final = 0.3
# Then the kernel ends this process, whatever it is doing.
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


async def move_last_packets() -> None:
    """Lets the pump run on for LAST_SECONDS."""
    _set_hard_limit()
    await asyncio.sleep(LAST_SECONDS)


def _set_hard_limit() -> None:
    if not any(signal.getitimer(signal.ITIMER_REAL)):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, HARD_LIMIT_SECONDS)

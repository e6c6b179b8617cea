"""Work that nobody waits for, of which the failures show elsewhere."""

import asyncio
import logging
from collections.abc import Coroutine

from workers.proxy.teleport.errors import TeleportError

logger = logging.getLogger(__name__)


class Background:
    """Tasks that run until they are done, or until `close`. A TeleportError ends one quietly."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[None, None, object]) -> None:
        """Runs it from the next turn of the event loop on."""
        task = asyncio.ensure_future(_quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancels what runs and waits until it has ended."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _quietly(work: Coroutine[None, None, object]) -> None:
    try:
        await work
    except TeleportError:
        return
    except Exception:
        logger.exception("looking after a cluster failed")

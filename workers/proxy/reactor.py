"""Readiness of the relays' sockets: one epoll set of ours, nested in the event loop's (macOS: kqueue).

Uvloop's `add_reader` does not fit. When a reset follows data (EPOLLERR with EPOLLIN), libuv calls
back once and stops watching, so a callback that reads once would never see the reset. It also
makes a handle for every pause, where a set of our own takes one system call, and it says nothing
about connections that die while nobody reads them.
"""

import asyncio
import select
import sys
from collections.abc import Callable

from workers.proxy.kqueue_set import KqueueSet
from workers.proxy.tls import TlsMemory

READABLE = select.POLLIN
WRITABLE = select.POLLOUT
DEAD = select.POLLERR | select.POLLHUP  # reported whether asked for or not

# Handled per turn of the event loop; the rest stays ready for the next turn.
_MAX_EVENTS = 64


class Reactor:
    """Calls back when descriptors are ready. One per event loop; `close` it at the end."""

    __slots__ = ("_callbacks", "_epoll", "_loop", "memory")

    def __init__(self, loop: asyncio.AbstractEventLoop, memory: TlsMemory | None = None) -> None:
        """`memory` is what all TLS connections of this loop share; made here if not given."""
        self._loop = loop
        self._epoll = select.epoll() if sys.platform == "linux" else KqueueSet()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self.memory = memory or TlsMemory()
        loop.add_reader(self._epoll.fileno(), self._dispatch)

    def __len__(self) -> int:
        """Descriptors watched now."""
        return len(self._callbacks)

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls `callback(events)` as long as one of `events`, or DEAD, is the case.

        After a descriptor was closed and its number given to another, one call may be about the
        old one: callbacks try the operation, they do not trust the event.
        """
        self._epoll.register(descriptor, events)
        self._callbacks[descriptor] = callback

    def change(self, descriptor: int, events: int) -> None:
        """Watches for other events from now on; 0 leaves DEAD."""
        self._epoll.modify(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """Stops watching; must be called before the descriptor is closed."""
        self._epoll.unregister(descriptor)
        del self._callbacks[descriptor]

    def close(self) -> None:
        """Stops everything. The sockets are left as they are."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._callbacks.clear()

    def _dispatch(self) -> None:
        for descriptor, events in self._epoll.poll(0, _MAX_EVENTS):
            if callback := self._callbacks.get(descriptor):
                callback(events)

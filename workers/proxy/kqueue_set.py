"""What select.epoll is to the reactor, over kqueue(2) of macOS. Never run on a real machine.

A read filter says EV_EOF for a half-closed connection too, which is no death: that has an error beside it.
Who does not read keeps the filter, with more bytes to wait for than a socket can hold, so that an end is
still heard of.
"""

import select
from typing import Any, Final

# As poll(2) numbers them, on every system.
READABLE: Final = 0x1
WRITABLE: Final = 0x4
DEAD: Final = 0x8 | 0x10

# sys/event.h
_EVFILT_READ: Final = -1
_EVFILT_WRITE: Final = -2
_EV_ADD: Final = 0x1
_EV_DELETE: Final = 0x2
_EV_ENABLE: Final = 0x4
_EV_DISABLE: Final = 0x8
_EV_EOF: Final = 0x8000
_NOTE_LOWAT: Final = 0x1
_MORE_THAN_THERE_IS: Final = 0x7FFFFFFF

# (descriptor, filter, flags, filter's flags, data)
Change = tuple[int, int, int, int, int]


def changes(descriptor: int, before: int | None, after: int | None) -> list[Change]:
    """What the kernel is told when the wanted events change; None: not watched. Pure."""
    found: list[Change] = []
    if after is None:
        found.append((descriptor, _EVFILT_READ, _EV_DELETE, 0, 0))
    elif after & READABLE:
        found.append((descriptor, _EVFILT_READ, _EV_ADD | _EV_ENABLE, 0, 0))
    else:
        quiet = _NOTE_LOWAT, _MORE_THAN_THERE_IS
        found.append((descriptor, _EVFILT_READ, _EV_ADD | _EV_ENABLE, *quiet))
    had, has = (before or 0) & WRITABLE, (after or 0) & WRITABLE
    if has and not had:
        found.append((descriptor, _EVFILT_WRITE, _EV_ADD | _EV_ENABLE, 0, 0))
    elif had and not has:
        found.append((descriptor, _EVFILT_WRITE, _EV_DELETE, 0, 0))
    return found


def meaning(event_filter: int, flags: int, error: int, wanted: int) -> int:
    """The events of the reactor that one of the kernel's stands for, 0 for none. Pure."""
    dead = DEAD if flags & _EV_EOF and error else 0
    if event_filter == _EVFILT_WRITE:
        return WRITABLE | dead
    return dead | (wanted & READABLE)


class KqueueSet:
    """The calls of select.epoll that the reactor makes."""

    def __init__(self, kernel: Any = None, event: Any = None) -> None:
        """`kernel` and `event` stand for select.kqueue() and select.kevent."""
        self._kernel = kernel if kernel is not None else getattr(select, "kqueue")()  # noqa: B009
        self._event = event if event is not None else getattr(select, "kevent")  # noqa: B009
        self._wanted: dict[int, int] = {}

    def fileno(self) -> int:
        return int(self._kernel.fileno())

    def close(self) -> None:
        self._kernel.close()

    def register(self, descriptor: int, events: int) -> None:
        """Begins to watch. Raises OSError."""
        self._tell(changes(descriptor, None, events))
        self._wanted[descriptor] = events

    def modify(self, descriptor: int, events: int) -> None:
        """Watches for other events. Raises OSError."""
        self._tell(changes(descriptor, self._wanted[descriptor], events))
        self._wanted[descriptor] = events

    def unregister(self, descriptor: int) -> None:
        """Stops watching. Raises OSError."""
        self._tell(changes(descriptor, self._wanted.pop(descriptor), None))

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        """(descriptor, events) of those that are ready."""
        found: dict[int, int] = {}
        for event in self._kernel.control(None, most, timeout):
            descriptor = event.ident
            wanted = self._wanted.get(descriptor)
            if wanted is None:
                continue
            events = meaning(event.filter, event.flags, event.fflags, wanted)
            if events:
                found[descriptor] = found.get(descriptor, 0) | events
            elif event.flags & _EV_EOF:
                # Said again and again otherwise, until it is read.
                self._tell([(descriptor, _EVFILT_READ, _EV_DISABLE, 0, 0)])
        return list(found.items())

    def _tell(self, wanted: list[Change]) -> None:
        self._kernel.control([self._event(*change) for change in wanted], 0, 0)

"""One connected non-blocking socket, without tasks and without a read buffer.

Reading is the owner's: it is called when something can be read and brings the buffer, so that all
connections share one. Writing goes through `send`: what the kernel does not take is kept and sent
later. `send` has no limit of its own: whoever fills it stops when `pending_bytes` is too much and
goes on when `on_clear` is called, which keeps it to the limit and one piece.
"""

import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from workers.proxy.reactor import DEAD, READABLE, WRITABLE, Reactor

# SO_LINGER on with zero seconds: close sends RST and drops what is unsent.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_ORDINARY_CLOSE = struct.pack("ii", 0, 0)


def _nothing() -> None:
    """No owner is attached."""


def _ignore(_: OSError) -> None:
    """No owner is attached."""


class Endpoint:
    """Owns its socket. The callbacks of the present owner are set by `attach`."""

    __slots__ = (
        "_events",
        "_fd",
        "_is_reading",
        "_on_clear",
        "_on_error",
        "_on_readable",
        "_pieces",
        "_reactor",
        "_resets_when_killed",
        "pending_bytes",
        "socket",
    )

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        self._reactor = reactor
        self._fd = sock.fileno()
        self._events: int | None = None  # what the reactor watches for; None: nothing
        self._is_reading = False
        self._pieces: deque[memoryview] | None = None  # made when needed: idle ones are many
        self._on_readable: Callable[[], None] = _nothing
        self._on_clear: Callable[[], None] = _nothing
        self._on_error: Callable[[OSError], None] = _ignore
        self._resets_when_killed = False
        self.pending_bytes = 0
        self.socket = sock

    def reset_when_killed(self) -> None:
        """Makes the kernel send RST if this process ends without closing the connection.

        FIN, which it sends otherwise, would tell the program that it has received everything.
        """
        with suppress(OSError):  # it is lost anyway
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._resets_when_killed = True

    def attach(
        self,
        on_readable: Callable[[], None],
        on_clear: Callable[[], None],
        on_error: Callable[[OSError], None],
    ) -> None:
        """Sets the owner; reading is paused until `resume`.

        `on_readable`: data, the end or an error can be read. `on_clear`: all that was pending
        has gone. `on_error`: nothing can be sent any more, and what was pending is dropped;
        something may still wait to be read. It may come more than once.
        """
        self.pause()
        self._on_readable = on_readable
        self._on_clear = on_clear
        self._on_error = on_error

    def read_by(self, on_readable: Callable[[], None]) -> None:
        """Sets another `on_readable`, for the same owner."""
        self._on_readable = on_readable

    def resume(self) -> None:
        """Calls `on_readable` from now on."""
        if not self._is_reading:
            self._is_reading = True
            self._watch()

    def pause(self) -> None:
        """Stops calling `on_readable`; the kernel's buffer fills and slows the sender."""
        if self._is_reading:
            self._is_reading = False
            self._watch()

    def send(self, data: bytes | memoryview) -> None:
        """Sends `data` now or later, in order. A view may be overwritten afterwards.

        Raises:
            OSError: the connection is lost.
        """
        if self.pending_bytes:
            self._keep(data, 0)
            return
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._keep(data, sent)
            self._watch()

    def discard(self) -> None:
        """Drops what is pending; `on_clear` does not follow."""
        self._pieces = None
        if self.pending_bytes:
            self.pending_bytes = 0
            self._watch()

    def close(self) -> None:
        """Closes the socket: FIN, or RST if something received was never read."""
        if self._resets_when_killed:
            with suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ORDINARY_CLOSE)
        self._close()

    def reset(self) -> None:
        """Closes the socket with RST."""
        with suppress(OSError):  # it is closed anyway
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._close()

    def _close(self) -> None:
        if self._events is not None:
            self._reactor.forget(self._fd)
            self._events = None
        self._is_reading = False
        self._pieces = None
        self.pending_bytes = 0
        # An owner refers to its endpoint: without this only the cycle collector frees both.
        self.attach(_nothing, _nothing, _ignore)
        self.socket.close()

    def _watch(self) -> None:
        """Tells the reactor what is awaited now. Once watched, a dead socket is noticed."""
        events = (READABLE if self._is_reading else 0) | (WRITABLE if self.pending_bytes else 0)
        if self._events is None:
            self._reactor.watch(self._fd, events, self._on_events)
        elif events != self._events:
            self._reactor.change(self._fd, events)
        self._events = events

    def _on_events(self, events: int) -> None:
        if self.pending_bytes and events & (WRITABLE | DEAD):
            self._flush()
        if self._is_reading:
            if events & (READABLE | DEAD):
                self._on_readable()
        elif self._events == 0 and events & DEAD:
            # Reported again and again unless it is forgotten; `resume` watches it again.
            self._reactor.forget(self._fd)
            self._events = None
            self._on_error(OSError("connection lost"))

    def _keep(self, data: bytes | memoryview, sent: int) -> None:
        if self._pieces is None:
            self._pieces = deque()
        # A view shows a buffer that others use next; bytes can be kept as they are.
        rest = memoryview(data)[sent:]
        self._pieces.append(rest if isinstance(data, bytes) else memoryview(bytes(rest)))
        self.pending_bytes += len(rest)

    def _flush(self) -> None:
        pieces = self._pieces
        assert pieces
        try:
            while pieces:
                piece = pieces[0]
                sent = self.socket.send(piece)
                self.pending_bytes -= sent
                if sent < len(piece):
                    pieces[0] = piece[sent:]
                    return
                pieces.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            self.discard()
            self._on_error(error)
            return
        self._pieces = None
        self._watch()
        self._on_clear()


def reason_of(error: OSError) -> str:
    """What went wrong with a connection, in words that are safe to show."""
    return error.strerror or "connection lost"

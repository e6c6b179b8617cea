"""Signals of this process, and calls of its other threads, as something that a selector waits for."""

import contextlib
import signal
import socket
from collections.abc import Callable

from supervisor import upgrade


class Signals:
    """`on_signal(number)` is called by `hear`, never by the handler of a signal."""

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._descriptor_before = signal.set_wakeup_fd(
            self._writer.fileno(), warn_on_full_buffer=False
        )
        self._handlers_before = {
            number: signal.signal(number, _do_nothing) for number in upgrade.SIGNALS
        }
        # An earlier program of this process has blocked them.
        upgrade.unblock_signals()

    def fileno(self) -> int:
        """Readable when there is something to hear."""
        return self._reader.fileno()

    def hear(self) -> None:
        """Calls `on_signal` for all that has come."""
        with contextlib.suppress(BlockingIOError):
            for number in self._reader.recv(4096):
                if number:  # 0: somebody has called `wake_up`
                    self._on_signal(number)

    def wake_up(self) -> None:
        """Ends the wait of the selector; any thread may call it."""
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")

    def close(self) -> None:
        """Signals have the effect that they had before."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._descriptor_before)
        self._reader.close()
        self._writer.close()


def _do_nothing(_number: int, _frame: object) -> None:
    """The wake-up descriptor tells of it."""

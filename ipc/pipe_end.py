"""The read end of a pipe that a thread of its own reads, until the writer is gone or it is taken away.

A descriptor that is taken away lives on in another program: a supervisor that executes itself anew
keeps the pipes of its workers.
"""

import contextlib
import os
import select
import threading
from typing import Final

READ_BYTES: Final = 64 * 1024


class PipeEnd:
    """See the module. `descriptor` -1 stands for a pipe that has ended."""

    def __init__(self, descriptor: int) -> None:
        """Closes `descriptor` when it fails. Raises OSError."""
        self._descriptor = descriptor
        self._is_detached = False
        self._lock = threading.Lock()
        self._poller = select.poll()
        self._wake: tuple[int, int] | None = None
        try:
            if descriptor >= 0:
                os.set_blocking(descriptor, False)
                self._poller.register(descriptor, select.POLLIN)
            self._wake = os.pipe()
        except OSError:
            self.close()
            raise
        self._poller.register(self._wake[0], select.POLLIN)

    @property
    def descriptor(self) -> int:
        """The pipe; -1 once it has been closed."""
        return self._descriptor

    def read(self, seconds: float | None) -> bytes | None:
        """What has come, waiting at most so long (None: for ever); None if nothing came.

        Raises:
            EOFError: the writers are gone, or the pipe was taken away.
            OSError: it cannot be read.
        """
        if self._descriptor >= 0 and not self._is_detached:
            ready = self._poller.poll(None if seconds is None else seconds * 1000)
            if not self._is_detached:
                if not ready:
                    return None
                if data := os.read(self._descriptor, READ_BYTES):
                    return data
        raise EOFError

    def detach(self) -> None:
        """Ends a `read` that waits, and any later one; `close` leaves the descriptor open."""
        with self._lock:
            self._is_detached = True
            if self._wake is not None:
                os.write(self._wake[1], b"\0")

    def close(self) -> None:
        """For the reading thread, when it ends; closes the pipe, unless it was taken away."""
        with self._lock:
            if self._wake is not None:
                for end in self._wake:
                    os.close(end)
                self._wake = None
            if self._descriptor >= 0 and not self._is_detached:
                with contextlib.suppress(OSError):
                    os.close(self._descriptor)
                self._descriptor = -1

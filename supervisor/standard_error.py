"""Writing to standard error without waiting for whoever reads it.

A terminal that is stopped (Ctrl-S), a pager, or a pipe that nobody reads would hold up the whole process
with the next line. A regular file and a reader that is gone are never waited for.
"""

import os
import select
import sys
import time
from typing import Final

# A reader that is only busy comes in this time. After that nobody is waited for until it has read.
PATIENCE_SECONDS: Final = 0.2
_PAUSE_SECONDS: Final = 0.005


class StandardError:
    """Writes whole lines, or loses them. Not for threads."""

    def __init__(self, descriptor: int = 2) -> None:
        self._descriptor = _unwaiting(descriptor)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._is_stuck = False
        self._is_torn = False

    def write(self, line: bytes) -> bool:
        """False if nobody reads: the line is lost, at least its end. Raises OSError."""
        left = memoryview(b"\n" + line if self._is_torn else line)
        whole = len(left)
        while left:
            # A pipe that is ready takes so much at once, whoever else writes to it.
            written = self._write_some(left[: select.PIPE_BUF])
            if not written:
                self._is_torn = self._is_torn or len(left) < whole
                return False
            left = left[written:]
        self._is_torn = False
        return True

    def _write_some(self, part: memoryview) -> int:
        """How many bytes were taken; 0 if nobody reads."""
        until = time.monotonic() + (0.0 if self._is_stuck else PATIENCE_SECONDS)
        while True:
            left = max(0.0, until - time.monotonic())
            self._is_stuck = not self._poll.poll(left * 1000)
            if self._is_stuck:
                return 0
            try:
                return os.write(self._descriptor, part)
            except BlockingIOError:
                # A terminal counts as ready where there is no room for a line feed, which it makes two of.
                self._is_stuck = not left
                if self._is_stuck:
                    return 0
                time.sleep(_PAUSE_SECONDS)


def _unwaiting(descriptor: int) -> int:
    """A terminal is opened once more, not to be waited for: it is ready with less room than for a line.

    The descriptor itself is shared with the programs that had it before, which mean to wait.
    """
    if not os.isatty(descriptor):
        return descriptor
    try:
        path = f"/proc/self/fd/{descriptor}" if sys.platform == "linux" else os.ttyname(descriptor)
        return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return descriptor

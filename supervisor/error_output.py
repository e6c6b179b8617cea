"""What a worker writes to its standard error, as records of its log.

Python writes there when it crashes or is asked for its stack (faulthandler), libraries when they abort.
What comes in one go is one record, so that a stack stays together:

    bytes --> burst --> nothing more for QUIET_SECONDS, or MAX_ENTRY_BYTES --> record

`Bursts` is pure; `ErrorOutputReceiver` reads the pipe in a thread of its own.
"""

import logging
import threading
import time
from typing import Final

from ipc.pipe_end import PipeEnd
from supervisor.allowance import Allowance

QUIET_SECONDS: Final = 0.1
# A burst that does not end becomes a record after so long.
LONGEST_SECONDS: Final = 1.0
MAX_ENTRY_BYTES: Final = 32 * 1024
MAX_LINE: Final = 1000
# A stack of many threads fits the burst; what comes faster, or after the total, is thrown away.
BYTES_PER_SECOND: Final = 8 * 1024
BURST_BYTES: Final = 128 * 1024
MAX_TOTAL_BYTES: Final = 4 << 20
# How often it is told how much was thrown away, and how long the pipe is left alone before more of a
# flood is read.
_TELL_SECONDS: Final = 1.0
_FLOOD_PAUSE_SECONDS: Final = 0.02
_JOIN_SECONDS: Final = 2.0
LOGGER: Final = "stderr"

log = logging.getLogger(__name__)


class Bursts:
    """Cuts a stream of bytes into texts. Times are monotonic seconds."""

    def __init__(self, now: float, buffered: bytes = b"") -> None:
        self.cut_bytes = 0
        self._gathered = bytearray(buffered)
        self._first = self._latest = now
        self._left = MAX_TOTAL_BYTES
        self._allowance = Allowance(BYTES_PER_SECOND, BURST_BYTES, now)

    @property
    def unread(self) -> bytes:
        """What has come and is in no text yet."""
        return bytes(self._gathered)

    def feed(self, data: bytes, now: float) -> list[str]:
        """Bytes have come; the texts that are complete."""
        if len(data) > self._left or not self._allowance.spend(len(data), now):
            self.cut_bytes += len(data)
            return []
        self._left -= len(data)
        if not self._gathered:
            self._first = now
        self._latest = now
        self._gathered += data
        texts = []
        while len(self._gathered) >= MAX_ENTRY_BYTES:
            end = self._gathered.rfind(b"\n", 1, MAX_ENTRY_BYTES) + 1 or MAX_ENTRY_BYTES
            texts.append(self._take(end))
        return [text for text in texts if text]

    def seconds_left(self, now: float) -> float | None:
        """How long until `due` has something; None: it has nothing."""
        if not self._gathered:
            return None
        until = min(self._latest + QUIET_SECONDS, self._first + LONGEST_SECONDS)
        return max(0.0, until - now)

    def due(self, now: float) -> list[str]:
        """The text of a burst that has ended."""
        return self.flush() if self.seconds_left(now) == 0 else []

    def flush(self) -> list[str]:
        """The text of what is left, at the end."""
        text = self._take(len(self._gathered))
        return [text] if text else []

    def _take(self, end: int) -> str:
        text = self._gathered[:end].decode(errors="replace")
        del self._gathered[:end]
        lines = (
            line if len(line) <= MAX_LINE else line[: MAX_LINE - 4] + " ..."
            for line in text.split("\n")
        )
        return "\n".join(lines).strip("\n")


class ErrorOutputReceiver:
    """The supervisor's receiver for one worker start: a thread that ends with the worker."""

    def __init__(
        self,
        descriptor: int,
        worker: str,
        handler: logging.Handler,
        *,
        pid: int = 0,
        buffered: bytes = b"",
    ) -> None:
        """`buffered` was read before, by a receiver that was detached; so may `descriptor` be -1.

        Raises:
            OSError: no descriptor is left. `descriptor` is closed.
            RuntimeError: no thread is left; likewise.
        """
        self._end = PipeEnd(descriptor)
        self._worker = worker
        self._pid = pid
        self._handler = handler
        self._bursts = Bursts(time.monotonic(), buffered)
        self._told_at = 0.0
        self._is_detached = False
        self.thread = threading.Thread(target=self._receive, name=f"stderr-{worker}", daemon=True)
        try:
            self.thread.start()
        except RuntimeError:
            self._end.close()
            raise

    @property
    def descriptor(self) -> int:
        """The pipe; -1 when it has ended."""
        return self._end.descriptor

    def detach(self) -> tuple[int, bytes]:
        """Ends the thread; the descriptor, open (-1 if the pipe has ended), and what is unread."""
        self._is_detached = True
        self._end.detach()
        self.thread.join(_JOIN_SECONDS)
        return self._end.descriptor, self._bursts.unread

    def _receive(self) -> None:
        try:
            while True:
                data = self._end.read(self._patience())
                now = time.monotonic()
                before = self._bursts.cut_bytes
                self._write(self._bursts.due(now) if data is None else self._bursts.feed(data, now))
                self._tell_cut(now)
                if self._bursts.cut_bytes > before:
                    time.sleep(_FLOOD_PAUSE_SECONDS)
        except (EOFError, OSError):
            pass
        if not self._is_detached:
            self._write(self._bursts.flush())
            self._tell_cut(self._told_at + _TELL_SECONDS)
        self._end.close()

    def _patience(self) -> float | None:
        left = self._bursts.seconds_left(time.monotonic())
        return _TELL_SECONDS if left is None and self._bursts.cut_bytes else left

    def _write(self, texts: list[str]) -> None:
        for text in texts:
            self._handler.emit(
                logging.makeLogRecord(
                    {
                        "name": LOGGER,
                        "levelno": logging.ERROR,
                        "levelname": "ERROR",
                        "msg": text,
                        "worker": self._worker,
                        "process": self._pid,
                    }
                )
            )

    def _tell_cut(self, now: float) -> None:
        if self._bursts.cut_bytes and now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            log.warning(
                "%s writes too much to its standard error, %d bytes were cut",
                self._worker,
                self._bursts.cut_bytes,
            )
            self._bursts.cut_bytes = 0

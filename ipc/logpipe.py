"""Log records from a worker to the supervisor, through multiprocessing-logging.

That package sends records as pickles through one shared queue. A worker that is killed while it
holds the queue's lock silences all others for ever, and a worker with few rights could send a
pickle that runs code in the supervisor. Its handler and receiver are used here with a queue of
our own: one pipe per worker start, thrown away with the worker, whose records are capped in size
and decoded, never unpickled.

    record on the pipe: | length, 2 bytes, big-endian | MessagePack array of LogLine |
"""

import fcntl
import logging
import os
import select
import struct
import threading
import time
from queue import Empty
from typing import Annotated, Final, NoReturn

import msgspec
from msgspec import Meta
from multiprocessing_logging import MultiProcessingHandler

# A write of at most PIPE_BUF bytes (4096 on Linux, 512 by POSIX) is never torn.
MAX_RECORD_BYTES: Final = select.PIPE_BUF
_HEADER = struct.Struct(">H")
# A worker that writes more lines than this is cut short, so that it cannot fill the disk or keep
# the supervisor busy; the burst is for the stack of a crash.
_LINES_PER_SECOND: Final = 500
_BURST_LINES: Final = 2000
_LEVELS: Final = {level: logging.getLevelName(level) for level in (10, 20, 30, 40, 50)}


class LogLine(msgspec.Struct, frozen=True, array_like=True):
    """What travels of a log record: text only."""

    created: Annotated[float, Meta(ge=0)]
    level: Annotated[int, Meta(ge=0, le=50)]
    logger: Annotated[str, Meta(max_length=100)]
    text: str


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LogLine)


def encode(record: logging.LogRecord) -> bytes:
    """A record as bytes, cut to MAX_RECORD_BYTES; its stack trace follows the message."""
    text = record.getMessage()
    if record.exc_text:
        text = f"{text}\n{record.exc_text}"
    room = MAX_RECORD_BYTES - _HEADER.size - 160
    if len(text.encode(errors="replace")) > room:
        text = text.encode(errors="replace")[: room - 4].decode(errors="ignore") + " ..."
    text = text.encode(errors="replace").decode()
    level = min(max(record.levelno, 0), 50)
    body = _encoder.encode(LogLine(record.created, level, record.name[:100], text))
    return _HEADER.pack(len(body)) + body


def decode(body: bytes) -> logging.LogRecord:
    """The record in `body` (without the length).

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError: it is none.
    """
    line = _decoder.decode(body)
    # A forged line break must not look like a record of its own.
    text = line.text.replace("\r", "\\r").replace("\n", "\n    ")
    return logging.makeLogRecord(
        {
            "name": line.logger,
            "levelno": line.level,
            "levelname": _LEVELS.get(line.level, str(line.level)),
            "created": line.created,
            "msecs": line.created % 1 * 1000,
            "msg": text,
        }
    )


class PipeWriter:
    """The worker's end; the part of a queue's face that MultiProcessingHandler uses."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lost = 0
        os.set_blocking(descriptor, False)

    def put_nowait(self, record: logging.LogRecord) -> None:
        """Writes one record; when the pipe is full it is dropped and counted."""
        if self._lost:
            # Told first, so that the gap is seen where it is.
            notice = logging.makeLogRecord(
                {
                    "name": __name__,
                    "levelno": logging.WARNING,
                    "created": record.created,
                    "msg": f"{self._lost} log lines were lost, the pipe was full",
                }
            )
            if not self._write(encode(notice)):
                self._lost += 1
                return
            self._lost = 0
        if not self._write(encode(record)):
            self._lost += 1

    def _write(self, data: bytes) -> bool:
        try:
            os.write(self._descriptor, data)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Nothing to do: the descriptor ends with the process."""

    def join_thread(self) -> None:
        """Nothing to do: there is no feeder thread."""

    def qsize(self) -> int:
        return 0


class PipeReader:
    """The supervisor's end. Bytes that are no record end the stream."""

    def __init__(self, descriptor: int, worker: str) -> None:
        self._descriptor = descriptor
        self._worker = worker
        self._buffer = bytearray()
        self._allowance = float(_BURST_LINES)
        self._last_refill = time.monotonic()
        self._cut = 0
        os.set_blocking(descriptor, False)

    def get(self, timeout: float) -> logging.LogRecord:
        """The next record, waiting at most `timeout` seconds.

        Raises:
            Empty: none came.
            EOFError: the worker is gone, or what it writes are no records.
        """
        while True:
            record = self._take()
            if record is None:
                self._fill(timeout)
                record = self._take()
                if record is None:
                    raise Empty
            if self._is_allowed():
                return record

    def _fill(self, timeout: float) -> None:
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        if not poller.poll(timeout * 1000):
            raise Empty
        data = os.read(self._descriptor, 16 * MAX_RECORD_BYTES)
        if not data:
            raise EOFError
        self._buffer += data

    def _take(self) -> logging.LogRecord | None:
        if len(self._buffer) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack_from(self._buffer)
        if length > MAX_RECORD_BYTES - _HEADER.size:
            self._give_up(f"a record of {length} bytes")
        if len(self._buffer) < _HEADER.size + length:
            return None
        body = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
        del self._buffer[: _HEADER.size + length]
        try:
            record = decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._give_up(str(error))
        record.worker = self._worker
        return record

    def _give_up(self, why: str) -> NoReturn:
        logging.getLogger(__name__).error(
            "%s writes what is no log record (%s); its log ends here", self._worker, why
        )
        raise EOFError

    def _is_allowed(self) -> bool:
        now = time.monotonic()
        self._allowance = min(
            float(_BURST_LINES),
            self._allowance + (now - self._last_refill) * _LINES_PER_SECOND,
        )
        self._last_refill = now
        if self._allowance < 1:
            self._cut += 1
            return False
        self._allowance -= 1
        if self._cut:
            logging.getLogger(__name__).warning(
                "%s wrote too fast, %d log lines were cut", self._worker, self._cut
            )
            self._cut = 0
        return True

    def qsize(self) -> int:
        return len(self._buffer)

    def close(self) -> None:
        os.close(self._descriptor)

    def join_thread(self) -> None:
        """Nothing to do: there is no feeder thread."""


class _OwnQueueHandler(MultiProcessingHandler):  # type: ignore[misc]  # the package has no types
    """MultiProcessingHandler with one of the queues above in place of its pickling one."""

    def __init__(
        self, name: str, sub_handler: logging.Handler, own_queue: PipeWriter | PipeReader
    ) -> None:
        self._own_queue = own_queue
        super().__init__(name, sub_handler)

    @property
    def queue(self) -> PipeWriter | PipeReader:
        return self._own_queue

    @queue.setter
    def queue(self, pickling: object) -> None:
        pickling.close()  # type: ignore[attr-defined]  # a multiprocessing.Queue


class WorkerLogHandler(_OwnQueueHandler):
    """The handler of a worker's root logger: writes to its pipe, receives nothing."""

    def __init__(self, descriptor: int) -> None:
        super().__init__("log-writer", logging.NullHandler(), PipeWriter(descriptor))
        # Confinement is per thread and comes next, so the thread the base class started must
        # be over.
        self._receive_thread.join()

    def _receive(self) -> None:
        """A worker only sends."""


class WorkerLogReceiver(_OwnQueueHandler):
    """The supervisor's receiver for one worker start: a thread that ends with the worker."""

    def __init__(self, descriptor: int, worker: str, sub_handler: logging.Handler) -> None:
        super().__init__(f"log-{worker}", sub_handler, PipeReader(descriptor, worker))

    @property
    def thread(self) -> threading.Thread:
        thread: threading.Thread = self._receive_thread
        return thread


def make_pipe() -> tuple[int, int]:
    """A pipe (read end, write end) with room for bursts, both close-on-exec."""
    reader, writer = os.pipe()
    # The default of 64 KiB is 16 full records; a megabyte is what an unprivileged process may set.
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    return reader, writer

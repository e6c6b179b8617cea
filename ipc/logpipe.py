"""Log records from a worker to the supervisor, through multiprocessing-logging.

That package sends records as pickles through one shared queue. A worker that is killed while it
holds the queue's lock silences all others for ever, and a worker with few rights could send a
pickle that runs code in the supervisor. Its handler and receiver are used here with a queue of
our own: one pipe per worker start, thrown away with the worker, whose records are capped in size
and decoded, never unpickled.

    record on the pipe: | length, 2 bytes, big-endian | MessagePack array of LogLine |
"""

import contextlib
import fcntl
import logging
import os
import re
import select
import struct
import sys
import threading
import time
from queue import Empty
from typing import Annotated, Final, NoReturn

import msgspec
from msgspec import Meta
from multiprocessing_logging import MultiProcessingHandler

from ipc.pipe_end import PipeEnd

# A write of at most PIPE_BUF bytes (4096 on Linux, 512 by POSIX) is never torn.
MAX_RECORD_BYTES: Final = select.PIPE_BUF
_HEADER = struct.Struct(">H")
# A worker that writes more lines than this is cut short, so that it cannot fill the disk or keep
# the supervisor busy; the burst is for the stack of a crash.
_LINES_PER_SECOND: Final = 500
_BURST_LINES: Final = 2000
# How often it is told how many lines were cut, and how long the pipe is left alone before more of
# a flood is read and thrown away.
_TELL_SECONDS: Final = 1.0
_FLOOD_PAUSE_SECONDS: Final = 0.02
# Bytes of a logger's name; the names of modules are shorter, and ASCII.
_MAX_NAME_BYTES: Final = 100
# What `ipc.connection_id` makes, or nothing.
_CONNECTION: Final = r"\A[a-z0-9]{0,16}\Z"
# How long a receiver's thread is waited for.
_JOIN_SECONDS: Final = 2.0
_LAST_TIME: Final = 253402300799.0  # the end of the year 9999
_LEVELS: Final = {level: logging.getLevelName(level) for level in (10, 20, 30, 40, 50)}


class LogLine(msgspec.Struct, frozen=True, array_like=True):
    """What travels of a log record: text only.

    A worker and its supervisor may be of different versions: fields are added at the end, with a
    default.
    """

    created: Annotated[float, Meta(ge=0, le=_LAST_TIME)]
    level: Annotated[int, Meta(ge=0, le=50)]
    logger: Annotated[str, Meta(max_length=_MAX_NAME_BYTES)]
    text: str
    connection: Annotated[str, Meta(pattern=_CONNECTION)] = ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LogLine)


def encode(record: logging.LogRecord) -> bytes:
    """A record as bytes, cut to MAX_RECORD_BYTES; its stack trace follows the message."""
    room = MAX_RECORD_BYTES - _HEADER.size - 180
    text = _cut(record.getMessage(), room // 2 if record.exc_text else room)
    if record.exc_text:
        text += "\n" + _cut_stack(record.exc_text, room - len(text.encode()) - 1)
    level = min(max(record.levelno, 0), 50)
    name = record.name.encode("ascii", errors="replace")[:_MAX_NAME_BYTES].decode()
    connection = str(getattr(record, "connection", ""))
    if re.match(_CONNECTION, connection) is None:
        connection = ""
    body = _encoder.encode(LogLine(record.created, level, name, text, connection))
    return _HEADER.pack(len(body)) + body


def _cut(text: str, room: int) -> str:
    """At most `room` bytes of UTF-8."""
    data = text.encode(errors="replace")
    if len(data) <= room:
        return data.decode()
    return data[: room - 4].decode(errors="ignore") + " ..."


def _cut_stack(text: str, room: int) -> str:
    """The same, from the middle: how a stack ends says most."""
    data = text.encode(errors="replace")
    if len(data) <= room:
        return data.decode()
    head = room // 4
    tail = len(data) - (room - head - 7)
    return data[:head].decode(errors="ignore") + "\n ...\n" + data[tail:].decode(errors="ignore")


def decode(body: bytes) -> logging.LogRecord:
    """The record in `body` (without the length). Its text may have line breaks and worse.

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError, RecursionError: it is none.
    """
    line = _decoder.decode(body)
    return logging.makeLogRecord(
        {
            "name": line.logger,
            "levelno": line.level,
            "levelname": _LEVELS.get(line.level, str(line.level)),
            "created": line.created,
            "msecs": line.created % 1 * 1000,
            "msg": line.text,
            "connection": line.connection,
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
        except (BlockingIOError, BrokenPipeError):
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

    def __init__(self, descriptor: int, worker: str, pid: int = 0, buffered: bytes = b"") -> None:
        self.end: Final = PipeEnd(descriptor)
        self.breach = ""
        self._worker = worker
        self._pid = pid
        self._buffer = bytearray(buffered)
        self._allowance = float(_BURST_LINES)
        self._last_refill = time.monotonic()
        self._cut = 0
        self._told_at = 0.0

    @property
    def unread(self) -> bytes:
        """What has come and was not given out yet."""
        return bytes(self._buffer)

    def get(self, timeout: float) -> logging.LogRecord:
        """The next record, waiting at most `timeout` seconds.

        Raises:
            Empty: none came.
            EOFError: the worker is gone, or what it writes are no records.
        """
        while True:
            body = self._take()
            if body is None:
                self._fill(timeout)
                body = self._take()
                if body is None:
                    raise Empty
            if self._is_allowed(time.monotonic()):
                return self._decode(body)

    def _fill(self, timeout: float) -> None:
        if self._allowance < 1:
            time.sleep(_FLOOD_PAUSE_SECONDS)
        try:
            data = self.end.read(timeout)
        except EOFError:
            self._tell_cut()
            raise
        if data is None:
            self._tell_cut()
            raise Empty
        self._buffer += data

    def _take(self) -> bytes | None:
        if len(self._buffer) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack_from(self._buffer)
        if length > MAX_RECORD_BYTES - _HEADER.size:
            self._give_up(f"a record of {length} bytes")
        if len(self._buffer) < _HEADER.size + length:
            return None
        body = bytes(self._buffer[_HEADER.size : _HEADER.size + length])
        del self._buffer[: _HEADER.size + length]
        return body

    def _decode(self, body: bytes) -> logging.LogRecord:
        try:
            record = decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._give_up(str(error))
        record.worker = self._worker
        record.process = self._pid
        return record

    def _give_up(self, why: str) -> NoReturn:
        self.breach = f"it writes what is no log record ({why})"
        self._buffer.clear()
        logging.getLogger(__name__).error(
            "%s writes what is no log record (%s); its log ends here", self._worker, why
        )
        raise EOFError

    def _is_allowed(self, now: float) -> bool:
        refill = (now - self._last_refill) * _LINES_PER_SECOND
        self._allowance = min(float(_BURST_LINES), self._allowance + refill)
        self._last_refill = now
        if self._allowance < 1:
            self._cut += 1
            return False
        self._allowance -= 1
        if now - self._told_at > _TELL_SECONDS:
            self._told_at = now
            self._tell_cut()
        return True

    def _tell_cut(self) -> None:
        if self._cut:
            logging.getLogger(__name__).warning(
                "%s wrote too fast, %d log lines were cut", self._worker, self._cut
            )
            self._cut = 0

    def qsize(self) -> int:
        return len(self._buffer)

    def close(self) -> None:
        self.end.close()

    def join_thread(self) -> None:
        """Nothing to do: there is no feeder thread."""


class _OwnQueueHandler(MultiProcessingHandler):  # type: ignore[misc]  # the package has no types
    """MultiProcessingHandler with one of the queues above in place of its pickling one."""

    def __init__(self, sub_handler: logging.Handler, queue: PipeWriter | PipeReader) -> None:
        # Not the constructor of the package, which makes a multiprocessing.Queue: its locks want
        # a writable /dev/shm, and its thread would run in a worker that has yet to be confined.
        logging.Handler.__init__(self)
        self.sub_handler = sub_handler
        self.setLevel(sub_handler.level)
        self.setFormatter(sub_handler.formatter)
        self.filters = sub_handler.filters
        self.queue = queue
        self._is_closed = False


class WorkerLogHandler(_OwnQueueHandler):
    """The handler of a worker's root logger: writes to its pipe, receives nothing."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(logging.NullHandler(), PipeWriter(descriptor))

    def close(self) -> None:
        logging.Handler.close(self)


class WorkerLogReceiver(_OwnQueueHandler):
    """The supervisor's receiver for one worker start: a thread that ends with the worker."""

    def __init__(
        self,
        descriptor: int,
        worker: str,
        sub_handler: logging.Handler,
        *,
        pid: int = 0,
        buffered: bytes = b"",
    ) -> None:
        """`buffered` was read before, by a receiver that was detached; so may `descriptor` be -1.

        Raises:
            OSError: no descriptor is left. `descriptor` is closed.
            RuntimeError: no thread is left; likewise.
        """
        self._reader: Final = PipeReader(descriptor, worker, pid, buffered)
        super().__init__(sub_handler, self._reader)
        self.thread = threading.Thread(target=self._receive, name=f"log-{worker}", daemon=True)
        self._receive_thread = self.thread  # the name by which the package's close() joins it
        try:
            self.thread.start()
        except RuntimeError:
            self._reader.end.close()
            raise

    @property
    def descriptor(self) -> int:
        """The pipe; -1 when its log has ended."""
        return self._reader.end.descriptor

    @property
    def breach(self) -> str:
        """Why the log ended although the worker was there: "it ..."; empty if nothing is wrong."""
        return self._reader.breach

    def detach(self) -> tuple[int, bytes]:
        """Ends the thread; the descriptor, open (-1 if the log has ended), and what is unread."""
        self._reader.end.detach()
        self.thread.join(_JOIN_SECONDS)
        return self._reader.end.descriptor, self._reader.unread

    def close(self) -> None:
        """At the end of the program: lets the thread write what an ended worker has said last."""
        if self.thread.is_alive():
            self.thread.join(_JOIN_SECONDS)
        logging.Handler.close(self)


def make_pipe() -> tuple[int, int]:
    """A pipe (read end, write end) with room for bursts, both close-on-exec."""
    reader, writer = os.pipe()
    # The default of 64 KiB is 16 full records; a megabyte is what an unprivileged process may set.
    # Where pipes have taken all a user may have, the default must do.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    return reader, writer

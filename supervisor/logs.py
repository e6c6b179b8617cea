"""The one log stream: lines of the supervisor and of every worker, on standard error."""

import logging
import os
import time
from typing import Literal

import msgspec

LogFormat = Literal["text", "json"]

# Libraries that log each of their steps. A level on their loggers does not last: some set it anew
# when they are imported.
_CHATTY = ("pyroute2", "asyncio", "hpack", "h2", "grpclib")


class StandardErrorHandler(logging.Handler):
    """Writes each record with one system call.

    No buffered stream is used: a lock held by one thread at the moment of a fork would be held
    for ever in the child.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record; a closed or full standard error loses it, VNet goes on."""
        if record.levelno < logging.WARNING and record.name.partition(".")[0] in _CHATTY:
            return
        try:
            data = (self.format(record) + "\n").encode(errors="replace")
            os.write(2, data)
        except OSError:
            pass
        except (ValueError, TypeError):
            self.handleError(record)


# What moves a terminal's cursor, or ends a line for some reader; the line feed is not among them.
_CONTROLS = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029)
}


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO dns: message`, UTC.

    Messages quote what workers and clusters say. Lines after the first are indented, so that
    none of them looks like a record.
    """

    def format(self, record: logging.LogRecord) -> str:
        stamp = _stamp(record)
        message = _message(self, record).translate(_CONTROLS).replace("\n", "\n    ")
        return f"{stamp} {record.levelname} {_worker(record)}: {message}"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, worker, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        return msgspec.json.encode(
            {
                "time": _stamp(record),
                "level": record.levelname.lower(),
                "worker": _worker(record),
                "logger": record.name,
                "message": _message(self, record),
            }
        ).decode()


def _stamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.created % 1 * 1000):03d}Z"


def _worker(record: logging.LogRecord) -> str:
    return str(getattr(record, "worker", "supervisor"))


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    if record.exc_info:
        message = f"{message}\n{formatter.formatException(record.exc_info)}"
    # File names that are no UTF-8 have no other form.
    return message.encode(errors="replace").decode()


def set_up(level: str, log_format: LogFormat) -> logging.Handler:
    """Makes the root logger write the stream; returns the handler for the workers' records."""
    handler = StandardErrorHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    return handler

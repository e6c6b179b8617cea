"""What `vnet` commands ask a running supervisor over `<run dir>/control.sock`. Pure.

One JSON object and a line feed in each direction, then the connection ends. Who asks is known
from SO_PEERCRED.
"""

from enum import StrEnum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from supervisor.log_book import MAX_PIECE_LINES

MAX_REQUEST_BYTES = 4096


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="command", tag=str.lower):
    """Base of all requests; the tag is the command's name."""


class Status(Request, frozen=True):
    """Answered by `supervisor.status.Status` as JSON."""


class Stop(Request, frozen=True):
    """Ends VNet, as SIGTERM does."""


class Reload(Request, frozen=True):
    """Reads the configuration again, as SIGHUP does."""


class Restart(Request, frozen=True):
    """Restarts one worker, or all (`worker` is "all").

    With `drain` the old one finishes what it has; of all that is an upgrade in place.
    """

    worker: Annotated[str, Meta(min_length=1, max_length=32)]
    drain: bool = False


class Level(StrEnum):
    """The log levels that can be chosen."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogLevel(Request, frozen=True, tag="log-level"):
    """Changes the level of the supervisor and of every worker, now or (`next_start`) only then."""

    level: Level
    next_start: bool = False


class Logs(Request, frozen=True):
    """Lines of the log with a number above `after`, answered by `supervisor.log_book.Piece` as JSON.

    `worker` None is all, and the supervisor itself, which is also a name.
    """

    after: Annotated[int, Meta(ge=0)] = 0
    worker: Annotated[str, Meta(min_length=1, max_length=32)] | None = None
    level: Level = Level.DEBUG
    limit: Annotated[int, Meta(ge=1, le=MAX_PIECE_LINES)] = MAX_PIECE_LINES


class Diag(Request, frozen=True):
    """What `vnet diag` wants to know, answered by `supervisor.diag.facts.VnetFacts` as JSON."""


AnyRequest: TypeAlias = Status | Stop | Reload | Restart | LogLevel | Logs | Diag


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to everything but Status, Logs and Diag: an exit status of `vnet` and a sentence."""

    status: int
    text: str


_decoder = msgspec.json.Decoder(AnyRequest)


def decode(line: bytes) -> AnyRequest:
    """The request in one line.

    Raises:
        msgspec.MsgspecError: it is none.
    """
    try:
        request: AnyRequest = _decoder.decode(line)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
    return request


encode = msgspec.json.encode

"""What a proxy and `vnet connections` say to each other: JSON objects, one per line. Pure.

    vnet connections            proxy
      |-- Look ------------------>|
      |<-- TargetTold, for each --|   then
      |<-- ConnectionTold, each --|   then
      |<-- Complete --------------|   or Unchanged instead of all that
      |-- Look ------------------>|   a second later, and so on

There is one question at a time, so who is slow to read delays nobody but itself. The socket is
`<run dir>/mfa/<number>.list` (0600, the VNet user's), another one for each process: one that is
drained goes on telling of its connections beside its successor.
"""

from enum import StrEnum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from ipc import json_lines
from ipc.messages import Count, Port, Refusal, SafeText, Slot

# How the name of such a socket ends.
SOCKET_ENDING = ".list"
# With its line feed. Four bytes for each character of the longest texts, and the rest.
MAX_LINE_BYTES = 16 * 1024
MAX_LOOK_BYTES = 256
# Of one kind in one answer. A proxy has at most as many as connections are allowed.
MAX_LINES = 200_000
# Kept of what has ended, beside all that goes on.
MAX_CONNECTIONS = 1000
MAX_OF_TARGET = 50
# A target that has connections is kept beyond that.
MAX_TARGETS = 1000

MAX_NAME = 512

Name: TypeAlias = Annotated[str, Meta(max_length=MAX_NAME)]
Address: TypeAlias = Annotated[str, Meta(max_length=45)]
Time: TypeAlias = Annotated[float, Meta(ge=0, le=1e11)]
Rate: TypeAlias = Annotated[float, Meta(ge=0, le=1e15)]


class TargetKind(StrEnum):
    """What a program wanted to reach."""

    APP = "app"
    DATABASE = "database"
    SSH = "ssh"
    WEB = "web"  # the web port of a Teleport proxy
    UNKNOWN = "unknown"  # refused before that was found out


class ConnectionState(StrEnum):
    """Where a connection is."""

    DIALLING = "dialling"  # the program waits
    ACTIVE = "active"
    DONE = "done"  # it was established, and has ended
    FAILED = "failed"  # it was refused
    CANCELLED = "cancelled"  # nobody waited for it any more


LIVE = frozenset({ConnectionState.DIALLING, ConnectionState.ACTIVE})


class _Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", forbid_unknown_fields=True):
    pass


class Look(_Line, frozen=True, tag=True):
    """Asks for everything, unless nothing has happened since `known`, the last `revision`."""

    known: Count | None = None


class TargetTold(_Line, frozen=True, tag=True):
    """Totals of one target since the proxy began. Bytes are the program's.

    `port` is set for apps with several. Rates are bytes per second, None when not known yet: a look a
    second later has them.
    """

    kind: TargetKind
    profile: Name
    leaf: Name
    name: Name
    port: Port | None
    dialling: Count
    active: Count
    ok: Count
    failed: Count
    bytes_sent: Count
    bytes_received: Count
    sent_per_second: Rate | None
    received_per_second: Rate | None


class ConnectionTold(_Line, frozen=True, tag=True):
    """One connection. `started` and `ended` are seconds since 1970 in UTC.

    `id` is that of the log. `address` and `port` are those that the program connected to, `client_address`
    and `client_port` its own. `end` says how an established one ended.
    """

    id: Annotated[str, Meta(max_length=32)]
    kind: TargetKind
    profile: Name
    leaf: Name
    name: Name
    address: Address
    port: Port
    client_address: Address
    client_port: Port
    state: ConnectionState
    started: Time
    ended: Time | None
    duration_seconds: Time
    bytes_sent: Count
    bytes_received: Count
    sent_per_second: Rate | None
    received_per_second: Rate | None
    refusal: Refusal | None
    end: Annotated[str, Meta(max_length=32)]
    error: SafeText


class Complete(_Line, frozen=True, tag=True):
    """Everything has been told."""

    slot: Slot
    revision: Count


class Unchanged(_Line, frozen=True, tag=True):
    """Everything is as it was told last."""


FromProxy: TypeAlias = TargetTold | ConnectionTold | Complete | Unchanged

_from_proxy = json_lines.decoder_of(FromProxy)
_look = json_lines.decoder_of(Look)


def encode(message: FromProxy | Look) -> bytes:
    """One line, with its line feed."""
    return json_lines.encode(message)


def decode_from_proxy(line: bytes) -> FromProxy:
    """What a proxy said.

    Raises:
        msgspec.MsgspecError: the line is no such message.
    """
    message: FromProxy = _from_proxy(line)
    return message


def decode_look(line: bytes) -> Look:
    """What `vnet connections` said.

    Raises:
        msgspec.MsgspecError: the line is no such message.
    """
    message: Look = _look(line)
    return message

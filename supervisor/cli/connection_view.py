"""`vnet connections` for people: two tables that fit the terminal. Pure."""

import time
from calendar import timegm
from collections.abc import Sequence
from pathlib import PurePath

from ipc.connection_list import LIVE, ConnectionState
from supervisor.cli.connection_report import ConnectionList, ConnectionRow, TargetRow
from supervisor.cli.screen import MIN_WIDTH
from supervisor.cli.table import Column, numbers, table
from supervisor.cli.text import (
    BOLD,
    DIM,
    ELLIPSIS,
    PLAIN,
    RED,
    columns,
    cut,
    duration,
    head,
    printable,
    wrapped,
)

_REASON_INDENT = 2
_MAX_REASON_LINES = 3


def lines(found: ConnectionList, width: int | None, now: float, *, has_colour: bool) -> list[str]:
    """Both tables as lines of at most `width` columns (None: any).

    `now` is seconds since 1970. What moves a terminal's cursor is shown as a blank.
    """
    width = None if width is None else max(width, MIN_WIDTH)
    if not found.targets and not found.connections:
        return ["no connections yet"]
    shown = _table(_of_targets(found.targets), width, has_colour=has_colour)
    header, *rows = _table(_of_connections(found.connections, now), width, has_colour=has_colour)
    shown += ["", header]
    for connection, row in zip(found.connections, rows, strict=True):
        shown.append(_painted(row, connection.state) if has_colour else row)
        shown += _reason(connection, width)
    return shown


def sentence(text: str, width: int | None) -> list[str]:
    """A problem as lines of at most `width` columns (None: one)."""
    clean = printable(text)
    return [clean] if width is None else wrapped(clean, width)


def _of_targets(rows: Sequence[TargetRow]) -> list[Column]:
    return [
        Column("TARGET", [_target_name(row) for row in rows], least=20),
        Column("KIND", [row.kind for row in rows], need=1),
        numbers("ACTIVE", [_count(row.active + row.dialling) for row in rows]),
        numbers("OK", [_count(row.ok) for row in rows]),
        numbers("FAILED", [_count(row.failed) for row in rows]),
        numbers("SENT", [amount(row.bytes_sent) for row in rows], need=4),
        numbers("RECV", [amount(row.bytes_received) for row in rows], need=4),
        numbers("SENT/S", [_rate(row, row.sent_per_second) for row in rows], need=2),
        numbers("RECV/S", [_rate(row, row.received_per_second) for row in rows], need=2),
    ]


def _of_connections(rows: Sequence[ConnectionRow], now: float) -> list[Column]:
    return [
        Column("STATE", [row.state for row in rows]),
        Column("TARGET", [_place(row) for row in rows], least=16),
        Column("CLIENT", [_client(row) for row in rows], least=14, need=6),
        Column("SINCE", [_clock(row) for row in rows], need=1),
        numbers("TIME", [_time(row, now) for row in rows], need=5),
        numbers("SENT", [_amount(row, row.bytes_sent) for row in rows], need=3),
        numbers("RECV", [_amount(row, row.bytes_received) for row in rows], need=3),
        numbers("SENT/S", [_rate(row, row.sent_per_second) for row in rows], need=2),
        numbers("RECV/S", [_rate(row, row.received_per_second) for row in rows], need=2),
        Column("ID", [row.id for row in rows]),
    ]


# -- cells --


def _target_name(row: TargetRow) -> str:
    name = row.name or "(address without a name)"
    return name if row.port is None else f"{name}:{row.port}"


def _place(row: ConnectionRow) -> str:
    address = f"[{row.address}]" if ":" in row.address else row.address
    return f"{row.name or address}:{row.port}"


def _client(row: ConnectionRow) -> str:
    if row.program is not None:
        return f"{PurePath(row.program).name} {row.pid}"
    return "-" if row.uid is None else f"user {row.uid}"


def _clock(row: ConnectionRow) -> str:
    return time.strftime("%H:%M:%S", time.localtime(_seconds(row.started)))


def _time(row: ConnectionRow, now: float) -> str:
    is_live = row.state in LIVE
    return duration(max(now - _seconds(row.started), 0) if is_live else row.duration_seconds)


def _seconds(stamp: str) -> int:
    return timegm(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S"))


def _amount(row: ConnectionRow, count: int) -> str:
    was_open = row.state in (ConnectionState.ACTIVE, ConnectionState.DONE)
    return amount(count) if was_open else "-"


def _rate(row: ConnectionRow | TargetRow, rate: float | None) -> str:
    is_active = row.active if isinstance(row, TargetRow) else row.state is ConnectionState.ACTIVE
    return amount(rate) if rate is not None and (is_active or rate) else "-"


def _count(number: int) -> str:
    return str(number) if number < 100_000 else amount(number)


def amount(count: float) -> str:
    """At most five characters: 0, 999, 1.2k, 123k, 4.5M."""
    if count < 999.5:
        return f"{count:.0f}"
    for unit in "kMGTP":
        count /= 1000
        if count < 99.95:
            return f"{count:.1f}{unit}"
        if count < 999.5:
            return f"{count:.0f}{unit}"
    return "999P+"


def _reason(row: ConnectionRow, width: int | None) -> list[str]:
    """Why it failed, or ended otherwise than in order."""
    why = row.refusal or (row.end if row.error else "")
    text = printable(f"{why}: {row.error}" if why and row.error else row.error or why)
    indent = " " * _REASON_INDENT
    if not text:
        return []
    if width is None:
        return [indent + text]
    return wrapped(text, width, indent=indent, max_lines=_MAX_REASON_LINES)


# -- tables --


def _table(wanted: Sequence[Column], width: int | None, *, has_colour: bool) -> list[str]:
    # What nothing is known of in any row needs no column.
    known = [c for c in wanted if not c.need or any(cell != "-" for cell in c.cells)]
    header, *rows = table(known, width, cut=_cut)
    return [f"{BOLD}{header}{PLAIN}" if has_colour else header, *rows]


def _cut(text: str, width: int) -> str:
    """The end stays where it is a port or a process."""
    if columns(text) <= width:
        return text
    first, mark, last = text.rpartition(":")
    if not mark:
        first, mark, last = text.rpartition(" ")
    room = width - columns(mark + last) - 1
    return f"{head(first, room)}{ELLIPSIS}{mark}{last}" if mark and room > 0 else cut(text, width)


def _painted(line: str, state: ConnectionState) -> str:
    match state:
        case ConnectionState.FAILED:
            return f"{RED}{line}{PLAIN}"
        case ConnectionState.DONE | ConnectionState.CANCELLED:
            return f"{DIM}{line}{PLAIN}"
        case _:
            return line

"""`vnet connections` for people: two tables that fit the terminal. Pure."""

import time
from calendar import timegm
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from ipc.connection_list import LIVE, ConnectionState
from supervisor.cli.connection_report import ConnectionList, ConnectionRow, TargetRow
from supervisor.cli.screen import MIN_WIDTH
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
    padded,
    printable,
    wrapped,
)

_GAP = "  "
_REASON_INDENT = 2
_MAX_REASON_LINES = 3


@dataclass(frozen=True, slots=True)
class _Column:
    """`cells` as they are when there is room.

    Where there is not they are cut, to `least` characters at worst, and columns are left out, those with the lowest
    `need` first. `need` 0: never.
    """

    title: str
    cells: Sequence[str]
    least: int | None = None
    need: int = 0
    is_number: bool = False


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


def _of_targets(rows: Sequence[TargetRow]) -> list[_Column]:
    return [
        _Column("TARGET", [_target_name(row) for row in rows], least=20),
        _Column("KIND", [row.kind for row in rows], need=1),
        _numbers("ACTIVE", [_count(row.active + row.dialling) for row in rows]),
        _numbers("OK", [_count(row.ok) for row in rows]),
        _numbers("FAILED", [_count(row.failed) for row in rows]),
        _numbers("SENT", [amount(row.bytes_sent) for row in rows], need=4),
        _numbers("RECV", [amount(row.bytes_received) for row in rows], need=4),
        _numbers("SENT/S", [_rate(row, row.sent_per_second) for row in rows], need=2),
        _numbers("RECV/S", [_rate(row, row.received_per_second) for row in rows], need=2),
    ]


def _of_connections(rows: Sequence[ConnectionRow], now: float) -> list[_Column]:
    return [
        _Column("STATE", [row.state for row in rows]),
        _Column("TARGET", [_place(row) for row in rows], least=16),
        _Column("CLIENT", [_client(row) for row in rows], least=14, need=6),
        _Column("SINCE", [_clock(row) for row in rows], need=1),
        _numbers("TIME", [_time(row, now) for row in rows], need=5),
        _numbers("SENT", [_amount(row, row.bytes_sent) for row in rows], need=3),
        _numbers("RECV", [_amount(row, row.bytes_received) for row in rows], need=3),
        _numbers("SENT/S", [_rate(row, row.sent_per_second) for row in rows], need=2),
        _numbers("RECV/S", [_rate(row, row.received_per_second) for row in rows], need=2),
        _Column("ID", [row.id for row in rows]),
    ]


def _numbers(title: str, cells: Sequence[str], need: int = 0) -> _Column:
    return _Column(title, cells, need=need, is_number=True)


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


def _table(wanted: Sequence[_Column], width: int | None, *, has_colour: bool) -> list[str]:
    """Its lines, the titles first."""
    clean = [_with_cells(column, [printable(cell) for cell in column.cells]) for column in wanted]
    # What nothing is known of in any row needs no column.
    clean = [c for c in clean if not c.need or any(cell != "-" for cell in c.cells)]
    widths = _fit(clean, width)
    kept = [column for column in clean if column.title in widths]
    header = _line(kept, widths, [column.title for column in kept])
    rows = zip(*(column.cells for column in kept), strict=True)
    header = f"{BOLD}{header}{PLAIN}" if has_colour else header
    return [header, *(_line(kept, widths, row) for row in rows)]


def _with_cells(column: _Column, cells: Sequence[str]) -> _Column:
    return _Column(column.title, cells, column.least, column.need, column.is_number)


def _fit(wanted: Sequence[_Column], width: int | None) -> dict[str, int]:
    """The width of each column that is shown."""
    natural = {c.title: max(map(columns, (c.title, *c.cells))) for c in wanted}
    if width is None:
        return natural
    left = list(wanted)
    while True:
        widths = {column.title: natural[column.title] for column in left}
        excess = sum(widths.values()) + len(_GAP) * (len(left) - 1) - width
        for column in _cuttable(left, widths):
            if excess <= 0:
                return widths
            spare = widths[column.title] - (column.least or 0)
            taken = min(spare, excess)
            widths[column.title] -= taken
            excess -= taken
        needs = [column.need for column in left if column.need]
        if excess <= 0 or not needs:
            return widths
        left = [column for column in left if column.need != min(needs)]


def _cuttable(wanted: Sequence[_Column], widths: Mapping[str, int]) -> Iterator[_Column]:
    """The last first: the target says most."""
    for column in reversed(wanted):
        if column.least is not None and widths[column.title] > column.least:
            yield column


def _line(shown_columns: Sequence[_Column], widths: Mapping[str, int], cells: Sequence[str]) -> str:
    shown = []
    for column, cell in zip(shown_columns, cells, strict=True):
        width = widths[column.title]
        shown.append(padded(_cut(cell, width), width, is_number=column.is_number))
    return _GAP.join(shown).rstrip()


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

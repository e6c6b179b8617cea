"""`vnet connections` for people: two tables that fit the terminal. Pure."""

import textwrap
import time
from calendar import timegm
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from ipc.connection_list import LIVE, ConnectionState
from supervisor.cli.connection_report import ConnectionList, ConnectionRow, TargetRow

_GAP = "  "
_BOLD, _RED, _DIM, _PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[2m", "\x1b[0m"
_REASON_INDENT = 2
_MAX_REASON_LINES = 3
_MIN_WIDTH = 40
# Whatever a terminal says about itself.
_MIN_HEIGHT = 6


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
    width = None if width is None else max(width, _MIN_WIDTH)
    if not found.targets and not found.connections:
        return ["no connections yet"]
    shown = _table(_of_targets(found.targets), width, has_colour=has_colour)
    header, *rows = _table(_of_connections(found.connections, now), width, has_colour=has_colour)
    shown += ["", header]
    for connection, row in zip(found.connections, rows, strict=True):
        shown.append(_painted(row, connection.state) if has_colour else row)
        shown += _reason(connection, width)
    return shown


def fitted(shown: Sequence[str], height: int) -> list[str]:
    """As many lines as a terminal of this height shows, one of which says how many are missing."""
    room = max(height, _MIN_HEIGHT) - 1
    if len(shown) <= room:
        return list(shown)
    missing = len(shown) - room + 1
    return [*shown[: room - 1], f"... and {missing} lines more: vnet connections shows all"]


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
        _Column("TARGET", [_place(row) for row in rows], least=20),
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


def duration(seconds: float) -> str:
    """In the two largest units: 5s, 3m 5s, 2h 3m, 4d 2h."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {rest}s" if minutes else f"{rest}s"


def _reason(row: ConnectionRow, width: int | None) -> list[str]:
    """Why it failed, or ended otherwise than in order."""
    why = row.refusal or (row.end if row.error else "")
    text = printable(f"{why}: {row.error}" if why and row.error else row.error or why)
    indent = " " * _REASON_INDENT
    if not text:
        return []
    if width is None:
        return [indent + text]
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        max_lines=_MAX_REASON_LINES,
        placeholder=" ...",
        break_on_hyphens=False,
    )


# -- tables --


def _table(columns: Sequence[_Column], width: int | None, *, has_colour: bool) -> list[str]:
    """Its lines, the titles first."""
    clean = [_with_cells(column, [printable(cell) for cell in column.cells]) for column in columns]
    # What nothing is known of in any row needs no column.
    clean = [c for c in clean if not c.need or any(cell != "-" for cell in c.cells)]
    widths = _fit(clean, width)
    kept = [column for column in clean if column.title in widths]
    header = _line(kept, widths, [column.title for column in kept])
    rows = zip(*(column.cells for column in kept), strict=True)
    header = f"{_BOLD}{header}{_PLAIN}" if has_colour else header
    return [header, *(_line(kept, widths, row) for row in rows)]


def _with_cells(column: _Column, cells: Sequence[str]) -> _Column:
    return _Column(column.title, cells, column.least, column.need, column.is_number)


def _fit(columns: Sequence[_Column], width: int | None) -> dict[str, int]:
    """The width of each column that is shown."""
    natural = {c.title: max(len(c.title), *map(len, c.cells), 0) for c in columns}
    if width is None:
        return natural
    left = list(columns)
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


def _cuttable(columns: Sequence[_Column], widths: Mapping[str, int]) -> Iterator[_Column]:
    """The last first: the target says most."""
    for column in reversed(columns):
        if column.least is not None and widths[column.title] > column.least:
            yield column


def _line(columns: Sequence[_Column], widths: Mapping[str, int], cells: Sequence[str]) -> str:
    shown = []
    for column, cell in zip(columns, cells, strict=True):
        width = widths[column.title]
        text = _cut(cell, width)
        shown.append(text.rjust(width) if column.is_number else text.ljust(width))
    return _GAP.join(shown).rstrip()


def _cut(text: str, width: int) -> str:
    """The end stays where it is a port or a process."""
    if len(text) <= width:
        return text
    head, mark, tail = text.rpartition(":")
    if not mark:
        head, mark, tail = text.rpartition(" ")
    room = width - len(mark + tail) - 1
    return f"{head[:room]}…{mark}{tail}" if mark and room > 0 else text[: width - 1] + "…"


def _painted(line: str, state: ConnectionState) -> str:
    match state:
        case ConnectionState.FAILED:
            return f"{_RED}{line}{_PLAIN}"
        case ConnectionState.DONE | ConnectionState.CANCELLED:
            return f"{_DIM}{line}{_PLAIN}"
        case _:
            return line


def printable(text: str) -> str:
    """Without what moves a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)

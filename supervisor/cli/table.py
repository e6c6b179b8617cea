"""Tables that fit a terminal. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from supervisor.cli.text import columns, cut_middle, padded, printable

GAP: Final = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """`cells` as they are when there is room.

    Where there is not they are cut, to `least` columns of the terminal at worst (None: never), and columns are
    left out, those with the lowest `need` first (0: never).
    """

    title: str
    cells: Sequence[str]
    least: int | None = None
    need: int = 0
    is_number: bool = False


def numbers(title: str, cells: Sequence[str], need: int = 0) -> Column:
    """A column of numbers, which are never cut."""
    return Column(title, cells, need=need, is_number=True)


def table(
    wanted: Sequence[Column], width: int | None, *, cut: Callable[[str, int], str] = cut_middle
) -> Iterator[str]:
    """Its lines, the titles first, of at most `width` columns (None: any) as far as that may be.

    What moves a terminal's cursor is shown as a blank. `cut(text, width)` shortens a cell.
    """
    clean = [replace(column, cells=list(map(printable, column.cells))) for column in wanted]
    widths = _fit(clean, width)
    kept = [column for column in clean if column.title in widths]
    yield _line(kept, widths, [column.title for column in kept], cut)
    for cells in zip(*(column.cells for column in kept), strict=True):
        yield _line(kept, widths, cells, cut)


def _fit(wanted: Sequence[Column], width: int | None) -> dict[str, int]:
    """The width of each column that is shown; the last are cut first."""
    left = list(wanted)
    while True:
        widths = {c.title: max(map(columns, (c.title, *c.cells))) for c in left}
        excess = 0 if width is None else sum(widths.values()) + len(GAP) * (len(left) - 1) - width
        for column in reversed(left):
            if excess > 0 and column.least is not None:
                taken = max(0, min(excess, widths[column.title] - column.least))
                widths[column.title] -= taken
                excess -= taken
        needs = [column.need for column in left if column.need]
        if excess <= 0 or not needs:
            return widths
        left = [column for column in left if column.need != min(needs)]


def _line(
    kept: Sequence[Column],
    widths: Mapping[str, int],
    cells: Sequence[str],
    cut: Callable[[str, int], str],
) -> str:
    shown = [
        padded(cut(cell, widths[c.title]), widths[c.title], is_number=c.is_number)
        for c, cell in zip(kept, cells, strict=True)
    ]
    return GAP.join(shown).rstrip()

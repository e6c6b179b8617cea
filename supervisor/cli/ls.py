"""`vnet ls`: what can be reached, as a table or as JSON."""

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from supervisor.cli import teleport_access
from supervisor.cli.progress import Progress
from supervisor.cli.screen import has_colour, width_of
from supervisor.cli.table import GAP
from supervisor.cli.teleport_access import Access, CommandError
from supervisor.cli.text import BOLD, PLAIN, columns, cut_middle, padded, printable, wrapped
from supervisor.exits import ExitStatus

if TYPE_CHECKING:
    from workers.proxy.resource_rows import Row

KINDS = ("app", "db", "node")

# A name or a list of ports that is cut is still a hint; an address that is cut is useless.
_CUT_TO = {"NAME": 12, "PORTS": 10, "CLUSTER": 12, "PROFILE": 12}
# Left out one by one on a narrow terminal.
_LESS_NEEDED = ("PROFILE", "CLUSTER", "PORTS")
_MIN_ADDRESS = 30
_MAX_NOTED_NAMES = 5


def list_reachable(
    access: Access, *, kinds: Sequence[str], cluster: str, search: str, as_json: bool
) -> ExitStatus:
    """Prints what there is to standard output, and problems to standard error.

    Raises:
        CommandError: a kind or cluster that does not exist.
    """
    for kind in kinds:
        if kind not in KINDS:
            known = ", ".join(KINDS)
            raise CommandError(ExitStatus.USAGE, f"{kind!r} is no kind: use one of {known}")
    # Only this command needs the client.
    from workers.proxy.listing import NoSuchClusterError, list_resources  # noqa: PLC0415
    from workers.proxy.resource_rows import Kind, Listing  # noqa: PLC0415
    from workers.proxy.teleport.auth_client import Connector  # noqa: PLC0415

    async def ask() -> Listing:
        connect = Connector(
            ca_file=access.ca_file, insecure=access.insecure, environment=os.environ
        )
        try:
            return await list_resources(
                access.home,
                connect,
                datetime.now(UTC),
                kinds=[kind for kind in Kind if not kinds or kind in kinds],
                cluster=cluster,
                words=search.split(),
            )
        except NoSuchClusterError as error:
            raise CommandError(ExitStatus.USAGE, str(error)) from error

    with Progress("asking the clusters"):
        listing = teleport_access.run(ask)
    if as_json:
        print(msgspec.json.encode(listing).decode(), flush=True)
    else:
        _print_table(listing.resources)
    for problem in listing.problems:
        print(f"vnet: {problem}", file=sys.stderr)
    return ExitStatus.DEGRADED if listing.problems else ExitStatus.OK


def _print_table(rows: "Sequence[Row]") -> None:
    lines = table(rows, None, has_colour=False)
    width = width_of(sys.stdout)
    if width is not None:
        shown = table(rows, width, has_colour=has_colour(sys.stdout))
        lines = itertools.chain(shown, notes(rows, width))
    for line in lines:
        print(line)
    sys.stdout.flush()


def table(rows: "Sequence[Row]", width: int | None, *, has_colour: bool) -> Iterator[str]:
    """The rows as lines of at most `width` columns (None: any); a long address may be longer. Pure.

    Profiles are shown where there is more than one.
    """
    if not rows:
        if width is not None:
            yield "nothing found"
        return
    found = {
        "KIND": [_shown_kind(row) for row in rows],
        "NAME": [row.name for row in rows],
        "ADDRESS": [row.address or "-" if _is_usable(row) else "-" for row in rows],
        "PORTS": [row.ports or "-" if _is_usable(row) else "-" for row in rows],
        "CLUSTER": [row.cluster for row in rows],
        "PROFILE": [row.profile for row in rows],
    }
    if len(set(found["PROFILE"])) == 1:
        del found["PROFILE"]
    found = {title: list(map(printable, cells)) for title, cells in found.items()}
    widths = {title: max(map(columns, (title, *cells))) for title, cells in found.items()}
    if width is not None:
        widths = fitted(widths, width)
    header = _line(widths, dict(zip(found, found, strict=True)))
    yield f"{BOLD}{header}{PLAIN}" if has_colour else header
    for cells in zip(*found.values(), strict=True):
        yield _line(widths, dict(zip(found, cells, strict=True)))


def fitted(widths: Mapping[str, int], width: int) -> dict[str, int]:
    """Widths of columns that fit: cut, then left out, as far as that may be. Pure."""
    left = dict(widths)

    def excess() -> int:
        return sum(left.values()) + len(GAP) * (len(left) - 1) - width

    for dropped in ("", *_LESS_NEEDED):
        left.pop(dropped, None)
        # Cut back to what is needed: what a column that is left out had is free again.
        left = {title: widths[title] for title in left}
        while excess() > 0:
            over = {t: w for t, w in left.items() if w > _CUT_TO.get(t, w)}
            if not over:
                break
            left[max(over, key=lambda title: over[title])] -= 1
        if excess() <= 0:
            return left
    # Long addresses stick out of their column; the others stay in it.
    left["ADDRESS"] = max(left["ADDRESS"] - excess(), _MIN_ADDRESS)
    return left


def _line(widths: Mapping[str, int], cells: Mapping[str, str]) -> str:
    shown = [
        padded(cells[title] if title == "ADDRESS" else cut_middle(cells[title], width), width)
        for title, width in widths.items()
    ]
    return GAP.join(shown).rstrip()


def _shown_kind(row: "Row") -> str:
    is_plain = (row.kind, row.protocol) in {("app", "tcp"), ("node", "ssh")}
    return row.kind if is_plain else f"{row.kind} {row.protocol}".rstrip()


def _is_usable(row: "Row") -> bool:
    return row.through_vnet or row.protocol == "web"


def notes(rows: "Iterable[Row]", width: int) -> Iterator[str]:
    """Why a program cannot reach some of them through VNet, in a line for each reason. Pure."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            names.setdefault(row.note, []).append(row.name)
    if names:
        yield ""
    for note, noted in names.items():
        shown = ", ".join(noted[:_MAX_NOTED_NAMES])
        more = len(noted) - _MAX_NOTED_NAMES
        shown += f" and {more} more" if more > 0 else ""
        yield from wrapped(printable(f"{shown}: {note}"), width)

"""`vnet status` for people: text that fits the terminal. Pure."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from ipc.messages import ClusterState
from supervisor.cli.table import Column, numbers, table
from supervisor.cli.text import (
    BOLD,
    GREEN,
    PLAIN,
    RED,
    YELLOW,
    duration,
    printable,
    wrapped,
)
from supervisor.status import Check, ClusterStatus, Health, SecurityStatus, Status, WorkerStatus
from supervisor.worker_states import WorkerState

T = TypeVar("T")

_BYTES_PER_MEGABYTE = 1_000_000
# Ranges and zones that a terminal shows; --json has all.
_MAX_NAMES = 12
_COLOURS: Final = {
    Health.HEALTHY: GREEN,
    Health.STARTING: YELLOW,
    Health.DEGRADED: YELLOW,
    Health.STOPPED: RED,
}


def lines(status: Status, width: int | None = None, *, has_colour: bool = False) -> Iterator[str]:
    """The status as lines of at most `width` columns (None: any); what is not known to the asker is left out.

    Workers and clusters have words in it: what moves a terminal's cursor is shown as a blank.
    """
    colour = _COLOURS[status.health] if has_colour else ""
    yield f"{colour}VNet is {status.health}{PLAIN if colour else ''}"
    for reason in status.reasons:
        yield from _wrapped(reason, width, indent="  ")
    if status.health is Health.DEGRADED and status.reasons:
        kinds = ", ".join(dict.fromkeys(status.reason_ids))
        text = f"see docs/troubleshooting.md: {kinds}" if kinds else "see docs/troubleshooting.md"
        yield from _wrapped(text, width, indent="  ")
    if status.supervisor is not None:
        for line in _details(status, width):
            yield from _wrapped(line, width) if line else [""]
        yield ""
        workers = status.workers or ()
        are_odd = [worker.state is not WorkerState.READY for worker in workers]
        yield from _table(_of_workers(workers), width, are_odd, has_colour=has_colour)
        yield from _unconfined(workers, width)
    if status.clusters:
        yield ""
        are_odd = [cluster.state is not ClusterState.OK for cluster in status.clusters]
        yield from _table(_of_clusters(status.clusters), width, are_odd, has_colour=has_colour)


def _details(status: Status, width: int | None) -> Iterator[str]:
    """What is said in a line for each subject."""
    assert status.supervisor is not None
    yield ""
    yield (
        f"version {status.supervisor.version}, process {status.supervisor.pid}, user"
        f" {status.supervisor.user}, up {duration(status.supervisor.uptime_seconds)}"
    )
    if status.network is not None:
        network = status.network
        yield f"interface {network.interface}, ranges {_some(network.ipv4_cidr_ranges, width)}"
        yield f"DNS server {', '.join(network.dns_addresses)}"
        yield f"zones {_some(network.dns_zones, width) or 'none'}"
    if status.connections is not None:
        counts = status.connections
        yield (
            f"connections {counts.active} active, {counts.total} in all, {counts.failed} refused,"
            f" {_megabytes(counts.bytes_sent)} sent, {_megabytes(counts.bytes_received)} received"
        )
    if status.security is not None and (told := ", ".join(_security(status.security))):
        yield f"security: {told}"
    for warning in status.warnings:
        yield f"warning: {warning}"


def _security(security: SecurityStatus) -> Iterator[str]:
    """What is off, and what was refused."""
    if security.user_check is Check.OFF:
        yield "all users may connect"
    if security.http_check is Check.OFF:
        yield "HTTP requests are not checked"
    elif count := len(security.http_unchecked):
        yield f"HTTP requests to {count} {_plural('app', count)} are not checked"
    if count := security.users_refused:
        yield f"{count} {_plural('connection', count)} of users who may not connect refused"
    if count := security.http_refused:
        yield f"{count} HTTP {_plural('request', count)} refused"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _some(names: Sequence[str], width: int | None) -> str:
    """All of them, or on a terminal the first few and how many more."""
    more = len(names) - _MAX_NAMES
    if width is None or more <= 1:
        return ", ".join(names)
    return f"{', '.join(names[:_MAX_NAMES])} and {more} more"


def _wrapped(text: str, width: int | None, indent: str = "") -> list[str]:
    clean = printable(text)
    return [indent + clean] if width is None else wrapped(clean, width, indent=indent)


def _unconfined(workers: Sequence[WorkerStatus], width: int | None) -> Iterator[str]:
    """A note for each part of the confinement that is not in force, with the workers it concerns."""
    names: dict[str, list[str]] = {}
    for worker in workers:
        for text in worker.confinement.missing if worker.confinement else ():
            names.setdefault(text, []).append(worker.name)
    for text, concerned in names.items():
        yield from _wrapped(f"note, {', '.join(concerned)}: {text}", width)


# -- tables --


def _of_workers(workers: Sequence[WorkerStatus]) -> list[Column]:
    return [
        Column("WORKER", [worker.name for worker in workers], least=9),
        Column("STATE", [worker.state for worker in workers]),
        numbers("PID", [str(worker.pid or "-") for worker in workers], need=4),
        numbers("RESTARTS", [str(worker.restarts) for worker in workers], need=5),
        numbers("UP", [_known(worker.uptime_seconds, duration) for worker in workers], need=3),
        numbers("MEMORY", [_known(worker.rss_bytes, _megabytes) for worker in workers], need=2),
        numbers("CPU", [_known(worker.cpu_percent, _percent) for worker in workers], need=1),
    ]


def _of_clusters(clusters: Sequence[ClusterStatus]) -> list[Column]:
    return [
        Column("CLUSTER", [cluster.name for cluster in clusters], least=16),
        Column("STATE", [cluster.state for cluster in clusters]),
        Column("USER", [cluster.user for cluster in clusters], least=8, need=1),
        Column("EXPIRES", [cluster.expires or "-" for cluster in clusters], need=2),
    ]


def _known(value: T | None, shown: Callable[[T], str]) -> str:
    return "-" if value is None else shown(value)


def _table(
    wanted: Sequence[Column], width: int | None, are_odd: Sequence[bool], *, has_colour: bool
) -> Iterator[str]:
    """`are_odd`: which rows call for a look."""
    header, *rows = table(wanted, width)
    yield f"{BOLD}{header}{PLAIN}" if has_colour else header
    for row, is_odd in zip(rows, are_odd, strict=True):
        yield f"{YELLOW}{row}{PLAIN}" if has_colour and is_odd else row


def _megabytes(count: int) -> str:
    return f"{count / _BYTES_PER_MEGABYTE:.1f} MB"


def _percent(share: float) -> str:
    return f"{share:.1f} %"

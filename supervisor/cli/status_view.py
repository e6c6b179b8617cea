"""`vnet status` for people: text that fits 80 columns. Pure."""

import textwrap
from collections.abc import Iterator, Sequence

from supervisor.status import Status, WorkerStatus

_BYTES_PER_MEGABYTE = 1_000_000


def lines(status: Status) -> Iterator[str]:
    """The status as lines; what is not known to the asker is left out.

    Workers and clusters have words in it: what moves a terminal's cursor is shown as a blank.
    """
    for line in _lines(status):
        yield "".join(c if c.isprintable() else " " for c in line)


def _lines(status: Status) -> Iterator[str]:
    yield f"VNet is {status.health}"
    for reason in status.reasons:
        yield f"  {reason}"
    if status.supervisor is None:
        return
    yield ""
    yield (
        f"version {status.supervisor.version}, process {status.supervisor.pid}, user"
        f" {status.supervisor.user}, up {_duration(status.supervisor.uptime_seconds)}"
    )
    if status.network is not None:
        network = status.network
        yield f"interface {network.interface}, ranges {', '.join(network.ipv4_cidr_ranges)}"
        yield f"DNS server {', '.join(network.dns_addresses)}"
        yield f"zones {', '.join(network.dns_zones) or 'none'}"
    if status.connections is not None:
        counts = status.connections
        yield (
            f"connections {counts.active} active, {counts.total} in all, {counts.failed} refused,"
            f" {_megabytes(counts.bytes_sent)} sent, {_megabytes(counts.bytes_received)} received"
        )
    yield ""
    yield f"{'WORKER':<10}{'STATE':<10}{'PID':>8}{'RESTARTS':>10}{'UP':>10}{'MEMORY':>10}{'CPU':>8}"
    for worker in status.workers or ():
        yield _worker(worker)
    yield from _unconfined(status.workers or ())
    if status.clusters:
        yield ""
        yield f"{'CLUSTER':<24}{'STATE':<16}{'USER':<18}EXPIRES"
        for cluster in status.clusters:
            yield (
                f"{cluster.name:<24}{cluster.state:<16}{cluster.user:<18}{cluster.expires or '-'}"
            )


def _unconfined(workers: Sequence[WorkerStatus]) -> Iterator[str]:
    """A note for each part of the confinement that is not in force, with the workers it concerns."""
    names: dict[str, list[str]] = {}
    for worker in workers:
        for text in worker.confinement.missing if worker.confinement else ():
            names.setdefault(text, []).append(worker.name)
    for text, concerned in names.items():
        yield from textwrap.wrap(f"note, {', '.join(concerned)}: {text}", 80)


def _worker(worker: WorkerStatus) -> str:
    up = "-" if worker.uptime_seconds is None else _duration(worker.uptime_seconds)
    memory = "-" if worker.rss_bytes is None else _megabytes(worker.rss_bytes)
    cpu = "-" if worker.cpu_percent is None else f"{worker.cpu_percent:.1f} %"
    return (
        f"{worker.name:<10}{worker.state:<10}{worker.pid or '-':>8}{worker.restarts:>10}"
        f"{up:>10}{memory:>10}{cpu:>8}"
    )


def _megabytes(count: int) -> str:
    return f"{count / _BYTES_PER_MEGABYTE:.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {rest}s" if minutes else f"{rest}s"

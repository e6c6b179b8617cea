"""Measures a whole VNet with real programs, beside what they do without it.

It runs in network, mount and process namespaces of its own and leaves nothing behind. Every figure
has its baseline from the same run: the machine may be slow or busy, the relation tells. The table
goes to standard error, one line of JSON to standard output. Needs root.

    scripts/bench [--quick] [--only memory|status|dns|connect|who|http|throughput|clusters|list|ways|ssh]
"""

import argparse
import json
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import bench_bed
import bench_clusters
import bench_connect
import bench_dns
import bench_http
import bench_list
import bench_memory
import bench_ssh
import bench_status
import bench_throughput
import bench_ways
import bench_who
from bench_figures import Figure, table

from demo.private_network import run_in_private_network

# Parts that share a bed. Memory first: the others leave buffers behind that an idle VNet does not have.
SHARED = ("memory", "status", "dns", "connect", "who", "http", "throughput")
# Each has a VNet and clusters of its own.
OWN = ("clusters", "list", "ways", "ssh")
PARTS = (*SHARED, *OWN)
# Should anything hang, the kernel ends everything with the namespace's first process.
LIMIT_SECONDS = 1200


@dataclass(frozen=True, slots=True)
class Effort:
    """How long each single measurement takes, and how often it is repeated."""

    seconds: float
    rounds: int
    with_relays: bool


THOROUGH = Effort(seconds=3, rounds=3, with_relays=True)
QUICK = Effort(seconds=1, rounds=1, with_relays=False)


def main() -> int:
    """Reads the arguments and runs; the exit status is 0 when everything was measured."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="one short round, no relays")
    parser.add_argument("--only", choices=PARTS, help="one part")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it makes network namespaces and TUN devices: run as root")
    effort = QUICK if arguments.quick else THOROUGH
    parts = [arguments.only] if arguments.only else list(PARTS)

    def work(directory: Path) -> int:
        signal.alarm(LIMIT_SECONDS)
        # The process does not leave through the interpreter's end.
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        return _measure(directory, parts, effort)

    return run_in_private_network(work, _say, passes_interrupt=True)


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _measure(directory: Path, parts: list[str], effort: Effort) -> int:
    begin = time.monotonic()
    figures: list[Figure] = []
    load_before = _load_average()
    shared = [part for part in SHARED if part in parts]
    try:
        if shared:
            with bench_bed.running(_place(directory, "shared"), only_dns=shared == ["dns"]) as bed:
                for part in shared:
                    _say(f"{part} ...")
                    figures += _part(part, bed, effort)
        for part in OWN:
            if part in parts:
                _say(f"{part} ...")
                figures += _part_with_own_bed(part, _place(directory, part), effort)
    except (OSError, RuntimeError) as error:
        _say(f"failed: {error}")
        _show_logs(directory)
        return 1
    print(table(figures), file=sys.stderr)
    report = {
        "machine": _machine() | {"load_average_before": load_before},
        "effort": {"seconds": effort.seconds, "rounds": effort.rounds},
        "took_seconds": round(time.monotonic() - begin, 1),
        "figures": [figure.as_json() for figure in figures],
    }
    print(json.dumps(report))
    return 0


def _place(directory: Path, name: str) -> Path:
    place = directory / name
    place.mkdir()
    return place


def _part(part: str, bed: bench_bed.Bed, effort: Effort) -> list[Figure]:
    if part == "memory":
        return bench_memory.measure(bed)
    if part == "status":
        return bench_status.measure(bed, effort.rounds)
    if part == "dns":
        return bench_dns.measure(bed, effort.seconds, effort.rounds)
    if part == "connect":
        return bench_connect.measure(bed, effort.seconds, effort.rounds)
    if part == "who":
        return bench_who.measure(bed)
    if part == "http":
        return bench_http.measure(bed, effort.seconds, effort.rounds)
    plan = bench_throughput.Plan(effort.seconds, effort.rounds, effort.with_relays)
    return bench_throughput.measure(bed, plan)


def _part_with_own_bed(part: str, directory: Path, effort: Effort) -> list[Figure]:
    if part == "clusters":
        return bench_clusters.measure(directory, effort.rounds)
    if part == "list":
        return bench_list.measure(directory, effort.rounds)
    if part == "ssh":
        plan = bench_ssh.THOROUGH if effort is THOROUGH else bench_ssh.QUICK
        return bench_ssh.measure(directory, plan, _say)
    return bench_ways.measure(directory, effort.seconds, effort.rounds)


def _machine() -> dict[str, object]:
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "load_average": _load_average(),
    }


def _load_average() -> list[float]:
    return [round(load, 1) for load in os.getloadavg()]


def _show_logs(directory: Path) -> None:
    for log in sorted(directory.rglob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-5:]
        for line in lines:
            _say(f"{log.name}: {line}")


if __name__ == "__main__":
    sys.exit(main())

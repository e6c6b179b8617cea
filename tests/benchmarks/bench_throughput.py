"""Bytes per second through VNet, beside direct TLS and beside compiled relays.

The load is `bench_socat`, one process per stream.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench_bed import BACKENDS, LOCAL, RELAYS, Bed, direct_address, name_of, start_relays
from bench_figures import Aim, Compare, Figure, medians
from bench_socat import DIRECTIONS, move

STREAMS = (1, 8)
AIM = Aim(Compare.RATIO, least=0.5)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often."""

    seconds: float
    rounds: int
    with_relays: bool


def measure(bed: Bed, plan: Plan) -> list[Figure]:
    """Rounds of VNet and direct in turn; relays once per round, as a reference."""
    if plan.with_relays:
        start_relays(bed)
    paths = ["direct", "vnet", *(RELAYS if plan.with_relays else ())]
    rounds = [_round(bed, paths, plan.seconds) for _ in range(plan.rounds)]
    return _figures(medians(rounds), paths)


def _round(bed: Bed, paths: list[str], seconds: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for streams in STREAMS:
        for direction in DIRECTIONS:
            for path in paths:
                # One relay's figure says enough for eight.
                if path in RELAYS and streams > 1:
                    continue
                found |= _load(bed, path, direction, streams, seconds)
    if "socat" in paths:
        for direction in DIRECTIONS:
            found[f"iperf3 {direction} 1"] = _iperf(bed, direction, seconds)
    return found


def _load(bed: Bed, path: str, direction: str, streams: int, seconds: float) -> dict[str, float]:
    """Gbit/s, and CPU seconds per gigabyte by process, of one path."""
    moved = move(
        _address(bed, path, direction),
        direction,
        streams,
        seconds,
        lambda: _watched(bed, path, direction),
    )
    key = f"{direction} {streams}"
    found = {f"{path} {key}": moved.gbits}
    return found | {f"cpu {path} {key} {name}": spent for name, spent in moved.cpu.items()}


def _address(bed: Bed, path: str, direction: str) -> str:
    """The socat address that leads to the app by this path."""
    app = DIRECTIONS[direction]
    if path == "direct":
        return direct_address(bed, app)
    if path == "vnet":
        return f"TCP:{name_of(app)}:{BACKENDS[app]},nodelay"
    return f"TCP:{LOCAL}:{RELAYS[path][app]},nodelay"


def _watched(bed: Bed, path: str, direction: str) -> dict[str, list[int]]:
    app = DIRECTIONS[direction]
    watched = {"far end": bed.programs.pids("far") + bed.programs.pids(app)}
    if path == "vnet":
        proxies: list[int] = []
        for name, pids in bed.vnet.pids().items():
            if name.startswith("proxy-"):
                proxies += pids
            else:
                watched[name] = pids
        watched["proxies"] = proxies
    elif path == "nginx":
        watched["relay"] = bed.programs.pids("relay-nginx")
    elif path == "socat":
        watched["relay"] = bed.programs.pids(f"socat-{app}")
    return watched


def _iperf(bed: Bed, direction: str, seconds: float) -> float:
    command = ["iperf3", "-J", "-c", name_of("iperf"), "-p", str(BACKENDS["iperf"])]
    command += ["-t", str(max(1, round(seconds))), *(["-R"] if direction == "down" else [])]
    result = subprocess.run(command, capture_output=True, check=True, timeout=60)
    return float(json.loads(result.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9


def _figures(found: dict[str, float], paths: list[str]) -> list[Figure]:
    figures: list[Figure] = []
    for streams in STREAMS:
        for direction in DIRECTIONS:
            key = f"{direction} {streams}"
            text = f"{'one stream' if streams == 1 else f'{streams} streams'} {direction}"
            make = _against(found[f"direct {key}"])
            figures.append(make(text, found[f"vnet {key}"], AIM if streams == 1 else None))
            if (iperf := found.get(f"iperf3 {key}")) is not None:
                figures.append(make(f"  the same with iperf3, {direction}", iperf, None))
            figures += [
                make(
                    f"  {path} as relay instead of VNet, {direction}", found[f"{path} {key}"], None
                )
                for path in paths
                if path in RELAYS and f"{path} {key}" in found
            ]
    return figures + list(_cpu_figures(found))


def _against(direct: float) -> Callable[[str, float, Aim | None], Figure]:
    return lambda name, value, aim: Figure(name, "Gbit/s", value, direct, "direct TLS", aim)


def _cpu_figures(found: dict[str, float]) -> Iterator[Figure]:
    """CPU of VNet's processes for one stream; of the others beside what they take without VNet."""
    for direction in DIRECTIONS:
        prefix = f"cpu vnet {direction} 1 "
        for key, value in found.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                yield Figure(
                    f"CPU, one stream {direction}: {name}",
                    "s/GB",
                    value,
                    found.get(f"cpu direct {direction} 1 {name}"),
                    "direct TLS",
                )

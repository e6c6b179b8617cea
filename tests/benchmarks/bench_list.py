"""A cluster of 20,000 apps beside one of 20: `vnet ls`, new names, and what the proxies keep.

Both are served by one embedded cluster, in Python, which takes its part of all times; CPU seconds
are those of `vnet ls` alone.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench_cluster import running_cluster
from bench_dns import dnsperf, latencies
from bench_figures import Figure, medians, percentile
from bench_memory import rollup
from bench_programs import Programs
from bench_vnet import Vnet, start_upstream_dns, start_vnet

from demo.cluster.config import Cluster, ClusterFile, check_clusters

APPS = {"big.test": 20_000, "small.test": 20}
BIG, SMALL = APPS
ADDRESSES = {BIG: "127.0.1.1", SMALL: "127.0.1.2"}
# Asked one after the other for their times, and then more at once for what is kept of them.
TIMED_NAMES, MORE_NAMES = 200, 1800
LOOK_SECONDS = 0.01
LIMIT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class _Listed:
    """One `vnet ls`. Peak memory in MB."""

    seconds: float
    cpu_seconds: float
    peak: float


def measure(directory: Path, rounds: int) -> list[Figure]:
    """Rounds of `vnet ls`; then each name once."""
    with Programs(directory) as started:
        proxies = {f"teleport.{name}": address for name, address in ADDRESSES.items()}
        start_upstream_dns(started, directory, proxies)
        with running_cluster(_clusters(), directory / "tsh", ADDRESSES):
            vnet = start_vnet(started, directory, directory / "tsh" / "web-ca.pem")
            listed = medians([dict(_list(vnet)) for _ in range(rounds)])
            return [*_list_figures(listed), *_name_figures(vnet)]


def _clusters() -> ClusterFile:
    clusters = tuple(
        Cluster(
            name=name,
            proxy_addr=f"teleport.{name}:443",
            custom_dns_zones=(name,),
            generated_apps=count,
        )
        for name, count in APPS.items()
    )
    return check_clusters(ClusterFile(clusters=clusters))


def _list(vnet: Vnet) -> Iterator[tuple[str, float]]:
    for cluster, count in APPS.items():
        listed = _vnet_ls(vnet, cluster, count)
        yield f"{cluster} seconds", listed.seconds
        yield f"{cluster} cpu", listed.cpu_seconds
        yield f"{cluster} peak", listed.peak


def _vnet_ls(vnet: Vnet, cluster: str, count: int) -> _Listed:
    command = [str(Path(sys.executable).with_name("vnet")), "ls", "--cluster", cluster]
    output = vnet.directory / "ls.txt"
    environment = {**os.environ, "TELEPORT_HOME": str(vnet.home)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    with output.open("wb") as sink:
        program = subprocess.Popen(
            [*command, "--config", str(vnet.config)], stdout=sink, env=environment
        )
        peak = 0.0
        while program.poll() is None:
            peak = max(peak, _peak(program.pid))
            if time.monotonic() > begin + LIMIT_SECONDS:
                program.kill()
            time.sleep(LOOK_SECONDS)
    seconds = time.monotonic() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = len(output.read_bytes().splitlines()) - 1  # without the header
    if program.returncode or shown != count:
        raise RuntimeError(f"vnet ls: status {program.returncode}, {shown} rows of {count}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return _Listed(seconds, cpu, peak)


def _peak(pid: int) -> float:
    """proc(5), VmHWM. Other than `ru_maxrss` it knows nothing of the program before exec."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1e3 * 1.024
    return 0.0  # it has ended


def _list_figures(listed: dict[str, float]) -> Iterator[Figure]:
    for key, label, unit in (
        ("seconds", f"vnet ls of {APPS[BIG]} apps", "s"),
        ("cpu", "  CPU of it", "s"),
        ("peak", "  peak memory of it", "MB"),
    ):
        baseline = listed[f"{SMALL} {key}"]
        yield Figure(label, unit, listed[f"{BIG} {key}"], baseline, f"{APPS[SMALL]} apps")


def _name_figures(vnet: Vnet) -> Iterator[Figure]:
    # Names from all of the list, in an order that is none of the list's.
    big = [_name(BIG, number * 7919 % APPS[BIG]) for number in range(TIMED_NAMES + MORE_NAMES)]
    small = [_name(SMALL, number) for number in range(APPS[SMALL])]
    before = _proxies(vnet)
    half = TIMED_NAMES // 2
    taken = latencies(vnet.dns_address, big[:half])
    baseline = latencies(vnet.dns_address, small)
    taken += latencies(vnet.dns_address, big[half:TIMED_NAMES])
    for percent in (50, 99):
        yield Figure(
            f"fresh name p{percent}, of {APPS[BIG]} apps",
            "ms",
            percentile(taken, percent),
            percentile(baseline, percent),
            f"{APPS[SMALL]} apps",
        )
    dnsperf(vnet.directory, vnet.dns_address, big[TIMED_NAMES:], "-n", "1")
    yield Figure(
        f"memory of the proxies after {len(big)} names",
        "MB",
        _proxies(vnet),
        before,
        "before",
    )


def _name(cluster: str, number: int) -> str:
    return f"app-{number:05d}.{cluster}"


def _proxies(vnet: Vnet) -> float:
    """Proportional set size."""
    pids = vnet.pids()
    proxies = (pid for name in pids if name.startswith("proxy-") for pid in pids[name])
    return sum(rollup(pid)["Pss"] for pid in proxies)

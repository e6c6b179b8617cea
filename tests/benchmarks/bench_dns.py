"""DNS questions: how many a second (dnsperf), and how long one takes (a client of our own).

cached      a name of VNet's that was asked a moment before
known       a name of VNet's that the dns worker has forgotten and a proxy still knows
fresh       a name that nobody has asked for: the cluster is asked (the embedded one, in Python)
forwarded   a name that is none of VNet's: dnsmasq is asked, which is also the baseline
"""

import re
import secrets
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bench_bed import Bed, fresh_names, name_of
from bench_figures import Aim, Compare, Figure, medians, percentile
from bench_vnet import FORWARDED_ZONE, UPSTREAM_DNS
from dnslib import DNSRecord

# Above the time for which the dns worker keeps what a proxy said, and well below the time for
# which a proxy keeps what the cluster said.
FORGET_SECONDS = 5.5
LATENCY_QUESTIONS = 2000
RATE_AIM = Aim(Compare.VALUE, least=5000)
LATENCY_AIM = Aim(Compare.EXCESS, most=1)
FORWARDED = [f"host-{number:02}.{FORWARDED_ZONE}" for number in range(50)]


def measure(bed: Bed, seconds: float, rounds: int) -> list[Figure]:
    """Fresh names first, while they are; then rounds of the others."""
    names = fresh_names()
    parallel = names[len(names) // 3 :]
    alone = names[: len(names) // 3]
    once = {"fresh p": latencies(bed.vnet.dns_address, alone)}
    fresh_rate = dnsperf(bed.directory, bed.vnet.dns_address, parallel, "-n", "1")
    time.sleep(FORGET_SECONDS)
    once["known p"] = latencies(bed.vnet.dns_address, alone)
    known_rate = dnsperf(bed.directory, bed.vnet.dns_address, parallel, "-n", "1")
    found = medians([_round(bed, seconds) for _ in range(rounds)])
    for key, taken in once.items():
        found |= {f"{key}50": percentile(taken, 50), f"{key}99": percentile(taken, 99)}
    return _figures(found | {"fresh rate": fresh_rate, "known rate": known_rate})


def _round(bed: Bed, seconds: float) -> dict[str, float]:
    own = [name_of("redis")]
    asked = {
        "cached": (bed.vnet.dns_address, own),
        "forwarded": (bed.vnet.dns_address, FORWARDED),
        "dnsmasq": (UPSTREAM_DNS, FORWARDED),
    }
    found: dict[str, float] = {}
    for key, (server, names) in asked.items():
        repeated = [names[i % len(names)] for i in range(LATENCY_QUESTIONS)]
        taken = latencies(server, repeated)
        found[f"{key} p50"], found[f"{key} p99"] = (percentile(taken, p) for p in (50, 99))
        found[f"{key} rate"] = dnsperf(bed.directory, server, names, "-l", f"{seconds:g}")
    return found


def latencies(server: str, names: Sequence[str]) -> list[float]:
    """Milliseconds for the address of each name, asked one after the other over UDP."""
    taken = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.settimeout(10)
        end.connect((server, 53))
        packed = {name: DNSRecord.question(name).pack()[2:] for name in names}
        for name in names:
            query = secrets.token_bytes(2) + packed[name]
            begin = time.monotonic()
            end.send(query)
            answer = end.recv(4096)
            taken.append((time.monotonic() - begin) * 1e3)
            if answer[:2] != query[:2] or answer[3] & 15 or not answer[7]:
                raise RuntimeError(f"{server} does not know {name}")
    return taken


def dnsperf(directory: Path, server: str, names: Sequence[str], *options: str) -> float:
    """Answers a second to questions of 4 clients with up to 50 on their way."""
    questions = directory / "questions"
    questions.write_text("".join(f"{name} A\n" for name in names))
    command = ["dnsperf", "-s", server, "-d", str(questions), "-c", "4", "-q", "50", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    lost = re.search(r"Queries lost:\s+(\d+)", result.stdout)
    rate = re.search(r"Queries per second:\s+([\d.]+)", result.stdout)
    codes = re.search(r"Response codes:\s+NOERROR \d+ \(100\.00%\)", result.stdout)
    if rate is None or lost is None or codes is None:
        raise RuntimeError(f"{server} fails under dnsperf: {result.stdout}")
    return float(rate[1])


def _figures(found: dict[str, float]) -> list[Figure]:
    figures = []
    for kind in ("cached", "known", "fresh", "forwarded"):
        for key, unit, aim in (
            ("rate", "1/s", RATE_AIM),
            ("p50", "ms", LATENCY_AIM),
            ("p99", "ms", None),
        ):
            label = "answers" if key == "rate" else key
            figures.append(
                Figure(
                    f"DNS {label}, {kind} name",
                    unit,
                    found[f"{kind} {key}"],
                    found[f"dnsmasq {key}"],
                    "dnsmasq",
                    aim if kind == "cached" else None,
                )
            )
    return figures

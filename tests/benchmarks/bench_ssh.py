"""SSH through VNet, beside OpenSSH directly to the same sshd, in the same run.

stream    `ssh cat` and sftp, one stream each way, counted in bytes of the program
login     `ssh NODE true` from start to end, alone and many at once
beside    an app's connection while `ssh cat` runs: through VNet, or past it
memory    of the worker `ssh`, with and without idle sessions

The paths: `vnet`; `direct` with the key exchange and the cipher that the program and VNet agree on,
so that the same work is compared; `own` is direct with what OpenSSH prefers.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import bench_proxy_ssh
from bench_figures import Aim, Compare, Figure, medians, percentile
from bench_memory import rollup
from bench_socat import DIRECTIONS, Moved, move, move_by, running_load
from bench_ssh_bed import APP_PORT, NODE, Bed, app_name, running

MEGABYTES_PER_GBIT = 125
STREAM_AIM = Aim(Compare.VALUE, least=60)
DIRECT_AIM = Aim(Compare.RATIO, least=0.15)
LOGIN_AIM = Aim(Compare.EXCESS, most=150)
# Beside the same load made past VNet: what is left is VNet's doing, and not the want of a CPU.
APP_AIM = Aim(Compare.RATIO, least=0.8)
# Of the paced streams, which make the same load by either path.
PACED_BYTES = 20_000_000
LOGIN_SECONDS = 60.0
OWN_CHOICE = "OpenSSH alone"
SETTLE_SECONDS = 1.0
# Sessions that are begun at the same time where many are to be held.
BEGUN_AT_ONCE = 5

_PACED = f"""
import os, time
block, begin, sent = bytes(1 << 16), time.monotonic(), 0
while True:
    sent += os.write(1, block)
    time.sleep(max(0, begin + sent / {PACED_BYTES} - time.monotonic()))
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, how often and how many."""

    seconds: float
    rounds: int
    logins: int  # in each round, one after the other
    at_once: int
    sessions: int
    with_more_loads: bool  # beside an app: paced ones, and on CPUs of their own


# Path -> options of ssh and sftp.
_Paths = dict[str, list[str]]
THOROUGH, QUICK = Plan(2, 3, 20, 20, 100, True), Plan(1, 1, 4, 4, 5, False)


def measure(directory: Path, plan: Plan, say: Callable[[str], None]) -> list[Figure]:
    """Everything; `say` is told what was agreed on."""
    with running(directory) as bed:
        agreed = _agreements(bed)
        for leg, algorithms in agreed.items():
            say(f"{leg}: {algorithms.key_exchange}, {algorithms.cipher}")
        local = agreed["local leg"]
        how = [f"KexAlgorithms={local.key_exchange}", f"Ciphers={local.cipher}"]
        paths = {
            "direct": [*bed.options("direct"), *(part for one in how for part in ("-o", one))],
            "own": bed.options("direct"),
            "vnet": bed.options("vnet"),
        }
        memory = _memory(bed, plan.sessions)
        login = _Logins(paths, plan)
        rounds = []
        for _ in range(plan.rounds):
            login.measure()
            rounds.append(_round(bed, plan, paths))
    found = medians(rounds)
    own = agreed[OWN_CHOICE]
    return [
        *_stream_figures(found, f"direct, {local.short_cipher}", f"direct, {own.short_cipher}"),
        *login.figures(f"direct, {local.key_exchange}", f"direct, {own.key_exchange}"),
        *_beside_figures(found),
        *memory,
        *_cpu_figures(found),
    ]


@dataclass(frozen=True, slots=True)
class _Algorithms:
    """What the two ends of a leg agreed on."""

    key_exchange: str
    cipher: str

    @property
    def short_cipher(self) -> str:
        return self.cipher.partition("@")[0]


def _agreements(bed: Bed) -> dict[str, _Algorithms]:
    found = {}
    before = len(bed.sshd_log)
    for path, leg in (("vnet", "local leg"), ("direct", OWN_CHOICE)):
        command = ["ssh", "-v", *bed.options(path), NODE, "true"]
        done = subprocess.run(command, capture_output=True, timeout=LOGIN_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode(errors='replace')}")
        if path == "vnet":
            found["upstream leg"] = _algorithms(bed.sshd_log[before:])
        found[leg] = _algorithms(done.stderr.decode(errors="replace"))
    return found


def _algorithms(log: str) -> _Algorithms:
    """As ssh and sshd write them."""
    key_exchange = re.search(r"kex: algorithm: (\S+)", log)
    cipher = re.search(r"kex: (?:server->client|client->server) cipher: (\S+)", log)
    if key_exchange is None or cipher is None:
        raise RuntimeError("the log says no algorithms")
    return _Algorithms(key_exchange[1], cipher[1])


# --- streams ----------------------------------------------------------------------------------


def _round(bed: Bed, plan: Plan, paths: _Paths) -> dict[str, float]:
    found: dict[str, float] = {}
    for direction in DIRECTIONS:
        for program in ("ssh", "sftp"):
            for path, how in paths.items():
                if path == "own" and program == "sftp":
                    continue
                command = _command(bed, program, direction, how)
                moved = move_by(command, direction, 1, plan.seconds, lambda: _watched(bed))
                key = f"{program} {direction} {path}"
                found[key] = moved.gbits * MEGABYTES_PER_GBIT
                if program == "ssh" and path != "own":
                    found |= {f"cpu {key} {name}": s for name, s in moved.cpu.items()}
    for node, direction in zip(("sink", "source"), ("up", "down"), strict=True):
        alone = bench_proxy_ssh.measure(bed, node, plan.seconds)
        found[f"proxy_ssh {direction}"] = alone.megabytes
        found[f"cpu proxy_ssh {direction}"] = alone.cluster
    return found | _beside(bed, plan, paths)


def _command(bed: Bed, program: str, direction: str, options: Sequence[str]) -> list[str]:
    """What moves bytes for ever."""
    if program == "ssh":
        if direction == "up":
            return ["ssh", *options, NODE, "cat >/dev/null"]
        return ["ssh", "-n", *options, NODE, "cat /dev/zero"]
    zeros = bed.huge_file
    line = f"put {zeros} /dev/null" if direction == "up" else f"get {zeros} /dev/null"
    batch = bed.directory / "sftp-batch"
    batch.write_text(f"{line}\n")
    return ["sftp", "-q", "-b", str(batch), *options, NODE]


def _watched(bed: Bed) -> dict[str, list[int]]:
    vnet = bed.vnet.pids()
    return {
        "tun": vnet["tun"],
        "worker ssh": vnet["ssh"],
        "rest of VNet": [p for name in vnet if name not in {"tun", "ssh"} for p in vnet[name]],
        "cluster": [bed.cluster.pid],
        "sshd": bed.programs.pids("sshd"),
    }


def _stream_figures(found: dict[str, float], direct_is: str, own_is: str) -> Iterator[Figure]:
    for program, label in (("ssh", "ssh cat"), ("sftp", "sftp")):
        for direction in DIRECTIONS:
            key = f"{program} {direction}"
            value, direct = found[f"{key} vnet"], (found[f"{key} direct"], direct_is)
            yield Figure(f"{label} {direction}", "MB/s", value, *direct, STREAM_AIM)
            yield Figure(
                f"  {label} {direction}, beside direct", "MB/s", value, *direct, DIRECT_AIM
            )
            if program == "ssh":
                text = f"  {label} {direction}, beside OpenSSH's own choice"
                yield Figure(text, "MB/s", value, found[f"{key} own"], own_is)
    for direction in DIRECTIONS:
        value = found[f"proxy_ssh {direction}"]
        yield Figure(f"  ProxySSH of the embedded cluster alone, {direction}", "MB/s", value)


def _cpu_figures(found: dict[str, float]) -> Iterator[Figure]:
    """CPU of everything for one `ssh cat`; what there is without VNet, beside what it takes then."""
    for direction in DIRECTIONS:
        prefix = f"cpu ssh {direction} vnet "
        for key, value in found.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                is_direct = name in {"client", "sshd"}
                direct = found[f"cpu ssh {direction} direct {name}"] if is_direct else None
                yield Figure(f"CPU, ssh cat {direction}: {name}", "s/GB", value, direct, "direct")
        alone = found[f"cpu proxy_ssh {direction}"]
        yield Figure(f"CPU, ProxySSH alone, {direction}: cluster", "s/GB", alone)


# --- logins -----------------------------------------------------------------------------------


class _Logins:
    """Times of logins, in milliseconds, over all rounds."""

    def __init__(self, paths: _Paths, plan: Plan) -> None:
        self._paths, self._plan = paths, plan
        self._alone: dict[str, list[float]] = {path: [] for path in paths}
        self._at_once: dict[str, list[float]] = {path: [] for path in paths}

    def measure(self) -> None:
        for _ in range(self._plan.logins):
            for path, taken in self._alone.items():
                taken.append(self._log_in(path))
        with ThreadPoolExecutor(self._plan.at_once) as pool:
            for path, taken in self._at_once.items():
                taken.extend(pool.map(self._log_in, [path] * self._plan.at_once))

    def _log_in(self, path: str) -> float:
        command = ["ssh", "-n", *self._paths[path], NODE, "true"]
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, timeout=LOGIN_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"login, {path}: {done.stderr.decode(errors='replace')}")
        return (time.monotonic() - begin) * 1e3

    def figures(self, direct_is: str, own_is: str) -> Iterator[Figure]:
        said = {"direct": direct_is, "own": own_is}
        together = f"{self._plan.at_once} at once"
        for name, times, aim in (
            ("alone", self._alone, LOGIN_AIM),
            (together, self._at_once, None),
        ):
            for label, percent, against, its_aim in (
                (f"ssh login {name}, p50", 50, "direct", aim),
                (f"  ssh login {name}, p50, beside OpenSSH's own choice", 50, "own", None),
                (f"ssh login {name}, p99", 99, "direct", None),
            ):
                value, baseline = (percentile(times[path], percent) for path in ("vnet", against))
                yield Figure(label, "ms", value, baseline, said[against], its_aim)


# --- an app beside it -------------------------------------------------------------------------


def _beside(bed: Bed, plan: Plan, paths: _Paths) -> dict[str, float]:
    """Gbit/s of an app's connection, and MB/s of the SSH stream beside it."""

    def load(path: str, command: str) -> list[str]:
        return ["ssh", "-n", *paths[path], NODE, command]

    endless, paced = "cat /dev/zero", f"{sys.executable} -c '{_PACED}'"
    loads = {
        "alone": None,
        "direct": load("direct", endless),
        "vnet": load("vnet", endless),
    }
    if plan.with_more_loads:
        loads |= {"direct paced": load("direct", paced), "vnet paced": load("vnet", paced)}
    found: dict[str, float] = {}
    for key, command in loads.items():
        found |= _app_beside(bed, key, plan.seconds, command)
    cpus = sorted(os.sched_getaffinity(0))
    if plan.with_more_loads and len(cpus) > 1:
        with _apart(bed, cpus[0], cpus[1]):
            for key in ("alone", "vnet"):
                where = cpus[0], cpus[1]
                found |= _app_beside(bed, f"{key} apart", plan.seconds, loads[key], where)
    return found


def _app_beside(
    bed: Bed,
    key: str,
    seconds: float,
    load: Sequence[str] | None,
    cpus: tuple[int, int] | None = None,
) -> dict[str, float]:
    app = DIRECTIONS["down"]
    address = f"TCP:{app_name(app)}:{APP_PORT},nodelay"

    def transfer() -> Moved:
        with _on(cpus and cpus[0]):
            return move(address, "down", 1, seconds, lambda: _watched(bed))

    if load is None:
        return {f"beside {key}": transfer().gbits}
    with _on(cpus and cpus[1]), running_load(load) as process:
        time.sleep(SETTLE_SECONDS)
        begin, before = time.monotonic(), process.io_counters().write_chars
        gbits = transfer().gbits
        moved = process.io_counters().write_chars - before
        elapsed = time.monotonic() - begin
    if not moved:
        raise RuntimeError(f"nothing moves by {' '.join(load)}")
    return {f"beside {key}": gbits, f"beside {key} ssh": moved / elapsed / 1e6}


@contextlib.contextmanager
def _on(cpu: int | None) -> Iterator[None]:
    """Programs that are started here run on one CPU."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _apart(bed: Bed, app_cpu: int, ssh_cpu: int) -> Iterator[None]:
    """What carries the app and what carries SSH on a CPU of its own; tun, which has both, on any."""
    vnet = bed.vnet.pids()
    app = [bed.far_end, *(p for name in vnet if name not in {"tun", "ssh"} for p in vnet[name])]
    ssh = [*vnet["ssh"], bed.cluster.pid, *bed.programs.pids("sshd")]
    tasks = {task: app_cpu for pid in app for task in _tasks(pid)}
    tasks |= {task: ssh_cpu for pid in ssh for task in _tasks(pid)}
    before = {}
    try:
        for task, cpu in tasks.items():
            with contextlib.suppress(ProcessLookupError):
                before[task] = os.sched_getaffinity(task)
                os.sched_setaffinity(task, {cpu})
        yield
    finally:
        for task, cpus in before.items():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(task, cpus)


def _tasks(pid: int) -> list[int]:
    # The process of a session may just have ended.
    with contextlib.suppress(FileNotFoundError):
        return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    return []


def _beside_figures(found: dict[str, float]) -> Iterator[Figure]:
    def app(key: str, baseline: str, text: str, aim: Aim | None = None) -> Figure:
        label, ratio_to = text.split(" / ")
        value, other = found[f"beside {key}"], found[f"beside {baseline}"]
        return Figure(label, "Gbit/s", value, other, ratio_to, aim)

    yield app("vnet", "direct", "app down beside ssh cat / beside direct ssh cat", APP_AIM)
    yield app("vnet", "alone", "  app down beside ssh cat, of alone / alone")
    yield app("direct", "alone", "  app down beside direct ssh cat, of alone / alone")
    if "beside vnet paced" in found:
        paced = f"{PACED_BYTES / 1e6:g} MB/s"
        text = f"app down beside {paced} of ssh / beside the same, direct"
        yield app("vnet paced", "direct paced", text, APP_AIM)
        yield app("vnet paced", "alone", f"  app down beside {paced} of ssh, of alone / alone")
    if "beside vnet apart" in found:
        text = "app down beside ssh cat, on CPUs of their own / alone on that CPU"
        yield app("vnet apart", "alone apart", text, APP_AIM)
    for key, label in (
        ("vnet", "MB/s of ssh beside the app"),
        ("vnet paced", "MB/s of paced ssh beside the app"),
        ("vnet apart", "MB/s of ssh beside the app, on CPUs of their own"),
    ):
        if (value := found.get(f"beside {key} ssh")) is not None:
            direct = found.get(f"beside {key.replace('vnet', 'direct')} ssh")
            yield Figure(f"  {label}", "MB/s", value, direct, "direct" if direct else "")


# --- memory -----------------------------------------------------------------------------------


def _memory(bed: Bed, sessions: int) -> list[Figure]:
    """The worker when it has carried next to nothing, and with sessions in which nothing happens."""
    (pid,) = bed.vnet.pids()["ssh"]
    time.sleep(SETTLE_SECONDS)
    idle = rollup(pid)
    command = ["ssh", *bed.options("vnet"), NODE, "echo up; exec cat"]
    with contextlib.ExitStack() as running_ones:
        with ThreadPoolExecutor(BEGUN_AT_ONCE) as pool:
            for process in pool.map(_session, [command] * sessions):
                running_ones.callback(_end, process)
        time.sleep(SETTLE_SECONDS)
        full = rollup(pid)
    growth = full["Pss_Anon"] - idle["Pss_Anon"]
    return [
        Figure("memory of the worker ssh, idle", "MB", idle["Pss"]),
        Figure("  of it anonymous", "MB", idle["Pss_Anon"]),
        Figure(f"memory of {sessions} idle sessions", "MB", growth),
    ]


def _session(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    """A session that has begun."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    if process.stdout.readline() != b"up\n":
        _end(process)
        raise RuntimeError("an idle session does not begin")
    return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()

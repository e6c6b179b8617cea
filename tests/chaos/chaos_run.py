"""A run of chaos: events one after the other under load, and what came of them."""

import random
import socket
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos_traffic
import dnslib
from chaos_accounts import Accounts, Record, Window, settle, window_of
from chaos_bed import NODE, PROXIES, WORKERS, Bed, apps, foreign, load_of, running
from chaos_events import Action, Signalled, SkippedError, Stage, action
from chaos_far_end import PORT
from chaos_pattern import SHORT_BYTES, Pattern, Request
from chaos_probes import Recovery
from chaos_processes import measure, processes, strays
from chaos_report import Aim, Times
from chaos_schedule import CRASHES, Event, Kind, Step, first_allowed, steps
from chaos_watch import Watcher

from ipc.addresses import owner_of_address
from ipc.slots import SSH, SSH_PORT
from supervisor.cli.control_client import order
from supervisor.config import SupervisorConfig
from supervisor.control_messages import Level, LogLevel

TURN_SECONDS = 0.005
HEALTHY_SECONDS = 90.0
# What an event explains may be seen a little before and after it.
BEFORE_SECONDS, AFTER_SECONDS = 0.05, 1.0
PAUSE_SECONDS = (0.1, 0.8)
WARM_SECONDS = 2.0
# Connections that were admitted and never accepted are given up after 10 s.
QUIET_SECONDS = 25.0
LOG_SECONDS = 10.0
MOST_TRACEBACKS = 5
HIDES_APPS = frozenset({Kind.LOGOUT, Kind.PROXY_DOWN, Kind.AUTH_DOWN})
# As many steps as are looked through for one that may come now.
LOOK_AHEAD = 8

BACK_SECONDS = 1.0
STALL_SECONDS = 2.0
# The interpreter gives little back: what is less than this is no growth.
SUPERVISOR_GROWTH_MB, WORKER_GROWTH_MB = 8.0, 24.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What the caller wants."""

    events: int
    seconds: float
    seed: int
    hang_seconds: float
    without: frozenset[Kind]
    say: Callable[[str], None]


@dataclass(slots=True)
class Played:
    """One event that has happened. Times are monotonic seconds."""

    event: Event
    began: float
    # When nothing of it was left but its consequences.
    over: float = 0.0
    healthy: float | None = None
    recovery: Recovery | None = None


@dataclass(slots=True)
class Story:
    """Everything that has happened."""

    played: list[Played] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    crashes: dict[str, list[float]] = field(default_factory=dict)
    # Steps with two events at once.
    together: int = 0


def owner_of(address: str) -> str:
    """The proxy that carries connections to a virtual address."""
    return f"proxy-{owner_of_address(socket.inet_aton(address), PROXIES)}"


def reach_all_apps(bed: Bed, addresses: Collection[str] = ()) -> dict[str, str]:
    """A short connection to each app, so that everything is open that will be; name and address.

    With `addresses` only to these, and no name is asked for. Raises OSError.
    """
    found = dict.fromkeys(apps(), "") if not addresses else {text: text for text in addresses}
    for name in found:
        if not addresses:
            found[name] = _address_of(bed, name)
        with socket.create_connection((found[name], PORT), timeout=30) as end:
            end.sendall(Request("short", Pattern(0)).encode())
            got = 0
            while got < SHORT_BYTES and (piece := end.recv(4096)):
                got += len(piece)
    return found


def reach_node(bed: Bed) -> str:
    """A connection to the SSH server that ends after its first line; the address. Raises OSError."""
    address = _address_of(bed, NODE)
    with socket.create_connection((address, SSH_PORT), timeout=30) as end:
        if not end.recv(4096).startswith(b"SSH-2.0-"):
            raise OSError("the node does not speak SSH")
    return address


def _address_of(bed: Bed, name: str) -> str:
    with socket.socket(type=socket.SOCK_DGRAM) as end:
        end.settimeout(10)
        end.connect((bed.server, 53))
        end.send(dnslib.DNSRecord.question(name).pack())
        return str(dnslib.DNSRecord.parse(end.recv(4096)).a.rdata)


class Run:
    """One run in one bed."""

    def __init__(self, bed: Bed, watcher: Watcher, wish: Wish) -> None:
        self._bed, self._watcher, self._wish = bed, watcher, wish
        self._chance = random.Random(wish.seed)
        self._story = Story()
        self._origin = time.monotonic()
        self._addresses = reach_all_apps(bed)
        self._node = reach_node(bed)
        addresses = tuple(self._addresses.values())
        self._stage = Stage(bed, watcher, self._chance, addresses)

    # -- the whole --

    def play(self) -> dict[str, Any]:
        """Everything; returns the report."""
        wish, bed = self._wish, self._bed
        wish.say(f"seed {wish.seed}, {wish.events} events in at most {wish.seconds:g} s")
        bed.start_load(load_of(bed), wish.seed)
        bed.tell_load("run")
        self._break_in()
        bed.tell_load("pause")
        reach_all_apps(bed)
        reach_node(bed)
        before = self._measure({})
        bed.tell_load("run")
        began = time.monotonic()
        self._origin = began
        self._play_events(began + wish.seconds)
        took = time.monotonic() - began
        bed.tell_load("pause")
        after = self._measure(before)
        silent = self._silent_logs()
        return self._report(took, before, after, silent)

    def _break_in(self) -> None:
        """What is made once and kept is there afterwards: every worker has been replaced."""
        time.sleep(WARM_SECONDS)
        broken = Story()
        for worker in WORKERS:
            self._play_step(Step((Event(Kind.KILL, worker),)), broken)
        self._story.crashes = broken.crashes
        self._windows_before = self._windows(broken)
        time.sleep(WARM_SECONDS)

    def _play_events(self, until: float) -> None:
        wish = self._wish
        coming = steps(wish.seed, WORKERS, wish.without)
        waiting: list[Step] = []
        while time.monotonic() < until and len(self._story.played) < wish.events:
            waiting += [next(coming) for _ in range(LOOK_AHEAD - len(waiting))]
            window = SupervisorConfig().restart_window_seconds
            chosen = first_allowed(waiting, self._story.crashes, time.monotonic(), window)
            if chosen is None:
                time.sleep(0.1)
                continue
            self._play_step(waiting.pop(chosen), self._story)
            time.sleep(self._chance.uniform(*PAUSE_SECONDS))

    # -- one step --

    def _play_step(self, step: Step, story: Story) -> None:
        """The events of a step, until VNet is healthy again."""
        bed, begins = self._bed, time.monotonic()
        bed.check()
        first = action(step.events[0], self._stage)
        on_its_way: list[tuple[Action, Played]] = []
        for position, event in enumerate(step.events):
            one = first if position == 0 else action(event, self._stage)
            if position:
                self._turn(on_its_way, begins + first.seconds / 2)
            recovery = self._recovery(event, step)
            played = Played(event, time.monotonic(), recovery=recovery)
            try:
                one.begin()
            except SkippedError as error:
                story.skipped[str(event)] = str(error)
                self._wish.say(f"skipped: {event}: {error}")
                continue
            if isinstance(one, Signalled) and recovery is not None:
                recovery.begin(one.pid, dies=event.kind is Kind.KILL)
                story.crashes.setdefault(event.target, []).append(recovery.began)
            story.played.append(played)
            on_its_way.append((one, played))
        if not on_its_way:
            return
        story.together += len(on_its_way) > 1
        self._turn(on_its_way, begins + first.seconds)
        for one, played in on_its_way:
            one.end()
            played.over = time.monotonic() if one.seconds else played.began
        self._finish(on_its_way)
        self._wish.say(self._line(step, [played for _, played in on_its_way], len(story.played)))

    def _turn(self, on_its_way: list[tuple[Action, Played]], until: float) -> None:
        while True:
            for one, played in on_its_way:
                one.tick()
                if played.recovery is not None:
                    played.recovery.tick()
            if time.monotonic() >= until:
                return
            time.sleep(TURN_SECONDS)

    def _finish(self, on_its_way: list[tuple[Action, Played]]) -> None:
        """Waits for health and for the answers to the probes."""
        over = time.monotonic()
        recoveries = [p.recovery for _, p in on_its_way if p.recovery is not None]
        healthy: float | None = None
        while time.monotonic() < over + HEALTHY_SECONDS:
            self._bed.check()
            for recovery in recoveries:
                recovery.tick()
            view = self._watcher.latest
            if (
                healthy is None
                and view is not None
                and view.time >= over
                and view.is_well
                and all(one.is_overcome(view) for one, _ in on_its_way)
            ):
                healthy = view.time
            if healthy is not None and all(recovery.is_over for recovery in recoveries):
                break
            time.sleep(TURN_SECONDS)
        for _, played in on_its_way:
            played.healthy = healthy
        for recovery in recoveries:
            recovery.close()
        if healthy is None:
            view = self._watcher.latest
            reasons = "?" if view is None else "; ".join(view.status.reasons)
            self._wish.say(f"not healthy after {HEALTHY_SECONDS:g} s: {reasons}")

    def _recovery(self, event: Event, step: Step) -> Recovery | None:
        if event.kind not in CRASHES:
            return None
        own = [(one, PORT) for one in self._addresses.values() if owner_of(one) == event.target]
        if event.target == SSH:
            own = [(self._node, SSH_PORT)]
        dial = own[0] if own else None
        # Apps have no names while there is no login.
        hides = any(other.kind in HIDES_APPS for other in step.events)
        name = next(iter(foreign())) if hides else apps()[0]
        return Recovery(self._bed.server, name, self._addresses[apps()[0]], dial)

    def _line(self, step: Step, played: list[Played], number: int) -> str:
        parts = [f"{played[0].began - self._origin:7.1f} s  {number:3}  {step!s:34}"]
        for one in played:
            healthy = "never" if one.healthy is None else f"{one.healthy - one.over:.2f}"
            parts.append(f"healthy {healthy}")
            if one.recovery is not None:
                shown = (one.recovery.dns, one.recovery.tun, one.recovery.connect)
                texts = ["-" if value is None else f"{value:.2f}" for value in shown]
                parts.append(f"dns {texts[0]} tun {texts[1]} connect {texts[2]}")
        return "  ".join(parts)

    # -- looking --

    def _measure(self, before: dict[str, Any]) -> dict[str, Any]:
        """Descriptors and memory once nothing is open any more; waits until all is as before."""
        deadline = time.monotonic() + QUIET_SECONDS
        while True:
            view = self._watcher.look()
            pids = {name: view.pid(name) for name in WORKERS}
            found = measure({"supervisor": self._bed.supervisor_pid} | pids)
            own = [*self._bed.helpers, self._bed.supervisor_pid]
            left = strays(processes(), 1, own, view.pids)
            connections = view.status.connections
            is_quiet = connections is not None and connections.active == 0 and not left
            is_as_before = len(view.pids) <= len(WORKERS) and all(
                found[name]["descriptors"] <= before.get(name, found[name])["descriptors"]
                for name in found
            )
            if (is_quiet and is_as_before) or time.monotonic() > deadline:
                workers = len(view.pids)
                extra = {"processes": workers + 1, "orphans": left}
                return found | {"all": extra | {"open": connections.active if connections else -1}}
            time.sleep(0.2)

    def _silent_logs(self) -> list[str]:
        """Workers whose log does not come through, though they have something to say."""
        order(self._bed.run_dir, LogLevel(level=Level.DEBUG))
        offset, deadline = self._bed.log_size(), time.monotonic() + LOG_SECONDS
        silent = set(WORKERS)
        while silent and time.monotonic() < deadline:
            reach_all_apps(self._bed)
            reach_node(self._bed)
            with socket.socket(type=socket.SOCK_DGRAM) as end:
                end.sendto(b"no question", (self._bed.server, 53))
            silent -= {str(line.get("worker")) for line in self._bed.log_lines(offset)}
        order(self._bed.run_dir, LogLevel(level=Level.INFO))
        return sorted(silent)

    # -- the report --

    def _windows(self, story: Story) -> list[Window]:
        windows = []
        for played in story.played:
            end = played.healthy if played.healthy is not None else float("inf")
            window = window_of(
                played.event.kind,
                played.event.target,
                played.began - BEFORE_SECONDS,
                end + AFTER_SECONDS,
            )
            windows += [window] if window is not None else []
        return windows

    def _report(
        self, took: float, before: dict[str, Any], after: dict[str, Any], silent: list[str]
    ) -> dict[str, Any]:
        wish, bed, story = self._wish, self._bed, self._story
        view = self._watcher.look()
        records: list[Record] = chaos_traffic.read(bed.records_path)
        stopped = [
            (played.began, played.healthy or float("inf"))
            for played in story.played
            if played.event == Event(Kind.STOP, "tun")
        ]
        windows = self._windows_before + self._windows(story)
        accounts = settle(records, windows, stopped, self._origin)
        self._watcher.stop()
        status, stop_seconds = bed.stop_supervisor()
        left = strays(processes(), 1, [*bed.helpers, bed.supervisor_pid], [])
        unanswered = self._unanswered()
        interface = "vnet0:" in Path("/proc/net/dev").read_text()
        aims = list(self._aims(accounts, before, after, silent, status, left, is_left=interface))
        return {
            "mode": "chaos",
            "seed": wish.seed,
            "seconds": round(took, 1),
            "hang_seconds": bed.hang_seconds,
            "events": _counted(str(played.event.kind) for played in story.played),
            "without": sorted(wish.without),
            "together": story.together,
            "skipped": story.skipped,
            "connections": accounts.connections | {"bytes": accounts.bytes} | accounts.cut,
            "questions": {
                "asked": accounts.questions,
                "repeated": accounts.questions_repeated,
                "unanswered": accounts.unanswered,
            },
            "healthy_after": self._times_to_healthy(),
            "back_after": self._times_back(),
            "stalls": [stall | {"during": self._during(stall)} for stall in accounts.stalls],
            "load_lag": round(accounts.lag, 3),
            "status": {
                "answers": self._watcher.answers,
                "unanswered": [text for _, text in unanswered],
                "unanswered_while_upgrading": len(self._watcher.unanswered) - len(unanswered),
                "longest": round(self._watcher.longest_answer, 3),
                "restarts": {row.name: row.restarts for row in view.rows},
            },
            "before": before,
            "after": after,
            "log": {
                "bytes": bed.log_size(),
                "silent": silent,
                "tracebacks": self._tracebacks()[:MOST_TRACEBACKS],
            },
            "stop": {"status": status, "seconds": round(stop_seconds, 2), "left": left},
            "unexplained": accounts.unexplained,
            "aims": aims,
        }

    def _during(self, stall: dict[str, Any]) -> str:
        """What happened while a transfer stood still."""
        began = self._origin + stall["began"]
        return ", ".join(
            str(played.event)
            for played in self._story.played
            if played.began <= began + stall["seconds"] and began <= (played.healthy or began)
        )

    def _tracebacks(self) -> list[str]:
        """What the log says of mistakes in the program."""
        return [
            f"{line.get('worker')}: {line.get('message')}"
            for line in self._bed.log_lines()
            if "Traceback (most recent call last)" in str(line.get("message"))
        ]

    def _unanswered(self) -> list[tuple[float, str]]:
        """When the status was not answered, but for upgrades: then one program follows another."""
        upgrades = [p for p in self._story.played if p.event.kind is Kind.UPGRADE]
        return [
            (time_, why)
            for time_, why in self._watcher.unanswered
            if not any(p.began <= time_ <= (p.healthy or time_) for p in upgrades)
        ]

    def _times_to_healthy(self) -> dict[str, Any]:
        by_kind: dict[str, Times] = {"all": Times()}
        for played in self._story.played:
            seconds = None if played.healthy is None else played.healthy - played.over
            by_kind["all"].add(seconds)
            by_kind.setdefault(played.event.kind, Times()).add(seconds)
        return {kind: times.as_json() for kind, times in by_kind.items()}

    def _back(self, kind: Kind, what: str, workers: Collection[str]) -> Times:
        times = Times()
        for played in self._story.played:
            recovery = played.recovery
            if (
                recovery is not None
                and played.event.kind is kind
                and played.event.target in workers
            ):
                times.add(getattr(recovery, what))
        return times

    def _times_back(self) -> dict[str, Any]:
        proxies = [worker for worker in WORKERS if worker.startswith("proxy-")]
        found = {}
        for kind in (Kind.KILL, Kind.STOP):
            for label, what, workers in (
                ("dns, of tun", "dns", ["tun"]),
                ("dns, of dns", "dns", ["dns"]),
                ("dns, of a proxy", "dns", proxies),
                ("tun, of tun", "tun", ["tun"]),
                ("connect, of a proxy", "connect", proxies),
                ("connect, of ssh", "connect", [SSH]),
            ):
                what_, _, whose = label.partition(", ")
                found[f"{what_} after {kind} {whose}"] = self._back(kind, what, workers).as_json()
        return found

    def _aims(
        self,
        accounts: Accounts,
        before: dict[str, Any],
        after: dict[str, Any],
        silent: list[str],
        status: int | None,
        left: list[str],
        *,
        is_left: bool,
    ) -> Iterator[Aim]:
        story, hang = self._story, self._bed.hang_seconds
        never = sum(played.healthy is None for played in story.played)
        yield Aim("wrong bytes", accounts.wrong_bytes, 0, is_hard=True)
        yield Aim("wrong DNS answers", accounts.wrong_answers, 0, is_hard=True)
        yield Aim("connections cut without a cause", accounts.cut_by_other, 0, is_hard=True)
        unanswered = accounts.unanswered.get("other", 0)
        yield Aim("questions unanswered without a cause", unanswered, 0, is_hard=True)
        yield Aim("events that VNet did not recover from", never, 0, is_hard=True)
        yield Aim("events skipped", len(story.skipped), 0, is_hard=True)
        yield Aim("orphans", len(after["all"]["orphans"]), 0, is_hard=True)
        yield Aim("processes left after the stop", len(left), 0, is_hard=True)
        yield Aim("interfaces left after the stop", int(is_left), 0, is_hard=True)
        yield Aim("exit status", status, 0, is_hard=True)
        yield Aim("silent logs", len(silent), 0, is_hard=True)
        yield Aim("tracebacks in the log", len(self._tracebacks()), 0, is_hard=True)
        yield Aim("connections open when there are none", after["all"]["open"], 0, is_hard=True)
        yield Aim("status unanswered", len(self._unanswered()), 0, is_hard=True)
        for name, most in (("supervisor", SUPERVISOR_GROWTH_MB), ("workers", WORKER_GROWTH_MB)):
            whose = WORKERS if name == "workers" else (name,)
            more = max(after[one]["descriptors"] - before[one]["descriptors"] for one in whose)
            yield Aim(f"more descriptors, {name}", more, 0, is_hard=True)
            more = max(after[one]["rss_mb"] - before[one]["rss_mb"] for one in whose)
            yield Aim(f"more memory, {name}, MB", more, most, is_hard=True)
        more = after["all"]["processes"] - before["all"]["processes"]
        yield Aim("more processes", more, 0, is_hard=True)
        for what, workers in (("dns", WORKERS), ("tun", ("tun",))):
            times = self._back(Kind.KILL, what, workers)
            if times.found:
                yield Aim(
                    f"{what} back after a kill, p99, s",
                    times.percentile(99),
                    BACK_SECONDS,
                    is_hard=False,
                )
        yield Aim("longest stall, s", accounts.longest_stall, STALL_SECONDS, is_hard=False)
        yield Aim(
            "longest stall while tun was stopped, s",
            accounts.longest_stall_while_stopped,
            STALL_SECONDS + hang,
            is_hard=False,
        )


def _counted(names: Iterator[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found | {"all": sum(found.values())}


def play(directory: Path, wish: Wish) -> dict[str, Any]:
    """One run in a bed of its own; the aims in the report are still objects."""
    with running(directory, wish.hang_seconds) as bed, Watcher(bed.run_dir) as watcher:
        return Run(bed, watcher, wish).play()

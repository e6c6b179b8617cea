"""What happens to VNet, and in which order: drawn from a seed. Pure.

A deck holds every kind of event; it is shuffled, played, and shuffled anew. Its first half has
one of each sort, so that a short run meets them all. What lasts a while may have a kill in the
middle of it.
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from chaos_accounts import carries


class Kind(StrEnum):
    """What can happen."""

    KILL = "kill"  # SIGKILL
    STOP = "stop"  # SIGSTOP: the worker hangs
    SLOW = "slow"  # SIGSTOP and SIGCONT in turns
    FLOOD_SYN = "flood_syn"
    FLOOD_DNS = "flood_dns"
    FLOOD_GARBAGE = "flood_garbage"
    DISK_FULL = "disk_full"
    PROXY_DOWN = "proxy_down"
    AUTH_DOWN = "auth_down"
    CLOSE_APPS = "close_apps"
    REWRITE = "rewrite"  # of the profile files, with the same content
    LOGOUT = "logout"  # and a new login
    DRAIN = "drain"  # vnet restart WORKER --drain
    UPGRADE = "upgrade"  # vnet restart all --drain


# After these the supervisor counts a crash of the worker.
CRASHES: Final = frozenset({Kind.KILL, Kind.STOP})
# These last a while, and a worker may die in the middle of them.
LASTING: Final = frozenset(
    {
        Kind.SLOW,
        Kind.FLOOD_SYN,
        Kind.FLOOD_DNS,
        Kind.FLOOD_GARBAGE,
        Kind.DISK_FULL,
        Kind.PROXY_DOWN,
        Kind.AUTH_DOWN,
        Kind.LOGOUT,
        Kind.DRAIN,
    }
)
# So often one worker may crash within the supervisor's window: well below its limit, and so that
# the wait before a restart stays short.
MAX_CRASHES: Final = 2
_TOGETHER: Final = 0.4


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happens; `target` is a worker, or empty."""

    kind: Kind
    target: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.target}".rstrip()


@dataclass(frozen=True, slots=True)
class Step:
    """Events that happen together: the second in the middle of the first."""

    events: tuple[Event, ...]

    @property
    def crashes(self) -> tuple[str, ...]:
        """The workers that crash in it."""
        return tuple(event.target for event in self.events if event.kind in CRASHES)

    def __str__(self) -> str:
        return " + ".join(map(str, self.events))


class _Turns:
    """Gives each worker its turn, in an order that chance decides anew each time round."""

    def __init__(self, chance: random.Random, workers: Sequence[str]) -> None:
        self._chance, self._workers = chance, workers
        self._left: list[str] = []

    def next(self) -> str:
        if not self._left:
            self._left = self._chance.sample(self._workers, len(self._workers))
        return self._left.pop()


def steps(seed: int, workers: Sequence[str], without: Collection[Kind] = ()) -> Iterator[Step]:
    """Steps without end. `workers` are tun, dns, the proxies and ssh."""
    chance = random.Random(seed)
    carriers = [worker for worker in workers if carries(worker)]
    targets = {kind: _Turns(chance, workers) for kind in (Kind.STOP, Kind.SLOW, Kind.DRAIN)}
    kills = _Turns(chance, carriers)
    floods = (Kind.FLOOD_SYN, Kind.FLOOD_DNS, Kind.FLOOD_GARBAGE)
    clusters = (Kind.PROXY_DOWN, Kind.AUTH_DOWN, Kind.CLOSE_APPS)
    logins = (Kind.REWRITE, Kind.LOGOUT)

    def event(kind: Kind, target: str = "") -> Event:
        return Event(kind, targets[kind].next() if kind in targets else target)

    while True:
        first, second = [], []
        for group in (floods, clusters, logins, (Kind.DRAIN, Kind.UPGRADE)):
            chosen = chance.choice(group)
            first.append(event(chosen))
            second += [event(kind) for kind in group if kind is not chosen]
        for part in (first, second):
            part += [Event(Kind.KILL, "tun"), Event(Kind.KILL, "dns")]
            part += [Event(Kind.KILL, kills.next()), event(Kind.SLOW)]
        first += [event(Kind.STOP), event(Kind.DISK_FULL)]
        for part in (first, second):
            wanted = [found for found in part if found.kind not in without]
            chance.shuffle(wanted)
            yield from _together(wanted, chance)


def _together(events: Sequence[Event], chance: random.Random) -> Iterator[Step]:
    """Some kills are moved into the lasting event before them."""
    waiting: Event | None = None
    for event in events:
        if waiting is None:
            waiting = event
        elif waiting.kind in LASTING and event.kind is Kind.KILL and chance.random() < _TOGETHER:
            yield Step((waiting, event))
            waiting = None
        else:
            yield Step((waiting,))
            waiting = event
    if waiting is not None:
        yield Step((waiting,))


def first_allowed(
    waiting: Sequence[Step], crashes: Mapping[str, Sequence[float]], now: float, window: float
) -> int | None:
    """Which of the steps may come now, so that no worker crashes too often; None: wait.

    `crashes` are the times of each worker's crashes so far, `window` the seconds in which the
    supervisor counts them.
    """
    for index, step in enumerate(waiting):
        recent = {
            worker: sum(now - time <= window for time in crashes.get(worker, ()))
            + step.crashes.count(worker)
            for worker in step.crashes
        }
        if all(count <= MAX_CRASHES for count in recent.values()):
            return index
    return None

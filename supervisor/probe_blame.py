"""Who is to blame when probes stay unanswered. Pure.

    supervisor ── interface ── tun ─┬─ dns        a question for a diagnostic name
                                    └─ proxy-i    a connection, which it refuses at once

Each way leads through two workers, so that all ways are judged together:

    silent                               answering           suspected
    all                                  none                tun
    all proxies, of two or more          dns                 tun first, which costs no connection
    dns, or some proxies                 another way         the worker at the end of the way

After `hang_seconds` of silence (a little more if that is few heartbeats) a worker is suspected, once,
unless something else explains it. Then there is a sentence for `vnet status`, because a worker that is
replaced in vain is replaced for ever; without an error of the system only somewhat later, so that it
is not told of a worker that hangs:

    the system says that it fails        a firewall of this machine, or the interface is down
    nothing of it reaches tun            as above
    the worker counts answers            they are lost on the way back, or it has too much to do
    no answer since the worker began     nothing says that the way has ever been open

Silence counts from the last answer, from the start of the latest worker of the way, or from where the
supervisor itself stood still: who is not awake hears nothing. Only a sentence that is told already stays
until there is an answer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

DNS: Final = "dns"
TUN: Final = "tun"
# Twice the longest time that the supervisor sleeps: between two looks more than this has passed only
# when it, or the whole machine, did not run.
GAP_SECONDS: Final = 1.0
# What a worker does shows in its next heartbeat, which is looked at so much later.
_LATE_SECONDS: Final = 0.5
# A worker that gets no processor beats late and does as little; nor does it do anything while nobody asks,
# because tun or the supervisor gets none. The first probes that tun tells of may be those before: all that have
# waited for it are in one heartbeat, or two.
_IDLE_BEATS: Final = 3
_ARRIVED_BEATS: Final = 3
# What a worker's counters say of its part; each rises while it does that.
_MOVED: Final = ("packets_to_inner", "packets_to_outer")
_ARRIVED: Final = "probes"
_REFUSED: Final = "refused_probe"


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker that is ready. `counters` are those of its latest heartbeat, another object with each."""

    started_at: float
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Suspect:
    """A worker that beats and does not work; `why` goes behind its name in the log."""

    slot: str
    why: str


@dataclass(slots=True)
class Way:
    """The way to the worker at its end. `processes` are the starts of tun and of that worker."""

    processes: tuple[float, float]
    silent_since: float
    has_answered: bool = False
    error: str = ""  # of the system, since the last answer
    note: "_Note | None" = None
    is_told: bool = False  # there is a sentence about its silence


class _Note:
    """When a worker did something last in a silence, and what has come since: its heartbeats, probes to tun."""

    def __init__(self, now: float, done: int, arrived: int, beat: object) -> None:
        self._done = done
        self._done_at = now
        self._arrived = arrived
        self._arrivals = 0
        self._beat = beat
        self._beats = 0

    def look(self, now: float, done: int, arrived: int, beat: object) -> None:
        """`beat` is another object with each heartbeat."""
        if done != self._done:
            self._done, self._done_at = done, now
            self._beats = self._arrivals = 0
        else:
            self._beats += beat is not self._beat
            self._arrivals += arrived != self._arrived
        self._beat, self._arrived = beat, arrived

    def is_idle(self, now: float, seconds: float) -> bool:
        """Whether the worker has beaten and done nothing for so long."""
        return now - self._done_at >= seconds and self._beats >= _IDLE_BEATS

    @property
    def has_arrived(self) -> bool:
        """Whether tun has seen probes since, again and again."""
        return self._arrivals >= _ARRIVED_BEATS


class Blame:
    """What is known of all ways. Times are monotonic seconds and never go back.

    Per turn: `follow`, then what was answered or failed, then `judge`.
    """

    def __init__(
        self, interface: str, dns_address: str, *, heartbeat_seconds: float, hang_seconds: float
    ) -> None:
        self.heartbeat_seconds = heartbeat_seconds
        self.hang_seconds = hang_seconds
        self.ways: dict[str, Way] = {}
        self.problems: list[str] = []
        self._interface: Final = interface
        self._dns_address: Final = dns_address
        self._seen_at: float | None = None
        self._started_at: dict[str, float] = {}
        # By worker: the ways that have worked since its process began.
        self._worked: dict[str, set[str]] = {}
        self._suspected: set[str] = set()
        # About tun while all ways are silent, and while those to the proxies are.
        self._all_silent: _Note | None = None
        self._proxies_silent: _Note | None = None
        self._waiting_since: float | None = None

    def follow(self, now: float, ready: Mapping[str, Ready]) -> None:
        """Which workers are ready now; there is a way to each if tun is ready too."""
        if self._seen_at is not None and now - self._seen_at > GAP_SECONDS:
            for slot, way in self.ways.items():
                self.ways[slot] = Way(way.processes, now, error=way.error, is_told=way.is_told)
        self._seen_at = now
        for slot, worker in ready.items():
            if self._started_at.get(slot) != worker.started_at:
                self._started_at[slot] = worker.started_at
                self._worked[slot] = set()
                self._suspected.discard(slot)
        tun = ready.get(TUN)
        wanted = {
            slot: (tun.started_at, worker.started_at)
            for slot, worker in ready.items()
            if tun is not None and slot != TUN
        }
        for slot in self.ways.keys() - wanted.keys():
            del self.ways[slot]
        for slot, processes in wanted.items():
            known = self.ways.get(slot)
            if known is None or known.processes != processes:
                self.ways[slot] = Way(processes, now)

    def answered(self, slot: str, now: float) -> None:
        """A probe of this way came back as it should."""
        way = self.ways[slot]
        way.silent_since, way.has_answered, way.error, way.note = now, True, "", None
        way.is_told = False
        for worker in (TUN, slot):
            self._worked[worker].add(slot)

    def failed(self, slot: str, error: str) -> None:
        """This system did not let a probe of this way out, or an answer in."""
        self.ways[slot].error = error

    def judge(
        self, now: float, ready: Mapping[str, Ready], is_waiting: Callable[[], bool]
    ) -> list[Suspect]:
        """Who is suspected now, and anew what is in `problems`.

        `is_waiting` says whether packets wait in the interface for tun; it is asked only when no way
        answers.
        """
        self.problems = []
        silent = [slot for slot in self.ways if self._silence(slot, now) >= self.hang_seconds]
        self._take_notes(now, ready, is_waiting)
        # Whoever is suspected is about to end; until then it explains all silence behind it.
        if TUN in self._suspected:
            return []
        slots = self._suspects(now, silent) if silent else []
        self._suspected.update(slots)
        if TUN not in slots:
            for slot in silent:
                way = self.ways[slot]
                if way.error or self._silence(slot, now) >= self._tell_seconds:
                    way.is_told = True
            told = [slot for slot, way in self.ways.items() if way.is_told]
            self._explain([slot for slot in told if slot not in self._suspected])
        return [Suspect(slot, self._why(slot)) for slot in slots]

    # -- inside --

    @property
    def _half_seconds(self) -> float:
        """From here on a silence is watched: what happened before it is in the counters."""
        return max(self.hang_seconds / 2, self.heartbeat_seconds + _LATE_SECONDS)

    @property
    def _tell_seconds(self) -> float:
        """Who has not been suspected after such a silence will not be, nor found to beat no more."""
        suspected = max(self.hang_seconds, self._half_seconds + self._idle_seconds)
        return suspected + self.heartbeat_seconds + _LATE_SECONDS + GAP_SECONDS

    @property
    def _idle_seconds(self) -> float:
        # A probe per heartbeat, and a heartbeat to tell of it.
        return max(2 * (self.heartbeat_seconds + _LATE_SECONDS), self.hang_seconds / 2)

    def _silence(self, slot: str, now: float) -> float:
        return now - self.ways[slot].silent_since

    def _answers(self, slot: str, now: float) -> bool:
        return self.ways[slot].has_answered and self._silence(slot, now) < self._half_seconds

    def _take_notes(
        self, now: float, ready: Mapping[str, Ready], is_waiting: Callable[[], bool]
    ) -> None:
        half_silent = {slot for slot in self.ways if self._silence(slot, now) >= self._half_seconds}
        if not half_silent:
            self._all_silent = self._proxies_silent = self._waiting_since = None
            return
        counters = ready[TUN].counters
        arrived = counters.get(_ARRIVED, 0)
        for slot in half_silent:
            way = self.ways[slot]
            done, beat = _done_by(slot, ready[slot].counters), ready[slot].counters
            way.note = _noted(way.note, now, done, arrived, beat)
        if half_silent.issuperset(self._proxies()):
            refused = counters.get(_REFUSED, 0)
            self._proxies_silent = _noted(self._proxies_silent, now, refused, arrived, counters)
        else:
            self._proxies_silent = None
        if len(half_silent) < len(self.ways):
            self._all_silent = self._waiting_since = None
            return
        moved = sum(counters.get(name, 0) for name in _MOVED)
        self._all_silent = _noted(self._all_silent, now, moved, arrived, counters)
        if not is_waiting():
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now

    def _suspects(self, now: float, silent: list[str]) -> list[str]:
        if len(silent) == len(self.ways):
            if self._tun_moves_nothing(now):
                return [TUN]
            # Of two ways that end at once neither end is the likely cause.
            return [slot for slot in silent if len(silent) == 1 and self._hangs(slot, now)]
        if not any(self._answers(slot, now) for slot in self.ways):
            return []
        if set(silent) == self._proxies() and self._tun_asks_no_proxy(now):
            return [TUN]
        return [slot for slot in silent if self._hangs(slot, now)]

    def _tun_moves_nothing(self, now: float) -> bool:
        note = self._all_silent
        if note is None or not self._may_suspect(TUN) or self._has_error(self.ways):
            return False
        waits = (
            self._waiting_since is not None and now - self._waiting_since >= self.hang_seconds / 2
        )
        return self._is_idle(note, now) and (waits or note.has_arrived)

    def _tun_asks_no_proxy(self, now: float) -> bool:
        note, proxies = self._proxies_silent, self._proxies()
        if note is None or len(proxies) < 2 or self._has_error(proxies):
            return False
        has_worked = not self._worked[TUN].isdisjoint(proxies)
        is_idle = self._is_idle(note, now) and note.has_arrived
        return has_worked and is_idle and self._may_suspect(TUN)

    def _hangs(self, slot: str, now: float) -> bool:
        way = self.ways[slot]
        if way.note is None or way.error or not self._may_suspect(slot):
            return False
        # Questions to dns pass through tun uncounted.
        is_asked = slot == DNS or way.note.has_arrived
        return is_asked and self._is_idle(way.note, now)

    def _is_idle(self, note: _Note, now: float) -> bool:
        return note.is_idle(now, self._idle_seconds)

    def _may_suspect(self, slot: str) -> bool:
        return bool(self._worked[slot]) and slot not in self._suspected

    def _has_error(self, slots: "set[str] | dict[str, Way]") -> bool:
        return any(self.ways[slot].error for slot in slots)

    def _proxies(self) -> set[str]:
        return {slot for slot in self.ways if slot != DNS}

    def _why(self, slot: str) -> str:
        seconds = f"{self.hang_seconds:g} s"
        if slot == TUN:
            return f"no probe has come through it for {seconds}"
        return f"it has answered no probe for {seconds}"

    def _explain(self, silent: list[str]) -> None:
        if silent and len(silent) == len(self.ways):
            errors = sorted({way.error for way in self.ways.values() if way.error})
            because = f" ({', '.join(errors)})" if errors else ""
            self.problems.append(
                f"Nothing that is sent to {self._interface} is answered{because}: have this"
                f" machine's firewall let everything on {self._interface} pass."
            )
            return
        for slot in silent:
            error = self.ways[slot].error
            because = f" ({error})" if error else ""
            what, where = f"Connections through {slot} are", f"TCP to {self._dns_address}"
            if slot == DNS:
                what, where = f"The DNS server {self._dns_address} is", "UDP port 53"
            self.problems.append(
                f"{what} not answered when VNet tries itself{because}: have this machine's firewall"
                f" let {where} on {self._interface} pass; if it does, run: vnet restart {slot}"
            )


def _noted(note: _Note | None, now: float, done: int, arrived: int, beat: object) -> _Note:
    if note is None:
        return _Note(now, done, arrived, beat)
    note.look(now, done, arrived, beat)
    return note


def _done_by(slot: str, counters: Mapping[str, int]) -> int:
    if slot == DNS:
        return sum(value for name, value in counters.items() if name.startswith("answers_"))
    return counters.get(_ARRIVED, 0)

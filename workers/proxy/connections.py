"""The connections of this proxy, those that go on and the last that have ended, for `vnet connections`. Pure.

    begins --> DIALLING --accepted--> ACTIVE --ended--> DONE
                  |
                  +-- refused --> FAILED         counted against its target
                  +-- cancelled --> CANCELLED    counted as nothing

What goes on is never dropped. Of what has ended, at most `of_target` of each target and `in_all` together
stay, live ones counted in; what ended first makes room. Totals of a target outlive its
connections; of more than `max_targets` the one without connections that was used least recently goes.

Bytes are read from the relays when somebody looks, and rates follow from two looks: while nobody
does, nothing happens between the begin and the end of a connection.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

from ipc import addresses
from ipc.connection_id import connection_id
from ipc.connection_list import (
    MAX_CONNECTIONS,
    MAX_NAME,
    MAX_OF_TARGET,
    MAX_TARGETS,
    ConnectionState,
    ConnectionTold,
    TargetKind,
    TargetTold,
)
from ipc.messages import DialRequest, Refusal
from workers.proxy.relay import RelayOutcome
from workers.proxy.teleport.errors import safe_text

# Looks that are closer to each other than this see the same rates: a second, less what a timer is early.
RATE_SECONDS = 0.9
# Who has not looked for so long wants no rate over the time in between.
STALE_SECONDS = 3.5
_MAX_ERROR = 500

# Few addresses have many connections, and making a text of one takes longer than all else of a line.
_as_text = lru_cache(maxsize=1000)(addresses.as_text)


class HasBytes(Protocol):
    """What carries a connection."""

    @property
    def bytes_up(self) -> int: ...

    @property
    def bytes_down(self) -> int: ...


class Target(NamedTuple):
    """What connections are counted by. `leaf` is empty for the root cluster.

    `name` is the DNS name; `port` is None unless the app has several.
    """

    kind: TargetKind
    profile: str = ""
    leaf: str = ""
    name: str = ""
    port: int | None = None


NOT_KNOWN = Target(TargetKind.UNKNOWN)


class _Traffic:
    """Bytes in both directions, and how fast they became more."""

    __slots__ = ("rates", "received", "seen", "sent")

    def __init__(self) -> None:
        self.sent = self.received = 0
        self.seen = (0, 0)  # in the last sample
        self.rates: tuple[float, float] | None = None

    def sample(self, seconds: float | None) -> bool:
        """Bytes of now against those of the last sample, None: there is none. Whether it says other."""
        now = (self.sent, self.received)
        rates = None
        if seconds is not None:
            sent, received = self.seen
            rates = (_rate(now[0] - sent, seconds), _rate(now[1] - received, seconds))
        is_other = now != self.seen or rates != self.rates
        self.seen, self.rates = now, rates
        return is_other


class Record:
    """One connection. Made and changed by `Ledger` alone."""

    __slots__ = (
        "begun_at",
        "end",
        "ended",
        "error",
        "link",
        "refusal",
        "request",
        "seconds",
        "started",
        "state",
        "statistics",
        "traffic",
    )

    def __init__(
        self, request: DialRequest, statistics: "_Statistics", started: float, begun_at: float
    ) -> None:
        self.request = request
        self.statistics = statistics
        self.started = started  # seconds since 1970
        self.begun_at = begun_at  # monotonic
        self.state = ConnectionState.DIALLING
        self.link: HasBytes | None = None
        self.traffic = _Traffic()
        self.ended: float | None = None
        self.seconds = 0.0
        self.refusal: Refusal | None = None
        self.end = ""
        self.error = ""

    def read(self) -> None:
        """Brings the bytes up to date."""
        if self.link is not None:
            self.traffic.sent, self.traffic.received = self.link.bytes_up, self.link.bytes_down


class _Statistics:
    """Totals of one target, and its connections that have ended, in the order of their ends."""

    __slots__ = (
        "active",
        "dialling",
        "ended_received",
        "ended_sent",
        "failed",
        "finished",
        "key",
        "ok",
        "shown",
        "traffic",
    )

    def __init__(self, key: Target) -> None:
        self.key = key
        # Foreign text, once for all connections.
        self.shown = key._replace(
            profile=safe_text(key.profile, MAX_NAME),
            leaf=safe_text(key.leaf, MAX_NAME),
            name=safe_text(key.name, MAX_NAME),
        )
        self.dialling = self.active = self.ok = self.failed = 0
        self.ended_sent = self.ended_received = 0
        self.traffic = _Traffic()
        self.finished: OrderedDict[Record, None] = OrderedDict()

    @property
    def live(self) -> int:
        return self.dialling + self.active

    @property
    def is_empty(self) -> bool:
        return not (self.live or self.ok or self.failed or self.finished)


class Ledger:
    """See the module. `clock` is monotonic, `wall` seconds since 1970."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        of_target: int = MAX_OF_TARGET,
        in_all: int = MAX_CONNECTIONS,
        max_targets: int = MAX_TARGETS,
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._of_target = of_target
        self._in_all = in_all
        self._max_targets = max_targets
        self._statistics: dict[Target, _Statistics] = {}
        # Those without connections, the least recently used first.
        self._resting: OrderedDict[_Statistics, None] = OrderedDict()
        self._live: dict[Record, None] = {}
        self._finished: OrderedDict[Record, None] = OrderedDict()
        self._sampled_at: float | None = None
        self._revision = 0

    # -- what happens --

    def begins(self, request: DialRequest) -> Record:
        """A program waits for a connection; what it leads to is not known yet."""
        statistics = self._of(NOT_KNOWN)
        record = Record(request, statistics, self._wall(), self._clock())
        statistics.dialling += 1
        self._live[record] = None
        self._make_room(statistics)
        return record

    def leads_to(self, record: Record, target: Target) -> None:
        """What it leads to, as far as is known; a later call knows better."""
        before = record.statistics
        if record.state is not ConnectionState.DIALLING or before.key == target:
            return
        before.dialling -= 1
        self._rest(before)
        record.statistics = self._of(target)
        record.statistics.dialling += 1
        self._make_room(record.statistics)

    def accepted(self, record: Record, link: HasBytes) -> None:
        """It is established; `link` knows its bytes."""
        if record.state is not ConnectionState.DIALLING:
            return
        record.state, record.link = ConnectionState.ACTIVE, link
        statistics = record.statistics
        statistics.dialling -= 1
        statistics.active += 1
        statistics.ok += 1
        self._revision += 1

    def refused(self, record: Record, refusal: Refusal, why: str) -> None:
        """It never was established."""
        if record.state is ConnectionState.DIALLING:
            record.refusal = refusal
            record.statistics.failed += 1
            record.statistics.dialling -= 1
            self._finish(record, ConnectionState.FAILED, why)

    def cancelled(self, record: Record, why: str) -> None:
        """It was given up before it was established."""
        if record.state is ConnectionState.DIALLING:
            record.statistics.dialling -= 1
            self._finish(record, ConnectionState.CANCELLED, why)

    def ended(self, record: Record, outcome: RelayOutcome) -> None:
        """What was established is over, in whatever way."""
        if record.state is not ConnectionState.ACTIVE:
            return
        statistics = record.statistics
        statistics.active -= 1
        record.link = None
        record.end = outcome.end
        record.traffic.sent, record.traffic.received = outcome.bytes_up, outcome.bytes_down
        statistics.ended_sent += outcome.bytes_up
        statistics.ended_received += outcome.bytes_down
        self._finish(record, ConnectionState.DONE, outcome.error)

    def _finish(self, record: Record, state: ConnectionState, error: str) -> None:
        record.state = state
        record.ended = self._wall()
        record.seconds = self._clock() - record.begun_at
        record.error = safe_text(error, _MAX_ERROR)
        statistics = record.statistics
        del self._live[record]
        self._finished[record] = statistics.finished[record] = None
        self._make_room(statistics)
        self._rest(statistics)

    # -- what is kept --

    def _of(self, key: Target) -> _Statistics:
        statistics = self._statistics.get(key)
        if statistics is None:
            statistics = self._statistics[key] = _Statistics(key)
            self._forget_targets()
        self._resting.pop(statistics, None)
        return statistics

    def _rest(self, statistics: _Statistics) -> None:
        """To be called when a connection has left a target."""
        if statistics.live:
            return
        if statistics.is_empty:
            # Perhaps gone already: its last record has just made room for others.
            self._statistics.pop(statistics.key, None)
        else:
            self._resting[statistics] = None
            self._forget_targets()

    def _forget_targets(self) -> None:
        while len(self._statistics) > self._max_targets and self._resting:
            statistics, _ = self._resting.popitem(last=False)
            del self._statistics[statistics.key]
            for record in statistics.finished:
                del self._finished[record]

    def _make_room(self, statistics: _Statistics) -> None:
        self._revision += 1
        finished = statistics.finished
        while finished and statistics.live + len(finished) > self._of_target:
            del self._finished[finished.popitem(last=False)[0]]
        while self._finished and len(self._live) + len(self._finished) > self._in_all:
            record, _ = self._finished.popitem(last=False)
            del record.statistics.finished[record]
            if record.statistics.is_empty:
                # Only cancelled attempts were left of it.
                self._resting.pop(record.statistics, None)
                self._statistics.pop(record.statistics.key, None)

    # -- what is told --

    @property
    def revision(self) -> int:
        """Another number whenever something was told or sampled that is new."""
        return self._revision

    def sample(self) -> None:
        """Somebody looks: computes rates if the last look was about a second ago."""
        now = self._clock()
        seconds = None
        if self._sampled_at is not None:
            seconds = now - self._sampled_at
            if seconds < RATE_SECONDS:
                return
            if seconds > STALE_SECONDS:
                seconds = None
        self._sampled_at = now
        self._read()
        is_other = False
        for record in self._live:
            is_other |= record.traffic.sample(seconds)
        for statistics in self._statistics.values():
            is_other |= statistics.traffic.sample(seconds)
        if is_other:
            self._revision += 1

    def _read(self) -> None:
        for statistics in self._statistics.values():
            statistics.traffic.sent = statistics.ended_sent
            statistics.traffic.received = statistics.ended_received
        for record in self._live:
            record.read()
            traffic = record.statistics.traffic
            traffic.sent += record.traffic.sent
            traffic.received += record.traffic.received

    def lines(self) -> Iterator[TargetTold | ConnectionTold]:
        """Everything, in no particular order. What happens in between may be told half."""
        self._read()
        for statistics in list(self._statistics.values()):
            yield _target_told(statistics)
        for record in [*self._live, *self._finished]:
            yield self._connection_told(record)

    def _connection_told(self, record: Record) -> ConnectionTold:
        request, target, traffic = record.request, record.statistics.shown, record.traffic
        is_live = record.ended is None
        sent_rate, received_rate = traffic.rates or (None, None)
        if not is_live:
            sent_rate = received_rate = 0.0
        return ConnectionTold(
            id=connection_id(request.flow_id),
            kind=target.kind,
            profile=target.profile,
            leaf=target.leaf,
            name=target.name,
            address=_as_text(request.destination),
            port=request.destination_port,
            client_address=_as_text(request.source),
            client_port=request.source_port,
            state=record.state,
            started=record.started,
            ended=record.ended,
            duration_seconds=self._clock() - record.begun_at if is_live else record.seconds,
            bytes_sent=traffic.sent,
            bytes_received=traffic.received,
            sent_per_second=sent_rate,
            received_per_second=received_rate,
            refusal=record.refusal,
            end=record.end,
            error=record.error,
        )


def _rate(count: int, seconds: float) -> float:
    return round(max(count, 0) / seconds, 1)


def _target_told(statistics: _Statistics) -> TargetTold:
    target, traffic = statistics.shown, statistics.traffic
    sent_rate, received_rate = traffic.rates or (None, None)
    return TargetTold(
        kind=target.kind,
        profile=target.profile,
        leaf=target.leaf,
        name=target.name,
        port=target.port,
        dialling=statistics.dialling,
        active=statistics.active,
        ok=statistics.ok,
        failed=statistics.failed,
        bytes_sent=traffic.sent,
        bytes_received=traffic.received,
        sent_per_second=sent_rate,
        received_per_second=received_rate,
    )

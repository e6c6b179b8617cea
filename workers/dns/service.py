"""Decides how each question is answered, and remembers what may be used again.

    bytes ─▶ packed answers ─▶ parse ─▶ zones ─▶ names known ─▶ ask a proxy ─▶ forward upstream
             └──────────── at_once, no waiting ─────────────┘   └─────── begin, a task ───────┘

Four tables, each with its own limit, so that a flood of other names cannot push out our own:
packed answers by the whole query without its id; names of ours; names that would be ours and that
nothing has; names that are not ours. Answers from upstream are not kept: the servers there do that,
and know their lifetimes.

What is said of our own names, that there is none included, is for those who may connect. Whoever else asks is
told REFUSED, after the same work: what is remembered does not depend on who asked first.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from ipc.addresses import ipv6_twin
from ipc.messages import AddressResolved, NameOutcome, NameResolved, Network
from workers.dns import answer
from workers.dns.answer import AnswerError
from workers.dns.askers import MayKnow
from workers.dns.cache import ExpiringCache
from workers.dns.message import (
    Query,
    QueryError,
    Rcode,
    Type,
    parse,
    refuse,
    refuse_unread,
    truncate,
)
from workers.dns.resolver import OverloadedError
from workers.dns.tally import Outcome, Tally
from workers.dns.zones import (
    Diagnostic,
    EmptyReverse,
    HostName,
    NoSuchReverse,
    Route,
    VirtualAddress,
    Zones,
)

log = logging.getLogger(__name__)

# Header, longest question and an OPT record: a query without options is never longer.
MAX_KEY_BYTES: Final = 12 + 259 + 11

# In place of an expiry: not to be used again.
ONCE: Final = 0.0

# What tells of our own names.
_OUR_OWN: Final = frozenset({Outcome.OWN, Outcome.NODATA, Outcome.NXDOMAIN})
_OUTCOMES: Final = {
    Rcode.SERVFAIL: Outcome.SERVFAIL,
    Rcode.FORMERR: Outcome.FORMERR,
    Rcode.NOTIMP: Outcome.NOTIMP,
    Rcode.REFUSED: Outcome.REFUSED,
    Rcode.BADVERS: Outcome.BADVERS,
}


class Names(Protocol):
    """Who knows what names stand for; see `resolver`."""

    async def resolve_name(self, name: str) -> NameResolved | None: ...
    async def resolve_address(self, ipv4: bytes) -> AddressResolved | None: ...


class Upstreams(Protocol):
    """Who asks the upstream servers; see `upstream`."""

    async def forward(self, query: Query, *, over_tcp: bool) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept and how much may wait."""

    packed_answers: int = 4096
    own_names: int = 4096
    missing_names: int = 4096
    foreign_names: int = 16384
    in_flight: int = 2048


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, and until when (monotonic seconds) it may be given again, or ONCE."""

    data: bytes
    outcome: Outcome
    expires: float = ONCE


class _State:
    """What follows from one state of the network, thrown away as a whole when it changes.

    A task keeps the state it began with, so a late answer lands in the table that is gone.
    """

    def __init__(self, network: Network, limits: Limits) -> None:
        self.network = network
        self.zones = Zones(network)
        self.packed: ExpiringCache[bytes, Reply] = ExpiringCache(limits.packed_answers)
        self.own: ExpiringCache[str, tuple[NameResolved, float]] = ExpiringCache(limits.own_names)
        self.missing: ExpiringCache[str, float] = ExpiringCache(limits.missing_names)
        self.foreign: ExpiringCache[str, bool] = ExpiringCache(limits.foreign_names)


class DnsService:
    """Answers questions. `ttl` in seconds is put on every record of ours."""

    def __init__(
        self,
        network: Network,
        ttl: int,
        names: Names,
        upstreams: Upstreams,
        tally: Tally,
        limits: Limits | None = None,
    ) -> None:
        self._ttl = ttl
        self._names = names
        self._upstreams = upstreams
        self._tally = tally
        self._counters = tally.counters
        self._limits = limits or Limits()
        self._state = _State(network, self._limits)
        self._tasks: set[asyncio.Task[None]] = set()

    def change_network(self, network: Network) -> None:
        """Takes over new ranges and addresses; everything remembered is dropped."""
        self._state = _State(network, self._limits)

    def forget(self) -> None:
        """Drops everything remembered."""
        self._state = _State(self._state.network, self._limits)

    def at_once(self, data: bytes, now: float, may_know: MayKnow) -> bytes | Query | None:
        """The answer, if no one has to be asked for it; else the query, for `begin`.

        `may_know` is called only for an answer that tells of our own names.

        None: the bytes get no answer. Raises nothing, for any input.
        """
        self._counters["queries"] += 1
        hit = self._state.packed.get(data[2:], now)
        if hit is not None:  # of our own names: nothing else is kept
            if not may_know():
                query = parse(data)
                return self._finish(query, _refusal(query, Rcode.REFUSED))
            self._counters["cache_hits"] += 1
            self._counters[hit.outcome] += 1
            return data[:2] + hit.data[2:]
        try:
            query = parse(data)
        except QueryError as error:
            return self._reject(data, error)
        try:
            reply = self._answer_alone(self._state, query, now)
        except AnswerError as error:
            log.error("%s", error)
            reply = _refusal(query, Rcode.SERVFAIL)
        if reply is None:
            return query
        self._remember(self._state, query, reply)
        return self._finish(query, _guarded(query, reply, may_know))

    def begin(
        self,
        query: Query,
        may_know: MayKnow,
        deliver: Callable[[bytes], None],
        *,
        over_tcp: bool,
    ) -> None:
        """Answers a query that `at_once` gave back; `deliver` is called exactly once.

        Unless `close` comes first. `may_know` as there, and just before the answer.
        """
        if len(self._tasks) >= self._limits.in_flight:
            self._tally.count("overloads")
            deliver(self._finish(query, _refusal(query, Rcode.SERVFAIL)))
            return
        task = asyncio.get_running_loop().create_task(
            self._run(query, may_know, deliver, over_tcp=over_tcp)
        )
        self._tasks.add(task)
        self._counters["in_flight_now"] = len(self._tasks)
        task.add_done_callback(self._end)

    async def finished(self) -> None:
        """Returns when no question is under way, if no others are taken."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def close(self) -> None:
        """Gives up all questions that are under way."""
        for task in self._tasks:
            task.cancel()

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._counters["in_flight_now"] = len(self._tasks)

    async def _run(
        self,
        query: Query,
        may_know: MayKnow,
        deliver: Callable[[bytes], None],
        *,
        over_tcp: bool,
    ) -> None:
        start = time.monotonic()
        state = self._state
        try:
            reply = await self._answer(state, query, over_tcp=over_tcp)
        except OverloadedError as error:
            self._tally.count("overloads")
            log.debug("query %d %s: %s", query.id, query.text, error)
            reply = _refusal(query, Rcode.SERVFAIL)
        except Exception:
            log.exception("query %d %s type %d failed", query.id, query.text, query.qtype)
            reply = _refusal(query, Rcode.SERVFAIL)
        self._remember(state, query, reply)
        data = self._finish(query, _guarded(query, reply, may_know))
        if not over_tcp and len(data) > query.payload_limit:
            data = truncate(query, data)
        deliver(data)
        self._tally.observe(time.monotonic() - start)

    def _reject(self, data: bytes, error: QueryError) -> bytes | None:
        log.debug("a message of %d bytes: %s", len(data), error)
        if error.rcode is None:
            self._counters[Outcome.DROPPED] += 1
            return None
        self._counters[_OUTCOMES[error.rcode]] += 1
        return refuse_unread(data, error.rcode)

    def _answer_alone(self, state: _State, query: Query, now: float) -> Reply | None:
        """The answer as far as it follows from the question and what is remembered."""
        if query.edns is not None and query.edns.version != 0:
            return _refusal(query, Rcode.BADVERS)
        # Transfers are many messages, and no stub resolver's business.
        if query.qtype in (Type.AXFR, Type.IXFR):
            return _refusal(query, Rcode.REFUSED)
        route = state.zones.route(query)
        if isinstance(route, HostName):
            if (known := state.own.get(route.name, now)) is not None:
                return self._answer_name(state, query, *known)
            expires = state.missing.get(route.spelling, now)
            return None if expires is None else self._no_such_name(query, expires)
        return self._answer_place(state, query, route, now)

    def _answer_place(self, state: _State, query: Query, route: Route, now: float) -> Reply | None:
        if isinstance(route, Diagnostic):
            network = state.network
            # Used once: whoever asks wants to know what works now.
            data = answer.addresses(query, network.dns_ipv4, network.dns_ipv6, ttl=0)
            return Reply(data, Outcome.DIAGNOSTIC)
        if isinstance(route, EmptyReverse):
            data = answer.nodata(query, route.zone_labels, self._ttl)
            return Reply(data, Outcome.NODATA, now + self._ttl)
        if isinstance(route, NoSuchReverse):
            data = answer.nxdomain(query, route.zone_labels, self._ttl)
            return Reply(data, Outcome.NXDOMAIN, now + self._ttl)
        return None

    async def _answer(self, state: _State, query: Query, *, over_tcp: bool) -> Reply:
        route = state.zones.route(query)
        if isinstance(route, VirtualAddress):
            return await self._answer_reverse(query, route)
        if isinstance(route, HostName) and not state.foreign.get(route.spelling, time.monotonic()):
            reply = await self._ask_proxies(state, query, route)
            if reply is not None:
                return reply
        forwarded = await self._upstreams.forward(query, over_tcp=over_tcp)
        if forwarded is None:
            return _refusal(query, Rcode.SERVFAIL)
        return Reply(forwarded, Outcome.FORWARDED)

    async def _ask_proxies(self, state: _State, query: Query, route: HostName) -> Reply | None:
        """The answer of a proxy; None when the name is not ours.

        Clusters compare names byte by byte, so that one spelling is not ours, or does not exist,
        says nothing of another.
        """
        resolved = await self._names.resolve_name(route.spelling)
        if resolved is None:
            log.debug("query %d %s: no proxy answers", query.id, query.text)
            return _refusal(query, Rcode.SERVFAIL)
        expires = time.monotonic() + resolved.valid_seconds if resolved.valid_seconds else ONCE
        if resolved.outcome is NameOutcome.NOT_OURS:
            if expires != ONCE:
                state.foreign.put(route.spelling, value=True, expires=expires)
            return None
        if resolved.outcome is NameOutcome.NO_SUCH_NAME:
            if expires != ONCE:
                state.missing.put(route.spelling, expires, expires)
            return self._no_such_name(query, expires)
        if expires != ONCE:
            state.own.put(route.name, (resolved, expires), expires)
        return self._answer_name(state, query, resolved, expires)

    def _answer_name(
        self, state: _State, query: Query, resolved: NameResolved, expires: float
    ) -> Reply:
        ipv4 = resolved.ipv4
        if resolved.outcome is not NameOutcome.ADDRESS or ipv4 is None:
            return _refusal(query, Rcode.SERVFAIL)
        prefix = state.network.ipv6_prefix
        ipv6 = None if prefix is None else ipv6_twin(prefix, ipv4)
        return self._addresses(query, ipv4, ipv6, expires=expires)

    def _no_such_name(self, query: Query, expires: float) -> Reply:
        # Only its own label is known to be missing, so the zone begins behind that.
        data = answer.nxdomain(query, max(1, len(query.labels) - 1), self._ttl)
        return Reply(data, Outcome.NXDOMAIN, expires)

    async def _answer_reverse(self, query: Query, route: VirtualAddress) -> Reply:
        resolved = await self._names.resolve_address(route.ipv4)
        if resolved is None:
            return _refusal(query, Rcode.SERVFAIL)
        if resolved.name is None:
            # Not remembered: the address may be given out the next moment.
            data = answer.nxdomain(query, route.zone_labels, self._ttl)
            return Reply(data, Outcome.NXDOMAIN)
        data = answer.pointer(query, resolved.name, route.zone_labels, self._ttl)
        outcome = Outcome.OWN if query.qtype in (Type.PTR, Type.ANY) else Outcome.NODATA
        return Reply(data, outcome, time.monotonic() + self._ttl)

    def _addresses(self, query: Query, ipv4: bytes, ipv6: bytes | None, *, expires: float) -> Reply:
        data = answer.addresses(query, ipv4, ipv6, self._ttl)
        outcome = Outcome.OWN if answer.has_address(query, ipv6) else Outcome.NODATA
        return Reply(data, outcome, expires)

    def _remember(self, state: _State, query: Query, reply: Reply) -> None:
        # Options differ from query to query (cookies): such answers would only fill the table.
        has_options = query.edns is not None and query.edns.has_options
        if reply.expires != ONCE and not has_options and len(query.data) <= MAX_KEY_BYTES:
            state.packed.put(query.data[2:], reply, reply.expires)

    def _finish(self, query: Query, reply: Reply) -> bytes:
        self._counters[reply.outcome] += 1
        if log.isEnabledFor(logging.DEBUG):  # the text of the name costs more than the rest
            log.debug("query %d %s type %d: %s", query.id, query.text, query.qtype, reply.outcome)
        return reply.data


def _guarded(query: Query, reply: Reply, may_know: MayKnow) -> Reply:
    """The reply as it is given to this asker."""
    if reply.outcome not in _OUR_OWN or may_know():
        return reply
    return _refusal(query, Rcode.REFUSED)


def _refusal(query: Query, rcode: Rcode) -> Reply:
    return Reply(refuse(query, rcode), _OUTCOMES[rcode])

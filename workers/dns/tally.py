"""Counters of the dns worker, kept cheap enough for every query. Pure.

queries              questions received, over UDP and TCP
answers_<outcome>    see Outcome; `dropped` are those that got none
cache_hits           answered from packed answers
refused_users        answers about VNet's names that were kept from who may not have them (REFUSED)
upstream_failures    forwarded questions that no server answered
upstream_mismatches  datagrams from upstream that belonged to no question
overloads            questions or connections turned away at a limit
send_failures        answers the kernel did not take
in_flight_now        questions that wait for a proxy or an upstream server
tcp_connections_now  open connections of clients
latency_le_<n>ms     answers that took at most n milliseconds (cumulative)
latency_count, latency_us   all of them, and the microseconds they took together
"""

from enum import StrEnum
from typing import Final

BUCKETS_MS: Final = (1, 2, 5, 10, 20, 50, 100, 500, 1000, 5000)


class Outcome(StrEnum):
    """How a question was answered; the value is the name of the counter."""

    OWN = "answers_own"
    DIAGNOSTIC = "answers_diagnostic"  # of a name that only tests whether questions reach us
    NODATA = "answers_nodata"
    NXDOMAIN = "answers_nxdomain"
    FORWARDED = "answers_forwarded"
    SERVFAIL = "answers_servfail"
    FORMERR = "answers_formerr"
    NOTIMP = "answers_notimp"
    BADVERS = "answers_badvers"
    REFUSED = "answers_refused"
    DROPPED = "answers_dropped"


OTHERS: Final = (
    "queries",
    "cache_hits",
    "refused_users",
    "upstream_failures",
    "upstream_mismatches",
    "overloads",
    "send_failures",
    "in_flight_now",
    "tcp_connections_now",
    "latency_count",
    "latency_us",
)


class Tally:
    """Writes into `counters`, which belongs to the caller (it sends them with its heartbeat)."""

    def __init__(self, counters: dict[str, int]) -> None:
        self.counters = counters
        self._buckets = [(f"latency_le_{limit}ms", limit / 1000) for limit in BUCKETS_MS]
        for name in (*Outcome, *OTHERS, *(name for name, _ in self._buckets)):
            counters.setdefault(str(name), 0)

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a total, or to a present value when `number` may be negative."""
        self.counters[name] += number

    def observe(self, seconds: float, answers: int = 1) -> None:
        """`answers` were given, each after at most `seconds`."""
        counters = self.counters
        counters["latency_count"] += answers
        counters["latency_us"] += int(seconds * 1e6) * answers
        # From the slowest down: nearly all stop nowhere and cost ten additions per batch.
        for name, limit in reversed(self._buckets):
            if seconds > limit:
                break
            counters[name] += answers

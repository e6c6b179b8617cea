"""Which counters of the workers are served as metrics, and how they are added up. Pure.

Workers count what they like and say so with their heartbeats; what is not listed here stays between
a worker and `vnet status`. Outside a worker a counter is named `<role>.<name>`, for example
`dns.cache_hits`, and is the sum over all processes of the role. Names that end in `_now` are
present values, all others totals, to which processes that have ended still contribute.
"""

from collections.abc import Mapping, MutableMapping
from typing import Final

from ipc.messages import Refusal
from ipc.permits import Role

# The largest that a message carries (`ipc.messages.Count`): workers may lie.
MOST: Final = 2**63 - 1
# Upper bounds of the latencies that dns counts (`workers.dns.tally`).
LATENCY_MS: Final = (1, 2, 5, 10, 20, 50, 100, 500, 1000, 5000)
# How dns answers: `answers_<outcome>`.
DNS_OUTCOMES: Final = (
    "own",
    "diagnostic",
    "nodata",
    "nxdomain",
    "forwarded",
    "servfail",
    "formerr",
    "notimp",
    "badvers",
    "refused",
    "dropped",
)
# What certificates are for: `certificates_<kind>_issued` and `_failed`.
CERTIFICATE_KINDS: Final = ("app", "database", "ssh")
# Of tun, which has a counter for each reason.
_DROPPED: Final = "dropped"

SERVED: Final[dict[Role, tuple[str, ...]]] = {
    Role.TUN: (
        *(f"{what}_to_{end}" for what in ("packets", "bytes") for end in ("inner", "outer")),
        *(f"refused_{reason}" for reason in Refusal if reason is not Refusal.PROBE),
        _DROPPED,
        "pending_now",
    ),
    Role.DNS: (
        "queries",
        *(f"answers_{outcome}" for outcome in DNS_OUTCOMES),
        "cache_hits",
        "upstream_failures",
        "overloads",
        "refused_users",
        *(f"latency_le_{limit}ms" for limit in LATENCY_MS),
        "latency_count",
        "latency_us",
        "in_flight_now",
    ),
    Role.PROXY: (
        "connections_total",
        "connections_orphaned",
        "connections_now",
        "bytes_sent",
        "bytes_received",
        "refused_users",
        "http_refused",
        *(
            f"certificates_{kind}_{result}"
            for kind in CERTIFICATE_KINDS
            for result in ("issued", "failed")
        ),
        "dialling_now",
        "waiting_now",
        "listeners_now",
        "questions_now",
        "prompts_now",
    ),
}


def served(role: Role, counters: Mapping[str, int]) -> dict[str, int]:
    """The counters of one process that are served, by their names outside; absent ones are 0."""
    found = {name: counters.get(name, 0) for name in SERVED.get(role, ())}
    if _DROPPED in found:
        found[_DROPPED] = sum(
            value for name, value in counters.items() if name.startswith(f"{_DROPPED}_")
        )
    return {f"{role}.{name}": min(value, MOST) for name, value in found.items()}


def add(into: MutableMapping[str, int], counters: Mapping[str, int]) -> None:
    """Adds counters to what is there, by name."""
    for name, value in counters.items():
        into[name] = min(into.get(name, 0) + value, MOST)


def totals(counters: Mapping[str, int]) -> dict[str, int]:
    """Those that are no present values: what stays of a process that has ended."""
    return {name: value for name, value in counters.items() if not name.endswith("_now")}

"""One question put to all upstream servers at once: the first good answer wins. Pure.

    start ──▶ every server is asked
      │         good answer ─────────────────────────▶ that answer
      │         SERVFAIL, REFUSED, FORMERR, NOTIMP: kept, the server is not asked again
      ▼ after `retry_seconds`
    servers without an answer are asked once more, from a fresh socket
      ▼ every server has answered or failed, `grace_seconds` after a kept answer, or the end
    the kept answer, or none

A try that failed (nobody listens there) is told apart from silence: when every try has failed
there is nothing to wait for but the retry.
"""

from dataclasses import dataclass
from typing import Final

from workers.dns.message import Rcode, rcode_of

# What another server may know better.
BAD_RCODES: Final = frozenset({Rcode.FORMERR, Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED})
ROUNDS: Final = 2


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a question may take, in seconds."""

    # The usual time-out of a client's first try is 5 s: it shall hear SERVFAIL, not silence.
    total_seconds: float = 4.8
    # Lost datagrams are common on radio links, and clients repeat after 1 to 5 s themselves.
    retry_seconds: float = 1.0
    # A server that says REFUSED shall not hide a slower one that knows; nor hold the client up.
    grace_seconds: float = 1.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended; both None when no server answered."""

    answer: bytes | None
    server: int | None


class Race:
    """One question under way. Servers are numbered from 0; times are monotonic seconds."""

    def __init__(self, servers: int, patience: Patience, now: float) -> None:
        self._servers = servers
        self._patience = patience
        self._start = now
        self._rounds = 0
        self._open_tries = [0] * servers
        self._bad: dict[int, bytes] = {}
        self._bad_since = 0.0
        self._good: Outcome | None = None

    def servers_due(self, now: float) -> list[int]:
        """Servers to ask now; the caller reports each of these tries exactly once, or never."""
        if self._rounds == ROUNDS or now < self._round_at(self._rounds):
            return []
        self._rounds += 1
        due = [server for server in range(self._servers) if server not in self._bad]
        for server in due:
            self._open_tries[server] += 1
        return due

    def answered(self, server: int, answer: bytes, now: float) -> None:
        """A try got an answer that belongs to the question."""
        self._open_tries[server] -= 1
        if rcode_of(answer) not in BAD_RCODES:
            self._good = self._good or Outcome(answer, server)
            return
        if not self._bad:
            self._bad_since = now
        self._bad.setdefault(server, answer)

    def failed(self, server: int) -> None:
        """A try failed: nobody listens there, no route, no descriptor left."""
        self._open_tries[server] -= 1

    def outcome(self, now: float) -> Outcome | None:
        """How it ended, or None while it goes on."""
        if self._good is not None:
            return self._good
        if now >= self._deadline() or self._nothing_is_open():
            for server, answer in self._bad.items():
                return Outcome(answer, server)
            return Outcome(None, None)
        return None

    def next_look(self) -> float:
        """When `servers_due` or `outcome` may change without an event."""
        if self._rounds < ROUNDS:
            return min(self._round_at(self._rounds), self._deadline())
        return self._deadline()

    def _round_at(self, number: int) -> float:
        return self._start + number * self._patience.retry_seconds

    def _deadline(self) -> float:
        end = self._start + self._patience.total_seconds
        return min(end, self._bad_since + self._patience.grace_seconds) if self._bad else end

    def _nothing_is_open(self) -> bool:
        waits = [
            server
            for server in range(self._servers)
            if server not in self._bad and (self._open_tries[server] or self._rounds < ROUNDS)
        ]
        return not waits

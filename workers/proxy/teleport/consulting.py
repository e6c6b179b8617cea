"""Asks all clusters that may have a name at once, and takes the first answer that counts.

`workers.proxy.teleport.precedence` says what counts. One slow or dead cluster must not slow the
others: who has not answered a moment after somebody's match is passed over.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from workers.proxy.teleport.errors import TeleportError, UnreachableError, ZonesUnknownError
from workers.proxy.teleport.precedence import (
    NO_CANDIDATE,
    Answer,
    Candidate,
    Decision,
    Row,
    decide,
)

# What an earlier candidate gets after a later one has matched.
GRACE_SECONDS = 0.25
# What the other clusters of a profile get for a name that lies in none of their zones.
REMOTE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Question:
    """A normalised name, how it was typed, and whether negative answers must be young."""

    name: str
    spelling: str
    fresh: bool = False

    @property
    def label(self) -> str:
        """The first label as it was typed."""
        return self.spelling.partition(".")[0]


class Source(Protocol):
    """Whom to ask. A candidate of None: it is not known yet whether it is one."""

    def known(self, question: Question, candidate: Candidate) -> Answer | None:
        """What it need not be asked for."""

    def last_known(self, question: Question, candidate: Candidate) -> Answer | None:
        """What it said once, however long ago; None when that was nothing."""

    async def ask(self, question: Question, candidate: Candidate | None) -> "Reply":
        """Its answer. Raises TeleportError."""


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, and what made the one who gave it a candidate."""

    candidate: Candidate
    answer: Answer


@dataclass(frozen=True, slots=True)
class Deferred:
    """Others, unknown until now, are to be asked instead."""

    sources: "list[tuple[Source, Candidate | None]]"


Reply: TypeAlias = Answered | Deferred


@dataclass(slots=True, eq=False)
class Asked:
    """One of those who are asked."""

    source: Source
    candidate: Candidate | None
    outcome: Answer | TeleportError | None = None
    task: "asyncio.Task[Reply] | None" = None

    @property
    def row(self) -> Row:
        """For `decide`."""
        return Row(self.candidate or NO_CANDIDATE, self.outcome)

    @property
    def is_remote(self) -> bool:
        """Whether it is asked only as one of all clusters of the profile."""
        return self.candidate is not None and self.candidate.is_remote


@dataclass(slots=True)
class _Consultation:
    question: Question
    asked: list[Asked]
    grace_seconds: float
    remote_seconds: float
    answered: asyncio.Queue[Asked] = field(default_factory=asyncio.Queue)
    # When a match, or the lack of any, was first seen: then the others' time begins.
    matched_at: float | None = None
    remote_at: float | None = None

    async def run(self) -> Decision:
        try:
            decision = self._look_up()
            while not decision.is_final:
                decision = await self._next(decision)
            return decision
        finally:
            for one in self.asked:
                if one.task is not None:
                    one.task.cancel()  # the question itself goes on, for the cache

    def _look_up(self) -> Decision:
        is_complete = True
        for one in self.asked:
            if one.candidate is not None:
                one.outcome = one.source.known(self.question, one.candidate)
            is_complete = is_complete and one.outcome is not None
            # The first app decides: who comes later need not even be looked up.
            if is_complete and isinstance(one.outcome, Answer) and one.outcome.app is not None:
                break
        return self._decide()

    def _decide(self) -> Decision:
        return decide([one.row for one in self.asked])

    async def _next(self, before: Decision) -> Decision:
        """Waits until something has come that may change the decision."""
        now = asyncio.get_running_loop().time()
        if before.is_match and self.matched_at is None:
            self.matched_at = now
        missing = [one for one in self.asked if one.outcome is None]
        for one in missing:
            if one.task is None:
                self._begin(one)
        left = set(missing)
        while left:
            if self.remote_at is None and all(one.is_remote for one in left):
                self.remote_at = now = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout_at(self._deadline()):
                    one = await self.answered.get()
            except TimeoutError:
                for one in left:
                    self._pass_over(one)
                break
            left.discard(one)
            if self._take(one) or before.is_match:
                break
        return self._decide()

    def _begin(self, one: Asked) -> None:
        one.task = asyncio.ensure_future(one.source.ask(self.question, one.candidate))
        one.task.add_done_callback(lambda _task: self.answered.put_nowait(one))

    def _deadline(self) -> float | None:
        ends = []
        if self.matched_at is not None:
            ends.append(self.matched_at + self.grace_seconds)
        if self.remote_at is not None:
            ends.append(self.remote_at + self.remote_seconds)
        return min(ends, default=None)

    def _take(self, one: Asked) -> bool:
        """Takes over what has come; whether it says more than "not mine"."""
        assert one.task is not None
        try:
            reply = one.task.result()
        except TeleportError as error:
            one.outcome = doubtful(error, one.candidate)
            return bool(one.candidate and one.candidate.suffix)
        except asyncio.CancelledError:
            one.outcome = UnreachableError("the login changed while the cluster was asked")
            return True
        if isinstance(reply, Deferred):
            at = self.asked.index(one)
            self.asked[at : at + 1] = [Asked(*source) for source in reply.sources]
            return True
        one.candidate, one.outcome = reply.candidate, reply.answer
        return reply.answer != Answer() or bool(reply.candidate.suffix)

    def _pass_over(self, one: Asked) -> None:
        known = one.source.last_known(self.question, one.candidate or NO_CANDIDATE)
        silent = UnreachableError("a cluster has not answered yet")
        one.outcome = known or doubtful(silent, one.candidate)


def doubtful(error: TeleportError, candidate: Candidate | None) -> TeleportError:
    """The error, or that nobody knows whose the name is.

    Below `db.<proxy>` nobody else can have the name, so there the error stands.
    """
    if isinstance(error, ZonesUnknownError):
        return error
    if candidate is None or (candidate.is_remote and not candidate.identifier):
        return ZonesUnknownError(error)
    return error


async def consult(
    sources: Iterable[tuple[Source, Candidate | None]],
    question: Question,
    *,
    grace_seconds: float = GRACE_SECONDS,
    remote_seconds: float = REMOTE_SECONDS,
) -> tuple[Decision, list[Asked]]:
    """Asks all sources at once. The decision's index is one of the list."""
    asked = [Asked(source, candidate) for source, candidate in sources]
    consultation = _Consultation(question, asked, grace_seconds, remote_seconds)
    decision = await consultation.run()
    return decision, consultation.asked

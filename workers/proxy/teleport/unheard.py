"""Sources of names of which nothing is known yet. See `consulting.Source`."""

from collections.abc import Awaitable, Callable

from workers.proxy.teleport.consulting import Deferred, Question
from workers.proxy.teleport.precedence import Answer, Candidate


class _Unheard:
    """Somebody of whom nothing is known, least of all names."""

    def known(self, question: Question, candidate: Candidate) -> Answer | None:  # noqa: ARG002 - as Source
        return None

    def last_known(self, question: Question, candidate: Candidate) -> Answer | None:  # noqa: ARG002 - as Source
        return None


class NoLogin(_Unheard):
    """A profile that cannot be asked. `require` raises a TeleportError that says why."""

    def __init__(self, require: Callable[[None], None]) -> None:
        self._require = require

    async def ask(self, question: Question, candidate: Candidate | None) -> Deferred:  # noqa: ARG002 - as Source
        self._require(None)
        return Deferred([])


class UnknownLeaves(_Unheard):
    """Leaves that the root has not named yet. `ask` waits for them, and gives those to be asked."""

    def __init__(self, ask: Callable[[Question], Awaitable[Deferred]]) -> None:
        self._ask = ask

    async def ask(self, question: Question, candidate: Candidate | None) -> Deferred:  # noqa: ARG002 - as Source
        return await self._ask(question)

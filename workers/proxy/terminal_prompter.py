"""Asks for second factors in the terminal in which a command runs, one at a time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from ipc import prompts as p
from workers.proxy.teleport import mfa
from workers.proxy.teleport.errors import (
    MfaUnansweredError,
    SignInFailedError,
    TeleportError,
    safe_text,
)
from workers.proxy.teleport.mfa import MfaQuestion, Renew, SignedIn
from workers.proxy.teleport.pb import auth_pb2

# Shows a prompt and waits for the user. The second argument makes the same prompt with a new
# challenge, for a security key that is about to be used.
AskUser: TypeAlias = Callable[
    [p.PromptOpened, Callable[[], Awaitable[p.PromptOpened]]], Awaitable[p.Answer | p.Decline]
]
_MAX_TEXT = 500


class TerminalPrompter:
    """A `Prompter`."""

    def __init__(self, ask_user: AskUser) -> None:
        self._ask_user = ask_user
        self._terminal = asyncio.Lock()
        self._browsers: dict[str, asyncio.Future[SignedIn]] = {}

    async def ask(self, question: MfaQuestion, renew: Renew) -> auth_pb2.MFAAuthenticateResponse:
        """See `Prompter`."""
        deadline = asyncio.get_running_loop().time() + question.seconds

        def left() -> float:
            return max(deadline - asyncio.get_running_loop().time(), 0.0)

        async def renewed() -> p.PromptOpened:
            try:
                return opened(await renew(), left())
            except TeleportError:
                return opened(question, left())  # the old challenge may still do

        browser = asyncio.get_running_loop().create_future()
        self._browsers[question.id] = browser
        try:
            async with asyncio.timeout_at(deadline), self._terminal:
                user = self._ask_user(opened(question, left()), renewed)
                answer = await _first(asyncio.ensure_future(user), browser)
        except TimeoutError as error:
            raise MfaUnansweredError(
                f"{question.target} needs a second factor and nobody gave it in time: connect again"
            ) from error
        finally:
            del self._browsers[question.id]
        if isinstance(answer, p.Decline):
            raise MfaUnansweredError(f"{question.target} needs a second factor, and none was given")
        if isinstance(answer, SignInFailedError):
            raise answer
        return mfa.response(answer) if isinstance(answer, p.Answer) else answer

    def give(self, question_id: str, outcome: SignedIn) -> None:
        """See `Prompter`."""
        browser = self._browsers.get(question_id)
        if browser is not None and not browser.done():
            browser.set_result(outcome)

    def settled(self, question_id: str, outcome: str) -> None:
        """See `Prompter`. What became of it the command tells itself."""


async def _first(
    user: asyncio.Future[p.Answer | p.Decline], browser: asyncio.Future[SignedIn]
) -> p.Answer | p.Decline | SignedIn:
    """Whichever answers first; the terminal is free when this returns."""
    try:
        both: set[asyncio.Future[Any]] = {user, browser}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return user.result() if user.done() else browser.result()
    finally:
        user.cancel()
        await asyncio.wait({user})


def opened(question: MfaQuestion, seconds_left: float) -> p.PromptOpened:
    """A question as the command line knows it."""
    return p.PromptOpened(
        id=question.id,
        target=safe_text(question.target, _MAX_TEXT),
        cluster=safe_text(question.cluster, _MAX_TEXT),
        user=safe_text(question.user, _MAX_TEXT),
        seconds_left=seconds_left,
        takes_code=question.takes_code,
        webauthn=question.webauthn,
        sso=question.sso,
        problem=safe_text(question.problem, _MAX_TEXT),
    )

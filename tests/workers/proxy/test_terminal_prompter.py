"""Second factors of a command: the terminal answers, or the browser does."""

import asyncio

import pytest

from ipc import prompts as p
from workers.proxy.teleport.errors import MfaUnansweredError, SignInFailedError
from workers.proxy.teleport.mfa import MfaQuestion
from workers.proxy.teleport.pb import auth_pb2
from workers.proxy.terminal_prompter import TerminalPrompter

SSO = p.SsoChallenge(redirect_url="https://idp.test/")
SIGNED_IN = auth_pb2.MFAAuthenticateResponse(SSO=auth_pb2.SSOResponse(token="t"))


def question(question_id="q1", seconds=30.0):
    return MfaQuestion(
        id=question_id,
        profile="teleport.demo.test",
        cluster="demo.test",
        target="app pg",
        user="alice",
        takes_code=True,
        webauthn=None,
        sso=SSO,
        seconds=seconds,
    )


class User:
    """Sees prompts, and types what `line` is set to."""

    def __init__(self):
        self.seen = []
        self.is_asked = asyncio.Event()
        self.line = asyncio.get_running_loop().create_future()

    async def ask(self, opened, _renewed):
        self.seen.append(opened)
        self.is_asked.set()
        try:
            return p.Answer(id=opened.id, code=await asyncio.shield(self.line))
        finally:
            self.is_asked.clear()


def play(scene):
    async def main():
        user = User()
        async with asyncio.timeout(20):
            await scene(user, TerminalPrompter(user.ask))

    asyncio.run(main())


def test_a_code_is_typed():
    async def scene(user, prompter):
        user.line.set_result("123456")
        assert (await prompter.ask(question(), None)).TOTP.Code == "123456"
        assert user.seen[0].sso == SSO
        prompter.give("q1", SIGNED_IN)  # too late, and harmless

    play(scene)


def test_the_browser_answers_and_leaves_the_terminal_to_the_next_prompt():
    async def scene(user, prompter):
        first = asyncio.create_task(prompter.ask(question(), None))
        second = asyncio.create_task(prompter.ask(question("q2"), None))
        await user.is_asked.wait()
        prompter.give("unknown", SIGNED_IN)
        prompter.give("q1", SIGNED_IN)
        prompter.give("q1", SIGNED_IN)
        assert await first == SIGNED_IN
        await user.is_asked.wait()
        assert [opened.id for opened in user.seen] == ["q1", "q2"]
        user.line.set_result("123456")
        assert (await second).TOTP.Code == "123456"

    play(scene)


def test_a_failure_in_the_browser_is_passed_on():
    async def scene(user, prompter):
        asked = asyncio.create_task(prompter.ask(question(), None))
        await user.is_asked.wait()
        prompter.give("q1", SignInFailedError("denied"))
        with pytest.raises(SignInFailedError, match="denied"):
            await asked

    play(scene)


def test_in_time_nobody_answers():
    async def scene(user, prompter):
        with pytest.raises(MfaUnansweredError, match="in time"):
            await prompter.ask(question(seconds=0.05), None)
        assert not user.is_asked.is_set()

    play(scene)

"""Second factors in the terminal of a command: what the user does, and what comes of it.

Codes that are typed in a real terminal are in test_cli_clusters.
"""

import asyncio
from typing import ClassVar

import msgspec
import pytest

from ipc.prompts import (
    Answer,
    Decline,
    PromptOpened,
    SsoChallenge,
    WebauthnAssertion,
    WebauthnChallenge,
)
from supervisor.cli import security_key, terminal_prompts
from supervisor.cli.line_input import Line
from supervisor.cli.security_key import KeyFailed, PinWanted, Signed, TouchWanted
from supervisor.cli.terminal_prompts import TerminalPrompts

ASSERTION = WebauthnAssertion(
    credential_id=b"id", client_data=b"{}", authenticator_data=b"data", signature=b"signature"
)


class FakeInput:
    """Lines that are typed when they are wanted; None is the end of input."""

    def __init__(self, put, lines):
        self._put = put
        self.lines = lines
        self.has_ended = False
        self.is_closed = False

    def want(self, *, is_secret):
        if self.lines:
            line = self.lines.pop(0)
            self.has_ended = line is None
            self._put(Line(line))

    def took(self, _line):
        pass

    def close(self):
        self.is_closed = True


class FakeKeys:
    """A key that does what the test says with the challenge it is offered."""

    behave = None
    offered: ClassVar[list] = []
    stopped = 0

    def __init__(self, challenge, tell):
        FakeKeys.offered.append(challenge)
        FakeKeys.behave(tell)

    def stop(self):
        FakeKeys.stopped += 1


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    monkeypatch.setattr(security_key, "SecurityKeys", FakeKeys)
    FakeKeys.behave, FakeKeys.offered, FakeKeys.stopped = lambda _tell: None, [], 0
    return FakeKeys


def challenge(text):
    return WebauthnChallenge(
        origin="https://proxy.test", rp_id="proxy.test", challenge=text, credential_ids=[b"id"]
    )


def prompt(text=None, *, takes_code=True):
    return PromptOpened(
        id="one",
        target="app pg",
        cluster="demo.test",
        user="alice",
        seconds_left=60,
        takes_code=takes_code,
        webauthn=challenge(text) if text else None,
    )


def answer(monkeypatch, opened, *lines, times=1):
    """What `ask` returns, the last time; `renew` makes a new challenge."""

    async def renew():
        return prompt(b"new", takes_code=opened.takes_code)

    async def main():
        monkeypatch.setattr(terminal_prompts, "LineInput", lambda put: FakeInput(put, list(lines)))
        prompts = TerminalPrompts()
        async with asyncio.timeout(5):
            for _ in range(times):
                found = await prompts.ask(opened, renew)
        assert prompts._input.is_closed
        return found

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["123 456"], Answer(id="one", code="123456")),
        (["n"], Decline(id="one")),
        ([""], Decline(id="one")),
        ([None], Decline(id="one")),
    ],
)
def test_a_line_is_the_answer(monkeypatch, capsys, lines, found):
    assert answer(monkeypatch, prompt(), *lines) == found
    shown = capsys.readouterr()
    assert "app pg in demo.test" in shown.err
    assert shown.out == ""


def test_the_end_of_input_is_remembered(monkeypatch):
    assert answer(monkeypatch, prompt(), None, times=2) == Decline(id="one")


def test_a_key_signs_the_newest_challenge(monkeypatch, keys):
    keys.behave = lambda tell: tell(Signed(ASSERTION))
    found = answer(monkeypatch, prompt(b"old"))
    assert found == Answer(id="one", webauthn=ASSERTION)
    assert [c.challenge for c in keys.offered] == [b"new"]
    assert keys.stopped == 1


def test_a_key_may_fail_and_want_a_pin_and_a_touch(monkeypatch, capsys, keys):
    pins = []

    def behave(tell):
        tell(KeyFailed("this security key is not registered"))
        tell(TouchWanted())

        def give(pin):
            pins.append(pin)
            tell(Signed(ASSERTION))

        tell(PinWanted(give))

    keys.behave = behave

    class Typist(FakeInput):
        """Types nothing but a PIN."""

        def want(self, *, is_secret):
            if is_secret:
                super().want(is_secret=True)

    async def renew():
        return prompt(b"new")

    async def main():
        monkeypatch.setattr(terminal_prompts, "LineInput", lambda put: Typist(put, ["1234"]))
        async with asyncio.timeout(5):
            return await TerminalPrompts().ask(prompt(b"old"), renew)

    assert asyncio.run(main()) == Answer(id="one", webauthn=ASSERTION)
    assert pins == ["1234"]
    shown = capsys.readouterr().err
    assert "not registered" in shown
    assert "touch your security key" in shown


def test_a_page_is_opened_and_the_line_left_when_the_browser_has_answered(monkeypatch, capsys):
    pages = []

    async def main():
        monkeypatch.setattr(terminal_prompts, "LineInput", lambda put: FakeInput(put, []))
        monkeypatch.setattr(terminal_prompts, "open_page", pages.append)
        sso = SsoChallenge(redirect_url="https://idp.test/")
        prompts = TerminalPrompts()
        opened = msgspec.structs.replace(prompt(), sso=sso)
        asked = asyncio.ensure_future(prompts.ask(opened, None))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait([asked])
        assert asked.cancelled()
        assert prompts._input.is_closed

    asyncio.run(main())
    assert pages == ["https://idp.test/"]
    shown = capsys.readouterr().err
    assert "open this address in your browser: https://idp.test/\n" in shown
    assert shown.endswith("decline): \n")


def test_a_code_may_be_typed_while_a_key_waits(monkeypatch, keys):
    assert answer(monkeypatch, prompt(b"old"), "123456") == Answer(id="one", code="123456")

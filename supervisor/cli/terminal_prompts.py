"""Asks for a second factor in the terminal of a command, by code or security key.

The same dialog as that of `vnet mfa` (`mfa_dialog`), for prompts of this process. What it says goes
to standard error: standard output is the command's.
"""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from ipc import prompts as p
from supervisor.cli import mfa_dialog as d
from supervisor.cli.browser import open_page
from supervisor.cli.dialog_keys import DialogKeys, FromKey
from supervisor.cli.line_input import Line, LineInput

# Makes the same prompt with a new challenge.
Renew: TypeAlias = Callable[[], Awaitable[p.PromptOpened]]
_SOURCE = 0


@dataclass(frozen=True, slots=True)
class _Renewed:
    opened: p.PromptOpened


_Event: TypeAlias = Line | _Renewed | FromKey


class TerminalPrompts:
    """Use `ask` for one prompt at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._input = LineInput(self._put)
        self._keys = DialogKeys(self._put)
        self._renewing: asyncio.Task[None] | None = None

    async def ask(self, opened: p.PromptOpened, renew: Renew) -> p.Answer | p.Decline:
        """The user's answer; who skips a prompt declines it."""
        dialog = d.Dialog()
        if self._input.has_ended:
            dialog.end_of_input()
        try:
            answer = self._perform(dialog.heard(_SOURCE, opened), renew)
            while answer is None and not dialog.is_done:
                answer = self._perform(self._take(dialog, await self._events.get()), renew)
            return answer or p.Decline(id=opened.id)
        except asyncio.CancelledError:
            _say("\n")  # the line in which an answer would be typed stays empty
            raise
        finally:
            self._keys.drop()
            self._input.close()
            if self._renewing is not None:
                self._renewing.cancel()

    def _take(self, dialog: d.Dialog, event: _Event) -> list[d.Command]:
        match event:
            case Line(text):
                if text is None:
                    return dialog.end_of_input()
                self._input.took(event)
                return dialog.line(text)
            case _Renewed(opened):
                return dialog.heard(_SOURCE, opened)
            case FromKey():
                return self._keys.take(dialog, event)

    def _perform(self, commands: list[d.Command], renew: Renew) -> p.Answer | p.Decline | None:
        """Carries out what the dialog wants; returns the answer, if it is there."""
        answer: p.Answer | p.Decline | None = None
        for command in commands:
            match command:
                case d.Say(text):
                    _say(f"{text}\n")
                case d.AskLine(text, is_secret):
                    # First: whoever sees the question may type at once.
                    self._input.want(is_secret=is_secret)
                    _say(text)
                case d.Send(_, message):
                    if isinstance(message, p.RenewChallenge):
                        self._renewing = self._loop.create_task(self._renew(renew))
                    else:
                        answer = message
                case d.UseKey(challenge):
                    self._keys.use(challenge)
                case d.DropKey():
                    self._keys.drop()
                case d.ShowPage(url):
                    open_page(url)
                case d.GivePin(pin):
                    self._keys.give_pin(pin)
                case _:
                    assert_never(command)
        return answer

    async def _renew(self, renew: Renew) -> None:
        self._events.put_nowait(_Renewed(await renew()))

    def _put(self, event: _Event) -> None:
        """Called in other threads."""
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)

"""What `vnet mfa` says and does: prompts, lines and keys in, commands out. Pure.

A page of single sign-on is only shown: its answer goes from the browser to the proxy.

One prompt is shown at a time, the oldest first, and the next one when its answer was judged: a new
challenge for a security key would make the cluster forget the one whose answer is on its way.

    WAITING --shown--> CURRENT --code, touch--> CHECKING --taken, or given up--> closed
                          |                        |
                          +--empty line--> SKIPPED +--not taken--> CURRENT

A prompt that somebody else answers, or whose time is up, closes from wherever it is.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from ipc import prompts as p

MAX_CODE = 64
MAX_TEXT = 500


@dataclass(frozen=True, slots=True)
class Say:
    """Print a line."""

    text: str


@dataclass(frozen=True, slots=True)
class AskLine:
    """Print without a line feed and read a line; `is_secret`: it must not be seen."""

    text: str
    is_secret: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """Tell the proxy at the other end of a connection."""

    source: int
    message: p.FromUser


@dataclass(frozen=True, slots=True)
class UseKey:
    """Offer the challenge to security keys, and no other any more."""

    challenge: p.WebauthnChallenge


@dataclass(frozen=True, slots=True)
class DropKey:
    """Security keys are not needed now."""


@dataclass(frozen=True, slots=True)
class ShowPage:
    """Have the user's browser open it, if there is one here. The user is told of it anyway."""

    url: str


@dataclass(frozen=True, slots=True)
class GivePin:
    """The line that was read is the PIN a key waits for."""

    pin: str


Command: TypeAlias = Say | AskLine | Send | UseKey | DropKey | ShowPage | GivePin


class _State(Enum):
    WAITING = auto()
    CURRENT = auto()
    CHECKING = auto()
    SKIPPED = auto()


@dataclass(slots=True)
class _Prompt:
    source: int
    opened: p.PromptOpened
    state: _State = _State.WAITING

    @property
    def wants_lines(self) -> bool:
        """Whether nobody can answer but who types."""
        return self.opened.webauthn is None and self.opened.sso is None


class Dialog:
    """A conversation with one user about the prompts of all proxies. `source` is a connection."""

    def __init__(self) -> None:
        self._prompts: dict[str, _Prompt] = {}
        self._listing: set[int] = set()
        self._has_shown = False
        self._wants_pin = False
        # Nothing is read while no more lines come.
        self._has_input = True

    @property
    def is_done(self) -> bool:
        """Whether everything that waited has been shown and answered, or skipped."""
        is_open = any(q.state is not _State.SKIPPED for q in self._prompts.values())
        return not self._listing and not is_open

    @property
    def has_shown(self) -> bool:
        """Whether there was any prompt."""
        return self._has_shown

    @property
    def unanswered(self) -> int:
        """How many prompts wait that were skipped."""
        return sum(q.state is _State.SKIPPED for q in self._prompts.values())

    @property
    def _current(self) -> _Prompt | None:
        return next((q for q in self._prompts.values() if q.state is _State.CURRENT), None)

    # -- connections --

    def connected(self, source: int) -> list[Command]:
        """A proxy is there; it will say what waits already."""
        self._listing.add(source)
        return []

    def gone(self, source: int) -> list[Command]:
        """The connection has ended; its prompts are no more."""
        self._listing.discard(source)
        commands: list[Command] = []
        for prompt_id in [i for i, q in self._prompts.items() if q.source == source]:
            prompt = self._prompts.pop(prompt_id)
            if prompt.state is not _State.SKIPPED:
                commands += self._interrupt(prompt)
                commands.append(Say(f"{_where(prompt)}: the proxy has ended, connect again"))
        return commands + self._take_up_next()

    def heard(self, source: int, message: p.FromProxy) -> list[Command]:
        """A proxy says something."""
        match message:
            case p.Waiting():
                self._listing.discard(source)
                return []
            case p.PromptOpened():
                return self._opened(source, message)
            case p.PromptAnswered():
                return self._answered(message)
            case p.PromptClosed():
                return self._closed(message)

    def _opened(self, source: int, opened: p.PromptOpened) -> list[Command]:
        prompt = self._prompts.get(opened.id)
        if prompt is None:
            self._prompts[opened.id] = _Prompt(source, opened)
            return self._take_up_next()
        prompt.opened = opened
        if prompt.state is _State.CURRENT:
            # The new challenge; the cluster has forgotten the one before.
            return [UseKey(opened.webauthn)] if opened.webauthn is not None else [DropKey()]
        if prompt.state is _State.CHECKING:
            prompt.state = _State.WAITING
        return self._take_up_next()

    def _answered(self, answered: p.PromptAnswered) -> list[Command]:
        prompt = self._prompts.get(answered.id)
        if prompt is None or prompt.state is _State.CHECKING:
            return []
        commands = self._interrupt(prompt)
        if prompt.state is _State.CURRENT:
            where = "in the browser" if answered.is_by_browser else "elsewhere"
            commands.append(Say(f"{_where(prompt)}: answered {where}"))
        prompt.state = _State.CHECKING
        return commands + self._take_up_next()

    def _closed(self, closed: p.PromptClosed) -> list[Command]:
        prompt = self._prompts.pop(closed.id, None)
        if prompt is None or prompt.state in (_State.WAITING, _State.SKIPPED):
            return []
        return [*self._interrupt(prompt), Say(_shown(closed.outcome)), *self._take_up_next()]

    def _interrupt(self, prompt: _Prompt) -> list[Command]:
        """Leaves the line in which an answer would be typed, if this is the current prompt."""
        if prompt.state is not _State.CURRENT:
            return []
        self._wants_pin = False
        return [DropKey(), Say("")]

    # -- the user --

    def line(self, text: str) -> list[Command]:
        """The user has typed a line."""
        prompt = self._current
        if prompt is None:
            return []  # what it was meant for has closed
        text = text.strip()
        if self._wants_pin:
            self._wants_pin = False
            return [GivePin(text), *self._ask(prompt)]
        if not text:
            return self._finish(prompt, _State.SKIPPED)
        if text.lower() == "n":
            return self._finish(prompt, _State.CHECKING, p.Decline(id=prompt.opened.id))
        code = "".join(text.split())
        if not prompt.opened.takes_code:
            return [Say("a code is not taken here"), *self._ask(prompt)]
        if len(code) > MAX_CODE or not code.isprintable():
            return [Say("that is no code"), *self._ask(prompt)]
        return self._finish(prompt, _State.CHECKING, p.Answer(id=prompt.opened.id, code=code))

    def end_of_input(self) -> list[Command]:
        """No line will come any more; keys and browsers may still answer."""
        self._has_input = False
        prompt = self._current
        if prompt is None or not prompt.wants_lines:
            return []
        return self._finish(prompt, _State.SKIPPED)

    # -- security keys --

    def signed(self, assertion: p.WebauthnAssertion) -> list[Command]:
        """A key has signed the current challenge."""
        prompt = self._current
        if prompt is None:
            return []
        answer = p.Answer(id=prompt.opened.id, webauthn=assertion)
        return [Say(""), *self._finish(prompt, _State.CHECKING, answer)]

    def touch_wanted(self) -> list[Command]:
        """A key blinks."""
        return self._aside("touch your security key")

    def key_failed(self, reason: str) -> list[Command]:
        """A key cannot sign; there may be others."""
        self._wants_pin = False
        return self._aside(reason)

    def pin_wanted(self) -> list[Command]:
        """A key wants its PIN."""
        if self._current is None or not self._has_input:
            return [GivePin("")]
        self._wants_pin = True
        return [Say(""), AskLine("PIN of the security key: ", is_secret=True)]

    def _aside(self, text: str) -> list[Command]:
        prompt = self._current
        return [] if prompt is None else [Say(""), Say(text), *self._ask(prompt)]

    # -- one after the other --

    def _take_up_next(self) -> list[Command]:
        prompts = self._prompts.values()
        if any(prompt.state in (_State.CURRENT, _State.CHECKING) for prompt in prompts):
            return []
        for prompt in prompts:
            if prompt.state is _State.WAITING:
                return self._take_up(prompt)
        return []

    def _take_up(self, prompt: _Prompt) -> list[Command]:
        opened = prompt.opened
        if not self._has_input and prompt.wants_lines:
            prompt.state = _State.SKIPPED
            self._has_shown = True
            return [Say(f"{_where(prompt)} waits for a code"), *self._take_up_next()]
        prompt.state = _State.CURRENT
        self._has_shown = True
        commands: list[Command] = []
        if opened.problem:
            commands.append(Say(f"{_where(prompt)}: not taken: {_shown(opened.problem)}"))
        else:
            commands.append(
                Say(
                    f"{_where(prompt)} waits for a second factor of {_shown(opened.user)},"
                    f" {opened.seconds_left:.0f} s are left"
                )
            )
        if opened.sso is not None:
            commands += _show(opened.sso)
        if opened.webauthn is not None:
            commands.append(Send(prompt.source, p.RenewChallenge(id=opened.id)))
        return commands + self._ask(prompt)

    def _ask(self, prompt: _Prompt) -> list[Command]:
        if not self._has_input:
            return []
        return [AskLine(f"{_ways(prompt)} (empty: later, n: decline): ")]

    def _finish(
        self, prompt: _Prompt, state: _State, message: p.FromUser | None = None
    ) -> list[Command]:
        commands: list[Command] = [DropKey()]
        prompt.state = state
        if message is not None:
            commands.append(Send(prompt.source, message))
        return commands + self._take_up_next()


def _show(sso: p.SsoChallenge) -> list[Command]:
    where = f" at {_shown(sso.provider)}" if sso.provider else ""
    return [
        # Whole, whatever its length: the characters of addresses are harmless.
        Say(f"to sign in{where}, open this address in your browser: {sso.redirect_url}"),
        ShowPage(sso.redirect_url),
    ]


def _ways(prompt: _Prompt) -> str:
    """In which ways the user can answer."""
    ways = ["security key"] if prompt.opened.webauthn is not None else []
    if prompt.opened.sso is not None:
        ways.append("browser")
    if prompt.opened.takes_code:
        ways.append("code")
    return ", or ".join([", ".join(ways[:-1]), ways[-1]]) if len(ways) > 1 else "".join(ways)


def _where(prompt: _Prompt) -> str:
    return _shown(f"{prompt.opened.target} in {prompt.opened.cluster}")


def _shown(text: str) -> str:
    """What a proxy says, as one line that does nothing to a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_TEXT]

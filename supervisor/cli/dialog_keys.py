"""The security keys that a dialog (`mfa_dialog`) asks, for one challenge at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ipc import prompts as p
from supervisor.cli import mfa_dialog as d

if TYPE_CHECKING:
    from supervisor.cli.security_key import KeyEvent, SecurityKeys


@dataclass(frozen=True, slots=True)
class FromKey:
    """What happened to a key. `number` tells for which challenge."""

    number: int
    event: "KeyEvent"


class DialogKeys:
    """All keys that are plugged in. `put` is called in other threads, for `take`."""

    def __init__(self, put: Callable[[FromKey], None]) -> None:
        self._put = put
        self._keys: SecurityKeys | None = None
        self._number = 0
        self._pin_answers: list[Callable[[str], None]] = []

    def use(self, challenge: p.WebauthnChallenge) -> None:
        """Asks the keys to answer this challenge, and no other any more."""
        from supervisor.cli.security_key import SecurityKeys  # noqa: PLC0415  # loads libraries

        self.drop()
        number = self._number
        self._keys = SecurityKeys(challenge, lambda event: self._put(FromKey(number, event)))

    def drop(self) -> None:
        """Asks for nothing any more."""
        self._number += 1
        self._pin_answers.clear()
        if self._keys is not None:
            self._keys.stop()
            self._keys = None

    def give_pin(self, pin: str) -> None:
        """Answers the keys that wait for a PIN."""
        for answer in self._pin_answers:
            answer(pin)
        self._pin_answers.clear()

    def take(self, dialog: d.Dialog, happened: FromKey) -> list[d.Command]:
        """Tells the dialog, unless it is too late for the challenge; what it wants done."""
        if happened.number != self._number:
            return []
        from supervisor.cli import security_key as k  # noqa: PLC0415  # loaded when a key is used

        match happened.event:
            case k.TouchWanted():
                return dialog.touch_wanted()
            case k.PinWanted(answer):
                self._pin_answers.append(answer)
                return dialog.pin_wanted()
            case k.Signed(assertion):
                return dialog.signed(assertion)
            case k.KeyFailed(reason):
                return dialog.key_failed(reason)

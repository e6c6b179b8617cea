"""How often one worker may have itself or others restarted by a message. Pure.

An honest worker accuses a peer only when that one is broken or hostile, and is silent after a while
(`ipc.order.MAX_ACCUSATIONS`). So a process that says more is not honest. What the processes of one slot
may do to others is limited far below that: a worker that is compromised again and again would
otherwise have its peers given up. A peer that is hostile itself is accused by several, and is given up
by their words together.
"""

from typing import Final

from ipc.order import ACCUSATION_SECONDS, MAX_ACCUSATIONS
from ipc.window import Window

# Accusations of one slot that are believed in ACCUSATION_SECONDS.
MAX_BELIEVED: Final = 5
# Wishes of one slot for a restart. The tsh home appears or is replaced once per login.
MAX_WISHES: Final = 3
WISH_SECONDS: Final = 60.0


class Patience:
    """With the present process of one slot, and with its slot as a whole."""

    def __init__(self, restart_max: int) -> None:
        """`restart_max` crashes are borne; by one accuser alone no peer has more."""
        self._believed = Window(_believed(restart_max), ACCUSATION_SECONDS)
        self._wishes = Window(MAX_WISHES, WISH_SECONDS)
        self.begin()

    def begin(self) -> None:
        """A process begins: it has said nothing yet."""
        # A shorter time than the workers have, for clocks and delays.
        self._said = Window(MAX_ACCUSATIONS, ACCUSATION_SECONDS / 2)

    def use_restart_max(self, restart_max: int) -> None:
        """From now on; what was believed in the past still counts."""
        self._believed.use_limit(_believed(restart_max))

    def for_successor(self) -> "Patience":
        """With another process of the same slot, beside the present one."""
        made = Patience(0)
        made._believed, made._wishes = self._believed, self._wishes
        return made

    def may_accuse(self, now: float) -> bool:
        """Whether an honest process would say this; if not it is to be ended as crashed."""
        return self._said.take(now)

    def believes(self, now: float) -> bool:
        """Whether the accused is to be restarted; asked after `may_accuse`, if there is one."""
        return self._believed.take(now)

    def grants_restart(self, now: float) -> bool:
        """Whether a wish for a restart is granted; if not the process is to be ended as crashed."""
        return self._wishes.take(now)


def _believed(restart_max: int) -> int:
    return max(1, min(MAX_BELIEVED, restart_max))

"""When a crashed worker is started again, and when it is given up. Pure.

Like the restart intensity of Erlang/OTP supervisors: at most `restart_max` restarts in
`window_seconds`. The wait before each grows with the number of crashes in the window and is
forgotten when the window is calm.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

# The first restart is nearly at once: connections wait for it.
FIRST_DELAY_SECONDS = 0.05
LONGEST_DELAY_SECONDS = 5.0
# Part of the delay that chance takes away, so that workers that fell together do not rise together.
JITTER = 0.25


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """`restart_max` and `restart_window_seconds` of the configuration."""

    restart_max: int
    window_seconds: float


class RestartPolicy:
    """The crash history of one worker slot."""

    def __init__(self, limits: RestartLimits, crashes: Iterable[float] = ()) -> None:
        """`crashes` are those of an earlier program, oldest first."""
        self.limits = limits
        self._crashes = deque(crashes)

    @property
    def crashes(self) -> list[float]:
        """When the crashes were that still count, monotonic seconds."""
        return list(self._crashes)

    def crashed(self, now: float, chance: float) -> float | None:
        """Seconds to wait before the restart, or None to give up.

        `now` is monotonic seconds, `chance` a random number in [0, 1).
        """
        while self._crashes and now - self._crashes[0] > self.limits.window_seconds:
            self._crashes.popleft()
        self._crashes.append(now)
        if len(self._crashes) > self.limits.restart_max:
            return None
        delay = FIRST_DELAY_SECONDS * 2.0 ** (len(self._crashes) - 1)
        return min(delay, LONGEST_DELAY_SECONDS) * (1.0 - JITTER * chance)

    def forget(self) -> None:
        """Begins a new history: someone has ordered a restart."""
        self._crashes.clear()

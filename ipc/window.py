"""How often something may happen. Pure."""

from collections import deque


class Window:
    """At most `limit` events in any `seconds`."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._seconds = seconds
        self._taken: deque[float] = deque(maxlen=limit)

    def take(self, now: float) -> bool:
        """Whether there is room for one more, which is then taken; `now` is monotonic seconds."""
        if len(self._taken) == self._taken.maxlen and now - self._taken[0] < self._seconds:
            return False
        self._taken.append(now)
        return True

    def use_limit(self, limit: int) -> None:
        """From now on; the latest events still count."""
        self._taken = deque(self._taken, maxlen=limit)

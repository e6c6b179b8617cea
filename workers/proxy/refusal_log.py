"""Log lines about refused connections: each is told at once, those that repeat it are counted. Pure.

    first of its kind --> told --> repetitions counted for `window_seconds` --> told as a number

A program that tries again and again, or a port scan, fills no disk: at most `max_kinds` different
lines are told per window, and the others together as one number.
"""

WINDOW_SECONDS = 30.0
MAX_KINDS = 200


class RefusalLog:
    """Times are monotonic seconds and never go back."""

    def __init__(self, window_seconds: float = WINDOW_SECONDS, max_kinds: int = MAX_KINDS) -> None:
        self._window_seconds = window_seconds
        self._max_kinds = max_kinds
        # Line -> when its window ends, and the repetitions; in the order of the ends.
        self._kinds: dict[str, tuple[float, int]] = {}
        self._others = 0
        self._others_until = 0.0

    def note(self, line: str, now: float) -> bool:
        """A connection was refused; whether the line is to be written now."""
        if (known := self._kinds.get(line)) is not None:
            self._kinds[line] = (known[0], known[1] + 1)
            return False
        if len(self._kinds) >= self._max_kinds:
            if not self._others:
                self._others_until = now + self._window_seconds
            self._others += 1
            return False
        self._kinds[line] = (now + self._window_seconds, 0)
        return True

    def due(self, now: float) -> list[str]:
        """Lines about what was counted in windows that are over."""
        lines = []
        for line, (until, repeated) in list(self._kinds.items()):
            if now < until:
                break
            del self._kinds[line]
            if repeated:
                lines.append(f"{line} ({_times(repeated)} more)")
        if self._others and now >= self._others_until:
            lines.append(f"other connections were refused {_times(self._others)}")
            self._others = 0
        return lines


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"

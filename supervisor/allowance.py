"""How much somebody may still say: a bucket that fills with time. Pure."""


class Allowance:
    """At most `burst` at once and `per_second` in the long run, in whatever unit."""

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        """`now` is monotonic seconds, here and below."""
        self._per_second = per_second
        self._burst = burst
        self._left = burst
        self._filled_at = now

    def spend(self, amount: float, now: float) -> bool:
        """Takes `amount`; False when there is not so much left, and then nothing is taken."""
        refill = (now - self._filled_at) * self._per_second
        self._left = min(self._burst, self._left + refill)
        self._filled_at = now
        if amount > self._left:
            return False
        self._left -= amount
        return True

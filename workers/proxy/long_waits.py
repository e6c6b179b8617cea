"""Who waits for a certificate for so long that a person is being waited for. Pure.

A second factor may take minutes, and every connection that waits for it occupies a place among the
held SYNs of the whole VNet. A burst of connections may wait together for a certificate that comes
at once; after `long_seconds` only the first few of each target may go on waiting.
"""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

M = TypeVar("M", bound=Hashable)

LONG_SECONDS = 3.0
# A browser or a connection pool has a few dozens.
MAX_PER_TARGET = 64
# Half of the held SYNs there may be (`supervisor.configure`), for all proxies together.
MAX_OF_ALL_PROXIES = 512


class LongWaits(Generic[M]):
    """Members of named targets. Times are monotonic seconds and never go back."""

    def __init__(
        self,
        *,
        max_total: int,
        max_per_target: int = MAX_PER_TARGET,
        long_seconds: float = LONG_SECONDS,
    ) -> None:
        self._max_total = max_total
        self._max_per_target = max_per_target
        self._long_seconds = long_seconds
        # Since when each waits, oldest first.
        self._waiting: dict[str, dict[M, float]] = {}

    def __len__(self) -> int:
        return sum(len(members) for members in self._waiting.values())

    def enter(self, target: str, member: M, now: float) -> bool:
        """Whether one more may wait for this target; then it does, until `leave`."""
        total = of_target = 0
        for name, members in self._waiting.items():
            number = sum(1 for _ in self._long(members, now))
            total += number
            of_target += number if name == target else 0
        if of_target >= self._max_per_target or total >= self._max_total:
            return False
        self._waiting.setdefault(target, {})[member] = now
        return True

    def leave(self, target: str, member: M) -> None:
        """It waits no longer, if it did."""
        members = self._waiting.get(target, {})
        members.pop(member, None)
        if not members:
            self._waiting.pop(target, None)

    def surplus(self, now: float) -> list[M]:
        """Those who have waited long and are too many; the caller lets each of them leave."""
        surplus: list[M] = []
        total = 0
        for members in self._waiting.values():
            long = list(self._long(members, now))
            allowed = max(0, min(self._max_per_target, self._max_total - total))
            surplus += long[allowed:]
            total += min(len(long), allowed)
        return surplus

    def _long(self, members: dict[M, float], now: float) -> Iterator[M]:
        for member, since in members.items():
            if now - since < self._long_seconds:
                return
            yield member

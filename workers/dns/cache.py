"""A bounded table whose entries expire. Pure.

Rule for "full": the entry that was put in first goes. Expired entries go when they are met or when
their turn comes; nothing sweeps.
"""

from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class ExpiringCache(Generic[K, V]):
    """At most `limit` entries; times are monotonic seconds."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: dict[K, tuple[float, V]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K, now: float) -> V | None:
        """The value, or None when there is none that is still valid at `now`."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] <= now:
            del self._entries[key]
            return None
        return entry[1]

    def put(self, key: K, value: V, expires: float) -> None:
        """Stores until `expires`, instead of what was there."""
        entries = self._entries
        entries.pop(key, None)
        while len(entries) >= self._limit:
            del entries[next(iter(entries))]
        entries[key] = (expires, value)

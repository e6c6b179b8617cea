"""Answers of a cluster, remembered for a while, also that there is nothing."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

from workers.proxy.teleport.errors import TeleportError
from workers.proxy.teleport.single_flight import SingleFlight

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# Who decides about a connection wants to know of what came into being a moment ago.
FRESH_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Kept(Generic[V]):
    """An answer; None for nothing."""

    value: V | None
    asked_at: float


class Remembered(Generic[K, V]):
    """One answer per key. Times in seconds.

    When the cluster cannot be asked, or takes longer than `patience_seconds`, the last answer
    counts, for `retry_seconds` without being asked again; the question goes on in the background.
    At most `max_names` are remembered; the one not used for longest is forgotten.
    """

    def __init__(
        self,
        ask: Callable[[K], Awaitable[V | None]],
        *,
        clock: Callable[[], float],
        positive_seconds: float,
        negative_seconds: float,
        patience_seconds: float,
        retry_seconds: float = 5.0,
        max_names: int = 10_000,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._positive_seconds = positive_seconds
        self._negative_seconds = negative_seconds
        self._patience_seconds = patience_seconds
        self._retry_seconds = retry_seconds
        self._max_names = max_names
        self._kept = OrderedDict[K, Kept[V]]()
        self._retry_at: dict[K, float] = {}
        self._flight = SingleFlight[K, V | None]()

    def current(self, key: K, *, fresh: bool = False) -> Kept[V] | None:
        """The answer, if it is young enough to be used. `fresh`: as in `get`."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._kept.move_to_end(key)
        now = self._clock()
        if now < kept.asked_at + self._seconds(kept, fresh=fresh):
            return kept
        return kept if not fresh and now < self._retry_at.get(key, -inf) else None

    def _seconds(self, kept: Kept[V], *, fresh: bool) -> float:
        if kept.value is not None:
            return self._positive_seconds
        return min(FRESH_SECONDS, self._negative_seconds) if fresh else self._negative_seconds

    async def get(self, key: K, *, fresh: bool = False) -> V | None:
        """The answer. With `fresh` a negative one older than FRESH_SECONDS is asked again.

        Raises:
            TeleportError: the cluster cannot be asked and never was asked for this key.
        """
        current = self.current(key, fresh=fresh)
        if current is not None:
            return current.value
        old = self._kept.get(key)
        if old is None:
            return await self._flight.run(key, lambda: self._fetch(key))
        try:
            async with asyncio.timeout(self._patience_seconds):
                return await self._flight.run(key, lambda: self._fetch(key))
        except (TeleportError, TimeoutError):
            self._retry_at[key] = self._clock() + self._retry_seconds
            return old.value

    async def find(self, key: K, typed: K, *, fresh: bool = False) -> V | None:
        """As `get`, for a normalised key; the cluster is asked for `typed`, its spelling by the user.

        What has capitals is found by its own spelling alone, and from then on by every other: see
        `keep_normalised`.
        """
        found = self.current(key, fresh=fresh)
        if found is not None and (found.value is not None or typed == key):
            return found.value
        return await self.get(typed, fresh=fresh)

    async def _fetch(self, key: K) -> V | None:
        value = await self._ask(key)
        self.keep(key, value)
        return value

    def keep(self, key: K, value: V | None) -> None:
        """Takes an answer that came another way."""
        self._kept[key] = Kept(value, self._clock())
        self._kept.move_to_end(key)
        self._retry_at.pop(key, None)
        while len(self._kept) > self._max_names:
            oldest, _ = self._kept.popitem(last=False)
            self._retry_at.pop(oldest, None)

    def keep_normalised(self, key: K, value: V | None) -> None:
        """Takes the answer to a question for another spelling, which asked for this one as well."""
        if value is not None or key not in self._kept:
            self.keep(key, value)

    def last_known(self, key: K) -> V | None:
        """The last answer, however old; None also when there was none."""
        kept = self._kept.get(key)
        return kept.value if kept is not None else None

    def expire(self) -> None:
        """Lets every key be asked again; the old answers still serve when that fails."""
        self._kept = OrderedDict((k, Kept(v.value, -inf)) for k, v in self._kept.items())
        self._retry_at.clear()

    async def close(self) -> None:
        """Ends the questions under way."""
        await self._flight.close()

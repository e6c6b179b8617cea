"""Counts the certificates that clusters have issued for sessions, and those that were not got. Pure."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["app", "database", "ssh"]


class IssueTally:
    """Writes `certificates_<kind>_issued` and `_failed` into `counters`, which belongs to the caller."""

    def __init__(self, counters: dict[str, int] | None = None) -> None:
        self.counters = {} if counters is None else counters

    @contextmanager
    def counting(self, kind: Kind) -> Iterator[None]:
        """The block gets one certificate, or raises; one that is cancelled is not counted."""
        try:
            yield
        except Exception:
            self._count(kind, "failed")
            raise
        self._count(kind, "issued")

    def _count(self, kind: Kind, result: str) -> None:
        name = f"certificates_{kind}_{result}"
        self.counters[name] = self.counters.get(name, 0) + 1

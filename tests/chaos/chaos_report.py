"""The aims, and the one line that a run prints. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Aim:
    """A bound that a figure must not pass. A run that misses a hard one has failed."""

    name: str
    value: float | None
    most: float
    is_hard: bool

    @property
    def is_met(self) -> bool:
        """A figure that could not be taken (None) meets nothing."""
        return self.value is not None and self.value <= self.most

    def as_json(self) -> dict[str, Any]:
        value = None if self.value is None else round(self.value, 3)
        sort = "hard" if self.is_hard else "soft"
        return {
            "name": self.name,
            "value": value,
            "most": self.most,
            "sort": sort,
            "met": self.is_met,
        }


@dataclass(slots=True)
class Times:
    """Seconds that something took, each time it was waited for; None when it never came."""

    found: list[float | None] = field(default_factory=list)

    def add(self, seconds: float | None) -> None:
        self.found.append(seconds)

    def percentile(self, percent: float) -> float | None:
        """Nearest rank; None when it falls on one that never came, or there is none at all."""
        if not self.found:
            return None
        ordered = sorted(self.found, key=lambda value: float("inf") if value is None else value)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    def as_json(self) -> dict[str, Any]:
        return {
            "count": len(self.found),
            "p50": _rounded(self.percentile(50)),
            "p99": _rounded(self.percentile(99)),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def missed(aims: Iterable[Aim]) -> list[Aim]:
    """The hard aims that are not met."""
    return [aim for aim in aims if aim.is_hard and not aim.is_met]


def table(aims: Sequence[Aim]) -> str:
    """The aims as aligned text."""
    rows = [
        (
            aim.name,
            "-" if aim.value is None else f"{aim.value:.3g}",
            f"at most {aim.most:g}",
            "met" if aim.is_met else ("MISSED" if aim.is_hard else "not met"),
        )
        for aim in aims
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

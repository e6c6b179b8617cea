"""Figures, the aims some of them have, and the table. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any


class Compare(Enum):
    """What an aim looks at: VNet's figure itself, or its relation to the baseline."""

    VALUE = ""
    RATIO = " of baseline"
    EXCESS = " above baseline"


@dataclass(frozen=True, slots=True)
class Aim:
    """A bound: at least `least`, or at most `most`, of what `compare` says."""

    compare: Compare
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        sign, bound = ("\u2265", self.least) if self.least is not None else ("\u2264", self.most)
        return f"{sign} {bound:g}{self.compare.value}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured thing. `baseline` is the same without VNet, from the same run."""

    name: str
    unit: str
    value: float
    baseline: float | None = None
    baseline_is: str = ""
    aim: Aim | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the aim is met; None without one."""
        if self.aim is None:
            return None
        reached = self._compared(self.aim.compare)
        if self.aim.least is not None:
            return reached >= self.aim.least
        assert self.aim.most is not None
        return reached <= self.aim.most

    def _compared(self, compare: Compare) -> float:
        if compare is Compare.VALUE:
            return self.value
        assert self.baseline is not None
        return (
            self.value / self.baseline if compare is Compare.RATIO else self.value - self.baseline
        )

    def as_json(self) -> dict[str, Any]:
        """The figure with everything that is known about it."""
        found: dict[str, Any] = {"name": self.name, "unit": self.unit, "value": _short(self.value)}
        if self.baseline is not None:
            found |= {"baseline": _short(self.baseline), "baseline_is": self.baseline_is}
            if self.baseline:
                found["ratio"] = round(self.value / self.baseline, 3)
        if self.aim is not None:
            found |= {"aim": str(self.aim), "met": self.is_met}
        return found


def table(figures: Iterable[Figure]) -> str:
    """The figures as aligned text, one line each."""
    rows = [("figure", "unit", "VNet", "baseline", "ratio", "aim", "")]
    rows += [_row(figure) for figure in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column in {2, 4} else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(figure: Figure) -> tuple[str, str, str, str, str, str, str]:
    baseline = ratio = ""
    if figure.baseline is not None:
        baseline = f"{_short(figure.baseline):g} {figure.baseline_is}"
        ratio = f"{figure.value / figure.baseline:.2f}" if figure.baseline else ""
    aim = "" if figure.aim is None else str(figure.aim)
    met = {None: "", True: "met", False: "NOT MET"}[figure.is_met]
    value = f"{_short(figure.value):g}"
    return (figure.name, figure.unit, value, baseline, ratio, aim, met)


def _short(value: float) -> float:
    """Three digits are more than the noise leaves."""
    return round(value, 1) if abs(value) >= 100 else round(value, 2 if abs(value) >= 1 else 3)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each key over the rounds that have it."""
    keys = dict.fromkeys(key for found in rounds for key in found)
    return {key: median([found[key] for found in rounds if key in found]) for key in keys}

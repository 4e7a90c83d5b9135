"""Bars in tables and beside blocks: from 0 to the right, or to both sides where a value is below 0."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class BarScale:
    """What the whole length of a bar stands for; what is below 0 or above `usual` has another colour."""

    low: float
    high: float
    usual: float

    @classmethod
    def of(cls, values: Iterable[float | None], usual: float | None = 1.0) -> BarScale:
        """From 0 to the largest, but at least to `usual`; with 0 in the middle where one is below it.

        None: the largest is usual.
        """
        known = [value for value in values if value is not None]
        reach = max((usual or 0.0, *map(abs, known))) or 1.0
        return cls(-reach if min(known, default=0.0) < 0 else 0.0, reach, usual or reach)

    @property
    def is_both_ways(self) -> bool:
        """Whether 0 is in the middle."""
        return self.low < 0

    def is_unusual(self, value: float | None) -> bool:
        """Whether a value is below 0, or more than is usual."""
        return value is not None and not 0 <= value <= self.usual

    def bar(self, value: float | None) -> tuple[float, float]:
        """Where the bar of a value begins and how long it is, from 0 to 1."""
        shown = 0.0 if value is None else value
        begins = self._share(min(0.0, shown))
        return begins, self._share(max(0.0, shown)) - begins

    def _share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

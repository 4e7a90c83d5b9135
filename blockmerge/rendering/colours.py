"""The colours of heat maps: how far a value is from the best, as a step of one scale."""

from __future__ import annotations

from collections.abc import Iterable


def span_of(values: Iterable[float | None]) -> tuple[float, float]:
    """The lowest and the highest of the values there are."""
    numbers = [value for value in values if value is not None]
    return min(numbers, default=0.0), max(numbers, default=0.0)


def warmth(value: float, span: tuple[float, float]) -> float:
    """Where `value` lies in a span, from 0 (the lowest) to 1 (the highest); 1 where all are the same."""
    low, high = span
    return 1.0 if high <= low else (value - low) / (high - low)


def rgb(warm: float) -> tuple[int, int, int]:
    """A colour from deep blue (0) to amber (1), on which both light and dark text can be read."""
    cold, hot = (49, 84, 156), (224, 152, 40)
    red, green, blue = (round(one + (other - one) * warm) for one, other in zip(cold, hot, strict=True))
    return red, green, blue

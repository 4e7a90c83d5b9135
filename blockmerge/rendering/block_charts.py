"""Curves over the blocks of a model, as the lines and bars of a small chart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from blockmerge.rendering.heat_tables import Label

STYLES = 6  # of lines that can be told apart
_WIDTH, _HEIGHT = 820, 160  # pixels of the whole scale, where its steps are as wide as these allow
_STEPS = 18, 34
_LETTER = 6.8  # pixels of one, at the size of the chart's
_TOP = 10


@dataclass(frozen=True)
class Curve:
    """A model's values by block, None where there is none; `style` is 0 for those drawn in grey, without
    points.
    """

    label: Label
    values: Sequence[float | None]
    style: int


@dataclass(frozen=True)
class Tick:
    """A line across the chart."""

    y: float
    text: str
    is_zero: bool


class BlockChart:
    """Draws `curves` {model: {block: value}}: the first six in colours, all others in grey below them.

    One curve is drawn as bars where 0 is on the scale. `holds` are values that the scale always shows.
    """

    def __init__(
        self,
        blocks: Sequence[str],
        curves: Sequence[tuple[Label, Mapping[str, float | None]]],
        holds: Sequence[float] = (),
    ) -> None:
        self.blocks = list(blocks)
        self.curves = [
            Curve(label, [values.get(block) for block in self.blocks], place if place <= STYLES else 0)
            for place, (label, values) in enumerate(curves, 1)
        ]
        known = [value for curve in self.curves for value in curve.values if value is not None]
        self.scale = _scale_of([*known, *holds])

    @property
    def has_bars(self) -> bool:
        """Whether there is one curve, over a scale with 0."""
        return len(self.curves) == 1 and self.scale[0] <= 0 <= self.scale[-1]

    @cached_property
    def left(self) -> float:
        """Where the first block's place begins."""
        return 8 + _LETTER * max(len(tick.text) for tick in self.ticks)

    @property
    def step(self) -> float:
        """From block to block."""
        least, most = _STEPS
        return round(min(most, max(least, _WIDTH / max(1, len(self.blocks)))), 1)

    @property
    def width(self) -> float:
        """In pixels."""
        return round(self.left + self.step * len(self.blocks) + 4, 1)

    @property
    def bottom(self) -> float:
        """Where the scale ends."""
        return _TOP + _HEIGHT

    @property
    def height(self) -> float:
        """In pixels, with the blocks' names."""
        return round(self.bottom + 10 + _LETTER * max(map(len, self.blocks), default=0), 1)

    @cached_property
    def ticks(self) -> list[Tick]:
        """The lines of the scale."""
        digits = max(0, -math.floor(math.log10(self.scale[1] - self.scale[0]) + 1e-9))
        return [
            Tick(self.y(value), f"{round(value, digits) + 0.0:.{digits}f}", abs(value) < 1e-9)
            for value in self.scale
        ]

    @property
    def borders(self) -> list[float]:
        """Where blocks with other letters begin."""
        groups = [
            len(list(some)) for _, some in groupby(self.blocks, lambda block: block.rstrip("0123456789"))
        ]
        places = [sum(groups[:count]) for count in range(1, len(groups))]
        return [round(self.left + self.step * place, 1) for place in places]

    def x(self, place: int) -> float:
        """The middle of a block."""
        return round(self.left + self.step * (place + 0.5), 1)

    def y(self, value: float) -> float:
        """Where a value stands."""
        low, high = self.scale[0], self.scale[-1]
        return round(self.bottom - _HEIGHT * (value - low) / (high - low), 1)

    def line(self, curve: Curve) -> str:
        """A path through a curve's points, broken where there is no value."""
        return " ".join(
            f"{'M' if place == 0 or curve.values[place - 1] is None else 'L'}{self.x(place)} {self.y(value)}"
            for place, value in enumerate(curve.values)
            if value is not None
        )

    def points(self, curve: Curve) -> Iterator[tuple[float, float, str, float]]:
        """(x, y, block, value) of a curve's points."""
        for place, (block, value) in enumerate(zip(self.blocks, curve.values, strict=True)):
            if value is not None:
                yield self.x(place), self.y(value), block, value


def _scale_of(values: Sequence[float], about: int = 4) -> list[float]:
    """From below the lowest to above the highest, in steps of 1, 2 or 5 times a power of ten."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-6:
        low, high = low - 5e-7, high + 5e-7
    least = (high - low) / about
    power = 10.0 ** math.floor(math.log10(least))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]

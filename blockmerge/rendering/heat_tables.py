"""Tables of similarities in colours, of any number of columns: wide ones scroll, and are printed in bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from blockmerge.rendering.colours import span_of, warmth
from blockmerge.rendering.short_names import short_names

_MANY = 8  # columns that have room for all digits
_DIGIT, _LETTER = 0.64, 0.66  # widths in em, of the widest of common fonts
# of A4 or Letter on its side, in letters that can still be read: em across, and rows down
_PAPER = 126, 30


@dataclass(frozen=True)
class Label:
    """What stands beside a row or above a column: a short name, the whole one, and a number for its place."""

    short: str
    whole: str
    number: int | None = None


def labels_of(names: Sequence[str]) -> list[Label]:
    """Models, numbered in their order."""
    return [
        Label(short, name, number)
        for number, (short, name) in enumerate(zip(short_names(names), names, strict=True), 1)
    ]


@dataclass(frozen=True)
class HeatTable:
    """Values of `rows` × `columns`, None where there is none; `tree` are lines above the columns, which count
    from 0, from 0 (the leaves) to 1.

    A `square` table has the same models along both sides: its diagonal says nothing, and has no colour.
    """

    rows: Sequence[Label]
    columns: Sequence[Label]
    values: Sequence[Sequence[float | None]]
    method: str
    square: bool = False
    tree: Sequence[str] = ()

    @cached_property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest value, without the diagonal of a square table."""
        return span_of(
            value
            for row, values in enumerate(self.values)
            for column, value in enumerate(values)
            if not self.is_diagonal(row, column)
        )

    @cached_property
    def digits(self) -> int:
        """Decimals: all of them where there are few columns, else those that tell a hundredth of the span."""
        low, high = self.span
        least, most = (1, 2) if self.method == "attention" else (3, 6)
        if len(self.columns) <= _MANY or high <= low:
            return most
        return min(most, max(least, 2 + math.ceil(-math.log10(high - low))))

    @property
    def has_scale(self) -> bool:
        """Whether there are two colours to tell apart."""
        return self.span[1] > self.span[0]

    def is_diagonal(self, row: int, column: int) -> bool:
        """Whether a model stands beside itself."""
        return self.square and row == column

    def text(self, value: float) -> str:
        """A value with as many decimals as the table has."""
        return f"{round(value, self.digits) + 0.0:.{self.digits}f}"  # -0.0 + 0.0 is 0.0

    def warmth(self, value: float) -> str:
        """Where a value lies between the lowest and the highest."""
        return f"{warmth(value, self.span):.3f}"

    @cached_property
    def cell_width(self) -> float:
        """The width of a column in em."""
        texts = (
            self.text(value)
            for row, values in enumerate(self.values)
            for column, value in enumerate(values)
            if value is not None and not self.is_diagonal(row, column)
        )
        return round(_DIGIT * max(map(len, texts), default=1) + 0.9, 2)

    @cached_property
    def name_width(self) -> float:
        """The width of the first column in em."""
        longest = max((len(one.short) for one in self.rows), default=1)
        return round(min(19.0, _LETTER * longest + (3.0 if self.square else 1.0)), 2)

    @cached_property
    def pages(self) -> list[tuple[range, range]]:
        """The (rows, columns) that are printed on each page."""
        width, rows = _PAPER
        columns = max(1, int((width - self.name_width) / self.cell_width))
        return [
            (down, across)
            for across in _bands(len(self.columns), columns)
            for down in _bands(len(self.rows), rows)
        ]


def _bands(count: int, most: int) -> list[range]:
    """As few bands of about the same width as hold no more than `most` each."""
    width = math.ceil(count / max(1, math.ceil(count / most)))
    return [range(start, min(start + width, count)) for start in range(0, count, width or 1)]

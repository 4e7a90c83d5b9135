"""The U: inputs down the left, outputs up the right, the middle at the bottom, a bar for each weight; or rows
of ten where the blocks have no arms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from blockmerge.anatomy import OUTSIDE, Arms
from blockmerge.rendering.block_rows import TEN, Row, arms_of, rows_of

_BAR = 12
_CELL = 13 + _BAR  # a block's name, its weight and its bar
_WIDTH = 56  # of the U; narrower terminals get the blocks one below another
_NAME = 5  # columns of a block's name
_SMALL_CELL = 7  # of a weight in a row, and its bar of one character
_LEVELS, _ASCII_LEVELS, _ASCII_CURVE = " ▁▂▃▄▅▆▇█", " .:-=+*%#", "_.:-=+*#"


class WeightsU:
    """Draws the weights of a U-Net's blocks; of blocks without arms, those of the same letters in rows.

    None is a block without a weight: `unknown` says what that means.
    """

    def __init__(self, weights: Mapping[str, float | None], unknown: str = "skip") -> None:
        self.weights = weights
        self.unknown = unknown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line of text per level of the U, per block where the terminal is too narrow for two, or per ten
        blocks of the same letters.
        """
        bars, levels = ("#.", _ASCII_LEVELS) if options.ascii_only else ("█░", _LEVELS)
        arms = arms_of(self.weights)
        if arms is None:
            lines = self._rows(bars, levels, options.max_width)
        elif options.max_width < _WIDTH:
            lines = (self._cell(block, bars) for block in self.weights)
        else:
            lines = self._arms(arms, bars)
        yield from (_whole(line) if line else line for line in lines)

    def _arms(self, arms: Arms, bars: str) -> Iterator[Text]:
        yield from (self._cell(OUTSIDE, bars), Text())
        for block, opposite in zip_longest(arms.left, reversed(arms.right)):
            left = self._cell(block, bars) if block else Text(" " * _CELL)
            right = self._cell(opposite, bars) if opposite else ""
            yield Text.assemble(left, "    ", right)
        yield from (Text.assemble(" " * 14, self._cell(block, bars)) for block in arms.middle)

    def _rows(self, bars: str, levels: str, width: int) -> Iterator[Text]:
        label = max(map(len, self.weights), default=0)
        label = max(_NAME, label)
        fitting = (count for count in (TEN, 5, 2) if 3 + label + count * _SMALL_CELL <= width)
        for row in rows_of(self.weights, next(fitting, 1)):
            yield self._row(row, levels, label) if row.is_numbered else self._cell(row.label, bars, label)

    def _row(self, row: Row, levels: str, label: int) -> Text:
        cells = (self._small_cell(block, levels) for block in row.blocks)
        return Text.assemble((f"{row.label:<{label}} ", "bold"), *cells)

    def _small_cell(self, block: str | None, levels: str) -> tuple[str, str]:
        weight = None if block is None else self.weights[block]
        if block is None or weight is None:
            return f"{'' if block is None else self.unknown:>6} ", "dim"
        level = levels[_filled(weight, len(levels) - 1)]
        return f"{self._said(block, weight):>6}{level}", _style(weight)

    def _cell(self, block: str, bars: str, label: int = _NAME) -> Text:
        full, empty = bars[0], bars[1]
        weight = self.weights[block]
        name = (f"{block:<{label}} ", "bold")
        if weight is None:
            return Text.assemble(name, (f"{self.unknown:>6} ", "dim"), ("-" * _BAR, "dim"))
        filled, style = _filled(weight, _BAR), _style(weight)
        return Text.assemble(
            name,
            (f"{self._said(block, weight):>6} ", style),
            (full * filled, style),
            (empty * (_BAR - filled), "dim"),
        )

    def _said(self, block: str, weight: float) -> str:
        return number(weight)


class Curve:
    """Draws the weights of a U-Net's blocks as one line: OUTSIDE apart, then from the first input to the last
    output; a cross is a block that is left out.
    """

    def __init__(self, weights: Mapping[str, float | None]) -> None:
        self.weights = weights

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One character for each block."""
        levels = _ASCII_CURVE if options.ascii_only else _LEVELS[1:]
        yield self._line(levels)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """It is never broken."""
        width = len(self._line(_ASCII_CURVE))
        return Measurement(width, width)

    def _line(self, levels: str) -> Text:
        line = Text(no_wrap=True)
        for block, weight in self.weights.items():
            level = "x" if weight is None else levels[_filled(weight, len(levels) - 1)]
            line.append(level, "dim" if weight is None else _style(weight))
            line.append(" " if block == OUTSIDE else "")
        return line


class SharesU(WeightsU):
    """Draws the shares of blocks in something, in percent, with bars beside the largest; None is unknown."""

    def __init__(self, shares: Mapping[str, float | None]) -> None:
        largest = max((share for share in shares.values() if share is not None), default=0.0) or 1.0
        super().__init__({block: share and share / largest for block, share in shares.items()}, unknown="?")
        self.shares = shares

    def _said(self, block: str, weight: float) -> str:
        return f"{self.shares[block] or 0.0:.1%}"


def _filled(weight: float, length: int) -> int:
    """How much of a bar of that length a weight fills."""
    filled = round(min(1.0, max(0.0, weight)) * length)
    # A block that takes a little must not look like one that takes nothing.
    return min(length - 1, max(1, filled)) if 0 < weight < 1 else filled


def _style(weight: float) -> str:
    return "dim" if weight == 0 else "cyan" if 0 < weight <= 1 else "yellow"


def _whole(line: Text) -> Text:
    return Text.assemble("  ", line, no_wrap=True, overflow="crop")


def number(weight: float) -> str:
    """A weight in at most six characters where that is possible."""
    if abs(weight) >= 100:
        return f"{weight:.3g}"
    return f"{round(weight, 3) + 0.0:.3f}".rstrip("0").rstrip(".")  # -0.0 + 0.0 is 0.0

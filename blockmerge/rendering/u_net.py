"""The U: inputs down the left, outputs up the right, the middle at the bottom, a bar for each weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from blockmerge.anatomy import FAMILIES, OUTSIDE, Arms

_BAR = 12
_CELL = 13 + _BAR  # a block's name, its weight and its bar
_WIDTH = 56  # of the U; narrower terminals get the blocks one below another


class WeightsU:
    """Draws the weights of a U-Net's blocks, or lists those that no family has.

    None is a block without a weight: `unknown` says what that means.
    """

    def __init__(self, weights: Mapping[str, float | None], unknown: str = "skip") -> None:
        self.weights = weights
        self.unknown = unknown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line of text per level of the U, or per block where the terminal is too narrow for two."""
        full, empty = "#." if options.ascii_only else "█░"
        arms = arms_of(self.weights)
        if arms is None or options.max_width < _WIDTH:
            yield from (_whole(self._cell(block, full, empty)) for block in self.weights)
            return
        lines = [self._cell(OUTSIDE, full, empty), Text()]
        for block, opposite in zip_longest(arms.left, reversed(arms.right)):
            left = self._cell(block, full, empty) if block else Text(" " * _CELL)
            right = self._cell(opposite, full, empty) if opposite else ""
            lines.append(Text.assemble(left, "    ", right))
        lines += [Text.assemble(" " * 14, self._cell(block, full, empty)) for block in arms.middle]
        yield from (_whole(line) if line else line for line in lines)

    def _cell(self, block: str, full: str, empty: str) -> Text:
        weight = self.weights[block]
        if weight is None:
            return Text.assemble(
                (f"{block:<5} ", "bold"), (f"{self.unknown:>6} ", "dim"), ("-" * _BAR, "dim")
            )
        filled = round(min(1.0, max(0.0, weight)) * _BAR)
        if 0 < weight < 1:  # a block that takes a little must not look like one that takes nothing
            filled = min(_BAR - 1, max(1, filled))
        style = "dim" if weight == 0 else "cyan" if 0 < weight <= 1 else "yellow"
        return Text.assemble(
            (f"{block:<5} ", "bold"),
            (f"{self._said(block, weight):>6} ", style),
            (full * filled, style),
            (empty * (_BAR - filled), "dim"),
        )

    def _said(self, block: str, weight: float) -> str:
        return number(weight)


class SharesU(WeightsU):
    """Draws the shares of blocks in something, in percent, with bars beside the largest; None is unknown."""

    def __init__(self, shares: Mapping[str, float | None]) -> None:
        largest = max((share for share in shares.values() if share is not None), default=0.0) or 1.0
        super().__init__({block: share and share / largest for block, share in shares.items()}, unknown="?")
        self.shares = shares

    def _said(self, block: str, weight: float) -> str:
        return f"{self.shares[block] or 0.0:.1%}"


def arms_of(blocks: Iterable[str]) -> Arms | None:
    """How these blocks are drawn, or None where no family has just these, in two arms."""
    wanted = set(blocks)
    drawn = (family.arms for family in FAMILIES.values() if family.arms is not None)
    return next((a for a in drawn if {OUTSIDE, *a.left, *a.middle, *a.right} == wanted), None)


def _whole(line: Text) -> Text:
    return Text.assemble("  ", line, no_wrap=True, overflow="crop")


def number(weight: float) -> str:
    """A weight in at most six characters where that is possible."""
    if abs(weight) >= 100:
        return f"{weight:.3g}"
    return f"{round(weight, 3) + 0.0:.3f}".rstrip("0").rstrip(".")  # -0.0 + 0.0 is 0.0

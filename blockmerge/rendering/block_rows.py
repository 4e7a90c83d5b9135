"""Blocks in rows of ten, where no family draws them in two arms: those of the same letters side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from blockmerge.anatomy import FAMILIES, OUTSIDE, Arms

TEN = 10


@dataclass(frozen=True)
class Row:
    """Blocks side by side, None where there is no such block; `label` is what the first is called.

    A block without a number has a row of its own.
    """

    label: str
    blocks: tuple[str | None, ...]
    is_numbered: bool = True


def rows_of(blocks: Iterable[str], columns: int = TEN) -> list[Row]:
    """Return the rows in which blocks are drawn, in their order.

    >>> [row.label for row in rows_of(["BASE", *(f"D{n:02}" for n in range(19)), "OUT"])]
    ['BASE', 'D00', 'D10', 'OUT']
    """
    found: dict[str, dict[int, str]] = {}
    for block in blocks:
        match = re.fullmatch(r"(.*?)([0-9]+)", block)
        place = int(match[2]) % columns if match else 0
        first = f"{match[1]}{int(match[2]) - place:0{len(match[2])}}" if match else block
        found.setdefault(first, {})[place] = block
    return [
        Row(first, tuple(map(row.get, range(max(row) + 1))), is_numbered=first[-1:].isdigit())
        for first, row in found.items()
    ]


def arms_of(blocks: Iterable[str]) -> Arms | None:
    """How these blocks are drawn, or None where no family has just these, in two arms."""
    wanted = set(blocks)
    drawn = (family.arms for family in FAMILIES.values() if family.arms is not None)
    return next((a for a in drawn if {OUTSIDE, *a.left, *a.middle, *a.right} == wanted), None)


def has_arms(family: str) -> bool:
    """Whether a family is drawn in two arms."""
    return family in FAMILIES and FAMILIES[family].arms is not None


def drawn_blocks(family: str, own: Iterable[str]) -> tuple[str, ...]:
    """Return the blocks that are drawn of a result that has some of a family's: all where the family has
    arms, else its `own`, since how many there are differs from model to model.
    """
    blocks = tuple(dict.fromkeys(own))
    if has_arms(family) and set(blocks) <= set(FAMILIES[family].blocks):
        return FAMILIES[family].blocks
    return blocks

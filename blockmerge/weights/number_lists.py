"""Lists of numbers as other programs have them: for which blocks each is, by the family's `number_lists`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from blockmerge.anatomy import Family
from blockmerge.errors import WeightsError
from blockmerge.weights.block_lists import BlockList, without_base
from blockmerge.weights.words import block_range


class Listed(NamedTuple):
    """What a number of a list is for: the word that the other program has, and its blocks."""

    word: str
    blocks: BlockList


def listed_numbers(count: int, family: Family) -> Sequence[Listed] | None:
    """Return what each of so many numbers is for; None where the family has no such list, or the list is not
    for all of the family's blocks, or the numbers are for these in order.
    """
    if count in (len(family.blocks), len(family.blocks) - bool(without_base(family.blocks))):
        return None
    try:
        each = [one for word in family.number_lists.get(count, ()) for one in _each(word, family)]
    except WeightsError:  # of a model with fewer blocks
        return None
    fits = len(each) == count and {block for one in each for block in one.blocks} == set(family.blocks)
    return each if fits else None


def other_lists(family: Family) -> Iterator[str]:
    """Say which lists of other programs the family takes: ``"61 (CLIP, T5, IN, D00-D18, S00-S37, OUT)"``."""
    for count, words in family.number_lists.items():
        if listed_numbers(count, family):
            yield f"{count} ({', '.join(words)})"


def _each(word: str, family: Family) -> list[Listed]:
    blocks = block_range(word, family)
    return [Listed(block, (block,)) for block in blocks] if "-" in word else [Listed(word, blocks)]

"""The words that name blocks: their own names, ranges of them, and what other programs call them.

- ``IN04``, ``in4``, ``IN004``: a block, in whatever case and with as many zeros
- ``OUT02-M00``: a range, in the direction in which it is written
- ``IN``, ``out``: letters alone stand for all blocks that have them and a number
- ``double_blocks.3.``, ``DOUBLE03``: a word of another program, by the family's `aliases`
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from blockmerge.anatomy import Family
from blockmerge.errors import WeightsError, shown
from blockmerge.weights.block_lists import BlockList, block_lists, example, unknown_block

_REMEMBERED = 256  # families: those of a file differ in how many blocks there are


class Named(NamedTuple):
    """The blocks that a text names, in the order in which it does, and how it calls them: ``""`` by their own
    names, or by which of the family's `aliases`.
    """

    blocks: BlockList
    how: str


class _Alias(NamedTuple):
    """A word of another program, as a pattern of it, and the blocks that it stands for."""

    word: str
    pattern: re.Pattern[str]
    targets: tuple[str, ...]


def named_blocks(text: str, family: Family) -> Named:
    """Return the blocks of a family that a word or a range of words names.

    >>> named_blocks("out2-m0", FAMILIES["sd1"]).blocks
    ('OUT02', 'OUT01', 'OUT00', 'M00')

    Raises WeightsError for a block that the family does not have, and for half a range.
    """
    first, last = _ends(text, family)
    if last is None:
        return _named(text, family)
    if not (first and last):
        raise WeightsError(
            f"'{shown(text)}' is half a range: write both ends, as in {example(family.blocks)}"
        )
    ends = _named(first, family), _named(last, family)
    start, stop = family.blocks.index(ends[0].blocks[0]), family.blocks.index(ends[1].blocks[-1])
    step = 1 if start <= stop else -1
    if step < 0:
        start, stop = family.blocks.index(ends[0].blocks[-1]), family.blocks.index(ends[1].blocks[0])
    blocks = tuple(family.blocks[place] for place in range(start, stop + step, step))
    return Named(blocks, "-".join(dict.fromkeys(end.how for end in ends)))


def _ends(text: str, family: Family) -> tuple[str, str | None]:
    """The two ends of a range, and None where a text is one word. The names of blocks may themselves hold a
    dash, those of models of no known family.
    """
    if "-" not in text or _spelling(text, family.blocks) is not None:
        return text, None
    parts = text.split("-")
    ways = [("-".join(parts[:place]), "-".join(parts[place:])) for place in range(1, len(parts))]
    known = (way for way in ways if all(_spelling(end, family.blocks) is not None for end in way))
    return next(known, ways[0])


def block_range(text: str, family: Family) -> BlockList:
    """Return the blocks that `named_blocks` does. Raises WeightsError as it does."""
    return named_blocks(text, family).blocks


def names_blocks(text: str, family: Family) -> bool:
    """Whether `block_range` can read a text."""
    try:
        return bool(block_range(text, family))
    except WeightsError:
        return False


def may_name_blocks(text: str, family: Family) -> bool:
    """Whether `block_range` can read a text for this family, or for one of its name with more blocks."""
    if names_blocks(text, family):
        return True
    if family.arms is not None:
        return False
    letters = {letters for letters, number in map(_key, family.blocks) if number is not None}
    ends = text.split("-")
    # Which lists a model of an unknown kind has is known from its file alone.
    return len(ends) <= 2 and all(
        names_blocks(end, family) or _matching(end, family) or "." in end or _key(end)[0] in letters
        for end in ends
    )


def _named(word: str, family: Family) -> Named:
    if (block := _spelling(word, family.blocks)) is not None:
        return Named((block,), "")
    if lettered := tuple(block for block in family.blocks if _is_of(block, word)):
        return Named(lettered, "")
    if (found := _matching(word, family)) is None:
        known = (_spelling(word, blocks) for blocks in block_lists())
        raise unknown_block(next(filter(None, known), word), family)
    alias, targets = found
    blocks = [_spelling(target, family.blocks) for target in targets]
    if None in blocks:
        raise WeightsError(f"'{shown(word)}': {unknown_block(targets[blocks.index(None)], family)}")
    return Named(tuple(filter(None, blocks)), alias.word)


def _is_of(block: str, letters: str) -> bool:
    """Whether a block has these letters and a number."""
    own, number = _key(block)
    return number is not None and own == letters.casefold()


def _matching(word: str, family: Family) -> tuple[_Alias, list[str]] | None:
    """The alias that a word is, and the blocks that it stands for, as they are named there."""
    for alias in _aliases(family):
        if match := alias.pattern.fullmatch(word.casefold()):
            return alias, [_filled(target, match.groups()) for target in alias.targets]
    return None


@lru_cache(_REMEMBERED)
def _aliases(family: Family) -> tuple[_Alias, ...]:
    return tuple(_Alias(word, _pattern(word), targets) for word, targets in family.aliases.items())


def _pattern(word: str) -> re.Pattern[str]:
    """What a word fits in lower case: a number for each ``#``, with or without the dot at the end."""
    parts = map(re.escape, word.casefold().removesuffix(".").split("#"))
    return re.compile("0*([0-9]{1,4})".join(parts) + (r"\.?" if word.endswith(".") else ""))


def _filled(target: str, numbers: Sequence[str]) -> str:
    """A block with its numbers, two digits each as most lists have them."""
    for number in numbers:
        target = target.replace("#", f"{int(number):02}", 1)
    return target


def _spelling(word: str, blocks: BlockList) -> str | None:
    """The block of a list that a word names, as it is spelled there."""
    return _spellings(blocks).get(_key(word))


@lru_cache(_REMEMBERED)
def _spellings(blocks: BlockList) -> Mapping[tuple[str, int | None], str]:
    return {_key(block): block for block in blocks}


def _key(word: str) -> tuple[str, int | None]:
    """What all spellings of a block have in common."""
    match = re.fullmatch(r"(.*[^0-9])([0-9]{1,4})", word.casefold())
    return (match[1], int(match[2])) if match else (word.casefold(), None)

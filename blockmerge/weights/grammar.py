"""The texts in which people write weights.

- one number for all blocks: ``0.5``
- as many numbers as the family has blocks: ``0,0,1,1,0.67,…`` (one fewer leaves BASE 0)
- names and ranges: ``BASE=0,IN00-IN05=0.3,M00=1`` (blocks left out are 0; later entries win)

In place of a number, the word ``skip`` leaves the block out of the merge, and ``random``, ``random(0.2,0.8)``
or ``random(0.2,0.8,2)`` draws it between limits (0 and 1), rounded to so many digits (3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from blockmerge.anatomy import DEFAULT_FAMILY, Family
from blockmerge.errors import WeightsError, shown
from blockmerge.weights.block_lists import (
    DECIMALS,
    BlockList,
    blocks_of_count,
    example,
    family_named,
    is_known,
    kindred,
    unknown_block,
)
from blockmerge.weights.block_weights import BlockWeights, checked_weight
from blockmerge.weights.random_weights import random_weight

WeightsLike = str | float | Sequence[float | str | None] | Mapping[str, float | str | None] | BlockWeights
"""What is taken for weights: a text, one number, a sequence of numbers, a mapping from block names, a
BlockWeights.

In a sequence or mapping None or "skip" stands for skip, and "random" and its like for a random weight.
"""


def parse_weights(
    value: WeightsLike,
    family: Family | str = DEFAULT_FAMILY,
    sdxl_map: str | None = None,
    seed: int | str = 0,
) -> BlockWeights:
    """Return the weights that `value` means for a model of `family` (``"sd1"``, ``"sd2"``, ``"sdxl"``, …, or
    a Family).

    26 or 25 numbers for SDXL go by block name, or by resolution with ``sdxl_map="resolution"``. Random
    weights are drawn from `seed` and the blocks' names. Raises WeightsError, naming the part that cannot be
    read.
    """
    return read_weights(value, family, seed).for_family(family, sdxl_map)


def read_weights(
    value: WeightsLike, family: Family | str = DEFAULT_FAMILY, seed: int | str = 0
) -> BlockWeights:
    """Return the weights that `value` means for a model of `family`, before they are carried over to its
    blocks.

    Raises WeightsError as `parse_weights` does.
    """
    return _parse(value, family_named(family).blocks, seed)


def parse_assignments(
    value: str | Mapping[str, float | str | None], blocks: BlockList, seed: int | str = 0
) -> dict[str, float | None]:
    """Read ``BASE=0,IN00-IN05=0.3,M00=skip``, or a mapping, into {block: weight} for a family with these
    `blocks`.

    In a text, a range may run in either direction. Raises WeightsError for unknown blocks and for what is not
    a number.
    """
    if isinstance(value, Mapping):
        named = {blocks[_index(str(block), blocks)]: weight for block, weight in value.items()}
        return {block: _drawn(weight, block, seed) for block, weight in named.items()}
    weights: dict[str, float | None] = {}
    for entry in _entries(value):
        names, equals, number = entry.partition("=")
        if not (equals and number and all(names.split("-", 1))):
            raise WeightsError(
                f"cannot read '{shown(entry)}' in the weights: {_form(blocks)}"
                f"{DECIMALS if entry.isdigit() else ''}"
            )
        for block in block_range(names, blocks):
            try:
                weights[block] = _number(number, block, blocks, seed)
            except WeightsError as error:
                raise WeightsError(f"{shown(entry)}: {error}") from error
    return weights


def block_range(text: str, blocks: BlockList) -> BlockList:
    """Return the blocks of a name, or of a range of `blocks` in either direction: ``IN04``, ``OUT02-M00``.

    Raises WeightsError for a block that is not one of `blocks`, and for half a range.
    """
    first, dash, last = text.partition("-")
    if dash and not (first and last):
        raise WeightsError(f"'{shown(text)}' is half a range: write both ends, as in {example(blocks)}")
    start = _index(first, blocks)
    stop = _index(last, blocks) if dash else start
    return blocks[min(start, stop) : max(start, stop) + 1]


def names_blocks(text: str, blocks: BlockList) -> bool:
    """Whether `block_range` can read a text."""
    try:
        return bool(block_range(text, blocks))
    except WeightsError:
        return False


def finite_number(text: str) -> float | None:
    """Return the number that a text is, or None for any other text, infinity and NaN among them."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text and text.isascii() else None


def is_one_number(value: WeightsLike) -> bool:
    """Whether weights that can be read are one number (or word) for all blocks, whatever the family."""
    if isinstance(value, str):
        return "=" not in value and len(_entries(value)) == 1
    return isinstance(value, (int, float))


def _parse(value: WeightsLike, blocks: BlockList, seed: int | str) -> BlockWeights:
    match value:
        case BlockWeights():
            return value
        case str() if "=" not in value:
            return _parse_numbers(value, blocks, seed)
        case str() | Mapping():
            return BlockWeights(
                {**dict.fromkeys(blocks, 0.0), **parse_assignments(value, blocks, seed)}, blocks
            )
        case Sequence():
            found = blocks_of_count(len(value), blocks)
            pairs = zip(value, found[-len(value) :], strict=True)
            return BlockWeights.from_numbers([_drawn(weight, block, seed) for weight, block in pairs], blocks)
        case _ if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:  # an array of numbers
            return BlockWeights.from_numbers(value.tolist(), blocks)
        case _:
            return BlockWeights(dict.fromkeys(blocks, value), blocks)


def _parse_numbers(text: str, blocks: BlockList, seed: int | str) -> BlockWeights:
    words = _entries(text)
    if not words:
        raise WeightsError(
            "the weights are empty: give a number, "
            f"{len(kindred(blocks)[0])} numbers, or names as in {example(blocks)}=0.3"
        )
    if len(words) == 1:
        return BlockWeights({block: _number(words[0], block, blocks, seed) for block in blocks}, blocks)
    found = blocks_of_count(len(words), blocks)
    pairs = zip(words, found[-len(words) :], strict=True)
    return BlockWeights.from_numbers([_number(word, block, found, seed) for word, block in pairs], blocks)


def _entries(text: str) -> list[str]:
    # Lists are pasted from web pages and old text files: commas, spaces and line ends all separate, so the
    # blanks that people put around "=" and the dash of a range go first.
    joined = re.sub(r"\s*=\s*", "=", re.sub(r"(?<=\w)\s*-\s*(?=[A-Za-z])", "-", text))
    if text.count("(") != text.count(")"):
        raise WeightsError(
            f"cannot read '{shown(text)}' in the weights: a "
            f"'{'(' if text.count('(') < text.count(')') else ')'}' is missing"
        )
    # A bracket and what is in it stay with the word before them.
    return re.findall(r"[^,;\s(]*\([^()]*\)|[^,;\s]+", joined)


def _drawn(weight: float | str | None, block: str, seed: int | str) -> float | None:
    """A weight from a list or mapping: drawn when it is a text that says so, else as it is, checked."""
    chance = random_weight(weight) if isinstance(weight, str) else None
    return chance.draw(seed, block) if chance else checked_weight(weight, block)


def _number(text: str, block: str, blocks: BlockList, seed: int | str) -> float | None:
    if text.casefold() == "skip":
        return None
    if chance := random_weight(text):
        return chance.draw(seed, block)
    number = finite_number(text)
    if number is None:
        form = f": {_form(blocks)}" if _begins_like_a_block(text, blocks) else ""
        raise WeightsError(f"'{shown(text)}' is not a number{form}")
    return number


def _form(blocks: BlockList) -> str:
    return f"write BLOCK=NUMBER, as in {example(blocks)}=0.3"


def _begins_like_a_block(text: str, blocks: BlockList) -> bool:
    beginnings = {re.sub(r"[0-9]+$", "[0-9]", block) for block in blocks}
    return re.match("|".join(sorted(beginnings)), text, re.IGNORECASE) is not None


def _index(name: str, blocks: BlockList) -> int:
    match = re.fullmatch(r"([A-Z]+)([0-9]{1,2})", name.upper())
    block = f"{match[1]}{int(match[2]):02}" if match else name.upper()
    if block not in blocks:
        raise unknown_block(block if is_known(block) else name, blocks)
    return blocks.index(block)

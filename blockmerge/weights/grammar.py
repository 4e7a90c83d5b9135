"""The texts in which people write weights.

- one number for all blocks: ``0.5``
- 26, 25, 20 or 19 numbers: ``0,0,1,1,0.67,…`` (25 and 19 leave BASE 0)
- names and ranges: ``BASE=0,IN00-IN05=0.3,M00=1`` (blocks left out are 0; later entries win)

In place of a number, the word ``skip`` leaves the block out of the merge, and ``random``, ``random(0.2,0.8)``
or ``random(0.2,0.8,2)`` draws it between limits (0 and 1), rounded to so many digits (3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from blockmerge.anatomy import SD_BLOCKS, SDXL_BLOCKS
from blockmerge.errors import WeightsError, shown
from blockmerge.weights.block_weights import (
    DECIMALS,
    BlockWeights,
    blocks_of_list,
    checked_weight,
    unknown_block,
)
from blockmerge.weights.random_weights import random_weight

_FORM = "write BLOCK=NUMBER, as in IN00-IN05=0.3"

WeightsLike = str | float | Sequence[float | str | None] | Mapping[str, float | str | None] | BlockWeights
"""What is taken for weights: a text, one number, a sequence of numbers, a mapping from block names, a
BlockWeights.

In a sequence or mapping None or "skip" stands for skip, and "random" and its like for a random weight.
"""


def parse_weights(
    value: WeightsLike, family: str = "sd1", sdxl_map: str | None = None, seed: int | str = 0
) -> BlockWeights:
    """Return the weights that `value` means for a model of `family` (``"sd1"``, ``"sd2"`` or ``"sdxl"``).

    26 or 25 numbers for SDXL go by block name, or by resolution with ``sdxl_map="resolution"``. Random
    weights are drawn from `seed` and the blocks' names. Raises WeightsError, naming the part that cannot be
    read.
    """
    weights = _parse(value, SDXL_BLOCKS if family == "sdxl" else SD_BLOCKS, seed)
    if family == "sdxl":
        return weights.for_sdxl(sdxl_map or "name")
    if len(weights) != len(SD_BLOCKS):
        raise WeightsError(
            f"weights for SDXL's {len(weights)} blocks given; {family} needs 26 (25 without BASE)"
        )
    return weights


def parse_assignments(
    value: str | Mapping[str, float | str | None], blocks: Sequence[str], seed: int | str = 0
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
                f"cannot read '{shown(entry)}' in the weights: {_FORM}{DECIMALS if entry.isdigit() else ''}"
            )
        for block in block_range(names, blocks):
            weights[block] = _number(number, block, seed)
    return weights


def block_range(text: str, blocks: Sequence[str]) -> Sequence[str]:
    """Return the blocks of a name, or of a range of `blocks` in either direction: ``IN04``, ``OUT02-M00``.

    Raises WeightsError for a block that is none of `blocks`, and for half a range.
    """
    first, dash, last = text.partition("-")
    if dash and not (first and last):
        raise WeightsError(f"'{shown(text)}' is half a range: write both ends, as in IN00-IN05")
    start = _index(first, blocks)
    stop = _index(last, blocks) if dash else start
    return blocks[min(start, stop) : max(start, stop) + 1]


def finite_number(text: str) -> float | None:
    """Return the number that a text is, or None for any other text, infinity and NaN among them."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text and text.isascii() else None


def _parse(value: WeightsLike, blocks: Sequence[str], seed: int | str) -> BlockWeights:
    match value:
        case BlockWeights():
            return value
        case str() if "=" in value:
            return BlockWeights.flat(0.0, blocks).replace(parse_assignments(value, blocks, seed))
        case str():
            words = _entries(value)
            if not words:
                raise WeightsError(
                    "the weights are empty: give a number, 26 numbers, or names as in IN00-IN05=0.3"
                )
            if len(words) == 1:
                return BlockWeights({block: _number(words[0], block, seed) for block in blocks})
            blocks = blocks_of_list(len(words))
            return BlockWeights.from_numbers(
                [_number(word, block, seed) for word, block in zip(words, blocks, strict=True)]
            )
        case Mapping():
            return BlockWeights.flat(0.0, blocks).replace(parse_assignments(value, blocks, seed))
        case Sequence() if not isinstance(value, str):
            blocks = blocks_of_list(len(value))
            return BlockWeights.from_numbers(
                [_drawn(weight, block, seed) for weight, block in zip(value, blocks, strict=True)]
            )
        case _ if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:  # an array of numbers
            return BlockWeights.from_numbers(value.tolist())
        case _:
            return BlockWeights.flat(value, blocks)  # type: ignore[arg-type]


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


def _number(text: str, block: str, seed: int | str) -> float | None:
    if text.casefold() == "skip":
        return None
    if chance := random_weight(text):
        return chance.draw(seed, block)
    number = finite_number(text)
    if number is None:
        form = f": {_FORM}" if re.match(r"(BASE|(IN|M|OUT)[0-9])", text, re.IGNORECASE) else ""
        raise WeightsError(f"'{shown(text)}' is not a number{form}")
    return number


def _index(name: str, blocks: Sequence[str]) -> int:
    match = re.fullmatch(r"(IN|M|OUT)([0-9]{1,2})", name.upper())
    block = f"{match[1]}{int(match[2]):02}" if match else name.upper()
    if block not in blocks:
        raise unknown_block(name if block not in SD_BLOCKS else block, blocks)
    return blocks.index(block)

"""The texts in which people write weights.

- one number for all blocks: ``0.5``
- 26, 25, 20 or 19 numbers: ``0,0,1,1,0.67,…`` (25 and 19 leave BASE 0)
- names and ranges: ``BASE=0,IN00-IN05=0.3,M00=1`` (blocks left out are 0; later entries win)

The word ``skip`` in place of a number leaves the block out of the merge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from blockmerge.anatomy import SD_BLOCKS, SDXL_BLOCKS
from blockmerge.errors import WeightsError, shown
from blockmerge.weights.block_weights import BlockWeights, unknown_block

_FORM = "write BLOCK=NUMBER, as in IN00-IN05=0.3"

WeightsLike = str | float | Sequence[float | None] | Mapping[str, float | None] | BlockWeights
"""What is taken for weights: a text, one number, a sequence of numbers, a mapping from block names, a BlockWeights."""


def parse_weights(value: WeightsLike, family: str = "sd1", sdxl_map: str | None = None) -> BlockWeights:
    """Return the weights that `value` means for a model of `family` (``"sd1"``, ``"sd2"`` or ``"sdxl"``).

    26 or 25 numbers for SDXL go by block name, or by resolution with ``sdxl_map="resolution"``.
    Raises WeightsError, naming the part that cannot be read.
    """
    weights = _parse(value, SDXL_BLOCKS if family == "sdxl" else SD_BLOCKS)
    if family == "sdxl":
        return weights.for_sdxl(sdxl_map or "name")
    if len(weights) != len(SD_BLOCKS):
        raise WeightsError(f"weights for SDXL's {len(weights)} blocks given; {family} needs 26 (25 without BASE)")
    return weights


def parse_assignments(text: str, blocks: Sequence[str]) -> dict[str, float | None]:
    """Read ``BASE=0,IN00-IN05=0.3,M00=skip`` into {block: weight} for a family with these `blocks`.

    A range may run in either direction. Raises WeightsError for unknown blocks and for what is not a number.
    """
    weights: dict[str, float | None] = {}
    for entry in _entries(text):
        names, equals, number = entry.partition("=")
        first, dash, last = names.partition("-")
        if not (equals and number and first) or (dash and not last):
            raise WeightsError(f"cannot read '{shown(entry)}' in the weights: {_FORM}")
        start = _index(first, blocks)
        stop = _index(last, blocks) if dash else start
        for block in blocks[min(start, stop) : max(start, stop) + 1]:
            weights[block] = _number(number)
    return weights


def _parse(value: WeightsLike, blocks: Sequence[str]) -> BlockWeights:
    match value:
        case BlockWeights():
            return value
        case str() if "=" in value:
            return BlockWeights.flat(0.0, blocks).replace(parse_assignments(value, blocks))
        case str():
            numbers = [_number(entry) for entry in _entries(value)]
            if not numbers:
                raise WeightsError("the weights are empty: give a number, 26 numbers, or names as in IN00-IN05=0.3")
            return BlockWeights.flat(numbers[0], blocks) if len(numbers) == 1 else BlockWeights.from_numbers(numbers)
        case Mapping():
            named = {blocks[_index(str(block), blocks)]: weight for block, weight in value.items()}
            return BlockWeights.flat(0.0, blocks).replace(named)
        case Sequence() if not isinstance(value, str):
            return BlockWeights.from_numbers(value)
        case _ if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:  # an array of numbers
            return BlockWeights.from_numbers(value.tolist())
        case _:
            return BlockWeights.flat(value, blocks)  # type: ignore[arg-type]


def _entries(text: str) -> list[str]:
    # Lists are pasted from web pages and old text files: commas, spaces and line ends all separate, so the blanks that
    # people put around "=" and the dash of a range go first.
    joined = re.sub(r"\s*=\s*", "=", re.sub(r"(?<=\w)\s*-\s*(?=[A-Za-z])", "-", text))
    return [entry for entry in re.split(r"[,;\s]+", joined) if entry]


def _number(text: str) -> float | None:
    if text.casefold() == "skip":
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or "_" in text or not text.isascii():
        form = f": {_FORM}" if re.match(r"(BASE|(IN|M|OUT)[0-9])", text, re.IGNORECASE) else ""
        raise WeightsError(f"'{shown(text)}' is not a number{form}")
    return number


def _index(name: str, blocks: Sequence[str]) -> int:
    match = re.fullmatch(r"(IN|M|OUT)([0-9]{1,2})", name.upper())
    block = f"{match[1]}{int(match[2]):02}" if match else name.upper()
    if block not in blocks:
        raise unknown_block(name if block not in SD_BLOCKS else block, blocks)
    return blocks.index(block)

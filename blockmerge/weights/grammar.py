"""The texts in which people write weights.

- one number for all blocks: ``0.5``
- as many numbers as the family has blocks: ``0,0,1,1,0.67,…`` (one fewer leaves BASE 0), or as other programs
  list them (`number_lists`)
- names and ranges: ``BASE=0,IN00-IN05=0.3,OUT=1`` (``OUT`` stands for OUT00 to the last; blocks left out are
  0; later entries win)
- gradients over a range: ``IN00-IN11=0..1``, from the first number at the first block to the second at the
  last, in the direction in which the range is written
- words of other programs, by the family's `aliases`: ``double_blocks.3.=0.4`` (words that mean one block must
  not give it different numbers)

In place of a number, the word ``skip`` leaves the block out of the merge, and ``random``, ``random(0.2,0.8)``
or ``random(0.2,0.8,2)`` draws it between limits (0 and 1), rounded to so many digits (3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blockmerge.anatomy import DEFAULT_FAMILY, Family
from blockmerge.errors import WeightsError, shown
from blockmerge.weights.block_lists import (
    DECIMALS,
    BlockList,
    blocks_of_count,
    example,
    family_named,
    kindred,
)
from blockmerge.weights.block_weights import BlockWeights, checked_weight
from blockmerge.weights.gradients import gradient, is_gradient
from blockmerge.weights.number_lists import Listed, listed_numbers, other_lists
from blockmerge.weights.plain_numbers import finite_number
from blockmerge.weights.random_weights import random_weight
from blockmerge.weights.words import Named, named_blocks, names_blocks

WeightsLike = str | float | Sequence[float | str | None] | Mapping[str, float | str | None] | BlockWeights
"""What stands for weights: a text, one number, a list, a mapping from block names, or `BlockWeights`.

A text is what ``--weights`` takes, such as ``"BASE=0,IN00-IN05=0.3"``. In a list or mapping, None and
``"skip"`` leave a block out of the merge, and words such as ``"random"`` draw a weight.
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
    return _parse(value, family_named(family), seed)


def notes_on(value: WeightsLike, family: Family | str = DEFAULT_FAMILY, seed: int | str = 0) -> list[str]:
    """Say which numbers of a list count for nothing, since others are for the same block, and that BASE is 0
    where it has none.

    Raises WeightsError as `parse_weights` does.
    """
    wanted = family_named(family)
    numbers, read = _list_of(value, wanted, seed)
    if numbers is None:
        return []
    if places := listed_numbers(len(numbers), wanted):
        return _of_list(numbers, places, wanted, read)[1]
    if len(numbers) == 1 and isinstance(value, str):
        return []
    blocks = blocks_of_count(len(numbers), wanted, other_lists(wanted))
    if len(numbers) == len(blocks):
        return []
    return [f"{len(numbers)} numbers are for {blocks[1]} to {blocks[-1]}: BASE is 0"]


def parse_assignments(
    value: str | Mapping[str, float | str | None],
    family: Family | str = DEFAULT_FAMILY,
    seed: int | str = 0,
) -> dict[str, float | None]:
    """Read ``BASE=0,IN00-IN05=0.3,M00=skip``, or a mapping, into {block: weight} for a family.

    A range may run in either direction. Raises WeightsError for unknown blocks, for what is not a number, and
    for different words that give one block different numbers.
    """
    wanted, given = family_named(family), _Given()
    if isinstance(value, Mapping):
        for words, weight in value.items():
            named = named_blocks(str(words), wanted)
            given.add(f"{words}={weight}", named, _of_value(weight, named.blocks, wanted, seed))
        return given.weights
    for entry in _entries(value):
        words, equals, text = entry.partition("=")
        if not (equals and text and all(words.split("-", 1))):
            raise WeightsError(
                f"cannot read '{shown(entry)}' in the weights: {_form(wanted)}"
                f"{DECIMALS if entry.isdigit() else ''}"
            )
        named = named_blocks(words, wanted)
        try:
            weights = _of_text(text, named.blocks, wanted, seed)
        except WeightsError as error:
            raise WeightsError(f"{shown(entry)}: {error}") from error
        given.add(entry, named, weights)
    return given.weights


def _is_part(how: str) -> bool:
    """Whether blocks were named by what another program calls a part of one, and not all of it."""
    return bool(how) and "#" not in how


class _Given:
    """What entries have given so far."""

    def __init__(self) -> None:
        self.weights: dict[str, float | None] = {}
        self._by: dict[str, tuple[str, str]] = {}

    def add(self, entry: str, named: Named, weights: Sequence[float | None]) -> None:
        """Take an entry in: it goes before what was given.

        Raises WeightsError where another word for a part of a block, as ``img_in.``, has given that another
        weight.
        """
        for block, weight in zip(named.blocks, weights, strict=True):
            how, other = self._by.get(block, (named.how, entry))
            parts = {how, named.how}
            if len(parts) == 2 and all(map(_is_part, parts)) and self.weights[block] != weight:
                raise WeightsError(
                    f"'{shown(other)}' and '{shown(entry)}' are both for {block}, which has one weight: "
                    f"give it as {block}=NUMBER"
                )
            self.weights[block] = weight
            self._by[block] = named.how, entry


def lone_gradient(text: str, family: Family) -> WeightsError:
    """The error for a gradient that does not say for which blocks it is."""
    return WeightsError(
        f"'{shown(text)}' is a gradient, which is for a range of blocks: write it as in "
        f"{example(family.blocks)}={shown(text)}"
    )


def check_complete(text: str) -> None:
    """Raise WeightsError where a number of a list is empty, without which the others would be for other
    blocks.
    """
    flat = re.sub(r"\([^()]*\)", lambda bracket: "_" * len(bracket[0]), text)
    if blank := re.search(r"(?:^|[,;])\s*(?=[,;])|\t *(?=\t)", flat):
        raise _empty(len(re.findall(r"[^,;\s]+", flat[: blank.start()])) + 1)


def _empty(number: int) -> WeightsError:
    return WeightsError(f"number {number} of the list is empty: write a number there")


def is_one_number(value: WeightsLike) -> bool:
    """Whether weights that can be read are one number (or word) for all blocks, whatever the family."""
    if isinstance(value, str):
        return "=" not in value and len(_entries(value)) == 1
    return isinstance(value, (int, float))


def _parse(value: WeightsLike, family: Family, seed: int | str) -> BlockWeights:
    if isinstance(value, BlockWeights):
        return value
    blocks = family.blocks
    if isinstance(value, Mapping) or (isinstance(value, str) and "=" in value):
        return BlockWeights({**dict.fromkeys(blocks, 0.0), **parse_assignments(value, family, seed)}, blocks)
    numbers, read = _list_of(value, family, seed)
    if numbers is None:
        return BlockWeights(dict.fromkeys(blocks, value), blocks)  # type: ignore[arg-type]  # it checks
    if isinstance(value, str) and len(numbers) == 1:
        return BlockWeights({block: read(numbers[0], block) for block in blocks}, blocks)
    if places := listed_numbers(len(numbers), family):
        return _of_list(numbers, places, family, read)[0]
    found = blocks_of_count(len(numbers), family, other_lists(family))
    if len(numbers) < len(found) and isinstance(value, str) and re.search(r"[,;]\s*$", value):
        raise _empty(len(found))  # and not that of BASE
    pairs = zip(numbers, found[-len(numbers) :], strict=True)
    return BlockWeights.from_numbers([read(number, block) for number, block in pairs], found)


_Read = Callable[[Any, str], float | None]
"""What gives the weight that a number of a list is, for the block that it is for."""


def _list_of(value: WeightsLike, family: Family, seed: int | str) -> tuple[Sequence[Any] | None, _Read]:
    """The numbers of a list, as they are given, and how one is read; None for what is no list."""

    def of_word(word: str, block: str) -> float | None:
        return _number(word, block, family, seed)

    def of_number(number: Any, block: str) -> float | None:
        return _drawn(number, block, seed)

    if isinstance(value, str):
        words = [] if "=" in value else _entries(value)
        if words:
            check_complete(value)
        if not words and "=" not in value:
            raise WeightsError(
                "the weights are empty: give a number, "
                f"{len(kindred(family.blocks)[0])} numbers, or names as in {example(family.blocks)}=0.3"
            )
        return words or None, of_word
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:  # an array of numbers
        return value.tolist(), of_number
    is_list = isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray))
    return value if is_list else None, of_number  # type: ignore[return-value]


def _of_list(
    numbers: Sequence[Any], places: Sequence[Listed], family: Family, read: _Read
) -> tuple[BlockWeights, list[str]]:
    """The weights that a list of another program's gives, and what is to be said of them."""
    weights: dict[str, float | None] = {}
    words: dict[str, str] = {}
    notes = []
    for (word, blocks), number in zip(places, numbers, strict=True):
        for block in blocks:
            weight = read(number, block)
            if block not in weights:
                weights[block], words[block] = weight, f"{word}={shown(number)}"
            elif weights[block] != weight:
                notes.append(
                    f"of {len(numbers)} numbers, {words[block]} and {word}={shown(number)} are both for "
                    f"{block}: the first counts"
                )
    return BlockWeights(weights, family.blocks), notes


def _entries(text: str) -> list[str]:
    # Lists are pasted from web pages and old text files: commas, spaces and line ends all separate, so the
    # blanks that people put around "=", the dash of a range and the dots of a gradient go first.
    joined = re.sub(r"\s*(=|\.\.)\s*", r"\1", re.sub(r"(?<=[\w.])\s*-\s*(?=[A-Za-z])", "-", text))
    if text.count("(") != text.count(")"):
        raise WeightsError(
            f"cannot read '{shown(text)}' in the weights: a "
            f"'{'(' if text.count('(') < text.count(')') else ')'}' is missing"
        )
    # A bracket and what is in it stay with the word before them.
    return re.findall(r"[^,;\s(]*\([^()]*\)(?:\.\.[^,;\s]*)?|[^,;\s]+", joined)


def _of_text(text: str, blocks: BlockList, family: Family, seed: int | str) -> Sequence[float | None]:
    """The weights of blocks that a text after "=" gives them, in their order."""
    if is_gradient(text):
        return gradient(text, len(blocks), f"{example(family.blocks)}=0..1")
    return [_number(text, block, family, seed) for block in blocks]


def _of_value(
    weight: float | str | None, blocks: BlockList, family: Family, seed: int | str
) -> Sequence[float | None]:
    """The weights of blocks that a mapping gives them, in their order."""
    if isinstance(weight, str) and is_gradient(weight):
        return _of_text(re.sub(r"\s+", "", weight), blocks, family, seed)
    return [_drawn(weight, block, seed) for block in blocks]


def _drawn(weight: float | str | None, block: str, seed: int | str) -> float | None:
    """A weight from a list or mapping: drawn when it is a text that says so, else as it is, checked."""
    chance = random_weight(weight) if isinstance(weight, str) else None
    return chance.draw(seed, block) if chance else checked_weight(weight, block)


def _number(text: str, block: str, family: Family, seed: int | str) -> float | None:
    if text.casefold() == "skip":
        return None
    if is_gradient(text):
        raise lone_gradient(text, family)
    if chance := random_weight(text):
        return chance.draw(seed, block)
    number = finite_number(text)
    if number is None:
        form = f": {_form(family)}" if _begins_like_a_block(text, family) else ""
        raise WeightsError(f"'{shown(text)}' is not a number{form}")
    return number


def _form(family: Family) -> str:
    return f"write BLOCK=NUMBER, as in {example(family.blocks)}=0.3"


def _begins_like_a_block(text: str, family: Family) -> bool:
    beginnings = {re.sub(r"[0-9]+$", "", block) for block in family.blocks}
    numbered = {word for word in beginnings if word not in family.blocks}
    patterns = [*map(re.escape, beginnings - numbered), *(f"{re.escape(word)}[0-9]" for word in numbered)]
    is_like = re.match("|".join(sorted(patterns)), text, re.IGNORECASE) is not None
    return is_like or names_blocks(text, family)

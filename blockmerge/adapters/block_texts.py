"""What BLOCKS of a LoRA mean for a family: block lists and presets of LoRAs, or any text of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from blockmerge.anatomy import FAMILIES, Family
from blockmerge.errors import WeightsError, counted, did_you_mean, shown
from blockmerge.weights import BlockWeights, WeightsLike, parse_weights
from blockmerge.weights.block_lists import example, spans
from blockmerge.weights.gradients import is_gradient
from blockmerge.weights.grammar import check_complete, lone_gradient
from blockmerge.weights.plain_numbers import finite_number
from blockmerge.weights.random_weights import is_random
from blockmerge.weights.words import names_blocks

_WORD = re.compile(r"[^,;\s(]*\([^()]*\)|[^,;\s]+")
"""An entry of a list; a bracket and what is in it stay with the word before them."""

LoraBlocks = WeightsLike
"""What is taken for the blocks of a LoRA: what is taken for weights, or a LoRA preset's name."""


def lora_presets(family: Family) -> Mapping[str, str]:
    """{name: text of weights} of a family's LoRA presets."""
    presets: Mapping[str, str] = family.adapters.get("weights", {}).get("presets", {})
    return presets


def lora_lists(family: Family) -> Mapping[int, tuple[str, ...]]:
    """{how many numbers: the blocks that they are for, in order}, the shortest first."""
    lists = family.adapters.get("weights", {}).get("lists", ())
    return {len(blocks): tuple(blocks) for blocks in (*lists, family.blocks)}


def read_blocks(blocks: LoraBlocks | None, family: Family, seed: int = 0) -> BlockWeights:
    """Return the weight of every block of a family; blocks that a text or list leaves out, or skips, are 0.

    Raises WeightsError for blocks, counts of numbers and presets that the family does not have.
    """
    if blocks is None:
        return BlockWeights.flat(1.0, family.blocks)
    if isinstance(blocks, BlockWeights):
        if blocks.blocks != family.blocks:
            raise WeightsError(
                f"weights of {len(blocks)} blocks are given for a LoRA of {family.title}, which has "
                f"{len(family.blocks)}"
            )
        found = blocks
    elif isinstance(blocks, str):
        found = _of_text(blocks, family, seed)
    elif isinstance(blocks, Sequence) or getattr(blocks, "ndim", 0) == 1:
        found = _of_list([*blocks], family, seed)  # type: ignore[misc]  # mypy knows no arrays
    else:
        found = parse_weights(blocks, family, seed=seed)
    return BlockWeights({block: weight or 0.0 for block, weight in found.items()}, family.blocks)


def _of_text(text: str, family: Family, seed: int) -> BlockWeights:
    presets = lora_presets(family)
    preset = next((said for name, said in presets.items() if _fold(name) == _fold(text)), None)
    if preset is not None or "=" in text:
        return parse_weights(text if preset is None else preset, family, seed=seed)
    if ":" in text:
        raise WeightsError("there is a third ':', and a LoRA is given as FILE[:STRENGTH[:BLOCKS]]")
    words = _WORD.findall(text)
    if len(words) > 1:
        check_complete(text)
        return _of_list(words, family, seed)
    if is_gradient(text):
        raise lone_gradient(text.strip(), family)
    if finite_number(text.strip()) is None and not is_random(text) and _fold(text) != "skip":
        raise _unknown_preset(text, family)
    return parse_weights(text, family, seed=seed)


def _of_list(values: Sequence[Any], family: Family, seed: int) -> BlockWeights:
    """Numbers in a row, for as many blocks."""
    blocks = lora_lists(family).get(len(values))
    if blocks is None:
        raise _wrong_count(len(values), family)
    for value in values:
        if isinstance(value, str) and is_gradient(value):
            raise lone_gradient(value, family)
    numbers = [_as_number(value) for value in values]
    return parse_weights(dict(zip(blocks, numbers, strict=True)), family, seed=seed)


def _as_number(value: Any) -> Any:
    number = finite_number(value) if isinstance(value, str) else None
    return value if number is None else number


def _unknown_preset(text: str, family: Family) -> WeightsError:
    presets = lora_presets(family)
    have = f"has {', '.join(presets)}" if presets else "has none"
    are_blocks = names_blocks(text.strip(), family)
    blocks = text.strip() if are_blocks else example(family.blocks)
    near = "" if are_blocks else did_you_mean(text.strip(), presets)
    return WeightsError(
        f"unknown LoRA preset '{shown(text.strip())}'{near}: "
        f"{family.title} {have}; or write weights, as in {blocks}=0.5"
    )


def _wrong_count(count: int, family: Family) -> WeightsError:
    wanted = " or ".join(
        f"{number} ({', '.join(spans(blocks))})" for number, blocks in lora_lists(family).items()
    )
    others = [other.title for other in FAMILIES.values() if count in lora_lists(other)]
    theirs = f", which are for {' and '.join(others)}" if others else ""
    return WeightsError(
        f"{counted(count, 'number')} given for the blocks of a LoRA{theirs}: "
        f"{family.title} takes one number, or {wanted}"
    )


def _fold(name: str) -> str:
    return name.strip().casefold().replace("-", "_")

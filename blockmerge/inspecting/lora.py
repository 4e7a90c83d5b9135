"""`inspect_lora`: what is in a LoRA or one of its relatives, and how much of its change each block takes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blockmerge.adapters import Adapter, Lora, LoraLike, Module
from blockmerge.comparing import squares_of
from blockmerge.errors import counted, listing, shown
from blockmerge.inspecting.lora_metadata import looked_for
from blockmerge.streaming import Progress


@dataclass(frozen=True)
class LoraBlock:
    """How many modules a LoRA has in a block, and ‖ΔW‖ of what they add to it at strength 1.

    `norm` is None where that depends on the model, or where it is not a number.
    """

    modules: int
    norm: float | None


@dataclass(frozen=True)
class LoraInspection:
    """What `inspect_lora` found.

    - `name`, `family`: the file's name, and the family that the LoRA is for.
    - `kinds`, `ranks`, `alphas`: {kind, rank or alpha: modules}. Where the file has no alpha, the rank
      counts.
    - `dtypes`: {dtype: tensors}.
    - `blocks`: {block: its number of `modules`, and `norm`, the ‖ΔW‖ of what they add}, for the blocks that
      it changes.
    - `norm`: that of all blocks together. None where that of any block is None.
    - `unmet`: modules that blockmerge does not know. `embeddings`: tensors of embeddings in the same file.
    - `metadata`: what people look for first, under the file's keys. ``"trigger_words"`` are the most frequent
      tags of its training.
    - `notes`: sentences for the user.
    """

    name: str
    family: str
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    dtypes: Mapping[str, int]
    blocks: Mapping[str, LoraBlock]
    norm: float | None
    unmet: tuple[str, ...]
    embeddings: tuple[str, ...]
    metadata: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> int:
        """How many modules it has."""
        return sum(self.kinds.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`."""
        fields = asdict(self)
        for key in ("ranks", "alphas"):
            fields[key] = {number_text(number): count for number, count in fields[key].items()}
        return fields


def inspect_lora(
    lora: LoraLike, *, threads: int | None = None, progress: Progress | None = None
) -> LoraInspection:
    """Look at a LoRA: kinds, family, ranks, alphas, and how much it changes each block.

    >>> found = blockmerge.inspect_lora("style.safetensors")  # doctest: +SKIP
    >>> found.kinds, found.ranks, found.blocks["IN04"].norm  # doctest: +SKIP
    ({'lora': 722}, {32: 722}, 1.742)

    - `lora`: a path, an opened checkpoint, a state dict, or a `Lora` without strength and blocks.
    - `threads`, `progress`: as for `merge`.

    A block's change is ‖ΔW‖ at strength 1, summed in float64. It is None for modules whose change depends on
    the model: DoRA, GLoRA, IA3, OFT and BOFT.

    Raises `CheckpointError` for a file that is not a LoRA or cannot be read, and `UnknownFamilyError` for one
    of no known family. Raises `RecipeError` for a strength or blocks.
    """
    adapter = Lora.of(lora).as_it_is("inspected").open()
    said, fault = looked_for(adapter.source.metadata)
    blocks, notes = _blocks(adapter, threads, progress)
    norms = [one.norm for one in blocks.values()]
    ranked = [one for one in adapter.modules if one.rank is not None]
    return LoraInspection(
        name=adapter.name,
        family=adapter.family.name,
        kinds=adapter.kinds,
        ranks=_counted(one.rank for one in ranked if one.rank is not None),
        alphas=_counted(one.stored_alpha for one in ranked if one.stored_alpha is not None),
        dtypes=dict(Counter(info.dtype for info in adapter.source.tensors.values()).most_common()),
        blocks=blocks,
        norm=None if None in norms else math.hypot(*(norm for norm in norms if norm is not None)),
        unmet=adapter.unmet,
        embeddings=adapter.embeddings,
        metadata=said,
        notes=(
            *adapter.notes,
            *([f"{shown(adapter.name)}: {fault}"] if fault else ()),
            *_of_unmet(adapter),
            *notes,
        ),
    )


def number_text(number: float) -> str:
    """A rank or an alpha as keys of JSON have it: ``"16"``, ``"0.5"``."""
    return str(int(number)) if float(number).is_integer() else repr(float(number))


def _counted(numbers: Iterator[Any]) -> dict[Any, int]:
    """{number: how often it is there}, from the least to the largest."""
    return dict(sorted(Counter(numbers).items()))


def _blocks(
    adapter: Adapter, threads: int | None, progress: Progress | None
) -> tuple[dict[str, LoraBlock], list[str]]:
    """Every block that is changed, and notes on those whose share is not known."""
    met = [one for one in adapter.modules if one.target is not None]
    looking = [one for one in met if one.looks_at_weights]
    others = [one for one in met if not one.looks_at_weights]
    squares = squares_of(others, threads, progress)
    odd = [one for one, square in zip(others, squares, strict=True) if not math.isfinite(square)]
    each: dict[str, list[float]] = defaultdict(list)
    for module, square in zip(others, squares, strict=True):
        each[_block_of(module)].append(square)
    unknown = {*map(_block_of, looking), *map(_block_of, odd)}
    blocks = {
        block: LoraBlock(count, None if block in unknown else math.sqrt(math.fsum(each[block])))
        for block, count in adapter.blocks.items()
    }
    return blocks, list(_notes(adapter, looking, odd))


def _block_of(module: Module) -> str:
    assert module.target is not None, module
    return module.target.block


def _notes(adapter: Adapter, looking: Sequence[Module], odd: Sequence[Module]) -> Iterator[str]:
    if looking:
        kinds = " and ".join(sorted({one.kind for one in looking}))
        yield (
            f"{shown(adapter.name)}: how much {counted(len(looking), 'module')} of {kinds} change depends on "
            "the model, so that their blocks have no share here: bake says it for a model"
        )
    if odd:
        yield (
            f"{shown(adapter.name)} holds NaN or infinity in {counted(len(odd), 'module')} "
            f"({listing(one.name for one in odd)})"
        )


def _of_unmet(adapter: Adapter) -> Iterator[str]:
    if adapter.unmet:
        yield (
            f"{shown(adapter.name)}: {counted(len(adapter.unmet), 'module')} of {len(adapter.modules)} are "
            f"none that {adapter.family.title} has ({listing(adapter.unmet)})"
        )

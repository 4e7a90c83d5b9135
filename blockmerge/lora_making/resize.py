"""`resize_lora`: a LoRA at another rank."""

from __future__ import annotations

from collections.abc import Iterator

from blockmerge.adapters import Applied, Lora, LoraLike
from blockmerge.errors import shown
from blockmerge.lora_making.making import LoraTarget
from blockmerge.lora_making.merge import added_up, opened, written
from blockmerge.lora_making.metadata import new_metadata, of_family, still_true
from blockmerge.lora_making.result import LoraResult
from blockmerge.lora_making.size import Size
from blockmerge.streaming import Progress
from blockmerge.types import DtypeLike, PathLike


def resize_lora(
    lora: LoraLike,
    *,
    output: PathLike,
    rank: int | None = None,
    energy: float | None = None,
    dtype: DtypeLike | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LoraResult:
    """Write a LoRA at a lower rank, by the best approximation there is.

    >>> blockmerge.resize_lora("big.safetensors", output="small.safetensors", energy=0.99)  # doctest: +SKIP

    - `lora`: as `merge_loras` takes one. Its strength and block weights become part of the new one.
    - `rank`: the highest rank of a module.
    - `energy`: in place of `rank`, the share of each module's squared norm that is kept.

    The other arguments and the errors are those of `merge_loras`. Metadata about the training are kept.
    """
    size = Size(rank, energy)
    size.check_given()
    target = LoraTarget.of(output, dtype, threads, overwrite, progress)
    asked = Lora.of(lora)
    applied, family = opened([asked])
    of_source = applied[0].adapter.source.metadata
    recipe = {"method": "lora resize", "loras": written(applied), "rank": rank, "energy": energy}
    made = new_metadata(of_family(family, [of_source]), recipe, asked.label)
    metadata = {**made, **still_true(of_source, family)}
    return added_up(target, family, applied, size, metadata, list(_weighting(asked, applied[0])))


def _weighting(asked: Lora, applied: Applied) -> Iterator[str]:
    """Say what of a LoRA is resized where that is not all of it as it is."""
    blocks = "" if asked.blocks is None else ", times its block weights"
    if asked.strength != 1 or blocks:
        yield (
            f"{shown(applied.adapter.name)} is taken at strength {asked.strength:g}{blocks}: at strength 1 "
            "the new LoRA does what that does"
        )

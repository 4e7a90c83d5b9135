"""`bake`: LoRAs put into a model for good.

It is a merge of one model, with the method that does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockmerge.adapters import LoraLike
from blockmerge.checkpoints import CheckpointLike
from blockmerge.errors import RecipeError
from blockmerge.merging.planning.request import make_request
from blockmerge.merging.recipe import Recipe
from blockmerge.merging.result import MergeResult
from blockmerge.methods import BAKE
from blockmerge.streaming import Progress
from blockmerge.types import DtypeLike, PathLike
from blockmerge.weights import WeightsRequest


def bake(
    model: CheckpointLike,
    loras: Sequence[LoraLike],
    *,
    output: PathLike,
    partial: bool = False,
    naming: str | None = None,
    vae: CheckpointLike = "auto",
    dtype: DtypeLike = "keep",
    ema: str = "drop",
    prune: bool = False,
    variant: str | None = None,
    configs: PathLike | None = None,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Put LoRAs into a model for good, as strong as they would be at run time.

    >>> blockmerge.bake("model.safetensors", [("style.safetensors", 0.8)], output="styled.safetensors")
    ... # doctest: +SKIP

    - `model`: a path, an opened checkpoint, a state dict or a recipe.
    - `loras`: paths, ``(path, strength)``, ``(path, strength, blocks)``, texts such as
      ``"style.safetensors:0.8:OUTALL"``, or `Lora` objects.
    - `partial`: leave out modules that meet no tensor, instead of refusing the LoRA.

    The other arguments are those of `convert` and `merge`. The changes are added up in float32 and rounded
    once; for an output in fp32, in float64.

    Raises what `merge` raises.
    """
    request = make_request(
        BAKE,
        {},
        WeightsRequest(),
        WeightsRequest(beta=True),
        loras=loras,
        partial=partial,
        naming=naming,
        vae=vae,
        dtype=str(dtype),
        ema=ema,
        prune=prune,
        variant=variant,
        configs=configs,
        allow_nonfinite=allow_nonfinite,
    )
    if not request.loras:
        raise RecipeError("no LoRA to bake in: give at least one")
    recipe = Recipe.of((model,), request)
    return recipe.run(
        output, device=device, threads=threads, overwrite=overwrite, dry_run=dry_run, progress=progress
    )

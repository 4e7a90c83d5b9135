"""`convert`: one model under other names, in another container or dtype.

It is a merge of one model, with the method that does nothing.
"""

from __future__ import annotations

from blockmerge.checkpoints import CheckpointLike
from blockmerge.merging.planning.request import MergeRequest
from blockmerge.merging.recipe import Recipe
from blockmerge.merging.result import MergeResult
from blockmerge.methods import IDENTITY
from blockmerge.streaming import Progress
from blockmerge.types import DtypeLike, PathLike
from blockmerge.weights import WeightsRequest


def convert(
    source: CheckpointLike,
    output: PathLike,
    *,
    naming: str | None = None,
    only: str | None = None,
    vae: CheckpointLike = "auto",
    dtype: DtypeLike = "keep",
    ema: str = "drop",
    prune: bool = False,
    variant: str | None = None,
    configs: PathLike | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Write a model in another container, dtype or naming.

    >>> blockmerge.convert("model.ckpt", "model.safetensors", dtype="fp16")  # doctest: +SKIP
    >>> blockmerge.convert("model.safetensors", "folder/", naming="diffusers")  # doctest: +SKIP

    - `source`: a path, an opened checkpoint, a state dict or a recipe.
    - `output`: a path that ends in ``.safetensors``, or a folder.
    - `naming`: ``"ldm"`` for one file, ``"diffusers"`` for a folder. The default is what the source is, or
      one file where `output` ends in ``.safetensors``.
    - `only`: write one component: ``"unet"`` (or ``"transformer"``), ``"vae"``, ``"text_encoder"``,
      ``"text_encoder_2"`` or ``"text_encoder_3"``. A VAE or a text encoder alone needs no `only`.
    - `vae`: another VAE to bake in: a file, a folder, an opened checkpoint or a state dict.
    - `ema`: ``"drop"`` EMA copies, ``"keep"`` them, or ``"use"`` them as the U-Net.
    - `prune`: leave out tensors that no program needs.
    - `configs`: a diffusers folder whose configs and tokenizers go into a new folder, or a tokenizer's
      folder.

    The other arguments are those of `merge`. Values change with `dtype` alone, but broken `position_ids`
    become whole numbers again. Tensors that the output has no place for are left out and named in the notes.

    Raises what `merge` raises.
    """
    request = MergeRequest(
        WeightsRequest(),
        method=IDENTITY,
        vae=vae,
        dtype=str(dtype),
        allow_nonfinite=allow_nonfinite,
        naming=naming,
        ema=ema,
        prune=prune,
        configs=configs,
        only=only,
        variant=variant,
    )
    return Recipe.of((source,), request).run(
        output, threads=threads, overwrite=overwrite, dry_run=dry_run, progress=progress
    )

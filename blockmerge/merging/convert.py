"""`convert`: one model under other names, in another container or dtype.

It is a merge of one model, with the method that does nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from blockmerge.checkpoints import CheckpointLike
from blockmerge.merging.planning.request import MergeRequest
from blockmerge.merging.recipe import Recipe
from blockmerge.merging.result import MergeResult
from blockmerge.methods import IDENTITY
from blockmerge.streaming import Progress
from blockmerge.weights import WeightsRequest

if TYPE_CHECKING:
    import torch


def convert(
    source: CheckpointLike,
    output: str | os.PathLike[str],
    *,
    naming: str | None = None,
    only: str | None = None,
    vae: CheckpointLike = "auto",
    dtype: str | torch.dtype = "keep",
    ema: str = "drop",
    prune: bool = False,
    variant: str | None = None,
    configs: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Write a model as a `.safetensors` file or a diffusers folder.

    >>> blockmerge.convert("model.ckpt", "model.safetensors", dtype="fp16")  # doctest: +SKIP

    `naming` is ``"ldm"`` (a single file) or ``"diffusers"`` (a folder); without it the output is what the
    source is, or a single file where its name ends in ``.safetensors``. `only` writes one component
    (``"unet"``, also called ``"transformer"``, ``"vae"``, ``"text_encoder"``, ``"text_encoder_2"``,
    ``"text_encoder_3"``), as a file or as its own folder; a VAE or a text encoder alone is converted without
    it, too. `vae` bakes in another VAE (a file, a
    folder, an opened checkpoint or a state dict). `ema` says what becomes of EMA copies: ``"drop"``,
    ``"keep"``, or ``"use"`` them as the U-Net. `variant` picks the weights of folders that have several
    (``"fp16"``), the VAE's too. `prune` leaves out what is known to be dead. `configs` is a
    diffusers folder whose configs and tokenizers go beside the weights of a new folder, or a tokenizer's
    folder alone. The other arguments are those of `merge`.

    Values change with `dtype` only, but that `position_ids` which are broken, or floats, become whole numbers
    again. Tensors that the output has no place for are left out and named in the result's notes.

    Raises a BlockmergeError, as `merge` does.
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
    return Recipe.of((source,), request).run(output, threads=threads, overwrite=overwrite, progress=progress)

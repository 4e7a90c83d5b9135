"""`merge`: models in, one output out. It is a recipe that is run at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockmerge.adapters import LoraLike
from blockmerge.checkpoints import CheckpointLike
from blockmerge.merging.planning.request import make_request
from blockmerge.merging.recipe import Recipe
from blockmerge.merging.result import MergeResult
from blockmerge.methods import MethodLike
from blockmerge.streaming import Progress
from blockmerge.types import DtypeLike, PathLike
from blockmerge.weights import AdjustLike, RulesLike, WeightsLike, WeightsRequest


def merge(
    *models: CheckpointLike,
    output: PathLike,
    preset: str | Sequence[str] | None = None,
    weights: WeightsLike | None = None,
    changes: str | None = None,
    method: MethodLike = "weighted_sum",
    preset_beta: str | Sequence[str] | None = None,
    weights_beta: WeightsLike | None = None,
    changes_beta: str | None = None,
    rules: RulesLike = "",
    adjust: AdjustLike = "",
    clip: bool = False,
    seed: int = 0,
    vae: CheckpointLike = "auto",
    text_encoder: str = "auto",
    dtype: DtypeLike = "keep",
    sdxl_map: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    naming: str | None = None,
    ema: str = "drop",
    configs: PathLike | None = None,
    variant: str | None = None,
    loras: Sequence[LoraLike] = (),
    partial: bool = False,
    about: Mapping[str, str] | None = None,
    hash: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    **numbers: Any,
) -> MergeResult:
    """Merge models block by block into a new file or folder.

    >>> blockmerge.merge("a.safetensors", "b.ckpt", weights=0.5, output="c.safetensors")  # doctest: +SKIP
    >>> blockmerge.merge("a/", "b/", "c/", method="add_difference", weights=1, output="d/")  # doctest: +SKIP

    What is merged:

    - `models`: paths, opened checkpoints, state dicts or recipes. The first is A.
    - `output`: a path that ends in ``.safetensors``, or a folder for the diffusers layout.
    - `method`: how values are combined. `list_methods` has all names.
    - `numbers`: the method's own numbers, by name.
    - `loras`: LoRAs that are added to the merge, as `bake` takes them.
    - `partial`: leave out a LoRA's modules that meet no tensor, instead of refusing it.

    How much of each model:

    - `weights`: how much of B each block takes, from 0 (all A) to 1 (all B). See `WeightsLike`.
    - `preset`: the name or file of a preset, in place of `weights`. A list such as ``["high_res@0.6",
      "GRAD_A@0.4"]`` adds several up.
    - `changes`: weights of single blocks on top, such as ``"BASE=0.5,OUT11=1"``.
    - `weights_beta`, `preset_beta`, `changes_beta`: the same for methods with a second weight.
    - `sdxl_map`: ``"name"`` or ``"resolution"``, how 26 weights go to the 20 blocks of SDXL.
    - `rules`: weights of single tensors. `docs/rules.md` describes them, `adjust` and `clip`.
    - `adjust`: eight numbers that change detail and colour.
    - `clip`: keep each value between those of A and B.
    - `seed`: for random weights, and for methods that draw random numbers.

    What comes from one model:

    - `vae`: ``"auto"``, a letter such as ``"a"``, ``"blend"``, or a VAE. ``"auto"`` takes A's where BASE is
      at most 0.5, else B's.
    - `text_encoder`: ``"auto"``, ``"a"`` or ``"blend"``. ``"auto"`` keeps A's in families that use published
      text encoders.
    - `ema`: ``"drop"`` EMA copies, ``"keep"`` them, or ``"use"`` them as the U-Net.
    - `variant`: which weights of a folder are read where it has several, such as ``"fp16"``.

    What is written:

    - `dtype`: the dtype of all weights. ``"keep"`` gives each tensor the one that it has in A.
    - `naming`: ``"ldm"`` for one file or ``"diffusers"`` for a folder. The default is A's.
    - `configs`: a diffusers folder whose configs and tokenizers go into a new folder.
    - `about`: ``title``, ``author``, ``license`` and ``description``, for the metadata.
    - `hash`: record the SHA-256 of each model, too.
    - `overwrite`: replace an output that exists.
    - `allow_nonfinite`: write NaN and infinity instead of refusing them.
    - `dry_run`: write nothing. The result says what would be written, and a note if the output exists.

    How it runs:

    - `device`: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"auto"``.
    - `threads`: the number of workers. The default is twice the processors, at most 8.
    - `progress`: called as ``progress(done, total)``, in bytes.

    Values are computed in float32 or wider and rounded once. The models are never changed, and the output
    appears complete or not at all.

    Raises a `BlockmergeError`. Everything that headers tell is checked before a weight is read.
    """
    request = make_request(
        method,
        numbers,
        WeightsRequest(preset, weights, changes, sdxl_map, seed=seed),
        WeightsRequest(preset_beta, weights_beta, changes_beta, sdxl_map, seed=seed, beta=True),
        vae=vae,
        text_encoder=text_encoder,
        dtype=str(dtype),
        allow_nonfinite=allow_nonfinite,
        naming=naming,
        ema=ema,
        configs=configs,
        variant=variant,
        rules=rules,
        adjust=adjust,
        clip=clip,
        loras=loras,
        partial=partial,
        about=about or {},
        hash=hash,
        arguments=merge.__kwdefaults__,
    )
    return Recipe.of(models, request).run(
        output, device=device, threads=threads, overwrite=overwrite, dry_run=dry_run, progress=progress
    )

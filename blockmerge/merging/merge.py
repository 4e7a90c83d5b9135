"""`merge`: models in, one output out. It is a recipe that is run at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blockmerge.adapters import LoraLike
from blockmerge.checkpoints import CheckpointLike
from blockmerge.merging.planning.request import make_request
from blockmerge.merging.recipe import Recipe
from blockmerge.merging.result import MergeResult
from blockmerge.methods import MethodLike
from blockmerge.streaming import Progress
from blockmerge.types import DtypeLike, PathLike
from blockmerge.weights import AdjustLike, RulesLike, WeightsLike, WeightsRequest

if TYPE_CHECKING:
    pass


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
    """Merge models, block by block, into a new `.safetensors` file or diffusers folder.

    >>> blockmerge.merge("a.safetensors", "b.ckpt", weights=0.5, output="c.safetensors")  # doctest: +SKIP

    `models`: paths, opened checkpoints or state dicts; the first is A. `method` is a method's name (as many
    models as it takes), ``"module:function"``, or a function decorated with `merge_method`. One of `preset`
    (a name or a file, or several with their shares, ``["high_res@0.6", "GRAD_A@0.4"]``) and `weights` (all
    that ``--weights`` takes, a number, a sequence, a mapping, a BlockWeights) says how much of B each block
    takes; `changes` (``"BASE=0.5,OUT11=1"``) goes on top. The same with `_beta` for methods with a second
    weight. `rules` are element rules (a text, a list of texts, or ElementRules), `adjust` eight numbers
    (``"0,0,0,1"``, a list, or an Adjust), `clip` limits results to what lies between A and B, `seed` is for
    random weights and methods of chance; `numbers` are the method's own. `dtype` is ``"keep"`` (each tensor
    keeps A's) or ``"fp16"``, ``"bf16"``, ``"fp32"``, ``"fp8_e4m3fn"``, ``"fp8_e5m2"``, or torch's own.

    `vae` is ``"auto"`` (whole, from A when BASE is at most 0.5, else from B), ``"a"``, ``"b"``, ``"blend"``,
    or a VAE (a file, an opened checkpoint or a state dict). `text_encoder` is ``"auto"``, ``"a"`` or
    ``"blend"``: text encoders follow BASE, but are A's in families that use them as published. `naming` is
    the output's, ``"ldm"`` (a single file) or ``"diffusers"`` (a folder), by default A's. `ema` says what
    becomes of EMA copies: ``"drop"``, ``"keep"``, or ``"use"`` them as the U-Net. `variant` picks the weights
    of folders that have several (``"fp16"``), where they have it, the VAE's too, and `configs` is a diffusers
    folder whose configs and tokenizers go into a new one, or a tokenizer's folder alone. `progress(done,
    total)` is told the bytes.

    `loras` are added to the merge before it is rounded: paths, ``(path, strength)``, ``(path, strength,
    blocks)``, texts as ``"style.safetensors:0.8:OUTALL"``, or `Lora` objects. A module that meets no tensor
    is an error, unless `partial` leaves it out.

    `about` goes into the metadata as ModelSpec has it: ``{"title", "author", "license", "description"}``, any
    of them. With `hash`, the models are recorded by their SHA-256s, too, and the web UI's keys say so.

    All checks that headers allow are made before a weight is read. The models are never changed. The output
    appears complete or not at all.

    Raises a BlockmergeError: see `blockmerge.errors` for which and when.
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

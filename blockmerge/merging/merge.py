"""`merge`: models in, one file out."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockmerge.checkpoints import (
    Checkpoint,
    CheckpointLike,
    DiffusersFolder,
    Model,
    check_space,
    open_checkpoint,
    state_dict_name,
    told_apart,
)
from blockmerge.merging.execute import Pace, execute
from blockmerge.merging.outputs import choose_output
from blockmerge.merging.planning.plan import Plan, make_plan
from blockmerge.merging.planning.recipe import Recipe, check_flag, make_recipe
from blockmerge.merging.result import MergeResult
from blockmerge.streaming import Progress
from blockmerge.weights import WeightsLike, WeightsRequest

if TYPE_CHECKING:
    import torch


def merge(
    *models: CheckpointLike,
    output: str | os.PathLike[str],
    preset: str | Sequence[str] | None = None,
    weights: WeightsLike | None = None,
    changes: str | None = None,
    method: object = "weighted_sum",
    preset_beta: str | Sequence[str] | None = None,
    weights_beta: WeightsLike | None = None,
    changes_beta: str | None = None,
    rules: str = "",
    adjust: str = "",
    clip: bool = False,
    seed: int = 0,
    vae: CheckpointLike = "auto",
    dtype: str | torch.dtype = "keep",
    sdxl_map: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    naming: str | None = None,
    ema: str = "drop",
    configs: str | os.PathLike[str] | None = None,
    variant: str | None = None,
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
    weight. `rules` are element rules, `adjust` eight numbers (``"0,0,0,1"``), `clip` limits results to what
    lies between A and B, `seed` is for random weights and methods of chance; `numbers` are the method's own.
    `dtype` is ``"keep"`` (each tensor keeps A's) or ``"fp16"``, ``"bf16"``, ``"fp32"``, ``"fp8_e4m3fn"``,
    ``"fp8_e5m2"``, or torch's own. `vae` is ``"auto"`` (whole, from A when BASE is at most 0.5, else from B),
    ``"a"``, ``"b"``, ``"blend"``, or a VAE (a file, an opened checkpoint or a state dict). `naming` is the
    output's, ``"ldm"`` (a single file) or ``"diffusers"`` (a folder), by default A's. `ema` says what becomes
    of EMA copies: ``"drop"``, ``"keep"``, or ``"use"`` them as the U-Net. `variant` picks the weights of
    folders that have several (``"fp16"``), and `configs` is a folder whose configs and tokenizers go into a
    new one. `progress(done, total)` is told the bytes.

    All checks that headers allow are made before a weight is read. The models are never changed. The output
    appears complete or not at all.

    Raises a BlockmergeError: see `blockmerge.errors` for which and when.
    """
    recipe = make_recipe(
        method,
        numbers,
        WeightsRequest(preset, weights, changes, sdxl_map, seed=seed),
        WeightsRequest(preset_beta, weights_beta, changes_beta, sdxl_map, seed=seed, beta=True),
        vae=vae,
        dtype=str(dtype),
        allow_nonfinite=allow_nonfinite,
        naming=naming,
        ema=ema,
        configs=configs,
        rules=rules,
        adjust=adjust,
        clip=clip,
        arguments=merge.__kwdefaults__,
    )
    return run(
        recipe,
        models,
        output,
        device=device,
        threads=threads,
        overwrite=overwrite,
        variant=variant,
        progress=progress,
    )


def run(
    recipe: Recipe,
    models: tuple[CheckpointLike, ...],
    output: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Carry out a recipe: plan, reserve, execute, commit."""
    started = time.perf_counter()
    device, pace = _choose_pace(recipe, str(device), threads)
    plan, target = _prepare(recipe, models, output, overwrite, variant)
    sizes: dict[str, int | bytes] = {file.path: file.size for file in plan.files}
    with plan.output.reserve(target, {**plan.small_files, **sizes}, overwrite=overwrite) as reserved:
        execute(plan, reserved.path_of, pace, device, progress, shown_as=target)
        reserved.commit()
        swept = reserved.swept
    return _result(plan, target, time.perf_counter() - started, swept)


def dry_run(
    recipe: Recipe,
    models: tuple[CheckpointLike, ...],
    output: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    variant: str | None = None,
) -> MergeResult:
    """Make all checks that need no weights, and the plan, and write nothing.

    Raises what `run` would raise before it reads a weight.
    """
    started = time.perf_counter()
    _choose_pace(recipe, str(device), threads)
    plan, target = _prepare(recipe, models, output, overwrite, variant)
    check_space(target, plan.size)
    return _result(plan, target, time.perf_counter() - started, (), dry=True)


def _choose_pace(recipe: Recipe, device: str, threads: int | None) -> tuple[str, Pace]:
    pace = Pace.default(threads)
    if device == "cpu":
        return device, pace
    from blockmerge.merging.kernel import choose_device

    device = choose_device(device, recipe.merge_method if recipe.method is not None else None)
    if device == "cpu":
        return device, pace
    # A GPU is worth asking for whole pieces only.
    return device, Pace(pace.threads, pace.piece_bytes, chunk_bytes=pace.piece_bytes)


def _prepare(
    recipe: Recipe,
    models: tuple[CheckpointLike, ...],
    output: str | os.PathLike[str],
    overwrite: bool,
    variant: str | None,
) -> tuple[Plan, Path]:
    check_flag("overwrite", overwrite)
    recipe.check_model_count(len(models))
    checkpoints = _open(models, variant)
    labels = told_apart(checkpoints)
    opened = [
        Model.of(checkpoint, recipe.ema, label) for checkpoint, label in zip(checkpoints, labels, strict=True)
    ]
    form = choose_output(output, opened[0], recipe.naming, recipe.configs)
    plan = make_plan(opened, recipe, form)
    inputs = [file for checkpoint in plan.decided.checkpoints for file in checkpoint.files]
    inputs += [model.source.path for model in opened if isinstance(model.source, DiffusersFolder)]
    inputs += (
        [Path(path)]
        if isinstance(path := getattr(recipe.configs, "path", recipe.configs), (str, os.PathLike))
        else []
    )
    return plan, form.check(inputs, overwrite=overwrite)


def _open(models: Sequence[CheckpointLike], variant: str | None) -> list[Checkpoint]:
    """Open the models; a variant is for those that are folders."""
    folders = [isinstance(model, (str, os.PathLike)) and os.path.isdir(model) for model in models]
    return [
        open_checkpoint(
            model, name=state_dict_name(number), variant=variant if folder or not any(folders) else None
        )
        for number, (model, folder) in enumerate(zip(models, folders, strict=True))
    ]


def _result(
    plan: Plan, target: Path, seconds: float, swept: tuple[str, ...], *, dry: bool = False
) -> MergeResult:
    recipe = plan.recipe
    return MergeResult(
        output=target,
        family=plan.anatomy.family.name,
        variant=plan.anatomy.variant,
        naming=plan.output.naming,
        method=recipe.method_name,
        preset=recipe.weights.label if recipe.weights.preset is not None else None,
        weights=dict(plan.weights) if recipe.method is not None else {},
        weights_beta=dict(plan.beta)
        if recipe.method is not None and "beta" in recipe.merge_method.weights
        else None,
        models=tuple(plan.models),
        tensors=plan.decided.counts,
        bytes=plan.size,
        seconds=seconds,
        notes=(*plan.decided.notes, *swept),
        runs=sum(len(file.runs) for file in plan.files),
        recipe=recipe.described(plan.models, plan.weights, plan.beta),
        dry_run=dry,
    )

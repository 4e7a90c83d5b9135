"""`merge`: models in, one file out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from blockmerge.checkpoints import (
    AtomicFile,
    Checkpoint,
    CheckpointLike,
    check_output,
    check_space,
    open_checkpoint,
)
from blockmerge.errors import OutputError, shown
from blockmerge.merging.execute import Pace, execute
from blockmerge.merging.plan import Plan, make_plan
from blockmerge.merging.recipe import Recipe, check_numbers
from blockmerge.merging.result import MergeResult
from blockmerge.streaming import Progress
from blockmerge.weights import WeightsLike, WeightsRequest

if TYPE_CHECKING:
    import torch


def merge(
    *models: CheckpointLike,
    output: str | os.PathLike[str],
    preset: str | None = None,
    weights: WeightsLike | None = None,
    changes: str | None = None,
    method: str = "weighted_sum",
    preset_beta: str | None = None,
    weights_beta: WeightsLike | None = None,
    vae: CheckpointLike = "auto",
    dtype: str | torch.dtype = "keep",
    sdxl_map: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    **numbers: float,
) -> MergeResult:
    """Merge models, block by block, into a new `.safetensors` file.

    >>> blockmerge.merge("a.safetensors", "b.safetensors", preset="high_res", output="out.safetensors")  # doctest: +SKIP

    `models`: paths, opened checkpoints or state dicts; the first is A. Exactly one of `preset` (a name or a file) and
    `weights` (all that ``--weights`` takes, a number, a sequence, a mapping, a BlockWeights) says how much of B each
    block takes; `changes` (``"BASE=0.5,OUT11=1"``) goes on top. `dtype` is ``"keep"`` (each tensor keeps A's) or
    ``"fp16"``, ``"bf16"``, ``"fp32"``, ``"fp8_e4m3fn"``, ``"fp8_e5m2"``, or torch's own. `vae` is ``"auto"``
    (whole, from A when BASE is at most 0.5, else from B), ``"a"``, ``"b"``, ``"blend"``, or a VAE (a file, an opened
    checkpoint or a state dict). `progress(done, total)` is told the bytes.

    All checks that headers allow are made before a weight is read. The models are never changed. The output appears
    complete or not at all.

    Raises a BlockmergeError: see `blockmerge.errors` for which and when.
    """
    check_numbers(method, preset_beta, weights_beta, numbers)
    recipe = Recipe(WeightsRequest(preset, weights, changes, sdxl_map), method, vae, str(dtype), allow_nonfinite)
    return run(recipe, models, output, device=device, threads=threads, overwrite=overwrite, progress=progress)


def run(
    recipe: Recipe,
    models: tuple[CheckpointLike, ...],
    output: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Carry out a recipe: plan, reserve, execute, commit."""
    started = time.perf_counter()
    plan, target = _prepare(recipe, models, output, overwrite)
    device, pace = _choose_pace(str(device), threads)
    with AtomicFile(target, plan.size, overwrite=overwrite) as file:
        execute(plan, file.path, pace, device, progress, shown_as=target)
        file.commit()
        swept = file.swept
    return _result(plan, target, time.perf_counter() - started, swept)


def dry_run(
    recipe: Recipe,
    models: tuple[CheckpointLike, ...],
    output: str | os.PathLike[str],
    *,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
) -> MergeResult:
    """Make all checks that need no weights, and the plan, and write nothing.

    Raises what `run` would raise before it reads a weight.
    """
    started = time.perf_counter()
    plan, target = _prepare(recipe, models, output, overwrite)
    _choose_pace(device, threads)
    check_space(target, plan.size)
    return _result(plan, target, time.perf_counter() - started, (), dry=True)


def _choose_pace(device: str, threads: int | None) -> tuple[str, Pace]:
    pace = Pace.default(threads)
    if device == "cpu":
        return device, pace
    from blockmerge.merging.kernel import choose_device

    device = choose_device(device)
    if device == "cpu":
        return device, pace
    # A GPU is worth asking for whole pieces only.
    return device, Pace(pace.threads, pace.piece_bytes, chunk_bytes=pace.piece_bytes)


def _prepare(
    recipe: Recipe, models: tuple[CheckpointLike, ...], output: str | os.PathLike[str], overwrite: bool
) -> tuple[Plan, Path]:
    recipe.check_model_count(len(models))
    checkpoints = [open_checkpoint(model, name=f"state dict {letter}") for model, letter in zip(models, "ABCDEFGH", strict=False)]
    plan = make_plan(checkpoints, recipe)
    _check_output_name(output)
    inputs = [file for checkpoint in plan.checkpoints.values() for file in checkpoint.files]
    return plan, check_output(output, inputs, overwrite=overwrite)


def _check_output_name(output: object) -> None:
    if not isinstance(output, (str, os.PathLike)):
        raise OutputError(f"the output is a path; {type(output).__name__} given")
    name = os.fspath(output)
    if not name:
        raise OutputError("the output's name is empty: give the name of a .safetensors file")
    if name.endswith(("/", os.sep)) or os.path.isdir(name):
        raise OutputError(f"{shown(name)} is a folder: give the output a file name")
    if not name.lower().endswith(".safetensors"):
        raise OutputError(f"{shown(name)}: the output is a .safetensors file; end its name so")


def default_output(recipe: Recipe, models: tuple[str, ...]) -> Path:
    """Return where a merge goes when nobody says: `<A>+<B>-<preset or weight>.safetensors` in the current folder."""
    names = "+".join(Path(model).stem for model in models)
    label = "".join(char if char.isalnum() or char in "._-+" else "_" for char in recipe.weights.label)
    return Path(f"{names}-{label}.safetensors")


def _result(plan: Plan, target: Path, seconds: float, swept: tuple[str, ...], *, dry: bool = False) -> MergeResult:
    recipe = plan.recipe
    models: list[Checkpoint] = list(plan.checkpoints.values())[: recipe.merge_method.models]
    return MergeResult(
        output=target,
        family=plan.anatomy.family.name,
        variant=plan.anatomy.variant,
        naming=plan.anatomy.naming,
        method=recipe.method,
        preset=recipe.weights.label if recipe.weights.preset is not None else None,
        weights=dict(plan.weights),
        models=tuple(model.name for model in models),
        tensors=plan.decided.counts,
        bytes=plan.size,
        seconds=seconds,
        notes=(*plan.decided.notes, *swept),
        runs=len(plan.runs),
        dry_run=dry,
    )

"""The same merge on state dicts in memory, on whatever device they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

from blockmerge.adapters import LoraLike
from blockmerge.checkpoints import CheckpointLike, Model, StateDict, state_dict_name
from blockmerge.dtypes import FLOAT_DTYPES, torch_dtype
from blockmerge.errors import CheckpointError, NonFiniteError, RecipeError, counted, listing, shown
from blockmerge.expressions import Programs
from blockmerge.merging.planning.adapting import Adapted
from blockmerge.merging.planning.naming import OutputTensor
from blockmerge.merging.planning.plan import to_gather
from blockmerge.merging.planning.policies import decide
from blockmerge.merging.planning.request import check_flag, is_vae_of_models, make_request
from blockmerge.methods import MethodLike
from blockmerge.weights import AdjustLike, RulesLike, WeightsLike, WeightsRequest

if TYPE_CHECKING:
    import torch

    from blockmerge.merging.in_memory import Task

_SHARED = 1 << 22
"""Elements of a tensor that a processor's threads share, so many each."""

_ALONE = 1 << 22
"""Elements of a tensor that keeps a GPU busy on its own, if it has more."""

_TOGETHER = 1 << 25
"""Elements of smaller tensors that are laid side by side and computed in one launch, on a GPU."""


def merge_state_dicts(
    *state_dicts: Mapping[str, torch.Tensor],
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
    sdxl_map: str | None = None,
    vae: str = "auto",
    text_encoder: str = "auto",
    loras: Sequence[LoraLike] = (),
    partial: bool = False,
    check_finite: bool = False,
    **numbers: Any,
) -> dict[str, torch.Tensor]:
    """Merge state dicts in memory, block by block, into a new one.

    >>> merged = blockmerge.merge_state_dicts(a, b, preset="high_res")  # doctest: +SKIP

    `state_dicts` are {name: tensor}, of a U-Net, a transformer or a whole model. Their names are LDM's or
    those of diffusers, and their devices may differ.

    The result has A's names, shapes and dtypes. Each tensor is a new one on the device of A's, or of B's
    where only B has it. Tensors that A has in scaled fp8 become bfloat16.

    The values are those that `merge` writes, and the other arguments are those of `merge`. `check_finite`
    looks for NaN and infinity, which waits for the GPU.

    Without it, a GPU is waited for only where its data is needed on the CPU: `position_ids`, scales of fp8
    weights, a table of noise, and tensors that change devices.

    Raises `NonFiniteError` with `check_finite`, else what `merge` raises before it reads a weight.
    """
    _check_vae(vae, len(state_dicts))
    check_flag("check_finite", check_finite)
    request = make_request(
        method,
        numbers,
        WeightsRequest(preset, weights, changes, sdxl_map, seed=seed),
        WeightsRequest(preset_beta, weights_beta, changes_beta, sdxl_map, seed=seed, beta=True),
        rules=rules,
        adjust=adjust,
        clip=clip,
        arguments=merge_state_dicts.__kwdefaults__,
        vae=vae,
        text_encoder=text_encoder,
        loras=loras,
        partial=partial,
    )
    request.check_model_count(len(state_dicts))
    for given in state_dicts:
        if not isinstance(given, Mapping):
            raise CheckpointError(
                f"a {type(given).__name__} is not a state dict: give a dict of tensors (merge() takes files)"
            )
    from blockmerge.merging.devices import devices_in, told_of

    devices = set(devices_in(*state_dicts))
    with told_of(devices, "merge state dicts on the CPU, or files"):
        models = [
            Model.of(StateDict(tensors, state_dict_name(number)))
            for number, tensors in enumerate(state_dicts)
        ]
        resolved = request.resolve(models[0].anatomy.family, len(models))
        adapted = Adapted.of(request, models)
        merged = _compute(models, decide(models, request, resolved, adapted=adapted).tensors, devices)
        if check_finite:
            _check_finite(merged)
    return _spelled_as(state_dicts[0], merged)


def _compute(
    models: Sequence[Model], tensors: Sequence[OutputTensor], devices: Collection[torch.device]
) -> dict[str, torch.Tensor]:
    import torch

    from blockmerge.merging.in_memory import compute_in_threads, compute_together, gather, tasks_of

    merged: dict[str, torch.Tensor] = {}
    on_cpu: list[Task] = []
    elsewhere: list[Task] = []
    programs = Programs()
    with torch.no_grad():
        figures = {one: gather(one) for one in to_gather(one.expression for one in tensors)}
        for one in tensors:
            out = merged[one.name] = _empty(models, one)
            is_cpu = out.device.type == "cpu"
            most = _SHARED if is_cpu else max(1, out.numel())
            (on_cpu if is_cpu else elsewhere).extend(tasks_of(one.expression, out, programs, most, one.ldm))
        compute_in_threads(on_cpu, figures, devices)
        compute_together(elsewhere, figures, _ALONE, _TOGETHER)
    return merged


def _empty(models: Sequence[Model], tensor: OutputTensor) -> torch.Tensor:
    """Memory for a tensor of the result, on the device of the first model that has it."""
    import torch

    from blockmerge.merging.in_memory import device_of

    holder = next(model for model in models if tensor.ldm in model.tensors)
    device = device_of(holder.tensors[tensor.ldm])
    return torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device=device)


def _check_finite(merged: Mapping[str, torch.Tensor]) -> None:
    from blockmerge.streaming.tensors import all_finite

    floats = [torch_dtype(dtype) for dtype in FLOAT_DTYPES]

    weights = ((name, tensor) for name, tensor in merged.items() if tensor.dtype in floats and tensor.numel())
    nonfinite = [name for name, tensor in weights if not all_finite(tensor)]
    if nonfinite:
        raise NonFiniteError(
            f"{counted(len(nonfinite), 'merged tensor')} with NaN or infinity: {listing(nonfinite)}"
        )


def _spelled_as(a: Mapping[str, torch.Tensor], merged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole models in diffusers' names with dots between component and name, where A has them so."""
    if any("/" in name for name in a):
        return merged
    return {name.replace("/", ".", 1): tensor for name, tensor in merged.items()}


def _check_vae(vae: CheckpointLike, models: int) -> None:
    """Raise RecipeError when a merge of state dicts is asked for a VAE that is none of theirs."""
    if not is_vae_of_models(vae, models):
        words = ", ".join(["auto", *ascii_lowercase[: max(1, models)]])
        raise RecipeError(f"unknown VAE choice '{shown(vae)}': {words} or blend")

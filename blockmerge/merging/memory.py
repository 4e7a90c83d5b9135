"""The same merge on state dicts in memory, on whatever device they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from blockmerge.anatomy import Origin
from blockmerge.checkpoints import Model, StateDict
from blockmerge.errors import CheckpointError, NonFiniteError, listing
from blockmerge.merging.decisions import SHARED_CHANNELS, Decision, check_vae_option, decide
from blockmerge.merging.recipe import Recipe, check_numbers
from blockmerge.weights import WeightsLike, WeightsRequest

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 22  # elements combined at once, so that wider intermediate values stay small


def merge_state_dicts(
    *state_dicts: Mapping[str, torch.Tensor],
    preset: str | None = None,
    weights: WeightsLike | None = None,
    method: str = "weighted_sum",
    preset_beta: str | None = None,
    weights_beta: WeightsLike | None = None,
    vae: str = "auto",
    check_finite: bool = False,
    **numbers: float,
) -> dict[str, torch.Tensor]:
    """Merge state dicts, block by block, into a new one.

    >>> merged = blockmerge.merge_state_dicts(a, b, preset="high_res")  # doctest: +SKIP

    The dicts are U-Nets or whole models, in LDM or diffusers names (`unet.…`, `vae.…` and so on for whole models), all on
    one device or several; the result has A's names, and every tensor of it is a new one on the device of A's (of B's, where
    only B has it), with A's dtype. The values are those that `merge` writes. NaN and infinity are looked for only with
    `check_finite`, since that waits for the GPU.

    Raises a BlockmergeError: NonFiniteError with `check_finite`, else as `merge` does before it reads a weight.
    """
    import torch

    from blockmerge.streaming.tensors import TORCH_DTYPES, all_finite

    check_numbers(method, preset_beta, weights_beta, numbers)
    check_vae_option(vae)
    recipe = Recipe(WeightsRequest(preset, weights), method, vae)
    recipe.check_model_count(len(state_dicts))
    for given in state_dicts:
        if not isinstance(given, Mapping):
            raise CheckpointError(f"a {type(given).__name__} is no state dict: give a dict of tensors (merge() takes files)")
    models = [
        Model.of(StateDict(tensors, f"state dict {letter}")) for tensors, letter in zip(state_dicts, "ABCDEFGH", strict=False)
    ]
    decided = decide(models, recipe, recipe.weights.resolve(models[0].anatomy.family.name))
    merged: dict[str, torch.Tensor] = {}
    nonfinite: list[str] = []

    def tensor_of(number: int, decision: Decision) -> torch.Tensor:
        return _made(state_dicts[number], decided.views[number].origins[decision.key])

    def holder_of(decision: Decision) -> int:
        return next(number for number, view in decided.views.items() if decision.key in view.tensors)

    with torch.no_grad():
        for decision in decided.tensors:
            if decision.literal is not None:
                positions = torch.frombuffer(bytearray(decision.literal), dtype=torch.int64).view(decision.shape)
                merged[decision.name] = positions.to(tensor_of(holder_of(decision), decision).device)
                continue
            inputs = [tensor_of(number, decision) for number in decision.sources]
            device = tensor_of(holder_of(decision), decision).device
            dtype = TORCH_DTYPES.get(decision.dtype, inputs[0].dtype)
            out = torch.empty(decision.shape, dtype=dtype, device=device)
            target = out
            if decision.wider is not None:
                wide = tensor_of(decision.wider, decision)
                out[:, SHARED_CHANNELS:] = wide[:, SHARED_CHANNELS:].to(device)
                inputs = [tensor[:, :SHARED_CHANNELS] for tensor in inputs]
                target = torch.empty_like(out[:, :SHARED_CHANNELS], memory_format=torch.contiguous_format)
            _combine([tensor.to(device) for tensor in inputs], decision, recipe, target)
            if decision.wider is not None:
                out[:, : target.shape[1]] = target
            if check_finite and dtype in TORCH_DTYPES.values() and out.numel() and not all_finite(out):
                nonfinite.append(decision.name)
            merged[decision.name] = out
    if nonfinite:
        raise NonFiniteError(f"{len(nonfinite)} merged tensors hold NaN or infinity: {listing(nonfinite)}")
    return _spelled_as(state_dicts[0], merged)


def _made(tensors: Mapping[str, torch.Tensor], origin: Origin) -> torch.Tensor:
    """The tensor that an origin describes."""
    import torch

    found = [tensors[name].detach() for name in origin.names]
    made = found[0] if len(found) == 1 else torch.cat(found)
    if origin.parts > 1:
        made = made.chunk(origin.parts)[origin.part]
    if origin.transposed and made.dim() == 2:
        made = made.T
    if origin.axes == 4 and made.dim() == 2:
        made = made[:, :, None, None]
    elif origin.axes == 2 and made.dim() == 4:
        made = made[:, :, 0, 0]
    return made


def _spelled_as(a: Mapping[str, torch.Tensor], merged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole models in diffusers' names with dots between component and name, where A has them so."""
    if any("/" in name for name in a):
        return merged
    return {name.replace("/", ".", 1): tensor for name, tensor in merged.items()}


def _combine(inputs: list[torch.Tensor], decision: Decision, recipe: Recipe, target: torch.Tensor) -> None:
    """Write the combination of the inputs into `target`, which is contiguous."""
    from blockmerge.methods.elementwise import cast

    if decision.alpha is None:
        if target.is_floating_point():
            cast(inputs[0], out=target)
        else:
            target.copy_(inputs[0])
        return
    flat = [tensor.contiguous().view(-1) for tensor in inputs]
    out = target.view(-1)
    for start in range(0, out.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        recipe.merge_method.function(*(tensor[part] for tensor in flat), alpha=decision.alpha, out=out[part])

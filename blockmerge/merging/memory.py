"""The same merge on state dicts in memory, on whatever device they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockmerge.anatomy import Origin
from blockmerge.checkpoints import Model, StateDict, state_dict_name
from blockmerge.errors import CheckpointError, NonFiniteError, RecipeError, counted, listing, shown
from blockmerge.merging.planning.decisions import Decision, Decisions, check_vae_option, decide
from blockmerge.merging.planning.plan import Drafter, Work
from blockmerge.merging.planning.request import MergeRequest, check_flag, make_request
from blockmerge.weights import WeightsLike, WeightsRequest

if TYPE_CHECKING:
    import torch

    from blockmerge.merging.kernel import Computation

_TOGETHER = {"cpu": 0}
"""Elements of small tensors that are laid side by side and computed in one launch, by the kind of device."""

_TOGETHER_ON_A_GPU = 1 << 25


def merge_state_dicts(
    *state_dicts: Mapping[str, torch.Tensor],
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
    sdxl_map: str | None = None,
    vae: str = "auto",
    check_finite: bool = False,
    **numbers: Any,
) -> dict[str, torch.Tensor]:
    """Merge state dicts, block by block, into a new one.

    >>> merged = blockmerge.merge_state_dicts(a, b, preset="high_res")  # doctest: +SKIP

    The dicts are U-Nets or whole models, in LDM or diffusers names (`unet.…`, `vae.…` and so on for whole
    models), all on one device or several; the result has A's names, and every tensor of it is a new one on
    the device of A's (of B's, where only B has it), with A's dtype. The values are those that `merge` writes,
    and the arguments its. NaN and infinity are looked for only with `check_finite`, since that waits for the
    GPU.

    Raises a BlockmergeError: NonFiniteError with `check_finite`, else as `merge` does before it reads a
    weight.
    """
    check_vae_option(vae)
    check_flag("check_finite", check_finite)
    recipe = make_request(
        method,
        numbers,
        WeightsRequest(preset, weights, changes, sdxl_map, seed=seed),
        WeightsRequest(preset_beta, weights_beta, changes_beta, sdxl_map, seed=seed, beta=True),
        rules=rules,
        adjust=adjust,
        clip=clip,
        arguments=merge_state_dicts.__kwdefaults__,
        vae=vae,
    )
    recipe.check_model_count(len(state_dicts))
    for given in state_dicts:
        if not isinstance(given, Mapping):
            raise CheckpointError(
                f"a {type(given).__name__} is no state dict: give a dict of tensors (merge() takes files)"
            )
    models = [
        Model.of(StateDict(tensors, state_dict_name(number))) for number, tensors in enumerate(state_dicts)
    ]
    family = models[0].anatomy.family.name
    resolved = recipe.resolve(family, len(models))
    decided = decide(models, recipe, resolved.weights, resolved.beta)
    drafter = Drafter(recipe, decided, resolved.numbers, family)
    merged = _compute(state_dicts, drafter)
    if check_finite:
        _check_finite(merged)
    return _spelled_as(state_dicts[0], merged)


@dataclass(frozen=True)
class _Job:
    """One tensor: what it is computed from, flat or, for a whole, in shape; how; and where the result goes.

    `inputs` are made when they are asked for, as some take memory: joined ones, and those from another
    device. `kind` is what jobs that can be done together have in common.
    """

    ldm: str
    inputs: Callable[[], list[torch.Tensor]]
    work: Work | None
    out: torch.Tensor
    position: int
    kind: tuple[object, ...]


def _compute(state_dicts: Sequence[Mapping[str, torch.Tensor]], drafter: Drafter) -> dict[str, torch.Tensor]:
    import torch

    from blockmerge.merging.kernel import Computation

    decided = drafter.decided
    merged: dict[str, torch.Tensor] = {}
    jobs: list[_Job] = []
    with torch.no_grad():
        computation = Computation(
            drafter.recipe, drafter.numbers, _gathered(drafter.recipe, state_dicts, decided)
        )
        for decision in decided.tensors:
            job = _job(state_dicts, drafter, decision)
            if isinstance(job, _Job):
                jobs.append(job)
            merged[decision.name] = job.out if isinstance(job, _Job) else job
        _compute_together(jobs, computation)
    return merged


def _job(
    state_dicts: Sequence[Mapping[str, torch.Tensor]], drafter: Drafter, decision: Decision
) -> _Job | torch.Tensor:
    """What there is to do for a tensor, or the tensor itself, where that is only a copy."""
    import torch

    from blockmerge.streaming.tensors import TORCH_DTYPES

    decided = drafter.decided
    holder = next(number for number, view in decided.views.items() if decision.key in view.tensors)
    device = state_dicts[holder][decided.views[holder].origins[decision.key].names[0]].device
    if decision.literal is not None:
        values = torch.frombuffer(bytearray(decision.literal), dtype=torch.int64).view(decision.shape)
        return values.to(device)
    work = drafter.work(decision, in_pieces=False)
    if work is not None and work.whole is not None:
        origins = {
            number: decided.ldm[number].origins.get(decision.ldm) for number in drafter.operands(decision)
        }
    else:
        origins = {number: decided.views[number].origins[decision.key] for number in decision.sources}
    found = [
        (number, origin or decided.views[number].origins[decision.key]) for number, origin in origins.items()
    ]
    dtypes = [state_dicts[number][origin.names[0]].dtype for number, origin in found]
    out = torch.empty(decision.shape, dtype=TORCH_DTYPES.get(decision.dtype, dtypes[0]), device=device)
    if work is None and not out.is_floating_point():
        return out.copy_(_made(state_dicts[found[0][0]], found[0][1]))

    def inputs() -> list[torch.Tensor]:
        made = [_made(state_dicts[number], origin).to(device).contiguous() for number, origin in found]
        return made if work is not None and work.whole is not None else [tensor.view(-1) for tensor in made]

    part = drafter.origin(decision).part
    return _Job(decision.ldm, inputs, work, out, part * out.numel(), (work, out.dtype, device, *dtypes))


def _compute_together(jobs: Sequence[_Job], computation: Computation) -> None:
    """Compute in few large launches: tensors that get the same treatment are laid side by side."""
    import torch

    groups: dict[object, list[_Job]] = {}
    for job in jobs:
        alone = job.work is not None and (job.work.whole is not None or job.work.key is not None)
        groups.setdefault(id(job) if alone else job.kind, []).append(job)
    for together in (part for group in groups.values() for part in _parts(group)):
        first = together[0]
        if len(together) == 1:
            _run(computation, first, first.inputs(), first.out.view(-1))
            continue
        inputs = [torch.cat(tensors) for tensors in zip(*(job.inputs() for job in together), strict=True)]
        out = torch.empty(len(inputs[0]), dtype=first.out.dtype, device=first.out.device)
        _run(computation, first, inputs, out)
        outs = [job.out.view(-1) for job in together]
        torch._foreach_copy_(outs, list(torch.split(out, [len(one) for one in outs])))


def _run(computation: Computation, job: _Job, inputs: list[torch.Tensor], out: torch.Tensor) -> None:
    """Compute a job, or what stands for it and all that are like it."""
    try:
        computation.run(inputs, job.work, job.position, out)
    except RecipeError as error:  # of a method of the user's own
        raise RecipeError(f"{error} (at {shown(job.ldm)})") from error


def _parts(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Cut a group into parts whose tensors, laid side by side, do not take too much memory."""
    limit = _TOGETHER.get(jobs[0].out.device.type, _TOGETHER_ON_A_GPU)
    part: list[_Job] = []
    elements = 0
    for job in jobs:
        if part and elements + job.out.numel() > limit:
            yield part
            part, elements = [], 0
        part.append(job)
        elements += job.out.numel()
    yield part


def _gathered(
    recipe: MergeRequest, state_dicts: Sequence[Mapping[str, torch.Tensor]], decided: Decisions
) -> object:
    """The figures of a method that looks at the whole model."""
    method = recipe.merge_method
    if method.locality != "model":
        return None
    from blockmerge.merging.kernel import looked_at

    views = [decided.ldm[number] for number in range(len(state_dicts))]
    figures = []
    for name in looked_at(views):
        tensors = [
            _made(tensors, view.origins[name]).contiguous()
            for tensors, view in zip(state_dicts, views, strict=True)
        ]
        figures.append(method.statistics(*(tensor.to(tensors[0].device) for tensor in tensors)))
    return method.gather(figures)


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


def _check_finite(merged: Mapping[str, torch.Tensor]) -> None:
    from blockmerge.streaming.tensors import TORCH_DTYPES, all_finite

    weights = (
        (name, tensor)
        for name, tensor in merged.items()
        if tensor.dtype in TORCH_DTYPES.values() and tensor.numel()
    )
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

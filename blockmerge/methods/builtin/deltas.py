"""What is made of the deltas of all other models from A.

Large tensors are gone through in stretches, so that what is widened stays small; sums are in float64. Figures
stay on the tensors' device, so that nobody waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from blockmerge.methods import planning
from blockmerge.methods.arithmetic import (
    exact_dtype,
    exactly,
    round_into,
    scratch,
    scratch_like,
    slabs,
    wide_dtype,
    widened,
)
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch
from blockmerge.methods.method import Number
from blockmerge.methods.planning import share


@merge_method(
    locality="tensor",
    formula="A + α·(mean of the values of the deltas Xᵢ − A that count). The ⌈k·n⌉ largest values of each "
    "delta are kept. A kept value counts if it has the sign of the sum of those kept at its place",
    source="TIES, arXiv 2306.01708",
    copies=planning.a_at_zero,
    numbers=[
        Number(
            "density",
            text="k, the share of each delta's values that is kept",
            low=0,
            high=1,
            option="the share of each difference that is kept.",
        )
    ],
)
def ties(*models: torch.Tensor, alpha: float, density: float = 0.2, out: torch.Tensor) -> torch.Tensor:
    """A + α·(the mean of those deltas Xᵢ − A that are large and whose sign wins): TIES, arXiv 2306.01708.

    Of each delta the share `density` of largest magnitude is kept, ⌈k·n⌉ of n values and whatever equals the
    smallest of them in magnitude. The sign of an element is that of the sum of what was kept; the mean is of
    the kept deltas that have it, 0 where there is none or the sum is 0.
    """
    a, *others = (model.view(-1) for model in models)
    flat_out = out.view(-1)
    wide = wide_dtype(*models, out)
    borders = [_smallest_kept(other, a, wide, share(density, a.numel())) for other in others]
    for part in slabs(flat_out):
        wide_a = widened("a", a[part], wide)
        deltas = [
            widened(f"delta {number}", other[part], wide).sub_(wide_a) for number, other in enumerate(others)
        ]
        mask = scratch_like("mask", wide_a)  # of numbers, which multiply in a tenth of the time of booleans
        for delta, border in zip(deltas, borders, strict=True):
            delta.mul_(torch.abs(delta, out=mask).ge_(border))
        sign = _sum(deltas).sign_().to(wide)
        count = scratch_like("count", wide_a).zero_()
        for delta in deltas:
            agrees = torch.sign(delta, out=mask).eq_(sign)
            delta.mul_(agrees)
            count.add_(agrees)
        round_into(flat_out[part], wide_a.add_(_sum(deltas).div_(count.clamp_(min=1)).to(wide), alpha=alpha))
    return out


def _smallest_kept(
    other: torch.Tensor, a: torch.Tensor, wide: torch.dtype, count: int
) -> torch.Tensor | float:
    """Return the magnitude of the count-th largest of the deltas; infinity where none is to be kept."""
    if count == 0:
        return math.inf
    magnitudes = torch.empty(a.numel(), dtype=wide, device=a.device)
    for part in slabs(magnitudes):
        torch.sub(widened("b", other[part], wide), widened("a", a[part], wide), out=magnitudes[part])
    magnitudes.abs_()
    place = a.numel() - count
    if magnitudes.device.type == "cpu":
        values = magnitudes.numpy()
        values.partition(place)  # where it stands; kthvalue would hold four times as much
        border = float(values[place])
        return math.inf if math.isnan(border) else border  # NaN stands behind infinity, and is as large
    # kthvalue would run on one of a GPU's processors alone; and what is NaN would be the largest of all.
    magnitudes.nan_to_num_(nan=math.inf, posinf=math.inf)
    if count <= place:
        return magnitudes.topk(count, sorted=False).values.min()
    return magnitudes.topk(place + 1, largest=False, sorted=False).values.max()


@merge_method(
    locality="tensor",
    formula="A + α·t·(mean of the n deltas Xᵢ − A) with t = n·c/(1 + (n − 1)·c), limited to [0, 1]. Their "
    "mean cosine is c",
    source="Model Stock, arXiv 2403.19522",
    copies=planning.a_at_zero,
)
def model_stock(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    *more: torch.Tensor,
    alpha: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """A + α·t·(the mean of the n deltas Xᵢ − A): Model Stock, arXiv 2403.19522.

    t = n·c/(1 + (n − 1)·c), c being the mean of the pairwise cosines of the deltas (0 with a delta of zeros);
    t is limited to [0, 1].
    """
    models = (a, b, c, *more)
    a, *others = (model.view(-1) for model in models)
    flat_out = out.view(-1)
    count = len(others)
    wide = wide_dtype(*models, out)
    gram = torch.zeros(count, count, dtype=exact_dtype(out.device), device=out.device)
    for part in slabs(a):
        exact_a = exactly("a", a[part])
        deltas = scratch("deltas", count * exact_a.numel(), exact_a.dtype, exact_a.device).view(count, -1)
        for delta, other in zip(deltas, others, strict=True):
            torch.sub(exactly("b", other[part]), exact_a, out=delta)
        gram += deltas @ deltas.T
    norms = gram.diagonal().sqrt()
    lengths = norms.outer(norms)
    cosines = torch.where(lengths > 0, gram / lengths, 0).clamp_(-1, 1)
    upper = torch.triu_indices(count, count, 1, device=out.device)
    # A negative one would give a negative t, or one divided by 0.
    cosine = cosines[upper[0], upper[1]].mean().clamp(0, 1)
    step = alpha * (count * cosine / (1 + (count - 1) * cosine)).clamp(max=1)
    for part in slabs(flat_out):
        wide_a = widened("a", a[part], wide)
        mean = _sum(widened("b", other[part], wide).sub_(wide_a) for other in others).div_(count)
        round_into(flat_out[part], wide_a.add_(mean.mul_(step).to(wide)))
    return out


def _sum(deltas: Iterable[torch.Tensor]) -> torch.Tensor:
    rest = iter(deltas)
    total = exactly("sum", next(rest))  # whether a sum is 0 decides
    for delta in rest:
        total += delta
    return total

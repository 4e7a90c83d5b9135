"""Methods that need a whole tensor. They take tensors in their real shape and write `out`, of that shape and
contiguous.

Large tensors are gone through in stretches, so that what is widened stays small; sums are in float64. Figures
stay on the tensors' device, so that nobody waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

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
from blockmerge.methods.planning import share, swapped_columns
from blockmerge.methods.rowwise import take_rows
from blockmerge.methods.smoothing import smoothed_slabs

_PARALLEL = 1e-12  # 1 − |cosine| below which float64 cannot tell two directions from one


def slerp(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """Go from A to B along the sphere, and from one norm to the other along a line.

    With Ω the angle between A and B, the result is (sin((1 − α)Ω)·A/‖A‖ + sin(αΩ)·B/‖B‖) / sin Ω · ((1 −
    α)‖A‖ + α‖B‖); a weighted sum where sin Ω or a norm is 0. K. Shoemake, "Animating rotation with quaternion
    curves", 1985.
    """
    flat_a, flat_b, flat_out = (tensor.view(-1) for tensor in (a, b, out))
    squares_a, product, squares_b = _products(flat_a, flat_b)
    norm_a, norm_b = squares_a.sqrt(), squares_b.sqrt()
    cosine = product / norm_a / norm_b
    straight = cosine.isnan() | (1 - cosine.abs() < _PARALLEL)
    angle = cosine.clamp(-1, 1).acos()
    norm = (1 - alpha) * norm_a + alpha * norm_b
    # Of two norms that are far apart one factor may be beyond float32.
    factor_a = ((1 - alpha) * angle).sin() / angle.sin() * (norm / norm_a)
    factor_b = (alpha * angle).sin() / angle.sin() * (norm / norm_b)
    factor_a, factor_b = torch.where(straight, 1 - alpha, factor_a), torch.where(straight, alpha, factor_b)
    for part in slabs(flat_out):
        wide_a, wide_b = exactly("a", flat_a[part]), exactly("b", flat_b[part])
        round_into(flat_out[part], wide_a.mul_(factor_a).add_(wide_b.mul_(factor_b)))
    return out


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return A·A, A·B and B·B of flat tensors."""
    sums = torch.zeros(3, dtype=exact_dtype(a.device), device=a.device)
    for part in slabs(a):
        wide_a, wide_b = exactly("a", a[part]), exactly("b", b[part])
        sums += torch.stack([wide_a @ wide_a, wide_a @ wide_b, wide_b @ wide_b])
    return sums


def tensor_sum_columns(
    a: torch.Tensor, b: torch.Tensor, *, alpha: float, beta: float = 0.0, out: torch.Tensor
) -> torch.Tensor:
    """As `tensor_sum`, on the second axis of tensors that have one: SuperMerger's tensor2, without its
    fault.
    """
    return take_rows(a, b, swapped_columns(out.shape, alpha, beta), min(1, out.dim() - 1), out)


def smooth_add_difference(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, alpha: float, out: torch.Tensor
) -> torch.Tensor:
    """A + α·G(M(B − C)), M a median filter of size 3 and G a Gaussian of σ = 1 over every axis: SuperMerger's
    smoothAdd.

    Borders are scipy.ndimage's ``reflect`` (the edge value repeated), and the Gaussian ends at 4σ.
    """
    wide = wide_dtype(a, b, c, out)
    rows = [tensor if tensor.dim() else tensor.reshape(1) for tensor in (a, b, c, out)]
    for part, smooth in smoothed_slabs(rows[1], rows[2], wide):
        round_into(rows[3][part], rows[0][part].to(wide).add(smooth, alpha=alpha))
    return out


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
        return float(values[place])
    return magnitudes.kthvalue(place + 1).values


def _sum(deltas: Iterable[torch.Tensor]) -> torch.Tensor:
    rest = iter(deltas)
    total = exactly("sum", next(rest))  # whether a sum is 0 decides
    for delta in rest:
        total += delta
    return total


def model_stock(*models: torch.Tensor, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """A + α·t·(the mean of the n deltas Xᵢ − A): Model Stock, arXiv 2403.19522.

    t = n·c/(1 + (n − 1)·c), c being the mean of the pairwise cosines of the deltas (0 with a delta of zeros);
    t is limited to [0, 1].
    """
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
    cosine = (
        cosines[upper[0], upper[1]].mean().clamp(0, 1)
    )  # a negative one would give a negative t, or one divided by 0
    step = alpha * (count * cosine / (1 + (count - 1) * cosine)).clamp(max=1)
    for part in slabs(flat_out):
        wide_a = widened("a", a[part], wide)
        mean = _sum(widened("b", other[part], wide).sub_(wide_a) for other in others).div_(count)
        round_into(flat_out[part], wide_a.add_(mean.mul_(step).to(wide)))
    return out

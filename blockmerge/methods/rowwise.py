"""Methods that need whole rows. They take tensors in their real shape and write `out`, of that shape.

`tensor_sum` takes whole entries of the first axis from A or B, so that a plan may do it as copies (`Method.rows`). `extract`
looks along the last axis: a tensor of two axes or more may be cut anywhere along the first.
"""

from __future__ import annotations

import torch

from blockmerge.methods.arithmetic import exactly, round_into, scratch_like, slabs
from blockmerge.methods.planning import Rows, swapped_rows

_SHORT = 8  # entries of an axis that are faster added one after the other: torch's own sum takes ten times as long for three


def tensor_sum(a: torch.Tensor, b: torch.Tensor, *, alpha: float, beta: float = 0.0, out: torch.Tensor) -> torch.Tensor:
    """α of the rows from B, from β of the way on and round the end, the others from A: SuperMerger's tensor, as meh has it."""
    return take_rows(a, b, swapped_rows(out.shape, alpha, beta), 0, out)


def take_rows(a: torch.Tensor, b: torch.Tensor, rows: Rows, axis: int, out: torch.Tensor) -> torch.Tensor:
    """Write into `out` the stretches of an axis from the model that each names."""
    if not out.shape:
        return round_into(out, (a, b)[rows[0][2]])
    for start, stop, source in rows:
        round_into(out.narrow(axis, start, stop - start), (a, b)[source].narrow(axis, start, stop - start))
    return out


def extract(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    *,
    alpha: float,
    beta: float = 0.0,
    gamma: float = 1.0,
    out: torch.Tensor,
) -> torch.Tensor:
    """What B and C have in common, or what they have not: SuperMerger's extract.

    With b = B − A, c = C − A, κ their cosine along the last axis (0 where one of them is 0) and d = ((κ + 1)/2)^γ, the result
    is A + ((1 − α)·b + α·c)·((1 − β)·d + β·(1 − d)); α and β are limited to [0, 1]. In float64 throughout, since near κ = −1
    small errors of κ are large ones of d.
    """
    alpha, beta = (min(1.0, max(0.0, weight)) for weight in (alpha, beta))
    rows = [tensor if tensor.dim() > 1 else tensor.reshape(1, -1) for tensor in (a, b, c, out)]
    for part in slabs(rows[0]):
        wide_a, b_delta, c_delta = (exactly(place, tensor[part]) for place, tensor in zip("abc", rows, strict=False))
        b_delta -= wide_a
        c_delta -= wide_a
        product = scratch_like("product", wide_a)
        dots, b_square, c_square = (
            _sums(torch.mul(one, other, out=product))
            for one, other in ((b_delta, c_delta), (b_delta, b_delta), (c_delta, c_delta))
        )
        norms = b_square.sqrt_() * c_square.sqrt_()
        cosine = torch.where(norms > 0, dots / norms, 0).clamp_(-1, 1)
        likeness = cosine.add_(1).div_(2).pow_(gamma)
        amount = (1 - beta) * likeness + beta * (1 - likeness)
        round_into(rows[3][part], wide_a.add_(b_delta.lerp_(c_delta, alpha).mul_(amount)))
    return out


def _sums(values: torch.Tensor) -> torch.Tensor:
    """Return the sums along the last axis, which stays; of the same values the same, wherever in a tensor they stand."""
    if values.shape[-1] > _SHORT:
        return values.sum(-1, keepdim=True)
    first, *others = values.split(1, -1)
    total = first.clone()
    for other in others:
        total += other
    return total

"""What two models have in common, or what they have not."""

from __future__ import annotations

from blockmerge.methods.arithmetic import exactly, round_into, scratch, scratch_like, slabs
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch
from blockmerge.methods.method import Number

# Entries of a row: along so short an axis torch takes several times as long as from column to column.
_SHORT = 4


@merge_method(
    locality="row",
    formula="A + ((1 − α)b + αc)·((1 − β)d + β(1 − d)). Here b = B − A, c = C − A and d = ((κ + 1)/2)^γ. κ "
    "is the cosine of b and c along the last axis. Both α and β are limited to [0, 1]",
    source="SuperMerger's extract",
    numbers=[
        Number(
            "gamma",
            text="how fast likeness falls off with the angle",
            low=0,
            option="how fast likeness falls off.",
        )
    ],
)
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

    With b = B − A, c = C − A, κ their cosine along the last axis (0 where one of them is 0) and d = ((κ +
    1)/2)^γ, the result is A + ((1 − α)·b + α·c)·((1 − β)·d + β·(1 − d)); α and β are limited to [0, 1]. In
    float64 throughout, since near κ = −1 small errors of κ are large ones of d.
    """
    alpha, beta = (min(1.0, max(0.0, weight)) for weight in (alpha, beta))
    length = max(1, out.shape[-1] if out.dim() > 1 else out.numel())
    rows = [tensor.view(-1, length) for tensor in (a, b, c, out)]
    for part in slabs(rows[0]):
        wide_a, b_delta, c_delta = (
            exactly(place, tensor[part]) for place, tensor in zip("abc", rows, strict=False)
        )
        b_delta -= wide_a
        c_delta -= wide_a
        dots, b_square, c_square = (
            _dots(place, one, other)
            for place, one, other in (
                ("dots", b_delta, c_delta),
                ("bb", b_delta, b_delta),
                ("cc", c_delta, c_delta),
            )
        )
        for square in (b_square, c_square):  # where it is 0, so are the dots, and stay
            dots *= square.clamp_(min=torch.finfo(square.dtype).tiny).rsqrt_()
        likeness = _power(dots.clamp_(-1, 1).add_(1).div_(2), gamma)
        amounts = likeness.mul_(1 - 2 * beta).add_(beta)  # (1 − β)·d + β·(1 − d)
        round_into(rows[3][part], wide_a.add_(_scaled(b_delta.lerp_(c_delta, alpha), amounts)))
    return out


def _dots(place: str, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the dot product of each row with its other, in the scratch memory of that `place`: the same
    wherever it stands.
    """
    dots = scratch(place, len(one), one.dtype, one.device)
    if one.shape[1] > _SHORT:
        return torch.sum(torch.mul(one, other, out=scratch_like("product", one)), 1, out=dots)
    pairs = zip(one.unbind(1), other.unbind(1), strict=True)
    torch.mul(*next(pairs), out=dots)
    for pair in pairs:
        dots += torch.mul(*pair, out=scratch_like("product", dots))
    return dots


def _scaled(rows: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Multiply each row by its factor, in place."""
    if rows.shape[1] > _SHORT:
        return rows.mul_(factors.unsqueeze(1))
    for column in rows.unbind(1):
        column *= factors
    return rows


def _power(base: torch.Tensor, exponent: float) -> torch.Tensor:
    """Return base^exponent in place of the base, both at least 0, and 0^0 = 1; of a value the same wherever
    it stands.

    torch's own power is not: it takes the last few elements of a tensor by another way than the others.
    """
    return base if exponent == 1 else torch.xlogy(exponent, base, out=base).exp_()

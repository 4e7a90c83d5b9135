"""From A to B along a sphere.

A large tensor is gone through in stretches, so that what is widened stays small. Figures stay on the tensors'
device, so that nobody waits for a GPU.
"""

from __future__ import annotations

from blockmerge.methods import planning
from blockmerge.methods.arithmetic import exact_dtype, exactly, round_into, slabs
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch

_PARALLEL = 1e-12  # 1 − |cosine| below which float64 cannot tell two directions from one


@merge_method(
    locality="tensor",
    formula="(sin((1 − α)Ω)·A/‖A‖ + sin(αΩ)·B/‖B‖)/sin Ω · ((1 − α)‖A‖ + α‖B‖). Ω is the angle between A and "
    "B. Where sin Ω or a norm is 0, it is weighted_sum",
    source="Shoemake 1985; sd-mecha's slerp",
    copies=planning.a_to_b,
)
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

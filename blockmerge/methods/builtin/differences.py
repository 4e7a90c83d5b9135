"""A with the difference of two other models."""

from __future__ import annotations

import math

from blockmerge.methods import planning
from blockmerge.methods.arithmetic import in_blocks, round_into, wide_dtype, widened
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch
from blockmerge.methods.smoothing import smoothed_slabs


@merge_method(
    formula="A + α·(B − C)",
    source="the web UI's checkpoint merger",
    copies=planning.a_at_zero,
)
@in_blocks
def add_difference(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, alpha: float, out: torch.Tensor
) -> None:
    """A + α·(B − C), as the web UI's checkpoint merger has it."""
    wide = wide_dtype(a, b, c, out)
    difference = widened("b", b, wide).sub_(widened("c", c, wide))
    round_into(out, widened("a", a, wide).add_(difference, alpha=alpha))


@merge_method(
    formula="A + 1.8α·(B − C)·s with s = |B − A|/(|B − C| + |B − A|). Here 0/0 counts as 0",
    source="SuperMerger's trainDifference",
    copies=planning.a_at_zero,
)
@in_blocks
def train_difference(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, alpha: float, out: torch.Tensor
) -> None:
    """A + 1.8·α·(B − C)·s, s = |B − A| / (|B − C| + |B − A|), and 0 where that is 0/0: SuperMerger's
    trainDifference.

    1.8·α·(B − C) has to be finite in the dtype of the arithmetic, which for half precision is float32.
    """
    wide = wide_dtype(a, b, c, out)
    wide_a, wide_b, difference = widened("a", a, wide), widened("b", b, wide), widened("c", c, wide)
    torch.sub(wide_b, difference, out=difference)
    # s = 1 / (1 + |B − C| / |B − A|): fewer steps and less memory than as it is written. Where both are 0,
    # what is divided is 0.
    ratio = wide_b.sub_(wide_a)
    torch.div(difference, ratio, out=ratio).abs_().nan_to_num_(nan=0.0, posinf=math.inf).add_(1.0)
    round_into(out, wide_a.addcdiv_(difference, ratio, value=1.8 * alpha))


@merge_method(
    locality="tensor",
    formula="A + α·G(M(B − C)). M is a median filter of size 3. G is a Gaussian of σ = 1 over every axis",
    source="SuperMerger's smoothAdd",
    copies=planning.a_at_zero,
)
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

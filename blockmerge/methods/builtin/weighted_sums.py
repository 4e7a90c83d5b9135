"""Weighted sums of two models and more.

Those of blockmerge work one step wider than the result, which is then rounded once: half precision and 8-bit
floats are combined in float32, float32 in float64, and whatever meets a float64 input in float64. (In
float32, a weighted sum of float32 tensors of opposite signs was seen 1.7 steps off.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from blockmerge.methods import planning
from blockmerge.methods.arithmetic import (
    combine_into,
    in_blocks,
    is_half,
    lerp,
    round_into,
    wide,
    wide_dtype,
    widened_for,
)
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch
from blockmerge.methods.method import Number


@merge_method(
    formula="(1 − α)·A + α·B",
    source="the web UI's checkpoint merger",
    copies=planning.a_to_b,
)
def weighted_sum(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """(1 − α)·A + α·B, as the web UI's checkpoint merger has it."""
    if is_half(a, b, out):
        return lerp(a, b, alpha, out=out)
    return _wide_weighted_sum(a, b, alpha=alpha, out=out)


@in_blocks
def _wide_weighted_sum(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> None:
    dtype = wide_dtype(a, b, out)
    wide_a = widened_for(out, "a", a, dtype)
    round_into(out, lerp(wide_a, wide("b", b, dtype), alpha, out=wide_a))


@merge_method(
    formula="weighted_sum with α²(3 − 2α) in place of α, which is limited to [0, 1]",
    source='the web UI\'s old "Sigmoid"',
    copies=planning.a_to_b_limited,
)
def sigmoid(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """Weighted sum with α²(3 − 2α) in place of α, which is limited to [0, 1]: the web UI's old "Sigmoid"."""
    alpha = min(1.0, max(0.0, alpha))
    return weighted_sum(a, b, alpha=alpha * alpha * (3 - 2 * alpha), out=out)


@merge_method(
    formula="weighted_sum with ½ − sin(asin(1 − 2α)/3) in place of α, which is limited to [0, 1]",
    source='the web UI\'s old "Inverse sigmoid"',
    copies=planning.a_to_b_limited,
)
def inverse_sigmoid(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """Weighted sum with ½ − sin(asin(1 − 2α)/3) in place of α, which is limited to [0, 1]: the web UI's
    "Inverse sigmoid".
    """
    alpha = min(1.0, max(0.0, alpha))
    return weighted_sum(a, b, alpha=0.5 - math.sin(math.asin(1 - 2 * alpha) / 3), out=out)


@merge_method(
    formula="α·A. Where α = 0, it is A itself",
    source="SuperMerger's self",
    copies=planning.a_at_zero_and_one,
)
@in_blocks
def scale(a: torch.Tensor, *, alpha: float, out: torch.Tensor) -> None:
    """α·A, and A itself at α = 0: SuperMerger's "self"."""
    combine_into(out, [a], [alpha if alpha != 0 else 1.0])


@merge_method(
    formula="(1 − α − β)·A + α·B + β·C",
    source="SuperMerger",
    copies=planning.triple,
)
@in_blocks
def triple_sum(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, alpha: float, beta: float, out: torch.Tensor
) -> None:
    """(1 − α − β)·A + α·B + β·C, as SuperMerger has it."""
    combine_into(out, [a, b, c], [1 - alpha - beta, alpha, beta])


@merge_method(
    formula="(1 − β)·((1 − α)·A + α·B) + β·C",
    source="SuperMerger",
    copies=planning.twice,
)
@in_blocks
def sum_twice(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, alpha: float, beta: float, out: torch.Tensor
) -> None:
    """(1 − β)·((1 − α)·A + α·B) + β·C, as SuperMerger has it."""
    dtype = wide_dtype(a, b, c, out)
    total = widened_for(out, "a", a, dtype)
    lerp(total, wide("b", b, dtype), alpha, out=total)
    round_into(out, lerp(total, wide("c", c, dtype), beta, out=total))


@merge_method(
    formula="(1 − α)·A + α·Σ rᵢXᵢ/Σ rᵢ",
    source="model soups, arXiv 2203.05482",
    copies=planning.a_at_zero,
    numbers=[
        Number(
            "ratios",
            text="how much each model counts, A first",
            kind="numbers",
            option="how much each model counts, A first: 2,1,1.",
        )
    ],
)
@in_blocks
def average(
    *models: torch.Tensor, alpha: float = 1.0, ratios: Sequence[float] = (), out: torch.Tensor
) -> None:
    """(1 − α)·A + α·Σ rᵢXᵢ / Σ rᵢ over all models, A among them: model soups, arXiv 2203.05482.

    The ratios are 1 by default.
    """
    ratios = ratios or [1.0] * len(models)
    total = math.fsum(ratios)
    factors = [alpha * (ratio / total) for ratio in ratios]
    factors[0] += 1 - alpha
    combine_into(out, models, factors)

"""Methods that work element by element, so that a tensor may be cut anywhere.

Each takes flat tensors of one length, of any float dtypes, and writes into `out`, whose dtype is the
result's, and which may be A's own memory. The arithmetic is one step wider than the result, which is then
rounded once: half precision and 8-bit floats are combined in float32, float32 in float64, and whatever meets
a float64 input in float64. (In float32, a weighted sum of float32 tensors of opposite signs was seen 1.7
steps off.) The methods of chance take the tensor's `key` and the `position` in it of the first element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from blockmerge.methods.arithmetic import (
    combine_into,
    in_blocks,
    is_half,
    round_into,
    scratch,
    wide_dtype,
    widened,
)
from blockmerge.methods.randomness import CHANCES, chosen, normal


def weighted_sum(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """(1 − α)·A + α·B, as the web UI's checkpoint merger has it."""
    if is_half(a, b, out):
        return torch.lerp(a, b, alpha, out=out)
    return _wide_weighted_sum(a, b, alpha=alpha, out=out)


@in_blocks
def _wide_weighted_sum(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> None:
    wide = wide_dtype(a, b, out)
    round_into(out, widened("a", a, wide).lerp_(widened("b", b, wide), alpha))


def sigmoid(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """Weighted sum with α²(3 − 2α) in place of α, which is limited to [0, 1]: the web UI's old "Sigmoid"."""
    alpha = min(1.0, max(0.0, alpha))
    return weighted_sum(a, b, alpha=alpha * alpha * (3 - 2 * alpha), out=out)


def inverse_sigmoid(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """Weighted sum with ½ − sin(asin(1 − 2α)/3) in place of α, which is limited to [0, 1]: the web UI's
    "Inverse sigmoid".
    """
    alpha = min(1.0, max(0.0, alpha))
    return weighted_sum(a, b, alpha=0.5 - math.sin(math.asin(1 - 2 * alpha) / 3), out=out)


@in_blocks
def scale(a: torch.Tensor, *, alpha: float, out: torch.Tensor) -> None:
    """α·A, and A itself at α = 0: SuperMerger's "self"."""
    combine_into(out, [a], [alpha if alpha != 0 else 1.0])


@in_blocks
def add_noise(a: torch.Tensor, *, alpha: float, key: int, position: int, out: torch.Tensor) -> None:
    """A + α·N(0, 1): SuperMerger's "plus random"."""
    noise = normal(key, position, out.numel(), out.device)
    if is_half(
        a, noise, out
    ):  # unlike torch's addition, its fused one is the same at the end of a tensor as elsewhere
        torch.addcmul(a, noise, noise.new_ones(()), value=alpha, out=out)
        return
    wide = wide_dtype(a, out)
    round_into(out, widened("a", a, wide).add_(widened("b", noise, wide), alpha=alpha))


@in_blocks
def add_difference(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, alpha: float, out: torch.Tensor
) -> None:
    """A + α·(B − C), as the web UI's checkpoint merger has it."""
    wide = wide_dtype(a, b, c, out)
    difference = widened("b", b, wide).sub_(widened("c", c, wide))
    round_into(out, widened("a", a, wide).add_(difference, alpha=alpha))


@in_blocks
def triple_sum(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, alpha: float, beta: float = 0.0, out: torch.Tensor
) -> None:
    """(1 − α − β)·A + α·B + β·C, as SuperMerger has it."""
    combine_into(out, [a, b, c], [1 - alpha - beta, alpha, beta])


@in_blocks
def sum_twice(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *, alpha: float, beta: float = 0.0, out: torch.Tensor
) -> None:
    """(1 − β)·((1 − α)·A + α·B) + β·C, as SuperMerger has it."""
    wide = wide_dtype(a, b, c, out)
    first = widened("a", a, wide).lerp_(widened("b", b, wide), alpha)
    round_into(out, first.lerp_(widened("c", c, wide), beta))


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


@in_blocks
def average(
    *models: torch.Tensor, alpha: float = 1.0, ratios: Sequence[float] = (), out: torch.Tensor
) -> None:
    """(1 − α)·A + α·Σ rᵢXᵢ / Σ rᵢ over all models, A among them: model soups, arXiv 2203.05482. The ratios
    are 1 by default.
    """
    ratios = ratios or [1.0] * len(models)
    total = math.fsum(ratios)
    factors = [alpha * (ratio / total) for ratio in ratios]
    factors[0] += 1 - alpha
    combine_into(out, models, factors)


@in_blocks
def dare(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    alpha: float,
    drop_rate: float = 0.5,
    key: int,
    position: int,
    out: torch.Tensor,
) -> None:
    """A + α·(B − A)/(1 − p) with the probability 1 − p, else A, element by element: DARE, arXiv 2311.03099.

    The drop rate p is met to 1/131,072; what is kept is scaled by the rate that is.
    """
    rate = max(
        CHANCES - round(drop_rate * CHANCES), 1
    )  # of so many equally likely bits, the number that keeps an element
    kept = chosen(rate, key, position, out.numel(), out.device)
    factor = alpha * CHANCES / rate
    if is_half(a, b, out):
        moved = torch.lerp(a, b, factor, out=scratch("total", out.numel(), out.dtype, out.device)).view(
            torch.int16
        )
        bits = a.view(
            torch.int16
        )  # torch.where takes five times as long as changing bits where they are to be changed
        torch.bitwise_xor(moved.bitwise_xor_(bits).mul_(kept), bits, out=out.view(torch.int16))
        return
    wide = wide_dtype(a, b, out)
    wide_a = widened("a", a, wide)
    difference = widened("b", b, wide).sub_(wide_a)
    round_into(out, wide_a.add_(difference.mul_(kept), alpha=factor))


@in_blocks
def clip(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
    """Limit `out`, a result, to [min(A, B), max(A, B)], element by element; its memory may not be A's: meh's
    weights-clip.
    """
    wide = wide_dtype(a, b, out)
    wide_a, wide_b, result = widened("a", a, wide), widened("b", b, wide), widened("total", out, wide)
    low = torch.minimum(wide_a, wide_b, out=scratch("term", out.numel(), wide, out.device))
    round_into(out, result.clamp_(low, torch.maximum(wide_a, wide_b, out=wide_b)))


def cast(a: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """A in the dtype of `out`."""
    return round_into(out, a)

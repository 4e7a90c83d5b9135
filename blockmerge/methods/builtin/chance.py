"""Methods of chance: what they draw depends on a tensor's key and an element's position alone."""

from __future__ import annotations

from blockmerge.methods import planning
from blockmerge.methods.arithmetic import in_blocks, is_half, lerp, round_into, scratch, wide_dtype, widened
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch
from blockmerge.methods.method import Number
from blockmerge.methods.randomness import CHANCES, chosen, normal


@merge_method(
    formula="A + α·N(0, 1)",
    source="SuperMerger's plus random",
    copies=planning.a_at_zero,
    chance=True,
)
@in_blocks
def add_noise(a: torch.Tensor, *, alpha: float, key: int, position: int, out: torch.Tensor) -> None:
    """A + α·N(0, 1): SuperMerger's "plus random"."""
    noise = normal(key, position, out.numel(), out.device)
    # Unlike torch's addition, its fused one is the same at the end of a tensor as elsewhere.
    if is_half(a, noise, out):
        torch.addcmul(a, noise, noise.new_ones(()), value=alpha, out=out)
        return
    wide = wide_dtype(a, out)
    round_into(out, widened("a", a, wide).add_(widened("b", noise, wide), alpha=alpha))


@merge_method(
    formula="A + α·(B − A)·Bernoulli(1 − p)/(1 − p)",
    source="DARE, arXiv 2311.03099",
    copies=planning.a_at_zero,
    numbers=[
        Number(
            "drop_rate",
            text="p, the share of the differences that is dropped",
            low=0,
            high=1,
            open_above=True,
            option="the share of the difference that is dropped.",
        )
    ],
    chance=True,
)
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
    # Of so many equally likely bits, the number that keeps an element.
    rate = max(CHANCES - round(drop_rate * CHANCES), 1)
    kept = chosen(rate, key, position, out.numel(), out.device)
    factor = alpha * CHANCES / rate
    if is_half(a, b, out):
        moved = lerp(a, b, factor, out=scratch("total", out.numel(), out.dtype, out.device)).view(torch.int16)
        # torch.where takes five times as long as changing bits where they are to be changed.
        bits = a.view(torch.int16)
        torch.bitwise_xor(moved.bitwise_xor_(bits).mul_(kept), bits, out=out.view(torch.int16))
        return
    wide = wide_dtype(a, b, out)
    wide_a = widened("a", a, wide)
    difference = widened("b", b, wide).sub_(wide_a)
    round_into(out, wide_a.add_(difference.mul_(kept), alpha=factor))

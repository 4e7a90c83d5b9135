"""What is done to a result element by element, whatever its method.

The tensors are flat, of one length and any float dtypes; the result is rounded once, to the dtype of `out`.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockmerge.methods.arithmetic import in_blocks, round_into, scratch, wide_dtype, widened
from blockmerge.methods.late import torch


@in_blocks
def clip(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
    """Limit `out`, a result, to [min(A, B), max(A, B)], element by element; its memory may not be A's: meh's
    weights-clip.

    A 0 has the sign that the result had before.
    """
    wide = wide_dtype(a, b, out)
    wide_a, wide_b, result = widened("a", a, wide), widened("b", b, wide), widened("total", out, wide)
    low = torch.minimum(wide_a, wide_b, out=scratch("term", out.numel(), wide, out.device))
    high = torch.maximum(wide_a, wide_b, out=wide_b)
    limited = torch.clamp(result, low, high, out=low)
    # Of 0 and −0 torch has taken either, according to their place. Adding 0 makes both 0, and with the signs
    # changed where the result is negative, both −0; torch.where would take several times as long.
    words = torch.int32 if wide == torch.float32 else torch.int64
    signs = result.view(words).bitwise_and_(torch.iinfo(words).min)
    bits = limited.view(words)
    bits.bitwise_xor_(signs)
    limited.add_(0.0)
    bits.bitwise_xor_(signs)
    round_into(out, limited)


def add_changes(
    base: torch.Tensor, changes: Sequence[torch.Tensor], scales: Sequence[float], *, out: torch.Tensor
) -> None:
    """Base + Σ scaleᵢ·changeᵢ, one after the other.

    Products and sums are rounded apart, as torch's addition with a factor is not everywhere in a tensor.
    """
    wide = wide_dtype(base, *changes, out)
    total = widened("total", base, wide)
    for change, scale in zip(changes, scales, strict=True):
        total.add_(change if scale == 1 else widened("term", change, wide).mul_(scale))
    round_into(out, total)


def cast(a: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """A in the dtype of `out`."""
    return round_into(out, a)

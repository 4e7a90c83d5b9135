"""What is done to a result element by element, whatever its method.

The tensors are flat, of one length and any float dtypes; the result is rounded once, to the dtype of `out`.
"""

from __future__ import annotations

from blockmerge.methods.arithmetic import in_blocks, round_into, scratch, wide_dtype, widened
from blockmerge.methods.late import torch


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

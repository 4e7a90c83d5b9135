"""Methods that work element by element, so that a tensor may be cut anywhere.

Each takes tensors of one shape, of any float dtypes, and writes into `out`, whose dtype is the result's, and which may be
A's own memory. The arithmetic
is one step wider than the result, which is then rounded once: half precision and 8-bit floats are combined in float32,
float32 in float64, and whatever meets a float64 input in float64. (In float32, a weighted sum of float32 tensors of
opposite signs was seen 1.7 steps off.)
"""

from __future__ import annotations

import math

import torch

_E4M3FN_OVERFLOW = 464.0  # half a step above 448: beyond it, a value rounds to one that the format does not have
_HALVES = (torch.float16, torch.bfloat16)


def weighted_sum(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """(1 − α)·A + α·B, as the web UI's checkpoint merger has it."""
    if out.dtype in _HALVES and a.dtype == b.dtype == out.dtype:
        # On halves, lerp itself computes in float32 and rounds once.
        return torch.lerp(a, b, alpha, out=out)
    wide = _wide(a, b, out)
    return _round_into(out, torch.lerp(a.to(wide), b.to(wide), alpha))


def sigmoid(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """Weighted sum with α²(3 − 2α) in place of α, which is limited to [0, 1]: the web UI's old "Sigmoid"."""
    alpha = min(1.0, max(0.0, alpha))
    return weighted_sum(a, b, alpha=alpha * alpha * (3 - 2 * alpha), out=out)


def inverse_sigmoid(a: torch.Tensor, b: torch.Tensor, *, alpha: float, out: torch.Tensor) -> torch.Tensor:
    """Weighted sum with ½ − sin(asin(1 − 2α)/3) in place of α, which is limited to [0, 1]: the web UI's "Inverse sigmoid"."""
    alpha = min(1.0, max(0.0, alpha))
    return weighted_sum(a, b, alpha=0.5 - math.sin(math.asin(1 - 2 * alpha) / 3), out=out)


def cast(a: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """A in the dtype of `out`."""
    return _round_into(out, a)


def _round_into(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if out.dtype == torch.float8_e4m3fn:
        # torch turns whatever is too large into the largest value, 448, which would hide an overflow.
        values = torch.where(values.float().abs() > _E4M3FN_OVERFLOW, torch.nan, values.float())
    return out.copy_(values)


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    *inputs, out = tensors
    if out.device.type == "mps":  # which has no float64
        return torch.float32
    return torch.float64 if out.itemsize >= 4 or any(t.dtype == torch.float64 for t in inputs) else torch.float32

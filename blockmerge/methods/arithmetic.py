"""What the methods have in common: how wide they compute, that they round once, and how they go through large tensors."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch

HALVES = (torch.float16, torch.bfloat16)
_E4M3FN_OVERFLOW = 464.0  # half a step above 448: beyond it, a value rounds to one that the format does not have
_BLOCK = 1 << 18  # elements whose intermediate values stay in a processor's cache
_DEVICE_BLOCK = 1 << 24  # elements that keep any GPU busy, and whose intermediate values take some hundred megabytes of it
_SLAB = 1 << 16  # elements of a tensor that are widened at once, where a method goes through it more than once


def wide_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return the dtype to compute in, one step wider than the last tensor, the output; float64 where an input has that."""
    *inputs, out = tensors
    if out.itemsize >= 4 or any(tensor.dtype == torch.float64 for tensor in inputs):
        return exact_dtype(out.device)
    return torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype of a device, for sums and for what decides."""
    return torch.float32 if device.type == "mps" else torch.float64


def round_into(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Write `values` into `out`, rounded to its dtype; what is too large becomes infinite or NaN, never the largest value."""
    if out.dtype == torch.float8_e4m3fn:
        # torch turns whatever is too large into the largest value, 448, which would hide an overflow.
        values = torch.where(values.float().abs() > _E4M3FN_OVERFLOW, torch.nan, values.float())
    return out.copy_(values)


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.memory: dict[str, torch.Tensor] = {}


_scratch = _Scratch()


def scratch(place: str, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised flat tensor. On the CPU a small one is the calling thread's own memory for that `place`.

    New memory must be fetched from the system page by page, which takes several times as long as computing with it.
    """
    nbytes = count * dtype.itemsize
    if device.type != "cpu" or nbytes > 8 * _BLOCK:
        return torch.empty(count, dtype=dtype, device=device)
    if place not in _scratch.memory or len(_scratch.memory[place]) < nbytes:
        _scratch.memory[place] = torch.empty(max(nbytes, 4 * _BLOCK), dtype=torch.uint8)
    return _scratch.memory[place][:nbytes].view(dtype)


def widened(place: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy of a flat tensor in `dtype`, in the scratch memory of that `place`."""
    return scratch(place, tensor.numel(), dtype, tensor.device).copy_(tensor)


def in_blocks(compute: Callable[..., None]) -> Callable[..., torch.Tensor]:
    """Make an element-local function of flat tensors go through them in blocks that fit a processor's cache, or a GPU."""

    @functools.wraps(compute)
    def whole(*models: torch.Tensor, out: torch.Tensor, **numbers: Any) -> torch.Tensor:
        step = _BLOCK if out.device.type == "cpu" else _DEVICE_BLOCK
        for start in range(0, out.numel(), step):
            part = slice(start, start + step)
            here = {**numbers, "position": numbers["position"] + start} if "position" in numbers else numbers
            compute(*(model[part] for model in models), out=out[part], **here)
        return out

    return whole


def combine_into(out: torch.Tensor, tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
    """Write Σ factorᵢ·tensorᵢ into `out`; all are flat and of one length."""
    wide = wide_dtype(*tensors, out)
    total = widened("total", tensors[0], wide).mul_(factors[0])
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total.add_(widened("term", tensor, wide), alpha=factor)
    round_into(out, total)


def slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield stretches of the first axis, of about 65 000 elements or of one entry each; none of an empty tensor."""
    width = prod(shape[1:])
    step = max(1, _SLAB // max(1, width))
    for start in range(0, shape[0] if width else 0, step):
        yield slice(start, min(start + step, shape[0]))

"""What the methods have in common: how wide they compute, that they round once, and how they go through large
tensors.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

from blockmerge.dtypes import torch_dtype
from blockmerge.methods.late import torch

# Half a step above 448: beyond it, a value rounds to one that the format does not have.
_E4M3FN_OVERFLOW = 464.0
_BLOCK = 1 << 19  # elements whose intermediate values stay in a processor's cache
# The same of a GPU's, which it also keeps busy.
_DEVICE_BLOCK = 1 << 22
_SUMMED = 1 << 18  # elements of which a sum in float32 is exact enough
# Elements of a tensor that are widened at once, where a method goes through it more than once.
_SLAB = 1 << 18
_DEVICE_SLAB = 1 << 22  # the same on a GPU
_MOST_SCRATCH = 1 << 21  # elements of scratch memory that a thread keeps for a place


class _Held(threading.local):
    is_held = False


_held = _Held()


@contextmanager
def held() -> Iterator[None]:
    """Say that the output is no result but held for one, with as many digits as are computed with."""
    before, _held.is_held = _held.is_held, True
    try:
        yield
    finally:
        _held.is_held = before


def wide_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return the dtype to compute in, one step wider than the last tensor, the output, where that is a
    result; float64 where an input has that.
    """
    *inputs, out = tensors
    is_wide = out.itemsize >= 4 and not (_held.is_held and out.dtype == torch.float32)
    if is_wide or any(tensor.dtype == torch.float64 for tensor in inputs):
        return exact_dtype(out.device)
    return torch.float32


def is_half(*tensors: torch.Tensor) -> bool:
    """Whether all are of one half-precision dtype: torch's own functions then compute in float32 and round
    once.
    """
    dtype = tensors[0].dtype
    return dtype in (torch.float16, torch.bfloat16) and all(tensor.dtype == dtype for tensor in tensors)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the widest dtype of a device, for sums and for what decides."""
    return torch_dtype("F64", device)


def round_into(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Write `values` into `out`, rounded to its dtype; what is too large becomes infinite or NaN, never the
    largest value.
    """
    if values is out:
        return out
    if out.dtype == torch.float8_e4m3fn:
        # torch turns whatever is too large into the largest value, 448, which would hide an overflow.
        values = torch.where(values.float().abs() > _E4M3FN_OVERFLOW, torch.nan, values.float())
    return out.copy_(values)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return 8-bit floats as bytes in the same memory, and other tensors as they are: to move elements about.

    Before torch 2.6, GPUs have no `cat`, `index_select` or `_foreach_copy_` of such floats.
    """
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.memory: dict[str, torch.Tensor] = {}
        self.views: dict[str, dict[torch.dtype, torch.Tensor]] = {}


_scratch = _Scratch()


def scratch(place: str, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised flat tensor.

    On the CPU a small one is the calling thread's own memory for that `place`.

    New memory must be fetched from the system page by page, which takes several times as long as computing
    with it. Making a view of it takes long too, while all other threads wait for the interpreter: the last
    one of its kind is kept.
    """
    if device.type != "cpu" or count > _MOST_SCRATCH:
        return torch.empty(count, dtype=dtype, device=device)
    views = _scratch.views.setdefault(place, {})
    view = views.get(dtype)
    if view is None or view.numel() != count:
        nbytes = count * dtype.itemsize
        with torch.inference_mode(False):  # what is made in that mode could not be used after it
            if place not in _scratch.memory or _scratch.memory[place].numel() < nbytes:
                views.clear()
                _scratch.memory[place] = torch.empty(
                    1 << (nbytes - 1).bit_length(), dtype=torch.uint8, device=device
                )
            view = views[dtype] = _scratch.memory[place][:nbytes].view(dtype)
    return view


def scratch_like(place: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return uninitialised scratch memory in the shape and dtype of a tensor."""
    return scratch(place, tensor.numel(), tensor.dtype, tensor.device).view(tensor.shape)


def widened(place: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous copy of a tensor in `dtype`, in the scratch memory of that `place`."""
    copy = scratch(place, tensor.numel(), dtype, tensor.device)
    return widen_into(copy if tensor.dim() == 1 else copy.view(tensor.shape), tensor)


def wide(place: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in `dtype`, to be read only: a copy in the scratch memory of that `place`, where it has
    another.
    """
    return tensor if tensor.dtype == dtype else widened(place, tensor, dtype)


def widened_for(out: torch.Tensor, place: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what `widened` does, in the memory of `out` itself where that has the dtype."""
    return widen_into(out, tensor) if out.dtype == dtype else widened(place, tensor, dtype)


def widen_into(out: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor into one of a wider dtype."""
    if tensor is out:
        return out
    if out.dtype == torch.float64 and tensor.dtype == torch.float16 and tensor.device.type == "cpu":
        tensor = widened("float32", tensor, torch.float32)  # from there torch takes a quarter of the time
    return out.copy_(tensor)


def sum_of_squares(tensor: torch.Tensor) -> torch.Tensor:
    """Return Σx² of a flat tensor: in float32 within blocks, whose sums are added up in float64."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    sums = []
    for block in torch.split(tensor, _SUMMED) if tensor.numel() > _SUMMED else (tensor,):
        values = wide("squares", block, dtype)
        sums.append(torch.dot(values, values))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dtype=exact_dtype(tensor.device))


def exactly(place: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy of a tensor in the widest dtype of its device, in the scratch memory of that
    `place`.
    """
    return widened(place, tensor, exact_dtype(tensor.device))


def in_blocks(compute: Callable[..., None]) -> Callable[..., torch.Tensor]:
    """Make an element-local function of flat tensors go through them in blocks that fit a processor's cache,
    or a GPU.
    """

    @functools.wraps(compute)
    def whole(*models: torch.Tensor, out: torch.Tensor, **numbers: Any) -> torch.Tensor:
        step = _BLOCK if out.device.type == "cpu" else _DEVICE_BLOCK
        count = out.numel()
        if 0 < count <= step:
            compute(*models, out=out, **numbers)
            return out
        for start in range(0, count, step):
            part = slice(start, start + step)
            here = {**numbers, "position": numbers["position"] + start} if "position" in numbers else numbers
            compute(*(model[part] for model in models), out=out[part], **here)
        return out

    return whole


def lerp(a: torch.Tensor, b: torch.Tensor, weight: float, *, out: torch.Tensor) -> torch.Tensor:
    """Write (1 − weight)·A + weight·B into `out`, which may be A: B itself where the weight is 1, where torch
    makes 0 or −0 of −0, according to its place.
    """
    return out.copy_(b) if weight == 1 else torch.lerp(a, b, weight, out=out)


def combine_into(out: torch.Tensor, tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> None:
    """Write Σ factorᵢ·tensorᵢ into `out`; all are flat and of one length."""
    dtype = wide_dtype(*tensors, out)
    total = widened_for(out, "total", tensors[0], dtype).mul_(factors[0])
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total.add_(wide("term", tensor, dtype), alpha=factor)
    round_into(out, total)


def slabs(tensor: torch.Tensor) -> Iterator[slice]:
    """Yield stretches of the first axis, of about 260 000 elements (on a GPU 4 million), or of one entry
    each; none if empty.
    """
    width = prod(tensor.shape[1:])
    step = max(1, (_SLAB if tensor.device.type == "cpu" else _DEVICE_SLAB) // max(1, width))
    for start in range(0, tensor.shape[0] if width else 0, step):
        yield slice(start, min(start + step, tensor.shape[0]))

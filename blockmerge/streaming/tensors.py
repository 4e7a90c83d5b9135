"""Buffers seen as tensors, and the check that a tensor is finite.

Loads torch: imported only where weights are computed.
"""

from __future__ import annotations

import math

import torch

from blockmerge.dtypes import FLOAT_DTYPES, torch_dtype

TORCH_DTYPES = {name: torch_dtype(name) for name in FLOAT_DTYPES}
"""The dtypes that can be computed with, by their names in safetensors headers."""


def tensor_view(buffer: memoryview, dtype: str, elements: int) -> torch.Tensor:
    """Return the first `elements` of a writable buffer as a flat tensor that shares its memory."""
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[dtype], count=elements)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a non-empty tensor holds neither NaN nor infinity.

    Both show in a sum, which is the cheapest look at every value; only a sum that is not finite, which many
    or large finite values can make too, is looked at again. The sum is left in the tensor's own dtype: asking
    for a wider one makes torch convert all of a half-precision tensor first, which takes ten times as long.
    """
    if tensor.itemsize == 1:  # torch has no sums of 8-bit floats
        tensor = tensor.float()
    if math.isfinite(tensor.sum().item()):
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))

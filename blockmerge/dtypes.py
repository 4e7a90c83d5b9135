"""The dtypes of tensors, by the names that safetensors headers use: one table for all rooms. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Precision(NamedTuple):
    """How precisely a float dtype holds numbers: bits of the mantissa, and the exponent of the smallest
    normal number.
    """

    mantissa: int
    least_exponent: int


@dataclass(frozen=True, slots=True)
class Dtype:
    """What there is to know about a dtype: the bytes of an element, and its names elsewhere.

    `torch` is its name in torch, None where tensors of it are never made; `short` is what ``--dtype`` calls
    it, None where no output can be asked for in it; `others` are further names that people have for it. Only
    floats have a `precision`, and an `infinity` unless it says otherwise: what is too large for them becomes
    that, or NaN where there is none.
    """

    size: int
    torch: str | None = None
    short: str | None = None
    precision: Precision | None = None
    others: tuple[str, ...] = ()
    infinity: bool = True


DTYPES: Mapping[str, Dtype] = {
    "F16": Dtype(2, "float16", "fp16", Precision(10, -14), ("half",)),
    "BF16": Dtype(2, "bfloat16", "bf16", Precision(7, -126), ("bfloat",)),
    "F32": Dtype(4, "float32", "fp32", Precision(23, -126), ("float", "single")),
    "F8_E4M3": Dtype(1, "float8_e4m3fn", "fp8_e4m3fn", Precision(3, -6), ("fp8_e4m3",), infinity=False),
    "F8_E5M2": Dtype(1, "float8_e5m2", "fp8_e5m2", Precision(2, -14)),
    "F8_E8M0": Dtype(1),  # the scales of quantised weights
    "F64": Dtype(8, "float64", None, Precision(52, -1022)),
    "C64": Dtype(8, "complex64"),
    "BOOL": Dtype(1, "bool"),
    "U8": Dtype(1, "uint8"),
    "I8": Dtype(1, "int8"),
    "U16": Dtype(2),
    "I16": Dtype(2, "int16"),
    "U32": Dtype(4),
    "I32": Dtype(4, "int32"),
    "U64": Dtype(8),
    "I64": Dtype(8, "int64"),
}

_SHORT_NAMES = {"keep": "keep"} | {
    known.casefold(): dtype.short
    for name, dtype in DTYPES.items()
    if dtype.short
    for known in (name, dtype.short, dtype.torch or "", *dtype.others)
}

FLOAT_DTYPES = frozenset(name for name, dtype in DTYPES.items() if dtype.precision)
"""The dtypes whose tensors can be merged; all others are only ever copied."""


def short_dtype(name: str) -> str | None:
    """Return what ``--dtype`` calls a dtype by any of its names, ``"keep"`` among them; None for others.

    >>> short_dtype("FP16"), short_dtype("half"), short_dtype("torch.float16"), short_dtype("int8")
    ('fp16', 'fp16', 'fp16', None)
    """
    return _SHORT_NAMES.get(str(name).strip().casefold().removeprefix("torch."))


def itemsize(dtype: str) -> int | None:
    """Return the bytes of one element, or None for a dtype that is not known."""
    return DTYPES[dtype].size if dtype in DTYPES else None


def size_of(dtype: str) -> int:
    """Return the bytes of one element of a dtype that is in the table."""
    return DTYPES[dtype].size


def precision_of(dtype: str) -> Precision:
    """Return the precision of one of FLOAT_DTYPES."""
    precision = DTYPES[dtype].precision
    assert precision is not None, dtype
    return precision


def wide_dtype(inputs: tuple[str, ...], output: str) -> str:
    """Return the dtype to compute in: one step wider than the output's, and F64 where an input has that."""
    return "F64" if size_of(output) >= size_of("F32") or "F64" in inputs else "F32"


def torch_dtype(dtype: str, device: torch.device | None = None) -> torch.dtype:
    """Return torch's dtype of that name; on a device without float64, float32 in its place."""
    import torch

    name = DTYPES[dtype].torch
    assert name is not None, dtype
    found: torch.dtype = getattr(torch, name)
    if found == torch.float64 and device is not None and not has_float64(device):
        return torch.float32
    return found


def has_float64(device: torch.device) -> bool:
    """Whether a device can compute in float64: Apple's and some of Intel's GPUs cannot."""
    return device.type in ("cpu", "cuda", "meta") or _tried_float64(device.type, device.index)


@cache
def _tried_float64(kind: str, index: int | None) -> bool:
    import torch

    try:
        torch.ones(1, dtype=torch.float64, device=torch.device(kind, index or 0)).add_(1)
    except (RuntimeError, TypeError):
        return False
    return True

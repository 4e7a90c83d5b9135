"""The dtypes of safetensors files, by the names their headers use. No torch: headers are read without it."""

from __future__ import annotations

_ITEMSIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

FLOAT_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"})
"""The dtypes whose tensors can be merged; all others are only ever copied."""


def itemsize(dtype: str) -> int | None:
    """Return the bytes of one element, or None for a dtype that is not known."""
    return _ITEMSIZES.get(dtype)

"""How precisely the dtypes of weights hold numbers."""

from __future__ import annotations

from typing import NamedTuple


class Precision(NamedTuple):
    """Bits of a dtype's mantissa, and the exponent of its smallest normal number."""

    mantissa: int
    smallest_exponent: int


PRECISIONS = {
    "F8_E4M3": Precision(3, -6),
    "F8_E5M2": Precision(2, -14),
    "F16": Precision(10, -14),
    "BF16": Precision(7, -126),
    "F32": Precision(23, -126),
    "F64": Precision(52, -1022),
}

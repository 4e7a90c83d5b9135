"""`position_ids`: the numbers 0 … 76 of a text encoder's places for words.

Tools that blend them as weights break them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockmerge.checkpoints.reading import read
from blockmerge.dtypes import itemsize
from blockmerge.errors import counted

if TYPE_CHECKING:
    import numpy as np

    from blockmerge.expressions import Expression

POSITIONS = 77
"""How many tokens a CLIP text encoder reads: `position_ids` are an int64 [1, 77] of 0 … 76."""


def fault_of_position_ids(tensor: Expression) -> str | None:
    """Say in what `position_ids` differ from 0 … 76 in shape [1, 77], or return None.

    Exact floats and int32 do not.
    """
    import numpy as np  # where numbers are read, and not before

    if tensor.shape != (1, POSITIONS):
        return f"its shape is {list(tensor.shape[:8])}, expected [1, {POSITIONS}]"
    values = _numbers(read(tensor), tensor.dtype)
    if values is None:
        return f"its dtype is {tensor.dtype}"
    with np.errstate(invalid="ignore"):  # to compare a signalling NaN is one
        wrong = np.flatnonzero(values != np.arange(POSITIONS))
        is_near = bool((np.rint(values) == np.arange(POSITIONS)).all())
    if not len(wrong):
        return None
    first = int(wrong[0])
    what = "not exactly " if is_near else "not "
    found = str(values[first])  # of float32 the shortest text: 0.99, where a format shows 0.9900000095367432
    return (
        f"{counted(len(wrong), 'position')} {what}0 … {POSITIONS - 1}: "
        f"the first is {found} in place of {first}"
    )


def _numbers(data: bytes, dtype: str) -> np.ndarray[tuple[int], np.dtype[np.generic]] | None:
    import numpy as np

    kind = {"I": "i", "U": "u", "F": "f"}.get(dtype[0])
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    if kind is None or dtype.startswith("F8"):
        return None
    return np.frombuffer(data, f"<{kind}{itemsize(dtype)}")

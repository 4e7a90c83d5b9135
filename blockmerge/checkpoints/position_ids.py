"""`position_ids`: the numbers 0, 1, 2, … of a text encoder's places for words, 0 … 76 in most.

Tools that blend them as weights break them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from blockmerge.checkpoints.reading import read
from blockmerge.dtypes import itemsize
from blockmerge.errors import counted

if TYPE_CHECKING:
    import numpy as np

    from blockmerge.checkpoints.checkpoint import TensorInfo
    from blockmerge.expressions import Expression

POSITIONS = 77
"""How many tokens a CLIP text encoder reads, where no embedding tells: `position_ids` are int64 [1, 77]."""


def embedding_of(name: str) -> str:
    """The name of the tensor that has a row for each of the `position_ids`."""
    return f"{name.removesuffix('position_ids')}position_embedding.weight"


def positions_beside(name: str, tensors: Mapping[str, TensorInfo | Expression]) -> int:
    """How many positions there are: as many as the embedding beside `position_ids` has rows."""
    embedding = tensors.get(embedding_of(name))
    return embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else POSITIONS


def fault_of_position_ids(tensor: Expression, positions: int = POSITIONS) -> str | None:
    """Say in what `position_ids` differ from 0 … `positions` − 1 in shape [1, positions], or return None.

    Exact floats and int32 do not.
    """
    import numpy as np  # where numbers are read, and not before

    if tensor.shape != (1, positions):
        return f"its shape is {list(tensor.shape[:8])}, expected [1, {positions}]"
    values = _numbers(read(tensor), tensor.dtype)
    if values is None:
        return f"its dtype is {tensor.dtype}"
    with np.errstate(invalid="ignore"):  # to compare a signalling NaN is one
        wrong = np.flatnonzero(values != np.arange(positions))
        is_near = bool((np.rint(values) == np.arange(positions)).all())
    if not len(wrong):
        return None
    first = int(wrong[0])
    what = "not exactly " if is_near else "not "
    found = str(values[first])  # of float32 the shortest text: 0.99, where a format shows 0.9900000095367432
    return (
        f"{counted(len(wrong), 'position')} {what}0 … {positions - 1}: "
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

"""What a worker does with a module that gets another name: mostly nothing.

Loads torch: imported only by workers.
"""

from __future__ import annotations

import struct

import torch

from blockmerge.checkpoints import Readers
from blockmerge.dtypes import torch_dtype
from blockmerge.errors import NonFiniteError, shown
from blockmerge.lora_making.renaming import Piece, Renamed
from blockmerge.lora_making.tasks import Shape
from blockmerge.streaming import aligned_buffer
from blockmerge.streaming.tensors import TORCH_DTYPES, all_finite, tensor_view

Tensors = dict[str, tuple[Shape, bytes]]


def rewritten(task: Renamed, name: str, readers: Readers) -> tuple[Tensors, float | None, float | None]:
    """Return a module's tensors, its alpha, and by which factor one was multiplied and rounded; `name` is the
    file's.

    Raises NonFiniteError for what is not finite, or would not be in its new dtype.
    """
    found: Tensors = {}
    alpha, rounded = task.alpha, None
    for piece in task.pieces:
        data = aligned_buffer(piece.tensor.nbytes)
        readers.read_into(piece.tensor, 0, data)
        if piece.tensor.dtype not in TORCH_DTYPES:
            found[piece.part] = piece.shape, bytes(data)
            continue
        values = tensor_view(data, piece.tensor.dtype, piece.tensor.elements)
        if not all_finite(values):
            raise NonFiniteError(f"{shown(name)} holds NaN or infinity (in {shown(task.old)})")
        factor = piece.factor
        if task.recorded is not None and task.rank is not None and piece.part == _UP:
            factor = task.rank / task.recorded
        scaled, is_exact = _scaled(values, factor, piece)
        if factor != piece.factor:
            if is_exact:
                alpha = task.recorded
            else:
                scaled, is_exact = _scaled(values, piece.factor, piece)
        if not all_finite(scaled):
            raise NonFiniteError(
                f"{shown(task.old)} would hold values too large for {piece.dtype}: dtype fp32 (--dtype fp32) "
                "holds them"
            )
        if not is_exact:
            rounded = piece.factor
        found[piece.part] = piece.shape, scaled.contiguous().view(torch.uint8).numpy().tobytes()
    if alpha is not None:
        found["alpha"] = (), _number(alpha, task.alpha_dtype)
    return found, alpha, rounded


_UP = "lora_up.weight"


def _scaled(values: torch.Tensor, factor: float, piece: Piece) -> tuple[torch.Tensor, bool]:
    """The values times a factor in their new dtype, and whether only that has rounded them."""
    dtype = torch_dtype(piece.dtype)
    if factor == 1:
        scaled, is_exact = values.to(dtype), True
    else:
        wide = values.double() * factor
        scaled = wide.to(dtype)
        alone = values.to(dtype).double()
        is_exact = torch.equal(scaled.double(), wide) or torch.equal(scaled.double(), alone * factor)
    return scaled, is_exact


def _number(value: float, dtype: str) -> bytes:
    if dtype == "F64":
        return struct.pack("<d", value)
    return torch.tensor([value]).to(torch_dtype(dtype)).view(torch.uint8).numpy().tobytes()

"""What a worker computes: the factors of a module.

Loads torch: imported only by workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from blockmerge.checkpoints import Readers
from blockmerge.dtypes import size_of, torch_dtype
from blockmerge.errors import NonFiniteError, shown
from blockmerge.expressions import Expression, Stored, leaves_of
from blockmerge.lora_making.decomposing import Pair, cut_matrix, cut_product
from blockmerge.lora_making.size import Size
from blockmerge.lora_making.tasks import Difference, Layer, Made, Parts, Sum, Term
from blockmerge.streaming import aligned_buffer
from blockmerge.streaming.tensors import all_finite, tensor_view

_WIDE = 256  # rows and columns of a matrix that is large
_CHUNK = 1 << 18  # elements of a difference that are computed at once
_NEAREST, _FARTHEST = 3, 60  # powers of two by which factors are balanced at least and at most


def merged(task: Sum, size: Size, dtype: str, readers: Readers) -> Made:
    """Add up the terms of a module: joined where nothing is to be lost, else cut to a size."""
    parts = {
        part: ((task.layer.shape[0],), _bytes(_vector(terms, readers), dtype, task.layer.name))
        for part, terms in task.vectors.items()
    }
    if not task.terms:
        return Made(parts, 0, 0.0, 0.0)
    if size.is_exact and task.ranks is not None and task.ranks <= task.most:
        factors, rounding = _joined(task, task.ranks, dtype, readers)
        return Made({**factors, **parts}, task.ranks, 1.0, 1.0, rounding)
    pair = _cut(task, size, readers)
    if not pair.rank:
        return Made(parts, 0, 0.0, 0.0)
    factors, rounding = _factors(pair, task.layer, dtype)
    return Made({**factors, **parts}, pair.rank, pair.total, pair.kept, rounding)


def extracted(task: Difference, size: Size | None, dtype: str, readers: Readers) -> Made:
    """Find the factors of a difference; without a size only how large it is."""
    difference = None
    if size is not None and task.layer is not None:
        rows = task.layer.shape[0]
        difference = torch.empty(rows, task.tuned.elements // rows)
    total = 0.0
    for start, piece in _differences(task, readers):
        total += float(piece.double().square().sum())
        if difference is not None:
            difference.view(-1)[start : start + len(piece)] = piece
    if not math.isfinite(total):
        raise NonFiniteError(_nonfinite(task, readers))
    if difference is None or size is None or task.layer is None or total == 0:
        return Made({}, 0, total, 0.0)
    pair = cut_matrix(difference, total, size, task.layer.name)
    del difference
    factors, rounding = _factors(pair, task.layer, dtype)
    return Made(factors, pair.rank, total, pair.kept, rounding)


def _joined(task: Sum, rank: int, dtype: str, readers: Readers) -> tuple[Parts, float]:
    """The factors of all terms side by side, and what rounding does to them."""
    rows, columns = task.layer.shape[0], math.prod(task.layer.shape[1:])
    alpha, correction = _alpha(rank, dtype)
    up = torch.empty(rows, rank, dtype=torch_dtype(dtype))
    down = torch.empty(rank, columns, dtype=torch_dtype(dtype))
    at = 0
    of_up, of_down = _Rounding(), _Rounding()
    for term in task.terms:
        own_up, own_down = _product(term, columns, readers)
        own_up, own_down = _balanced(own_up.mul_(correction), own_down)
        of_up.round_into(up[:, at : at + len(own_down)], own_up)
        of_down.round_into(down[at : at + len(own_down)], own_down)
        at += len(own_down)
    return _parts(alpha, up, down, task.layer, dtype), math.hypot(of_up.share, of_down.share)


def _cut(task: Sum, size: Size, readers: Readers) -> Pair:
    """What the terms make together, cut to a size: by their factors, or, where it is less, by itself."""
    columns = math.prod(task.layer.shape[1:])
    if task.ranks is None or (task.layer.full_rank > _WIDE and task.ranks > task.layer.full_rank):
        matrix = torch.zeros(task.layer.shape[0], columns)
        for term in task.terms:
            matrix += _matrix(term, columns, readers)
        energy = float(matrix.double().square().sum())
        return cut_matrix(matrix, energy, size, task.layer.name)
    ups, downs = zip(*(_product(term, columns, readers) for term in task.terms), strict=True)
    return cut_product(torch.cat(ups, 1), torch.cat(downs), size)


def _product(term: Term, columns: int, readers: Readers) -> tuple[torch.Tensor, torch.Tensor]:
    assert term.up is not None
    assert term.down is not None
    up, down = (_values(one, term, readers).flatten(1) for one in (term.up, term.down))
    return up * term.scale, _widened(down, columns)


def _matrix(term: Term, columns: int, readers: Readers) -> torch.Tensor:
    if term.matrix is None:
        up, down = _product(term, columns, readers)
        return up.float() @ down.float()
    values = _values(term.matrix, term, readers, torch.float32)
    return _widened(values.flatten(1) * term.scale, columns)


def _vector(terms: Sequence[Term], readers: Readers) -> torch.Tensor:
    each = [_values(one, term, readers).flatten() * term.scale for term in terms for one in term.inputs]
    return torch.stack(each).sum(0)


def _widened(matrix: torch.Tensor, columns: int) -> torch.Tensor:
    """The same with zeros for the input channels that others have more."""
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]))


def _values(
    tensor: Expression, term: Term, readers: Readers, wide: torch.dtype = torch.float64
) -> torch.Tensor:
    """All of a tensor in a wide dtype. Raises NonFiniteError when it holds NaN or infinity."""
    buffer = aligned_buffer(tensor.nbytes)
    readers.read_into(tensor, 0, buffer)
    values = tensor_view(buffer, tensor.dtype, tensor.elements)
    if not all_finite(values):
        names = [one.name for one in leaves_of(tensor) if isinstance(one, Stored)]
        raise NonFiniteError(f"{shown(term.label)} holds NaN or infinity ({shown(names[0])})")
    return values.to(wide).view(tensor.shape)


def _balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product, where columns and rows are of very unlike sizes with ones of about one size, so that
    none is lost in half precision. They are moved by powers of two in place, which rounds nothing.
    """
    ratio = torch.linalg.vector_norm(down, dim=1) / torch.linalg.vector_norm(up, dim=0)
    moved = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).log2().div(2).round()
    moved = torch.where(moved.abs() < _NEAREST, 0.0, moved)
    powers = moved.clamp(-_FARTHEST, _FARTHEST).exp2()
    return up.mul_(powers), down.div_(powers.unsqueeze(1))


class _Rounding:
    """How large a part of what was rounded is lost: by Frobenius norms."""

    def __init__(self) -> None:
        self._lost = self._all = 0.0

    def round_into(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """Round values into a tensor of another dtype; the values are no longer there then."""
        self._all += _energy(values)
        out.copy_(values)
        self._lost += _energy(values.sub_(out))

    @property
    def share(self) -> float:
        return math.sqrt(self._lost / self._all) if self._all else 0.0


def _energy(values: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(values))
    return norm * norm


def _factors(pair: Pair, layer: Layer, dtype: str) -> tuple[Parts, float]:
    """The tensors of a module, and what rounding does to them."""
    alpha, correction = _alpha(pair.rank, dtype)
    wide_up, wide_down = _balanced(pair.up.mul_(correction), pair.down)
    up, of_up = _rounded(wide_up, dtype)
    down, of_down = _rounded(wide_down, dtype)
    return _parts(alpha, up, down, layer, dtype), math.hypot(of_up, of_down)


def _rounded(values: torch.Tensor, dtype: str) -> tuple[torch.Tensor, float]:
    """Values in another dtype, and which share of them is lost; they are no longer there then."""
    rounding, out = _Rounding(), torch.empty(values.shape, dtype=torch_dtype(dtype))
    rounding.round_into(out, values)
    return out, rounding.share


def _alpha(rank: int, dtype: str) -> tuple[torch.Tensor, float]:
    """Alpha, which is the rank, so that the product counts as it is; and what a factor has to be multiplied
    by where that is no number of the dtype.
    """
    alpha = torch.tensor(float(rank)).to(torch_dtype(dtype))
    return alpha, rank / float(alpha)


def _parts(alpha: torch.Tensor, up: torch.Tensor, down: torch.Tensor, layer: Layer, dtype: str) -> Parts:
    tensors = {"alpha": alpha, "lora_down.weight": down, "lora_up.weight": up}
    return {
        part: (shape, _bytes(tensors[part], dtype, layer.name))
        for part, shape in layer.factor_shapes(len(down)).items()
    }


def _bytes(values: torch.Tensor, dtype: str, whose: str) -> memoryview:
    """Their bytes. Raises NonFiniteError when they are too large for that."""
    rounded = values.to(torch_dtype(dtype)).contiguous()
    if not all_finite(rounded):
        advice = "dtype fp32 (--dtype fp32) holds more" if dtype != "F32" else "give smaller strengths"
        raise NonFiniteError(f"{shown(whose)} would hold values too large for {dtype}: {advice}")
    return rounded.view(-1).view(torch.uint8).numpy().data


def _differences(task: Difference, readers: Readers) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (number of its first element, a piece of tuned − base in float32)."""
    wide = torch.float64 if "F64" in (task.tuned.dtype, task.base.dtype) else torch.float32
    most = min(_CHUNK, task.tuned.elements)
    buffers = [aligned_buffer(most * size_of(one.dtype)) for one in (task.tuned, task.base)]
    for start in range(0, task.tuned.elements, most or 1):
        count = min(most, task.tuned.elements - start)
        pieces = []
        for one, buffer in zip((task.tuned, task.base), buffers, strict=True):
            size = size_of(one.dtype)
            readers.read_into(one, start * size, buffer[: count * size])
            pieces.append(tensor_view(buffer, one.dtype, count).to(wide))
        yield start, (pieces[0] - pieces[1]).float()


def _nonfinite(task: Difference, readers: Readers) -> str:
    """Say which of two models has NaN or infinity in a tensor."""
    bad = []
    for one in (task.tuned, task.base):
        buffer = aligned_buffer(one.nbytes)
        readers.read_into(one, 0, buffer)
        if not all_finite(tensor_view(buffer, one.dtype, one.elements)):
            leaf = next(leaf for leaf in leaves_of(one) if isinstance(leaf, Stored))
            bad.append(f"{shown(leaf.source.name)} holds NaN or infinity ({shown(leaf.name)})")
    return "; ".join(bad) or f"the difference in {shown(task.ldm)} is too large for float32"

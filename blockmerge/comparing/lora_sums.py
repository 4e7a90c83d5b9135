"""Inner products of what modules of LoRAs add to a weight, ⟨A, B⟩ = Σ AᵢⱼBᵢⱼ, in float64.

For plain LoRA, LoCon with a core too, they come from the factors alone: of A = U₁D₁ and B = U₂D₂, ⟨A, B⟩ =
Σ (U₁ᵀU₂)∘(D₁D₂ᵀ), whose matrices are rank × rank. Of all other kinds a few rows are computed at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from blockmerge.comparing.arrays import Array
from blockmerge.comparing.reading import TensorReader, read_in_parallel
from blockmerge.expressions import Expression, LowRank
from blockmerge.streaming import Progress

_CHUNK = 1 << 20  # elements that are computed at once, or a tile of rows
_ROWS = 64


def products_of(
    places: Sequence[Sequence[Expression]], threads: int | None = None, progress: Progress | None = None
) -> list[Array]:
    """Return the inner products of all with all, [n, n], for each list of n changes of one weight.

    >>> products_of([[own_change(one), own_change(other)]])[0][0, 1]  # doctest: +SKIP
    0.0371

    The changes of a list have one shape. `progress(done, total)` is told the bytes. Raises CheckpointError
    when they cannot be read.
    """
    found: list[Array] = [np.zeros((len(changes), len(changes))) for changes in places]

    def work(place: int, reader: TensorReader) -> None:
        with torch.no_grad():
            found[place] = _products(places[place], reader)

    largest_first = sorted(range(len(places)), key=lambda place: -_bytes_of(places[place]))
    total = sum(map(_bytes_of, places))
    read_in_parallel(largest_first, work, total, threads=threads, progress=progress)
    return found


def _bytes_of(changes: Sequence[Expression]) -> int:
    """How much will be read."""
    if all(map(_is_product, changes)):
        return sum(one.nbytes for change in changes for one in change.inputs)
    return sum(one.nbytes for one in changes)


def _products(changes: Sequence[Expression], reader: TensorReader) -> Array:
    """The inner products of some changes of one weight, all with all."""
    count = len(changes)
    found: Array = np.zeros((count, count))
    if all(map(_is_product, changes)):
        factors = [_factors(change, reader) for change in changes]
        for row, (up, down) in enumerate(factors):
            for column, (other_up, other_down) in enumerate(factors[: row + 1]):
                inner = ((up.T @ other_up) * (down @ other_down.T)).sum().item()
                found[row, column] = found[column, row] = inner
        return found
    elements = changes[0].elements
    width = elements // changes[0].shape[0] if elements else 1
    step = max(_CHUNK // (width * _ROWS), 1) * _ROWS * width
    for start in range(0, elements, step):
        chunk = min(step, elements - start)
        values = [
            reader.read_tensor(change, start, chunk, dtype="F64", buffer=number)
            for number, change in enumerate(changes)
        ]
        for row, one in enumerate(values):
            for column, other in enumerate(values[: row + 1]):
                found[row, column] += torch.dot(one, other).item()
    return found + np.tril(found, -1).T


def _is_product(change: Expression) -> bool:
    """Whether it is the whole of one product of two factors."""
    return (
        isinstance(change, LowRank) and len(change.ups) == 1 and change.elements == change.rows * change.width
    )


def _factors(change: Expression, reader: TensorReader) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors [rows, rank] and [rank, columns], with the scale in the first."""
    assert isinstance(change, LowRank), change
    up, down = (
        reader.read_tensor(one, 0, one.elements, dtype="F64").clone().view(one.shape[0], -1)
        for one in change.inputs
    )
    return up * change.scales[0], down

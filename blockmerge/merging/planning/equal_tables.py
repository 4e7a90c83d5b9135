"""Whether tables that training leaves alone are the same in all models: then nothing has to be merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from blockmerge.checkpoints import read
from blockmerge.expressions import Expression, Part, Reshaped, is_arranged, simplify

_BYTES = 4 << 20  # compared at once


def are_equal(tables: Sequence[Expression]) -> bool:
    """Whether tables, [1, positions, width], are stored alike and hold the same bytes in all models.

    Raises CheckpointError where one cannot be read.
    """
    first, *others = tables
    if any((one.shape, one.dtype) != (first.shape, first.dtype) for one in others) or not first.elements:
        return False
    if not all(map(is_arranged, tables)):  # as what a stage makes is not
        return False
    return all(len(set(map(read, same))) == 1 for same in zip(*map(_stretches, tables), strict=True))


def _stretches(table: Expression) -> Iterator[Expression]:
    rows, width = prod(table.shape[:-1]), table.shape[-1]
    flat = Reshaped(table, (rows, width))
    step = max(1, _BYTES * rows // max(1, table.nbytes))
    for start in range(0, rows, step):
        yield simplify(Part(flat, start, min(start + step, rows)))

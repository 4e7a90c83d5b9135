"""The second pass of `explain`: merging again in memory, with several coefficients for every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from blockmerge.comparing.arrays import Array
from blockmerge.explaining.chunks import Chunk, MergeStream, largest_magnitude, step_of
from blockmerge.streaming.tensors import TORCH_DTYPES


@dataclass(frozen=True)
class Misfit:
    """How far a merge M̂ made again is from the merge M of the file, for each of several variants.

    `squares[variant]` is Σ((M̂ − M)/u)², `beyond[variant]` counts the values more than two steps u off.
    """

    squares: Array
    beyond: Array

    @classmethod
    def total(cls, misfits: Sequence[Misfit]) -> Misfit:
        """Of several tensors together."""
        return cls(
            np.array([one.squares for one in misfits]).sum(axis=0),
            np.array([one.beyond for one in misfits]).sum(axis=0),
        )


def merge_tensors_again(
    stream: MergeStream, coefficients: Mapping[str, Array], candidates_of: Mapping[str, Sequence[int]]
) -> dict[str, Misfit]:
    """Merge tensors again, and hold them against the merge.

    `coefficients[name][variant, i]` is how much of candidate i a variant takes, the sum being 1. Only the
    candidates of `candidates_of[name]` are read, and only their sizes count.
    """
    found = {
        name: Misfit(squares=np.zeros(len(rows)), beyond=np.zeros(len(rows)))
        for name, rows in coefficients.items()
    }
    stream.read(candidates_of, lambda chunk: _add(found[chunk.name], chunk, coefficients[chunk.name]), "F32")
    return found


def _add(misfit: Misfit, chunk: Chunk, coefficients: Array) -> None:
    """Add what the variants of a chunk are off; those with the same coefficients are merged only once."""
    step = step_of(largest_magnitude([chunk.merge, *chunk.candidates.values()]), chunk.precision)
    squares: dict[tuple[float, ...], float] = {}
    beyond: dict[tuple[float, ...], float] = {}
    for variant, row in enumerate(coefficients):
        key = tuple(row)
        if key not in squares:
            off = _rounded(_combine(chunk, row), chunk.dtype).sub_(chunk.merge).div_(step)
            squares[key] = torch.dot(off, off).item()
            beyond[key] = _count_beyond(off)
        misfit.squares[variant] += squares[key]
        misfit.beyond[variant] += beyond[key]


def _combine(chunk: Chunk, row: Array) -> torch.Tensor:
    """Σ row[i]·X_i, as the first of them plus differences, so that a copy is a copy to the bit."""
    weights = {n: float(row[n]) for n in chunk.candidates if row[n] != 0}
    base = max(weights, key=lambda n: weights[n])
    result = chunk.candidates[base].clone()
    for n, weight in weights.items():
        if n != base:
            result.add_(chunk.candidates[n] - chunk.candidates[base], alpha=weight)
    return result


def _rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The values as `dtype` can hold them, in their own dtype."""
    return values.to(TORCH_DTYPES[dtype]).to(values.dtype)


def _count_beyond(off: torch.Tensor) -> float:
    """How many values are more than two steps off, or NaN."""
    low, high = torch.aminmax(off)
    if low.item() >= -2 and high.item() <= 2:  # nearly always; counting takes several times as long
        return 0.0
    return float((~(off.abs() <= 2)).sum().item())

"""The first pass of `explain`: inner products of the candidates' differences from the merge.

For a merge M and candidates X₁ … X_k it finds, for every tensor, the Gram matrix G with G_ij =
⟨(X_i − M)/u, (X_j − M)/u⟩. All fits of M as a combination of candidates follow from it, whichever of them is
the base. u is the step of M's dtype at each value's size, so that rounding counts the same everywhere. (The
size is M's or that of the smallest candidate, whichever is larger: where large values cancel, rounding is
theirs.) That matters where models differ by little: a small value, whose differences are many steps, tells a
weight far more sharply than a large one, whose differences rounding has all but swallowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from blockmerge.checkpoints import Model
from blockmerge.comparing.arrays import Array, Flags
from blockmerge.comparing.sums import NOT_FINITE, dot
from blockmerge.errors import NonFiniteError, listing, shown
from blockmerge.explaining.chunks import Chunk, MergeStream, smallest_magnitude, step_of
from blockmerge.explaining.compared import ComparedTensors


def gram_matrices(stream: MergeStream, compared: ComparedTensors) -> GramMatrices:
    """Read the merge and its candidates once."""
    found = GramMatrices(len(compared.names), len(stream.candidates))
    places = {name: place for place, name in enumerate(compared.names)}
    # Squares of many thousand steps stand beside those of half a step: float32 would lose the small ones.
    stream.read(compared.holders, lambda chunk: found.add(places[chunk.name], chunk), "F64")
    return found


class GramMatrices:
    """What the first pass found, tensor by tensor.

    `products[tensor, i, j]` is G, in squares of steps, and `plain_products` the same without division by u.
    `squares[tensor]` is ‖M‖². `elements[tensor]` counts the values, `differing[tensor]` those at which the
    candidates are not all equal. `finite[tensor]` is False when M itself is not.
    """

    def __init__(self, tensors: int, candidates: int) -> None:
        self.products: Array = np.zeros((tensors, candidates, candidates))
        self.plain_products: Array = np.zeros((tensors, candidates, candidates))
        self.squares: Array = np.zeros(tensors)
        self.elements: Array = np.zeros(tensors)
        self.differing: Array = np.zeros(tensors)
        self.finite: Flags = np.ones(tensors, dtype=np.bool_)

    def relative_differences(self, tensors: Sequence[int]) -> Array:
        """‖X − M‖ / ‖M‖ of every candidate X over some tensors, infinite where M is all zeros there."""
        places = list(tensors)
        squares = np.diagonal(self.plain_products, axis1=1, axis2=2)[places].sum(axis=0)
        whole = self.squares[places].sum()
        return np.sqrt(squares / whole) if whole > 0 else np.full(len(squares), np.inf)

    def add(self, place: int, chunk: Chunk) -> None:
        """Add a chunk of the tensor at `place`; the candidates' values are overwritten."""
        merge = chunk.merge
        size = torch.maximum(merge.abs(), smallest_magnitude(chunk.candidates.values()))
        step = step_of(size, chunk.precision)
        square = dot(merge, merge)
        self.finite[place] &= math.isfinite(square)
        self.squares[place] += square
        self.elements[place] += len(merge)
        differences = {n: values.sub_(merge) for n, values in chunk.candidates.items()}
        _add_products(self.plain_products[place], differences)
        self.differing[place] += _count_differing(list(differences.values()))
        for difference in differences.values():
            difference.div_(step)
        _add_products(self.products[place], differences)


def _add_products(target: Array, differences: Mapping[int, torch.Tensor]) -> None:
    candidates = list(differences)
    for place, i in enumerate(candidates):
        for j in candidates[place:]:
            product = dot(differences[i], differences[j])
            target[i, j] += product
            if i != j:
                target[j, i] += product


def _count_differing(tensors: Sequence[torch.Tensor]) -> float:
    """How many places there are at which not all tensors are equal."""
    first, *others = tensors
    if not others:
        return 0.0
    # Sums of distances are several times faster here than comparing.
    apart = (others[0] - first).abs_()
    for tensor in others[1:]:
        apart += (tensor - first).abs_()
    return torch.count_nonzero(apart).item()


def nonfinite_candidates(
    merged: Model, candidates: Sequence[Model], compared: ComparedTensors, gram: GramMatrices
) -> dict[int, str]:
    """Return {place of a candidate: one line about its NaN or infinity}.

    Raises NonFiniteError when the merge holds any.
    """
    of_merge = [name for place, name in enumerate(compared.names) if not gram.finite[place]]
    of_candidates: dict[int, list[str]] = {}
    for place in np.flatnonzero(gram.finite):
        for n in np.flatnonzero(~np.isfinite(np.diagonal(gram.plain_products[place]))).tolist():
            of_candidates.setdefault(n, []).append(compared.names[place])
    faults = {
        n: f"{shown(candidates[n].name)} {NOT_FINITE} in {listing(names)}"
        for n, names in of_candidates.items()
    }
    if of_merge:
        own = f"{shown(merged.name)} {NOT_FINITE} in {listing(of_merge)}"
        raise NonFiniteError("; ".join([own, *faults.values()]))
    return faults

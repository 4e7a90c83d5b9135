"""Part of each tensor from A, the rest from B."""

from __future__ import annotations

from blockmerge.methods import planning
from blockmerge.methods.arithmetic import round_into
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch
from blockmerge.methods.planning import Rows, swapped_columns, swapped_rows


@merge_method(
    locality="row",
    formula="of n rows, ⌊nβ⌋ … ⌊n(α + β)⌋ from B, the others from A. If α + β > 1, rows ⌊n(α + β − 1)⌋ … "
    "⌊nβ⌋ are from A, the others from B. Both α and β are limited to [0, 1]",
    source="SuperMerger's tensor, meh",
    copies=planning.a_to_b_limited,
    rows=swapped_rows,
)
def tensor_sum(
    a: torch.Tensor, b: torch.Tensor, *, alpha: float, beta: float = 0.0, out: torch.Tensor
) -> torch.Tensor:
    """α of the rows from B, from β of the way on and round the end, the others from A: SuperMerger's tensor,
    as meh has it.
    """
    return _take_rows(a, b, swapped_rows(out.shape, alpha, beta), 0, out)


@merge_method(
    locality="tensor",
    formula="tensor_sum on the second axis of tensors that have one",
    source="SuperMerger's tensor2",
    copies=planning.a_to_b_limited,
)
def tensor_sum_columns(
    a: torch.Tensor, b: torch.Tensor, *, alpha: float, beta: float = 0.0, out: torch.Tensor
) -> torch.Tensor:
    """As `tensor_sum`, on the second axis of tensors that have one: SuperMerger's tensor2, without its
    fault.
    """
    return _take_rows(a, b, swapped_columns(out.shape, alpha, beta), min(1, out.dim() - 1), out)


def _take_rows(a: torch.Tensor, b: torch.Tensor, rows: Rows, axis: int, out: torch.Tensor) -> torch.Tensor:
    """Write into `out` the stretches of an axis from the model that each names."""
    if not out.shape:
        return round_into(out, (a, b)[rows[0][2]])
    for start, stop, source in rows:
        round_into(out.narrow(axis, start, stop - start), (a, b)[source].narrow(axis, start, stop - start))
    return out

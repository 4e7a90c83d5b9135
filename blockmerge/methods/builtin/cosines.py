"""Methods that look at the cosines of the whole model first.

Their figures are those of a model's columns, a million or two: SD1.5 has 0.8 million, SDXL 2.0, of 8 bytes
each. All of them stay on the tensors' device, so that nobody waits for a GPU.

Cosines are in float64. *Columns* run along the first axis: there is one for each index of the others; a
tensor of one axis or none is one column. A column of zeros has no cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

from blockmerge.methods.arithmetic import (
    exact_dtype,
    exactly,
    round_into,
    scratch_like,
    slabs,
    wide_dtype,
    widened,
)
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch


def _normalised_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the column cosines, float64 [columns]; NaN where there is none."""
    return _cosines(a, b, normalised=True)[0]


def _mean_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the means of column cosines and whole cosine, float64 [columns]; NaN where there is none."""
    columns, whole = _cosines(a, b, normalised=False)
    return (columns + whole) / 2


def _middle_range(statistics: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the least and the greatest of all figures but the outermost, [2]; twice the same where there is
    no figure.

    NaN is dropped, then what lies below the 1st percentile, then what lies above the 99th of what is left.
    Percentiles are the midpoint of the two values they lie between.
    """
    if not statistics:
        return torch.zeros(2)
    values = torch.cat([figures.to(statistics[0].device) for figures in statistics])
    values = values.nan_to_num(torch.inf).sort().values  # cosines are finite: infinity stands for nothing
    count = (values < torch.inf).sum()
    begin = torch.searchsorted(values, _percentile(values, count * 0, count, 1))
    end = torch.searchsorted(values, _percentile(values, begin, count, 99), right=True)
    return values[torch.stack([begin, end - 1])]


def _percentile(values: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, percent: int) -> torch.Tensor:
    """Of the sorted values from `begin` up to `end`, all of these being 0-dim; the value at `begin` where
    there are none.
    """
    places = percent * (end - begin - 1).clamp(min=0)
    return values[torch.stack([begin + places // 100, begin + -(-places // 100)])].mean()


@merge_method(
    locality="model",
    formula="(1 − k)·B + k·A with k = ((κ + K)/2 − min)/(max − min) − |α|, limited to [0, 1]. Here κ is the "
    "cosine of each column, and K is that of A and B with normalised columns. The min and max are those of "
    "all κ without the outermost 1 %",
    source="SuperMerger's cosineA",
    passes=(_normalised_cosines, _middle_range),
)
def cosine_a(
    a: torch.Tensor, b: torch.Tensor, *, alpha: float, gathered: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """(1 − k)·B + k·A with k = ((κ + K)/2 − min)/(max − min) − |α|, limited to [0, 1]: SuperMerger's cosineA.

    κ are the column cosines, K is the cosine of A and B whose columns have all been divided by their norms;
    `gathered` is (min, max). A where a column has no cosine, and everywhere where max = min.
    """
    columns, whole = _cosines(a, b, normalised=True)
    return _merge(a, b, (columns + whole) / 2, abs(alpha), gathered, out)


@merge_method(
    locality="model",
    formula="(1 − k)·B + k·A with k = (κ − min)/(max − min) − α, limited to [0, 1]. Here κ is the mean of "
    "two cosines: that of each column and that of A and B. The min and max are those of all κ without the "
    "outermost 1 %",
    source="SuperMerger's cosineB",
    passes=(_mean_cosines, _middle_range),
)
def cosine_b(
    a: torch.Tensor, b: torch.Tensor, *, alpha: float, gathered: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """(1 − k)·B + k·A with k = ((κ + K)/2 − min)/(max − min) − α, limited to [0, 1]: SuperMerger's cosineB.

    κ are the column cosines, K is that of the whole tensors; `gathered` is (min, max). A where a column has
    no cosine, and everywhere where max = min.
    """
    columns, whole = _cosines(a, b, normalised=False)
    return _merge(a, b, (columns + whole) / 2, alpha, gathered, out)


def _cosines(a: torch.Tensor, b: torch.Tensor, *, normalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column cosines [columns], and the cosine of the whole tensors, with or without their columns
    normalised.
    """
    rows_a, rows_b = _as_rows(a), _as_rows(b)
    exact = exact_dtype(a.device)
    dots, squares_a, squares_b = torch.zeros(3, rows_a.shape[1], dtype=exact, device=a.device)
    for part in slabs(rows_a):
        wide_a, wide_b = exactly("a", rows_a[part]), exactly("b", rows_b[part])
        dots += torch.mul(wide_a, wide_b, out=scratch_like("product", wide_a)).sum(0)
        squares_a += wide_a.square_().sum(0)
        squares_b += wide_b.square_().sum(0)
    columns = (dots / (squares_a.sqrt() * squares_b.sqrt())).clamp_(-1, 1)
    if normalised:  # then every column that is not of zeros has the norm 1
        dots, squares_a, squares_b = (
            columns.nan_to_num(),
            (squares_a > 0).to(exact),
            (squares_b > 0).to(exact),
        )
    return columns, (dots.sum() / (squares_a.sum().sqrt() * squares_b.sum().sqrt())).clamp_(-1, 1)


def _merge(
    a: torch.Tensor,
    b: torch.Tensor,
    combined: torch.Tensor,
    shift: float,
    gathered: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    low, high = gathered.to(a.device, non_blocking=a.device.type == "cuda")
    of_a = combined.sub(low).div_(high - low).sub_(shift).clamp_(0, 1).nan_to_num_(1.0)
    wide = wide_dtype(a, b, out)
    of_a = torch.where(low < high, of_a, 1.0).to(wide)
    rows_a, rows_b, rows_out = _as_rows(a), _as_rows(b), _as_rows(out)
    for part in slabs(rows_a):
        wide_a, wide_b = widened("a", rows_a[part], wide), widened("b", rows_b[part], wide)
        # Not A − B, which may be too large.
        round_into(rows_out[part], wide_a.mul_(of_a).add_(wide_b.mul_(1 - of_a)))
    return out


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(len(tensor), -1) if tensor.dim() > 1 and tensor.numel() else tensor.view(-1, 1)

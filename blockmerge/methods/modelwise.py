"""Methods that need figures of all tensors first. They take tensors in their real shape and write `out`, of that shape.

For the method `name`, `name_statistics(a, b)` gives a tensor's figures, `name_gathered` what they say together, in whatever
order they come, and the method itself takes that as `gathered`. (The figures of a whole model are a million numbers or two:
SD1.5 has 0.8 million columns, SDXL 2.0, of 8 bytes each.)

Cosines are in float64. *Columns* run along the first axis: there is one for each index of the others; a tensor of one axis
or none is one column. A column of zeros has no cosine.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from blockmerge.methods.arithmetic import exact_dtype, round_into, slabs, wide_dtype

Limits = tuple[float, float] | None


def cosine_a(a: torch.Tensor, b: torch.Tensor, *, alpha: float, gathered: Limits, out: torch.Tensor) -> torch.Tensor:
    """(1 − k)·B + k·A with k = ((κ + K)/2 − min)/(max − min) − |α|, limited to [0, 1]: SuperMerger's cosineA.

    κ are the column cosines, K is the cosine of A and B whose columns have all been divided by their norms; `gathered` is
    (min, max). A where a column has no cosine, and everywhere where max = min.
    """
    columns, whole = _cosines(a, b, normalised=True)
    return _merge(a, b, (columns + whole) / 2, abs(alpha), gathered, out)


def cosine_a_statistics(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the column cosines, float64 [columns], on the CPU; NaN where there is none."""
    return _cosines(a, b, normalised=True)[0].cpu()


def cosine_b(a: torch.Tensor, b: torch.Tensor, *, alpha: float, gathered: Limits, out: torch.Tensor) -> torch.Tensor:
    """(1 − k)·B + k·A with k = ((κ + K)/2 − min)/(max − min) − α, limited to [0, 1]: SuperMerger's cosineB.

    κ are the column cosines, K is that of the whole tensors; `gathered` is (min, max). A where a column has no cosine, and
    everywhere where max = min.
    """
    columns, whole = _cosines(a, b, normalised=False)
    return _merge(a, b, (columns + whole) / 2, alpha, gathered, out)


def cosine_b_statistics(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the means of column cosines and whole cosine, float64 [columns], on the CPU; NaN where there is none."""
    columns, whole = _cosines(a, b, normalised=False)
    return ((columns + whole) / 2).cpu()


def middle_range(statistics: Iterable[torch.Tensor]) -> Limits:
    """Return the least and the greatest of all figures but the outermost; None where there is no figure.

    NaN is dropped, then what lies below the 1st percentile, then what lies above the 99th of what is left. Percentiles are
    the midpoint of the two values they lie between.
    """
    values = torch.cat([torch.empty(0, dtype=torch.float64), *statistics])
    values = values[~values.isnan()].sort().values
    if not len(values):
        return None
    values = values[values >= _percentile(values, 1)]
    values = values[values <= _percentile(values, 99)]
    return float(values[0]), float(values[-1])


cosine_a_gathered = cosine_b_gathered = middle_range


def _percentile(values: torch.Tensor, percent: int) -> torch.Tensor:
    place = percent * (len(values) - 1)
    return (values[place // 100] + values[-(-place // 100)]) / 2


def _cosines(a: torch.Tensor, b: torch.Tensor, *, normalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column cosines [columns], and the cosine of the whole tensors, with or without their columns normalised."""
    rows_a, rows_b = _as_rows(a), _as_rows(b)
    exact = exact_dtype(a.device)
    dots, squares_a, squares_b = torch.zeros(3, rows_a.shape[1], dtype=exact, device=a.device)
    for part in slabs(rows_a.shape):
        wide_a, wide_b = rows_a[part].to(exact), rows_b[part].to(exact)
        dots += (wide_a * wide_b).sum(0)
        squares_a += (wide_a * wide_a).sum(0)
        squares_b += (wide_b * wide_b).sum(0)
    columns = (dots / (squares_a.sqrt() * squares_b.sqrt())).clamp_(-1, 1)
    if normalised:  # then every column that is not of zeros has the norm 1
        dots, squares_a, squares_b = columns.nan_to_num(), (squares_a > 0).to(exact), (squares_b > 0).to(exact)
    return columns, (dots.sum() / (squares_a.sum().sqrt() * squares_b.sum().sqrt())).clamp_(-1, 1)


def _merge(
    a: torch.Tensor, b: torch.Tensor, combined: torch.Tensor, shift: float, gathered: Limits, out: torch.Tensor
) -> torch.Tensor:
    low, high = gathered or (0.0, 0.0)
    if low == high:
        return round_into(out, a)
    of_a = combined.sub(low).div_(high - low).sub_(shift).clamp_(0, 1).nan_to_num_(1.0)
    wide = wide_dtype(a, b, out)
    rows_a, rows_b, rows_out = _as_rows(a), _as_rows(b), _as_rows(out)
    for part in slabs(rows_a.shape):
        round_into(rows_out[part], torch.lerp(rows_b[part].to(wide), rows_a[part].to(wide), of_a.to(wide)))
    return out


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(len(tensor), -1) if tensor.dim() > 1 and tensor.numel() else tensor.view(-1, 1)

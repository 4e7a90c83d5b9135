"""The filters of `smooth_add_difference`: scipy.ndimage's median_filter(size=3), then
gaussian_filter(sigma=1).

Borders are those of its mode ``reflect``: d c b a | a b c d | d c b a. A tensor is gone through in slabs of
its first axis, each with the rows around it that it depends on, so that only slabs are ever held.

The median of 3ⁿ neighbours is found by sorting networks, whose exchanges are of whole slabs at once: along
the first axis each three neighbours are sorted, along the next three such sorted lists are merged into one,
and of the last merge only what leads to the middle is computed. So a list is sorted once for all the
neighbours that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import exp, prod
from typing import TYPE_CHECKING, TypeVar

from blockmerge.methods.arithmetic import as_bytes
from blockmerge.methods.late import np, torch

_RADIUS = 4  # of the Gaussian: 4σ
_TAPS = [exp(-0.5 * distance * distance) for distance in range(-_RADIUS, _RADIUS + 1)]
_SLAB = 1 << 20  # elements filtered at once, and
_LEAST_ROWS = 32  # at least so many rows, since ten more are read around them
_BLOCK = 1 << 15  # elements whose medians are found at once: their sorted lists stay in a processor's cache

if TYPE_CHECKING:
    _Array = TypeVar("_Array", torch.Tensor, np.ndarray)


def smoothed_slabs(
    b: torch.Tensor, c: torch.Tensor, wide: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the filtered B − C of tensors with at least one axis: stretches of the first axis, and the values
    in `wide`.
    """
    rows, *inner = b.shape
    if not b.numel():
        return
    # Neighbours along an axis of one entry are that entry over and over, which changes neither median nor
    # mean.
    kept = [extent for extent in inner if extent > 1]
    step = max(_LEAST_ROWS, _SLAB // prod(kept))
    margin = 1 + _RADIUS
    # The longest axis last, where a processor goes fastest: (in, out, height, width) becomes (height, width,
    # out, in).
    order = [*range(2, len(kept) + 1), 0, *([1] if kept else [])]
    back = [order.index(axis) for axis in range(len(order))]
    row_axis = back[0]
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        near = _reflected(start - margin, stop + margin, rows, b.device)
        wide_b, wide_c = (_taken(one, near).to(wide) for one in (b, c))
        values = (wide_b - wide_c).view(-1, *kept)
        values = _median(values.permute(order).contiguous(), row_axis)
        for axis in range(values.dim()):
            values = _gaussian(values if axis == row_axis else _extended(values, axis, _RADIUS), axis)
        yield slice(start, stop), values.permute(back).reshape(stop - start, *inner)


def _reflected(start: int, stop: int, extent: int, device: torch.device) -> torch.Tensor:
    """Return the entries of an axis that stand at the places [start, stop), which may lie beyond its ends."""
    places = torch.arange(start, stop, device=device) % (2 * extent)
    return torch.minimum(places, 2 * extent - 1 - places)


def _taken(tensor: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    return as_bytes(tensor).index_select(0, entries).view(tensor.dtype)


def _extended(values: torch.Tensor, axis: int, margin: int) -> torch.Tensor:
    extent = values.shape[axis]
    return values.index_select(axis, _reflected(-margin, extent + margin, extent, values.device))


def _gaussian(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Weigh each nine neighbours along an axis, which becomes eight entries shorter."""
    extent = values.shape[axis] - 2 * _RADIUS
    total = torch.zeros_like(values.narrow(axis, 0, extent), memory_format=torch.contiguous_format)
    for place, tap in enumerate(_TAPS):
        total.add_(values.narrow(axis, place, extent), alpha=tap / sum(_TAPS))
    return total


def _median(values: torch.Tensor, row_axis: int) -> torch.Tensor:
    """Return the medians of each 3ⁿ neighbours; the row axis becomes two entries shorter."""
    for axis in range(values.dim()):
        if axis != row_axis:
            values = _extended(values, axis, 1)
    if values.device.type != "cpu":
        return _median_of_block(values, torch.minimum, torch.maximum)
    rows = values.shape[row_axis] - 2
    step = max(1, _BLOCK * rows // max(1, values.numel()))
    parts = [
        values.narrow(row_axis, start, min(step, rows - start) + 2).numpy() for start in range(0, rows, step)
    ]
    # numpy's exchanges of small blocks, which stay in a processor's cache, are several times as fast as
    # torch's.
    return torch.from_numpy(
        np.concatenate([_median_of_block(part, np.minimum, np.maximum) for part in parts], row_axis)
    )


def _median_of_block(
    values: _Array, minimum: Callable[..., _Array], maximum: Callable[..., _Array]
) -> _Array:
    """Return the medians of each 3ⁿ neighbours of a tensor or an array; every axis becomes two entries
    shorter.
    """
    lists = [values]
    for axis in range(values.ndim):
        extent = values.shape[axis] - 2
        around = [(slice(None),) * axis + (slice(place, place + extent),) for place in range(3)]
        wires = [entry[part] for part in around for entry in lists]
        exchanges, outputs = _merging_network(len(lists), axis == values.ndim - 1)
        for low, high, wanted in exchanges:
            one, other = wires[low], wires[high]
            if wanted != "high":
                wires[low] = minimum(one, other)
            if wanted != "low":
                wires[high] = maximum(one, other)
        lists = [wires[output] for output in outputs]
    return lists[0]


Exchange = tuple[int, int, str]
"""Two wires, of which the first gets the smaller value and the second the larger; or only ``"low"`` or
``"high"`` is wanted.
"""


@cache
def _merging_network(length: int, only_middle: bool) -> tuple[list[Exchange], list[int]]:
    """Return the exchanges that merge three sorted lists of a length, one after the other on the wires, and
    the wires in order.

    Of `only_middle` the exchanges that the middle value depends on.
    """
    exchanges: list[tuple[int, int]] = []
    first, second, third = (list(range(start, start + length)) for start in (0, length, 2 * length))
    order = _odd_even_merge(_odd_even_merge(first, second, exchanges), third, exchanges)
    if not only_middle:
        return [(low, high, "both") for low, high in exchanges], order
    middle = order[len(order) // 2]
    wanted, pruned = {middle}, []
    for low, high in reversed(exchanges):
        if low in wanted or high in wanted:
            pruned.append(
                (low, high, "both" if {low, high} <= wanted else "low" if low in wanted else "high")
            )
            wanted |= {low, high}
    return pruned[::-1], [middle]


def _odd_even_merge(one: Sequence[int], other: Sequence[int], exchanges: list[tuple[int, int]]) -> list[int]:
    """Append the exchanges that merge two sorted lists of wires; return the wires in order.

    K. E. Batcher, 1968.
    """
    if not one or not other:
        return [*one, *other]
    if len(one) == len(other) == 1:
        exchanges.append((one[0], other[0]))
        return [one[0], other[0]]
    even = _odd_even_merge(one[::2], other[::2], exchanges)
    odd = _odd_even_merge(one[1::2], other[1::2], exchanges)
    order = even[:1]
    for place in range(max(len(even) - 1, len(odd))):
        pair = [*odd[place : place + 1], *even[place + 1 : place + 2]]
        if len(pair) == 2:
            exchanges.append((pair[0], pair[1]))
        order += pair
    return order

"""The two streamed passes of `explain`: inner products of differences from a merge, and merging again.

For a merge M and candidates X₁ … X_k the first pass finds, for every tensor, the Gram matrix G with G_ij =
⟨(X_i − M)/u, (X_j − M)/u⟩. All fits of M as a combination of candidates follow from it, whichever of them is
the base. u is the step of M's dtype at each value's size, so that rounding counts the same everywhere. (The
size is M's or that of the smallest candidate, whichever is larger: where large values cancel, rounding is
theirs.) That matters where models differ by little: a small value, whose differences are many steps, tells a
weight far more sharply than a large one, whose differences rounding has all but swallowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from blockmerge.checkpoints import Model
from blockmerge.comparing.arrays import Array, Flags
from blockmerge.comparing.sums import CHUNK, ChunkReader, dot
from blockmerge.explaining.linear_fit import MANTISSA
from blockmerge.expressions import Expression
from blockmerge.streaming import Progress, TorchThreads, for_each, thread_count
from blockmerge.streaming.tensors import TORCH_DTYPES

_EXPONENT_BITS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}


class Gram:
    """What the first pass found, tensor by tensor.

    `products[tensor, i, j]` is G, in squares of steps, and `plain` the same without division by u.
    `elements[tensor]` counts the values, `apart[tensor]` those at which the candidates are not all equal.
    `finite[tensor]` is False when M itself is not.
    """

    def __init__(self, tensors: int, candidates: int) -> None:
        self.products: Array = np.zeros((tensors, candidates, candidates))
        self.plain: Array = np.zeros((tensors, candidates, candidates))
        self.elements: Array = np.zeros(tensors)
        self.apart: Array = np.zeros(tensors)
        self.finite: Flags = np.ones(tensors, dtype=np.bool_)


class Remerged:
    """What the second pass found for hypothesis h: `beyond[tensor, h]` values more than two steps off,
    `squares` Σ((M̂−M)/u)².
    """

    def __init__(self, tensors: int, hypotheses: int) -> None:
        self.beyond: Array = np.zeros((tensors, hypotheses))
        self.squares: Array = np.zeros((tensors, hypotheses))


class Pass:
    """Streams a merge and its candidates, tensor by tensor; `models[0]` is the merge.

    `names` are the tensors to look at; `holders[name]` the numbers of the models that are read for it, the
    merge first.
    """

    def __init__(
        self, models: Sequence[Model], names: Sequence[str], holders: Mapping[str, Sequence[int]]
    ) -> None:
        self.models = models
        self.names = names
        self.holders = holders

    def gram(self, threads: int | None, progress: Progress | None) -> Gram:
        """Run the first pass."""
        found = Gram(len(self.names), len(self.models) - 1)

        def look(index: int, values: Mapping[int, torch.Tensor], dtypes: Sequence[str]) -> None:
            merge = values[0]
            step = step_of(torch.maximum(merge.abs(), _smallest(values)), dtypes[0])
            found.finite[index] &= math.isfinite(dot(merge, merge))
            found.elements[index] += len(merge)
            differences = {number: tensor.sub_(merge) for number, tensor in values.items() if number}
            _add_products(found.plain[index], differences)
            numbers = list(differences)
            if len(numbers) > 1:
                # Sums of distances are several times faster here than comparing.
                apart = (differences[numbers[1]] - differences[numbers[0]]).abs_()
                for number in numbers[2:]:
                    apart += (differences[number] - differences[numbers[0]]).abs_()
                found.apart[index] += torch.count_nonzero(apart).item()
            for difference in differences.values():
                difference.div_(step)
            _add_products(found.products[index], differences)

        # Squares of many thousand steps stand beside those of half a step: float32 would lose the small ones.
        self._run(look, "F64", threads, progress)
        return found

    def remerge(
        self, coefficients: Mapping[str, Array], threads: int | None, progress: Progress | None
    ) -> Remerged:
        """Merge again: `coefficients[name][h, i]` is how much of candidate i hypothesis h takes, the sum
        being 1.
        """
        found = Remerged(len(self.names), max(len(rows) for rows in coefficients.values()))

        def look(index: int, values: Mapping[int, torch.Tensor], dtypes: Sequence[str]) -> None:
            merge = values[0]
            step = step_of(_largest(values), dtypes[0])
            rows = coefficients[self.names[index]]
            done: dict[tuple[float, ...], tuple[float, float]] = {}
            for hypothesis, row in enumerate(rows):
                key = tuple(row)
                if key not in done:
                    off = (
                        _combine(values, row)
                        .to(TORCH_DTYPES[dtypes[0]])
                        .to(merge.dtype)
                        .sub_(merge)
                        .div_(step)
                    )
                    low, high = torch.aminmax(off)
                    within = (
                        low.item() >= -2 and high.item() <= 2
                    )  # nearly always; counting takes several times as long
                    beyond = 0.0 if within else float((~(off.abs() <= 2)).sum().item())
                    done[key] = (beyond, torch.dot(off, off).item())
                found.beyond[index, hypothesis] += done[key][0]
                found.squares[index, hypothesis] += done[key][1]

        self._run(look, "F32", threads, progress)
        return found

    def _run(
        self,
        look: Callable[[int, Mapping[int, torch.Tensor], Sequence[str]], None],
        wide: str,
        threads: int | None,
        progress: Progress | None,
    ) -> None:
        infos = [
            {number: self.models[number].tensors[name] for number in self.holders[name]}
            for name in self.names
        ]
        # Longest first: a worker does whole tensors, so that the order of additions never depends on the
        # threads.
        tasks = sorted(range(len(infos)), key=lambda index: -infos[index][0].elements)
        total = sum(info.nbytes for of_tensor in infos for info in of_tensor.values())
        # A chunk of every model and a few more are held by each worker, in float64 of twice the size.
        chunk = CHUNK // max(1 if wide == "F32" else 4, len(self.models) // 2)
        torch_threads = TorchThreads()

        @contextmanager
        def worker() -> Iterator[Callable[[int], int]]:
            torch_threads.single_here()
            with ExitStack() as stack:
                chunks = ChunkReader(self.models, stack)
                yield lambda index: _stream(index, infos[index], chunks, wide, chunk, look)

        try:
            for_each(tasks, worker, thread_count(threads), total, progress)
        finally:
            torch_threads.restore()
        for model in self.models:
            model.source.check_unchanged()


def _stream(
    index: int,
    infos: Mapping[int, Expression],
    chunks: ChunkReader,
    wide: str,
    chunk: int,
    look: Callable[[int, Mapping[int, torch.Tensor], Sequence[str]], None],
) -> int:
    dtypes = [info.dtype for info in infos.values()]
    # Where the merge itself has float32's digits, they must not drown in the arithmetic.
    wide = "F64" if dtypes[0] in ("F32", "F64") else wide
    elements = infos[0].elements
    for start in range(0, elements, chunk):
        count = min(chunk, elements - start)
        look(
            index,
            {number: chunks.read(number, info, start, count, number, wide) for number, info in infos.items()},
            dtypes,
        )
    return sum(info.nbytes for info in infos.values())


def _add_products(target: Array, differences: Mapping[int, torch.Tensor]) -> None:
    numbers = list(differences)
    for place, i in enumerate(numbers):
        for j in numbers[place:]:
            product = dot(differences[i], differences[j])
            target[i - 1, j - 1] += product
            if i != j:
                target[j - 1, i - 1] += product


def _largest(values: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The largest magnitude of all values."""
    first, *others = values.values()
    size = first.abs()
    for tensor in others:
        torch.maximum(size, tensor.abs(), out=size)
    return size


def _smallest(values: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The smallest magnitude among the candidates'."""
    first, *others = (tensor for number, tensor in values.items() if number)
    size = first.abs()
    for tensor in others:
        torch.minimum(size, tensor.abs(), out=size)
    return size


def _combine(values: Mapping[int, torch.Tensor], row: Array) -> torch.Tensor:
    """Σ row[i]·X_i, as the first of them plus differences, so that a copy is a copy to the bit."""
    used = [(number, float(row[number - 1])) for number in values if number and row[number - 1] != 0]
    base = max(used, key=lambda pair: pair[1])[0]
    result = values[base].clone()
    for number, weight in used:
        if number != base:
            result.add_(values[number] - values[base], alpha=weight)
    return result


def step_of(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The distance between neighbouring numbers of `dtype` at the size of each value (a float32 or float64
    tensor).
    """
    mantissa, smallest = MANTISSA[dtype]
    integer, mask = _EXPONENT_BITS[values.dtype]
    powers = values.view(integer).bitwise_and(mask).view(values.dtype)
    # A subnormal number of the wide dtype has no power of its own here, but its step is the smallest one's.
    return powers.clamp_(min=math.ldexp(1.0, max(smallest, -126))).mul_(math.ldexp(1.0, -mantissa))

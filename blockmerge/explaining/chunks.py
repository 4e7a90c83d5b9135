"""A merge and its candidates side by side, chunk by chunk, and the steps of a dtype at their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from blockmerge.checkpoints import Model
from blockmerge.comparing.reading import TensorReader, read_in_parallel
from blockmerge.comparing.sums import CHUNK
from blockmerge.dtypes import Precision
from blockmerge.explaining.compared import stored_precision
from blockmerge.streaming import Progress

_EXPONENT_BITS = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF << 52)}


@dataclass(frozen=True)
class Chunk:
    """A stretch of a tensor as flat tensors of floats, in the merge and in those candidates that are read.

    `dtype` is the one that the merge has the tensor in, `precision` that of what it stores. The values may be
    overwritten.
    """

    name: str
    dtype: str
    precision: Precision
    merge: torch.Tensor
    candidates: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class MergeStream:
    """Reads a merge and its candidates, one pass at a time."""

    merge: Model
    candidates: Sequence[Model]
    threads: int | None
    progress: Progress | None

    def read(
        self, candidates_of: Mapping[str, Sequence[int]], look: Callable[[Chunk], None], dtype: str
    ) -> None:
        """Call `look` with every chunk of some tensors, as floats of `dtype` or of float64.

        `candidates_of` maps the tensors' names to the candidates that are read beside the merge. A thread
        does whole tensors, in order: sums over a tensor never depend on the number of threads.
        """
        # A chunk of every model and a few more are held by each worker, in float64 of twice the size.
        most = CHUNK // max(1 if dtype == "F32" else 4, (1 + len(self.candidates)) // 2)

        def read_tensor(name: str, reader: TensorReader) -> None:
            for chunk in self._chunks(name, candidates_of[name], most, dtype, reader):
                look(chunk)

        tensors = self.merge.tensors
        total = sum(
            model.tensors[name].nbytes
            for name, read in candidates_of.items()
            for model in (self.merge, *(self.candidates[n] for n in read))
        )
        largest_first = sorted(candidates_of, key=lambda name: -tensors[name].elements)
        read_in_parallel(largest_first, read_tensor, total, threads=self.threads, progress=self.progress)
        for model in (self.merge, *self.candidates):
            model.source.check_unchanged()

    def _chunks(
        self, name: str, candidates: Sequence[int], most: int, dtype: str, reader: TensorReader
    ) -> Iterator[Chunk]:
        """Yield a tensor in chunks of at most so many elements; each is valid until the next."""
        tensor = self.merge.tensors[name]
        # Where the merge itself has float32's digits, they must not drown in the arithmetic.
        wide = "F64" if tensor.dtype in ("F32", "F64") else dtype
        for start in range(0, tensor.elements, most):
            count = min(most, tensor.elements - start)
            yield Chunk(
                name,
                tensor.dtype,
                stored_precision(tensor),
                reader.read(self.merge, name, start, count, dtype=wide, buffer="merge"),
                {
                    n: reader.read(self.candidates[n], name, start, count, dtype=wide, buffer=n)
                    for n in candidates
                },
            )


def step_of(values: torch.Tensor, precision: Precision) -> torch.Tensor:
    """The distance between neighbours of a dtype of that precision at the size of each value (float32 or
    float64).

    The values are those of some other, wider dtype, and are not changed.
    """
    integer, mask = _EXPONENT_BITS[values.dtype]
    powers = values.view(integer).bitwise_and(mask).view(values.dtype)
    # A subnormal number of the wide dtype has no power of its own here, but its step is the smallest one's.
    smallest = math.ldexp(1.0, max(precision.least_exponent, -126))
    return powers.clamp_(min=smallest).mul_(math.ldexp(1.0, -precision.mantissa))


def largest_magnitude(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The largest magnitude among several tensors, element by element."""
    first, *others = tensors
    size = first.abs()
    for tensor in others:
        torch.maximum(size, tensor.abs(), out=size)
    return size


def smallest_magnitude(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The smallest magnitude among several tensors, element by element."""
    first, *others = tensors
    size = first.abs()
    for tensor in others:
        torch.minimum(size, tensor.abs(), out=size)
    return size

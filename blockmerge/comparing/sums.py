"""The sums of one streamed pass over the weights of several models, tensor by tensor.

Chunks are summed in float32, which is exact enough over a few hundred thousand elements, and the chunks are
added up in float64: one float32 sum over a large tensor would be off in the fourth digit. Whole tensors are
the workers' tasks, so the order of additions, and with it every digit of the result, is the same for any
number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from blockmerge.checkpoints import Model
from blockmerge.comparing.arrays import Array, Flags, Records
from blockmerge.comparing.reading import TensorReader, read_in_parallel
from blockmerge.comparing.results import Differences
from blockmerge.comparing.sources import weights_of
from blockmerge.errors import BlockmergeError, listing, shown
from blockmerge.expressions import Expression
from blockmerge.streaming import Progress

CHUNK = 1 << 18
"""Elements summed in float32 at once."""

_SMALL = 1e-25
TOO_LARGE = 1e300
NOT_FINITE = "holds NaN or infinity (or values too large to compare)"

MOST_ROWS = 16
"""How many models `sum_pairs` can take as rows at once: it holds a chunk of each."""

DISTANCES = np.dtype(
    [
        ("squares", np.float64),  # Σ(b−a)²
        ("largest", np.float64),  # max |b−a|
        # The rest with a common base c only, else 0:
        ("product_from_base", np.float64),  # Σ(a−c)(b−c)
        ("row_squares_from_base", np.float64),  # Σ(a−c)²
        ("column_squares_from_base", np.float64),  # Σ(b−c)²
    ]
)
"""How far the models a (of a row) and b (of a column) are apart in a tensor."""


@dataclass(frozen=True)
class Sums:
    """Sums of rows × columns models, for every one of `names` (tensors).

    `seen[tensor, model]` says whether the model has the tensor in the shape that the others have;
    `squares[tensor, model]` is Σx²; `products[tensor, row, column]` is Σab, and `distances` (of the same
    shape, records of DISTANCES) is None where only cosines were asked for. `errors` maps models that could
    not be read to why.
    """

    names: tuple[str, ...]
    seen: Flags
    squares: Array
    products: Array
    distances: Records | None
    errors: Mapping[int, str]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def compared(self, row: int, column: int) -> list[int]:
        """The indices of the tensors that a row's and a column's model both have in the same shape."""
        return np.flatnonzero(self.seen[:, row] & self.seen[:, column]).tolist()

    def nonfinite(self, number: int) -> list[str]:
        """The names of the tensors of model `number` that hold NaN or infinity."""
        bad = self.seen[:, number] & ~(self.squares[:, number] < TOO_LARGE)
        return [self.names[index] for index in np.flatnonzero(bad)]

    def error_of(self, number: int, name: str) -> str | None:
        """One line about why a model could not be compared, or None."""
        if number in self.errors:
            return self.errors[number]
        if bad := self.nonfinite(number):
            return f"{shown(name)} {NOT_FINITE} in {listing(bad)}"
        return None

    def differences(self, row: int, column: int, tensors: Sequence[int]) -> Differences:
        """How two models differ over some of the `compared` tensors."""
        assert self.distances is not None, "only cosines were asked for"
        some = list(tensors)
        pair = self.rows.index(row), self.columns.index(column)
        apart = {kind: self.distances[kind][some, *pair] for kind in DISTANCES.names or ()}
        aa, bb = (math.fsum(self.squares[some, number]) for number in (row, column))
        ab, dd = math.fsum(self.products[some, *pair]), math.fsum(apart["squares"])
        from_base = math.fsum(apart["product_from_base"])
        aa_from_base = math.fsum(apart["row_squares_from_base"])
        bb_from_base = math.fsum(apart["column_squares_from_base"])
        return Differences(
            cosine=_cosine(ab, aa, bb) if aa or bb else 1.0,
            relative_difference=math.sqrt(dd / aa) if aa else (None if dd else 0.0),
            max_difference=float(apart["largest"].max(initial=0.0)),
            difference_cosine=(
                _cosine(from_base, aa_from_base, bb_from_base) if aa_from_base and bb_from_base else None
            ),
        )

    def cosine(self, row: int, column: int) -> float:
        """The cosine of two models over all `compared` tensors."""
        compared = self.compared(row, column)
        products = self.products[:, self.rows.index(row), self.columns.index(column)]
        aa, bb = (float(self.squares[compared, number].sum()) for number in (row, column))
        return _cosine(float(products[compared].sum()), aa, bb) if aa or bb else 1.0


def _cosine(ab: float, aa: float, bb: float) -> float:
    # The roots apart: the product of two sums can be too large or too small for a float.
    return max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb))) if aa and bb else 0.0


def sum_pairs(
    models: Sequence[Model],
    rows: Sequence[int],
    columns: Sequence[int],
    *,
    common: int | None = None,
    cosine_only: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Sums:
    """Compare the models `rows` with the models `columns` (numbers of `models`), in one reading of each.

    Row i and column j are compared where i < j. With `common`, that model is the base from which both are
    looked at too. With `cosine_only` there are no distances: the sums of hundreds of models stay small.

    A model that cannot be read is named in `errors`. Raises what is wrong with the common base, and with a
    row that is the only one: without it there is nothing to compare.
    """
    work = _PairSums(models, rows, columns, common, cosine_only)
    work.run(threads, progress)
    return Sums(
        work.names,
        work.seen,
        work.squares,
        work.products,
        work.distances,
        work.errors,
        tuple(rows),
        tuple(columns),
    )


@dataclass(frozen=True)
class _Chunk:
    """A stretch of elements of tensor number `index`, to be looked at as floats of `dtype`."""

    index: int
    start: int
    count: int
    dtype: str


class _PairSums:
    """The sums of one pass, while they are added up: each worker has other tensors, so none needs a lock."""

    def __init__(
        self,
        models: Sequence[Model],
        rows: Sequence[int],
        columns: Sequence[int],
        common: int | None,
        cosine_only: bool,
    ) -> None:
        self.models, self.common = models, common
        self.row_places = {number: place for place, number in enumerate(rows)}
        self.column_places = {number: place for place, number in enumerate(columns)}
        self.tensors = [weights_of(model) for model in models]
        self.names = tuple(dict.fromkeys(name for row in rows for name in self.tensors[row]))
        shape = len(self.names), len(rows), len(columns)
        self.seen: Flags = np.zeros((len(self.names), len(models)), dtype=np.bool_)
        self.squares: Array = np.zeros((len(self.names), len(models)))
        self.products: Array = np.zeros(shape)
        self.distances: Records | None = None if cosine_only else np.zeros(shape, dtype=DISTANCES)
        self.errors: dict[int, str] = {}
        # Fewer elements at once where many rows are held, so that memory does not grow with them.
        self.chunk = CHUNK // len(rows)

    def run(self, threads: int | None, progress: Progress | None) -> None:
        """Read all models once, the largest tensors first."""
        read = {*self.row_places, *self.column_places, *([] if self.common is None else [self.common])}
        tensors = [self.tensors[number] for number in read]
        total = sum(of_one[name].nbytes for of_one in tensors for name in self.names if name in of_one)
        largest_first = sorted(range(len(self.names)), key=lambda index: -self._first(index).elements)
        read_in_parallel(largest_first, self._sum_tensor, total, threads=threads, progress=progress)
        for number in sorted(read - self.errors.keys()):
            try:
                self.models[number].source.check_unchanged()
            except BlockmergeError as error:
                self._leave_out(number, error)

    def _first(self, index: int) -> Expression:
        """A tensor as the first row that has it has it: models where its shape is another do not count."""
        name = self.names[index]
        return next(self.tensors[row][name] for row in self.row_places if name in self.tensors[row])

    def _sum_tensor(self, index: int, reader: TensorReader) -> None:
        """Sum one tensor over all its chunks."""
        name, first = self.names[index], self._first(index)
        alike = {
            number: tensors[name]
            for number, tensors in enumerate(self.tensors)
            if name in tensors and tensors[name].shape == first.shape
        }
        self.seen[index, list(alike)] = True
        dtype = "F64" if any(tensor.dtype == "F64" for tensor in alike.values()) else "F32"
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported at the end
            for start in range(0, first.elements, self.chunk):
                count = min(self.chunk, first.elements - start)
                self._sum_chunk(_Chunk(index, start, count, dtype), reader)

    def _sum_chunk(self, chunk: _Chunk, reader: TensorReader) -> None:
        base = None
        if self.common is not None and self.seen[chunk.index, self.common]:
            base = self._read(self.common, chunk, reader, "common base")
        rows: dict[int, torch.Tensor] = {}
        for number in dict.fromkeys((*self.row_places, *self.column_places)):
            if not self.seen[chunk.index, number]:
                continue
            # All rows are held, but only one column at a time.
            values = self._read(number, chunk, reader, number if number in self.row_places else "column")
            if values is None:
                continue
            if number in self.column_places:
                for row, row_values in rows.items():
                    pair = chunk.index, self.row_places[row], self.column_places[number]
                    self._add_pair(pair, row_values, values, base)
            if number in self.row_places:
                rows[number] = values

    def _read(
        self, number: int, chunk: _Chunk, reader: TensorReader, buffer: str | int
    ) -> torch.Tensor | None:
        """Read a chunk of a model and add up its squares; None for a model that cannot be read."""
        if number in self.errors:
            return None
        try:
            values = reader.read(
                self.models[number],
                self.names[chunk.index],
                chunk.start,
                chunk.count,
                dtype=chunk.dtype,
                buffer=buffer,
            )
        except BlockmergeError as error:
            self._leave_out(number, error)
            return None
        self.squares[chunk.index, number] += dot(values, values)
        return values

    def _add_pair(
        self, pair: tuple[int, int, int], a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None
    ) -> None:
        self.products[pair] += dot(a, b)
        if self.distances is None:
            return
        # Summed directly: from Σa², Σb² and Σab it would cancel.
        difference = b - a
        squares = dot(difference, difference)
        if not math.isfinite(squares):  # two large values of opposite signs
            difference = b.double() - a.double()
            squares = dot(difference, difference)
        low, high = torch.aminmax(difference)
        found = self.distances
        found["squares"][pair] += squares
        found["largest"][pair] = max(found["largest"][pair], -low.item(), high.item())
        if base is not None:
            a, b = a - base, b - base
            found["product_from_base"][pair] += dot(a, b)
            found["row_squares_from_base"][pair] += dot(a, a)
            found["column_squares_from_base"][pair] += dot(b, b)

    def _leave_out(self, number: int, error: BlockmergeError) -> None:
        """Go on without a model that cannot be read, unless nothing can be compared without it."""
        if number == self.common or list(self.row_places) == [number]:
            raise error
        self.errors[number] = str(error)


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Σab of a chunk. Products far from 1 leave float32's range, so then it is summed again in float64."""
    total = torch.dot(a, b).item()
    return total if _SMALL < abs(total) < math.inf else torch.dot(a.double(), b.double()).item()

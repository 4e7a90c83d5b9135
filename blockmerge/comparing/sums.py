"""The sums of one streamed pass over the weights of several models, tensor by tensor.

Chunks are summed in float32, which is exact enough over a few hundred thousand elements, and the chunks are
added up in float64: one float32 sum over a large tensor would be off in the fourth digit. Whole tensors are
the workers' tasks, so the order of additions, and with it every digit of the result, is the same for any
number of threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from blockmerge.checkpoints import Model, Readers
from blockmerge.comparing.arrays import Array, Flags
from blockmerge.comparing.results import Differences
from blockmerge.comparing.sources import weights_of
from blockmerge.dtypes import itemsize
from blockmerge.errors import BlockmergeError, listing, shown
from blockmerge.expressions import Expression
from blockmerge.streaming import Progress, TorchThreads, aligned_buffer, for_each, thread_count
from blockmerge.streaming.tensors import tensor_view

_MOST_OPEN = 24  # files of one worker: systems allow 256 and more in all

CHUNK = 1 << 18
"""Elements summed in float32 at once."""

_SMALL = 1e-25
TOO_LARGE = 1e300
NOT_FINITE = "holds NaN or infinity (or values too large to compare)"

MOST_ROWS = 16
"""How many models `sum_pairs` can take as rows at once: it holds a chunk of each."""

AB, DD, MAX, CAB, CAA, CBB = range(6)
"""What is summed for a pair (a, b): Σab, Σ(b−a)², max|b−a|; with a common base c also Σ(a−c)(b−c), Σ(a−c)²,
Σ(b−c)².
"""


class ChunkReader:
    """One worker's handles and buffers: chunks of any model's tensors, as floats ready to be summed.

    The tensor that `read` returns lies in the buffer `slot` and stays valid until that slot is read into
    again.
    """

    def __init__(self, models: Sequence[Model], stack: ExitStack) -> None:
        self._readers = stack.enter_context(Readers())
        self._raw = aligned_buffer(0)
        self._wide: dict[int, memoryview] = {}

    def read(
        self, number: int, info: Expression, start: int, count: int, slot: int, wide: str = "F32"
    ) -> torch.Tensor:
        """Return `count` elements of a tensor of model `number` from element `start` on, in the dtype
        `wide`.
        """
        size = itemsize(info.dtype) or 0
        wide_size = itemsize(wide) or 0
        if len(self._wide.get(slot, b"")) < count * wide_size:
            self._wide[slot] = aligned_buffer(count * wide_size)
        target = self._wide[slot][: count * wide_size]
        result = tensor_view(target, wide, count)
        if info.dtype == wide:
            self._readers.read_into(info, start * size, target)
            return result
        if len(self._raw) < count * size:
            self._raw = aligned_buffer(count * size)
        raw = self._raw[: count * size]
        self._readers.read_into(info, start * size, raw)
        return result.copy_(tensor_view(raw, info.dtype, count))


@dataclass(frozen=True)
class Sums:
    """Sums of rows × columns models, for every one of `names` (tensors).

    `seen[tensor, model]` says whether the model has the tensor in the shape that the others have;
    `squares[tensor, model]` is Σx²; `pairs[tensor, row, column, kind]` the sums of a pair (kinds: AB, DD, …;
    from CAB on 0 without a common base). `errors` maps models that could not be read to why.
    """

    names: tuple[str, ...]
    seen: Flags
    squares: Array
    pairs: Array
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
        pair = self._pair(row, column)[list(tensors)]
        aa, bb = (math.fsum(self.squares[list(tensors), number]) for number in (row, column))
        ab, dd = math.fsum(pair[:, AB]), math.fsum(pair[:, DD])
        caa, cbb = math.fsum(pair[:, CAA]), math.fsum(pair[:, CBB])
        return Differences(
            cosine=_cosine(ab, aa, bb) if aa or bb else 1.0,
            relative_difference=math.sqrt(dd / aa) if aa else (None if dd else 0.0),
            max_difference=float(pair[:, MAX].max(initial=0.0)),
            difference_cosine=_cosine(math.fsum(pair[:, CAB]), caa, cbb) if caa and cbb else None,
        )

    def cosine(self, row: int, column: int) -> float:
        """The cosine of two models over all `compared` tensors."""
        compared = self.compared(row, column)
        aa, bb = (float(self.squares[compared, number].sum()) for number in (row, column))
        return _cosine(float(self._pair(row, column)[compared, AB].sum()), aa, bb) if aa or bb else 1.0

    def _pair(self, row: int, column: int) -> Array:
        return self.pairs[:, self.rows.index(row), self.columns.index(column)]


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

    Row i and column j are compared where i < j. With `common`, that model is subtracted for the sums CAB, CAA
    and CBB. With `cosine_only` there is AB alone, which keeps the sums of hundreds of models small.
    """
    tensors = [weights_of(model) for model in models]
    names = tuple(dict.fromkeys(name for row in rows for name in tensors[row]))
    work = _PairWork(models, tensors, names, list(rows), list(columns), common, 1 if cosine_only else 6)
    largest = sorted(
        range(len(names)),
        key=lambda index: (
            -next(tensors[r][names[index]].elements for r in rows if names[index] in tensors[r])
        ),
    )
    read = {*rows, *columns, *([] if common is None else [common])}
    total = sum(tensors[number][name].nbytes for number in read for name in names if name in tensors[number])
    threads = thread_count(threads)
    try:
        for_each(largest, work.worker, threads, total, progress)
    finally:
        work.torch_threads.restore()
    for number in sorted(read - work.errors.keys()):
        try:
            models[number].source.check_unchanged()
        except BlockmergeError as error:
            if number == common or list(rows) == [number]:
                raise
            work.errors[number] = str(error)
    return Sums(names, work.seen, work.squares, work.pairs, work.errors, tuple(rows), tuple(columns))


class _PairWork:
    """What the workers of one pass share: they write to different places of the same arrays."""

    def __init__(
        self,
        models: Sequence[Model],
        tensors: Sequence[Mapping[str, Expression]],
        names: Sequence[str],
        rows: Sequence[int],
        columns: Sequence[int],
        common: int | None,
        kinds: int,
    ) -> None:
        self.models, self.tensors, self.names = models, tensors, names
        self.rows, self.columns, self.common = rows, columns, common
        # Fewer elements at once where many rows are held, so that memory does not grow with them.
        self.chunk = CHUNK // len(rows)
        self.seen = np.zeros((len(names), len(models)), dtype=np.bool_)
        self.squares = np.zeros((len(names), len(models)))
        self.kinds = kinds
        self.pairs = np.zeros((len(names), len(rows), len(columns), kinds))
        self.errors: dict[int, str] = {}
        self.lock = threading.Lock()
        self.torch_threads = TorchThreads()

    @contextmanager
    def worker(self) -> Iterator[Callable[[int], int]]:
        self.torch_threads.single_here()
        with ExitStack() as stack:
            chunks = ChunkReader(self.models, stack)
            yield lambda index: self.do_tensor(index, chunks)

    def do_tensor(self, index: int, chunks: ChunkReader) -> int:
        """Sum one tensor over all its chunks; return the bytes read."""
        name = self.names[index]
        infos = {number: tensors[name] for number, tensors in enumerate(self.tensors) if name in tensors}
        shape = next(infos[row].shape for row in self.rows if row in infos)
        infos = {number: info for number, info in infos.items() if info.shape == shape}
        wide = "F64" if any(info.dtype == "F64" for info in infos.values()) else "F32"
        elements = next(iter(infos.values())).elements
        squares: dict[int, float] = {}
        pairs: dict[tuple[int, int], list[float]] = {}
        common = self.common if self.common in infos else None
        read = 0
        for start in range(0, elements, self.chunk):
            count = min(self.chunk, elements - start)
            base = None
            if common is not None:
                base = chunks.read(common, infos[common], start, count, -2, wide)
                squares[common] = squares.get(common, 0.0) + dot(base, base)
                read += infos[common].nbytes * count // elements
            held: dict[int, torch.Tensor] = {}
            for number in dict.fromkeys((*self.rows, *self.columns)):
                if number not in infos or number in self.errors:
                    continue
                try:
                    values = chunks.read(
                        number, infos[number], start, count, number if number in self.rows else -1, wide
                    )
                except BlockmergeError as error:
                    if number == self.rows[0] and len(self.rows) == 1:
                        raise  # without the base there is nothing to compare
                    with self.lock:
                        self.errors[number] = str(error)
                    continue
                read += infos[number].nbytes * count // elements
                if number not in self.rows or number in self.columns:
                    for row, row_values in held.items():
                        found = pairs.setdefault((row, number), [0.0] * self.kinds)
                        _add_pair(found, row_values, values, base)
                squares[number] = squares.get(number, 0.0) + dot(values, values)
                if number in self.rows:
                    held[number] = values
        self.seen[index, list(infos)] = True
        for number, value in squares.items():
            self.squares[index, number] = value
        for (row, column), sums in pairs.items():
            self.pairs[index, self.rows.index(row), self.columns.index(column)] = sums
        return read


def _add_pair(found: list[float], a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None) -> None:
    found[AB] += dot(a, b)
    if len(found) == 1:
        return
    # Summed directly: from Σa², Σb² and Σab it would cancel.
    difference = b - a
    distance = dot(difference, difference)
    if not math.isfinite(distance):  # two large values of opposite signs
        difference = b.double() - a.double()
        distance = dot(difference, difference)
    found[DD] += distance
    low, high = torch.aminmax(difference)
    found[MAX] = max(found[MAX], -low.item(), high.item())
    if base is not None:
        a, b = a - base, b - base
        found[CAB] += dot(a, b)
        found[CAA] += dot(a, a)
        found[CBB] += dot(b, b)


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """Σab of a chunk. Squares of very large and very small float32 values leave float32's range, so those are
    summed again.
    """
    total = torch.dot(a, b).item()
    return total if _SMALL < abs(total) < math.inf else torch.dot(a.double(), b.double()).item()

"""Attention similarity: how alike the self-attention of two U-Nets answers the same random input.

The definition is that of ASimilarityCalculator (Nyanko Lepsoni and RcINS, published with the Certains
models), whose numbers people quote, down to its random stream. For each layer with d×d matrices q, k, v (as
`nn.Linear` holds them):

- X is drawn from N(0, 1), d×d; Q = X·qᵀ, K = X·kᵀ, V = X·vᵀ; S = softmax(Q·Kᵀ) over the last axis, not scaled
- the layer's map is M[i, j] = S[i, j] · Σₘ V[m, j]
- two models' similarity at the layer is the mean over rows of the cosine similarity of their maps

and the result is the mean over the layers. All in float32.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from blockmerge.checkpoints import Model, Readers
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import BlockmergeError, CheckpointError, NonFiniteError, listing, shown
from blockmerge.expressions import Expression
from blockmerge.streaming import Progress, TorchThreads, aligned_buffer, processors
from blockmerge.streaming.tensors import all_finite, tensor_view

T = TypeVar("T")

SEED = 114514

_WORKERS = 2

_SKIPPED_AT_ONCE = 1 << 16
_ROWS_AT_ONCE = 128

_AT_ONCE = 8  # maps held in memory, of d·d·4 bytes each: 6.6 MB for the widest layers


def check_layers(model: Model) -> list[dict[str, Expression]]:
    """Return {"q", "k", "v": tensor} of every layer that the family looks at.

    Raises CheckpointError when one is missing or no d×d matrix of floats, and when the family names none.
    """
    layers, missing = [], []
    family = model.anatomy.family
    if not family.attention.layers:
        raise CheckpointError(
            f"{shown(model.name)} is {family.title}, "
            "and attention similarity is for U-Nets: compare the weights, method='weights' "
            "(--method weights, of similarity)"
        )
    for prefix in family.attention.layers.values():
        names = {letter: f"{prefix}{letter}.weight" for letter in "qkv"}
        found = {letter: model.tensors[name] for letter, name in names.items() if name in model.tensors}
        missing += [name for letter, name in names.items() if letter not in found]
        for letter, info in found.items():
            width = next(iter(found.values())).shape[:1]
            if width in ((), (0,)) or info.shape != width * 2:
                raise CheckpointError(
                    f"{shown(model.name)}: {names[letter]} has the shape {list(info.shape)}, which is not d×d"
                )
            if info.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{shown(model.name)}: {names[letter]} is {info.dtype}, which holds no weights"
                )
        layers.append(found)
    if missing:
        raise CheckpointError(
            f"{shown(model.name)} lacks {len(missing)} attention tensors ({listing(missing, 1)})"
        )
    return layers


class AttentionComparison:
    """Compares models pairwise, layer by layer, on the same random stream.

    `models` are of one family. `errors[i]` says why model i could not be compared, else it is None.
    """

    def __init__(
        self, models: Sequence[Model], *, seed: int = SEED, progress: Progress | None = None
    ) -> None:
        self.models = models
        self.errors: list[str | None] = [None] * len(models)
        self._seed = seed
        self._progress = progress
        self._first_error: BlockmergeError | None = None
        self._layers: list[list[dict[str, Expression]]] = []
        for number, model in enumerate(models):
            self._layers.append([])
            self._guarded(number, lambda: self._layers[-1].extend(check_layers(model)))  # noqa: B023 (called at once)
        self.parts = tuple(models[0].anatomy.family.attention.layers)
        self._done = 0
        self._total = 0

    def raise_error_of_first(self) -> None:
        """Raise what is wrong with model 0: without it nothing can be compared."""
        if self._first_error is not None:
            raise self._first_error

    def against_first(self) -> dict[int, list[float]]:
        """Return {i: similarity to model 0 at every layer} for all other models that could be compared."""
        self._start(len(self.models))
        others = range(1, len(self.models))
        return {column: values for (_, column), values in self._compare([0], others).items()}

    def all_pairs(self) -> dict[tuple[int, int], list[float]]:
        """Return {(i, j): similarity at every layer} for all i < j that could be compared."""
        count = len(self.models)
        tiles = [list(range(start, min(start + _AT_ONCE, count))) for start in range(0, count, _AT_ONCE)]
        self._start(sum(count - tile[0] for tile in tiles))
        pairs: dict[tuple[int, int], list[float]] = {}
        for tile in tiles:
            pairs.update(self._compare(tile, range(tile[-1] + 1, count)))
        return pairs

    def _start(self, reads: int) -> None:
        self._done = 0
        sizes = [sum(info.nbytes for layer in layers for info in layer.values()) for layers in self._layers]
        self._total = max(sizes, default=0) * reads

    def _compare(self, held: Sequence[int], others: Sequence[int]) -> dict[tuple[int, int], list[float]]:
        """Compare the models `held` with each other and with the `others`, holding only their own maps in
        memory.
        """
        found: dict[tuple[int, int], list[float]] = {}
        maps: dict[int, torch.Tensor] = {}
        torch_threads = TorchThreads()
        torch_threads.single_here()
        try:
            with ThreadPoolExecutor(
                _WORKERS, initializer=torch_threads.single_here, initargs=(_threads_each(),)
            ) as workers:
                for number, current in _in_order(self._steps([*held, *others]), workers):
                    if number == held[0]:  # a new layer
                        maps.clear()
                    if current is None:
                        continue
                    for row, row_map in maps.items():
                        found.setdefault((row, number), []).append(_likeness(row_map, current))
                    if number in held:
                        maps[number] = current
                    if self._progress:
                        self._progress(min(self._done, self._total), self._total)
        finally:
            torch_threads.restore()
        return {
            pair: values
            for pair, values in found.items()
            if all(self.errors[number] is None for number in pair)
        }

    def _steps(self, numbers: Sequence[int]) -> Iterator[Callable[[], tuple[int, torch.Tensor | None]]]:
        """For each layer, a step for each model that finds its map."""
        widths = [infos["q"].shape[0] for infos in next((layers for layers in self._layers if layers), [])]
        own = threading.local()
        with ThreadPoolExecutor(1) as drawing:  # one thread: the stream has one order
            draws = _Draws(self._seed, widths, drawing)
            for layer in range(len(widths)):
                drawn = draws.next()
                for number in numbers:
                    yield partial(self._map_of, number, layer, drawn, own)

    def _map_of(
        self, number: int, layer: int, drawn: Future[torch.Tensor], own: threading.local
    ) -> tuple[int, torch.Tensor | None]:
        if self.errors[number] is not None:
            return number, None
        if not hasattr(own, "desk"):
            own.desk = _Desk()
        found: list[torch.Tensor] = []
        infos = self._layers[number][layer]
        self._guarded(number, lambda: found.append(own.desk.attend(self.models[number], infos, drawn)))
        self._done += sum(info.nbytes for info in infos.values())
        return number, found[0] if found else None

    def _guarded(self, number: int, action: Callable[[], None]) -> None:
        try:
            action()
        except BlockmergeError as error:
            self.errors[number] = str(error)
            if number == 0:
                self._first_error = error


class _Draws:
    """The random X of one layer after the other, drawn ahead."""

    def __init__(self, seed: int, widths: Sequence[int], drawing: ThreadPoolExecutor) -> None:
        self._stream = torch.Generator().manual_seed(seed)
        self._widths = iter(widths)
        self._drawing = drawing
        self._ahead = deque[Future[torch.Tensor]]()
        self._draw_another()

    def next(self) -> Future[torch.Tensor]:
        """The next layer's X."""
        self._draw_another()
        return self._ahead.popleft()

    def _draw_another(self) -> None:
        width = next(self._widths, None)
        if width is not None:
            self._ahead.append(self._drawing.submit(torch.randn, (width, width), generator=self._stream))
            self._drawing.submit(self._skip, width)

    def _skip(self, width: int) -> None:
        # The original now builds three nn.Linear for A, whose initial weights come out of the same stream.
        count, thrown_away = 3 * width * width, torch.empty(_SKIPPED_AT_ONCE)
        for start in range(0, count, _SKIPPED_AT_ONCE):
            thrown_away[: count - start].uniform_(generator=self._stream)


class _Desk:
    """One worker's buffers, used again for every model: new memory would cost nearly as much as the
    reading.
    """

    def __init__(self) -> None:
        self._raw = aligned_buffer(0)
        self._weights = torch.empty(0)
        self._projected = torch.empty(0)

    def attend(
        self, model: Model, infos: Mapping[str, Expression], drawn: Future[torch.Tensor]
    ) -> torch.Tensor:
        """Return a layer's map M, d×d."""
        width = infos["q"].shape[0]
        if len(self._weights) < 2 * width * width:
            self._weights = torch.empty(2 * width * width)
            self._projected = torch.empty(2 * width * width)
        weights = self._weights[: 2 * width * width].view(2, width, width)
        with Readers() as reader:
            self._read(reader, infos["v"], weights[0])
            x = drawn.result()
            if len(x) != width:
                raise CheckpointError(f"{shown(model.name)} has attention of width {width}, not {len(x)}")
            # The sum over m of V[m, j] needs no V: it is the sum of X's rows, times vᵀ.
            sums = x.sum(dim=0) @ weights[0].T
            self._read(reader, infos["q"], weights[0])
            self._read(reader, infos["k"], weights[1])
        projected = self._projected[: 2 * width * width].view(width, 2 * width)
        torch.mm(x, weights[:2].view(2 * width, width).T, out=projected)
        scores = projected[:, :width] @ projected[:, width:].T
        torch.softmax(scores, dim=-1, out=scores)
        scores.mul_(sums)
        if not all_finite(scores):
            self._raise_nonfinite(model, infos)
            raise NonFiniteError(
                f"{shown(model.name)} has attention weights so large that their products are infinite"
            )
        return scores

    def _read(self, reader: Readers, info: Expression, target: torch.Tensor) -> None:
        if len(self._raw) < info.nbytes:
            self._raw = aligned_buffer(info.nbytes)
        reader.read_into(info, 0, self._raw[: info.nbytes])
        target.view(-1).copy_(tensor_view(self._raw, info.dtype, info.elements))

    def _raise_nonfinite(self, model: Model, infos: Mapping[str, Expression]) -> None:
        """Raise NonFiniteError when one of the matrices is the reason, which shows in the map and is not
        looked for before.
        """
        with Readers() as reader:
            for info in infos.values():
                matrix = torch.empty(info.shape)
                self._read(reader, info, matrix)
                if not all_finite(matrix.view(-1)):
                    name = next(name for name, other in model.tensors.items() if other is info)
                    raise NonFiniteError(f"{shown(model.name)} holds NaN or infinity in {shown(name)}")


def _likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean over rows of the cosine similarity, some rows at a time: temporary values stay small."""
    total = 0.0
    for start in range(0, len(one), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        total += torch.cosine_similarity(one[rows], other[rows]).double().sum().item()
    return min(total / len(one), 1.0)


def _in_order(steps: Iterable[Callable[[], T]], workers: ThreadPoolExecutor) -> Iterator[T]:
    """Yield what the steps return in their order, while workers already do the next few."""
    waiting: deque[Future[T]] = deque()
    try:
        for step in steps:
            waiting.append(workers.submit(step))
            if len(waiting) > _WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _threads_each() -> int:
    """What is left of the processors for each worker: two matrices at once go better than one on all of
    them.
    """
    return max(1, processors() // _WORKERS)

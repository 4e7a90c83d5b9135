"""Attention similarity: how alike the self-attention of two U-Nets answers the same random input.

The definition is that of ASimilarityCalculator (Nyanko Lepsoni and RcINS, published with the Certains models), whose
numbers people quote, down to its random stream. For each layer with d×d matrices q, k, v (as `nn.Linear` holds them):

- X is drawn from N(0, 1), d×d; Q = X·qᵀ, K = X·kᵀ, V = X·vᵀ; S = softmax(Q·Kᵀ) over the last axis, not scaled
- the layer's map is M[i, j] = S[i, j] · Σₘ V[m, j]
- two models' similarity at the layer is the mean over rows of the cosine similarity of their maps

and the result is the mean over the layers. All in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from blockmerge.anatomy import UNET_PREFIX
from blockmerge.checkpoints import FLOAT_DTYPES, Model, Reader, TensorInfo
from blockmerge.errors import BlockmergeError, CheckpointError, NonFiniteError, listing, shown
from blockmerge.streaming import Progress, aligned_buffer
from blockmerge.streaming.tensors import all_finite, tensor_view

SEED = 114514

LAYERS = {"sd1": range(3, 11), "sd2": range(3, 11), "sdxl": range(0, 6)}
"""Which output blocks are looked at. SD1's are the published ones; SDXL's are all of its output blocks with attention."""

_AT_ONCE = 12  # maps held in memory, of d·d·4 bytes each: 6.6 MB for the widest layers


def check_layers(model: Model) -> list[dict[str, TensorInfo]]:
    """Return {"q", "k", "v": tensor} of every layer. Raises CheckpointError when one is missing or is not square."""
    layers, missing = [], []
    for number in LAYERS[model.anatomy.family.name]:
        prefix = f"{UNET_PREFIX}output_blocks.{number}.1.transformer_blocks.0.attn1.to_"
        names = {letter: f"{prefix}{letter}.weight" for letter in "qkv"}
        found = {letter: model.tensors[name] for letter, name in names.items() if name in model.tensors}
        missing += [name for letter, name in names.items() if letter not in found]
        for letter, info in found.items():
            if len(info.shape) != 2 or info.shape[0] != info.shape[1] or info.shape != next(iter(found.values())).shape:
                raise CheckpointError(f"{shown(model.name)}: {names[letter]} has the shape {list(info.shape)}, which is not d×d")
            if info.dtype not in FLOAT_DTYPES:
                raise CheckpointError(f"{shown(model.name)}: {names[letter]} is {info.dtype}, which holds no weights")
        layers.append(found)
    if missing:
        raise CheckpointError(f"{shown(model.name)} lacks {len(missing)} attention tensors ({listing(missing, 1)})")
    return layers


class AttentionComparison:
    """Compares models pairwise, layer by layer, on the same random stream.

    `models` are of one family. `errors[i]` says why model i could not be compared, else it is None.
    """

    def __init__(self, models: Sequence[Model], *, seed: int = SEED, progress: Progress | None = None) -> None:
        self.models = models
        self.errors: list[str | None] = [None] * len(models)
        self._seed = seed
        self._progress = progress
        self._first_error: BlockmergeError | None = None
        self._layers: list[list[dict[str, TensorInfo]]] = []
        for number, model in enumerate(models):
            self._layers.append([])
            self._guarded(number, lambda: self._layers[-1].extend(check_layers(model)))  # noqa: B023 (called at once)
        family = models[0].anatomy.family.name
        self.parts = tuple(f"OUT{number:02}" for number in LAYERS[family])
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
        """Compare the models `held` with each other and with the `others`, holding only their own maps in memory."""
        found: dict[tuple[int, int], list[float]] = {}
        stream = torch.Generator().manual_seed(self._seed)
        shapes = next((layers for layers in self._layers if layers), [])
        for layer in range(len(shapes)):
            width = shapes[layer]["q"].shape[0]
            x = torch.randn((width, width), generator=stream)
            # The original now builds three nn.Linear layers for A, whose initial weights come out of the same stream.
            skipped = torch.empty(width, width)
            for _ in "qkv":
                skipped.uniform_(generator=stream)
            maps: dict[int, torch.Tensor] = {}
            for number in (*held, *others):
                current = self._map_of(number, layer, x)
                if current is None:
                    continue
                for row, held_map in maps.items():
                    alike = torch.cosine_similarity(held_map, current).mean().item()
                    found.setdefault((row, number), []).append(min(alike, 1.0))
                if number in held:
                    maps[number] = current
        return {pair: values for pair, values in found.items() if self.errors[pair[0]] is None and self.errors[pair[1]] is None}

    def _map_of(self, number: int, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        if self.errors[number] is not None:
            return None
        result: list[torch.Tensor] = []
        self._guarded(number, lambda: result.append(self._attend(number, layer, x)))
        return result[0] if result else None

    def _attend(self, number: int, layer: int, x: torch.Tensor) -> torch.Tensor:
        model, infos = self.models[number], self._layers[number][layer]
        if infos["q"].shape != tuple(x.shape):
            raise CheckpointError(f"{shown(model.name)} has attention of width {infos['q'].shape[0]}, not {len(x)}")
        with model.checkpoint.reader() as reader:
            q, k, v = (_read(reader, model, info) for info in (infos["q"], infos["k"], infos["v"]))
        scores = (x @ q.T) @ (x @ k.T).T
        torch.softmax(scores, dim=-1, out=scores)
        # The sum over m of V[m, j] needs no V: it is the sum of X's rows, times vᵀ.
        scores *= x.sum(dim=0) @ v.T
        self._done += sum(info.nbytes for info in infos.values())
        if self._progress:
            self._progress(min(self._done, self._total), self._total)
        return scores

    def _guarded(self, number: int, action: Callable[[], None]) -> None:
        try:
            action()
        except BlockmergeError as error:
            self.errors[number] = str(error)
            if number == 0:
                self._first_error = error


def _read(reader: Reader, model: Model, info: TensorInfo) -> torch.Tensor:
    buffer = aligned_buffer(info.nbytes)
    reader.read_into(info.offset, buffer)
    values = tensor_view(buffer, info.dtype, info.elements)
    if not all_finite(values):
        name = next(name for name, other in model.tensors.items() if other is info)
        raise NonFiniteError(f"{shown(model.name)} holds NaN or infinity in {shown(name)}")
    return values.float().view(info.shape)

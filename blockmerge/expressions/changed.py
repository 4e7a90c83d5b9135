"""Weights with what adapters add to them, and how much that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from blockmerge.dtypes import size_of, torch_dtype
from blockmerge.expressions.arrangements import Reshaped, Transposed
from blockmerge.expressions.changes import Change, LowRank, Prepared, Tile, parts_of
from blockmerge.expressions.computed import Cast
from blockmerge.expressions.expression import Expression, Shape
from blockmerge.expressions.weight_changes import WeightChange

if TYPE_CHECKING:
    import torch


class Squares(NamedTuple):
    """Sums of squares, on the device that they were computed on: of a weight, of all that is added to it, and
    of what each source adds. None or nothing where only the rest was looked at.

    `is_later` says that another step has changed the weight before, so that it is not the model's.
    """

    weight: torch.Tensor | None = None
    total: torch.Tensor | None = None
    each: Mapping[int, torch.Tensor] = MappingProxyType({})
    is_later: bool = False


@dataclass(frozen=True)
class Changed(Expression):
    """A weight with changes: base + Σ scaleᵢ·changeᵢ, in float32 or float64, rounded once to `dtype`.

    `sources` say whose each change is: numbers, of a joined product one for each part.
    """

    base: Expression
    changes: tuple[Expression, ...]
    scales: tuple[float, ...]
    dtype: str
    sources: tuple[tuple[int, ...], ...] = ()

    in_place = True

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The weight, and its changes."""
        return self.base, *self.changes

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Changed:
        """Another weight, or other changes."""
        return replace(self, base=inputs[0], changes=inputs[1:])

    @property
    def shape(self) -> Shape:
        """That of the weight."""
        return self.base.shape

    @property
    def is_measured(self) -> bool:
        """It is known whose the changes are."""
        return bool(self.sources)

    @property
    def goes_by_tiles(self) -> bool:
        """Nothing is held but the weight and the factors."""
        return not self.base.inputs and all(isinstance(one, Change) for one in self.changes)

    def takes_apart(self, one: Expression) -> bool:
        """Changes are computed where they are added."""
        return isinstance(one, Change)

    @cached_property
    def products(self) -> tuple[tuple[LowRank, tuple[int, ...]], ...]:
        """The products that are added, and whose they are: how large these are, their factors tell."""
        found = zip(map(_product_in, self.changes), self.sources, strict=False)
        return tuple((product, sources) for product, sources in found if product)

    def squares_of_products(self, inputs: Sequence[Sequence[torch.Tensor]]) -> Squares:
        """How large the products are; `inputs` are the factors of each, or what of them `read` says. The
        total is there where they are one, and nothing else is added.
        """
        each: dict[int, torch.Tensor] = {}
        total = None
        for (product, sources), factors in zip(self.products, inputs, strict=True):
            squares = product.squares(factors)
            each |= {source: squares[part, part] for part, source in enumerate(sources)}
            total = squares.sum()
        return Squares(None, total if len(self.changes) == 1 else None, each, _is_changed(self.base))

    def compute(self, inputs: Sequence[Any], out: torch.Tensor, first: int) -> None:
        """Add up, and round."""
        self._add_up(inputs, out, first, None)

    def compute_measured(self, inputs: Sequence[Any], out: torch.Tensor, first: int) -> Squares:
        """The same, and say how large it all is, but for what `squares_of_products` tells."""
        is_later = _is_changed(self.base)
        is_told = len(self.changes) == len(self.products) == 1
        total, each = (None, {}) if is_told else self._measured(inputs[1:], out.view(-1), first)
        of_weight: list[torch.Tensor] = []
        self._add_up(inputs, out, first, None if is_later else of_weight)
        return Squares(None if is_later else _sum(of_weight), total, each, is_later)

    def _add_up(
        self, inputs: Sequence[Any], out: torch.Tensor, first: int, squares: list[torch.Tensor] | None
    ) -> None:
        """Tile by tile, which stays in a cache, where there are factors; `squares` get those of the
        weight.
        """
        from blockmerge.methods.arithmetic import round_into, sum_of_squares, widen_into
        from blockmerge.methods.elementwise import add_changes

        base, *given = inputs
        weight, flat = base.view(-1), out.view(-1)
        if self._tiling is None:
            if squares is not None:
                squares.append(sum_of_squares(weight))
            add_changes(base, given, self.scales, out=out)
            return
        tiles = list(self._tiles(first, len(flat)))
        terms = [
            _Term(change, scale, one, first, flat, tiles)
            for change, scale, one in zip(self.changes, self.scales, given, strict=True)
        ]
        parts = zip(parts_of(weight, tiles), parts_of(flat, tiles), strict=True)
        for number, (before, after) in enumerate(parts):
            total = self._memory(tiles[number], out)
            inside = total
            if len(before) != len(total):
                inside = total.zero_()[tiles[number].inside]
            widen_into(inside, before)
            if squares is not None:
                squares.append(sum_of_squares(inside))
            for term in terms:
                term.add(number, total)
            round_into(after, inside)

    def _measured(
        self, given: Sequence[Any], flat: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The squares of all that is added to a stretch, and of what each source adds, but for products."""
        from blockmerge.methods.arithmetic import scratch_like, sum_of_squares

        tiles = list(self._tiles(first, len(flat)))
        terms: dict[int | None, list[_Term]] = defaultdict(list)
        for change, scale, one, sources in zip(self.changes, self.scales, given, self.sources, strict=True):
            source = None if _product_in(change) else sources[0]
            terms[source].append(_Term(change, scale, one, first, flat, tiles))
        of_all: list[torch.Tensor] = []
        of_each: dict[int, list[torch.Tensor]] = {source: [] for source in terms if source is not None}
        for number, tile in enumerate(tiles):
            total = self._memory(tile, flat).zero_()
            for source, some in terms.items():
                of_source = scratch_like("source", total).zero_()
                for term in some:
                    term.add(number, of_source)
                if source is not None:
                    of_each[source].append(sum_of_squares(of_source[tile.inside]))
                total.add_(of_source)
            of_all.append(sum_of_squares(total[tile.inside]))
        return _sum(of_all), {source: _sum(some) for source, some in of_each.items()}

    @cached_property
    def _tiling(self) -> Change | None:
        """A change that says which elements are computed at once."""
        return next((one for one in self.changes if isinstance(one, Change)), None)

    def _tiles(self, first: int, elements: int) -> Iterable[Tile]:
        """The tiles of a stretch: a single one where no product is added."""
        whole = Tile(slice(0, elements), slice(0, elements))
        return self._tiling.tiles(first, elements) if self._tiling else (whole,)

    def _memory(self, tile: Tile, out: torch.Tensor) -> torch.Tensor:
        """Memory to add up a tile in."""
        from blockmerge.methods.arithmetic import scratch, wide_dtype

        rows = tile.rows.stop - tile.rows.start
        if not self._tiling:
            return scratch("tile", rows, wide_dtype(out, out), out.device)
        dtype = torch_dtype(self._tiling.dtype, out.device)
        return scratch("tile", rows * self._tiling.width, dtype, out.device)

    def simplified(self) -> Expression:
        """A weight that was widened for the sum is widened there."""
        base = self.base
        if isinstance(base, Cast) and size_of(base.dtype) > size_of(base.tensor.dtype):
            return replace(self, base=base.tensor)
        return self

    def _said(self) -> Sequence[str]:
        each = (f"{scale} × {change}" for scale, change in zip(self.scales, self.changes, strict=True))
        return [str(self.base), *each, self.dtype]


class _Term:
    """What is added to a stretch `out` of a weight, in tiles: `given` are the factors of a change, or a
    tensor.
    """

    def __init__(
        self,
        change: Expression,
        scale: float,
        given: Any,
        first: int,
        out: torch.Tensor,
        tiles: Sequence[Tile],
    ) -> None:
        self._change, self._scale, self._tiles = change, scale, tiles
        self._factors: Sequence[Prepared] = ()
        self._parts: Sequence[torch.Tensor] = ()
        if isinstance(change, Change):
            assert scale == 1, "a change has its scale in itself"
            self._factors = change.prepared(given, first, out).of(tiles)
        else:
            self._parts = parts_of(given.view(-1), tiles)

    def add(self, number: int, total: torch.Tensor) -> None:
        """Add what lies in the tile of that number to its `total`."""
        from blockmerge.methods.arithmetic import widened

        if isinstance(self._change, Change):
            self._change.add(self._factors[number], total.view(-1, self._change.width))
            return
        term = widened("term", self._parts[number], total.dtype)
        total[self._tiles[number].inside].add_(term if self._scale == 1 else term.mul_(self._scale))


@dataclass(frozen=True)
class Stepped(Expression):
    """A weight with one change that depends on it: W + strength·(W(1) − W), rounded once to `dtype`.

    The weight is in it once, unlike in a sum of both: of changes of changes, each is computed once. `source`
    says whose the change is.
    """

    change: WeightChange
    strength: float
    dtype: str
    source: int

    locality = "tensor"
    in_place = True

    @property
    def is_measured(self) -> bool:
        """Always."""
        return True

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """Those of the change: the weight, then the factors."""
        return self.change.inputs

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Stepped:
        """The same of another weight, or of other factors."""
        return replace(self, change=self.change.with_inputs(inputs))

    @property
    def shape(self) -> Shape:
        """That of the weight."""
        return self.change.shape

    def compute(self, inputs: Sequence[Any], out: torch.Tensor, first: int) -> None:
        """Add the change, and round."""
        from blockmerge.methods.elementwise import add_changes

        change = self._computed(inputs, out, first)
        add_changes(inputs[0], [change], (self.strength,), out=out)

    def compute_measured(self, inputs: Sequence[Any], out: torch.Tensor, first: int) -> Squares:
        """The same, and say how large it all is."""
        from blockmerge.methods.arithmetic import sum_of_squares

        is_later = _is_changed(self.change.weight)
        weight = None if is_later else sum_of_squares(inputs[0].view(-1))
        total = sum_of_squares(self._computed(inputs, out, first).view(-1)) * self.strength**2
        self.compute(inputs, out, first)
        return Squares(weight, total, {self.source: total}, is_later)

    def _computed(self, inputs: Sequence[Any], out: torch.Tensor, first: int) -> torch.Tensor:
        from blockmerge.methods.arithmetic import scratch

        held = scratch("change", out.numel(), torch_dtype(self.change.dtype, out.device), out.device)
        change = held.view(out.shape)
        self.change.compute(inputs, change, first)
        return change

    def simplified(self) -> Expression:
        """A weight that was widened for the change is widened there."""
        weight = self.change.weight
        if isinstance(weight, Cast) and size_of(weight.dtype) > size_of(weight.tensor.dtype):
            return replace(self, change=replace(self.change, weight=weight.tensor))
        return self

    def _said(self) -> Sequence[str]:
        return [f"{self.strength} × {self.change}", self.dtype]


def _sum(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack(list(numbers)).sum(dtype=torch.float64)


def _product_in(change: Expression) -> LowRank | None:
    """The product that a change is, whichever way its elements stand."""
    while isinstance(change, (Transposed, Reshaped)):
        [change] = change.inputs
    return change if isinstance(change, LowRank) else None


def _is_changed(weight: Expression) -> bool:
    return weight.is_measured or any(map(_is_changed, weight.inputs))

"""Weights with what adapters add to them, and how much that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from blockmerge.dtypes import size_of, torch_dtype
from blockmerge.expressions.arrangements import Joined, Part, Reshaped, Transposed
from blockmerge.expressions.changes import Change, LowRank, Prepared, Tile, parts_of
from blockmerge.expressions.computed import Cast
from blockmerge.expressions.expression import Expression, Shape
from blockmerge.expressions.squares import Squares
from blockmerge.expressions.weight_changes import WeightChange

if TYPE_CHECKING:
    import torch


_Summed = int | str
"""What squares are of: ``"weight"``, ``"total"``, or the number of a source."""


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
        """Nothing is held but the weight and the factors, which are few where there is one change."""
        return not self.base.inputs and len(self.changes) == 1 and isinstance(self.changes[0], Change)

    def takes_apart(self, one: Expression) -> bool:
        """Changes are computed where they are added."""
        return isinstance(one, Change)

    @cached_property
    def products(self) -> tuple[tuple[LowRank, tuple[int, ...]], ...]:
        """The products that are added, and whose they are: how large these are, their factors tell."""
        if not self.is_measured:
            return ()
        found = zip(map(_product_in, self.changes), self.sources, strict=True)
        return tuple((product, sources) for product, sources in found if product)

    def squares_of_products(self, inputs: Iterable[Sequence[torch.Tensor]]) -> Squares:
        """How large the products are; `inputs` are the factors of each, or what of them `read` says. The
        total is there where they are one, and nothing else is added.
        """
        each: dict[int, torch.Tensor] = {}
        total = None
        for (product, sources), factors in zip(self.products, inputs, strict=True):
            squares = product.squares(factors)
            each |= {source: squares[part, part] for part, source in enumerate(sources)}
            total = squares.sum()
        total = total if len(self.changes) == 1 else None
        return Squares(None, total, each, _is_changed(self.base), _is_torn(self.base))

    def compute(self, inputs: Sequence[Any], out: torch.Tensor, first: int) -> None:
        """Add up, and round."""
        self._add_up(inputs, out, first, None)

    def compute_measured(self, inputs: Sequence[Any], out: torch.Tensor, first: int) -> Squares:
        """The same, and say how large it all is, but for what `squares_of_products` tells."""
        sums: dict[_Summed, list[torch.Tensor]] = defaultdict(list)
        self._add_up(inputs, out, first, sums)
        found = {what: _sum(some) for what, some in sums.items()}
        is_later = _is_changed(self.base)
        weight = found.pop("weight")
        return Squares(
            None if is_later else weight,
            found.pop("total", None),
            {source: one for source, one in found.items() if isinstance(source, int)},
            is_later,
            _is_torn(self.base),
        )

    def _add_up(
        self,
        inputs: Sequence[Any],
        out: torch.Tensor,
        first: int,
        sums: dict[_Summed, list[torch.Tensor]] | None,
    ) -> None:
        """Tile by tile, which stays in a cache. `sums` gets the squares of each, by what they are of."""
        base, *given = inputs
        flat = out.view(-1)
        tiles = list(self._tiles(first, flat.numel()))
        terms = self._terms(given, first, flat, tiles)
        parts = zip(tiles, parts_of(base.view(-1), tiles), parts_of(flat, tiles), strict=True)
        dtype = self._wide_dtype(inputs, flat)
        # A product alone is added to the weight in one go; of several changes, the sum is wanted first.
        if len(self.changes) == 1 and _product_in(self.changes[0]):
            [[term]] = terms.values()
            self._add_product(parts, term, dtype, sums)
        else:
            self._add_several(parts, terms, dtype, sums)

    def _add_product(
        self,
        parts: Iterable[_Part],
        term: _InTiles,
        dtype: torch.dtype,
        sums: dict[_Summed, list[torch.Tensor]] | None,
    ) -> None:
        """Add the only change, a product. As little as can be is done for each tile: while one thread is in
        Python, the others that have computed theirs wait for it.
        """
        from blockmerge.methods.arithmetic import round_into, scratch, widen_into

        for number, (tile, before, after) in enumerate(parts):
            total = scratch("tile", tile.elements, dtype, after.device)
            weight = total
            if tile.is_cut:
                weight = total.zero_()[tile.inside]
            widen_into(weight, before)
            _note(sums, "weight", weight)
            term.add(number, total)
            round_into(after, weight)

    def _add_several(
        self,
        parts: Iterable[_Part],
        terms: Mapping[int | None, Sequence[_InTiles]],
        dtype: torch.dtype,
        sums: dict[_Summed, list[torch.Tensor]] | None,
    ) -> None:
        """Add up what is added, and add that to the weight."""
        from blockmerge.methods.arithmetic import round_into, scratch, widened

        for number, (tile, before, after) in enumerate(parts):
            total = scratch("tile", tile.elements, dtype, after.device).zero_()
            weight = widened("weight", before, dtype)
            _note(sums, "weight", weight)
            for source, some in terms.items():
                _add(some, source, number, total, tile, sums)
            inside = total[tile.inside]
            _note(sums, "total", inside)
            round_into(after, inside.add_(weight))

    def _terms(
        self, given: Sequence[Any], first: int, flat: torch.Tensor, tiles: Sequence[Tile]
    ) -> dict[int | None, list[_InTiles]]:
        """What is added, by its source; None for products, whose squares their factors tell."""
        terms: dict[int | None, list[_InTiles]] = defaultdict(list)
        each = zip(self.changes, self.scales, given, strict=True)
        for number, (change, scale, one) in enumerate(each):
            is_told = _product_in(change) or not self.sources
            source = None if is_told else self.sources[number][0]
            terms[source].append(_InTiles(change, scale, one, first, flat, tiles))
        return terms

    @cached_property
    def _tiling(self) -> Change | None:
        """A change that says which elements are computed at once."""
        return next((one for one in self.changes if isinstance(one, Change)), None)

    def _tiles(self, first: int, elements: int) -> Iterable[Tile]:
        """The tiles of a stretch: a single one where no product is added."""
        whole = Tile(slice(0, elements), slice(0, elements), elements)
        return self._tiling.tiles(first, elements) if self._tiling else (whole,)

    def _wide_dtype(self, inputs: Sequence[Any], out: torch.Tensor) -> torch.dtype:
        """What it is added up in."""
        from blockmerge.methods.arithmetic import wide_dtype

        return torch_dtype(self._tiling.dtype, out.device) if self._tiling else wide_dtype(*inputs, out)

    def simplified(self) -> Expression:
        """A weight that was widened for the sum is widened there."""
        base = self.base
        if isinstance(base, Cast) and size_of(base.dtype) > size_of(base.tensor.dtype):
            return replace(self, base=base.tensor)
        return self

    def _said(self) -> Sequence[str]:
        each = (f"{scale} × {change}" for scale, change in zip(self.scales, self.changes, strict=True))
        return [str(self.base), *each, self.dtype]


_Part = tuple[Tile, "torch.Tensor", "torch.Tensor"]
"""A tile, and what lies in it of the weight and of the result."""


class _InTiles:
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
        self._scale, self._tiles = scale, tiles
        self._change = change if isinstance(change, Change) else None
        self._factors: Sequence[Prepared] = ()
        self._parts: Sequence[torch.Tensor] = ()
        if self._change:
            assert scale == 1, "a change has its scale in itself"
            self._factors = self._change.prepared(given, first, out).of(tiles)
        else:
            self._parts = parts_of(given.view(-1), tiles)

    def add(self, number: int, total: torch.Tensor) -> None:
        """Add what lies in the tile of that number to its `total`."""
        from blockmerge.methods.arithmetic import widened

        if self._change:
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
    source: int | None

    locality = "tensor"
    in_place = True

    @property
    def is_measured(self) -> bool:
        """It is known whose the change is."""
        return self.source is not None

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
        self.compute_measured(inputs, out, first, is_asked=False)

    def compute_measured(
        self, inputs: Sequence[Any], out: torch.Tensor, first: int, *, is_asked: bool = True
    ) -> Squares:
        """The same, and say how large it all is."""
        from blockmerge.methods.arithmetic import scratch, sum_of_squares
        from blockmerge.methods.elementwise import add_changes

        held = scratch("change", out.numel(), torch_dtype(self.change.dtype, out.device), out.device)
        change = held.view(out.shape)
        self.change.compute(inputs, change, first)
        found = Squares()
        if is_asked:
            weight, is_later = self.change.weight, _is_changed(self.change.weight)
            total = sum_of_squares(held) * self.strength**2
            of_weight = None if is_later else sum_of_squares(inputs[0].view(-1))
            assert self.source is not None
            found = Squares(of_weight, total, {self.source: total}, is_later, _is_torn(weight))
        add_changes(inputs[0], [change], (self.strength,), out=out)
        return found

    def simplified(self) -> Expression:
        """A weight that was widened for the change is widened there."""
        weight = self.change.weight
        if isinstance(weight, Cast) and size_of(weight.dtype) > size_of(weight.tensor.dtype):
            return replace(self, change=replace(self.change, weight=weight.tensor))
        return self

    def _said(self) -> Sequence[str]:
        return [f"{self.strength} × {self.change}", self.dtype]


def unmeasured(expression: Expression) -> Expression:
    """The same, without saying how large changes are."""
    if isinstance(expression, Changed):
        expression = replace(expression, sources=())
    elif isinstance(expression, Stepped):
        expression = replace(expression, source=None)
    inputs = expression.inputs
    found = tuple(map(unmeasured, inputs))
    is_same = all(new is old for new, old in zip(found, inputs, strict=True))
    return expression if is_same else expression.with_inputs(found)


def _add(
    terms: Sequence[_InTiles],
    source: int | None,
    number: int,
    total: torch.Tensor,
    tile: Tile,
    sums: dict[_Summed, list[torch.Tensor]] | None,
) -> None:
    """Add what one source adds to a tile: apart first, as its squares are wanted."""
    from blockmerge.methods.arithmetic import scratch_like

    apart = total if source is None else scratch_like("source", total).zero_()
    for term in terms:
        term.add(number, apart)
    if source is not None:
        _note(sums, source, apart[tile.inside])
        total.add_(apart)


def _note(sums: dict[_Summed, list[torch.Tensor]] | None, what: _Summed, values: torch.Tensor) -> None:
    from blockmerge.methods.arithmetic import sum_of_squares

    if sums is not None:
        sums[what].append(sum_of_squares(values))


def _sum(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack(list(numbers)).sum(dtype=torch.float64)


def _product_in(change: Expression) -> LowRank | None:
    """The product that a change is, whichever way its elements stand."""
    while isinstance(change, (Transposed, Reshaped)):
        [change] = change.inputs
    return change if isinstance(change, LowRank) else None


def _is_torn(weight: Expression) -> bool:
    """Whether a weight that was changed before was so in other input channels."""
    is_cut = isinstance(weight, (Part, Joined)) and weight.axis == 1
    return (is_cut and _is_changed(weight)) or any(map(_is_torn, weight.inputs))


def _is_changed(weight: Expression) -> bool:
    return weight.is_measured or any(map(_is_changed, weight.inputs))

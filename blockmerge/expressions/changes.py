"""What adapters add to a weight: products of small factors, computed where they are needed.

A change is never held whole. It is computed in tiles of rows that are counted from the first row of the
module's own weight, whatever part of it is asked for, so that the bits are the same however it is cut.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from blockmerge.dtypes import torch_dtype
from blockmerge.expressions.expression import Expression, Shape

if TYPE_CHECKING:
    import torch

_TILE = 1 << 18  # elements, of which all that is computed with them stays in a cache
_LEAST_ROWS = 16
_ONE_BLOCK = 128  # of a rank: libraries add up products in blocks of some hundreds, each to what is there
_ROWS_WIDENED = 1 << 11  # of factors whose squares are summed
_ALIGNED = 64  # bytes: as torch's own memory is


class Tile(NamedTuple):
    """Some `rows` of a weight that are computed at once. Of their `elements`, those of the slice `inside` are
    wanted.
    """

    rows: slice
    inside: slice
    elements: int

    @property
    def is_cut(self) -> bool:
        """Not all elements are wanted."""
        return self.inside != slice(0, self.elements)


class Prepared(NamedTuple):
    """Factors made ready for a stretch: what has `rows` of the weight, and what is `whole`."""

    rows: slice
    by_rows: Sequence[torch.Tensor]
    whole: Sequence[torch.Tensor]

    def of(self, tiles: Sequence[Tile]) -> list[Prepared]:
        """The same for each of the tiles that all the rows are."""
        import torch

        counts = [tile.rows.stop - tile.rows.start for tile in tiles]
        by_rows = [torch.split(one, counts) for one in self.by_rows]
        each = zip(*by_rows, strict=True) if by_rows else [()] * len(tiles)
        return [Prepared(tile.rows, here, self.whole) for tile, here in zip(tiles, each, strict=True)]


def parts_of(stretch: torch.Tensor, tiles: Sequence[Tile]) -> Sequence[torch.Tensor]:
    """What of a flat stretch lies in each of its tiles. Views are made at once: each that is made alone has
    all threads wait for the interpreter.
    """
    import torch

    return torch.split(stretch, [tile.inside.stop - tile.inside.start for tile in tiles])


@dataclass(frozen=True)
class Change(Expression):
    """What is added to a weight, in float32 or float64: made of factors, of which all elements depend on all.

    `shape` is that of the weight, or of some rows of it; `begin` the number of its first element there.
    """

    shape: Shape
    dtype: str
    begin: int = 0

    reads_whole: ClassVar[bool] = True

    @property
    def depends_on_place(self) -> bool:
        """An element depends on its place in the weight."""
        return True

    @property
    @abstractmethod
    def rows(self) -> int:
        """The rows of the whole weight."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The elements of a row."""

    @property
    def tile(self) -> int:
        """The elements that are computed at once: whole rows."""
        return self.tile_rows * self.width

    @property
    def tile_rows(self) -> int:
        """The rows of a tile."""
        return max(_LEAST_ROWS, _TILE // self.width // _LEAST_ROWS * _LEAST_ROWS)

    def read_by_rows(self, place: int) -> bool:
        """Whether the input at a place has a row for each of the weight."""
        return False

    def part(self, start: int, stop: int) -> Change:
        """Entries of the first axis."""
        begin = self.begin + start * prod(self.shape[1:])
        return replace(self, shape=(stop - start, *self.shape[1:]), begin=begin)

    def later(self, begin: int) -> Change:
        """A part begins later in the same weight."""
        return replace(self, begin=self.begin + begin)

    def read(self, place: int, first: int, elements: int) -> tuple[int, Shape]:
        """Where in an input lies what a stretch of the result is made of: from which element on, and in which
        shape.
        """
        shape = self.inputs[place].shape
        if not self.read_by_rows(place):
            return 0, shape
        rows = self._rows_for(first, elements)
        return rows.start * prod(shape[1:]), (rows.stop - rows.start, *shape[1:])

    def _rows_for(self, first: int, elements: int) -> slice:
        """The rows of the tiles that a stretch lies in."""
        begin = self.begin + first
        tiles = begin // self.tile, -(-(begin + elements) // self.tile)
        return slice(tiles[0] * self.tile_rows, min(tiles[1] * self.tile_rows, self.rows))

    def tiles(self, first: int, elements: int) -> Iterator[Tile]:
        """Yield the tiles that a stretch of the result lies in."""
        begin, width, step = self.begin + first, self.width, self.tile_rows
        read = self._rows_for(first, elements)
        for at in range(read.start, read.stop, step):
            rows = slice(at, min(at + step, read.stop))
            start, stop = rows.start * width, rows.stop * width
            low, high = max(start, begin), min(stop, begin + elements)
            yield Tile(rows, slice(low - start, high - start), stop - start)

    def prepared(self, inputs: Sequence[torch.Tensor], first: int, out: torch.Tensor) -> Prepared:
        """The factors for a stretch `out` of a result, which are what `read` says, in this change's dtype."""
        like = out[:0].to(torch_dtype(self.dtype, out.device))
        return Prepared(self._rows_for(first, len(out)), *self._made_ready(inputs, like))

    @abstractmethod
    def _made_ready(
        self, inputs: Sequence[torch.Tensor], like: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What `fill` wants: what has rows of the weight, and what has not."""

    @abstractmethod
    def fill(self, factors: Prepared, out: torch.Tensor) -> None:
        """Write some rows of the change, [rows, width]."""

    def add(self, factors: Prepared, total: torch.Tensor) -> None:
        """Add some rows of the change to `total` [rows, width]."""
        from blockmerge.methods.arithmetic import scratch_like

        term = scratch_like("term", total)
        self.fill(factors, term)
        total.add_(term)

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Compute the tiles that a stretch lies in, and take it out of them. Inputs are what `read` says."""
        from blockmerge.methods.arithmetic import scratch

        flat = out.view(-1)
        tiles = list(self.tiles(first, len(flat)))
        factors = self.prepared(inputs, first, flat).of(tiles)
        for tile, target, some in zip(tiles, parts_of(flat, tiles), factors, strict=True):
            # Products may depend on where memory begins, too.
            fits = not tile.is_cut and target.data_ptr() % _ALIGNED == 0
            memory = target if fits else scratch("tile", tile.elements, out.dtype, out.device)
            self.fill(some, memory.view(-1, self.width))
            if not fits:
                target.copy_(memory[tile.inside])


@dataclass(frozen=True)
class LowRank(Change):
    """Σ scaleᵢ·upᵢ·downᵢ, as one product of joined factors.

    `ups` are [rows, rank, …], `downs` [rank, width, …]; what further axes a factor has is of no matter.
    """

    ups: tuple[Expression, ...] = ()
    downs: tuple[Expression, ...] = ()
    scales: tuple[float, ...] = ()

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """All ups, then all downs."""
        return (*self.ups, *self.downs)

    def with_inputs(self, inputs: tuple[Expression, ...]) -> LowRank:
        """The same of other factors."""
        count = len(self.ups)
        return replace(self, ups=inputs[:count], downs=inputs[count:])

    @property
    def rows(self) -> int:
        """Those of the ups."""
        return self.ups[0].shape[0]

    @cached_property
    def width(self) -> int:
        """That of the downs."""
        return prod(self.downs[0].shape[1:])

    def read_by_rows(self, place: int) -> bool:
        """The ups are."""
        return place < len(self.ups)

    def _made_ready(
        self, inputs: Sequence[torch.Tensor], like: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """All ups side by side, each with its scale, and all downs one below the other."""
        count = len(self.ups)
        return [self._side_by_side(inputs[:count], like)], [self._stacked(inputs[count:], like)]

    def _side_by_side(self, ups: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        import torch

        ranks = [down.shape[0] for down in self.downs]
        joined = like.new_empty(len(ups[0]), sum(ranks))
        for scale, up, place in zip(self.scales, ups, torch.split(joined, ranks, dim=1), strict=True):
            place.copy_(up.reshape(len(up), -1)).mul_(scale)
        return joined

    def _stacked(self, downs: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        import torch

        joined = like.new_empty(sum(map(len, downs)), self.width)
        for down, place in zip(downs, torch.split(joined, [len(down) for down in downs]), strict=True):
            place.copy_(down.reshape(len(down), -1))
        return joined

    def fill(self, factors: Prepared, out: torch.Tensor) -> None:
        """Multiply."""
        import torch

        torch.mm(factors.by_rows[0], factors.whole[0], out=out)

    def add(self, factors: Prepared, total: torch.Tensor) -> None:
        """Multiply and add, in one go where that gives the same: ranks that are multiplied in one block."""
        [up], [down] = factors.by_rows, factors.whole
        if down.shape[0] <= _ONE_BLOCK:
            total.addmm_(up, down)
        else:
            super().add(factors, total)

    def squares(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """⟨Cᵢ, Cⱼ⟩ of the products C, from the factors alone: [parts, parts]. Inputs are what `read` says.

        Of C = up·down, ⟨Cᵢ, Cⱼ⟩ is the sum of all elements of (upᵢᵀ·upⱼ)∘(downᵢ·downⱼᵀ).
        """
        import torch

        like = inputs[0].new_empty(0, dtype=torch_dtype(self.dtype, inputs[0].device))
        down = self._stacked(inputs[len(self.ups) :], like)
        inner = down @ down.T
        # What is read begins with a tile. Not all rows are widened at once, as they may be many.
        begin = self.begin // self.width - self._rows_for(0, self.elements).start
        rows = [one[begin : begin + self.elements // self.width] for one in inputs[: len(self.ups)]]
        of_ups = torch.zeros_like(inner)
        for some in zip(*(torch.split(one, _ROWS_WIDENED) for one in rows), strict=True):
            up = self._side_by_side(some, like)
            of_ups.addmm_(up.T, up)
        inner.mul_(of_ups)
        ranks = [one.shape[0] for one in self.downs]
        over_rows = torch.stack([one.sum(0) for one in torch.split(inner, ranks)])
        return torch.stack([one.sum(1) for one in torch.split(over_rows, ranks, dim=1)], dim=1)

    def _said(self) -> Sequence[str]:
        each = zip(self.scales, self.ups, self.downs, strict=True)
        return [f"{scale} × {up} @ {down}" for scale, up, down in each]


@dataclass(frozen=True)
class OfFactors(Change):
    """What is made of a few factors, times `scale`."""

    factors: tuple[Expression, ...] = ()
    scale: float = 1.0

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The factors."""
        return self.factors

    def with_inputs(self, inputs: tuple[Expression, ...]) -> OfFactors:
        """The same of other factors."""
        return replace(self, factors=inputs)

    def _said(self) -> Sequence[str]:
        return [f"{self.scale}", *map(str, self.factors)]


@dataclass(frozen=True)
class Hadamard(OfFactors):
    """scale·(w1_a·w1_b)∘(w2_a·w2_b): LoHa (FedPara, arXiv 2108.06098).

    `factors` are w1_a [rows, rank], w1_b [rank, width], w2_a and w2_b.
    """

    @property
    def rows(self) -> int:
        """Those of w1_a."""
        return self.factors[0].shape[0]

    @property
    def width(self) -> int:
        """That of w1_b."""
        return prod(self.factors[1].shape[1:])

    def read_by_rows(self, place: int) -> bool:
        """w1_a and w2_a are."""
        return place in (0, 2)

    def _made_ready(
        self, inputs: Sequence[torch.Tensor], like: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The scale in w1_a."""
        first_a, first_b, second_a, second_b = (_matrix(one, like.dtype) for one in inputs)
        return [first_a * self.scale, second_a], [first_b, second_b]

    def fill(self, factors: Prepared, out: torch.Tensor) -> None:
        """Multiply both products."""
        import torch

        torch.mm(factors.by_rows[0], factors.whole[0], out=out)
        out.mul_(factors.by_rows[1] @ factors.whole[1])


@dataclass(frozen=True)
class Kronecker(OfFactors):
    """scale·w1⊗w2: LoKr (LyCORIS, arXiv 2309.14859). `factors` are w1 [a, b] and w2 [c, d, …]."""

    @property
    def rows(self) -> int:
        """A row for each pair of rows."""
        first, second = self.factors
        return first.shape[0] * second.shape[0]

    @property
    def width(self) -> int:
        """An element for each pair of columns; the second's further axes go along."""
        first, second = self.factors
        return first.shape[1] * prod(second.shape[1:])

    def _made_ready(
        self, inputs: Sequence[torch.Tensor], like: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The scale in the first."""
        first, second = (_matrix(one, like.dtype) for one in inputs)
        return [], [first * self.scale, second]

    def fill(self, factors: Prepared, out: torch.Tensor) -> None:
        """Multiply each row of the first with each of the second."""
        import torch

        first, second = factors.whole
        numbers = torch.arange(factors.rows.start, factors.rows.stop, device=out.device)
        each = len(second)
        of_first = first[torch.div(numbers, each, rounding_mode="floor")]
        torch.mul(
            of_first.unsqueeze(2),
            second[numbers % each].unsqueeze(1),
            out=out.view(len(out), first.shape[1], -1),
        )


@dataclass(frozen=True)
class Contracted(Expression):
    """Small factors of a convolution made one, as `formula` says in the words of `torch.einsum`."""

    formula: str
    factors: tuple[Expression, ...]
    shape: Shape
    dtype: str

    locality = "tensor"

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The factors."""
        return self.factors

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Contracted:
        """The same of other factors."""
        return replace(self, factors=inputs)

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Contract."""
        import torch

        out.copy_(torch.einsum(self.formula, *(one.to(out.dtype) for one in inputs)).reshape(out.shape))


def _matrix(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return factor.reshape(len(factor), -1).to(dtype)

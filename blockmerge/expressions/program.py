"""`Program`: what is computed for a tensor, without saying from which bytes.

An expression is its program and the leaves that the program is applied to. Neighbours in a file that are
treated alike have one program, so that they can be computed as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from blockmerge.dtypes import torch_dtype
from blockmerge.expressions.arrangements import Arrangement, is_arranged
from blockmerge.expressions.changed import Changed
from blockmerge.expressions.computed import Dequantised, Merged
from blockmerge.expressions.expression import LOCALITIES, Expression, Locality, Shape
from blockmerge.expressions.leaves import Leaf
from blockmerge.expressions.squares import Squares
from blockmerge.methods import Method

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Placeholder(Leaf):
    """The place of an operand in a program. Its shape is empty where elements are all that matters."""

    number: int
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"${self.number}"


@dataclass(frozen=True)
class Program:
    """What is computed, by whatever kinds, from operands.

    `locality` says how it may be cut: ``"element"`` anywhere, ``"row"`` between entries of the first axis,
    else nowhere. Get one from `Programs`: equal ones are then the same object. Holds no names, offsets or
    files.
    """

    root: Expression
    locality: Locality
    placeholders: tuple[Placeholder, ...]
    depends_on_place: bool

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.root, self.locality))

    @cached_property
    def factor_bytes(self) -> int:
        """The size of all that is read whole for a stretch, however small that is."""
        return sum(self.placeholders[number].nbytes for number in self._factors)

    @property
    def is_copy(self) -> bool:
        """Whether the result is the operand's bytes."""
        return isinstance(self.root, Placeholder)

    @property
    def joins(self) -> bool:
        """Whether two tensors of this program may be computed as one, where they lie one behind the other."""
        return self.locality == "element" and not self.depends_on_place and not self.is_measured

    @cached_property
    def is_measured(self) -> bool:
        """Whether some of it says how large what is added to a weight is."""
        return any(one.is_measured for one in _nodes(self.root))

    @property
    def goes_by_tiles(self) -> bool:
        """Whether `run` may be given as much at once as there is."""
        return self.root.goes_by_tiles

    @cached_property
    def may_overwrite_first(self) -> bool:
        """Whether the first operand may stand in the memory of the result: one step that says so."""
        first, *others = self.root.inputs or (self.root,)
        is_single = isinstance(first, Placeholder) and all(
            isinstance(one, Placeholder) or self.root.takes_apart(one) for one in others
        )
        is_alone = first not in (node for one in others for node in _nodes(one))
        return self.root.in_place and is_single and is_alone and first.dtype == self.root.dtype

    def grain(self, shape: Shape) -> int:
        """How many elements of a result of that shape must be computed at once."""
        if self.locality == "element" or self.cuts_rows:
            return 1
        return max(1, prod(shape[1:] if self.locality == "row" else shape))

    @cached_property
    def unit(self) -> int:
        """How many elements of a result are best computed at once: a tile, where it goes by tiles."""
        return self._tile if self.goes_by_tiles else 1

    @cached_property
    def cuts_rows(self) -> bool:
        """Whether a part of a row is computed like a whole one: rows only tell which scale an element has."""
        computed = (one for one in _nodes(self.root) if not isinstance(one, Placeholder))
        return self.locality == "row" and all(
            one.is_made_by_rows and not isinstance(one, Arrangement) for one in computed
        )

    def stretches(self, first: int, count: int, most: int) -> Iterator[tuple[int, int]]:
        """Cut `count` elements of the result, from `first` on, into what `run` can be given.

        Yields (first, elements) of about `most` in whole grains; where rows or tiles are best computed as
        such but may be cut, whole ones, or what lies in one.
        """
        if self.goes_by_tiles and count:
            yield first, count
            return
        unit = self._width if self.cuts_rows else self._tile
        may_cut = self.cuts_rows or self.locality == "element"
        unit = unit if may_cut else self.grain(self.root.shape)
        at, end = first, first + count
        while at < end:
            into, left = at % unit if may_cut else 0, end - at
            if may_cut and (into or left < unit):
                elements = min(unit - into, left)
            else:
                elements = min(max(1, most // unit), left // unit) * unit
            yield at, elements
            at += elements

    @cached_property
    def _tile(self) -> int:
        """The elements that are best computed at once where anything may be cut."""
        return max(one.tile for one in _nodes(self.root))

    @cached_property
    def _factors(self) -> Mapping[int, tuple[Expression, int] | None]:
        """{number of an operand that is no tensor like the result: the kind that reads it, and at which place
        of its inputs; None where something is made of it first, and so of all of it}.
        """
        found: dict[int, tuple[Expression, int] | None] = {}
        for reader in (one for one in _nodes(self.root) if one.reads_whole):
            for place, given in enumerate(reader.inputs):
                for one in _nodes(given):
                    if isinstance(one, Placeholder):
                        found[one.number] = (reader, place) if one is given else None
        return found

    @property
    def _width(self) -> int:
        """The elements of a row."""
        return max(1, prod(self.root.shape[1:]))

    def stretch(self, place: int, first: int, elements: int) -> tuple[int, Shape]:
        """Where in an operand lies what `elements` of the result from `first` on are made of: from which of
        its elements on, and in which shape.
        """
        given = self.placeholders[place]
        if place in self._factors:
            reader = self._factors[place]
            return (0, given.shape) if reader is None else reader[0].read(reader[1], first, elements)
        match self.locality:
            case "element":
                return first, (elements,)
            case "row":
                begin = first // self._width
                rows = -(-elements // self._width)
                if self.cuts_rows and len(given.shape) > 1:
                    return first, (rows, elements // rows)
                return begin * prod(given.shape[1:]), (rows, *given.shape[1:])
            case _:
                return 0, given.shape

    def shaped(self, out: torch.Tensor) -> torch.Tensor:
        """A flat stretch of the result in the shape that `run` takes it in."""
        match self.locality:
            case "element":
                return out
            case "row" if self.cuts_rows:
                return out.view(-(-len(out) // self._width), -1)
            case "row":
                return out.view(-1, *self.root.shape[1:])
            case _:
                return out.view(self.root.shape)

    def at(self, alpha: float | None, beta: float | None) -> Program:
        """The same at other weights, as long as neither are such that something is only copied."""
        return replace(self, root=_at(self.root, alpha, beta))

    def run(
        self,
        operands: Sequence[torch.Tensor],
        out: torch.Tensor,
        first: int = 0,
        measured: list[Squares] | None = None,
    ) -> None:
        """Write the result into `out`, which is contiguous, as the operands are.

        All are flat where the locality is ``"element"``; else they have their shapes, some entries of the
        first axis where that is ``"row"``. `first` is the number of the first element in its tensor. How
        large what is added to weights is, goes into `measured`, if that is given, the innermost first.
        """
        run = _Run(self, operands, measured)
        run.compute(self.root, out, 0 if self.locality == "row" else first, "step")

    def shape_of(self, node: Expression, out: torch.Tensor) -> Shape:
        """The shape of what a step passes on, of the stretch `out` of the result."""
        match "element" if self.cuts_rows else self.locality:
            case "element":
                return tuple(out.shape)
            case "row":
                return (*out.shape[:1], *node.shape[1:])
            case _:
                return node.shape


@dataclass(frozen=True, eq=False)
class _Run:
    """A program at work on some operands."""

    program: Program
    operands: Sequence[torch.Tensor]
    measured: list[Squares] | None

    def compute(self, node: Expression, out: torch.Tensor, first: int, place: str) -> None:
        """Write a step's result into `out`; `place` names the scratch memory of what it is made from."""
        if isinstance(node, Placeholder):
            out.copy_(self.operands[node.number])
            return
        given = self._given(node, out, first, place)
        if self.measured is None:
            node.compute(given, out, first)
        elif (squares := node.compute_measured(given, out, first)) is not None:
            self.measured.append(squares)

    def _given(self, node: Expression, out: torch.Tensor, first: int, place: str) -> list[Any]:
        """What a step is made from."""
        given: list[Any] = []
        for number, one in enumerate(node.inputs):
            inner = f"{place}.{number}"
            if isinstance(one, Placeholder):
                given.append(self.operands[one.number])
            elif node.takes_apart(one):
                given.append(self._given(one, out, first, inner))
            elif node.reads_whole:
                given.append(self._factor(node, number, out, first, inner))
            else:
                in_place = number == 0 and node.in_place and one.dtype == node.dtype
                held = out if in_place else self._memory(one, self.program.shape_of(one, out), out, inner)
                self.compute(one, held, first, inner)
                given.append(held)
        return given

    def _factor(
        self, reader: Expression, number: int, out: torch.Tensor, first: int, place: str
    ) -> torch.Tensor:
        """What a kind that reads its inputs whole needs of one that is itself computed."""
        node = reader.inputs[number]
        whole = self._memory(node, node.shape, out, place)
        self.compute(node, whole, 0, place)
        whole = whole.view(-1)
        begin, shape = reader.read(number, first, out.numel())
        return whole[begin : begin + prod(shape)].view(shape)

    def _memory(self, node: Expression, shape: Shape, out: torch.Tensor, place: str) -> torch.Tensor:
        """Memory for what a step passes on: the calling thread's own for that place, where it is small."""
        from blockmerge.methods.arithmetic import scratch

        return scratch(place, prod(shape), torch_dtype(node.dtype, out.device), out.device).view(shape)


class Programs:
    """Splits expressions into programs and operands, and keeps the programs: equal ones are the same
    object.
    """

    def __init__(self) -> None:
        self._known: dict[Expression, Program] = {}

    def of(self, expression: Expression) -> tuple[Program, tuple[Expression, ...]]:
        """Return an expression's program and its operands: bytes in some arrangement, or what was
        gathered.
        """
        operands = _Operands()
        root = _with_placeholders(expression, operands, is_factor=False)
        program = self._known.get(root)
        if program is None:
            locality = _locality(root)
            flat = _flat(root) if locality == "element" else root
            self._known[root] = program = self._known.setdefault(flat, _program(flat, locality))
        return program, tuple(operands.all)


def _program(root: Expression, locality: Locality) -> Program:
    nodes = list(_nodes(root))
    placeholders = dict.fromkeys(one for one in nodes if isinstance(one, Placeholder))
    return Program(root, locality, tuple(placeholders), any(one.depends_on_place for one in nodes))


def _at(node: Expression, alpha: float | None, beta: float | None) -> Expression:
    node = node.with_inputs(tuple(_at(one, alpha, beta) for one in node.inputs))
    if not isinstance(node, Merged):
        return node
    weights = node.method.weights
    return replace(
        node, alpha=alpha if "alpha" in weights else None, beta=beta if "beta" in weights else None
    )


def operands_of(expression: Expression) -> Iterator[Expression]:
    """Yield what an expression is computed from, from left to right: the largest parts that are only read.
    Of a change, its factors are no such parts.
    """
    if is_arranged(expression):
        yield expression
    elif not expression.reads_whole:
        for one in expression.inputs:
            yield from operands_of(one)


def leaves_of(expression: Expression) -> Sequence[Expression]:
    """The leaves of an expression, from left to right."""
    return [one for one in _nodes(expression) if not one.inputs]


def methods_of(expression: Expression) -> Sequence[Method]:
    """The methods that an expression is merged by, the outermost first."""
    return [one.method for one in _nodes(expression) if isinstance(one, Merged)]


def products_in(expression: Expression) -> Sequence[Changed]:
    """The weights of an expression to which products are added."""
    found = (one for one in _nodes(expression) if isinstance(one, Changed) and one.products)
    return list(dict.fromkeys(found))  # one that is there twice is one


def dequantised_in(expression: Expression) -> Sequence[Dequantised]:
    """What of an expression is read from codes and their scales, from left to right."""
    if not expression.inputs:  # which is asked of every tensor
        return ()
    return [one for one in _nodes(expression) if isinstance(one, Dequantised)]


def _nodes(expression: Expression) -> Sequence[Expression]:
    """All that an expression consists of, each before what it is made from."""
    found = [expression]
    for one in expression.inputs:
        found.extend(_nodes(one))
    return found


def _locality(expression: Expression) -> Locality:
    """The widest of all that is computed. Rows may be cut only where there are some, where each of the result
    is one of everything that is read or computed, and where nothing depends on its place in the tensor.
    """
    computed = list(_nodes_computed(expression))
    widest = LOCALITIES[max((LOCALITIES.index(one.locality) for one in computed), default=0)]
    if widest != "row":
        return widest
    rows = expression.shape[:1]
    has_rows = len(expression.shape) > 1 and rows[0] > 0
    are_the_same = all(one.shape[:1] == rows for one in (*computed, *operands_of(expression)))
    return (
        "row" if has_rows and are_the_same and not any(one.depends_on_place for one in computed) else "tensor"
    )


def _nodes_computed(expression: Expression) -> Iterator[Expression]:
    if not is_arranged(expression):
        yield expression
        for one in () if expression.reads_whole else expression.inputs:
            yield from _nodes_computed(one)


class _Operands:
    """The operands of a program, each once; but for a change's factors, which are read in another way."""

    def __init__(self) -> None:
        self.all: list[Expression] = []
        self._numbers: dict[Expression, int] = {}

    def number(self, operand: Expression, *, is_factor: bool) -> int:
        if not is_factor and operand in self._numbers:
            return self._numbers[operand]
        self.all.append(operand)
        if not is_factor:
            self._numbers[operand] = len(self.all) - 1
        return len(self.all) - 1


def _with_placeholders(expression: Expression, operands: _Operands, *, is_factor: bool) -> Expression:
    if is_arranged(expression):
        number = operands.number(expression, is_factor=is_factor)
        return Placeholder(number, expression.dtype, expression.shape)
    inside = is_factor or expression.reads_whole
    return expression.with_inputs(
        tuple([_with_placeholders(one, operands, is_factor=inside) for one in expression.inputs])
    )


def _flat(root: Expression) -> Expression:
    """The same of operands of any shape, but for factors."""
    if isinstance(root, Placeholder):
        return replace(root, shape=())
    if root.reads_whole:
        return root
    return root.with_inputs(tuple(map(_flat, root.inputs)))

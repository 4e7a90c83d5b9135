"""`Program`: what is computed for a tensor, without saying from which bytes.

An expression is its program and the leaves that the program is applied to. Neighbours in a file that are
treated alike have one program, so that they can be computed as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from blockmerge.dtypes import torch_dtype
from blockmerge.expressions.arrangements import Arrangement, is_arranged
from blockmerge.expressions.computed import Dequantised, Merged
from blockmerge.expressions.expression import LOCALITIES, Expression, Locality, Shape
from blockmerge.expressions.leaves import Leaf
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
    is_chance: bool

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.root, self.locality))

    @property
    def is_copy(self) -> bool:
        """Whether the result is the operand's bytes."""
        return isinstance(self.root, Placeholder)

    @property
    def joins(self) -> bool:
        """Whether two tensors of this program may be computed as one, where they lie one behind the other."""
        return self.locality == "element" and not self.is_chance

    @cached_property
    def may_overwrite_first(self) -> bool:
        """Whether the first operand may stand in the memory of the result: one step that says so."""
        first, *others = self.root.inputs or (self.root,)
        single = isinstance(first, Placeholder) and all(
            isinstance(one, Placeholder) and one != first for one in others
        )
        return self.root.in_place and single and first.dtype == self.root.dtype

    def grain(self, shape: Shape) -> int:
        """How many elements of a result of that shape must be computed at once."""
        if self.locality == "element" or self.cuts_rows:
            return 1
        return max(1, prod(shape[1:] if self.locality == "row" else shape))

    @cached_property
    def cuts_rows(self) -> bool:
        """Whether a part of a row is computed like a whole one: rows only tell which scale an element has."""
        computed = (one for one in _nodes(self.root) if not isinstance(one, Placeholder))
        return self.locality == "row" and all(
            one.is_made_by_rows and not isinstance(one, Arrangement) for one in computed
        )

    def stretches(self, first: int, count: int, most: int) -> Iterator[tuple[int, int]]:
        """Cut `count` elements of the result, from `first` on, into what `run` can be given.

        Yields (first, elements) of about `most` in whole grains; where rows may be cut, whole rows, or what
        lies in one.
        """
        grain = self.grain(self.root.shape)
        width = self._width if self.cuts_rows else grain
        at, end = first, first + count
        while at < end:
            into, left = at % width if self.cuts_rows else 0, end - at
            if self.cuts_rows and (into or left < width):
                elements = min(width - into, left)
            else:
                elements = min(max(1, most // width), left // width) * width
            yield at, elements
            at += elements

    @property
    def _width(self) -> int:
        """The elements of a row."""
        return max(1, prod(self.root.shape[1:]))

    def stretch(self, place: int, first: int, elements: int) -> tuple[int, Shape]:
        """Where in an operand lies what `elements` of the result from `first` on are made of: from which of
        its elements on, and in which shape.
        """
        given = self.placeholders[place]
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

    def run(self, operands: Sequence[torch.Tensor], out: torch.Tensor, first: int = 0) -> None:
        """Write the result into `out`, which is contiguous, as the operands are.

        All are flat where the locality is ``"element"``; else they have their shapes, some entries of the
        first axis where that is ``"row"``. `first` is the number of the first element in its tensor.
        """
        self._compute(self.root, operands, out, 0 if self.locality == "row" else first, "step")

    def _compute(
        self, node: Expression, operands: Sequence[torch.Tensor], out: torch.Tensor, first: int, place: str
    ) -> None:
        if isinstance(node, Placeholder):
            out.copy_(operands[node.number])
            return
        given = []
        for number, one in enumerate(node.inputs):
            if isinstance(one, Placeholder):
                given.append(operands[one.number])
                continue
            inner = f"{place}.{number}"
            in_place = number == 0 and node.in_place and one.dtype == node.dtype
            held = out if in_place else self._memory(one, out, inner)
            self._compute(one, operands, held, first, inner)
            given.append(held)
        node.compute(given, out, first)

    def _memory(self, node: Expression, out: torch.Tensor, place: str) -> torch.Tensor:
        """Memory for what a step passes on: the calling thread's own for that place, where it is small."""
        from blockmerge.methods.arithmetic import scratch

        shape = {"element": out.shape, "row": (*out.shape[:1], *node.shape[1:]), "tensor": node.shape}[
            "element" if self.cuts_rows else self.locality
        ]
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
        operands: list[Expression] = []
        root = _with_placeholders(expression, operands)
        program = self._known.get(root)
        if program is None:
            locality = _locality(root)
            flat = _flat(root) if locality == "element" else root
            self._known[root] = program = self._known.setdefault(flat, _program(flat, locality))
        return program, tuple(operands)


def _program(root: Expression, locality: Locality) -> Program:
    nodes = list(_nodes(root))
    placeholders = dict.fromkeys(one for one in nodes if isinstance(one, Placeholder))
    return Program(root, locality, tuple(placeholders), any(one.is_chance for one in nodes))


def _at(node: Expression, alpha: float | None, beta: float | None) -> Expression:
    node = node.with_inputs(tuple(_at(one, alpha, beta) for one in node.inputs))
    if not isinstance(node, Merged):
        return node
    weights = node.method.weights
    return replace(
        node, alpha=alpha if "alpha" in weights else None, beta=beta if "beta" in weights else None
    )


def operands_of(expression: Expression) -> Iterator[Expression]:
    """Yield what an expression is computed from, from left to right: the largest parts that are only read."""
    if is_arranged(expression):
        yield expression
    for one in () if is_arranged(expression) else expression.inputs:
        yield from operands_of(one)


def leaves_of(expression: Expression) -> Iterator[Expression]:
    """Yield the leaves of an expression, from left to right."""
    return (one for one in _nodes(expression) if not one.inputs)


def methods_of(expression: Expression) -> Iterator[Method]:
    """Yield the methods that an expression is merged by, the outermost first."""
    return (one.method for one in _nodes(expression) if isinstance(one, Merged))


def dequantised_in(expression: Expression) -> Iterator[Dequantised]:
    """Yield what of an expression is read from codes and their scales, from left to right."""
    return (one for one in _nodes(expression) if isinstance(one, Dequantised))


def _nodes(expression: Expression) -> Iterator[Expression]:
    left = [expression]
    while left:
        yield (one := left.pop())
        left.extend(reversed(one.inputs))


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
    return "row" if has_rows and are_the_same and not any(one.is_chance for one in computed) else "tensor"


def _nodes_computed(expression: Expression) -> Iterator[Expression]:
    if not is_arranged(expression):
        yield expression
        for one in expression.inputs:
            yield from _nodes_computed(one)


def _with_placeholders(expression: Expression, operands: list[Expression]) -> Expression:
    if is_arranged(expression):
        if expression not in operands:
            operands.append(expression)
        return Placeholder(operands.index(expression), expression.dtype, expression.shape)
    return expression.with_inputs(tuple([_with_placeholders(one, operands) for one in expression.inputs]))


def _flat(root: Expression) -> Expression:
    """The same of operands of any shape."""
    if isinstance(root, Placeholder):
        return replace(root, shape=())
    return root.with_inputs(tuple(map(_flat, root.inputs)))

"""`Expression`: what all kinds of tensor have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from blockmerge.dtypes import size_of

if TYPE_CHECKING:
    import torch

    from blockmerge.expressions.squares import Squares

Shape = tuple[int, ...]

Locality = Literal["element", "row", "tensor"]
"""How much of its inputs one element of a tensor depends on: one element of each, an entry of the first axis,
or all.
"""

LOCALITIES: tuple[Locality, ...] = ("element", "row", "tensor")


@dataclass(frozen=True)
class Expression(ABC):
    """A tensor that can be known without being computed: it has a dtype, a shape, and is made from `inputs`.

    >>> half = Cast(Stored(checkpoint, "x", "F32", (8, 4)), "F16")  # doctest: +SKIP
    >>> half.dtype, half.shape, str(half)  # doctest: +SKIP
    ('F16', (8, 4), 'cast(a.safetensors[x], F16)')

    Expressions are equal when they say the same of the same sources. A kind is a frozen dataclass with
    `dtype` (as safetensors spells it) and `shape`, as fields or properties; `inputs` and `with_inputs`; and
    `compute`. Whatever plans or evaluates asks these, and knows no kinds of what is computed. `locality` and
    `depends_on_place` are of the kind alone; `Program` adds them up over a tree.
    """

    locality: ClassVar[Locality] = "element"
    """How an element of the result depends on the inputs' elements."""

    in_place: ClassVar[bool] = False
    """Whether `compute` may be given its first input in the memory of `out`, where both have one dtype."""

    reads_whole: ClassVar[bool] = False
    """Whether an element may depend on all of the inputs, and on its place: then `read` says what of them a
    stretch of the result needs.
    """

    if TYPE_CHECKING:  # fields in some kinds, properties in others

        @property
        def dtype(self) -> str:
            """As safetensors spells it."""

        @property
        def shape(self) -> Shape:
            """The extents of its axes."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[Expression, ...]:
        """The tensors that it is made from; none for those that are there."""

    @abstractmethod
    def with_inputs(self, inputs: tuple[Expression, ...]) -> Expression:
        """The same made from other inputs."""

    @abstractmethod
    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Write the result into `out`, rounded once.

        Inputs and `out` are contiguous. Where all of a program is of locality ``"element"`` they are flat,
        and `first` is the number of the first element in its tensor. Else they have their shapes, of locality
        ``"row"`` with some entries of the first axis only, and `first` is 0.
        """

    def compute_measured(self, inputs: Sequence[Any], out: torch.Tensor, first: int) -> Squares | None:
        """The same, and say how large what is added to a weight is, where that is done here."""
        self.compute(inputs, out, first)
        return None

    @property
    def depends_on_place(self) -> bool:
        """Whether the values depend on their place in the tensor."""
        return False

    @property
    def is_measured(self) -> bool:
        """Whether it is a weight with changes, and `compute_measured` says how large these are."""
        return False

    @property
    def goes_by_tiles(self) -> bool:
        """Whether it goes through a large stretch in small steps by itself, and of its intermediate values
        holds none for all of it.
        """
        return False

    @property
    def is_made_by_rows(self) -> bool:
        """Whether entries of the first axis are made of the inputs' same entries alone, to the same bits."""
        return bool(self.inputs) and self.locality == "element" and not self.reads_whole

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.elements * size_of(self.dtype)

    def takes_apart(self, one: Expression) -> bool:
        """Whether `compute` is given what an input is made from, in its place: a list."""
        return False

    def read(self, place: int, first: int, elements: int) -> tuple[int, Shape]:
        """Where in the input at a place lies what a stretch of the result is made of, from which of its
        elements on, and in which shape: all of it. Asked where the kind `reads_whole`.
        """
        return 0, self.inputs[place].shape

    @property
    def tile(self) -> int:
        """How many elements of the result are best computed at once, counted from its first."""
        return 1

    def part(self, start: int, stop: int) -> Expression | None:
        """Entries of the first axis, where the kind itself can say what they are."""
        return None

    def simplified(self) -> Expression:
        """The same without what does nothing; the inputs are simplified already."""
        return self

    def later(self, begin: int) -> Expression:
        """The same for a part of a tensor that begins at its element `begin`; another one only where chance
        plays.
        """
        return self

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}({', '.join(self._said())})"

    def _said(self) -> Sequence[str]:
        return [str(one) for one in self.inputs]


def simplify(expression: Expression) -> Expression:
    """Return an expression without what does nothing, from the leaves up."""
    if given := expression.inputs:
        inputs = tuple(map(simplify, given))
        if any(new is not old for new, old in zip(inputs, given, strict=True)):
            expression = expression.with_inputs(inputs)
    return expression.simplified()

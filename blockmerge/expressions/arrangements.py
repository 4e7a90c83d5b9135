"""The same elements in another arrangement: a part, several joined, rows and columns exchanged, another
shape.

Each says in `fill` how it is made of arrays, with indexing alone, which is the same for numpy's and torch's.
So bytes that are only read in another order (`checkpoints/reading.py`) and results that are computed have one
definition. Nothing is rounded, and dtypes stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from blockmerge.expressions.expression import Expression, Locality, Shape
from blockmerge.expressions.leaves import Stored

if TYPE_CHECKING:
    import torch


class Arrangement(Expression):
    """What is common to them: `fill` tells all there is to compute."""

    @property
    def dtype(self) -> str:
        """That of the inputs."""
        return self.inputs[0].dtype

    def fill(self, inputs: Sequence[Any], out: Any) -> None:
        """Write the arrangement of arrays of numpy or of torch, in their shapes, into one."""
        raise NotImplementedError

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Fill `out`."""
        self.fill(inputs, out)


@dataclass(frozen=True)
class Part(Arrangement):
    """Entries `start` … `stop` of an axis."""

    whole: Expression
    start: int
    stop: int
    axis: int = 0

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What it is a part of."""
        return (self.whole,)

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Part:
        """The same part of another tensor."""
        return Part(inputs[0], self.start, self.stop, self.axis)

    @property
    def locality(self) -> Locality:  # type: ignore[override]
        """Columns need their rows; rows that are left out would have to be computed."""
        return "tensor" if self.axis == 0 else "row"

    @property
    def shape(self) -> Shape:
        """That of the whole but for the axis."""
        return (*self.whole.shape[: self.axis], self.stop - self.start, *self.whole.shape[self.axis + 1 :])

    def fill(self, inputs: Sequence[Any], out: Any) -> None:
        """Take the entries."""
        out[...] = inputs[0][_entries(self.axis, self.start, self.stop)]

    def simplified(self) -> Expression:
        """All of it is the whole; a part of a part, of joined tensors, or of what can be computed in parts is
        that.
        """
        whole = self.whole
        if (self.start, self.stop) == (0, whole.shape[self.axis]):
            return whole
        if isinstance(whole, Part) and whole.axis == self.axis:
            return Part(
                whole.whole, whole.start + self.start, whole.start + self.stop, self.axis
            ).simplified()
        if isinstance(whole, Joined) and whole.axis == self.axis:
            return self._of_joined(whole)
        return self._moved_inside() if self.axis == 0 else self

    def _moved_inside(self) -> Expression:
        """The same without what is computed, or read, for nothing.

        What looks at rows or more gets whole tensors: in every naming the same ones, so that the bits are the
        same, too.
        """
        whole, start, stop = self.whole, self.start, self.stop
        if (part := whole.part(start, stop)) is not None:
            return part
        if isinstance(whole, Reshaped) and whole.shape[:1] == whole.tensor.shape[:1]:
            part = Part(whole.tensor, start, stop).simplified()
            return Reshaped(part, (stop - start, *whole.shape[1:])).simplified()
        if isinstance(whole, Arrangement) or not whole.is_made_by_rows:
            return self
        inputs = tuple(Part(one, start, stop).simplified() for one in whole.inputs)
        return whole.with_inputs(inputs).later(start * prod(whole.shape[1:])).simplified()

    def _of_joined(self, joined: Joined) -> Expression:
        taken: list[Expression] = []
        begin = 0
        for one in joined.members:
            end = begin + one.shape[self.axis]
            low, high = max(self.start, begin), min(self.stop, end)
            if low < high:
                taken.append(Part(one, low - begin, high - begin, self.axis).simplified())
            begin = end
        return Joined(tuple(taken), self.axis).simplified() if taken else self

    def _said(self) -> Sequence[str]:
        return [str(self.whole), f"{self.start}:{self.stop}", *([f"axis {self.axis}"] if self.axis else [])]


@dataclass(frozen=True)
class Joined(Arrangement):
    """Tensors of one dtype, one behind the other along an axis; their other axes are alike."""

    members: tuple[Expression, ...]
    axis: int = 0

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The members."""
        return self.members

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Joined:
        """Other tensors joined along the same axis."""
        return Joined(inputs, self.axis)

    @property
    def locality(self) -> Locality:  # type: ignore[override]
        """Rows that are joined are rows; what is joined row on row must be taken as a whole."""
        return "tensor" if self.axis == 0 else "row"

    @property
    def shape(self) -> Shape:
        """That of the members but for the axis."""
        first = self.members[0].shape
        total = sum(one.shape[self.axis] for one in self.members)
        return (*first[: self.axis], total, *first[self.axis + 1 :])

    def fill(self, inputs: Sequence[Any], out: Any) -> None:
        """Put one behind the other."""
        begin = 0
        for one in inputs:
            end = begin + one.shape[self.axis]
            out[_entries(self.axis, begin, end)] = one
            begin = end

    def simplified(self) -> Expression:
        """Joined ones that are joined are one; parts that follow one another in one tensor are one part of
        it.
        """
        members: list[Expression] = []
        for one in self.members:
            for member in one.members if isinstance(one, Joined) and one.axis == self.axis else (one,):
                joined = _as_one(members[-1], member, self.axis) if members else None
                if joined is None:
                    members.append(member)
                else:
                    members[-1] = joined
        return members[0] if len(members) == 1 else Joined(tuple(members), self.axis)

    def _said(self) -> Sequence[str]:
        return [*map(str, self.members), *([f"axis {self.axis}"] if self.axis else [])]


@dataclass(frozen=True)
class Transposed(Arrangement):
    """A matrix with rows and columns exchanged."""

    matrix: Expression

    locality = "tensor"

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The matrix."""
        return (self.matrix,)

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Transposed:
        """Another matrix, transposed."""
        return Transposed(inputs[0])

    @property
    def shape(self) -> Shape:
        """(columns, rows)."""
        rows, columns = self.matrix.shape
        return columns, rows

    def fill(self, inputs: Sequence[Any], out: Any) -> None:
        """Exchange them."""
        out[...] = inputs[0].T

    def simplified(self) -> Expression:
        """Twice is not at all; and what is done to each element may as well be done to transposed
        matrices.
        """
        matrix = self.matrix
        if isinstance(matrix, Transposed):
            return matrix.matrix
        if _is_by_element(matrix) and not matrix.depends_on_place:
            inputs = tuple(Transposed(one).simplified() for one in matrix.inputs)
            return matrix.with_inputs(inputs).simplified()
        return self


@dataclass(frozen=True)
class Reshaped(Arrangement):
    """The same elements in the same order, in another shape."""

    tensor: Expression
    shape: Shape

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The tensor."""
        return (self.tensor,)

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Reshaped:
        """Another tensor in that shape."""
        return Reshaped(inputs[0], self.shape)

    def fill(self, inputs: Sequence[Any], out: Any) -> None:
        """Copy the elements in their order."""
        out[...] = inputs[0].reshape(out.shape)

    def simplified(self) -> Expression:
        """The last shape counts; stored bytes have any; and what is done to each element is the same in any
        shape.
        """
        tensor = self.tensor
        if tensor.shape == self.shape:
            return tensor
        if isinstance(tensor, Reshaped):
            return Reshaped(tensor.tensor, self.shape).simplified()
        if isinstance(tensor, Stored):
            return Stored(tensor.source, tensor.name, tensor.dtype, self.shape, tensor.begin)
        if _is_by_element(tensor):
            inputs = tuple(Reshaped(one, self.shape).simplified() for one in tensor.inputs)
            return tensor.with_inputs(inputs).simplified()
        return self

    def _said(self) -> Sequence[str]:
        return [str(self.tensor), str(list(self.shape))]


def is_arranged(expression: Expression) -> bool:
    """Whether a tensor's bytes are only read, whatever the order: nothing is computed."""
    if not expression.inputs:
        return True
    return isinstance(expression, Arrangement) and all(map(is_arranged, expression.inputs))


def _is_by_element(tensor: Expression) -> bool:
    """Whether it is computed, each element from the same one of all inputs, which have its shape."""
    return (
        bool(tensor.inputs)
        and tensor.locality == "element"
        and not isinstance(tensor, Arrangement)
        and not tensor.reads_whole
    )


def _entries(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, slice(start, stop))


def _as_one(first: Expression, second: Expression, axis: int) -> Expression | None:
    """The tensor that two are the parts of, where the second follows the first in it."""
    if axis == 0 and isinstance(first, Stored) and isinstance(second, Stored):
        if second.continues(first) and first.shape[1:] == second.shape[1:]:
            rows = first.shape[0] + second.shape[0]
            return Stored(first.source, first.name, first.dtype, (rows, *first.shape[1:]), first.begin)
        return None
    if not (isinstance(first, Part) and isinstance(second, Part) and first.axis == second.axis == axis):
        return None
    if first.whole != second.whole or first.stop != second.start:
        return None
    return Part(first.whole, first.start, second.stop, axis).simplified()

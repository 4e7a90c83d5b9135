"""Computing tensors whose sources hold them in memory, on whatever device. Loads torch: imported late."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from blockmerge.dtypes import torch_dtype
from blockmerge.expressions import (
    Arrangement,
    Expression,
    Gathered,
    Joined,
    Known,
    Program,
    Programs,
    Stored,
    is_arranged,
)

Figures = Mapping[Gathered, object]
"""What was gathered of all tensors before the first is merged."""


class Holder(Protocol):
    """A source whose tensors are in memory."""

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name."""


@dataclass(frozen=True)
class Task:
    """Something to compute: a program, what it is applied to, and the memory that gets the result.

    Operands are made when it is run, as some take memory: arranged ones, and those from another device.
    `first` is the number of the first element of `out` in its tensor.
    """

    program: Program
    operands: tuple[Expression, ...]
    out: torch.Tensor
    first: int = 0

    def tensors(self, figures: Figures) -> list[Any]:
        """The operands, contiguous, on the device of the result: flat where the program wants them so."""
        return [figures[one] if isinstance(one, Gathered) else self._tensor(one) for one in self.operands]

    def _tensor(self, operand: Expression) -> torch.Tensor:
        tensor = tensor_of(operand).to(self.out.device).contiguous()
        if self.program.locality != "element":
            return tensor
        return tensor.view(-1)[self.first : self.first + self.out.numel()]

    def run(self, figures: Figures) -> None:
        """Compute it."""
        out = self.out.view(-1) if self.program.locality == "element" else self.out
        self.program.run(self.tensors(figures), out, self.first)


def tasks_of(tensor: Expression, out: torch.Tensor, programs: Programs, most: int) -> Iterator[Task]:
    """Yield what there is to compute for a tensor, in tasks of `most` elements where it can be cut.

    What is only copied is copied at once.
    """
    if isinstance(tensor, Joined) and tensor.axis == 0:
        begin = 0
        for one in tensor.members:
            yield from tasks_of(one, out[begin : begin + one.shape[0]], programs, most)
            begin += one.shape[0]
    elif is_arranged(tensor):
        out.copy_(tensor_of(tensor))
    elif out.numel():
        program, operands = programs.of(tensor)
        if program.locality != "element" or out.numel() <= most:
            yield Task(program, operands, out)
            return
        flat = out.view(-1)
        for first in range(0, len(flat), most):
            yield Task(program, operands, flat[first : first + most], first)


def gathered(wanted: Gathered) -> object:
    """What a method says of all tensors."""
    figures = []
    for tensors in wanted.tensors:
        first, *others = (tensor_of(one).contiguous() for one in tensors)
        figures.append(wanted.method.statistics(first, *(one.to(first.device) for one in others)))
    return wanted.method.gather(figures)


def tensor_of(expression: Expression) -> torch.Tensor:
    """Return a tensor that is only arranged: the holder's own memory where its elements stand in a row
    there.
    """
    if isinstance(expression, Known):
        flat = torch.frombuffer(bytearray(expression.data), dtype=torch_dtype(expression.dtype))
        return flat.view(expression.shape)
    if isinstance(expression, Stored):
        holder: Holder = expression.source  # type: ignore[assignment]
        found = holder.tensor(expression.name)
        if found.numel() == expression.elements:
            return found.reshape(expression.shape)
        begin = expression.begin
        return found.reshape(-1)[begin : begin + expression.elements].view(expression.shape)
    assert isinstance(expression, Arrangement), expression
    inputs = [tensor_of(one) for one in expression.inputs]
    out = torch.empty(expression.shape, dtype=inputs[0].dtype, device=inputs[0].device)
    expression.fill(inputs, out)
    return out

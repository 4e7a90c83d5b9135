"""Computing tensors whose sources hold them in memory, on whatever device. Loads torch: imported late."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch

from blockmerge.checkpoints import Checkpoint, StateDict, read
from blockmerge.dtypes import has_float64, torch_dtype
from blockmerge.errors import RecipeError, shown
from blockmerge.expressions import (
    Arrangement,
    Expression,
    Figures,
    Gathered,
    Joined,
    Known,
    Program,
    Programs,
    Stored,
    is_arranged,
    leaves_of,
)
from blockmerge.merging.devices import current_streams, on_streams
from blockmerge.methods.arithmetic import as_bytes
from blockmerge.streaming import TorchThreads, for_each, processors


class Holder(Protocol):
    """A source whose tensors are in memory."""

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name."""


@dataclass(frozen=True)
class Task:
    """Something to compute: a program, what it is applied to, and the memory that gets the result.

    Operands are made when it is run, as some take memory: arranged ones, and those from another device.
    `first` is the number of the first element of `out` in its tensor, `label` what messages call that.
    """

    program: Program
    operands: tuple[Expression, ...]
    out: torch.Tensor
    label: str
    first: int = 0

    def tensors(self, figures: Figures) -> list[Any]:
        """The operands, contiguous, on the device of the result: flat where the program wants them so."""
        return [
            figures[one] if isinstance(one, Gathered) else self._tensor(place, one)
            for place, one in enumerate(self.operands)
        ]

    def _tensor(self, place: int, operand: Expression) -> torch.Tensor:
        tensor = fit_for(self.out.device, tensor_of(operand)).to(self.out.device).contiguous()
        if self.program.locality == "row":
            return tensor
        begin, shape = self.program.stretch(place, self.first, self.out.numel())
        return tensor.view(-1)[begin : begin + prod(shape)].view(shape)

    def run(self, figures: Figures) -> None:
        """Compute it."""
        out = self.out.view(-1) if self.program.locality == "element" else self.out
        self.run_on(self.tensors(figures), out)

    def run_on(self, tensors: list[Any], out: torch.Tensor) -> None:
        """Apply the program to these operands. Raises RecipeError when a method of the user's own fails."""
        try:
            self.program.run(tensors, out, self.first)
        except RecipeError as error:
            raise RecipeError(f"{error} (at {shown(self.label)})") from error


def tasks_of(
    tensor: Expression, out: torch.Tensor, programs: Programs, most: int, label: str
) -> Iterator[Task]:
    """Yield what there is to compute for a tensor, in tasks of `most` elements where it can be cut.

    What is only copied is copied at once.
    """
    if isinstance(tensor, Joined) and tensor.axis == 0:
        begin = 0
        for one in tensor.members:
            yield from tasks_of(one, out[begin : begin + one.shape[0]], programs, most, label)
            begin += one.shape[0]
    elif is_arranged(tensor):
        # What is our own can be on its way to a GPU while others go on: CUDA takes it at once.
        out.copy_(tensor_of(tensor), non_blocking=isinstance(tensor, Known) and out.device.type == "cuda")
    elif out.numel():
        program, operands = programs.of(tensor)
        if (
            program.locality != "element"
            or out.numel() <= most
            or not all(_is_there(one, out) for one in operands)
        ):
            yield Task(program, operands, out, label)
            return
        flat = out.view(-1)
        for first in range(0, len(flat), most):
            yield Task(program, operands, flat[first : first + most], label, first)


def _is_there(operand: Expression, out: torch.Tensor) -> bool:
    """Whether a part of an operand can be had without moving or copying all of it."""
    if not isinstance(operand, Stored):
        return False
    tensor = tensor_of(operand)
    return tensor.is_contiguous() and tensor.device == out.device


def compute_in_threads(tasks: Sequence[Task], figures: Figures, devices: Iterable[torch.device]) -> None:
    """Compute one task after the other in each of as many threads as there are processors.

    torch's own threads, which would share each tensor, cost more than they bring where most tensors are
    small. Operands may be on `devices`, and are brought from there on the caller's streams.
    """
    torch_threads = TorchThreads()
    streams = current_streams(devices)
    inference = torch.is_inference_mode_enabled()

    @contextmanager
    def worker() -> Iterator[Callable[[Task], int]]:
        torch_threads.single_here()
        with on_streams(streams), torch.inference_mode(inference), torch.no_grad():

            def compute(task: Task) -> int:
                task.run(figures)
                return 0

            yield compute

    try:
        for_each(tasks, worker, min(processors(), len(tasks)), 0)
    finally:
        torch_threads.restore()


def compute_together(tasks: Sequence[Task], figures: Figures, alone: int, together: int) -> None:
    """Compute in few large launches, as a GPU likes it: tensors of one program are laid side by side,
    `together` elements at the most. Those of more than `alone` keep a GPU busy on their own, and are not
    copied for that.
    """
    for first, *others in alike(tasks, alone, together):
        if not others:
            first.run(figures)
            continue
        group = [first, *others]
        tensors = zip(*(one.tensors(figures) for one in group), strict=True)
        result = torch.empty(
            sum(one.out.numel() for one in group), dtype=first.out.dtype, device=first.out.device
        )
        first.run_on([_side_by_side(each) for each in tensors], result)
        outs = [as_bytes(one.out.view(-1)) for one in group]
        torch._foreach_copy_(outs, list(torch.split(as_bytes(result), [len(one) for one in outs])))


def _side_by_side(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(map(as_bytes, tensors))).view(tensors[0].dtype)


def alike(tasks: Iterable[Task], alone: int, together: int) -> Iterator[list[Task]]:
    """Group tasks that can be computed as one, in groups of `together` elements; of more than `alone`, each
    is its own group.
    """
    groups: dict[Hashable, list[Task]] = {}
    for task in tasks:
        joins = task.program.joins and task.out.numel() <= alone
        kind = (task.program, task.out.device) if joins else id(task)
        groups.setdefault(kind, []).append(task)
    for group in groups.values():
        part: list[Task] = []
        elements = 0
        for task in group:
            if part and elements + task.out.numel() > together:
                yield part
                part, elements = [], 0
            part.append(task)
            elements += task.out.numel()
        yield part


def gather(wanted: Gathered) -> object:
    """What a method says of all tensors."""
    figures = []
    for tensors in wanted.tensors:
        first, *others = (tensor_of(one).contiguous() for one in tensors)
        figures.append(
            wanted.method.statistics(first, *(fit_for(first.device, one).to(first.device) for one in others))
        )
    return wanted.method.gather(figures)


def fit_for(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in a dtype that a device has: float64 in float32, where it lacks that."""
    return tensor.float() if tensor.dtype == torch.float64 and not has_float64(device) else tensor


def tensor_of(expression: Expression) -> torch.Tensor:
    """Return a tensor: the holder's own memory where it is only arranged, and its elements stand in a row
    there.
    """
    if isinstance(expression, Known):
        flat = torch.frombuffer(bytearray(expression.data), dtype=torch_dtype(expression.dtype))
        return flat.view(expression.shape)
    if isinstance(expression, Stored):
        if isinstance(expression.source, Checkpoint) and not isinstance(expression.source, StateDict):
            return _from_file(expression)
        holder: Holder = expression.source  # type: ignore[assignment]
        found = _as_stored(holder.tensor(expression.name), expression.dtype)
        if found.numel() == expression.elements:
            return found.reshape(expression.shape)
        begin = expression.begin
        return found.reshape(-1)[begin : begin + expression.elements].view(expression.shape)
    if not is_arranged(expression):
        return _computed(expression)
    assert isinstance(expression, Arrangement), expression
    inputs = [tensor_of(one) for one in expression.inputs]
    out = torch.empty(expression.shape, dtype=inputs[0].dtype, device=inputs[0].device)
    expression.fill(inputs, out)
    return out


def _from_file(tensor: Stored) -> torch.Tensor:
    """A LoRA's tensor, whose file may lie on a disk though the models do not."""
    if not tensor.elements:
        return torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
    flat = torch.frombuffer(bytearray(read(tensor)), dtype=torch_dtype(tensor.dtype))
    return flat.view(tensor.shape)


def _computed(expression: Expression) -> torch.Tensor:
    """A tensor that has to be computed, where the first that it is computed from lies."""
    program, operands = Programs().of(expression)
    device = device_of(operands[0])
    out = torch.empty(expression.shape, dtype=torch_dtype(expression.dtype, device), device=device)
    Task(program, operands, out, str(expression)).run({})
    return out


def device_of(expression: Expression) -> torch.device:
    """Where the first tensor is that an expression is made of."""
    first = next(one for one in leaves_of(expression) if isinstance(one, Stored))
    holder: Holder = first.source  # type: ignore[assignment]
    return holder.tensor(first.name).device


def _as_stored(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A tensor in the dtype that its bytes are of: they may be stored as whole numbers."""
    wanted = torch_dtype(dtype)
    return tensor.contiguous().view(wanted) if tensor.dtype == torch.uint8 != wanted else tensor

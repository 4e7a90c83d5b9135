"""The part of a merge that needs torch: computing a run, chunk by chunk. Loaded by the first worker that needs it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch

from blockmerge.checkpoints import Checkpoint, Reader, TensorInfo
from blockmerge.errors import RecipeError, shown
from blockmerge.merging.plan import Run, size_of
from blockmerge.merging.recipe import Recipe
from blockmerge.methods.elementwise import cast
from blockmerge.streaming import aligned_buffer
from blockmerge.streaming.tensors import all_finite, tensor_view

Nonfinite = tuple[int, int, Callable[[int, int], bool]]
"""The output bytes [start, stop) of a chunk that is not finite, and a function that tells it of a part of them."""

_SCAN_BYTES = 4 << 20


class Kernel:
    """One worker's means to compute: the method, the device, and a buffer for each operand."""

    def __init__(self, recipe: Recipe, device: str, chunk_bytes: int) -> None:
        self._recipe = recipe
        self._check = not recipe.allow_nonfinite
        self._device = torch.device(device)
        self._chunk_bytes = chunk_bytes
        self._buffers: list[memoryview] = []

    def compute(self, run: Run, low: int, target: memoryview, reader: Callable[[int], Reader]) -> Iterator[Nonfinite]:
        """Fill `target`, the output's bytes from `low` on, with a run's result; yield the chunks that are not finite."""
        size = size_of(run.dtype)
        widest = max(size, *(size_of(operand.dtype) for operand in run.operands))
        step = max(1, self._chunk_bytes // widest)
        first = (low - run.start) // size
        count = len(target) // size
        for at in range(0, count, step):
            elements = min(step, count - at)
            part = target[at * size : (at + elements) * size]
            inputs = []
            for place, operand in enumerate(run.operands):
                # A is read straight into the output, where the result then takes its place: less memory to go through.
                buffer = (
                    part if place == 0 and operand.dtype == run.dtype else self._buffer(place, elements * size_of(operand.dtype))
                )
                reader(operand.source).read_into(operand.offset + (first + at) * size_of(operand.dtype), buffer)
                inputs.append(tensor_view(buffer, operand.dtype, elements))
            out = tensor_view(part, run.dtype, elements)
            try:
                finite = self._compute_one(inputs, run.alpha, out)
            except RuntimeError as error:
                if self._device.type == "cpu":
                    raise
                why = shown(str(error).splitlines()[0], 200)
                raise RecipeError(f"{self._device} cannot do this merge: {why} (fewer --threads, or --device cpu)") from error
            if not finite:
                start = low + at * size
                yield start, start + len(part), _part_is_finite(out, start, size)

    def _buffer(self, place: int, nbytes: int) -> memoryview:
        while len(self._buffers) <= place:
            self._buffers.append(aligned_buffer(0))
        if len(self._buffers[place]) < nbytes:
            self._buffers[place] = aligned_buffer(nbytes)
        return self._buffers[place][:nbytes]

    def _compute_one(self, inputs: list[torch.Tensor], alpha: float | None, out: torch.Tensor) -> bool:
        """Write the result into `out`, which is on the CPU, and say whether it is finite (or need not be)."""
        result = out
        if self._device.type != "cpu":
            inputs = [tensor.to(self._device) for tensor in inputs]
            result = torch.empty_like(out, device=self._device)
        if alpha is None:
            cast(*inputs, out=result)
        else:
            self._recipe.merge_method.function(*inputs, alpha=alpha, out=result)
        finite = not self._check or all_finite(result)
        if result is not out:
            out.copy_(result)
        return finite


def choose_device(device: str) -> str:
    """Return the device that `device` means ("auto" is the GPU where there is one). Raises RecipeError."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and re.fullmatch(r"cuda(:\d{1,3})?", device) is None:
        raise RecipeError(f"unknown device '{shown(device)}': cpu, cuda, cuda:N or auto")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch says "not compiled with CUDA" with an AssertionError
        raise RecipeError(f"device {device} cannot be used: {shown(str(error).splitlines()[0])}") from error
    return device


def holds_nonfinite(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Whether a tensor of a checkpoint holds NaN or infinity; reads it through once."""
    size = size_of(info.dtype)
    step = _SCAN_BYTES // size
    buffer = aligned_buffer(step * size)
    with checkpoint.reader() as reader:
        for at in range(0, info.elements, step):
            elements = min(step, info.elements - at)
            reader.read_into(info.offset + at * size, buffer[: elements * size])
            if not all_finite(tensor_view(buffer, info.dtype, elements)):
                return True
    return False


def _part_is_finite(out: torch.Tensor, start: int, size: int) -> Callable[[int, int], bool]:
    return lambda low, high: all_finite(out[(low - start) // size : (high - start) // size])

"""The part of a merge that needs torch: computing a run, chunk by chunk.

Loaded by the first worker that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from blockmerge.checkpoints import Readers
from blockmerge.dtypes import size_of
from blockmerge.errors import RecipeError, shown
from blockmerge.expressions import Expression, Figures, Gathered, Squares, Stored, products_in
from blockmerge.merging.devices import told_of
from blockmerge.merging.planning.plan import PlannedOutput
from blockmerge.merging.planning.runs import PlannedFile, Run
from blockmerge.merging.shares import Shares
from blockmerge.streaming import TorchThreads, aligned_buffer
from blockmerge.streaming.tensors import all_finite, tensor_view

Nonfinite = tuple[int, int, Callable[[int, int], bool]]
"""The output bytes [start, stop) of a chunk that is not finite, and a function that tells it of a part of
them.
"""

_SCAN_BYTES = 4 << 20

_INSTEAD = "fewer threads, or the device cpu, can"


class Kernel:
    """One worker's means to compute: the device, and what was gathered.

    On a GPU each worker has a stream and page-locked buffers of its own: while one reads, another's data is
    on its way there, a third's is computed with and a fourth's is on its way back. What the device holds is a
    piece for each worker.
    """

    def __init__(
        self,
        plan: PlannedOutput,
        file: PlannedFile,
        device: str,
        chunk_bytes: int,
        figures: Figures,
        shares: Shares | None = None,
    ) -> None:
        self._plan, self._file, self._figures, self._shares = plan, file, figures, shares
        self._check = not plan.request.allow_nonfinite
        self._device = torch.device(device)
        with told_of([self._device], _INSTEAD):
            on_gpu = self._device.type == "cuda"
            self._stream = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._chunk_bytes = chunk_bytes
        self._buffers: dict[object, memoryview] = {}

    def compute(
        self,
        run: Run,
        low: int,
        target: memoryview,
        readers: Readers,
        buffers: dict[object, memoryview],
    ) -> Iterator[Nonfinite]:
        """Fill `target`, the output's bytes from `low` on, with a run's result; yield the chunks that are not
        finite.

        Operands are read into `buffers`, which are kept there for the next run.

        Raises RecipeError, with the first tensor it was about, when a method of the user's own fails.
        """
        self._buffers = buffers
        if run.program.is_measured and low == run.start:
            self._note_products(run, readers)
        size = size_of(run.dtype)
        first = (low - run.start) // size
        count = len(target) // size
        for begin, elements in run.program.stretches(first, count, self._most(run)):
            at = begin - first
            part = target[at * size : (at + elements) * size]
            out = tensor_view(part, run.dtype, elements)
            with told_of([self._device], _INSTEAD):
                operands = [
                    self._read(run, place, first + at, elements, part, readers)
                    for place in range(len(run.operands))
                ]
                try:
                    finite = self._compute_one(operands, run, first + at, out)
                except RecipeError as error:
                    raise RecipeError(f"{error} (at {shown(self._ldm_at(low + at * size))})") from error
            if not finite:
                start = low + at * size
                yield start, start + len(part), _part_is_finite(out, start, size)

    def _ldm_at(self, offset: int) -> str:
        """The LDM name of the tensor at an offset of the output."""
        name, _ = next(self._file.tensors_between(offset, offset + 1))
        return self._plan.tensor(name).ldm

    def _most(self, run: Run) -> int:
        """How many elements are computed at once: what fits a chunk."""
        sizes = [size_of(one.dtype) for one in run.operands if not isinstance(one.source, Gathered)]
        return self._chunk_bytes // max(size_of(run.dtype), *sizes)

    def _read(
        self, run: Run, place: int, first: int, elements: int, part: memoryview, readers: Readers
    ) -> Any:
        """An operand for these elements of the output: as many of its own, its rows, or all of it."""
        operand = run.operands[place]
        if isinstance(operand.source, Gathered):
            return self._figures[operand.source]
        begin, shape = run.program.stretch(place, first, elements)
        count = prod(shape)
        nbytes = count * size_of(operand.dtype)
        # A is read straight into the output, where the result then takes its place: less memory to go
        # through.
        in_place = place == 0 and run.program.may_overwrite_first and self._stream is None
        buffer = part if in_place else self._buffer(place, nbytes)
        readers.read_into(operand.source, operand.offset + begin * size_of(operand.dtype), buffer)
        flat = tensor_view(buffer, operand.dtype, count)
        return flat if len(shape) == 1 else flat.view(shape)

    def _buffer(self, place: object, nbytes: int) -> memoryview:
        held = self._buffers.get(place)
        if held is None or len(held) < nbytes:
            if self._stream is None:
                held = aligned_buffer(nbytes)
            else:  # torch gives page-locked memory out in powers of two
                size = 1 << (nbytes - 1).bit_length()
                held = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data
            self._buffers[place] = held
        return held[:nbytes]

    def _compute_one(self, operands: list[Any], run: Run, first: int, out: torch.Tensor) -> bool:
        """Write the result into `out`, which is on the CPU, and say whether it is finite (or need not be)."""
        measured: list[Squares] | None = [] if run.program.is_measured else None
        if self._stream is None:
            run.program.run(operands, run.program.shaped(out), first, measured)
            self._note(run, measured)
            return not self._check or all_finite(out)
        try:
            with torch.cuda.stream(self._stream):
                there = [
                    one.to(self._device, non_blocking=True) if isinstance(one, torch.Tensor) else one
                    for one in operands
                ]
                result = torch.empty_like(out, device=self._device)
                run.program.run(there, run.program.shaped(result), first, measured)
                locked = tensor_view(self._buffer("out", out.nbytes), run.dtype, len(out))
                locked.copy_(result, non_blocking=True)
                finite = not self._check or all_finite(result)
        finally:  # page-locked memory is used again, or freed
            self._stream.synchronize()
        self._note(run, measured)
        out.copy_(locked)
        return finite

    def _note(self, run: Run, measured: Sequence[Squares] | None) -> None:
        """Note how large what is added to a tensor's weights is."""
        if measured and self._shares is not None:
            self._shares.add(self._ldm_at(run.start), measured)

    def _note_products(self, run: Run, readers: Readers) -> None:
        """Note it of a tensor's products, which their factors tell, with the first run of the tensor."""
        name, _ = next(self._file.tensors_between(run.start, run.start + 1))
        if self._shares is None or not self._shares.is_new(name):
            return
        for changed in products_in(self._plan.tensor(name).expression):
            factors = (  # one after the other: those of many LoRAs are large
                [
                    self._read_factor(place, factor, *product.read(place, 0, product.elements), readers)
                    for place, factor in enumerate(product.inputs)
                ]
                for product, _ in changed.products
            )
            self._note(run, [changed.squares_of_products(factors)])

    def _read_factor(
        self, place: int, factor: Expression, begin: int, shape: tuple[int, ...], readers: Readers
    ) -> torch.Tensor:
        size = size_of(factor.dtype)
        memory = self._buffer(1 + place, prod(shape) * size)  # where the factors for a piece are read, too
        readers.read_into(factor, begin * size, memory)
        return tensor_view(memory, factor.dtype, prod(shape)).view(shape)


class Gathering:
    """A pass over the tensors that a method looks at before it merges the first."""

    def __init__(self, wanted: Gathered, figures: Figures) -> None:
        self._method, self._figures = wanted.method, figures
        self._found: list[Any] = [None] * len(wanted.tensors)
        self.total = sum(first.nbytes for first, *_ in wanted.tensors)
        self.torch_threads = TorchThreads()

    @contextmanager
    def worker(self) -> Iterator[Callable[[tuple[int, tuple[Expression, ...]]], int]]:
        """A worker of the pool: looks at the tensors of one number after the other."""
        self.torch_threads.single_here()
        with Readers(self._figures) as readers:

            def look_at(task: tuple[int, tuple[Expression, ...]]) -> int:
                number, tensors = task
                # In the model's order, whoever is done first: sums depend on it.
                self._found[number] = self._method.statistics(
                    *(_read_tensor(readers, one) for one in tensors)
                )
                return tensors[0].nbytes

            yield look_at

    def result(self) -> object:
        """What the method says of them."""
        return self._method.gather(self._found)


def _read_tensor(readers: Readers, tensor: Expression) -> torch.Tensor:
    buffer = aligned_buffer(tensor.nbytes)
    readers.read_into(tensor, 0, buffer)
    return tensor_view(buffer, tensor.dtype, tensor.elements).view(tensor.shape)


def holds_nonfinite(tensor: Stored) -> bool:
    """Whether a stored tensor holds NaN or infinity; reads it through once."""
    size = size_of(tensor.dtype)
    step = _SCAN_BYTES // size
    buffer = aligned_buffer(step * size)
    with Readers() as readers:
        for at in range(0, tensor.elements, step):
            elements = min(step, tensor.elements - at)
            readers.read_into(tensor, at * size, buffer[: elements * size])
            if not all_finite(tensor_view(buffer, tensor.dtype, elements)):
                return True
    return False


def _part_is_finite(out: torch.Tensor, start: int, size: int) -> Callable[[int, int], bool]:
    return lambda low, high: all_finite(out[(low - start) // size : (high - start) // size])

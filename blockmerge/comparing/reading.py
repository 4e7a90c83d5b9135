"""How comparing and explaining read weights: in chunks, as floats to compute with, by a pool of workers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

import torch

from blockmerge.checkpoints import Model, Reader, TensorInfo, itemsize
from blockmerge.streaming import Progress, TorchThreads, aligned_buffer, for_each, thread_count
from blockmerge.streaming.tensors import tensor_view

Task = TypeVar("Task")

_MOST_OPEN = 24  # models that one worker has open: systems allow 256 files and more in all


class TensorReader:
    """One worker's open files and buffers, from which it gets chunks of any model's tensors.

    >>> with TensorReader() as reader:  # doctest: +SKIP
    ...     first = reader.read(model, "model.diffusion_model.out.2.weight", 0, 1024)

    `bytes_read` counts what was read so far. Not thread-safe.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._readers = OrderedDict[int, Reader]()  # by the model's id, the one used last at the end
        self._stored = aligned_buffer(0)
        self._floats: dict[str | int, memoryview] = {}

    def read(
        self, model: Model, name: str, start: int, count: int, *, dtype: str = "F32", buffer: str | int = ""
    ) -> torch.Tensor:
        """Return `count` elements of a tensor from element `start` on, as a flat tensor of `dtype`.

        `dtype` is ``"F32"`` or ``"F64"``. The result lies in the `buffer` of that name, and is valid until
        something else is read into it. Raises CheckpointError when the file cannot be read.
        """
        tensor = model.tensors[name]
        width, stored_width = itemsize(dtype) or 0, itemsize(tensor.dtype) or 0
        if len(self._floats.get(buffer, b"")) < count * width:
            self._floats[buffer] = aligned_buffer(count * width)
        target = self._floats[buffer][: count * width]
        values = tensor_view(target, dtype, count)
        if tensor.dtype == dtype:
            self._read_bytes(model, tensor, start * width, target)
            return values
        if len(self._stored) < count * stored_width:
            self._stored = aligned_buffer(count * stored_width)
        stored = self._stored[: count * stored_width]
        self._read_bytes(model, tensor, start * stored_width, stored)
        return values.copy_(tensor_view(stored, tensor.dtype, count))

    def _read_bytes(self, model: Model, tensor: TensorInfo, offset: int, target: memoryview) -> None:
        """Fill `target` with a tensor's bytes from byte `offset` of the tensor on."""
        self._reader_of(model).read_into(tensor.offset + offset, target)
        self.bytes_read += len(target)

    def _reader_of(self, model: Model) -> Reader:
        key = id(model)
        if key not in self._readers:
            if len(self._readers) == _MOST_OPEN:
                self._readers.popitem(last=False)[1].close()
            self._readers[key] = model.checkpoint.reader()
        self._readers.move_to_end(key)
        return self._readers[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._readers:
            self._readers.popitem()[1].close()


def read_in_parallel(
    tasks: Iterable[Task],
    work: Callable[[Task, TensorReader], None],
    total: int,
    *,
    threads: int | None,
    progress: Progress | None,
) -> None:
    """Call `work(task, reader)` for all tasks, on threads that each have a reader and one thread of torch's.

    `total` is how many bytes will be read in all, for the progress. The first error ends it and is raised.
    """
    torch_threads = TorchThreads()

    @contextmanager
    def worker() -> Iterator[Callable[[Task], int]]:
        torch_threads.single_here()
        with TensorReader() as reader:

            def bytes_of(task: Task) -> int:
                before = reader.bytes_read
                work(task, reader)
                return reader.bytes_read - before

            yield bytes_of

    try:
        for_each(tasks, worker, thread_count(threads), total, progress)
    finally:
        torch_threads.restore()

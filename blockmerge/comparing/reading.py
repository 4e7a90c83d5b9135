"""How comparing and explaining read weights: in chunks, as floats to compute with, by a pool of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

import torch

from blockmerge.checkpoints import Model, Readers
from blockmerge.dtypes import size_of
from blockmerge.expressions import Expression
from blockmerge.streaming import Progress, TorchThreads, aligned_buffer, for_each, thread_count
from blockmerge.streaming.tensors import tensor_view

Task = TypeVar("Task")


class TensorReader:
    """One worker's open files and buffers, from which it gets chunks of any model's tensors.

    >>> with TensorReader() as reader:  # doctest: +SKIP
    ...     first = reader.read(model, "model.diffusion_model.out.2.weight", 0, 1024)

    `bytes_read` counts what was read so far. Not thread-safe.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._readers = Readers()
        self._stored = aligned_buffer(0)
        self._floats: dict[str | int, memoryview] = {}

    def read(
        self, model: Model, name: str, start: int, count: int, *, dtype: str = "F32", buffer: str | int = ""
    ) -> torch.Tensor:
        """Return `count` elements of a model's tensor from element `start` on, as `read_tensor` does."""
        return self.read_tensor(model.tensors[name], start, count, dtype=dtype, buffer=buffer)

    def read_tensor(
        self, tensor: Expression, start: int, count: int, *, dtype: str = "F32", buffer: str | int = ""
    ) -> torch.Tensor:
        """Return `count` elements of a tensor from element `start` on, as a flat tensor of `dtype`.

        `dtype` is ``"F32"`` or ``"F64"``. The result lies in the `buffer` of that name, and is valid until
        something else is read into it. Raises CheckpointError when the file cannot be read.
        """
        width, stored_width = size_of(dtype), size_of(tensor.dtype)
        if len(self._floats.get(buffer, b"")) < count * width:
            self._floats[buffer] = aligned_buffer(count * width)
        target = self._floats[buffer][: count * width]
        values = tensor_view(target, dtype, count)
        if tensor.dtype == dtype:
            self._readers.read_into(tensor, start * width, target)
            self.bytes_read += len(target)
            return values
        if len(self._stored) < count * stored_width:
            self._stored = aligned_buffer(count * stored_width)
        stored = self._stored[: count * stored_width]
        self._readers.read_into(tensor, start * stored_width, stored)
        self.bytes_read += len(stored)
        return values.copy_(tensor_view(stored, tensor.dtype, count))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.close()


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

"""Reading tensors, wherever they are stored and in whatever arrangement: one handle for each source.

What has to be computed, as what is stored as codes and scales, is computed here, as much of it as is asked
for.
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod
from typing import TYPE_CHECKING, Any, Self

from blockmerge.checkpoints.checkpoint import Checkpoint, Reader
from blockmerge.dtypes import size_of, torch_dtype
from blockmerge.expressions import (
    Arrangement,
    Expression,
    Figures,
    Gathered,
    Joined,
    Known,
    Programs,
    Stored,
    is_arranged,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

_MOST_OPEN = 24
"""Files of one worker: systems allow 256 and more in all."""


class Readers:
    """One worker's readers. Use as a context manager; not thread-safe.

    The tensor that was last put in order, or computed as a whole, is kept for the next read of it. `figures`
    are what was gathered for tensors that need it.
    """

    def __init__(self, figures: Figures | None = None) -> None:
        self._figures = figures or {}
        self._readers = OrderedDict[Checkpoint, Reader]()
        self._arranged: Expression | None = None
        self._bytes = memoryview(b"")
        self._programs = Programs()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all."""
        self._arranged, self._bytes = None, memoryview(b"")
        while self._readers:
            self._readers.popitem()[1].close()

    def read_into(self, source: Checkpoint | Expression, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` on, of a checkpoint's data or of a tensor.

        Raises CheckpointError when they cannot be read.
        """
        if isinstance(source, Checkpoint):
            self._reader(source).read_into(offset, buffer)
        elif isinstance(source, Stored):
            assert isinstance(source.source, Checkpoint)
            self._reader(source.source).read_into(source.offset + offset, buffer)
        elif isinstance(source, Known):
            buffer[:] = memoryview(source.data)[offset : offset + len(buffer)]
        elif isinstance(source, Joined) and source.axis == 0:
            self._read_joined(source, offset, buffer)
        elif not is_arranged(source):
            self._compute(source, offset, buffer)
        else:
            if source != self._arranged:
                self._arranged = None  # so that a failed read leaves nothing half done
                self._bytes = self._arrange(source).reshape(-1).view("u1").data
                self._arranged = source
            buffer[:] = self._bytes[offset : offset + len(buffer)]

    def _read_joined(self, joined: Joined, offset: int, buffer: memoryview) -> None:
        begin, done = 0, 0
        for one in joined.members:
            skip = offset + done - begin
            if done < len(buffer) and skip < one.nbytes:
                part = buffer[done : done + one.nbytes - skip]
                self.read_into(one, skip, part)
                done += len(part)
            begin += one.nbytes

    def _arrange(self, tensor: Expression) -> np.ndarray[Any, Any]:
        """The whole tensor, its elements as words of their size."""
        import numpy as np

        out = np.empty(tensor.shape, np.dtype(f"u{size_of(tensor.dtype)}"))
        if isinstance(tensor, Arrangement):
            tensor.fill([self._arrange(one) for one in tensor.inputs], out)
        elif tensor.nbytes:
            self.read_into(tensor, 0, out.reshape(-1).view("u1").data)
        return out

    def _compute(self, tensor: Expression, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what is computed: of as few elements as can be, or once for all of a whole."""
        if not len(buffer):
            return
        if tensor == self._arranged:
            buffer[:] = self._bytes[offset : offset + len(buffer)]
            return
        program, operands = self._programs.of(tensor)
        size, grain = size_of(tensor.dtype), program.grain(tensor.shape)
        first = offset // size // grain * grain
        last = -(-(offset + len(buffer)) // (size * grain)) * grain
        is_all = offset == first * size and len(buffer) == (last - first) * size
        data = buffer if is_all else memoryview(bytearray((last - first) * size))
        out = _seen_as_tensor(data, tensor.dtype)
        for begin, elements in program.stretches(first, last - first, last - first):
            given: list[Any] = [
                self._figures[one]
                if isinstance(one, Gathered)
                else self._values(one, *program.stretch(place, begin, elements))
                for place, one in enumerate(operands)
            ]
            part = out[begin - first :][:elements]
            program.run(given, program.shaped(part), begin)
        if is_all:
            return
        if grain == tensor.elements:
            self._arranged, self._bytes = tensor, data
        skip = offset - first * size
        buffer[:] = data[skip : skip + len(buffer)]

    def _values(self, tensor: Expression, begin: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Some of a tensor's elements, from element `begin` on, in a shape of their own."""
        size = size_of(tensor.dtype)
        data = memoryview(bytearray(prod(shape) * size))
        self.read_into(tensor, begin * size, data)
        return _seen_as_tensor(data, tensor.dtype).view(shape)

    def _reader(self, checkpoint: Checkpoint) -> Reader:
        if checkpoint in self._readers:
            self._readers.move_to_end(checkpoint)
        else:
            if len(self._readers) == _MOST_OPEN:
                self._readers.popitem(last=False)[1].close()
            self._readers[checkpoint] = checkpoint.reader()
        return self._readers[checkpoint]


def read(tensor: Expression) -> bytes:
    """Return the bytes of one tensor; meant for small ones."""
    buffer = bytearray(tensor.nbytes)
    with Readers() as readers:
        readers.read_into(tensor, 0, memoryview(buffer))
    return bytes(buffer)


def _seen_as_tensor(data: memoryview, dtype: str) -> torch.Tensor:
    import torch

    if not len(data):
        return torch.empty(0, dtype=torch_dtype(dtype))
    return torch.frombuffer(data, dtype=torch_dtype(dtype))

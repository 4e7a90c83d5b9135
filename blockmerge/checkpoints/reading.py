"""Reading tensors, wherever they are stored and in whatever arrangement: one handle for each source."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Self

from blockmerge.checkpoints.checkpoint import Checkpoint, Reader
from blockmerge.dtypes import size_of
from blockmerge.expressions import Arrangement, Expression, Joined, Known, Stored

if TYPE_CHECKING:
    import numpy as np

_MOST_OPEN = 24
"""Files of one worker: systems allow 256 and more in all."""


class Readers:
    """One worker's readers. Use as a context manager; not thread-safe.

    The tensor that was put in order last is kept, for the next read of it.
    """

    def __init__(self) -> None:
        self._readers = OrderedDict[Checkpoint, Reader]()
        self._arranged: Expression | None = None
        self._bytes = memoryview(b"")

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
        """Fill `buffer` from byte `offset` on: of a checkpoint's data, or of a tensor that is only arranged.

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
        else:
            if source != self._arranged:
                self._arranged = None  # so that a failed read leaves nothing half done
                self._bytes = memoryview(self._arrange(source).reshape(-1).view("u1"))
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
            self.read_into(tensor, 0, memoryview(out.reshape(-1).view("u1")))
        return out

    def _reader(self, checkpoint: Checkpoint) -> Reader:
        if checkpoint in self._readers:
            self._readers.move_to_end(checkpoint)
        else:
            if len(self._readers) == _MOST_OPEN:
                self._readers.popitem(last=False)[1].close()
            self._readers[checkpoint] = checkpoint.reader()
        return self._readers[checkpoint]


def read(tensor: Expression) -> bytes:
    """Return the bytes of one tensor that is only arranged; meant for small ones."""
    buffer = bytearray(tensor.nbytes)
    with Readers() as readers:
        readers.read_into(tensor, 0, memoryview(buffer))
    return bytes(buffer)

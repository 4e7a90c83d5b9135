"""Tensors that lie in pieces: joined, transposed, sliced or expanded ones, seen as if they lay in a row."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from blockmerge.checkpoints.checkpoint import Checkpoint, Reader, TensorInfo
from blockmerge.dtypes import itemsize

if TYPE_CHECKING:
    import numpy as np

_GROUP = 4 << 20  # bytes put in order at once, and read at once for it; every reader may hold as much twice
_SHORT = 64 << 10  # bytes that are read whole, however few of them are wanted: another read would cost more


@dataclass(frozen=True, slots=True)
class Piece:
    """A strided stretch of elements of a checkpoint: `offset` in bytes, `strides` in elements (0: expanded,
    none negative).
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def contiguous(cls, offset: int, elements: int) -> Self:
        """Elements that lie one behind the other."""
        return cls(offset, (elements,), (1,))

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one behind the other in row-major order."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent == 0:
                return True
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True


@dataclass(frozen=True, slots=True)
class Assembly:
    """A tensor put together from pieces of its own dtype, one after the other in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Assembled(Checkpoint):
    """A checkpoint some of whose tensors are put together from pieces of another (joined, transposed, not
    contiguous).

    `tensors` maps each name to a TensorInfo of `base`, which costs nothing, or to an Assembly, which is given
    an address beyond everything in `base`: so assemblies can be assembled from.
    """

    def __init__(self, base: Checkpoint, tensors: Mapping[str, TensorInfo | Assembly]) -> None:
        self.base = base
        self.name = base.name
        self.metadata = base.metadata
        self.files = base.files
        self._end = address = max((info.offset + info.nbytes for info in base.tensors.values()), default=0)
        self._parts: list[_Part] = []
        placed: dict[str, TensorInfo] = {}
        for name, given in tensors.items():
            if isinstance(given, TensorInfo):
                placed[name] = given
                continue
            placed[name] = info = TensorInfo(given.dtype, given.shape, address)
            assert sum(piece.elements for piece in given.pieces) == info.elements, name
            for piece in given.pieces:
                if piece.elements:
                    self._parts.append(_Part(address, piece, itemsize(given.dtype) or 0))
                    address = self._parts[-1].stop
        self.tensors = placed

    def reader(self) -> Reader:
        """Open a reader of the base's bytes, and beyond them of the assembled tensors'."""
        reader = self.base.reader()
        return AssembledReader(reader, self._end, self._parts) if self._parts else reader

    def broken_off(self) -> str | None:
        """As the base says."""
        return self.base.broken_off()

    def check_unchanged(self) -> None:
        """Raise CheckpointError when the base is no longer what it was."""
        self.base.check_unchanged()


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece and the address that its first byte is given."""

    start: int
    piece: Piece
    itemsize: int

    @property
    def stop(self) -> int:
        return self.start + self.piece.elements * self.itemsize

    def group_at(self, skip: int) -> _Part:
        """The part of this one around its byte `skip` that is put in order at once: rows of the outermost
        axis that allows it.
        """
        shape, strides = self.piece.shape, self.piece.strides
        inner = self.piece.elements
        for axis, extent in enumerate(shape):  # noqa: B007
            inner //= extent
            if inner * self.itemsize <= _GROUP:
                break
        rows = max(1, _GROUP // (inner * self.itemsize))
        number, row = divmod(skip // self.itemsize // inner, shape[axis])
        row -= row % rows
        start = self.start + (number * shape[axis] + row) * inner * self.itemsize
        element = row * strides[axis]
        for extent, stride in zip(reversed(shape[:axis]), reversed(strides[:axis]), strict=True):
            number, index = divmod(number, extent)
            element += index * stride
        group = (min(rows, shape[axis] - row), *shape[axis + 1 :])
        return _Part(
            start, Piece(self.piece.offset + element * self.itemsize, group, strides[axis:]), self.itemsize
        )


class AssembledReader(Reader):
    """Reads tensors in pieces as if they lay in a row.

    Holds the rows that it put in order last, for the next read.
    """

    def __init__(self, base: Reader, end: int, parts: Sequence[_Part]) -> None:
        self._base = base
        self._end = end
        self._parts = parts
        self._starts = [part.start for part in parts]
        self._group: _Part | None = None
        self._bytes = memoryview(b"")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on, which may lie in the base or among the assembled tensors."""
        position, stop = offset, offset + len(buffer)
        if position < self._end:
            position = min(stop, self._end)
            self._base.read_into(offset, buffer[: position - offset])
        while position < stop:
            part = self._parts[bisect_right(self._starts, position) - 1]
            count = min(stop, part.stop) - position
            assert count > 0, position
            target = buffer[position - offset :][:count]
            if part.piece.is_contiguous:
                self._base.read_into(part.piece.offset + position - part.start, target)
            else:
                self._copy(part, position, target)
            position += count

    def close(self) -> None:
        """Close the base's reader."""
        self._group, self._bytes = None, memoryview(b"")
        self._base.close()

    def _copy(self, part: _Part, position: int, target: memoryview) -> None:
        done = 0
        while done < len(target):
            group = self._group
            if group is None or not group.start <= position + done < group.stop:
                self._group = None  # so that a failed read leaves nothing half done
                group = part.group_at(position + done - part.start)
                self._bytes = self._in_order(group)
                self._group = group
            some = self._bytes[position + done - group.start :][: len(target) - done]
            target[done : done + len(some)] = some
            done += len(some)

    def _in_order(self, group: _Part) -> memoryview:
        import numpy as np

        result = np.empty(group.piece.shape, np.dtype(f"u{group.itemsize}"))
        self._gather(group.piece.offset, group.piece.strides, result)
        return result.reshape(-1).view(np.uint8).data

    def _gather(self, offset: int, strides: Sequence[int], result: np.ndarray[Any, Any]) -> None:
        """Fill `result`, reading from the first to the last of its elements in one go, or each half for
        itself.
        """
        import numpy as np

        size = result.itemsize
        reach = [(extent - 1) * stride for extent, stride in zip(result.shape, strides, strict=True)]
        span = (1 + sum(reach)) * size
        wanted = (
            math.prod(extent for extent, stride in zip(result.shape, strides, strict=True) if stride) * size
        )
        if span <= _SHORT or span <= min(_GROUP, 4 * wanted):
            data = np.empty(span // size, result.dtype)
            self._base.read_into(offset, data.view(np.uint8).data)
            result[...] = np.lib.stride_tricks.as_strided(
                data, result.shape, [stride * size for stride in strides]
            )
            return
        axis = max(range(len(reach)), key=lambda number: strides[number] if reach[number] else 0)
        for half in _halves(result.shape[axis]):
            index = (*[slice(None)] * axis, half)
            self._gather(offset + half.start * strides[axis] * size, strides, result[index])


def _halves(extent: int) -> Iterator[slice]:
    yield slice(0, extent // 2)
    yield slice(extent // 2, extent)

"""What every kind of model source looks like to the rest of blockmerge."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from blockmerge.dtypes import itemsize
from blockmerge.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is: dtype in safetensors' spelling (``"F16"``), shape, offset in
    bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.elements * (itemsize(self.dtype) or 0)


@dataclass(frozen=True, slots=True)
class Checksummed:
    """Bytes of a file that has their CRC-32, as a zip archive has, and the names of the tensors in them."""

    path: Path
    name: str
    offset: int
    size: int
    crc: int
    tensors: tuple[str, ...] = ()


class Reader(ABC):
    """Reads a checkpoint's bytes into the caller's buffers. Not thread-safe: each worker opens its own."""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes that begin at `offset`.

        Raises CheckpointError when they cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the reader holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Makes:
    """What is no checkpoint but makes one: a recipe."""

    def as_checkpoint(self) -> Checkpoint:
        """Return what is made, as a checkpoint that is computed where it is read."""
        raise NotImplementedError


class Checkpoint(ABC):
    """Named tensors that can be looked at without reading them.

    `name` is what messages and recipes call it (a file's name without its folder, ``org/name`` in Hugging
    Face's cache), `path` is where it is (None: in memory), `tensors` is in the order of the data, `metadata`
    maps strings to strings, `files` are those it is read from. `notes` say what was decided when it was
    opened, as sentences that its name begins.
    """

    name: str
    path: Path | None = None
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @abstractmethod
    def reader(self) -> Reader:
        """Open a reader of the tensors' bytes, addressed by the offsets of `tensors`."""

    def check_unchanged(self) -> None:  # noqa: B027 (nothing to check is the rule; files are the exception)
        """Raise CheckpointError when the source is no longer what it was when it was opened."""

    def broken_off(self) -> str | None:
        """Say, with the file's name, that the source is a download that did not finish; None where it is not.

        Its header is right then, but its last tensors are nothing but zeros.
        """
        return None

    def checksummed(self) -> tuple[Checksummed, ...]:
        """Return the parts of it that have checksums, as those of a zip archive have."""
        return ()

    def check_whole(self) -> None:
        """Raise CheckpointError when the source is broken off: to be asked before its weights are read."""
        if (broken := self.broken_off()) is not None:
            raise CheckpointError(broken)

    def read(self, name: str) -> bytes:
        """Return the bytes of one tensor; meant for small ones."""
        info = self.tensors[name]
        buffer = bytearray(info.nbytes)
        with self.reader() as reader:
            reader.read_into(info.offset, memoryview(buffer))
        return bytes(buffer)

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the bytes of several tensors; meant for small ones."""
        return {name: self.read(name) for name in names}

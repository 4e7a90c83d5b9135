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
    """A model that is open: named tensors that can be looked at without reading them.

    >>> model = blockmerge.open_checkpoint("a.safetensors")  # doctest: +SKIP
    >>> model.tensors["first_stage_model.encoder.conv_in.weight"].shape  # doctest: +SKIP
    (128, 3, 3, 3)

    - `name`: what messages and recipes call it, such as ``"a.safetensors"`` or ``"org/name"``.
    - `path`: where it is. None for a state dict.
    - `files`: the files that it is read from.
    - `tensors`: {name: its `dtype` (``"F16"``), `shape` and `offset`}, in the order of the data.
    - `metadata`: {key: text}.
    - `notes`: what was decided when it was opened. A sentence begins with the model's name.
    """

    name: str
    path: Path | None = None
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def shared_metadata(self) -> Mapping[str, str]:
        """The metadata that all of its files have in common; of one file, all of it."""
        return self.metadata

    @abstractmethod
    def reader(self) -> Reader:
        """Open a reader of the tensors' bytes, addressed by the offsets of `tensors`."""

    def check_unchanged(self) -> None:  # noqa: B027 (nothing to check is the rule; files are the exception)
        """Raise `CheckpointError` where the file is not what it was when it was opened."""

    def broken_off(self) -> str | None:
        """Return one line where the file is a download that did not finish, else None.

        Its header is right then, but its last tensors are all zeros.
        """
        return None

    def checksummed(self) -> tuple[Checksummed, ...]:
        """Return the parts of it that have checksums, as those of a zip archive have."""
        return ()

    def check_whole(self) -> None:
        """Raise `CheckpointError` where the file is a download that did not finish."""
        if (broken := self.broken_off()) is not None:
            raise CheckpointError(broken)

    def read(self, name: str) -> bytes:
        """Return the bytes of one tensor, little-endian and without gaps. Meant for small tensors."""
        info = self.tensors[name]
        buffer = bytearray(info.nbytes)
        with self.reader() as reader:
            reader.read_into(info.offset, memoryview(buffer))
        return bytes(buffer)

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return {name: the bytes of that tensor} for several tensors. Meant for small ones."""
        return {name: self.read(name) for name in names}

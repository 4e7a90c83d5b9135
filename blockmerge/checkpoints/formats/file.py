"""Checkpoints that are one file: opened carefully, read by position, and known again when they have
changed.
"""

from __future__ import annotations

import gc
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from blockmerge.checkpoints.checkpoint import Checkpoint, Reader
from blockmerge.checkpoints.hub import name_of, shown_path
from blockmerge.errors import CheckpointError, reason, shown


class FileCheckpoint(Checkpoint):
    """A checkpoint that is one regular file, whose tensors' offsets count from the file's start."""

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.name = name_of(self.path)
        self.files = (self.path,)
        self.metadata = {}

    @contextmanager
    def _opened(self, kind: str) -> Iterator[tuple[BinaryIO, int]]:
        """Open the file to read what is in it; yields it and its size.

        Raises CheckpointError for OSError and ValueError.
        """
        try:
            # Looked at before it is opened: opening a named pipe would wait for a writer for ever.
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                what = "is a folder" if self.path.is_dir() else "is not a regular file"
                raise CheckpointError(f"{shown_path(self.path)} {what}: give a .safetensors or .ckpt file")
            with self.path.open("rb") as file, no_garbage_collection():
                self._identity = _identity(os.fstat(file.fileno()))
                yield file, self._identity[0]
        except OSError as error:
            raise CheckpointError(f"cannot open {shown_path(self.path)}: {reason(error)}") from error
        except ValueError as error:
            # Also embedded null characters in the path, which the operating system refuses as a ValueError.
            raise CheckpointError(
                f"{shown_path(self.path)} is not a valid {kind} file: {shown(error, 1000)}"
            ) from error

    def reader(self) -> FileReader:
        """Open a reader of this file's bytes; offsets count from the file's start."""
        return FileReader(self.path, self.name)

    def check_unchanged(self) -> None:
        """Raise CheckpointError when size or modification time are no longer what they were."""
        try:
            same = _identity(os.stat(self.path)) == self._identity
        except OSError as error:
            raise CheckpointError(f"cannot read {shown_path(self.path)}: {reason(error)}") from error
        if not same:
            raise CheckpointError(
                f"{shown_path(self.path)} was changed while it was being read; nothing was written"
            )


class FileReader(Reader):
    """Positioned reads from a file into the caller's buffers.

    Seek and read on a handle of its own, which is as fast as `pread` and there on every system. Not a memory
    map: a mapped file that is cut short, or lies on a drive that goes away, kills the process instead of
    raising an error.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"cannot open {shown_path(path)}: {reason(error)}") from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on.

        Raises CheckpointError on a read error and when the file ends too early.
        """
        try:
            self._file.seek(offset)
            done = 0
            while done < len(buffer):
                count = self._file.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(
                        f"{shown(self._name)} was cut short while it was being read, at byte {offset + done}"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"cannot read {shown(self._name)} at byte {offset}: {reason(error)}"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For reading headers and planning, whose thousands of new objects would set off full collections: these
    go through all of torch's objects, too, and take longer than the work itself. None of the new objects can
    be garbage.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

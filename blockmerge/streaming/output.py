"""Writing a large file in pieces from many threads, past the page cache where the system can.

O_DIRECT hands aligned memory straight to the disk: no copy into the page cache, and nothing left to flush at
the end. Where a file system or an operating system lacks it, writes are buffered and flushed every now and
then while other threads go on, so that the final flush finds little to do.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Self

PAGE = 4096
"""Direct writes begin, end and lie in memory at multiples of this."""

_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_FLUSH_EVERY = 256 << 20  # bytes of buffered writes

_AT_ONCE = 2
"""How many threads write directly at a time. Two keep a disk busy. Were it all of them, they would end
together, and then all compute while the disk has nothing to do.
"""


class OutputStream:
    """The file that all workers of one run write to; each opens its own `writer()`."""

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        self.path = path
        self.direct = direct and hasattr(os, "O_DIRECT")
        self.turns = threading.BoundedSemaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._unflushed = 0

    def writer(self) -> PieceWriter:
        """Open a writer for one thread."""
        return PieceWriter(self)

    def flush_is_due(self, count: int) -> bool:
        """Count bytes that went into the page cache, and say whether the caller should flush now."""
        with self._lock:
            self._unflushed += count
            if self._unflushed < _FLUSH_EVERY:
                return False
            self._unflushed = 0
            return True


class PieceWriter:
    """Writes pieces at their places. One thread's own handles, since two cannot share a file position."""

    def __init__(self, stream: OutputStream) -> None:
        self._stream = stream
        self._direct = -1
        self._buffered = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._direct, self._buffered):
            if file >= 0:
                os.close(file)
        self._direct = self._buffered = -1

    def write(self, offset: int, piece: memoryview) -> None:
        """Write a piece: directly, but for what at its ends are no whole pages of the file. Its memory has to
        be such that pages begin there where they begin in the file.

        Raises OSError.
        """
        begin = -offset % PAGE
        end = len(piece) - (offset + len(piece)) % PAGE
        if begin < end and self._writes_directly(offset + begin, piece[begin:end]):
            self._write_buffered(offset, piece[:begin])
            self._write_buffered(offset + end, piece[end:])
        else:
            self._write_buffered(offset, piece)

    def _writes_directly(self, offset: int, pages: memoryview) -> bool:
        """Write whole pages directly, if that is possible here."""
        if not self._stream.direct:
            return False
        try:
            if self._direct < 0:
                self._direct = self._open(os.O_DIRECT)
            with self._stream.turns:
                _write(self._direct, offset, pages, direct=True)
        except OSError as error:
            # Some file systems let a file be opened for direct writes and then refuse them.
            if error.errno not in _NOT_DIRECT:
                raise
            self._stream.direct = False
            return False
        return True

    def _write_buffered(self, offset: int, piece: memoryview) -> None:
        if not piece:
            return
        if self._buffered < 0:
            self._buffered = self._open(0)
        _write(self._buffered, offset, piece, direct=False)
        if self._stream.flush_is_due(len(piece)):
            os.fsync(self._buffered)

    def _open(self, how: int) -> int:
        flags = os.O_WRONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        return os.open(self._stream.path, flags | how)


def _write(file: int, offset: int, piece: memoryview, *, direct: bool) -> None:
    os.lseek(file, offset, os.SEEK_SET)
    done = 0
    while done < len(piece):
        count = os.write(file, piece[done:])
        if direct and done + count < len(piece) and count % PAGE:
            # A direct write may end early anywhere, but the next one must begin at a page again.
            count -= count % PAGE
            os.lseek(file, offset + done + count, os.SEEK_SET)
        if count == 0:  # no way on: a buffered write will say why
            raise OSError(errno.EINVAL if direct else errno.EIO, "nothing more can be written")
        done += count

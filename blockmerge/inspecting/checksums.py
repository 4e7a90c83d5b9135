"""Whether the parts of an archive have the checksums that it gives."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blockmerge.checkpoints import Checkpoint, Checksummed, FileReader
from blockmerge.streaming import Progress, aligned_buffer, for_each, thread_count

_AT_ONCE = 2 << 20


def wrong_checksums(
    checkpoint: Checkpoint, threads: int | None = None, progress: Progress | None = None
) -> list[Checksummed]:
    """Read the archives of a checkpoint once, on `threads` threads, and return what has another checksum.

    Reads nothing where there is no archive, as of safetensors files. Raises CheckpointError when a file
    cannot be read.
    """
    parts = checkpoint.checksummed()
    wrong: set[Checksummed] = set()
    lock = threading.Lock()

    @contextmanager
    def worker() -> Iterator[Callable[[Checksummed], int]]:
        buffer = aligned_buffer(_AT_ONCE)

        def look(part: Checksummed) -> int:
            if _crc(part, buffer) != part.crc:
                with lock:
                    wrong.add(part)
            return part.size

        yield look

    total = sum(part.size for part in parts)
    if parts:
        for_each(parts, worker, min(thread_count(threads), len(parts)), total, progress)
    return [part for part in parts if part in wrong]


def _crc(part: Checksummed, buffer: memoryview) -> int:
    """The CRC-32 of the bytes that are there, read as many at once as `buffer` takes."""
    crc = 0
    with FileReader(part.path, part.path.name) as reader:
        for start in range(0, part.size, len(buffer)):
            some = buffer[: min(len(buffer), part.size - start)]
            reader.read_into(part.offset + start, some)
            crc = zlib.crc32(some, crc)
    return crc

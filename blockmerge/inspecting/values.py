"""What only the numbers tell: NaN, infinity, zeros, and what float16 cannot hold.

Floats of every format are sign and magnitude, and read as an unsigned integer the magnitude keeps its order,
with infinity and NaN above all else. So the largest magnitude of a tensor, in bits, answers every question
about it, and finding it takes two passes of integer arithmetic over each piece, faster than memory delivers
it. No torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from blockmerge.checkpoints import Checkpoint
from blockmerge.streaming import Progress, aligned_buffer, for_each, thread_count

PIECE_BYTES = 2 << 20
"""What a worker reads and looks at in one go."""


@dataclass(frozen=True)
class _Bits:
    """Magnitudes in bits: the first that is no number, and the first that is infinity in float16 (65520)."""

    unsigned: str
    not_finite: int
    over_fp16: int | None = None


BITS = {
    "F8_E4M3": _Bits("<u1", 0x7F),
    "F8_E5M2": _Bits("<u1", 0x7C),
    "F16": _Bits("<u2", 0x7C00),
    "BF16": _Bits("<u2", 0x7F80, 0x4780),
    "F32": _Bits("<u4", 0x7F80_0000, 0x477F_F000),
    "F64": _Bits("<u8", 0x7FF0_0000_0000_0000, 0x40EF_FE00_0000_0000),
}


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of a tensor of floats, in the bits of its dtype."""

    dtype: str
    bits: int

    @property
    def is_finite(self) -> bool:
        """Whether the tensor holds neither NaN nor infinity."""
        return self.bits < BITS[self.dtype].not_finite

    @property
    def is_zero(self) -> bool:
        """Whether every number is 0."""
        return self.bits == 0

    @property
    def overflows_fp16(self) -> bool:
        """Whether a finite number would become infinity in float16."""
        limit = BITS[self.dtype].over_fp16
        return limit is not None and limit <= self.bits < BITS[self.dtype].not_finite


def peaks_of(
    checkpoint: Checkpoint, names: Sequence[str], threads: int | None = None, progress: Progress | None = None
) -> dict[str, Peak]:
    """Read float tensors once, on `threads` threads, and return their peaks; empty tensors have none.

    Memory is one piece per thread. Raises CheckpointError when the file cannot be read or was changed
    meanwhile.
    """
    tensors = {name: checkpoint.tensors[name] for name in names}
    pieces = (
        (name, start, min(PIECE_BYTES, info.nbytes - start))
        for name, info in tensors.items()
        for start in range(0, info.nbytes, PIECE_BYTES)
    )
    found: dict[str, int] = {}
    lock = threading.Lock()

    @contextmanager
    def worker() -> Iterator[Callable[[tuple[str, int, int]], int]]:
        buffer = aligned_buffer(PIECE_BYTES)

        def look(piece: tuple[str, int, int]) -> int:
            name, start, count = piece
            info = tensors[name]
            reader.read_into(info.offset + start, buffer[:count])
            bits = _peak(buffer[:count], info.dtype)
            with lock:
                found[name] = max(bits, found.get(name, 0))
            return count

        with checkpoint.reader() as reader:
            yield look

    total = sum(info.nbytes for info in tensors.values())
    for_each(pieces, worker, min(thread_count(threads), -(-total // PIECE_BYTES)), total, progress)
    checkpoint.check_unchanged()
    return {name: Peak(tensors[name].dtype, bits) for name, bits in found.items()}


def _peak(buffer: memoryview, dtype: str) -> int:
    values = np.frombuffer(buffer, dtype=BITS[dtype].unsigned)
    # In place: the buffer is the worker's own, and no other is touched.
    np.bitwise_and(values, values.dtype.type((1 << 8 * values.itemsize - 1) - 1), out=values)
    return int(values.max())

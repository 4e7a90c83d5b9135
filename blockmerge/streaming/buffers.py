"""Memory for workers: aligned for direct writes and for tensors of any dtype, and given back when it is
dropped.
"""

from __future__ import annotations

import mmap


def aligned_buffer(nbytes: int) -> memoryview:
    """Return `nbytes` of zeroed memory that begins at a page, as direct writes to a disk need it."""
    if hasattr(mmap, "MAP_PRIVATE"):  # shared memory, the default, would not count as this process's own
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return memoryview(mmap.mmap(-1, max(1, nbytes), flags=flags))[:nbytes]
    return memoryview(mmap.mmap(-1, max(1, nbytes)))[:nbytes]

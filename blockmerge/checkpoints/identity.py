"""What tells one model's file from all others, in milliseconds, whatever it is called."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from blockmerge.checkpoints.checkpoint import Checkpoint
from blockmerge.errors import CheckpointError, reason

_PAGES = 64
_PAGE = 4096
_OF_EACH = 64
"""Bytes of every tensor."""

_known: WeakKeyDictionary[Checkpoint, Identity] = WeakKeyDictionary()


@dataclass(frozen=True)
class Identity:
    """The size of a model's files in bytes, and a digest of names, shapes, metadata, and samples of the data:
    64 bytes of every tensor and 64 pages spread over all of them.

    Files with one identity may differ where nobody has looked. What is computed from them tells, at the
    latest.
    """

    size: int
    digest: str


def identity_of(checkpoint: Checkpoint) -> Identity | None:
    """Return a checkpoint's identity; None for one in memory.

    >>> identity_of(open_checkpoint("a.safetensors"))  # doctest: +SKIP
    Identity(size=2132625918, digest='6f0b4ab5c3f94eb09f7d44f3ae4ab36f')

    Raises CheckpointError when it cannot be read.
    """
    if not checkpoint.files:
        return None
    if checkpoint not in _known:
        _known[checkpoint] = Identity(size_of_files(checkpoint), _digest(checkpoint))
    return _known[checkpoint]


def size_of_files(checkpoint: Checkpoint) -> int:
    """Return the size of all files that a checkpoint is read from."""
    try:
        return sum(os.stat(file).st_size for file in checkpoint.files)
    except OSError as error:
        raise CheckpointError(f"cannot read {checkpoint.name}: {reason(error)}") from error


def _digest(checkpoint: Checkpoint) -> str:
    table = {name: [one.dtype, one.shape, one.offset] for name, one in checkpoint.tensors.items()}
    found = hashlib.blake2b(json.dumps([table, dict(checkpoint.metadata)]).encode(), digest_size=16)
    samples = list(_samples(checkpoint))
    memory = memoryview(bytearray(sum(count for _, count in samples)))
    done = 0
    with checkpoint.reader() as reader:
        for offset, count in samples:
            reader.read_into(offset, memory[done : done + count])
            done += count
    found.update(memory)
    return found.hexdigest()


def _samples(checkpoint: Checkpoint) -> Iterator[tuple[int, int]]:
    """What is looked at: (offset, bytes)."""
    places = ((one.offset, one.nbytes) for one in checkpoint.tensors.values())
    filled = [(offset, nbytes) for offset, nbytes in places if nbytes]
    yield from ((offset, min(_OF_EACH, nbytes)) for offset, nbytes in filled)
    total = sum(nbytes for _, nbytes in filled)
    wanted = iter([total * number // _PAGES for number in range(_PAGES)])
    at, next_ = 0, next(wanted, None)
    for offset, nbytes in filled:
        while next_ is not None and next_ < at + nbytes:
            begin = next_ - at
            yield offset + begin, min(_PAGE, nbytes - begin)
            next_ = next(wanted, None)
        at += nbytes

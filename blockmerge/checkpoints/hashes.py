"""The hashes by which people name model files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blockmerge.checkpoints.checkpoint import Checkpoint
from blockmerge.checkpoints.formats.safetensors_file import SafetensorsFile
from blockmerge.checkpoints.hub import shown_path
from blockmerge.checkpoints.open import open_checkpoint
from blockmerge.errors import CheckpointError, reason, shown

_STEP = 1 << 22


@dataclass(frozen=True)
class Hashes:
    """The usual hashes of a file, lower-case hexadecimal.

    `autov1`: first 8 digits of the SHA-256 of the 65,536 bytes at offset 0x100000 (the old web UI hash).
    `autov2`: first 10 of the whole file's. `autov3`: first 12 of everything after a safetensors header; None
    for a file without.
    """

    autov1: str
    autov2: str
    autov3: str | None
    sha256: str


def old_hash(checkpoint: Checkpoint) -> str:
    """Return a file's AutoV1 hash alone, which takes reading 64 KB.

    Raises CheckpointError when it cannot be read, or the checkpoint is not one file.
    """
    path = _only_file(checkpoint)
    try:
        with path.open("rb") as file:
            return _autov1(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {shown_path(path)}: {reason(error)}") from error


def _only_file(checkpoint: Checkpoint) -> Path:
    if len(checkpoint.files) != 1:
        raise CheckpointError(f"{shown(checkpoint.name)} is not one file: it has no hashes")
    return checkpoint.files[0]


def _autov1(file: BinaryIO) -> str:
    file.seek(0x100000)
    return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def hash_file(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> Hashes:
    """Hash a checkpoint's file in one pass; `progress(done, total)` is told the bytes.

    Raises CheckpointError when it cannot be read, or the checkpoint is not one file.
    """
    path = _only_file(checkpoint)
    opened = open_checkpoint(path)  # `checkpoint` may be a folder that holds this one file
    data_start = opened.data_start if isinstance(opened, SafetensorsFile) else None
    whole, data = hashlib.sha256(), hashlib.sha256()
    try:
        # Both sums want every byte; hashlib lets other threads run, so they are taken side by side.
        with path.open("rb") as file, ThreadPoolExecutor(1) as beside:
            total = path.stat().st_size
            old = _autov1(file)
            file.seek(0)
            header = total if data_start is None else data_start
            done = 0
            while chunk := file.read(_STEP):
                other = beside.submit(data.update, memoryview(chunk)[max(header - done, 0) :])
                whole.update(chunk)
                other.result()
                done += len(chunk)
                if progress:
                    progress(done, total)
    except OSError as error:
        raise CheckpointError(f"cannot read {shown_path(path)}: {reason(error)}") from error
    digest = whole.hexdigest()
    return Hashes(old, digest[:10], data.hexdigest()[:12] if data_start else None, digest)

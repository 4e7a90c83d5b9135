"""One file of any format: what kind it is shows in how it begins, whatever its name."""

from __future__ import annotations

import os
import stat

from blockmerge.checkpoints.checkpoint import Checkpoint
from blockmerge.checkpoints.formats.safetensors_file import SafetensorsFile
from blockmerge.checkpoints.formats.torch_file import TORCH_SUFFIXES, TorchFile, begins_torch_file
from blockmerge.errors import CheckpointError, shown

SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
"""How the names of model files end, in lower case."""

_NO_MODELS = {
    b"version https://git-lfs": "is a git-LFS pointer, not the model itself: fetch that with git lfs pull",
    b"<!doctype html": "is an HTML page, not a model: download the model itself",
    b"<html": "is an HTML page, not a model: download the model itself",
}


def open_file(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint in a file, with its header read and checked and its data untouched.

    Raises CheckpointError when there is no such file, or none that can be read.
    """
    head = _head(path)
    for start, what in _NO_MODELS.items():
        if head.lstrip().lower().startswith(start):
            raise CheckpointError(f"{shown(path)} {what}")
    if begins_torch_file(head) or (head[8:9] != b"{" and os.fspath(path).lower().endswith(TORCH_SUFFIXES)):
        return TorchFile(path)
    return SafetensorsFile(path)


def _head(path: str | os.PathLike[str]) -> bytes:
    """How a file begins; nothing when it cannot be read, which opening it as a checkpoint will say."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return b""
        with open(path, "rb") as file:
            return file.read(64)
    except (OSError, ValueError):
        return b""

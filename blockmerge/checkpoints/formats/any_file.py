"""One file of any format: what kind it is shows in how it begins, whatever its name."""

from __future__ import annotations

import os
import stat

from blockmerge.checkpoints.checkpoint import Checkpoint
from blockmerge.checkpoints.formats.other_files import HEAD, other_file
from blockmerge.checkpoints.formats.safetensors_file import SafetensorsFile
from blockmerge.checkpoints.formats.torch_file import TORCH_SUFFIXES, TorchFile, begins_torch_file
from blockmerge.errors import CheckpointError, shown

SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
"""How the names of model files end, in lower case."""


def open_file(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint in a file, with its header read and checked and its data untouched.

    Raises CheckpointError when there is no such file, or none that can be read.
    """
    head = _head(path)
    if head is None or _begins_safetensors(head):
        return SafetensorsFile(path)
    if begins_torch_file(head):
        return TorchFile(path)
    if (what := other_file(head)) is not None:
        raise CheckpointError(f"{shown(path)} {what}")
    return TorchFile(path) if os.fspath(path).lower().endswith(TORCH_SUFFIXES) else SafetensorsFile(path)


def _begins_safetensors(head: bytes) -> bool:
    """Whether a file begins with a length below 4 GB and a JSON object."""
    return head[4:9] == b"\0\0\0\0{"


def _head(path: str | os.PathLike[str]) -> bytes | None:
    """How a file begins; None when it cannot be read, which opening it as a checkpoint will say."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as file:
            return file.read(HEAD)
    except (OSError, ValueError):
        return None

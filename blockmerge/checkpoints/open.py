"""From what a caller names to a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

from blockmerge.checkpoints.checkpoint import Checkpoint
from blockmerge.checkpoints.formats.any_file import open_file
from blockmerge.checkpoints.formats.folder import DiffusersFolder
from blockmerge.checkpoints.state_dict import StateDict
from blockmerge.errors import CheckpointError, shown

if TYPE_CHECKING:
    import torch

CheckpointLike = Union[str, "os.PathLike[str]", Checkpoint, "Mapping[str, torch.Tensor]"]
"""What is taken for a model: a path, an opened checkpoint, or a state dict."""


def open_checkpoint(
    source: CheckpointLike, name: str = "state dict", variant: str | None = None
) -> Checkpoint:
    """Return the checkpoint at a path, with its header read and checked and its data untouched.

    What kind of file it is, is seen by what is in it, whatever its name. An opened checkpoint is returned as
    it is, and a state dict (tensors on any device) is wrapped under `name`. `variant` is for a diffusers
    folder that has several kinds of weights: ``"fp16"``. Raises CheckpointError when there is none, or none
    that can be read.
    """
    is_folder = isinstance(source, (str, os.PathLike)) and os.path.isdir(source)
    if variant is not None and not is_folder:
        what = shown(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"
        raise CheckpointError(
            f"{what} is no diffusers folder, and only these have variants: "
            f"'{shown(variant)}' is not to be had"
        )
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return StateDict(source, name)
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            f"a {type(source).__name__} is no model: give a path, an opened checkpoint or a state dict"
        )
    if not os.fspath(source):
        raise CheckpointError("an empty path is no model: give the path of a .safetensors or .ckpt file")
    if is_folder:
        return DiffusersFolder(source, variant)
    return open_file(source)


def told_apart(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return what messages call checkpoints: their names, and where two of them have the same, with the
    folders that differ.
    """
    places = [None if one.path is None else Path(os.path.abspath(one.path)).parts for one in checkpoints]
    return [
        one.name
        if parts is None
        else _shortest(parts, [other for other in places if other is not None and other != parts])
        for one, parts in zip(checkpoints, places, strict=True)
    ]


def _shortest(parts: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    """The shortest end of a path that no other path has.

    An absolute path, from its root on, is no other's end.
    """
    count = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
    return str(Path(*parts[-count:]))

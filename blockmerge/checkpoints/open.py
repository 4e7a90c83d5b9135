"""From what a caller names to a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

from blockmerge.checkpoints.checkpoint import Checkpoint, Makes
from blockmerge.checkpoints.formats.any_file import open_file
from blockmerge.checkpoints.formats.folder import DiffusersFolder, files_of_snapshot, is_diffusers_folder
from blockmerge.checkpoints.hub import followed, long_name
from blockmerge.checkpoints.state_dict import StateDict
from blockmerge.errors import CheckpointError, did_you_mean, listing, shown

if TYPE_CHECKING:
    import torch

CheckpointLike = Union[str, "os.PathLike[str]", Checkpoint, "Mapping[str, torch.Tensor]", Makes]
"""What stands for a model: a path, an opened `Checkpoint`, a state dict {name: tensor}, or a `Recipe`."""


def located(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return where a model lies: for a repository in Hugging Face's cache its snapshot, or the file in it
    where that is the only checkpoint; any other path as it is.

    Raises CheckpointError as `followed` does.
    """
    place = followed(path)
    files = [] if is_diffusers_folder(place) else files_of_snapshot(place)
    return files[0] if len(files) == 1 else place


def open_checkpoint(
    source: CheckpointLike, name: str = "state dict", variant: str | None = None
) -> Checkpoint:
    """Open a model: its header is read and checked, its weights are not.

    >>> model = blockmerge.open_checkpoint("models--org--name", variant="fp16")  # doctest: +SKIP
    >>> model.name, model.notes  # doctest: +SKIP
    ('org/name', ('has no variant fp16 of vae: the plain weights are used',))

    - `source`: the path of a file or folder, an opened checkpoint, a state dict, or a recipe. A repository in
      Hugging Face's cache is followed to its files.
    - `name`: what messages call a state dict.
    - `variant`: which weights of a diffusers folder are opened where it has several, such as ``"fp16"``.

    A file is recognised by its contents, not by its name. No code in a `.ckpt` is ever run.

    Raises `CheckpointError` where there is no model, or none that can be read.
    """
    checkpoint = open_source(source, name, variant)
    check_variant([checkpoint], variant)
    return checkpoint


def open_source(
    source: CheckpointLike,
    name: str = "state dict",
    variant: str | None = None,
    *,
    any_variant: bool = False,
) -> Checkpoint:
    """Return what `open_checkpoint` does, but take a variant for a wish: `check_variant` says whether any of
    several models has it. `any_variant` is that of DiffusersFolder.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Makes):
        return source.as_checkpoint()
    if isinstance(source, Mapping):
        return StateDict(source, name)
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(
            f"a {type(source).__name__} is not a model: give a path, an opened checkpoint or a state dict"
        )
    if not os.fspath(source):
        raise CheckpointError("an empty path is not a model: give the path of a .safetensors or .ckpt file")
    path = located(source)
    return DiffusersFolder(path, variant, any_variant=any_variant) if os.path.isdir(path) else open_file(path)


def check_variant(checkpoints: Sequence[Checkpoint], variant: str | None) -> None:
    """Raise CheckpointError when none of the checkpoints has the variant that was asked for."""
    if variant is None:
        return
    folders = [one for one in checkpoints if isinstance(one, DiffusersFolder)]
    if any(variant in folder.used.values() for folder in folders):
        return
    if not folders:
        are = "is not a diffusers folder" if len(checkpoints) == 1 else "are not diffusers folders"
        raise CheckpointError(
            f"{listing(one.name for one in checkpoints)} {are}, and only these have variants: "
            f"leave out variant='{shown(variant)}' (--variant)"
        )
    there = sorted({one for folder in folders for one in folder.variants})
    has = "has" if len(folders) == 1 else "have"
    it_has = "it has" if len(folders) == 1 else "they have"
    if variant in there:  # only where a checkpoint was opened before
        it_has = "open it so, or give its path: it has"
    raise CheckpointError(
        f"{listing(folder.name for folder in folders)} {has} no weights of the variant '{shown(variant)}': "
        f"{it_has} {f'{listing(there)}{did_you_mean(variant, there)}' if there else 'only plain weights'}"
    )


def told_apart(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return what messages call checkpoints: their names, and where two of them have the same, with the
    folders that differ, in Hugging Face's cache with the revisions.
    """
    return names_apart([(one.name, one.path) for one in checkpoints])


def names_apart(named: Sequence[tuple[str, str | os.PathLike[str] | None]]) -> list[str]:
    """Return what `told_apart` does, for names and the paths that have them."""
    places = [None if path is None else os.path.abspath(path) for _, path in named]
    of_a_name: dict[str, set[str]] = {}
    for (name, _), place in zip(named, places, strict=True):
        of_a_name.setdefault(name, set()).update([] if place is None else [place])
    labels = []
    for (name, _), place in zip(named, places, strict=True):
        others = [long_name(path) for path in of_a_name[name] - {place}]
        least = name.count("/") + 1
        labels.append(name if place is None or not others else _shortest(long_name(place), others, least))
    return labels


def _shortest(parts: tuple[str, ...], others: Sequence[tuple[str, ...]], least: int) -> str:
    """The shortest end of a path that no other path has, of so many parts at least.

    An absolute path, from its root on, is no other's end.
    """
    counts = range(least, len(parts))
    count = next((n for n in counts if all(other[-n:] != parts[-n:] for other in others)), len(parts))
    return str(Path(*parts[-count:]))

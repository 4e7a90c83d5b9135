"""From what a user names to single models: folders and patterns stand for the models in them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from blockmerge.checkpoints.formats.folder import is_diffusers_folder, model_files
from blockmerge.checkpoints.hub import name_of
from blockmerge.checkpoints.open import CheckpointLike, located
from blockmerge.errors import BlockmergeError, CheckpointError, reason, shown

Named = TypeVar("Named", bound=CheckpointLike)


@dataclass(frozen=True)
class Unreadable:
    """What was named and cannot be read: its name without folders, and one line that says why."""

    name: str
    error: str

    def to_dict(self) -> dict[str, str]:
        """Return it as plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, model: str | os.PathLike[str], error: BlockmergeError) -> Unreadable:
        """What an error says of a model, without the folders it lies in."""
        name, said = name_of(model), str(error)
        if os.path.dirname(os.fspath(model)):
            said = said.replace(str(Path(model)), name).replace(shown(model), shown(name))
        return cls(name, said)


def single_models(models: Iterable[Named]) -> Iterator[Named | Path | Unreadable]:
    """Yield each model that is named, once: of a folder that is no model itself the models in it, and of a
    pattern what it matches.

    >>> list(single_models(["a.safetensors", "refs/", "*.ckpt"]))  # doctest: +SKIP
    ['a.safetensors', PosixPath('refs/b.safetensors'), Unreadable('*.ckpt', 'no file matches *.ckpt')]
    """
    seen: set[str] = set()
    for model in (one for named in models for one in _expand(named)):
        if isinstance(model, (str, os.PathLike)):
            try:
                path = os.path.realpath(located(model))
            except (
                OSError,
                ValueError,
                CheckpointError,
            ):  # a name that no file can have: opening it will say so
                path = os.fspath(model)
            if path in seen:
                continue
            seen.add(path)
        yield model


def stands_for_several(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of models or a pattern of files, and not a model itself."""
    members = _members(path)
    return members is not None and not isinstance(members[0], Unreadable)


def _expand(model: Named) -> list[Named | Path | Unreadable]:
    members = _members(model) if isinstance(model, (str, os.PathLike)) else None
    return [model] if members is None else [*members]


def _members(path: str | os.PathLike[str]) -> list[Path | Unreadable] | None:
    """What a path stands for, if it is not a model itself."""
    try:
        place = os.fspath(located(path))
    except CheckpointError as error:
        return [Unreadable.of(path, error)]
    if os.path.isdir(place) and not is_diffusers_folder(place):
        return _in_folder(place)
    if not os.path.exists(place) and glob.has_magic(place):
        # The shell of Windows leaves patterns to the program.
        name = name_of(place)
        return [*sorted(map(Path, glob.glob(place)))] or [Unreadable(name, f"no file matches {shown(name)}")]
    return None


def _in_folder(path: str) -> list[Path | Unreadable]:
    name = name_of(path)
    try:
        files = model_files(path)
    except OSError as error:
        return [Unreadable(name, f"cannot read the folder {shown(name)}: {reason(error)}")]
    return [*files] or [Unreadable(name, f"the folder {shown(name)} holds no model file")]

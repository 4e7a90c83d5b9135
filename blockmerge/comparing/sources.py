"""From what a user names to models: one that cannot be read does not stop the others."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from blockmerge.anatomy import is_position_ids, is_schedule
from blockmerge.checkpoints import (
    Checkpoint,
    CheckpointLike,
    Model,
    is_diffusers_folder,
    model_files,
    open_checkpoint,
)
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import BlockmergeError, CheckpointError, RecipeError, reason, shown
from blockmerge.expressions import Expression


@dataclass(frozen=True)
class Source:
    """Something to compare: a unique name, and the model or one line about why there is none."""

    name: str
    model: Model | None
    error: str | None = None


def open_sources(models: CheckpointLike | Iterable[CheckpointLike]) -> list[Source]:
    """Open everything that `models` names.

    These may be paths, folders (for the models in them), patterns, opened checkpoints and state dicts. What
    cannot be opened becomes a Source with an error. Raises RecipeError when nothing at all was named.
    """
    if isinstance(models, (str, os.PathLike, Checkpoint, Mapping)):
        models = [models]
    if isinstance(models, bytes) or not isinstance(models, Iterable):
        raise CheckpointError(
            f"{type(models).__name__} given: name a path, a checkpoint, a state dict, or several of these"
        )
    named = (one for model in models for one in _expand(model))
    found = [_open(one, number) for number, one in enumerate(_once_each(named), 1)]
    if not found:
        raise RecipeError("nothing to compare with: name at least one model, or a folder of them")
    return _unique(found)


def _expand(model: CheckpointLike) -> Iterator[CheckpointLike | Source]:
    if not isinstance(model, (str, os.PathLike)):
        yield model
        return
    path = os.fspath(model)
    if os.path.isdir(path) and not is_diffusers_folder(path):
        try:
            files = model_files(path)
        except OSError as error:
            yield Source(_last(path), None, f"cannot read the folder {shown(_last(path))}: {reason(error)}")
            return
        if not files:
            yield Source(_last(path), None, f"the folder {shown(_last(path))} holds no model file")
        yield from files
    elif not os.path.exists(path) and glob.has_magic(path):
        # The shell of Windows leaves patterns to the program.
        found = sorted(map(Path, glob.glob(path)))
        if not found:
            yield Source(_last(path), None, f"no file matches {shown(_last(path))}")
        yield from found
    else:
        yield model


def _once_each(models: Iterable[CheckpointLike | Source]) -> Iterator[CheckpointLike | Source]:
    """Leave out files that were named before, as `a.safetensors *.safetensors` does."""
    seen: set[str] = set()
    for model in models:
        if isinstance(model, (str, os.PathLike)):
            try:
                path = os.path.realpath(model)
            except (OSError, ValueError):  # a name that no file can have: opening it will say so
                path = os.fspath(model)
            if path in seen:
                continue
            seen.add(path)
        yield model


def is_same_file(one: Model, other: Model) -> bool:
    """Whether two models are the same files under one name or two."""
    a, b = ([os.path.realpath(file) for file in model.source.files] for model in (one, other))
    return bool(a) and a == b


def _open(model: CheckpointLike | Source, number: int) -> Source:
    if isinstance(model, Source):
        return model
    name = Path(os.fspath(model)).name if isinstance(model, (str, os.PathLike)) else f"state dict {number}"
    try:
        checkpoint = open_checkpoint(model, name=name)
        return Source(checkpoint.name, Model.of(checkpoint))
    except BlockmergeError as error:
        said = str(error)
        if isinstance(model, (str, os.PathLike)):  # reports show no folders
            said = said.replace(str(Path(model)), name).replace(shown(model), shown(name))
        return Source(name, None, said)


def _last(path: str) -> str:
    return Path(os.path.abspath(path)).name


def _unique(sources: list[Source]) -> list[Source]:
    """Number those of equal names, as files in different folders can have."""
    taken: set[str] = set()
    unique = []
    for source in sources:
        name, nth = source.name, 1
        while name in taken:
            nth += 1
            name = f"{source.name} ({nth})"
        taken.add(name)
        unique.append(replace(source, name=name))
    return unique


def open_model(model: CheckpointLike, name: str) -> Model:
    """Open one model, or raise what is wrong with it."""
    return Model.of(open_checkpoint(model, name=name))


def weights_of(model: Model) -> dict[str, Expression]:
    """Return a model's weights: its float tensors without noise schedules and position numbers."""
    return {
        name: info
        for name, info in model.tensors.items()
        if info.dtype in FLOAT_DTYPES and not is_schedule(name) and not is_position_ids(name)
    }

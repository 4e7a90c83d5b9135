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
    Opening,
    is_diffusers_folder,
    located,
    model_files,
    name_of,
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


def opening_to_compare(variant: str | None, ema: str) -> Opening:
    """How models are opened to be compared. Raises RecipeError for what there is no way to."""
    if ema == "keep":
        raise RecipeError("EMA copies are not compared beside the U-Net: ema (--ema) is drop or use")
    return Opening(variant, ema)


def open_sources(models: CheckpointLike | Iterable[CheckpointLike], opening: Opening) -> list[Source]:
    """Open everything that `models` names, in one way.

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
    found = [_open(one, number, opening) for number, one in enumerate(_once_each(named), 1)]
    if not found:
        raise RecipeError("nothing to compare with: name at least one model, or a folder of them")
    return _unique(found)


def _expand(model: CheckpointLike) -> Iterator[CheckpointLike | Source]:
    if not isinstance(model, (str, os.PathLike)):
        yield model
        return
    try:
        path = os.fspath(located(model))
    except CheckpointError as error:
        yield Source(name_of(model), None, str(error).replace(shown(model), shown(name_of(model))))
        return
    if os.path.isdir(path) and not is_diffusers_folder(path):
        try:
            files = model_files(path)
        except OSError as error:
            yield Source(
                name_of(path), None, f"cannot read the folder {shown(name_of(path))}: {reason(error)}"
            )
            return
        if not files:
            yield Source(name_of(path), None, f"the folder {shown(name_of(path))} holds no model file")
        yield from files
    elif not os.path.exists(path) and glob.has_magic(path):
        # The shell of Windows leaves patterns to the program.
        found = sorted(map(Path, glob.glob(path)))
        if not found:
            yield Source(name_of(path), None, f"no file matches {shown(name_of(path))}")
        yield from found
    else:
        yield path


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


def _open(model: CheckpointLike | Source, number: int, opening: Opening) -> Source:
    if isinstance(model, Source):
        return model
    name = name_of(model) if isinstance(model, (str, os.PathLike)) else f"state dict {number}"
    try:
        opened = opening.model(model, name)
        return Source(opened.name, opened)
    except BlockmergeError as error:
        said = str(error)
        if isinstance(model, (str, os.PathLike)):  # reports show no folders
            said = said.replace(str(Path(model)), name).replace(shown(model), shown(name))
        return Source(name, None, said)


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


def weights_of(model: Model) -> dict[str, Expression]:
    """Return a model's weights: its float tensors without noise schedules and position numbers."""
    return {
        name: info
        for name, info in model.tensors.items()
        if info.dtype in FLOAT_DTYPES and not is_schedule(name) and not is_position_ids(name)
    }

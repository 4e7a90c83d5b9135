"""From what a user names to models: one that cannot be read does not stop the others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from blockmerge.anatomy import is_position_ids, is_schedule
from blockmerge.checkpoints import (
    Checkpoint,
    CheckpointLike,
    Model,
    Opening,
    Unreadable,
    name_of,
    single_models,
)
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import BlockmergeError, CheckpointError, RecipeError
from blockmerge.expressions import Expression


@dataclass(frozen=True)
class Source:
    """Something to compare: a unique name, and the model or one line about why there is none; what was given,
    where that is not a model.
    """

    name: str
    model: Model | None
    error: str | None = None
    given: CheckpointLike | None = None


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
    found = [_open(one, number, opening) for number, one in enumerate(single_models(models), 1)]
    if not found:
        raise RecipeError("nothing to compare with: name at least one model, or a folder of them")
    return _unique(found)


def is_same_file(one: Model, other: Model) -> bool:
    """Whether two models are the same files under one name or two."""
    a, b = ([os.path.realpath(file) for file in model.source.files] for model in (one, other))
    return bool(a) and a == b


def _open(model: CheckpointLike | Unreadable, number: int, opening: Opening) -> Source:
    if isinstance(model, Unreadable):
        return Source(model.name, None, model.error)
    name = name_of(model) if isinstance(model, (str, os.PathLike)) else f"state dict {number}"
    try:
        opened = opening.model(model, name)
        return Source(opened.name, opened)
    except BlockmergeError as error:
        # reports show no folders
        said = Unreadable.of(model, error).error if isinstance(model, (str, os.PathLike)) else str(error)
        return Source(name, None, said, model)


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

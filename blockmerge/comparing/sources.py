"""From what a user names to models: files, folders and patterns, where one that cannot be read does not stop the others."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from blockmerge.anatomy import is_position_ids, is_schedule
from blockmerge.checkpoints import FLOAT_DTYPES, Checkpoint, CheckpointLike, Model, SafetensorsFile, TensorInfo, open_checkpoint
from blockmerge.errors import BlockmergeError, CheckpointError, RecipeError, shown


@dataclass(frozen=True)
class Source:
    """Something to compare: its name, unique among its kind, and the model, or one line about why there is none."""

    name: str
    model: Model | None
    error: str | None = None


def open_sources(models: CheckpointLike | Iterable[CheckpointLike]) -> list[Source]:
    """Open everything that `models` names: paths, folders (their .safetensors files), patterns, checkpoints, state dicts.

    What cannot be opened becomes a Source with an error. Raises RecipeError when nothing at all was named.
    """
    if isinstance(models, (str, os.PathLike, Checkpoint, Mapping)):
        models = [models]
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
    if os.path.isdir(path):
        files = sorted(entry for entry in Path(path).iterdir() if entry.suffix.lower() == ".safetensors")
        if not files:
            yield Source(Path(path).name, None, f"the folder {shown(path)} holds no .safetensors file")
        yield from files
    elif not os.path.exists(path) and glob.has_magic(path):
        # The shell of Windows leaves patterns to the program.
        found = sorted(map(Path, glob.glob(path)))
        if not found:
            yield Source(path, None, f"no file matches {shown(path)}")
        yield from found
    else:
        yield model


def _once_each(models: Iterable[CheckpointLike | Source]) -> Iterator[CheckpointLike | Source]:
    """Leave out files that were named before, as `a.safetensors *.safetensors` does."""
    seen: set[str] = set()
    for model in models:
        if isinstance(model, (str, os.PathLike)):
            path = os.path.realpath(model)
            if path in seen:
                continue
            seen.add(path)
        yield model


def is_same_file(one: Model, other: Model) -> bool:
    """Whether two models are the same file under one name or two."""
    a, b = one.checkpoint, other.checkpoint
    return (
        isinstance(a, SafetensorsFile) and isinstance(b, SafetensorsFile) and os.path.realpath(a.path) == os.path.realpath(b.path)
    )


def _open(model: CheckpointLike | Source, number: int) -> Source:
    if isinstance(model, Source):
        return model
    name = Path(os.fspath(model)).name if isinstance(model, (str, os.PathLike)) else f"state dict {number}"
    try:
        checkpoint = open_checkpoint(model, name=name)
        return Source(checkpoint.name, Model.of(checkpoint))
    except BlockmergeError as error:
        return Source(name, None, str(error))


def _unique(sources: list[Source]) -> list[Source]:
    """Number those of equal names, as files in different folders can have."""
    many = {name for name, count in Counter(source.name for source in sources).items() if count > 1}
    seen: Counter[str] = Counter()
    numbered = []
    for source in sources:
        seen[source.name] += 1
        nth = f"{source.name} ({seen[source.name]})" if source.name in many and seen[source.name] > 1 else source.name
        numbered.append(replace(source, name=nth))
    return numbered


def open_model(model: CheckpointLike, name: str) -> Model:
    """Open one model, or raise what is wrong with it."""
    if isinstance(model, (str, os.PathLike)) and os.path.isdir(model):
        raise CheckpointError(f"{shown(model)} is a folder: give a .safetensors file")
    return Model.of(open_checkpoint(model, name=name))


def weights_of(model: Model) -> dict[str, TensorInfo]:
    """Return a model's weights: its float tensors without noise schedules and position numbers."""
    return {
        name: info
        for name, info in model.tensors.items()
        if info.dtype in FLOAT_DTYPES and not is_schedule(name) and not is_position_ids(name)
    }

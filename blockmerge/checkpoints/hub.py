"""Hugging Face's cache: where in it a model lies, and what the model is called.

A repository's folder there, ``models--ORG--NAME``, holds each revision in ``snapshots/<40 hex digits>``,
whose files mostly are links to ``blobs/``, and in ``refs/main`` the revision of its main branch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from blockmerge.errors import CheckpointError, counted, listing, reason, shown

_REPOSITORY = "models--"
_SNAPSHOTS = "snapshots"
_REVISION = re.compile(r"[0-9a-f]{40}")
_SHORT = 7  # digits of a revision that tell it from others, as git shows them


def followed(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the snapshot in a repository's folder, and every other path as it is.

    >>> followed("~/.cache/huggingface/hub/models--org--name")  # doctest: +SKIP
    '~/.cache/huggingface/hub/models--org--name/snapshots/451f4fe16113bff5a5d2269ed5ad43b0592e9a14'

    It is that of refs/main, or the only one. Raises CheckpointError when that leaves open which.
    """
    try:
        repository = _repository(path)
        if repository is None:
            return path
        snapshots = repository / _SNAPSHOTS
        found = sorted(entry.name for entry in snapshots.iterdir() if _REVISION.fullmatch(entry.name))
        main = _main(repository)
    except OSError as error:
        raise CheckpointError(f"cannot open {shown(path)}: {reason(error)}") from error
    if main in found:
        return snapshots / main
    if len(found) == 1:
        return snapshots / found[0]
    if not found:
        raise CheckpointError(
            f"{shown(path)} is a repository in Hugging Face's cache without any snapshot: download it first"
        )
    raise CheckpointError(
        f"{shown(path)} has {counted(len(found), 'snapshot')}, and no refs/main says which: "
        f"give the path of one of them ({listing(f'{_SNAPSHOTS}/{revision}' for revision in found)})"
    )


def _repository(path: str | os.PathLike[str]) -> Path | None:
    """The folder of a repository that a path leads to, itself or by its `snapshots`."""
    if not os.path.isdir(path):
        return None
    folder = _absolute(path)
    if folder.name == _SNAPSHOTS:
        folder = folder.parent
    if not os.path.isdir(folder / _SNAPSHOTS):
        return None
    # A training run may have its own folder of that name.
    is_one = folder.name.startswith(_REPOSITORY) or any(
        os.path.isdir(folder / beside) for beside in ("blobs", "refs")
    )
    return folder if is_one else None


def _absolute(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(os.path.abspath(path))
    except OSError:  # the current folder has been removed
        return Path(path)


def _main(repository: Path) -> str:
    ref = repository / "refs" / "main"
    if not ref.is_file():
        return ""
    with ref.open("rb") as file:
        return file.read(100).decode("ascii", "replace").strip()


@dataclass(frozen=True, slots=True)
class _Place:
    """A path in the cache: the folders `above` the repository's, its `name`, the `revision`, the `rest`."""

    above: tuple[str, ...]
    name: tuple[str, ...]
    revision: str
    rest: tuple[str, ...]

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> _Place | None:
        """The place of a path, None outside the cache; told by its text alone."""
        parts = _absolute(path).parts
        for number, folder in enumerate(parts):
            rest = parts[number + 1 :]
            in_snapshot = len(rest) > 1 and rest[0] == _SNAPSHOTS and _REVISION.fullmatch(rest[1])
            if not (in_snapshot or folder.startswith(_REPOSITORY)):
                continue
            name = tuple(folder.removeprefix(_REPOSITORY).split("--"))
            if in_snapshot:
                return cls(parts[:number], name, rest[1], rest[2:])
            return cls(parts[:number], name, "", () if rest == (_SNAPSHOTS,) else rest)
        return None

    def __str__(self) -> str:
        return "/".join((*self.name, *self.rest))


def is_snapshot(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a revision in the cache, with all that was downloaded of it."""
    place = _Place.of(path)
    return place is not None and bool(place.revision) and not place.rest


def in_cache(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in the cache, and so is called by its repository's name."""
    return _Place.of(path) is not None


def name_of(path: str | os.PathLike[str]) -> str:
    """Return what a model at a path is called: its own name without folders, in the cache the repository's.

    >>> name_of("models/a.safetensors")
    'a.safetensors'
    >>> name_of("/hub/models--org--name/snapshots/451f4fe16113bff5a5d2269ed5ad43b0592e9a14/unet")
    'org/name/unet'
    """
    place = _Place.of(path)
    return _absolute(path).name if place is None else str(place)


def shown_path(path: str | os.PathLike[str]) -> str:
    """Return a path fit for one line of a message: as it is given, in the cache by its repository's name."""
    place = _Place.of(path)
    return shown(path if place is None else place)


def long_name(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return all parts of a path that can tell it from another, in the cache with the beginning of its
    revision.
    """
    place = _Place.of(path)
    if place is None:
        return _absolute(path).parts
    *first, last = place.name
    at = f"{last}@{place.revision[:_SHORT]}" if place.revision else last
    return (*place.above, *first, at, *place.rest)

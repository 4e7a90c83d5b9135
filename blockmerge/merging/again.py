"""Merges made again from what their files record: the recipe read back, its models found by identity."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from blockmerge.checkpoints import (
    SUFFIXES,
    Checkpoint,
    CheckpointLike,
    DiffusersFolder,
    hash_file,
    identity_of,
    is_diffusers_folder,
    open_checkpoint,
    sha256_of,
    size_of_files,
)
from blockmerge.errors import (
    BlockmergeError,
    CheckpointError,
    OutputError,
    RecipeError,
    listing,
    reason,
    shown,
)
from blockmerge.merging.planning.metadata import RECIPE_KEY
from blockmerge.merging.planning.run_faults import fault_of_run, strict_json
from blockmerge.merging.planning.written import is_as_run
from blockmerge.merging.recipe import Recipe
from blockmerge.merging.recipe_changes import with_changes
from blockmerge.merging.recipe_files import Places, read_recipe, recipe_of
from blockmerge.merging.recipe_recorded import written_down
from blockmerge.merging.result import MergeResult
from blockmerge.streaming import Progress
from blockmerge.types import PathLike


class Finder(Protocol):
    """Finds files by what is recorded of them."""

    def find(self, wanted: Sequence[Mapping[str, Any]]) -> Mapping[str, Checkpoint]:
        """Return {identity: the checkpoint that has it}. Raises RecipeError for those that are not there."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """What a merged file, or a pinned recipe, records of how it was made: `run` is the recipe, `metadata` all
    that is written with it, and `sha256` what the file must be where that is pinned. It lies in `folder`.

    >>> recorded = Recorded.of("merged.safetensors")  # doctest: +SKIP
    >>> recipe = recorded.recipe(Searched(["/models"]))  # doctest: +SKIP
    """

    name: str
    folder: str
    run: Mapping[str, Any]
    metadata: Mapping[str, str]
    sha256: str | None = None

    @classmethod
    def of(cls, file: CheckpointLike) -> Recorded:
        """Read a file's metadata, or a pinned recipe. Raises RecipeError when there is no recipe in it,
        CheckpointError when it cannot be read.
        """
        if isinstance(file, (str, os.PathLike)) and os.fspath(file).lower().endswith(".json"):
            return cls._pinned(file)
        source = open_checkpoint(file)
        metadata = source.metadata
        if isinstance(source, DiffusersFolder):  # each of whose files has it
            metadata = open_checkpoint(source.files[0]).metadata
        text = metadata.get(RECIPE_KEY)
        if text is None:
            raise RecipeError(
                f"{shown(source.name)} has no recipe in its metadata: it was not made by blockmerge, or was "
                "saved anew by something else"
            )
        folder = os.path.dirname(os.path.abspath(source.path)) if source.path is not None else ""
        return cls(source.name, folder, _run_in(text, source.name), metadata)

    @classmethod
    def _pinned(cls, file: PathLike) -> Recorded:
        name = os.path.basename(os.fspath(file))
        written = read_recipe(file)
        metadata, sha256 = written.get("metadata"), written.get("sha256")
        if not isinstance(metadata, dict) or not isinstance(sha256, str) or RECIPE_KEY not in metadata:
            raise RecipeError(
                f"{shown(name)} is not a pinned recipe, as 'blockmerge recipe' pins one (--pin, of recipe): "
                "blockmerge run takes others"
            )
        if not all(isinstance(text, str) for text in metadata.values()):
            raise RecipeError(f"{shown(name)}: its metadata are not all texts")
        folder = os.path.dirname(os.path.abspath(file))
        return cls(name, folder, _run_in(metadata[RECIPE_KEY], name), metadata, sha256)

    def recipe(
        self, finder: Finder, changes: Sequence[str] = (), methods: Mapping[str, object] | None = None
    ) -> Recipe:
        """The recipe with the files that were recorded, and `changes` as ``--set`` takes them.

        Raises RecipeError, naming all files that are missing, and for what cannot be read back.
        """
        try:
            table, files = written_down(self.run)
            found = finder.find(list(files.values()))
            places = _Found(files={name: found[one["identity"]] for name, one in files.items()})
            return recipe_of(Recipe, with_changes(table, changes), places, methods)
        except BlockmergeError as error:
            raise type(error)(f"{shown(self.name)}: {error}") from error


def _run_in(text: str, name: str) -> dict[str, Any]:
    run = strict_json(text)
    if run is None:
        raise RecipeError(f"{shown(name)}: the recipe in its metadata is not JSON")
    if isinstance(run, dict) and (made := _made_as_lora(run)) is not None:
        raise RecipeError(
            f"{shown(name)} is a LoRA, made by {made}: LoRA files keep no recipe that can be run again; "
            "blockmerge lora inspect FILE shows what is in it"
        )
    if not isinstance(run, dict) or not is_as_run(run):
        raise RecipeError(f"{shown(name)}: what is in its metadata is not a recipe")
    if fault := fault_of_run(run):
        raise RecipeError(f"{shown(name)}: what is in its metadata is not a recipe: {fault}")
    return run


def _made_as_lora(run: Mapping[str, Any]) -> str | None:
    """The command that wrote a LoRA, and of what; None for a recipe of something else."""
    method = run.get("method")
    if not isinstance(method, str) or not method.startswith("lora "):
        return None
    models, loras = (run[key] if isinstance(run.get(key), list) else [] for key in ("models", "loras"))
    names = [one.get("name") if isinstance(one, Mapping) else one for one in (*models, *loras)]
    of = listing([name for name in names if isinstance(name, str)], 5)
    return f"{shown(method)} from {of}" if of else shown(method)


def pinned(file: PathLike, progress: Progress | None = None) -> dict[str, Any]:
    """Return all that is needed to make a merged file again elsewhere, ready for JSON: its metadata, with the
    recipe, and the hashes that it must have.

    Raises RecipeError where it has no recipe, CheckpointError for a folder, and when it cannot be read.
    """
    recorded = Recorded.of(file)
    source = open_checkpoint(file)
    hashes = hash_file(source, progress)
    return {
        "name": recorded.name,
        "sha256": hashes.sha256,
        "autov3": hashes.autov3,
        "size": size_of_files(source),
        "metadata": dict(recorded.metadata),
    }


def is_pinned(file: PathLike) -> bool:
    """Whether a recipe's file is a pinned one. Raises RecipeError as `read_recipe` does."""
    return os.fspath(file).lower().endswith(".json") and {"sha256", "metadata"} <= read_recipe(file).keys()


def again(
    file: CheckpointLike,
    *,
    output: PathLike,
    models: Sequence[PathLike] = (),
    changes: Sequence[str] = (),
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    methods: Mapping[str, object] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Make a merge again from the recipe in its metadata, or a variant of it.

    >>> blockmerge.again(
    ...     "merged.safetensors", models=["~/models"], changes=["OUT05=0.7"], output="variant.safetensors"
    ... )  # doctest: +SKIP

    - `file`: the merged file, or a pinned recipe.
    - `models`: folders that are searched with their subfolders, besides the file's own folder and the current
      one. Models are found by their contents, whatever they are called.
    - `changes`: what the option ``--set`` takes. Without any, the same file is made.
    - `methods`: {``"module:function"``: function} for methods of your own.

    The other arguments are those of `merge`.

    Raises `RecipeError` where the file has no recipe or a model is not found, and what `merge` raises.
    """
    recorded = Recorded.of(file)
    check_other(file, output)
    recipe = recorded.recipe(Searched.beside_file(recorded, models), changes, methods)
    return recipe.run(
        output,
        device=device,
        threads=threads,
        overwrite=overwrite,
        metadata=None if changes else recorded.metadata,
        sha256=None if changes else recorded.sha256,
        dry_run=dry_run,
        progress=progress,
    )


def check_other(file: object, output: PathLike) -> None:
    """Raise OutputError where the output would be the very file whose recipe it is made by."""
    if isinstance(file, (str, os.PathLike)) and os.path.realpath(file) == os.path.realpath(output):
        raise OutputError(f"{shown(output)} is the file whose recipe it is: give another name")


@dataclass(frozen=True)
class _Found(Places):
    """Files that were found by what is in them; nothing else is looked for."""

    files: Mapping[str, Checkpoint] = field(default_factory=dict)

    def has(self, text: str) -> bool:
        """Whether a file was recorded by that name."""
        return text in self.files

    def of(self, text: str) -> str:
        """The path of what was recorded by that name."""
        if text not in self.files:
            raise RecipeError(f"{shown(text)} is not recorded by what is in it, and so cannot be found again")
        return str(self.files[text].path)

    def found(self, path: str) -> str:
        """The path of what was recorded by that name; of what was not, as it is given with a change."""
        return str(self.files[path].path) if path in self.files else path

    def preset(self, text: str) -> str:
        """Its weights were recorded."""
        return text


@dataclass(frozen=True)
class Searched:
    """Where models are looked for: in the folders that are `beside`, and in `folders` with their subfolders.

    They are found by what is in them. A name in somebody's metadata is never used as a path.
    """

    folders: Sequence[PathLike] = ()
    beside: Sequence[PathLike] = ()
    _known: dict[Path, list[Checkpoint]] = field(default_factory=dict, repr=False, compare=False)
    _seen: list[Path] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def beside_file(cls, recorded: Recorded, folders: Sequence[PathLike]) -> Searched:
        """Beside a file, in the current folder, and in folders."""
        given = [folders] if isinstance(folders, (str, os.PathLike)) else folders
        beside = dict.fromkeys([*filter(None, [recorded.folder]), os.getcwd()])
        return cls([os.path.expanduser(folder) for folder in given], list(beside))

    def find(self, wanted: Sequence[Mapping[str, Any]]) -> dict[str, Checkpoint]:
        """Return {identity: the checkpoint that has it}. Raises RecipeError for those that are not there."""
        by_size: dict[int, list[Mapping[str, Any]]] = {}
        for one in wanted:
            by_size.setdefault(one.get("size", -1), []).append(one)
        found: dict[str, list[Checkpoint]] = {}
        for path in self._candidates():
            self._seen.append(path)
            size = _size(path)
            if size is not None and size not in by_size:
                continue
            for checkpoint in self._open(path):
                wanted_here = by_size.get(size_of_files(checkpoint), ())
                identity = identity_of(checkpoint) if wanted_here else None
                if identity is not None and any(one["identity"] == identity.digest for one in wanted_here):
                    found.setdefault(identity.digest, []).append(checkpoint)
        if missing := [one for one in wanted if one["identity"] not in found]:
            raise RecipeError(self._missing(missing))
        return {one["identity"]: _the_one(found[one["identity"]], one) for one in wanted}

    def _candidates(self) -> Iterator[Path]:
        for folder in self.beside:
            with suppress(OSError):  # a folder that may not be listed has nothing to be found
                yield from sorted(Path(folder).iterdir())
        for folder in self.folders:
            if not os.path.isdir(folder):
                raise CheckpointError(f"{shown(folder)} is not a folder of models (--models)")
            for parent, folders, files in os.walk(folder):
                folders.sort()
                yield Path(parent)
                yield from (Path(parent, name) for name in sorted(files))

    def _open(self, path: Path) -> list[Checkpoint]:
        """What is at a path, if it may be a model: of a folder with several variants, each of them."""
        if path not in self._known:
            found: list[Checkpoint] = []
            # Whatever is wrong with a file, it was not recorded so.
            with suppress(BlockmergeError):
                if path.is_dir() and is_diffusers_folder(path):
                    any_of_it = DiffusersFolder(path, any_variant=True)
                    for variant in (None, *any_of_it.variants):
                        with suppress(BlockmergeError):
                            found.append(DiffusersFolder(path, variant))
                elif path.suffix.lower() in SUFFIXES:
                    found.append(open_checkpoint(path))
            self._known[path] = found
        return self._known[path]

    def _missing(self, missing: Sequence[Mapping[str, Any]]) -> str:
        said = [
            f"{shown(one.get('name', '?'))} ({_shown_size(one)}, identity {shown(one['identity'][:12])})"
            for one in missing
        ]
        names = {str(one.get("name")) for one in missing}
        others = sorted(str(path) for path in self._seen if path.name in names)
        are = "are" if len(others) > 1 else "is"
        but = f"; {listing(others)} {are} called so, but not the same" if others else ""
        looked = listing(list(map(str, (*self.beside, *self.folders)))) or "no folder"
        return (
            f"its models are not all there: {', '.join(said)}, looked for in {looked}{but}: "
            "give the folder that has them (--models FOLDER)"
        )


def _the_one(found: Sequence[Checkpoint], recorded: Mapping[str, Any]) -> Checkpoint:
    """The one of several files with one identity that was recorded: copies are one as good as the other.

    Raises RecipeError where they differ, and nothing tells which it is.
    """
    first, *others = found
    differing = [other for other in others if not _are_copies(first, other)]
    if not differing:
        return first
    for one in found if recorded.get("sha256") else ():
        if sha256_of(one) == recorded["sha256"]:
            return one
    paths = listing([str(one.path) for one in (first, *differing)])
    raise RecipeError(
        f"{shown(recorded.get('name', '?'))} may be each of {paths}, which differ in a few values: take the "
        "others out of these folders"
    )


def _are_copies(one: Checkpoint, other: Checkpoint) -> bool:
    try:
        return len(one.files) == len(other.files) and all(
            os.path.samefile(*pair) or filecmp.cmp(*pair, shallow=False)
            for pair in zip(one.files, other.files, strict=True)
        )
    except OSError as error:
        raise CheckpointError(f"cannot read {shown(one.name)}: {reason(error)}") from error


def _size(path: Path) -> int | None:
    """The size of a file; None for what is none."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _shown_size(recorded: Mapping[str, Any]) -> str:
    size = recorded.get("size")
    return f"{size:,} bytes" if isinstance(size, int) else "of unknown size"

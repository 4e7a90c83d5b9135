"""diffusers folders: a component in each subfolder, with its weights in one file or in shards that an index
lists.

Weights are called `diffusion_pytorch_model` (diffusers) or `model` (transformers; `pytorch_model` in torch's
format), a variant's `model.fp16.safetensors`. Shards are listed in `model.safetensors.index.json`, a
variant's in `model.safetensors.index.fp16.json`, once also `model.safetensors.fp16.index.json` or
`model.fp16.safetensors.index.json`.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockmerge.anatomy import FAMILIES
from blockmerge.anatomy.families import remembered
from blockmerge.checkpoints.checkpoint import Checkpoint, Checksummed, Reader, TensorInfo
from blockmerge.checkpoints.formats.any_file import SUFFIXES, open_file
from blockmerge.checkpoints.formats.safetensors_file import LARGEST_HEADER
from blockmerge.checkpoints.hub import is_snapshot, name_of, shown_path
from blockmerge.errors import CheckpointError, counted, listing, reason, shown

MODEL_INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
_MODULAR_INDEX = "modular_model_index.json"
_PARTS_OF_ANY = ("feature_extractor", "safety_checker", "image_encoder")
_STEMS = {"diffusion_pytorch_model": "diffusion_pytorch_model", "model": "model", "pytorch_model": "model"}
_STEM, _KIND, _SHARD = rf"(?P<stem>{'|'.join(_STEMS)})", r"(?P<kind>safetensors|bin)", r"-\d{5}-of-\d{5}"
_ONE_OF_SHARDS = re.compile(rf"{_STEM}(\.[^.]+)?{_SHARD}(\.[^.]+)?\.{_KIND}")
_SINGLE = re.compile(rf"{_STEM}(\.(?P<variant>[^.]+))?\.{_KIND}")
_INDEX = re.compile(rf"{_STEM}(\.(?P<v1>[^.]+))?\.{_KIND}(\.(?P<v2>[^.]+))?\.index(\.(?P<v3>[^.]+))?\.json")
_INDEX_OF_ANY = re.compile(r".+\.index(\.[^.]+)?\.json")
_CONFIG = re.compile(r"[^.].*\.json|[^.].*\.model|merges\.txt|vocab\.txt|chat_template\.jinja")
_OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}  # made by looking at a folder
LARGEST_CARRIED = 64_000_000  # bytes, also of all together; the largest tokenizers have less than half


class DiffusersFolder(Checkpoint):
    """An opened diffusers folder, or one component's folder: headers and indexes have been read and checked,
    data has not.

    Tensors are named `component/name` (``"unet/conv_in.weight"``), in a component's own folder just `name`;
    their offsets lie in one address space over all `files`. `components` gives for each folder with weights
    (``""`` for the folder itself) the stem of their files' names. `carried` are the other files that belong
    to the model, as relative paths: model_index.json, configs, tokenizers.

    `variant` asks for weights as in ``model.fp16.safetensors``. Components that lack it give their plain
    ones, or those of the only variant that they have, with a note; so do all where none is asked for.
    `variants` are all that the folder has, `used` says for each component which is used (None: plain
    weights).

    Raises CheckpointError, in one line that names the file or folder, when a component has several variants
    and neither the one that was asked for nor plain weights, unless `any_variant` says that nobody wants
    their weights; when something is missing or damaged, and when the folder is no model.
    """

    path: Path

    def __init__(
        self, path: str | os.PathLike[str], variant: str | None = None, *, any_variant: bool = False
    ) -> None:
        self.path = Path(path)
        self.name = name_of(path)
        try:
            folders = _component_folders(self.path)
            if not folders:
                raise CheckpointError(
                    f"{shown_path(path)} is a folder without a model{_files_instead(self.path)}, "
                    "or a diffusers folder (unet/, transformer/, vae/, "
                    "text_encoder/ with diffusion_pytorch_model.safetensors or model.safetensors)"
                )
            chosen = _choose(self.path, folders, variant, any_variant=any_variant)
            self.carried = tuple(_carried(self.path, "" in folders))
        except OSError as error:
            raise CheckpointError(f"cannot open {shown_path(path)}: {reason(error)}") from error
        self.components: Mapping[str, str] = {
            component: _STEMS[weights.stem] for component, weights in chosen.items()
        }
        self.variants = _variants(weights for found in folders.values() for weights in found)
        self.used: Mapping[str, str | None] = {
            component: weights.variant for component, weights in chosen.items()
        }
        self.notes = tuple(_notes(self.used, variant))
        self.metadata = {}
        self._files: list[Checkpoint] = []
        self._starts: list[int] = []
        self._checksummed: list[Checksummed] = []
        self.tensors: dict[str, TensorInfo] = {}
        for component, weights in chosen.items():
            self._add(component, weights)
        self.files = tuple(path for file in self._files for path in file.files)

    def _add(self, component: str, weights: _Weights) -> None:
        folder = self.path / component
        prefix = f"{component}/" if component else ""
        index = folder / weights.name if weights.is_index else None
        shards = _read_index(index) if index else {weights.name: ()}
        for shard, promised in shards.items():
            file = open_file(folder / shard)
            file.name = f"{self.name}/{prefix}{shard}"
            missing = [name for name in promised if name not in file.tensors]
            if missing:
                raise CheckpointError(
                    f"{shown_path(folder / weights.name)} says that {shown(shard)} holds "
                    f"{listing(missing)}: it does not"
                )
            twice = [name for name in file.tensors if prefix + name in self.tensors]
            if twice:
                raise CheckpointError(
                    f"{shown_path(folder / shard)} holds {listing(twice)}, which another shard holds too"
                )
            # One byte of a gap, so that nobody takes the end of one file and the start of the next for one
            # stretch.
            start = 1 + max((info.offset + info.nbytes for info in self.tensors.values()), default=-1)
            self._files.append(file)
            self._starts.append(start)
            self._checksummed += [
                replace(part, tensors=tuple(prefix + name for name in part.tensors))
                for part in file.checksummed()
            ]
            for name, info in file.tensors.items():
                self.tensors[prefix + name] = TensorInfo(info.dtype, info.shape, start + info.offset)

    @property
    def shared_metadata(self) -> Mapping[str, str]:
        """The metadata that all of its files have in common."""
        first, *others = (file.metadata for file in self._files)
        return {key: text for key, text in first.items() if all(one.get(key) == text for one in others)}

    def reader(self) -> Reader:
        """Open a reader over all files; each is opened when it is first read from."""
        return _FolderReader(self._files, self._starts)

    def broken_off(self) -> str | None:
        """As the first of its files says that is."""
        return next((said for file in self._files if (said := file.broken_off()) is not None), None)

    def checksummed(self) -> tuple[Checksummed, ...]:
        """Those of all files, with the tensors' names in the folder."""
        return tuple(self._checksummed)

    def check_unchanged(self) -> None:
        """Raise CheckpointError when a weight file is no longer what it was."""
        for file in self._files:
            file.check_unchanged()


def is_diffusers_folder(path: str | os.PathLike[str]) -> bool:
    """Say whether a path is a diffusers folder, whole or in part, or the folder of one component with its
    config.json.
    """
    folder = Path(path)
    try:
        return folder.is_dir() and ((folder / MODEL_INDEX).is_file() or bool(_component_folders(folder)))
    except (OSError, CheckpointError):
        return False


def model_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the files in a folder that are called like models, in order. Raises OSError."""
    return sorted(entry for entry in Path(folder).iterdir() if entry.suffix.lower() in SUFFIXES)


def files_of_snapshot(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files called like models that were downloaded of a repository, in order; none for any other
    path. Shards are none.
    """
    files = sorted(Path(path).rglob("*")) if is_snapshot(path) else []
    return [
        file for file in files if file.suffix.lower() in SUFFIXES and not _ONE_OF_SHARDS.fullmatch(file.name)
    ]


def _files_instead(folder: Path) -> str:
    """What a folder without a model has instead, and which of it to give."""
    if files := files_of_snapshot(folder):
        which = f"the path of one of these ({listing(Path(*file.parts[-3:]) for file in files)})"
    elif files := model_files(folder):
        which = f"one of these, such as {shown(files[0])}"
    elif inner := _folders_of_models(folder):
        return f" of its own: there are models in {listing(inner)}, so give such a folder"
    else:
        return ": give a .safetensors file"
    return f" of its own, but with {counted(len(files), 'model file')} in it: give {which}"


def _folders_of_models(folder: Path) -> list[str]:
    """The folders in a folder that have model files, or are a model's."""
    try:
        inner = [path for path in sorted(folder.iterdir()) if path.is_dir()]
        return [path.name for path in inner if model_files(path) or _component_folders(path)]
    except (OSError, CheckpointError):
        return []


def carried_without_weights(folder: Path) -> tuple[str, ...]:
    """Return the configs and tokenizers of a folder that is laid out like a model's but has no weights, as
    relative paths; nothing for any other folder.

    Raises OSError, and CheckpointError as opening it would.
    """
    return () if _component_folders(folder) else tuple(_carried(folder, is_component=False))


def foreign_files(folder: Path) -> list[str]:
    """Return what lies in a folder and is no part of a model, as relative paths: what would be lost with the
    folder.

    Raises OSError, and CheckpointError for a model_index.json that cannot be read.
    """
    parts = _part_folders(folder)
    alone = "" in _component_folders(folder)
    entries = [entry for entry in folder.iterdir() if entry.name not in parts]
    known = {MODEL_INDEX, _MODULAR_INDEX, *_OF_THE_SYSTEM}
    foreign = [entry for entry in entries if not (_is_of_a_part(entry) if alone else entry.name in known)]
    foreign += [entry for part in parts for entry in (folder / part).iterdir() if not _is_of_a_part(entry)]
    return sorted(entry.relative_to(folder).as_posix() for entry in foreign)


def _is_of_a_part(path: Path) -> bool:
    if path.name in _OF_THE_SYSTEM:
        return True
    return not path.is_dir() and any(
        kind.fullmatch(path.name) for kind in (_SINGLE, _ONE_OF_SHARDS, _INDEX, _CONFIG)
    )


class _FolderReader(Reader):
    def __init__(self, files: list[Checkpoint], starts: list[int]) -> None:
        self._files = files
        self._starts = starts
        self._open: dict[int, Reader] = {}

    def read_into(self, offset: int, buffer: memoryview) -> None:
        number = bisect_right(self._starts, offset) - 1
        if number not in self._open:
            self._open[number] = self._files[number].reader()
        self._open[number].read_into(offset - self._starts[number], buffer)

    def close(self) -> None:
        for reader in self._open.values():
            reader.close()
        self._open.clear()


@dataclass(frozen=True, slots=True)
class _Weights:
    """What a file's name says: an index or a single file, in which format and of which variant."""

    name: str
    stem: str
    kind: str
    variant: str | None
    is_index: bool

    @property
    def rank(self) -> tuple[bool, bool]:
        # Where both are there: safetensors before .bin; diffusers looks for an index first, transformers for
        # a single file.
        return self.kind == "bin", self.is_index != (self.stem == "diffusion_pytorch_model")


def _weights(folder: Path) -> list[_Weights]:
    """The weights in a folder, best first. Raises CheckpointError for shards without an index."""
    found = []
    shards = []
    for name in sorted(entry.name for entry in os.scandir(folder)):
        if _ONE_OF_SHARDS.fullmatch(name):
            shards.append(name)
        elif match := _SINGLE.fullmatch(name):
            found.append(_Weights(name, match["stem"], match["kind"], match["variant"], is_index=False))
        elif match := _INDEX.fullmatch(name):
            variant = match["v1"] or match["v2"] or match["v3"]
            found.append(_Weights(name, match["stem"], match["kind"], variant, is_index=True))
    if shards and not found:
        raise CheckpointError(
            f"{shown_path(folder)} holds shards ({listing(shards, 1)}) "
            "without their index, a .index.json file"
        )
    return sorted(found, key=lambda weights: weights.rank)


@remembered(None)
def _models() -> frozenset[str]:
    """The subfolders that the families have for weights."""
    return frozenset(
        prefix.rstrip("/") for family in FAMILIES.values() for prefix in family.prefixes["diffusers"]
    )


@remembered(None)
def _parts() -> frozenset[str]:
    """All subfolders that a model of some family has."""
    return _models().union(_PARTS_OF_ANY, *(one.configs.get("parts", ()) for one in FAMILIES.values()))


def _part_folders(folder: Path) -> list[str]:
    """The subfolders that belong to a model: those of the usual names, which are found even without a
    model_index.json, and those that it names.
    """
    index = folder / MODEL_INDEX
    named = _read_json(index) if index.is_file() else {}
    return [
        name
        for name in sorted(os.listdir(folder))
        if (name in _parts() or name in named) and (folder / name).is_dir()
    ]


def _component_folders(folder: Path) -> dict[str, list[_Weights]]:
    """{subfolder: its weights}; ``""`` for the folder of a single component; nothing where there is no
    model.
    """
    found = {part: weights for part in _part_folders(folder) if (weights := _weights(folder / part))}
    if (folder / MODEL_INDEX).is_file() or any(part in _models() for part in found):
        return found
    own = _weights(folder) if (folder / "config.json").is_file() else []
    return {"": own} if own else {}


def _variants(weights: Iterable[_Weights]) -> tuple[str, ...]:
    return tuple(sorted({one.variant for one in weights if one.variant}))


def _choose(
    folder: Path, folders: Mapping[str, list[_Weights]], variant: str | None, *, any_variant: bool
) -> dict[str, _Weights]:
    """The weights of each component: of the variant, else the plain ones, else of the only one there is."""
    chosen = {}
    undecided = []
    for component, found in folders.items():
        there = list(dict.fromkeys(weights.variant for weights in found))
        wanted = next((one for one in (variant, None) if one in there), there[0])
        if wanted not in (variant, None) and len(there) > 1:
            undecided.append(component)
        chosen[component] = next(weights for weights in found if weights.variant == wanted)
    if undecided and not any_variant:
        raise _undecided(folder, {component: folders[component] for component in undecided}, variant)
    return chosen


def _undecided(folder: Path, folders: Mapping[str, list[_Weights]], variant: str | None) -> CheckpointError:
    """What to say of components that have several variants and no plain weights."""
    there = {component: _variants(found) for component, found in folders.items()}
    first, *others = there.values()
    proposed = next((one for one in first if all(one in other for other in others)), first[0])
    said = [f"{component or 'weights'}: {', '.join(map(shown, found))}" for component, found in there.items()]
    lacking = (
        "no plain weights" if variant is None else f"neither plain weights nor the variant '{shown(variant)}'"
    )
    return CheckpointError(
        f"{shown_path(folder)} has several variants and {lacking} ({listing(said)}): "
        f"choose one with variant='{shown(proposed)}' (--variant {shown(proposed)})"
    )


def _notes(used: Mapping[str, str | None], asked: str | None) -> Iterator[str]:
    """Say which weights are used that nobody asked for."""
    unasked: dict[str | None, list[str]] = {}
    for component, variant in used.items():
        if variant != asked:
            unasked.setdefault(variant, []).append(component)
    for variant, components in unasked.items():
        of = "" if len(components) == len(used) else f" of {listing(components, 10)}"
        if variant is None:
            yield f"has no variant {shown(asked)}{of}: the plain weights are used"
        else:
            yield f"has only the variant {shown(variant)}{of}: it is used"


def _carried(folder: Path, is_component: bool) -> Iterator[str]:
    if not is_component:
        yield from (index for index in (MODEL_INDEX, _MODULAR_INDEX) if (folder / index).is_file())
    for part in [""] if is_component else _part_folders(folder):
        for path in sorted((folder / part).iterdir()):
            if _INDEX_OF_ANY.fullmatch(path.name.lower()) or not _CONFIG.fullmatch(path.name):
                continue
            if path.is_file() and path.stat().st_size <= LARGEST_CARRIED:
                yield path.relative_to(folder).as_posix()


def _read_index(path: Path) -> dict[str, list[str]]:
    """{shard: names of its tensors}, checked but for what the shards themselves hold."""
    table = _read_json(path).get("weight_map")
    if (
        not isinstance(table, dict)
        or not table
        or not all(isinstance(shard, str) for shard in table.values())
    ):
        raise CheckpointError(f"{shown_path(path)} has no weight_map from tensors to files")
    shards: dict[str, list[str]] = {}
    for name, shard in table.items():
        shards.setdefault(shard, []).append(name)
    # Only files that are called shards: no other folder's, no pipes, no further folders.
    strange = [shard for shard in shards if not re.fullmatch(r"[^/\\:\0]+\.(safetensors|bin)", shard)]
    if strange:
        raise CheckpointError(
            f"{shown_path(path)} names files that are not weights in its own folder: {listing(strange)}"
        )
    missing = [shard for shard in shards if not os.path.exists(path.parent / shard)]
    if missing:
        raise CheckpointError(f"{shown_path(path)} lists shards that are missing: {listing(missing)}")
    return dict(sorted(shards.items()))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # opening a named pipe would wait for ever
        raise CheckpointError(f"{shown_path(path)} is not a regular file")
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_HEADER + 1)
        if len(raw) > LARGEST_HEADER:
            raise ValueError(f"it has more than {LARGEST_HEADER} bytes")
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except OSError as error:
        raise CheckpointError(f"cannot open {shown_path(path)}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown_path(path)} is not valid JSON: {shown(error)}") from error
    return found


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"it holds {shown(name)} twice")
        table[name] = value
    return table

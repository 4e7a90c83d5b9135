"""The folder that configs and tokenizers of a new folder are taken from: a diffusers folder, with weights or
without, or a tokenizer's alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from blockmerge.checkpoints import (
    Checkpoint,
    CheckpointLike,
    DiffusersFolder,
    carried_without_weights,
    followed,
    name_of,
    open_source,
    other_kind_of,
)
from blockmerge.errors import CheckpointError, IncompatibleModelsError, reason, shown

_OF_A_TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
)
_CONFIG = "/config.json"


@dataclass(frozen=True)
class ConfigsFolder:
    """Where small files are taken from: `files` maps their paths in a pipeline's folder to where they lie.

    `components` are the folders that have weights there; `name` is what messages call it.
    """

    name: str
    path: Path
    files: Mapping[str, Path]
    components: frozenset[str] = frozenset()

    @classmethod
    def of(cls, checkpoint: DiffusersFolder) -> ConfigsFolder:
        """Return that of a model."""
        files = {path: checkpoint.path / path for path in checkpoint.carried}
        return cls(checkpoint.name, checkpoint.path, files, frozenset(checkpoint.components))

    @classmethod
    def open(cls, configs: CheckpointLike, tokenizers: Mapping[str, str], family: str) -> ConfigsFolder:
        """Look at what was given as `configs`, for an output that needs `tokenizers`, {folder: whose}, as
        `needed_tokenizers` returns them.

        Raises CheckpointError for what is no such folder, and IncompatibleModelsError for one tokenizer where
        not just one is needed.
        """
        if isinstance(configs, (str, os.PathLike)) and os.path.isdir(place := followed(configs)):
            folder, name = Path(place), name_of(place)
            try:
                if _is_tokenizer(os.listdir(folder)):
                    return cls(name, folder, _of_one_tokenizer(folder, name, tokenizers, family))
                if carried := carried_without_weights(folder):
                    # What has a config of this name has weights elsewhere.
                    components = {path.removesuffix(_CONFIG) for path in carried if path.endswith(_CONFIG)}
                    files = {path: folder / path for path in carried}
                    return cls(name, folder, files, frozenset(components))
            except OSError as error:
                raise CheckpointError(f"cannot open {shown(configs)}: {reason(error)}") from error
        checkpoint = open_source(configs, any_variant=True)
        if not is_pipeline(checkpoint):
            kind = other_kind_of(checkpoint)
            what = shown(checkpoint.name) if kind is None else f"{shown(checkpoint.name)} {kind}; it"
            raise CheckpointError(
                f"{what} is neither a diffusers folder nor a tokenizer's (vocab.json and merges.txt, or "
                "tokenizer.json), so there are no configs to take from it"
            )
        return cls.of(checkpoint)


def is_pipeline(checkpoint: Checkpoint) -> TypeGuard[DiffusersFolder]:
    """Whether it is a folder of components; one component's own folder has its config at another place."""
    return isinstance(checkpoint, DiffusersFolder) and "" not in checkpoint.components


def read_small(path: Path) -> bytes:
    """Return a small file's contents. Raises CheckpointError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {shown(error.filename)}: {reason(error)}") from error


def needed_tokenizers(described: Mapping[str, Any], components: Collection[str]) -> dict[str, str]:
    """Return {folder: whose tokenizer} for the text encoders among `components`; `described` is what the
    family says of its configs.
    """
    known: Mapping[str, str] = described.get("tokenizers", {})
    # A tokenizer of another name is a second one for the only text encoder.
    return {
        folder: whose
        for folder, whose in known.items()
        if (folder.replace("tokenizer", "text_encoder") if folder.startswith("tokenizer") else "text_encoder")
        in components
    }


def tokenizer_class(files: Mapping[str, bytes], folder: str) -> list[str] | None:
    """Return what model_index.json says of a tokenizer's folder; None where it has no tokenizer."""
    names = [path.removeprefix(f"{folder}/") for path in files if path.startswith(f"{folder}/")]
    if not _is_tokenizer(names):
        return None
    try:
        own = json.loads(files.get(f"{folder}/tokenizer_config.json", b"{}")).get("tokenizer_class")
    except (ValueError, AttributeError, RecursionError):
        own = None
    usual = "CLIPTokenizer" if "vocab.json" in names else "CLIPTokenizerFast"
    return ["transformers", own if isinstance(own, str) else usual]


def _is_tokenizer(names: Collection[str]) -> bool:
    return {"vocab.json", "merges.txt"} <= set(names) or "tokenizer.json" in names


def _of_one_tokenizer(folder: Path, name: str, tokenizers: Mapping[str, str], family: str) -> dict[str, Path]:
    if len(tokenizers) != 1:
        which = " and ".join(f"{part} (that of {whose})" for part, whose in tokenizers.items())
        needs = f"needs {len(tokenizers)}: give a folder that holds {which}"
        raise IncompatibleModelsError(
            f"{shown(name)} is the folder of one tokenizer, and this {family} output "
            f"{needs if tokenizers else 'has no text encoder to use it: leave it out'}"
        )
    (part,) = tokenizers
    return {f"{part}/{own}": folder / own for own in _OF_A_TOKENIZER if (folder / own).is_file()}

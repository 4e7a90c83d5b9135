"""What a merge can write: one file for each kind of output, behind one interface, and the choice of the kind.

A kind is added with a file of its own and a word in `KINDS`.
"""

from __future__ import annotations

import os

from blockmerge.checkpoints import CheckpointLike, Model, followed, is_diffusers_folder
from blockmerge.errors import OutputError, RecipeError, shown
from blockmerge.merging.outputs.component_folder import ComponentFolder
from blockmerge.merging.outputs.folder import DiffusersOutput
from blockmerge.merging.outputs.lone_folder import LoneFolder
from blockmerge.merging.outputs.output import Layout, NamedTensor, Output, Reservation, WeightFile, Wish
from blockmerge.merging.outputs.single_file import SingleFile

__all__ = [
    "KINDS",
    "ComponentFolder",
    "DiffusersOutput",
    "Layout",
    "LoneFolder",
    "NamedTensor",
    "Output",
    "Reservation",
    "SingleFile",
    "WeightFile",
    "Wish",
    "choose_output",
    "default_ending",
]

KINDS: tuple[type[Output], ...] = (SingleFile, LoneFolder, DiffusersOutput, ComponentFolder)
"""The first that takes a name is the output's kind."""


def choose_output(
    path: object,
    a: Model,
    naming: str | None = None,
    configs: CheckpointLike | None = None,
    *,
    is_whole: bool | None = None,
) -> Output:
    """Return what `path` is to become, for a first model `a` and the naming that was asked for.

    `is_whole` says that the output has more than a U-Net, by default where A has. `configs` is where small
    files are to be taken from. Raises OutputError for what cannot be an output of
    that name, RecipeError for configs where they have no place.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise OutputError(f"the output is a path; {type(path).__name__} given")
    wish = Wish(os.fspath(path), naming, a, a.components != {"unet"} if is_whole is None else is_whole)
    if not wish.path:
        raise OutputError("the output's name is empty: give the name of a .safetensors file")
    kind = next((kind for kind in KINDS if kind.takes(wish)), None)
    if kind is None and wish.is_folder:
        raise OutputError(
            f"{shown(wish.path)} is a folder: "
            "give the output a file name, or naming='diffusers' (--to diffusers, of merge, bake and convert)"
        )
    if kind is None:
        raise OutputError(
            f"{shown(wish.path)}: the output is a .safetensors file: give it that ending, "
            "or, for a diffusers folder, naming='diffusers' (--to diffusers, of merge, bake and convert)"
        )
    if configs is not None and not kind.has_configs:
        raise RecipeError(
            f"configs go into a diffusers folder only, and {shown(wish.path)} is {kind.title}: leave them out"
        )
    return kind(wish, configs)


def default_ending(naming: str | None, a: str | os.PathLike[str]) -> str:
    """How the name of an output ends when nobody gives it one, for a first model at `a`."""
    folder = followed(a)
    # A component's own folder has its config at another place.
    is_pipeline = is_diffusers_folder(folder) and not os.path.isfile(os.path.join(folder, "config.json"))
    naming = naming or ("diffusers" if is_pipeline else "ldm")
    return next(kind.ending for kind in KINDS if kind.is_default_of == naming)

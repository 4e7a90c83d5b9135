"""Recipes written to files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from blockmerge.adapters import Lora
from blockmerge.merging.planning.request import is_vae_of_models
from blockmerge.merging.planning.written import as_asked, path_of
from blockmerge.merging.recipe_tables import OF_RESULT, RESULT, free_name
from blockmerge.merging.tree import Node, inner_first


def as_stages(recipe: Node, folder: str = "") -> dict[str, Any]:
    """Return a recipe as a table with its stages in tables of their own; paths are relative to `folder`."""
    written: dict[str, Any] = {}
    names: dict[int, str] = {}
    for stage in inner_first(recipe):
        if stage is recipe and not names:
            return {**_output_in(folder, recipe), **_placed_in(folder, _flat(recipe, names))}
        name = stage.name or (RESULT if stage is recipe else f"stage{len(names) + 1}")
        names[id(stage)] = name = free_name(name, written)
        written[name] = _placed_in(folder, _flat(stage, names), set(names.values()))
    result = written[names[id(recipe)]]
    top = {key: result.pop(key) for key in OF_RESULT if key in result}
    return {**_output_in(folder, recipe), **top, **written}


def _flat(stage: Node, names: Mapping[int, str]) -> dict[str, Any]:
    """One merge, with the names of stages among its models."""
    models = [
        names[id(one)] if isinstance(one, Node) else path_of(one, f"model {number}")
        for number, one in enumerate(stage.models, start=1)
    ]
    return {"models": models, **as_asked(stage.request)}


def _output_in(folder: str, recipe: Node) -> dict[str, str]:
    """Where the result goes, where that is in the folder."""
    path = "" if recipe.output is None else _from(folder, recipe.output)
    is_beside = path and not os.path.isabs(path) and not path.startswith("..")
    return {"output": path} if is_beside else {}


def _placed_in(folder: str, written: dict[str, Any], stages: set[str] | None = None) -> dict[str, Any]:
    """The same with paths that are found from `folder`, with ``/``."""
    if "models" in written:
        written["models"] = [
            one if one in (stages or ()) else _from(folder, one) for one in written["models"]
        ]
    for key in ("vae", "configs"):
        if isinstance(written.get(key), str) and not is_vae_of_models(written[key], len(written["models"])):
            written[key] = _from(folder, written[key])
    for number, lora in enumerate(written.get("loras", ())):
        file = lora["file"] if isinstance(lora, dict) else str(Lora.parse(lora).file)
        placed = _from(folder, file)
        written["loras"][number] = (
            {**lora, "file": placed} if isinstance(lora, dict) else placed + lora[len(file) :]
        )
    return written


def _from(folder: str, path: str) -> str:
    if os.path.isabs(path):
        inside = os.path.join(os.path.abspath(folder), "")
        return path.removeprefix(inside).replace(os.sep, "/")
    try:
        return os.path.relpath(path, folder or os.curdir).replace(os.sep, "/")
    except ValueError:  # on another drive
        return os.path.abspath(path).replace(os.sep, "/")


def dumped(recipe: Node, path: str | os.PathLike[str]) -> str:
    """Return the text of a recipe's file: TOML, or JSON where its name ends so."""
    folder = os.path.dirname(os.fspath(path))
    written = as_stages(recipe, folder)
    if os.fspath(path).lower().endswith(".json"):
        return json.dumps(written, indent=2, allow_nan=False) + "\n"
    import tomli_w

    return tomli_w.dumps({key: value for key, value in written.items() if value is not None})

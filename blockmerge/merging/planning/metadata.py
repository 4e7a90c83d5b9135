"""What the output's metadata says: the recipe, and what of A's metadata is still true."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from blockmerge.checkpoints import QUANTISATION_KEY, Model, faulty_metadata, told_prediction
from blockmerge.errors import listing, shown
from blockmerge.methods import IDENTITY

RECIPE_KEY = "blockmerge.recipe"
SOURCE_RECIPE_KEY = "blockmerge.source_recipe"
"""The recipe that a converted model was merged by."""
RECIPE_KEYS = (SOURCE_RECIPE_KEY, RECIPE_KEY)

LOST_METADATA = "left out of the metadata of"
"""How the note on it begins."""

_OF_THE_FILE = ("sshs_", "modelspec.hash_sha256", "blockmerge.", QUANTISATION_KEY)
"""How keys begin that are true of one file only: hashes, how it came to be, how its weights are packed."""
_OF_THE_MODEL = ("sd_merge_", *(
    f"modelspec.{key}" for key in ("title", "date", "author", "description", "thumbnail", "merged_from")
))  # fmt: skip
"""How keys begin that are true as long as the weights are those of A."""
_HOW_A_WAS_MADE = frozenset((
    "workflow", "prompt", "extra_pnginfo",  # ComfyUI: the whole graph, with every prompt in it
    "parameters",  # the web UI and its relatives
    "invokeai_metadata", "invokeai_graph", "invokeai_workflow",
))  # fmt: skip
"""What programs leave of the work in which a file was saved."""


def output_metadata(
    of_a: Mapping[str, str], recipe: str, family: str, *, changes_values: bool
) -> dict[str, str]:
    """Return A's metadata without what would now lie, tells how A was made, or never should have been there,
    and the recipe. Whose model it is, and by what recipe, stays true where nothing `changes_values`.

    All values are strings, as loaders demand.
    """
    faulty = {key for keys in faulty_metadata(of_a, family).values() for key in keys}
    untrue = (*_OF_THE_FILE, *_OF_THE_MODEL) if changes_values else _OF_THE_FILE
    kept = {
        key: value
        for key, value in of_a.items()
        if not key.startswith(untrue) and key not in faulty | _HOW_A_WAS_MADE
    }
    own = next((key for key in RECIPE_KEYS if key in of_a.keys() - faulty), None)
    if own is not None and not changes_values and _is_of_a_merge(of_a[own]):
        kept[SOURCE_RECIPE_KEY] = of_a[own]
    return {**kept, "format": "pt", RECIPE_KEY: recipe}


def about_metadata(about: Mapping[str, str], a: Model, models: Sequence[str]) -> dict[str, str]:
    """Return ModelSpec's keys (https://github.com/Stability-AI/ModelSpec) for what is said of an output, made
    of `models`; nothing where nothing is said.

    The date is a day, so that the same request gives the same file.
    """
    if not about:
        return {}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        **_architecture(a),
        **{f"modelspec.{key}": text for key, text in about.items()},
        "modelspec.date": date.today().isoformat(),
        "modelspec.merged_from": ", ".join(models),
    }


def written_again(made: Mapping[str, str], recorded: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file that is made again: as recorded what depends on when and by which version it was
    made; all else as it is true of what is made.
    """
    as_then = (RECIPE_KEY, "modelspec.date", "modelspec.merged_from", "sd_merge_recipe", "sd_merge_models")
    return {key: recorded.get(key, text) if key in as_then else text for key, text in made.items()}


def web_ui_metadata(run: Mapping[str, Any]) -> dict[str, str]:
    """Return what the web UI and its relatives read of how a merge was made, of models whose SHA-256s are
    known: nothing where A's is not.
    """
    recorded = run.get("files", {}).get("models") or ()
    hashes = [one.get("sha256") if one else None for one in recorded]
    if not hashes or hashes[0] is None:
        return {}
    weights = run.get("weights") or {}
    values = set(weights.values())
    recipe = {
        "type": "blockmerge",
        **{f"{name}_model_hash": sha for name, sha in zip(_ORDINALS, hashes, strict=False) if sha},
        "interp_method": run["method"],
        "multiplier": next(iter(values)) if len(values) == 1 else None,
        "weights_alpha": ",".join(map(str, weights.values())) if len(values) > 1 else None,
        "save_as_half": run["dtype"] == "fp16",
        "bake_in_vae": run["vae_file"],
    }
    models: dict[str, Any] = {}
    for one in recorded:
        _add_ancestors(one, models)
    said = {key: value for key, value in recipe.items() if value is not None}
    return {"sd_merge_recipe": json.dumps(said), "sd_merge_models": json.dumps(models)}


_ORDINALS = ("primary", "secondary", "tertiary")


def _add_ancestors(recorded: Mapping[str, Any] | None, models: dict[str, Any]) -> None:
    """Add a model, and those that it says it was made of, as far as their hashes are known."""
    if not isinstance(recorded, Mapping) or not isinstance(recorded.get("sha256"), str):
        return
    own = recorded["recipe"] if isinstance(recorded.get("recipe"), Mapping) else {}
    method = {"type": "blockmerge", "interp_method": own.get("method")} if own else None
    models[recorded["sha256"]] = {
        "name": str(recorded.get("name")),
        "legacy_hash": None,
        "sd_merge_recipe": method,
    }
    files = own.get("files")
    ancestors = files.get("models") if isinstance(files, Mapping) else None
    for one in ancestors if isinstance(ancestors, list) else ():
        _add_ancestors(one, models)


def _architecture(a: Model) -> dict[str, str]:
    """What ModelSpec calls the architecture, where A does not say, and is not of a variant of its own."""
    family = a.anatomy.family
    versions = family.adapters.get("written", {}).get("metadata", {})
    if a.anatomy.inputs != "base" or "modelspec.architecture" in a.source.metadata or not versions:
        return {}
    told = told_prediction(a)
    version = versions.get("" if told is None else told.prediction, next(iter(versions.values())))
    of_lora = version.get("modelspec.architecture", "")
    return {"modelspec.architecture": of_lora.removesuffix("/lora")} if of_lora else {}


def _is_of_a_merge(recipe: str) -> bool:
    try:
        said = json.loads(recipe)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("method") != IDENTITY.name


def lost_metadata(of_a: Mapping[str, str], output: Mapping[str, str], name: str) -> Iterator[str]:
    """Say what of the metadata of A, called `name`, the output lacks, but for what is of its file only."""
    lost = [key for key in of_a if key not in output and not key.startswith(_OF_THE_FILE)]
    if lost:
        yield f"{LOST_METADATA} {shown(name)}: {listing(lost, 6)}"

"""A recipe in a file's metadata as a table that can be read, edited and run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from blockmerge.errors import BlockmergeError, RecipeError
from blockmerge.merging.planning.request import told_from_words
from blockmerge.merging.planning.written import OPTIONS, asked_of_run
from blockmerge.merging.recipe_tables import OF_RESULT, RESULT, free_name, is_name
from blockmerge.weights import WeightsRequest
from blockmerge.weights.block_lists import families_of

Files = dict[str, Mapping[str, Any]]
"""{what a table calls a file: what is recorded of it}."""


def written_down(run: Mapping[str, Any]) -> tuple[dict[str, Any], Files]:
    """Return a recipe that was recorded, as a table with its stages in tables of their own, and its files.

    Raises RecipeError for what cannot be read back.
    """
    files: Files = {}
    stages = {
        str(name): _merge(stage, files)
        for name, stage in _table(run.get("stages")).items()
        if isinstance(stage, Mapping)
    }
    own = _merge(run, files)
    if not stages:
        return own, files
    if isinstance(run.get("round"), str) and run["round"] != "end":
        own["round"] = run["round"]
    top = {key: own.pop(key) for key in OF_RESULT if key in own}
    given = run.get("result")
    result = given if isinstance(given, str) and is_name(given) and given not in OPTIONS else RESULT
    return {**top, **stages, free_name(result, stages): own}, files


def _merge(run: Mapping[str, Any], files: Files) -> dict[str, Any]:
    """One merge, as it was asked for."""
    recorded = _table(run.get("files"))
    names, of_models = _list(run.get("models")), _list(recorded.get("models"))
    if len(of_models) != len(names) or not names:
        raise RecipeError(
            "its recipe does not say which files its models were, as those of earlier versions do not: "
            "merge them by hand (blockmerge recipe FILE --json shows what is recorded)"
        )
    plain = {key: value for key, value in run.items() if key not in ("files", "stages", "round", "result")}
    asked, places = asked_of_run(plain, len(names))
    models = [_named(str(name), one, files) for name, one in zip(names, of_models, strict=True)]
    if "vae" in places:
        asked["vae"] = told_from_words(_named(places["vae"], recorded.get("vae"), files))
    if "configs" in places:
        asked["configs"] = places["configs"]
    if "loras" in places:
        of_loras = _list(recorded.get("loras"))
        if len(of_loras) != len(asked["loras"]):
            raise RecipeError("its recipe does not say which file each of its LoRAs was")
        pairs = zip(asked["loras"], of_loras, strict=True)
        asked["loras"] = [_lora(lora, one, files) for lora, one in pairs]
    written = {"models": models, **asked}
    return {key: value for key, value in written.items() if not _is_default(key, value)}


_DEFAULTS = {
    "method": "weighted_sum", "dtype": "keep", "ema": "drop", "vae": "auto", "rules": "", "adjust": "",
}  # fmt: skip


def _is_default(key: str, value: Any) -> bool:
    is_nothing = value is None or value is False or (isinstance(value, (dict, list)) and not value)
    return is_nothing or value == _DEFAULTS.get(key, ...)


def _lora(lora: Any, recorded: Any, files: Files) -> dict[str, Any]:
    said = dict(lora) if isinstance(lora, Mapping) else {}
    found = {"file": _named(str(said.get("name", "")), recorded, files), **said}
    return {key: value for key, value in found.items() if value is not None}


def _named(name: str, recorded: Any, files: Files) -> str:
    """What a file is called in the table: as it was, but no two of them alike."""
    if not isinstance(recorded, Mapping) or not isinstance(recorded.get("identity"), str):
        return name  # a stage, or what was in memory
    name = re.split(r"[/\\]", str(recorded.get("name", name)))[-1]  # a name, and never a path
    other = files.setdefault(name, recorded)
    if other.get("identity") != recorded["identity"]:
        stem, dot, ending = name.rpartition(".")
        name = f"{stem}-{recorded['identity'][:8]}.{ending}" if dot else f"{name}-{recorded['identity'][:8]}"
        files.setdefault(name, recorded)
    return name


def in_one_line(weights: Mapping[str, float | str | None]) -> float | str:
    """Weights of all blocks as somebody would give them: one number, or a text without the blocks that are 0.

    >>> in_one_line({"BASE": 0.0, "IN00": 0.5, "IN01": 0.5, "IN02": "skip"})
    'IN00-IN01=0.5,IN02=skip'
    """
    said = {block: "skip" if weight is None else weight for block, weight in weights.items()}
    if not said:
        return 0.0
    [first, *others] = said.values()
    if first != "skip" and all(weight == first for weight in others):
        return float(first)
    parts = []
    for weight, group in groupby(said, key=lambda block: said[block]):
        blocks = list(group)
        if weight != 0:
            where = blocks[0] if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
            parts.append(f"{where}={weight}")
    return ",".join(parts)


def is_found_still(table: Mapping[str, Any]) -> bool:
    """Whether what a merge was asked for gives the weights that it was made with: a preset may have changed
    since, or somebody's metadata name another.
    """
    found = table.get("found")
    if not found:
        return True
    for family in families_of(tuple(found["weights"])):
        pairs = [("", found["weights"]), ("_beta", found.get("weights_beta"))]
        try:
            given = [dict(_asked(table, suffix).resolve(family)) for suffix, _ in pairs]
        except BlockmergeError:
            continue
        wanted = [None if one is None else {b: _plain(w) for b, w in one.items()} for _, one in pairs]
        if all(one in (None, had) for one, had in zip(wanted, given, strict=True)):
            return True
    return False


def _asked(table: Mapping[str, Any], suffix: str) -> WeightsRequest:
    preset, weights, on_top = (table.get(f"{key}{suffix}") for key in ("preset", "weights", "set"))
    return WeightsRequest(
        preset, weights, on_top, table.get("sdxl_map"), seed=table.get("seed") or 0, beta=suffix == "_beta"
    )


def _plain(weight: Any) -> Any:
    return None if weight == "skip" else weight


def preset_of(run: Mapping[str, Any]) -> str | None:
    """What a recipe calls its preset, where that still gives the weights that it was made with."""
    if run.get("preset") is None:
        return None
    try:
        table, _ = written_down({key: value for key, value in run.items() if key != "stages"})
    except BlockmergeError:
        return None
    # A preset's label is what was asked for, with ratios rounded; a label of something else is none.
    asked = table.get("preset")
    texts = [asked] if isinstance(asked, str) else asked or ()
    names = [text.rpartition("@")[0] or text for text in texts]
    is_label = [one.rpartition("@")[0] or one for one in run["preset"].split("+")] == names
    return str(run["preset"]) if is_label and is_found_still(table) else None


def for_reading(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table as somebody would write it: presets by name, weights in a line, nothing that was looked up."""
    read: dict[str, Any] = {}
    if not is_found_still(table):
        found = table["found"]
        own = {key: found[key] for key in ("weights", "weights_beta") if found.get(key) is not None}
        without = ("preset", "preset_beta", "set", "set_beta", "weights", "weights_beta")
        table = {**{key: value for key, value in table.items() if key not in without}, **own}
    for key, value in table.items():
        if key == "found":
            continue
        if key in ("weights", "weights_beta") and isinstance(value, Mapping):
            read[key] = in_one_line(value)
        elif isinstance(value, Mapping) and "models" in value:
            read[key] = for_reading(value)
        elif isinstance(value, (list, tuple)) and len(value) == 1 and key in ("preset", "preset_beta"):
            read[key] = value[0]
        else:
            read[key] = value
    return read


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []

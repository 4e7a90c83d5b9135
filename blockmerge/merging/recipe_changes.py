"""Recipes changed on the way: what ``--set STAGE.KEY=VALUE`` does to a recipe's table."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from blockmerge.adapters import Lora
from blockmerge.errors import RecipeError, did_you_mean, listing, shown
from blockmerge.merging.planning.written import OPTIONS
from blockmerge.merging.recipe_tables import OF_FILE, OF_RESULT, TOP, is_name, split, with_result
from blockmerge.methods import IDENTITIES

_SAYS_WEIGHTS = {
    "weights": ("preset",), "preset": ("weights",), "weights_beta": ("preset_beta",),
    "preset_beta": ("weights_beta",),
}  # fmt: skip
_WEIGHTS = ("weights", "preset", "set")


def with_changes(written: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's table with ``STAGE.KEY=VALUE``, ``KEY=VALUE`` of the result, and ``BLOCK=WEIGHT``.

    Raises RecipeError for what is none of these.
    """
    changes = [changes] if isinstance(changes, str) else changes
    changed = json.loads(json.dumps(written, default=str)) if changes else dict(written)
    of_weights: list[tuple[dict[str, Any], str]] = []
    for text in changes:
        name, equals, value = text.partition("=")
        stage, dot, rest = name.partition(".")
        top, stages = split(changed)
        if not equals or "\n" in text:
            raise RecipeError(f"--set {shown(text)}: STAGE.KEY=VALUE, or BLOCK=WEIGHT of the result")
        if dot and stage in stages:
            key = rest.strip().replace("-", "_")
            _change(changed[stage], key, _value(value), text)
            if key in _WEIGHTS:
                of_weights.append((changed[stage], text))
            continue
        of_result = {key: value for key, value in top.items() if key not in OF_FILE}
        _, result = with_result(of_result, stages)
        own = changed if result == TOP else changed[result]
        key = name.strip().replace("-", "_")
        # Blocks may be called double_blocks.3. or img_in., which no option is.
        if key not in OPTIONS and stages and is_name(stage) and re.fullmatch(r"\s*[A-Za-z][\w-]*\s*", rest):
            near = did_you_mean(stage, stages)
            raise RecipeError(
                f"--set {shown(text)}: no stage {shown(stage)}{near} (stages are {listing(stages)})"
            )
        if key in (*OF_RESULT, *OF_FILE):
            _change(changed, key, _value(value), text)
        elif key in OPTIONS:
            _change(own, key, _value(value), text)
            if key in _WEIGHTS:
                of_weights.append((own, text))
        elif near := did_you_mean(key, (*OF_RESULT, *OF_FILE, *OPTIONS)):
            raise RecipeError(f"--set {shown(text)}: no option {shown(key)}{near}")
        else:
            _use_found(own)
            own["set"] = _on_top(own.get("set"), text)
            of_weights.append((own, text))
    for table, text in of_weights:
        _check_weights(table, text)
    return changed


def _check_weights(table: Mapping[str, Any], text: str) -> None:
    """Raise RecipeError where weights are given to a bake or conversion, saying what can be changed."""
    method = table.get("method")
    if not isinstance(method, str) or method not in IDENTITIES:
        return
    instead = ""
    if isinstance(loras := table.get("loras"), list) and loras:
        file = loras[0].get("file") if isinstance(loras[0], Mapping) else str(Lora.parse(loras[0]).file)
        example = shlex.quote(f"loras={json.dumps([f'{file}:0.5'], ensure_ascii=False)}")
        instead = f"; a LoRA's strength is set by --set {shown(example)}"
    raise RecipeError(f"--set {shown(text)}: {method} has no weights{instead}")


def _change(table: dict[str, Any], key: str, value: Any, text: str) -> None:
    if not key:
        raise RecipeError(f"--set {shown(text)}: STAGE.KEY=VALUE, or BLOCK=WEIGHT of the result")
    if key == "loras" and isinstance(value, str):
        value = [value]
    if key == "set":
        value = _on_top(table.get("set"), value)
    table[key] = value
    for other in _SAYS_WEIGHTS.get(key, ()):
        table.pop(other, None)
    if key in (*_SAYS_WEIGHTS, "set", "set_beta", "seed", "sdxl_map"):
        table.pop("found", None)  # what was looked up for other weights


def _on_top(before: Any, value: Any) -> Any:
    """Changes of single blocks, and more of them: texts, or tables."""
    if not before:
        return value
    if isinstance(before, Mapping) and isinstance(value, Mapping):
        return {**before, **value}
    texts = [
        ",".join(f"{block}={weight}" for block, weight in one.items())
        if isinstance(one, Mapping)
        else str(one)
        for one in (before, value)
    ]
    return ",".join(texts)


def _use_found(table: dict[str, Any]) -> None:
    """Change the weights that a merge was made with, not those that its preset may have by now."""
    if found := table.pop("found", None):
        for key in ("preset", "preset_beta", "set", "set_beta"):
            table.pop(key, None)
        weights = {key: found.get(key) for key in ("weights", "weights_beta")}
        table.update({key: value for key, value in weights.items() if value is not None})


def _value(text: str) -> Any:
    """A value as TOML has it, or else a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text

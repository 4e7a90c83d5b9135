"""The recipe in a file's metadata in a few words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from blockmerge.errors import counted, listing, shown


def recipe_in_short(text: str) -> str | None:
    """How a file was made, as its metadata say; None for what is not a recipe."""
    try:
        run = json.loads(text)
    except (ValueError, RecursionError):
        return None
    said = merge_in_short(_of_kind(run, dict))
    if said is None:
        return None
    if stages := _of_kind(run.get("stages"), dict):
        said += f", in {counted(len(stages) + 1, 'merge')}"
    return f"{said} (blockmerge recipe FILE shows it)" if run.get("files") else said


def merge_in_short(run: Mapping[str, Any]) -> str | None:
    """What one merge of a recipe is; None for what is not one."""
    models = run.get("models")
    if not isinstance(models, list) or not models or not isinstance(run.get("method"), str):
        return None
    said = (
        f"{shown(_how(run))} of {' and '.join(map(shown, models)) if len(models) < 3 else listing(models, 5)}"
    )
    loras = [_of_kind(one, dict) for one in _of_kind(run.get("loras"), list)]
    if given := [f"{one.get('name', '?')}:{one.get('strength', 1)}" for one in loras]:
        said += f", with {listing(given, 5)}"
    return said


def _how(run: Mapping[str, Any]) -> str:
    if isinstance(run.get("preset"), str):
        return f"{run['method']} {run['preset']}"
    [first, *others] = list(_of_kind(run.get("weights"), dict).values()) or [None]
    is_one = isinstance(first, (int, float)) and all(one == first for one in others)
    return f"{run['method']} {first:g}" if is_one else str(run["method"])


def _of_kind(value: Any, kind: type) -> Any:
    """What should be a table or a list, or an empty one: metadata hold whatever somebody wrote."""
    return value if isinstance(value, kind) else kind()

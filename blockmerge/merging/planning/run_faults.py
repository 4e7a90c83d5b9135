"""What is wrong with a recipe in somebody's metadata, before anything in it is relied on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from blockmerge.errors import shown

_TEXTS = (
    "version", "method", "preset", "rules", "adjust", "vae", "vae_file", "dtype", "ema", "naming", "variant",
    "configs", "round", "text_encoder", "result", "only",
)  # fmt: skip
_FLAGS = ("clip", "prune", "allow_nonfinite", "partial", "hash")


def strict_json(text: str) -> Any:
    """What a text says in JSON; None if it is not JSON, or holds NaN or half a character."""
    try:
        said = json.loads(text, parse_constant=_refuse)
        json.dumps(said, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return said


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def fault_of_run(run: Mapping[str, Any]) -> str | None:
    """Return what is of a wrong kind in a recipe and its stages; None if nothing is."""
    stages = run.get("stages")
    if not _is_table(stages, lambda one: isinstance(one, Mapping)):
        return "stages are tables"
    return next((fault for one in (run, *(stages or {}).values()) if (fault := _fault(one))), None)


def _fault(run: Mapping[str, Any]) -> str | None:
    models = run.get("models")
    kinds = {
        **{key: _is_text(run.get(key)) for key in _TEXTS},
        **{key: isinstance(run.get(key), (bool, type(None))) for key in _FLAGS},
        "models": isinstance(models, list) and all(isinstance(one, str) for one in models),
        "weights": _is_table(run.get("weights"), _is_weight),
        "weights_beta": _is_table(run.get("weights_beta"), _is_weight),
        "numbers": _is_table(run.get("numbers"), _is_setting),
        "about": _is_table(run.get("about"), lambda one: isinstance(one, str)),
        "asked": _is_table(run.get("asked"), _is_asked),
        "files": _is_files(run.get("files")),
        "loras": _is_list(run.get("loras"), _is_lora),
    }
    wrong = [key for key, is_right in kinds.items() if not is_right]
    return f"{wrong[0]} is {shown(repr(run.get(wrong[0])), 60)}" if wrong else None


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _is_weight(value: Any) -> bool:
    return value in (None, "skip") if _is_text(value) else _is_number(value)


def _is_setting(value: Any) -> bool:
    each = value if isinstance(value, list) else [value]
    return all(isinstance(one, (str, bool)) or _is_number(one) for one in each)


def _is_asked(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_weight, value.values()))
    each = value if isinstance(value, list) else [value]
    return all(_is_text(one) or _is_number(one) for one in each)


def _is_table(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, Mapping) and all(map(is_right, value.values())))


def _is_list(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, list) and all(map(is_right, value)))


def _is_lora(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return False
    return _is_number(value.get("strength", 1.0)) and _is_table(value.get("blocks"), _is_weight)


def _is_files(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping) or not isinstance(value.get("models"), list):
        return False
    lists = (value["models"], value.get("loras"))
    return all(_is_list(one, _is_file) for one in lists) and _is_file(value.get("vae"))


def _is_file(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping) or not isinstance(value.get("identity"), str):
        return False
    size = value.get("size")
    is_sized = isinstance(size, int) and not isinstance(size, bool)
    return is_sized and isinstance(value.get("name"), str) and _is_text(value.get("sha256"))

"""A recipe as a table with tables in it: which are stages, and which of these is the result."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from blockmerge.errors import RecipeError, did_you_mean, listing, shown
from blockmerge.merging.planning.request import ABOUT
from blockmerge.merging.planning.written import OPTIONS

OF_RESULT = ("dtype", "to", "prune", "round", "configs", "allow_nonfinite", "hash", *ABOUT)
"""Options that only what is written has; where there are stages, they stand at the top."""
OF_FILE = ("output", "models_folder")
"""What stands beside them there."""

RESULT = "result"
"""What the result is called where it has no name."""

TOP = " "
"""What stands for the result's name where its models are at the top."""


def free_name(name: str, taken: Collection[str]) -> str:
    """Return a name that no other stage has."""
    while name in taken:
        name += "_"
    return name


def is_name(text: str) -> bool:
    """Whether a text may be the name of a stage."""
    return re.fullmatch(r"[\w-]+", text) is not None


def split(written: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What stands at the top, and the tables that are stages."""
    stages = {
        key: dict(value)
        for key, value in written.items()
        if isinstance(value, Mapping) and key not in OPTIONS
    }
    if wrong := [name for name in stages if not is_name(name)]:
        raise RecipeError(f"a stage's name is letters, digits, _ and -: {listing(wrong)}")
    return {key: value for key, value in written.items() if key not in stages}, stages


def with_result(
    top: dict[str, Any], stages: dict[str, dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], str]:
    """All stages, and which one is the result: what stands at the top, or else what no other uses, with the
    options at the top.
    """
    if "models" in top:
        stages = {**stages, TOP: top}
    named = (one for stage in stages.values() for one in models_of(stage) if isinstance(one, str))
    used = dict.fromkeys(named)
    unused = [name for name in stages if name not in used]
    if len(unused) != 1 and (lost := [one for one in used if is_name(one) and one not in stages]):
        near = did_you_mean(lost[0], stages)
        raise RecipeError(
            f"{shown(lost[0])} is neither a stage nor a file{near} (stages are {listing(stages)})"
        )
    if "models" in top:
        if spare := [name for name in unused if name != TOP]:
            raise RecipeError(f"no stage uses {listing(spare)}: take it out, or name it among the models")
        return stages, TOP
    if wrong := [key for key in top if key not in OF_RESULT]:
        raise RecipeError(
            f"{listing(wrong)} at the top, where only {', '.join((*OF_FILE, *OF_RESULT))} stand"
            f"{did_you_mean(wrong[0], OF_RESULT)}: put it into a stage, or give the models there, too"
        )
    if not stages:
        raise RecipeError("recipe: models are a list of files, A first")
    if not unused:
        raise RecipeError(f"every stage is used by another ({listing(stages)}): which is the result?")
    if len(unused) > 1:
        raise RecipeError(f"no stage uses {listing(unused)}: only the result is used by no other")
    [result] = unused
    if twice := [key for key in top if key in stages[result]]:
        raise RecipeError(f"stage {shown(result)}: {listing(twice)} stands at the top, too")
    return {**stages, result: {**stages[result], **top}}, result


def models_of(stage: Mapping[str, Any]) -> Sequence[Any]:
    """What a stage names as its models; nothing where that is no list."""
    models = stage.get("models")
    return models if isinstance(models, (list, tuple)) else ()

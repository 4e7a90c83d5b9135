"""What the output's metadata says: the recipe, and what of A's metadata is still true."""

from __future__ import annotations

from collections.abc import Mapping

from blockmerge.checkpoints import QUANTISATION_KEY, faulty_metadata

RECIPE_KEY = "blockmerge.recipe"

_NO_LONGER_TRUE = ("sshs_", "sd_merge_", "blockmerge.")
_NO_LONGER_TRUE_KEYS = frozenset(
    f"modelspec.{key}"
    for key in ("title", "date", "hash_sha256", "author", "description", "thumbnail", "merged_from")
) | {QUANTISATION_KEY}  # no output is quantised so
_HOW_A_WAS_MADE = frozenset((
    "workflow", "prompt", "extra_pnginfo",  # ComfyUI: the whole graph, with every prompt in it
    "parameters",  # the web UI and its relatives
    "invokeai_metadata", "invokeai_graph", "invokeai_workflow",
))  # fmt: skip
"""What programs leave of the work in which a file was saved."""


def output_metadata(of_a: Mapping[str, str], recipe: str, family: str) -> dict[str, str]:
    """Return A's metadata without what would now lie, tells how A was made, or never should have been there,
    and the recipe.

    All values are strings, as loaders demand.
    """
    faulty = {key for keys in faulty_metadata(of_a, family).values() for key in keys}
    dropped = faulty | _NO_LONGER_TRUE_KEYS | _HOW_A_WAS_MADE
    kept = {
        key: value
        for key, value in of_a.items()
        if not key.startswith(_NO_LONGER_TRUE) and key not in dropped
    }
    return {**kept, "format": "pt", RECIPE_KEY: recipe}

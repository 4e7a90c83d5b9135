"""One merge from request to file: recipe → plan → execute, into any output; in memory; and live."""

from blockmerge.merging.again import Recorded, Searched, again
from blockmerge.merging.bake import bake
from blockmerge.merging.convert import convert
from blockmerge.merging.live import LiveMerge
from blockmerge.merging.memory import merge_state_dicts
from blockmerge.merging.merge import merge
from blockmerge.merging.ready import Plan
from blockmerge.merging.recipe import Recipe
from blockmerge.merging.recipe_recorded import preset_of
from blockmerge.merging.result import Counts, MergeResult
from blockmerge.merging.verify import Verification, verified, verify

Merge = Recipe
"""Another name of `Recipe`: one merge is a recipe."""

__all__ = [
    "Counts",
    "LiveMerge",
    "Merge",
    "MergeResult",
    "Plan",
    "Recipe",
    "Recorded",
    "Searched",
    "Verification",
    "again",
    "bake",
    "convert",
    "merge",
    "merge_state_dicts",
    "preset_of",
    "verified",
    "verify",
]

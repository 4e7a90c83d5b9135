"""One merge from request to file: recipe → plan → execute, into any output; in memory; and live."""

from blockmerge.merging.again import again
from blockmerge.merging.bake import bake
from blockmerge.merging.convert import convert
from blockmerge.merging.live import LiveMerge
from blockmerge.merging.memory import merge_state_dicts
from blockmerge.merging.merge import merge
from blockmerge.merging.recipe import Plan, Recipe
from blockmerge.merging.result import Counts, MergeResult
from blockmerge.merging.verify import Verification, verify

Merge = Recipe
"""One merge is a recipe."""

__all__ = [
    "Counts",
    "LiveMerge",
    "Merge",
    "MergeResult",
    "Plan",
    "Recipe",
    "Verification",
    "again",
    "bake",
    "convert",
    "merge",
    "merge_state_dicts",
    "verify",
]

"""One merge from request to file: recipe → plan → execute; and the same in memory."""

from blockmerge.merging.convert import convert
from blockmerge.merging.memory import merge_state_dicts
from blockmerge.merging.merge import dry_run, merge
from blockmerge.merging.recipe import Recipe
from blockmerge.merging.result import Counts, MergeResult

__all__ = ["Counts", "MergeResult", "Recipe", "convert", "dry_run", "merge", "merge_state_dicts"]

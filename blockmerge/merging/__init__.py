"""One merge from request to file: recipe → plan → execute; the same in memory, and live on a U-Net."""

from blockmerge.merging.convert import convert
from blockmerge.merging.live import LiveMerge
from blockmerge.merging.memory import merge_state_dicts
from blockmerge.merging.merge import dry_run, merge
from blockmerge.merging.planning.recipe import Recipe
from blockmerge.merging.result import Counts, MergeResult

__all__ = ["Counts", "LiveMerge", "MergeResult", "Recipe", "convert", "dry_run", "merge", "merge_state_dicts"]

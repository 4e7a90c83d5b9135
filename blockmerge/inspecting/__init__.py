"""What is in a checkpoint."""

from blockmerge.inspecting.inspect import Inspection, Part, inspect

__all__ = ["Inspection", "Part", "inspect"]

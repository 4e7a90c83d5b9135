"""What is in a checkpoint, what is wrong with it, and a copy without what can be put right."""

from blockmerge.inspecting.check import check
from blockmerge.inspecting.inspect import Inspection, Part, inspect
from blockmerge.inspecting.problems import KINDS, SEVERITIES, CheckResult, Problem
from blockmerge.inspecting.repair import repair
from blockmerge.inspecting.tensors import ListedTensor

__all__ = [
    "KINDS",
    "SEVERITIES",
    "CheckResult",
    "Inspection",
    "ListedTensor",
    "Part",
    "Problem",
    "check",
    "inspect",
    "repair",
]

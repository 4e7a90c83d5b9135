"""What is in a checkpoint, and what is wrong with it."""

from blockmerge.inspecting.check import check
from blockmerge.inspecting.inspect import Inspection, Part, inspect
from blockmerge.inspecting.problems import KINDS, SEVERITIES, CheckResult, Problem

__all__ = ["KINDS", "SEVERITIES", "CheckResult", "Inspection", "Part", "Problem", "check", "inspect"]

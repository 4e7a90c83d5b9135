"""What is in a checkpoint or a LoRA, what is wrong with it, and a copy without what can be put right."""

from blockmerge.inspecting.check import check
from blockmerge.inspecting.inspect import Inspection, Part, inspect
from blockmerge.inspecting.lora import LoraBlock, LoraInspection, inspect_lora
from blockmerge.inspecting.lora_metadata import TRIGGER_WORDS
from blockmerge.inspecting.problems import KINDS, SEVERITIES, CheckResult, Problem
from blockmerge.inspecting.repair import repair
from blockmerge.inspecting.tensors import ListedTensor

__all__ = [
    "KINDS",
    "SEVERITIES",
    "TRIGGER_WORDS",
    "CheckResult",
    "Inspection",
    "ListedTensor",
    "LoraBlock",
    "LoraInspection",
    "Part",
    "Problem",
    "check",
    "inspect",
    "inspect_lora",
    "repair",
]

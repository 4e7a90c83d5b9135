"""How much of each model goes where: block weights and element rules, the texts they are written in, preset
files. No torch.
"""

from blockmerge.weights.adjust import Adjust, AdjustLike, Change
from blockmerge.weights.block_weights import SDXL_MAPS, BlockWeights
from blockmerge.weights.element_rules import ElementRules, FamilyRules, RulesLike
from blockmerge.weights.grammar import WeightsLike, parse_assignments, parse_weights
from blockmerge.weights.presets import (
    Preset,
    find_preset,
    load_preset,
    preset_names,
    presets,
    unreadable_presets,
    user_folder,
)
from blockmerge.weights.request import WeightsRequest

__all__ = [
    "SDXL_MAPS",
    "Adjust",
    "AdjustLike",
    "BlockWeights",
    "Change",
    "ElementRules",
    "FamilyRules",
    "Preset",
    "RulesLike",
    "WeightsLike",
    "WeightsRequest",
    "find_preset",
    "load_preset",
    "parse_assignments",
    "parse_weights",
    "preset_names",
    "presets",
    "unreadable_presets",
    "user_folder",
]

"""How much of each model goes where: block weights, the texts they are written in, and preset files. No torch."""

from blockmerge.weights.block_weights import BlockWeights
from blockmerge.weights.grammar import WeightsLike, parse_assignments, parse_weights
from blockmerge.weights.presets import Preset, find_preset, load_preset, preset_names, presets, unreadable_presets
from blockmerge.weights.request import WeightsRequest

__all__ = [
    "BlockWeights",
    "Preset",
    "WeightsLike",
    "WeightsRequest",
    "find_preset",
    "load_preset",
    "parse_assignments",
    "parse_weights",
    "preset_names",
    "presets",
    "unreadable_presets",
]

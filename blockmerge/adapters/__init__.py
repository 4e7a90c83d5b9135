"""Files that change a model, LoRA and its relatives: what their modules mean, of which kinds they are, and
how much of each goes to which block. No torch.
"""

from blockmerge.adapters.adapter import Adapter
from blockmerge.adapters.changes import Applied, Changes
from blockmerge.adapters.factors import matrix_of, product_of
from blockmerge.adapters.forms import KINDS
from blockmerge.adapters.lora import Lora, LoraLike
from blockmerge.adapters.module import Module
from blockmerge.adapters.own_changes import own_bias, own_change
from blockmerge.adapters.targets import (
    Target,
    Whereabouts,
    diffusers_names,
    targets_of,
    written_names,
)

__all__ = [
    "KINDS",
    "Adapter",
    "Applied",
    "Changes",
    "Lora",
    "LoraLike",
    "Module",
    "Target",
    "Whereabouts",
    "diffusers_names",
    "matrix_of",
    "own_bias",
    "own_change",
    "product_of",
    "targets_of",
    "written_names",
]

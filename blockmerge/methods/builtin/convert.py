"""The identity: converting, and baking, are merges of one model with a method that does nothing."""

from __future__ import annotations

from blockmerge.methods import planning
from blockmerge.methods.arithmetic import round_into
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch


@merge_method(formula="A", source="the identity", copies=planning.always_a)
def convert(a: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """A in the dtype of `out`."""
    return round_into(out, a)


@merge_method(formula="A, and what adapters add", source="the identity", copies=planning.always_a)
def bake(a: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """A in the dtype of `out`; adapters come after every method."""
    return round_into(out, a)

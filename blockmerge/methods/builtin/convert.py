"""The identity: a conversion is a merge of one model with the method that does nothing."""

from __future__ import annotations

from blockmerge.methods import planning
from blockmerge.methods.arithmetic import round_into
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch


@merge_method(formula="A", source="the identity", copies=planning.always_a)
def convert(a: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """A in the dtype of `out`."""
    return round_into(out, a)

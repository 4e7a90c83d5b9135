"""What steps say of how large it is what they add to weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Squares(NamedTuple):
    """Sums of squares, on the device that they were computed on: of a weight, of all that is added to it, and
    of what each source adds. None or nothing where only the rest was looked at.

    `is_later` says that another step has changed the weight before, so that it is not the model's; `is_torn`
    that this step or the one before changes only some of the input channels, so that of neither it is known
    how large a part of the whole it is.
    """

    weight: torch.Tensor | None = None
    total: torch.Tensor | None = None
    each: Mapping[int, torch.Tensor] = MappingProxyType({})
    is_later: bool = False
    is_torn: bool = False

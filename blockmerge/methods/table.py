"""The table of methods: what there is to know about each before any tensor is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockmerge.errors import RecipeError, did_you_mean, shown

if TYPE_CHECKING:
    import torch

    Compute = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A merge method.

    `models` is how many it takes. `locality` tells the planner how a tensor may be cut: ``"element"`` anywhere.
    `copies(alpha)` is the number of the model (0 = A, 1 = B) whose bytes the result is at that weight, or None.
    """

    name: str
    models: int
    locality: str
    formula: str
    source: str
    copies: Callable[[float], int | None]

    @property
    def function(self) -> Compute:
        """The function itself: `f(a, b, …, alpha=…, out=…)`, in `blockmerge.methods.<locality>wise`."""
        function: Any = getattr(import_module(f"blockmerge.methods.{self.locality}wise"), self.name)
        return function  # type: ignore[no-any-return]


def _limited_copies(alpha: float) -> int | None:
    return 0 if alpha <= 0 else 1 if alpha >= 1 else None


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="weighted_sum",
            models=2,
            locality="element",
            formula="(1 − α)·A + α·B",
            source="the web UI's checkpoint merger",
            copies=lambda alpha: {0.0: 0, 1.0: 1}.get(alpha),
        ),
        Method(
            name="sigmoid",
            models=2,
            locality="element",
            formula="weighted_sum with α²(3 − 2α) in place of α, α limited to [0, 1]",
            source='the web UI\'s old "Sigmoid"',
            copies=_limited_copies,
        ),
        Method(
            name="inverse_sigmoid",
            models=2,
            locality="element",
            formula="weighted_sum with ½ − sin(asin(1 − 2α)/3) in place of α, α limited to [0, 1]",
            source='the web UI\'s old "Inverse sigmoid"',
            copies=_limited_copies,
        ),
    )
}


def find_method(name: str) -> Method:
    """Return the method of that name. Raises RecipeError, with the nearest known name, when there is none."""
    try:
        return METHODS[name]
    except (KeyError, TypeError):
        raise RecipeError(f"unknown method '{shown(name)}'{did_you_mean(str(name), METHODS)}") from None

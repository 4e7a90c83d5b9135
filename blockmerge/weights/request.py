"""`WeightsRequest`: a preset or weights, and changes on top, as a user asks for them before the family is known."""

from __future__ import annotations

import os
from dataclasses import dataclass

from blockmerge.anatomy import FAMILIES
from blockmerge.errors import PresetError, WeightsError
from blockmerge.weights.block_weights import BlockWeights
from blockmerge.weights.grammar import WeightsLike, parse_assignments, parse_weights
from blockmerge.weights.presets import find_preset


@dataclass(frozen=True)
class WeightsRequest:
    """What a user says about weights: exactly one of `preset` and `weights`, then `changes` (``BASE=0.5,OUT11=1``)."""

    preset: str | None = None
    weights: WeightsLike | None = None
    changes: str | None = None
    sdxl_map: str | None = None

    def check(self) -> None:
        """Raise WeightsError when neither or both of preset and weights are given, PresetError for no known preset."""
        if self.preset is None and self.weights is None:
            raise WeightsError("how much of B? say --preset high_res or --weights 0.5 ('blockmerge presets' lists the presets)")
        if self.preset is not None and self.weights is not None:
            raise WeightsError("both a preset and weights are given: say one of them (--set changes single blocks)")
        if self.preset is not None:
            if not isinstance(self.preset, (str, os.PathLike)):
                raise PresetError(f"a preset is a name or a file, not a {type(self.preset).__name__}: give weights as weights=")
            find_preset(self.preset)

    def resolve(self, family: str) -> BlockWeights:
        """Return the weights for a family. Raises WeightsError when they cannot be read, and as `check` does."""
        self.check()
        if self.preset is not None:
            weights = find_preset(self.preset).weights_for(family, self.sdxl_map)
        else:
            assert self.weights is not None
            weights = parse_weights(self.weights, family, self.sdxl_map)
        if self.changes is not None:
            weights = weights.replace(parse_assignments(self.changes, FAMILIES[family].blocks))
        return weights

    @property
    def label(self) -> str:
        """The preset's name, or the weight when one number is given for all blocks, or ``"weights"``."""
        if self.preset is not None:
            return find_preset(self.preset).name
        if isinstance(self.weights, (int, float)):
            return f"{self.weights:g}"
        text = self.weights if isinstance(self.weights, str) else ""
        return text.strip() if text.strip() and not set(text) & set("=,; \n\t") else "weights"

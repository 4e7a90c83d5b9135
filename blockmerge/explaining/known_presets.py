"""Which preset a list of block weights is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from blockmerge.anatomy import Family
from blockmerge.comparing.arrays import Array, Flags
from blockmerge.errors import PresetError
from blockmerge.weights import Preset, presets

_LEAST = 0.005  # weights are looked at this coarsely even where they are known better: tools round them
_SMALLEST_RATIO = 0.02


@dataclass(frozen=True)
class Match:
    """A preset that fits: `weights` are its weights by block, times `ratio`; `distance` in uncertainties."""

    name: str
    ratio: float
    weights: Mapping[str, float]
    distance: float

    @property
    def is_scaled(self) -> bool:
        """Whether the weights are not the preset's own, but some ratio of them."""
        return self.ratio != 1

    @property
    def label(self) -> str:
        """``"high_res"``, or ``"high_res@0.6"`` for a scaled one."""
        return f"{self.name}@{self.ratio:g}" if self.is_scaled else self.name


def matching_presets(
    family: Family | str, blocks: tuple[str, ...], weights: Array, uncertainty: Array, known: Flags
) -> list[Match]:
    """Return the presets that the weights may be, nearest first, unscaled ones before scaled ones.

    `weights`, `uncertainty` and `known` are those of each of the `blocks`. BASE is not looked at: tools let
    it be set apart. Only blocks that are `known` count; without any that differ from 0 there is nothing to
    recognise.
    """
    looked_at = known & np.array([block != "BASE" for block in blocks])
    if not looked_at.any():
        return []
    tolerance = np.maximum(uncertainty, _LEAST)[looked_at]
    found: list[Match] = []
    for preset in presets():
        table = _table(preset, family, blocks)
        if table is None:
            continue
        ratio = _ratio(weights[looked_at], table[looked_at], tolerance)
        if ratio is not None:
            distance = np.abs(weights[looked_at] - ratio * table[looked_at]) / tolerance
            scaled = dict(zip(blocks, (table * ratio).tolist(), strict=True))
            found.append(Match(preset.name, ratio, scaled, float(distance.mean())))
    return sorted(found, key=lambda match: (match.is_scaled, match.distance))


def _table(preset: Preset, family: Family | str, blocks: tuple[str, ...]) -> Array | None:
    if preset.is_random or not preset.serves(family):
        return None
    try:
        weights = preset.weights_for(family, None)
    except PresetError:  # its table is for models with other blocks
        return None
    values = [weights[block] for block in blocks]
    if any(value is None for value in values):
        return None
    return np.array(values, dtype=np.float64)


def _ratio(weights: Array, of_preset: Array, tolerance: Array) -> float | None:
    """How many times a preset's weights the weights are, None when they are none of these times."""
    flat = np.ptp(of_preset) == 0
    if flat and of_preset[0] in (0, 1):  # all of A, or all of B: that is no preset to recognise
        return None
    if (np.abs(weights - of_preset) / tolerance <= 1).all():
        return 1.0
    if flat:  # flat weights times a ratio are simply other flat weights
        return None
    own, theirs = weights / tolerance, of_preset / tolerance
    ratio = float(np.dot(own, theirs) / np.dot(theirs, theirs))
    fits = (np.abs(round(ratio, 2) * of_preset - weights) <= tolerance).all()
    ratio = round(ratio, 2 if fits else 4)
    if ratio <= _SMALLEST_RATIO:
        return None
    return ratio if (np.abs(weights - ratio * of_preset) / tolerance <= 1).all() else None

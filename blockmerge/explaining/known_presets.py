"""Which preset a list of block weights is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blockmerge.comparing.arrays import Array, Flags
from blockmerge.weights import Preset, presets

_LEAST = 0.005  # weights are looked at this coarsely even where they are known better: tools round them


@dataclass(frozen=True)
class Match:
    """A preset that fits: `weights` are its weights (NaN where it skips), times `ratio`; `distance` in
    uncertainties.
    """

    name: str
    ratio: float
    weights: Array
    distance: float

    @property
    def label(self) -> str:
        """``"high_res"``, or ``"high_res@0.6"`` for a scaled one."""
        return self.name if self.ratio == 1 else f"{self.name}@{self.ratio:g}"


def matching_presets(
    family: str, blocks: tuple[str, ...], weights: Array, uncertainty: Array, known: Flags
) -> list[Match]:
    """Return the presets that the weights may be, nearest first, unscaled ones before scaled ones.

    BASE is not looked at: tools let it be set apart. Only blocks that are `known` count; without any that
    differ from 0 there is nothing to recognise.
    """
    looked_at = known & np.array([block != "BASE" for block in blocks])
    if not looked_at.any():
        return []
    tolerance = np.maximum(uncertainty, _LEAST)[looked_at]
    own = weights[looked_at]
    exact: list[Match] = []
    scaled: list[Match] = []
    for preset in presets():
        table = _table(preset, family, blocks)
        if table is None:
            continue
        theirs = table[looked_at]
        if np.ptp(theirs) == 0 and theirs[0] in (
            0,
            1,
        ):  # all of A, or all of B: that is no preset to recognise
            continue
        distance = np.abs(own - theirs) / tolerance
        if (distance <= 1).all():
            exact.append(Match(preset.name, 1.0, table, float(distance.mean())))
            continue
        if np.ptp(theirs) == 0:  # flat weights times a ratio are simply other flat weights
            continue
        ratio = float(
            np.dot(own / tolerance, theirs / tolerance) / np.dot(theirs / tolerance, theirs / tolerance)
        )
        ratio = (
            round(ratio, 2)
            if (np.abs(round(ratio, 2) * theirs - own) <= tolerance).all()
            else round(ratio, 4)
        )
        distance = np.abs(own - ratio * theirs) / tolerance
        if ratio > 0.02 and (distance <= 1).all():
            scaled.append(Match(preset.name, ratio, table * ratio, float(distance.mean())))
    return [
        *sorted(exact, key=lambda match: match.distance),
        *sorted(scaled, key=lambda match: match.distance),
    ]


def _table(preset: Preset, family: str, blocks: tuple[str, ...]) -> Array | None:
    if preset.is_random or family not in preset.families:
        return None
    weights = preset.weights_for(family, None)
    values = [weights[block] for block in blocks]
    if any(value is None for value in values):
        return None
    return np.array(values, dtype=np.float64)

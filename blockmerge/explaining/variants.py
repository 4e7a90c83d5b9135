"""With which weights a merge was really made: as they were found, rounder ones, or those of a preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from blockmerge.comparing.arrays import Array
from blockmerge.explaining.chunks import MergeStream
from blockmerge.explaining.compared import ComparedTensors
from blockmerge.explaining.fits import GroupFit, MergeFit
from blockmerge.explaining.known_presets import Match
from blockmerge.explaining.merging_again import Misfit, merge_tensors_again

_WORTH_TRYING = 6
"""How many presets are merged again to see which one it was."""


def refine(stream: MergeStream, compared: ComparedTensors, fit: MergeFit) -> tuple[MergeFit, bool]:
    """Merge again with the weights that were found, with rounder ones and with presets.

    Returns the fit with the roundest weights that come as near to the merge as any, and whether the merge is
    then the same, within two steps of its dtype everywhere.
    """
    presets = fit.parents.presets[:_WORTH_TRYING]
    unet = fit.unet
    groups = {**unet, **fit.outside}
    variants: dict[str, Array] = {}
    for name, group in groups.items():
        if name in unet:
            of_presets = [fit.parents.coefficients_for(preset.weights[name]) for preset in presets]
        else:  # a preset says nothing about it
            of_presets = [group.coefficients for _ in presets]
        variants[name] = np.array([*of_presets, *_rounder(group), group.coefficients])
    misfits = _misfits(stream, compared, fit, groups, variants)
    preset = _best_preset(presets, unet, misfits)
    coefficients: dict[str, Array] = {}
    agrees = True
    for name, group in groups.items():
        if preset is not None and name in unet:
            chosen = preset
        else:
            chosen = _roundest(misfits[name], group.elements, after=len(presets))
        coefficients[name] = variants[name][chosen]
        agrees = agrees and group.explained and not misfits[name].beyond[chosen]
    label = None if preset is None else presets[preset].label
    return fit.with_coefficients(coefficients, label), agrees


def _rounder(group: GroupFit) -> list[Array]:
    """The coefficients with weights of two decimals, and of three, where rounding allows that."""
    found = group.coefficients
    variants = []
    for decimals in (2, 3):
        rounder = np.round(found[1:], decimals)
        near = np.abs(rounder - found[1:]) <= max(group.uncertainty, 1e-6)
        weights = np.where(near, rounder, found[1:])
        variants.append(np.concatenate([[1.0 - weights.sum()], weights]))
    return variants


def _misfits(
    stream: MergeStream,
    compared: ComparedTensors,
    fit: MergeFit,
    groups: Mapping[str, GroupFit],
    variants: Mapping[str, Array],
) -> dict[str, Misfit]:
    """Merge the tensors of every group again with its variants, and add up how far they are off."""
    tensors = {name: [compared.names[place] for place in group.members] for name, group in groups.items()}
    coefficients: dict[str, Array] = {}
    for name, group in groups.items():
        rows = np.zeros((len(variants[name]), len(stream.candidates)))
        rows[:, group.candidates] = variants[name]
        coefficients.update(dict.fromkeys(tensors[name], rows))
    parents = set(fit.parents.candidates)
    candidates_of = {name: [n for n in compared.holders[name] if n in parents] for name in coefficients}
    found = merge_tensors_again(stream, coefficients, candidates_of)
    return {name: Misfit.total([found[tensor] for tensor in tensors[name]]) for name in groups}


def _best_preset(
    presets: Sequence[Match], unet: Mapping[str, GroupFit], misfits: Mapping[str, Misfit]
) -> int | None:
    """Return which preset comes as near to the whole U-Net as any weights, scaled ones last."""
    total = Misfit.total([misfits[name] for name in unet])
    good = _as_good_as_any(total, sum(group.elements for group in unet.values()))
    fitting = [number for number in range(len(presets)) if good[number]]
    return min(fitting, key=lambda n: (presets[n].is_scaled, total.squares[n]), default=None)


def _roundest(misfit: Misfit, elements: float, after: int) -> int:
    """Return the first variant, from number `after` on, that comes as near as any; at worst the last."""
    good = _as_good_as_any(misfit, elements)
    return next((variant for variant in range(after, len(good)) if good[variant]), len(good) - 1)


def _as_good_as_any(misfit: Misfit, elements: float) -> list[bool]:
    return list(misfit.squares <= 1.05 * misfit.squares.min() + 0.002 * elements)

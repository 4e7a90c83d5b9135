"""With which weights a merge was really made: as they were found, rounder ones, or those of a preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from blockmerge.comparing.arrays import Array
from blockmerge.explaining.chunks import MergeStream
from blockmerge.explaining.compared import ComparedTensors
from blockmerge.explaining.fits import GroupFit, MergeFit
from blockmerge.explaining.known_presets import Match
from blockmerge.explaining.merging_again import Misfit, merge_tensors_again

_WORTH_TRYING = 6
"""How many presets are merged again to see which one it was."""


def refine(stream: MergeStream, compared: ComparedTensors, fit: MergeFit) -> tuple[MergeFit, Set[str]]:
    """Merge again with the weights that were found, with rounder ones and with presets.

    Returns the fit with the roundest weights that come as near to the merge as any, divided where no single
    weight does; and which of its groups are not the same then, within two steps of the merge's dtype
    everywhere.
    """
    while (finer := fit.divide(fit.unexplained)).divided != fit.divided:
        fit = finer
    found = _try(stream, compared, fit, fit.told, fit.parents.presets[:_WORTH_TRYING])
    fit = replace(fit.with_coefficients(found.coefficients), preset=found.preset)
    wrong = set(found.wrong)
    tried: set[str] = set()
    while new := fit.divide(wrong - tried).divided - fit.divided:
        fit, still = _divide(stream, compared, fit, new)
        wrong = (wrong - fit.divided) | still
        tried |= new
    return fit, wrong


def _divide(
    stream: MergeStream, compared: ComparedTensors, fit: MergeFit, names: Set[str]
) -> tuple[MergeFit, set[str]]:
    """Merge what some blocks and components can be divided into again.

    Returns the fit with those divided whose parts are then the same, or are components, and which of these
    are not.
    """
    finer = replace(fit, divided=fit.divided | names)
    found = _try(stream, compared, finer, {n: one for n, one in finer.told.items() if n not in fit.told}, ())
    parts = {name: set(fit.parts_of(name)) for name in names}
    kept = {name for name, some in parts.items() if some & fit.components.keys() or not some & found.wrong}
    finer = replace(fit, divided=fit.divided | kept)
    of_kept = {name: found.coefficients[name] for name in finer.told if name in found.coefficients}
    return finer.with_coefficients(of_kept), {name for name in found.wrong if name in of_kept}


@dataclass(frozen=True)
class _Found:
    """The best coefficients of some groups, the label of the preset that they are, and which of the groups
    are not the merge's with them.
    """

    coefficients: Mapping[str, Array]
    preset: str | None
    wrong: Set[str]


def _try(
    stream: MergeStream,
    compared: ComparedTensors,
    fit: MergeFit,
    groups: Mapping[str, GroupFit],
    presets: Sequence[Match],
) -> _Found:
    """Merge some groups again with all that their weights may be."""
    unet = {name: group for name, group in groups.items() if name in fit.unet}
    variants: dict[str, Array] = {}
    for name, group in groups.items():
        if name in unet:
            of_presets = [fit.parents.coefficients_for(preset.weights[name]) for preset in presets]
        else:  # a preset says nothing about it
            of_presets = [group.coefficients for _ in presets]
        variants[name] = np.array([*of_presets, *_rounder(group), group.coefficients])
    misfits = _misfits(stream, compared, fit, groups, variants)
    preset = _best_preset(presets, unet, misfits) if presets else None
    coefficients: dict[str, Array] = {}
    wrong: set[str] = set()
    for name, group in groups.items():
        if preset is not None and name in unet:
            chosen = preset
        else:
            chosen = _roundest(misfits[name], group.elements, after=len(presets))
        coefficients[name] = variants[name][chosen]
        if not group.explained or misfits[name].beyond[chosen]:
            wrong.add(name)
    return _Found(coefficients, None if preset is None else presets[preset].label, wrong)


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

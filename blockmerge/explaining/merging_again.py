"""Merging again in memory, to see which weights a merge was really made with and whether it is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from blockmerge.anatomy import component_of
from blockmerge.comparing.arrays import Array
from blockmerge.explaining.gram import Pass
from blockmerge.explaining.known_presets import Match
from blockmerge.explaining.units import Told, ToldUnit
from blockmerge.streaming import Progress

_WORTH_TRYING = 6
"""How many presets are merged again to see which one it was."""


def merge_again(
    work: Pass, told: Told, blocks: Sequence[str], threads: int | None, progress: Progress | None
) -> tuple[Told, bool]:
    """Hold merges with these weights, with rounder ones and with presets against the file.

    `blocks` are the blocks that the presets' weights are listed for. Returns what fits best, and whether it
    is exact.
    """
    parents = told.parents
    unet = {name: unit for name, unit in told.blocks.items() if name != "BASE"}
    if parents.by_tensor:
        unet = {name: unit for name, unit in told.tensors.items() if component_of(name) == "unet"}
    outside = {name: unit for name, unit in told.blocks.items() if name == "BASE"}
    outside |= {name: unit for name, unit in told.components.items() if name == "vae"}
    units = {**unet, **outside}
    matches = parents.presets[:_WORTH_TRYING]
    variants = {name: _variants(unit) for name, unit in units.items()}
    for number, match in enumerate(matches):
        for name, variant in variants.items():
            place = blocks.index(name) if name in unet and not parents.by_tensor else None
            weights = variant[-1] if place is None else parents.coefficients_for(float(match.weights[place]))
            variants[name] = np.concatenate([variant[:number], weights[None], variant[number:]])
    candidates = len(work.models) - 1
    coefficients = {}
    for name, unit in units.items():
        rows = np.zeros((len(variants[name]), candidates))
        rows[:, unit.subset] = variants[name]
        coefficients.update({work.names[member]: rows for member in unit.members})
    # Only the parents are read again, and only their sizes count.
    read = (0, *(n + 1 for n in told.parents.subset))
    holders = {name: [n for n in work.holders[name] if n in read] for name in coefficients}
    chosen = Pass(work.models, tuple(coefficients), holders)
    again = chosen.remerge(coefficients, threads, progress)
    places = {name: place for place, name in enumerate(chosen.names)}
    errors = {
        name: (
            again.squares[[places[work.names[m]] for m in unit.members]].sum(axis=0),
            again.beyond[[places[work.names[m]] for m in unit.members]].sum(axis=0),
        )
        for name, unit in units.items()
    }
    picked, preset = _pick(units, unet, errors, matches)
    exact = all(unit.explained for unit in units.values()) and all(
        errors[name][1][h] == 0 for name, h in picked.items()
    )
    refined = {name: replace(unit, coefficients=variants[name][picked[name]]) for name, unit in units.items()}
    return (
        replace(
            told,
            blocks={name: refined.get(name, unit) for name, unit in told.blocks.items()},
            components={name: refined.get(name, unit) for name, unit in told.components.items()},
            tensors={name: refined.get(name, unit) for name, unit in told.tensors.items()},
            preset=preset,
        ),
        exact,
    )


def _variants(unit: ToldUnit) -> Array:
    """The coefficients with weights of two and of three decimals, where rounding allows that, and as they
    were found.
    """
    raw = unit.coefficients
    rows = []
    for decimals in (2, 3):
        rounder = np.round(raw[1:], decimals)
        near = np.abs(rounder - raw[1:]) <= max(unit.uncertainty, 1e-6)
        weights = np.where(near, rounder, raw[1:])
        rows.append(np.concatenate([[1.0 - weights.sum()], weights]))
    return np.array([*rows, raw])


def _pick(
    units: Mapping[str, ToldUnit],
    unet: Mapping[str, ToldUnit],
    errors: Mapping[str, tuple[Array, Array]],
    matches: Sequence[Match],
) -> tuple[dict[str, int], str | None]:
    """Return the number of the variant that each unit takes, and the preset: the roundest that fits as well
    as any.
    """

    def as_good(squares: Array, elements: float) -> list[bool]:
        return list(squares <= 1.05 * squares.min() + 0.002 * elements)

    total = np.sum([errors[name][0] for name in unet], axis=0)
    whole = as_good(total, sum(unit.elements for unit in unet.values()))
    good = [number for number in range(len(matches)) if whole[number]]
    number = min(good, key=lambda n: (matches[n].ratio != 1, total[n])) if good else None
    picked = {}
    for name, unit in units.items():
        own = range(len(matches), len(errors[name][0]))
        fits = as_good(errors[name][0], unit.elements)
        picked[name] = (
            number if number is not None and name in unet else next((n for n in own if fits[n]), own[-1])
        )
    return picked, None if number is None else matches[number].label

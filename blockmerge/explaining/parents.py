"""Which of the candidates are the parents of a merge: the fewest that leave nothing but rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from blockmerge.anatomy import component_of
from blockmerge.comparing.arrays import Array, Flags
from blockmerge.explaining.known_presets import Match, matching_presets
from blockmerge.explaining.linear_fit import Fit
from blockmerge.explaining.units import Sight, Units

_MOST_PARENTS = 4
_MOST_COMBINATIONS = 4000
_LEAST = 0.005


@dataclass(frozen=True)
class Parents:
    """The parents (numbers of candidates), the base first; how they were combined; which presets the weights
    may be.

    `by_tensor`: the weights change within blocks, as element rules make them.
    """

    subset: tuple[int, ...]
    method: str
    presets: tuple[Match, ...] = ()
    by_tensor: bool = False

    @property
    def base(self) -> int:
        """What weight 0 stands for."""
        return self.subset[0]

    def coefficients_for(self, weight: float) -> Array:
        """How much of each parent a block takes at a weight of this method (of two models, or add
        difference).
        """
        return np.array([1.0, weight, -weight] if self.method == "add_difference" else [1.0 - weight, weight])


def find_parents(sight: Sight, family: str, least: int = 1) -> Parents | None:
    """Return the parents of the U-Net, at least so many, or None when no few of the candidates explain it."""
    blocks = sight.blocks
    unet = blocks.select([u for u, name in enumerate(blocks.names) if name != "BASE"])
    for fits in _by_size(unet, least, _MOST_PARENTS):
        if fits:
            return _best(fits, sight, family)
    tensors = sight.tensors
    each = tensors.select([u for u, name in enumerate(tensors.names) if component_of(name) == "unet"])
    for fits in _by_size(each, max(2, least), 3):
        if fits:
            subset = fits[0].subset
            base = subset[int(np.argmax(fits[0].coefficients.mean(axis=0)))]
            return Parents(
                (base, *(n for n in subset if n != base)), _plain_method(len(subset)), by_tensor=True
            )
    found = _without_idle(unet)
    return None if found is None else _best([found], sight, family)


def _best(fits: list[Fit], sight: Sight, family: str) -> Parents:
    return min((_parents(found, sight, family) for found in fits), key=lambda choice: choice[0])[1]


def _without_idle(units: Units) -> Fit | None:
    """Fit all candidates at once, then leave out those of which no unit took anything: for many parents."""
    able = tuple(n for n in range(units.products.shape[1]) if units.have[:, n].all())
    if len(able) <= _MOST_PARENTS:
        return None
    found = units.fit(able)
    known = found.determined
    at_work = np.asarray(
        (np.abs(found.coefficients) > np.maximum(found.uncertainty, _LEAST))[known].any(axis=0)
    ).tolist()
    found = units.fit(tuple(n for n, works in zip(able, at_work, strict=True) if works))
    return (
        found
        if len(found.subset) > 1 and found.explained(units.elements).all() and found.determined.any()
        else None
    )


def nearest_pair(blocks: Units) -> Parents:
    """Return the candidate nearest to the merge, and the one that explains most of what is left."""
    unet = blocks.select([u for u, name in enumerate(blocks.names) if name != "BASE"])
    candidates = range(unet.products.shape[1])
    nearest = min(candidates, key=lambda n: float(unet.products[:, n, n].sum()))
    others = [n for n in candidates if n != nearest]
    if not others:
        return Parents((nearest,), "copy")
    second = min(others, key=lambda n: float((unet.fit((nearest, n)).error ** 2).sum()))
    return Parents((nearest, second), "weighted_sum")


def _by_size(units: Units, least: int, most: int) -> Iterator[list[Fit]]:
    """For `least` … `most` parents, yield the fits that leave nothing but rounding, those about as good as
    the best.
    """
    able = [n for n in range(units.products.shape[1]) if units.have[:, n].all()]
    for size in range(least, min(most, len(able)) + 1):
        if comb(len(able), size) > _MOST_COMBINATIONS:
            return
        fits = [units.fit(subset) for subset in combinations(able, size)]
        fits = [found for found in fits if found.explained(units.elements).all() and found.determined.any()]
        if fits:
            totals = [float((found.error**2).sum()) for found in fits]
            enough = 1.02 * min(totals) + 1e-6 * float(units.elements.sum())
            fits = [found for found, total in zip(fits, totals, strict=True) if total <= enough]
        yield fits


def _parents(found: Fit, sight: Sight, family: str) -> tuple[tuple[float, ...], Parents]:
    """Choose base, method and presets for a fit; the first value ranks it among other fits, the lowest being
    the best.
    """
    blocks = sight.blocks
    unet_names = tuple(name for name in blocks.names if name != "BASE")
    known: Flags = found.determined
    tolerance = np.maximum(np.where(np.isfinite(found.uncertainty), found.uncertainty, 0.0), _LEAST)
    inside = (found.coefficients >= -tolerance) & (found.coefficients <= 1 + tolerance)
    outside = float((~inside & known[:, None]).sum())
    choices: list[tuple[tuple[float, ...], Parents]] = []
    for place in range(len(found.subset)):
        order = [place, *(n for n in range(len(found.subset)) if n != place)]
        subset = tuple(found.subset[n] for n in order)
        method, weights, uncertainty = _method(
            found.coefficients[:, order], found.uncertainty[:, order], known
        )
        if method == "add_difference" and np.mean(weights[known]) < 0:
            subset, weights = (subset[0], subset[2], subset[1]), -weights
        matches: list[Match] = []
        if method in ("weighted_sum", "add_difference"):
            every = np.full(len(blocks.names), np.nan)
            certain = np.zeros(len(blocks.names), dtype=np.bool_)
            error = np.zeros(len(blocks.names))
            for u, name in enumerate(unet_names):
                at = blocks.names.index(name)
                every[at], certain[at], error[at] = weights[u], known[u], uncertainty[u]
            matches = matching_presets(family, blocks.names, every, error, certain)
        share = float(found.coefficients[known, place].mean()) if known.any() else 0.0
        rank = (
            0.0 if method == "add_difference" else outside,
            0.0 if method == "add_difference" else 1.0,
            float(not any(match.ratio == 1 for match in matches)),
            float(not matches),
            # Many presets are another's mirror image; merges leave the VAE to the base.
            float(not sight.is_copy("vae", found.subset[place])),
            -round(share, 1),
            float(found.subset[place]),
        )
        choices.append((rank, Parents(subset, method, tuple(matches))))
    return min(choices, key=lambda choice: choice[0])


def _method(coefficients: Array, uncertainty: Array, known: Flags) -> tuple[str, Array, Array]:
    """Tell the method when the first parent is the base, with each block's weight and how far it is known."""
    count = coefficients.shape[1]
    if count == 3 and known.any():
        one = np.abs(coefficients[known, 0] - 1) <= np.maximum(uncertainty[known, 0], _LEAST)
        if one.all():
            return (
                "add_difference",
                (coefficients[:, 1] - coefficients[:, 2]) / 2,
                uncertainty[:, 1:].max(axis=1),
            )
    weights = coefficients[:, 1] if count > 1 else np.zeros(len(coefficients))
    return _plain_method(count), weights, uncertainty.max(axis=1)


def _plain_method(count: int) -> str:
    return {1: "copy", 2: "weighted_sum", 3: "triple_sum"}.get(count, "linear")

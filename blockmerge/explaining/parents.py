"""Which of the candidates are the parents of a merge: the fewest that leave nothing but rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from blockmerge.anatomy import Family
from blockmerge.comparing.arrays import Array
from blockmerge.explaining.groups import GroupSums, MergeSums
from blockmerge.explaining.known_presets import Match, matching_presets
from blockmerge.explaining.linear_fit import Fit

_MOST_PARENTS = 4
_MOST_COMBINATIONS = 4000
_LEAST = 0.005  # coefficients are looked at this coarsely even where they are known better


@dataclass(frozen=True)
class Parents:
    """The parents of a merge, how they were combined, and which presets its weights may be.

    `candidates` are the parents' places among the candidates, the base first.
    """

    candidates: tuple[int, ...]
    method: str
    presets: tuple[Match, ...] = ()

    @property
    def base(self) -> int:
        """What weight 0 stands for."""
        return self.candidates[0]

    def coefficients_for(self, weight: float) -> Array:
        """How much of each parent a block takes at a weight: of two parents, or of add difference."""
        return np.array([1.0, weight, -weight] if self.method == "add_difference" else [1.0 - weight, weight])


def find_parents(sums: MergeSums, family: Family, at_least: int = 1) -> Parents | None:
    """Return the parents of the U-Net, `at_least` so many, or None when no few candidates explain it."""
    return (
        _with_weights_by_block(sums, family, at_least)
        or _with_weights_by_tensor(sums, max(2, at_least))
        or _many_parents(sums, family)
    )


def nearest_pair(sums: MergeSums) -> Parents:
    """Return the candidate nearest to the merge, and the one that explains most of what is left."""
    unet = sums.unet_blocks
    candidates = range(unet.products.shape[1])
    nearest = min(candidates, key=lambda n: float(unet.products[:, n, n].sum()))
    others = [n for n in candidates if n != nearest]
    if not others:
        return Parents((nearest,), "copy")
    second = min(others, key=lambda n: float((unet.fit((nearest, n)).error ** 2).sum()))
    return Parents((nearest, second), "weighted_sum")


def _with_weights_by_block(sums: MergeSums, family: Family, at_least: int) -> Parents | None:
    fits = _fewest_that_fit(sums.unet_blocks, at_least, _MOST_PARENTS)
    return _most_plausible(fits, sums, family) if fits else None


def _with_weights_by_tensor(sums: MergeSums, at_least: int) -> Parents | None:
    fits = _fewest_that_fit(sums.unet_tensors, at_least, _MOST_PARENTS)
    if not fits:
        return None
    candidates = fits[0].candidates
    base = candidates[int(np.argmax(fits[0].coefficients.mean(axis=0)))]
    others = (n for n in candidates if n != base)
    return Parents((base, *others), _plain_method(len(candidates)))


def _many_parents(sums: MergeSums, family: Family) -> Parents | None:
    """Fit all candidates at once, then leave out those of which no block took anything."""
    unet = sums.unet_blocks
    able = unet.complete_candidates
    if len(able) <= _MOST_PARENTS:
        return None
    found = unet.fit(able)
    taken = np.abs(found.coefficients) > np.maximum(found.uncertainty, _LEAST)
    used = np.flatnonzero(taken[found.determined].any(axis=0))
    if len(used) < 2:
        return None
    found = unet.fit(tuple(able[place] for place in used))
    return _most_plausible([found], sums, family) if _fits(found, unet) else None


def _fewest_that_fit(groups: GroupSums, least: int, most: int) -> list[Fit]:
    """Return the fits of the fewest candidates, from `least` to `most`, that leave nothing but rounding.

    Of as many candidates, those that fit about as well as the best.
    """
    able = groups.complete_candidates
    for size in range(least, min(most, len(able)) + 1):
        if comb(len(able), size) > _MOST_COMBINATIONS:
            return []
        fits = [found for some in combinations(able, size) if _fits(found := groups.fit(some), groups)]
        if fits:
            errors = [float((found.error**2).sum()) for found in fits]
            enough = 1.02 * min(errors) + 1e-6 * float(groups.elements.sum())
            return [found for found, error in zip(fits, errors, strict=True) if error <= enough]
    return []


def _fits(found: Fit, groups: GroupSums) -> bool:
    return bool(found.explained(groups.elements).all() and found.determined.any())


@dataclass(frozen=True)
class _Reading:
    """A fit read as a merge of which one of the candidates is the base.

    `weights` and their `uncertainty` are those of the U-Net's blocks, for methods with one weight a block.
    """

    candidates: tuple[int, ...]
    method: str
    weights: Array
    uncertainty: Array

    @classmethod
    def of(cls, found: Fit, base: int) -> _Reading:
        """Read a fit with the candidate at the place `base` (of its own) as the base."""
        order = [base, *(place for place in range(len(found.candidates)) if place != base)]
        candidates = tuple(found.candidates[place] for place in order)
        coefficients, uncertainty = found.coefficients[:, order], found.uncertainty[:, order]
        if _takes_all_of_base(found, base) and len(candidates) == 3:
            weights = (coefficients[:, 1] - coefficients[:, 2]) / 2
            if np.mean(weights[found.determined]) < 0:
                candidates, weights = (candidates[0], candidates[2], candidates[1]), -weights
            return cls(candidates, "add_difference", weights, uncertainty[:, 1:].max(axis=1))
        weights = coefficients[:, 1] if len(candidates) > 1 else np.zeros(len(coefficients))
        return cls(candidates, _plain_method(len(candidates)), weights, uncertainty.max(axis=1))


def _takes_all_of_base(found: Fit, base: int) -> bool:
    """Whether every block takes the base with coefficient 1, as add difference does."""
    known = found.determined
    off = np.abs(found.coefficients[known, base] - 1)
    return bool(known.any() and (off <= np.maximum(found.uncertainty[known, base], _LEAST)).all())


def _plain_method(count: int) -> str:
    return {1: "copy", 2: "weighted_sum", 3: "triple_sum"}.get(count, "linear")


@dataclass(frozen=True, order=True)
class _Doubts:
    """What speaks against a reading. Compared field by field: the first that differs decides."""

    unexplained_outside: int  # components outside the U-Net; which candidate is the base does not matter
    weights_outside_0_to_1: int
    is_no_add_difference: bool
    is_no_preset: bool
    is_no_scaled_preset: bool
    vae_is_not_of_base: bool  # many presets are another's mirror image; merges leave the VAE to the base
    lack_of_base: float  # how little the blocks take of the base
    place_of_base: int  # among the candidates, as the user named them

    @classmethod
    def about(cls, reading: _Reading, found: Fit, presets: Sequence[Match], sums: MergeSums) -> _Doubts:
        """Look for what speaks against reading a fit so."""
        base, known = reading.candidates[0], found.determined
        adds = reading.method == "add_difference"
        shares = found.coefficients[known, found.candidates.index(base)]
        return cls(
            unexplained_outside=sums.unexplained(found.candidates),
            weights_outside_0_to_1=0 if adds else _count_outside(found),
            is_no_add_difference=not adds,
            is_no_preset=all(match.is_scaled for match in presets),
            is_no_scaled_preset=not presets,
            vae_is_not_of_base=not sums.is_copy("vae", base),
            lack_of_base=-round(float(shares.mean()) if len(shares) else 0.0, 1),
            place_of_base=base,
        )


def _count_outside(found: Fit) -> int:
    """How many known coefficients are not from 0 to 1, by more than rounding can explain."""
    tolerance = np.maximum(np.where(np.isfinite(found.uncertainty), found.uncertainty, 0.0), _LEAST)
    inside = (found.coefficients >= -tolerance) & (found.coefficients <= 1 + tolerance)
    return int((~inside & found.determined[:, None]).sum())


def _most_plausible(fits: Sequence[Fit], sums: MergeSums, family: Family) -> Parents:
    """Read every fit with each of its candidates as the base, and return the least doubtful parents."""
    choices: list[tuple[_Doubts, Parents]] = []
    for found in fits:
        for base in range(len(found.candidates)):
            reading = _Reading.of(found, base)
            presets = _presets_of(reading, found, sums, family)
            parents = Parents(reading.candidates, reading.method, tuple(presets))
            choices.append((_Doubts.about(reading, found, presets, sums), parents))
    return min(choices, key=lambda choice: choice[0])[1]


def _presets_of(reading: _Reading, found: Fit, sums: MergeSums, family: Family) -> list[Match]:
    """The presets that the weights may be."""
    if reading.method not in ("weighted_sum", "add_difference"):
        return []
    blocks = sums.blocks.names
    of_unet = [block != "BASE" for block in blocks]
    weights, uncertainty = np.full(len(blocks), np.nan), np.zeros(len(blocks))
    known = np.zeros(len(blocks), dtype=np.bool_)
    weights[of_unet], uncertainty[of_unet] = reading.weights, reading.uncertainty
    known[of_unet] = found.determined
    return matching_presets(family, blocks, weights, uncertainty, known)

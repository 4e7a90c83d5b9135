"""Fitting a merge as a combination of candidates, from the Gram matrix of their differences. Numpy only.

M = Σ cᵢXᵢ with Σ cᵢ = 1 covers weighted sum, add difference (1, w, −w), triple sum and averages. With G_ij =
⟨X_i − M, X_j − M⟩ (in units of a rounding step) the squared error of coefficients c is cᵀGc. Taking one model
a as the base, wᵢ = cᵢ for the others solves H·w = h with H_ij = ⟨X_i − X_a, X_j − X_a⟩ = G_ij − G_ia − G_aj +
G_aa and hᵢ = ⟨M − X_a, X_i − X_a⟩ = G_aa − G_ia.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blockmerge.comparing.arrays import Array, Flags

_COLLINEAR = 1e-10  # of the largest eigenvalue: beyond float64's and the sums' own precision

_MOST_UNCERTAIN = 0.5  # a weight that rounding may have moved so far is not known

ROUNDING = 0.75
"""Root mean square error in steps up to which rounding explains it.

Once rounded it is 0.29, in the halves-only arithmetic of other tools (three roundings) up to about 0.5.
"""


@dataclass(frozen=True)
class Fit:
    """The best coefficients of some candidates, for each of a number of groups of tensors.

    `coefficients[group, n]` is how much of `candidates[n]` the group takes, the sum being 1;
    `uncertainty[group, n]` bounds what rounding may have done to it. `error[group]` is ‖M − Σ cᵢXᵢ‖ in steps;
    `coarsest[group]` the mean square of the coarsest candidate's step, in the merge's steps.
    """

    candidates: tuple[int, ...]
    coefficients: Array
    uncertainty: Array
    error: Array
    coarsest: Array

    def explained(self, elements: Array) -> Flags:
        """Whether rounding alone can have left the error in each group of so many elements."""
        return np.asarray(self.error <= ROUNDING * np.sqrt(elements * self.coarsest))

    @property
    def determined(self) -> Flags:
        """The groups in which all coefficients are known."""
        return np.asarray((self.uncertainty < _MOST_UNCERTAIN).all(axis=1))


def fit(gram: Array, differing: Array, coarseness: Array, candidates: tuple[int, ...]) -> Fit:
    """Fit some of the candidates to every group.

    `gram` is [group, k, k] in squares of steps of the merge's dtype; `differing` [group] counts the values
    that candidates differ in; `coarseness` [group, k] is the mean of (step of a candidate's dtype ÷ step of
    the merge's)², at least 1.
    """
    part = gram[:, candidates][:, :, candidates]
    coarsest = coarseness[:, candidates].max(axis=1)
    if len(candidates) == 1:
        error = np.sqrt(np.maximum(part[:, 0, 0], 0.0))
        return Fit(candidates, np.ones((len(part), 1)), np.zeros((len(part), 1)), error, coarsest)
    base = part[:, :1, :1]
    matrix = part[:, 1:, 1:] - part[:, 1:, :1] - part[:, :1, 1:] + base
    target = (base - part[:, 1:, :1])[:, :, 0]
    inverse, lost = _inverse(matrix)
    weights = np.einsum("gij,gj->gi", inverse, target)
    coefficients = np.concatenate([1.0 - weights.sum(axis=1, keepdims=True), weights], axis=1)
    error = np.sqrt(np.maximum(np.einsum("gi,gij,gj->g", coefficients, part, coefficients), 0.0))
    # Rounding moves every value of M by at most half a step; all of that could point in the worst direction.
    noise = np.maximum(error, 0.5 * np.sqrt(differing * coarsest))
    spread = np.sqrt(np.maximum(np.einsum("gii->gi", inverse), 0.0))
    of_base = np.sqrt(np.maximum(inverse.sum(axis=(1, 2)), 0.0))
    uncertainty = noise[:, None] * np.concatenate([of_base[:, None], spread], axis=1)
    uncertainty[:, 1:][lost] = np.inf
    uncertainty[lost.any(axis=1), 0] = np.inf
    return Fit(candidates, coefficients, uncertainty, error, coarsest)


def _inverse(matrix: Array) -> tuple[Array, Flags]:
    """Return the pseudo-inverse of every group's matrix, and which rows of it are not determined."""
    # Scaled to a diagonal of ones first: candidates may be near or far.
    scale = np.sqrt(np.maximum(np.einsum("gii->gi", matrix), 0.0))
    safe = np.where(scale > 0, scale, 1.0)
    values, vectors = np.linalg.eigh(matrix / safe[:, :, None] / safe[:, None, :])
    usable = values > _COLLINEAR * np.maximum(values[:, -1:], 1e-300)
    inverse_values = np.where(usable, 1.0 / np.where(usable, values, 1.0), 0.0)
    inverse = (
        np.einsum("gik,gk,gjk->gij", vectors, inverse_values, vectors) / safe[:, :, None] / safe[:, None, :]
    )
    # A direction in which the candidates do not differ at all leaves every model that lies in it unknown.
    lost = np.einsum("gik,gk->gi", vectors**2, ~usable) > 1e-6
    return inverse, np.asarray(lost | (scale == 0))

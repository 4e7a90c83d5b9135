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

MANTISSA = {
    "F8_E4M3": (3, -6),
    "F8_E5M2": (2, -14),
    "F16": (10, -14),
    "BF16": (7, -126),
    "F32": (23, -126),
    "F64": (52, -1022),
}
"""Bits of a dtype's mantissa, and the exponent of its smallest normal number."""

_COLLINEAR = 1e-10  # of the largest eigenvalue: beyond float64's and the sums' own precision

_MOST_UNCERTAIN = 0.5  # a weight that rounding may have moved so far is not known

ROUNDING = 0.75
"""Root mean square error in steps up to which rounding explains it: once rounded it is 0.29, in the
halves-only arithmetic of other tools (three roundings) up to about 0.5.
"""


@dataclass(frozen=True)
class Fit:
    """The best coefficients over a subset of the candidates, for each of U units (blocks, components,
    tensors).

    `coefficients[U, n]` sum to 1; `uncertainty[U, n]` bounds what rounding may have done to each; `error[U]`
    is ‖M − Σ cᵢXᵢ‖ in steps; `coarsest[U]` the mean square of the coarsest candidate's step, in the merge's
    steps.
    """

    subset: tuple[int, ...]
    coefficients: Array
    uncertainty: Array
    error: Array
    coarsest: Array

    def explained(self, elements: Array) -> Flags:
        """Whether rounding alone can have left the error in each unit of so many elements."""
        return np.asarray(self.error <= ROUNDING * np.sqrt(elements * self.coarsest))

    @property
    def determined(self) -> Flags:
        """The units in which all coefficients are known."""
        return np.asarray((self.uncertainty < _MOST_UNCERTAIN).all(axis=1))


def fit(gram: Array, apart: Array, coarseness: Array, subset: tuple[int, ...]) -> Fit:
    """Fit every unit.

    `gram` is [U, k, k] in squares of steps of the merge's dtype; `apart` [U] counts the values that
    candidates differ in; `coarseness` [U, k] is the mean of (step of a candidate's dtype ÷ step of the
    merge's)², at least 1.
    """
    part = gram[:, subset][:, :, subset]
    coarsest = coarseness[:, subset].max(axis=1)
    units, count = part.shape[:2]
    if count == 1:
        return Fit(
            subset,
            np.ones((units, 1)),
            np.zeros((units, 1)),
            np.sqrt(np.maximum(part[:, 0, 0], 0.0)),
            coarsest,
        )
    base = part[:, :1, :1]
    matrix = part[:, 1:, 1:] - part[:, 1:, :1] - part[:, :1, 1:] + base
    target = (base - part[:, 1:, :1])[:, :, 0]
    # Scaled to a diagonal of ones first: candidates may be near or far.
    scale = np.sqrt(np.maximum(np.einsum("uii->ui", matrix), 0.0))
    safe = np.where(scale > 0, scale, 1.0)
    values, vectors = np.linalg.eigh(matrix / safe[:, :, None] / safe[:, None, :])
    usable = values > _COLLINEAR * np.maximum(values[:, -1:], 1e-300)
    inverse_values = np.where(usable, 1.0 / np.where(usable, values, 1.0), 0.0)
    inverse = (
        np.einsum("uik,uk,ujk->uij", vectors, inverse_values, vectors) / safe[:, :, None] / safe[:, None, :]
    )
    weights = np.einsum("uij,uj->ui", inverse, target)
    coefficients = np.concatenate([1.0 - weights.sum(axis=1, keepdims=True), weights], axis=1)
    error = np.sqrt(np.maximum(np.einsum("ui,uij,uj->u", coefficients, part, coefficients), 0.0))
    # Rounding moves every value of M by at most half a step; all of that could point in the worst direction.
    noise = np.maximum(error, 0.5 * np.sqrt(apart * coarsest))
    spread = np.sqrt(np.maximum(np.einsum("uii->ui", inverse), 0.0))
    of_base = np.sqrt(np.maximum(inverse.sum(axis=(1, 2)), 0.0))
    uncertainty = noise[:, None] * np.concatenate([of_base[:, None], spread], axis=1)
    # A direction in which the candidates do not differ at all leaves every model that lies in it unknown.
    lost = np.einsum("uik,uk->ui", vectors**2, ~usable) > 1e-6
    lost |= scale == 0
    uncertainty[:, 1:][lost] = np.inf
    uncertainty[lost.any(axis=1), 0] = np.inf
    return Fit(subset, coefficients, uncertainty, error, coarsest)

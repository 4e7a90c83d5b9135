"""Which models belong together: average linkage, and an order in which those that are alike are neighbours.

Average linkage is UPGMA: R. R. Sokal and C. D. Michener, "A statistical method for evaluating systematic
relationships", University of Kansas Science Bulletin 38 (1958). Turning each pair of groups so that their
nearest ends meet is a greedy form of Z. Bar-Joseph et al., "Fast optimal leaf ordering for hierarchical
clustering", Bioinformatics 17 (2001).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from blockmerge.comparing.arrays import Array
from blockmerge.comparing.results import SimilarityMatrix


@dataclass(frozen=True)
class Join:
    """Two groups that become one at `height`, the mean distance between their members.

    Groups are numbered as in a linkage matrix: below n the leaves, from left to right, and n + k is the k-th
    join.
    """

    groups: tuple[int, int]
    height: float


@dataclass(frozen=True)
class Dendrogram:
    """A tree of n models: `order` are their places in the matrix, from left to right; `joins` go upwards."""

    order: tuple[int, ...]
    joins: tuple[Join, ...]


def dendrogram_of(result: SimilarityMatrix) -> Dendrogram:
    """Return the tree of the models of a matrix, without those that could not be compared.

    >>> dendrogram_of(blockmerge.similarity_matrix("models/")).order  # doctest: +SKIP
    (0, 3, 1, 2)

    A distance is what a similarity lacks of 100 percent, or of a cosine of 1. Two models that have none count
    as being as far apart as any two.
    """
    compared = [place for place, name in enumerate(result.names) if name not in result.errors]
    whole = 100.0 if result.method == "attention" else 1.0
    alike = np.array(
        [[result.similarity[row][column] for column in compared] for row in compared], dtype=np.float64
    ).reshape(len(compared), len(compared))
    distances = whole - alike
    distances[np.isnan(distances)] = np.nanmax(distances, initial=0.0)
    tree = average_linkage(distances)
    return Dendrogram(tuple(compared[place] for place in tree.order), tree.joins)


def average_linkage(distances: Array) -> Dendrogram:
    """Join the two groups with the least mean distance until all are one. `distances`: [n, n], symmetric."""
    count = len(distances)
    groups: dict[int, tuple[int, ...]] = {place: (place,) for place in range(count)}
    numbers = {place: place for place in range(count)}
    between = distances.astype(np.float64)
    np.fill_diagonal(between, np.inf)
    joined: list[tuple[int, int, float]] = []
    for number in range(count, 2 * count - 1):
        one, other = sorted(int(place) for place in np.unravel_index(np.argmin(between), between.shape))
        joined.append((numbers[one], numbers[other], float(between[one, other])))
        first, second = groups[one], groups.pop(other)
        means = (len(first) * between[one] + len(second) * between[other]) / (len(first) + len(second))
        between[one], between[:, one] = means, means
        between[one, one], between[other], between[:, other] = np.inf, np.inf, np.inf
        groups[one], numbers[one] = _facing(first, second, distances), number
    order = groups.get(0, ())
    if order and order[0] > order[-1]:
        order = order[::-1]
    leaves = {place: leaf for leaf, place in enumerate(order)}
    return Dendrogram(
        order, tuple(Join((leaves.get(a, a), leaves.get(b, b)), height) for a, b, height in joined)
    )


def _facing(first: tuple[int, ...], second: tuple[int, ...], distances: Array) -> tuple[int, ...]:
    """Two groups side by side, each turned so that the ends that meet are nearest."""
    sides = product((first, first[::-1]), (second, second[::-1]))
    left, right = min(sides, key=lambda side: float(distances[side[0][-1], side[1][0]]))
    return left + right

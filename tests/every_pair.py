"""Combinations of parameters in which every two values meet, in place of all combinations."""

from __future__ import annotations

import itertools
from functools import cache


def every_pair(*axes):
    """Rows with one value of each of two axes or more, so that any two values of two axes are together in
    some row.

    A fault that shows with two particular values is found as by the full product, in far fewer rows.
    """
    places = _places(tuple(map(len, axes)))
    return [tuple(axis[at] for axis, at in zip(axes, row, strict=True)) for row in places]


@cache
def _places(sizes):
    pairs_of = {
        row: set(itertools.combinations(enumerate(row), 2)) for row in itertools.product(*map(range, sizes))
    }
    missing = set().union(*pairs_of.values())
    chosen = []
    while missing:
        chosen.append(max(pairs_of, key=lambda row: len(missing & pairs_of[row])))
        missing -= pairs_of[chosen[-1]]
    return sorted(chosen)

"""Combinations of parameters in which every two values meet, in place of all combinations."""

from __future__ import annotations

import itertools


def every_pair(*axes):
    """Rows with one value of each axis, so that any two values of two axes are together in some row.

    A fault that shows with two particular values is found as by the full product, in far fewer rows.
    """
    sizes = [range(len(axis)) for axis in axes]
    rows = list(itertools.product(*sizes))
    missing = {pair for row in rows for pair in _pairs(row)}
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(missing & _pairs(row))))
        missing -= _pairs(chosen[-1])
    return [tuple(axis[at] for axis, at in zip(axes, row, strict=True)) for row in sorted(chosen)]


def _pairs(row):
    return set(itertools.combinations(enumerate(row), 2))

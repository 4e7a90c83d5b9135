"""The rows that stand for a full product do hold every pair of it."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from tests.every_pair import every_pair


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_any_two_values_meet(sizes):
    axes = [[f"{axis}{at}" for at in range(size)] for axis, size in enumerate(sizes)]
    rows = every_pair(*axes)
    assert len(set(rows)) == len(rows)
    for one, other in itertools.combinations(range(len(axes)), 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(axes[one], axes[other]))

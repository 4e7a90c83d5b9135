"""The check that every computed chunk goes through: finds every NaN and infinity, and accuses no finite
value.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockmerge.streaming.tensors import all_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", ["largest", "alternating", "small"])
def test_finite_values_are_finite_however_large_their_sum(dtype, fill):
    largest = torch.finfo(dtype).max
    values = torch.full((5000,), largest if fill != "small" else 0.25, dtype=torch.float64)
    if fill == "alternating":
        values[::2] *= -1
    assert all_finite(values.to(dtype))


@given(st.integers(1, 5000), st.data(), st.sampled_from(DTYPES))
def test_one_bad_value_is_found_wherever_it_is(count, data, dtype):
    bad = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), float("-inf")]
    tensor = torch.full((count,), -1.5).to(dtype)
    assert all_finite(tensor)
    tensor[data.draw(st.integers(0, count - 1))] = data.draw(st.sampled_from(bad))
    assert not all_finite(tensor)


def test_infinities_that_cancel_are_found():
    tensor = torch.zeros(1000, dtype=torch.float16)
    tensor[3], tensor[900] = float("inf"), float("-inf")
    assert not all_finite(tensor)

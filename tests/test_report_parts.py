"""What reports are put together from: short names, scales, and tables cut for paper."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockmerge.rendering.bars import BarScale
from blockmerge.rendering.block_charts import BlockChart
from blockmerge.rendering.candidates import candidates_of
from blockmerge.rendering.heat_tables import HeatTable, labels_of
from blockmerge.rendering.short_names import short_names
from tests.report_results import an_explanation


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.safetensors", "b.safetensors"], ["a", "b"]),
        (["sd15_anime_v2-fp16.safetensors", "sd15_photo-fp16.safetensors"], ["anime_v2", "photo"]),
        (["model_v1.ckpt", "model_v2.ckpt", "model_v12.ckpt"], ["v1", "v2", "v12"]),
        (["mix.safetensors", "mix.ckpt"], ["safetensors", "ckpt"]),
        (["base.safetensors", "base-v2.safetensors"], ["base", "base-v2"]),
        (["a-fp16.safetensors", "a-fp16.safetensors (2)"], ["fp16", "fp16 (2)"]),
        (["only_one-of-them.safetensors"], ["only_one-of-them"]),
        (["a folder", "another"], ["a folder", "another"]),
        (["x" * 60 + ".pt", "y.pt"], ["x" * 12 + "…" + "x" * 12, "y"]),
        (["---", "-"], ["---", "-"]),
        ([], []),
    ],
)
def test_short_names(names, short):
    assert short_names(names) == short


@given(st.lists(st.text("ab_-. ", min_size=1, max_size=12), unique=True, max_size=6))
def test_different_names_stay_different(names):
    short = short_names(names)
    assert len(short) == len(names)
    assert all(short)
    whole = [one for one in names if one.strip(" _.+-") == one]
    if len(whole) == len(names):
        assert len(set(short)) == len(set(names))


@given(st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 7)), min_size=1, max_size=30))
def test_every_value_is_on_the_scale(values):
    blocks = [f"L{n:02}" for n in range(len(values))]
    chart = BlockChart(blocks, [(labels_of(["a"])[0], dict(zip(blocks, values, strict=True)))])
    assert 2 <= len(chart.ticks) <= 7
    assert len({tick.text for tick in chart.ticks}) == len(chart.ticks)
    ticks = [(float(tick.text), tick.y) for tick in chart.ticks]
    for (low, y), (high, above) in pairwise(ticks):
        assert low < high
        assert y > above
    for _, y, _, value in chart.points(chart.curves[0]):
        assert ticks[-1][1] <= y <= ticks[0][1]
        expected = ticks[0][1] + (ticks[-1][1] - ticks[0][1]) * (value - ticks[0][0]) / (
            ticks[-1][0] - ticks[0][0]
        )
        assert y == pytest.approx(expected, abs=0.2)


def test_a_curve_is_broken_where_there_is_no_value():
    label = labels_of(["a", "b"])
    chart = BlockChart(["A", "B", "C", "D"], [(label[0], {"A": 0.0, "B": 1.0, "D": 0.5}), (label[1], {})])
    assert [step[0] for step in chart.line(chart.curves[0]).split() if step[0] in "ML"] == ["M", "L", "M"]
    assert chart.line(chart.curves[1]) == ""


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([0.2, 0.7], 0, 1), ([-1.0, 0.5], -1, 1), ([-0.2, 3.0], -3, 3), ([1.5, None], 0, 1.5), ([], 0, 1)],
)
def test_the_scale_of_bars(values, low, high):
    scale = BarScale.of(values)
    assert (scale.low, scale.high) == (low, high)
    assert scale.is_both_ways == (low < 0)


def test_bars_of_what_is_usual():
    weights = BarScale.of([1.5, 1.0])
    assert [weights.is_unusual(value) for value in (1.5, 1.0, 0.0, -0.1, None)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert not BarScale.of([250.0], usual=None).is_unusual(250.0)
    assert BarScale.of([0.0, None], usual=None).high == 1.0


@pytest.mark.parametrize(
    ("span", "method", "count", "text"),
    [
        (30.0, "attention", 20, "70.0"),
        (0.4, "attention", 20, "99.60"),
        (30.0, "attention", 4, "70.00"),
        (0.3, "weights", 20, "0.700"),
        (0.002, "weights", 20, "0.99800"),
        (1e-9, "weights", 20, "1.000000"),
        (0.3, "weights", 4, "0.700000"),
    ],
)
def test_as_many_digits_as_tell_values_apart(span, method, count, text):
    best = 100.0 if method == "attention" else 1.0
    labels = labels_of([f"m{n}" for n in range(count)])
    values = [
        [best - span if (row + column) % 2 else best for column in range(count)] for row in range(count)
    ]
    table = HeatTable(labels, labels, values, method)
    assert table.text(values[0][1]) == text


@pytest.mark.parametrize("count", [1, 2, 20, 31, 60, 200])
def test_every_cell_is_printed_once(count):
    labels = labels_of([f"m{n}" for n in range(count)])
    table = HeatTable(labels, labels, [[50.0] * count] * count, "attention", square=True)
    cells = [(row, column) for down, across in table.pages for row in down for column in across]
    assert sorted(cells) == [(row, column) for row in range(count) for column in range(count)]
    assert all(len(down) <= 30 for down, _ in table.pages)
    assert all(table.name_width + table.cell_width * len(across) <= 126 for _, across in table.pages)
    assert (len(table.pages) == 1) == (count <= 20)


def test_what_is_said_of_candidates():
    found = {one.name: one for one in candidates_of(an_explanation(2, lowest=-1.0))}
    base, one, other, unused, *_ = found.values()
    assert [a.finding for a in (base, one, other, unused)] == [
        "parent, the base",
        "parent",
        "parent",
        "not needed",
    ]
    assert sum(a.mean for a in (base, one, other)) == pytest.approx(1)
    nearest, second, third, *_ = candidates_of(an_explanation(is_merge=False))
    assert [a.finding for a in (nearest, second, third)] == [
        "the nearest", "with the nearest, the best two", "explains no more than these",
    ]  # fmt: skip

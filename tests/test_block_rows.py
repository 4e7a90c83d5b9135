"""Blocks that no family draws in two arms are drawn in rows, on the terminal and in HTML."""

from __future__ import annotations

import io
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from rich.console import Console

from blockmerge.anatomy import FAMILIES, register, unregister
from blockmerge.explaining.explanation import BlockOrigin, Explanation
from blockmerge.rendering.block_rows import drawn_blocks
from blockmerge.rendering.html_page import explanation_html
from blockmerge.rendering.terminal import _print_change
from blockmerge.rendering.u_net import SharesU, WeightsU

FLUX = ["BASE", "IN", *(f"D{n:02}" for n in range(19)), *(f"S{n:02}" for n in range(38)), "OUT"]


@pytest.fixture
def counted():
    family = replace(
        FAMILIES["sd1"],
        name="rowed",
        title="Toy Rows",
        called="Rows",
        blocks=tuple(FLUX),
        arms=None,
        carried={},
    )
    register(family)
    yield family
    unregister("rowed")


def drawn(picture, width=80, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(width=width, file=file)
    console.print(picture)
    file.flush()
    return [line.rstrip() for line in file.buffer.getvalue().decode(encoding).splitlines()]


def test_ten_blocks_a_row():
    weights = {block: place / 100 for place, block in enumerate(FLUX)}
    lines = drawn(WeightsU({**weights, "D01": None, "S37": 1.5, "OUT": -0.125}))
    assert [line.split()[0] for line in lines] == [
        "BASE", "IN", "D00", "D10", "S00", "S10", "S20", "S30", "OUT",
    ]  # fmt: skip
    assert all(len(line) <= 80 for line in lines)
    numbers = [word.strip("▁▂▃▄▅▆▇█") for word in lines[2].split()[1:]]
    assert numbers == ["0.02", "skip", *(f"{n / 100:g}" for n in range(4, 12))]
    assert lines[7].endswith("1.5█")
    assert "-0.125" in lines[8]
    # all of a column stand one below another
    places = {line.index(name) for line, name in zip(lines[2:4], ("0.02", "0.12"), strict=True)}
    assert len(places) == 1


@pytest.mark.parametrize(("width", "rows"), [(80, 1), (79, 1), (60, 2), (45, 2), (30, 5), (12, 10)])
def test_narrow_terminals_get_fewer_in_a_row(width, rows):
    lines = drawn(WeightsU(dict.fromkeys([f"L{n:02}" for n in range(10)], 0.125)), width)
    assert len(lines) == rows
    assert all(len(line) <= max(width, 15) for line in lines)


def test_names_of_any_length_and_three_digits():
    names = [f"visual.blocks.{n:02}" for n in range(12)]
    lines = drawn(WeightsU(dict.fromkeys(["BASE", *names], 0.5)))
    assert [line.split()[0] for line in lines] == ["BASE", *names[::5]]
    lines = drawn(WeightsU(dict.fromkeys([f"L{n:03}" for n in range(120)], 0.5)))
    assert [line.split()[0] for line in lines] == [f"L{n:03}" for n in range(0, 120, 10)]


def test_blocks_that_are_missing_leave_a_gap():
    lines = drawn(SharesU({"D01": 0.25, "D03": 0.75, "S12": None}))
    assert [line.split()[0] for line in lines] == ["D00", "S10"]
    assert lines[0].index("25.0%") == lines[1].index("?") - 4 - 7
    assert lines[0].endswith("75.0%█")


def test_consoles_that_know_only_ascii():
    (line,) = drawn(WeightsU({"L00": 0.5, "L01": 0, "L02": 1.0, "L03": 0.001}), encoding="ascii")
    assert line.split() == ["L00", "0.5=", "0", "1#", "0.001."]


def test_only_a_family_with_arms_adds_what_a_result_does_not_have(counted):
    assert drawn_blocks("rowed", ["D01", "S02"]) == ("D01", "S02")
    assert drawn_blocks("sd1", ["IN04"]) == FAMILIES["sd1"].blocks
    assert drawn_blocks("gone", ["IN04"]) == ("IN04",)


def test_what_loras_change_is_drawn_along_the_results_own_blocks(counted):
    few = {block: 0.0 for block in FLUX if block not in ("D18", "S37")}
    result = SimpleNamespace(family="rowed", weights=few, change={"D03": 0.5}, loras=())
    console = Console(width=80, record=True, file=io.StringIO())
    _print_change(console, result)
    text = console.export_text()
    assert "50.0%█" in text
    assert [line.split()[0] for line in text.splitlines()[1:]] == [
        "BASE", "IN", "D00", "D10", "S00", "S10", "S20", "S30", "OUT",
    ]  # fmt: skip


class Blocks(HTMLParser):
    """The blocks of each row of a page."""

    def __init__(self):
        super().__init__()
        self.rows, self.in_name = [], False

    def handle_starttag(self, tag, attributes):
        if tag == "div" and ("class", "row") in attributes:
            self.rows.append([])
        self.in_name = tag == "b"

    def handle_data(self, data):
        if self.in_name and data.strip():
            self.rows[-1].append(data.strip())


def test_the_page_of_an_explanation(counted):
    blocks = [block for block in FLUX if block != "D18"]
    origins = {block: BlockOrigin({"b": 0.25}, 0.0, 0.0, True, True) for block in blocks}
    found = Explanation(
        merge="m", family="rowed", candidates=("a", "b"), base="a", method="weighted_sum", exact=True,
        preset=None, parents=("a", "b"), blocks=origins, components={}, verdict="so",
    )  # fmt: skip
    page = Blocks()
    page.feed(explanation_html(found).partition("How much of b")[2])
    tens = [blocks[place : place + 10] for place in (2, 12, 20, 30, 40, 50)]
    tens[1] = tens[1][:8]
    assert page.rows == [["BASE"], ["IN"], *tens[:-1], blocks[50:-1], ["OUT"]]

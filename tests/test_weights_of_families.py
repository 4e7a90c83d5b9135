"""Weights know blocks by their family: any list of blocks works, and is carried over where the family says
how.

The toy families have the blocks that are usual for transformers.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import blockmerge
from blockmerge import BlockWeights, PresetError, WeightsError
from blockmerge.anatomy import FAMILIES, register, unregister
from blockmerge.explaining.known_presets import matching_presets
from blockmerge.weights import (
    SDXL_MAPS,
    Adjust,
    ElementRules,
    WeightsRequest,
    find_preset,
    parse_weights,
    presets,
)
from blockmerge.weights.presets import user_folder
from tests import oracle
from tests.commands import ok

DOUBLE = ["BASE", "IN", *(f"P{n:02}" for n in range(19)), *(f"Q{n:02}" for n in range(40)), "OUT"]
LAYERS = ["BASE", "IN", "CONT", "NOISE", *(f"L{n:02}" for n in range(30)), "OUT"]
SMALL = ["BASE", "X00", "X01"]


def toy(name, called, blocks, **data):
    return replace(
        FAMILIES["sd1"], name=name, title=f"Toy {called}", called=called, blocks=tuple(blocks), **data
    )


@pytest.fixture(autouse=True, scope="module")
def toys():
    carried = {
        "name": {"BASE": "BASE", "X00": "M00", "X01": "OUT11"},
        "resolution": {"BASE": "BASE", "X00": "IN00", "X01": "OUT00"},
    }
    families = [
        toy("double", "Double", DOUBLE, carried={}, adjusted={}),
        toy("layers", "Layers", LAYERS, carried={}, adjusted={}),
        toy("small", "Small", SMALL, carried={"sd1": carried}, adjusted={}),
    ]
    for family in families:
        register(family)
    yield
    for family in families:
        unregister(family.name)


@pytest.mark.parametrize(("family", "blocks"), [("double", DOUBLE), ("layers", LAYERS), ("small", SMALL)])
@given(st.data())
def test_one_number_and_lists(family, blocks, data):
    number = st.floats(-2, 3).map(lambda value: value + 0.0)
    assert (
        dict(parse_weights("0.5", family)) == dict(parse_weights(0.5, family)) == dict.fromkeys(blocks, 0.5)
    )
    numbers = data.draw(st.lists(number, min_size=len(blocks), max_size=len(blocks)))
    expected = dict(zip(blocks, numbers, strict=True))
    for written in (numbers, tuple(numbers), ",".join(map(repr, numbers)), np.array(numbers), expected):
        found = parse_weights(written, family)
        assert dict(found) == expected
        assert list(found) == blocks
    for written in (numbers[1:], ",".join(map(repr, numbers[1:]))):
        assert dict(parse_weights(written, family)) == {**expected, "BASE": 0.0}
    assert parse_weights(BlockWeights.from_numbers(numbers), family) == BlockWeights(expected)


def test_names_and_ranges():
    found = parse_weights("base=1, p3=0.5 P17-q1=.25\nIN=skip,out=-1", "double")
    expected = dict.fromkeys(DOUBLE, 0.0) | {"BASE": 1.0, "P03": 0.5, "IN": None, "OUT": -1.0}
    assert dict(found) == expected | dict.fromkeys(["P17", "P18", "Q00", "Q01"], 0.25)
    assert parse_weights({"p3": 0.5, "out": "skip"}, "double")["P03"] == 0.5
    assert parse_weights("L5-L4=1,noise=0.5", "layers").replace({"L04": 0})["L05"] == 1
    assert parse_weights("Q39=random(0.2,0.8)", "double", seed=3)["Q39"] == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize(
    ("value", "family", "says"),
    [
        ("P19=1", "double", "unknown block 'P19'; did you mean '"),
        ("Z=1", "double", "unknown block 'Z': Double has BASE, IN, P00-P18, Q00-Q39, OUT"),
        ("m0=1", "double", "unknown block 'M00': Double has BASE"),  # another family's is no slip of the pen
        ("p3=1", "sd1", "unknown block 'P03': SD1 and SD2 have BASE, IN00-IN11, M00, OUT00-OUT11"),
        ("P0-=1", "double", "cannot read 'P0-=1' in the weights: write BLOCK=NUMBER, as in P00-P05=0.3"),
        ("P00", "double", "'P00' is not a number: write BLOCK=NUMBER, as in P00-P05=0.3"),
        ("", "small", "give a number, 26 numbers, or names as in X00-X01=0.3"),
        ("", "layers", "give a number, 35 numbers, or names as in L00-L05=0.3"),
        ([0.5] * 7, "layers", "7 weights given; 35 are needed (34 without BASE)"),
        (
            [0.5] * 7,
            "small",
            "7 weights given; 26 are needed (25 without BASE), or 3 for Small (2 without BASE)",
        ),
        ([0.5] * 26, "double", "26 weights given; 62 are needed (61 without BASE)"),
        ([0.5] * 60, "sd2", "60 weights given; 26 are needed (25 without BASE), or 20 for SDXL"),
        (
            BlockWeights.flat(1),
            "double",
            "weights for SD1 and SD2's 26 blocks given; double needs 62 (61 with",
        ),
        ([0.5] * 3, "sd2", "weights for Small's 3 blocks given; sd2 needs 26 (25 without BASE)"),
        (0.5, "triple", "unknown family 'triple': "),
    ],
)
def test_weights_that_cannot_be_read(value, family, says):
    with pytest.raises(WeightsError, match=re.escape(says)):
        parse_weights(value, family)


def test_lists_find_their_family():
    assert list(BlockWeights.from_numbers([0.5] * 61)) == DOUBLE
    assert BlockWeights.from_numbers([0.5] * 61)["BASE"] == 0.0
    assert list(BlockWeights(dict.fromkeys(reversed(LAYERS), 1))) == LAYERS
    assert list(BlockWeights.flat(1, SMALL)) == SMALL
    assert list(BlockWeights.from_numbers([0.5] * 26)) == oracle.SD
    with pytest.raises(WeightsError, match="no weight for block L29: 35 are needed, 34 given"):
        BlockWeights(dict.fromkeys([block for block in LAYERS if block != "L29"], 1))
    with pytest.raises(WeightsError, match=r"^7 weights given; 26 are needed .*, or 62 for Double"):
        BlockWeights.from_numbers([0.5] * 7)


def test_families_of_as_many_blocks_are_not_mixed():
    register(toy("other", "Other", ["BASE", "Y00", "Y01"], carried={}))
    try:
        mine, theirs = (BlockWeights.flat(0.5, FAMILIES[name].blocks) for name in ("small", "other"))
        assert list(parse_weights([1, 2, 3], "other")) == ["BASE", "Y00", "Y01"]
        with pytest.raises(WeightsError, match="weights of Small's and of Other's blocks cannot be added"):
            mine.add(theirs)
        with pytest.raises(WeightsError, match="weights for Small's 3 blocks given; other needs 3"):
            parse_weights(mine, "other")
    finally:
        unregister("other")


def test_arithmetic_stays_in_the_family():
    half = BlockWeights.flat(0.5, DOUBLE)
    found = half.scale(0.5).add(half).complement().interpolate(half, 0.5).replace({"P03": 1})
    assert dict(found) == dict.fromkeys(DOUBLE, 0.375) | {"P03": 1}


def test_weights_are_carried_over_where_the_family_says_how():
    numbers = [n / 100 for n in range(26)]
    named = dict(zip(oracle.SD, numbers, strict=True))
    by_name = {"BASE": named["BASE"], "X00": named["M00"], "X01": named["OUT11"]}
    assert dict(parse_weights(numbers, "small")) == dict(parse_weights(numbers, "small", "name")) == by_name
    assert dict(parse_weights(numbers, "small", "resolution")) == {"BASE": 0.0, "X00": 0.01, "X01": 0.14}
    assert dict(BlockWeights.from_numbers(numbers).for_family("small")) == by_name
    with pytest.raises(WeightsError, match="unknown SDXL mapping 'size'"):
        parse_weights(numbers, "small", "size")
    assert WeightsRequest("GRAD_V").heeds_map("small")
    assert WeightsRequest("GRAD_V").resolve("small")["X01"] == 1.0


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_every_way_gives_every_block_a_weight(family):
    for source, ways in FAMILIES[family].carried.items():
        assert tuple(ways) == SDXL_MAPS
        for way in ways.values():
            assert list(way) == list(FAMILIES[family].blocks)
            assert set(way.values()) <= set(FAMILIES[source].blocks)


def test_rules_and_adjust():
    rules = ElementRules.parse("p17-Q0:attn:0.5, NOT IN:norm:1")
    found = rules.resolve("double")
    assert [found.weight(block, "x.attn", 0) for block in ("P16", "P17", "P18", "Q00", "Q01")] == [
        0, 0.5, 0.5, 0.5, 0,
    ]  # fmt: skip
    with pytest.raises(WeightsError, match=r"'>>P17-Q0<<:attn:0.5': unknown block 'P17': SDXL has"):
        rules.resolve("sdxl")
    with pytest.raises(WeightsError, match=r"'P03 >>P44<<:attn:1': unknown block 'P44'.* Double has"):
        ElementRules.parse("P03 P44:attn:1")
    with pytest.raises(WeightsError, match=r"'P03 >>L04<<:attn:1': unknown block 'L04': Double has"):
        ElementRules.parse("P03 L04:attn:1")
    assert Adjust(contrast=1).for_tensor("out.2.bias", "double") is None


ALL = ", ".join([*FAMILIES, "double", "layers", "small"])


def written(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "[weights]\nsd1 = 0.5\ndouble = 'P03-Q00=0.25'\nsdxl = 'M00=1'\n",
        "weights.sd1 = '0.5'\nweights.double = {P03 = 0.25, P04 = 0.25}\nweights.sdxl = {M00 = 1}\n",
        "sdxl = 'M00=1'\n[weights]\nsd1 = 'BASE-OUT11=0.5'\n[weights.double]\np3 = 0.25\n",
    ],
)
def test_a_preset_with_a_table_for_each_family(tmp_path, text):
    preset = find_preset(written(tmp_path, text))
    assert preset.weights == preset.weights_for("sd2") == BlockWeights.flat(0.5)
    assert preset.weights_for("double")["P03"] == 0.25
    assert preset.sdxl == preset.weights_for("sdxl") == parse_weights("M00=1", "sdxl")
    assert preset.weights_for("sdxl", "name") == BlockWeights.flat(0.5, oracle.SDXL)
    assert {*preset.families} >= {"sd1", "sd2", "sdxl", "sdxl_refiner", "double", "small"}
    assert preset.others == {"double": preset.weights_for("double")}
    assert WeightsRequest(f"{tmp_path / 'own.toml'}@2").resolve("double")["P03"] == 0.5


def test_a_preset_for_one_family_alone(tmp_path, capsys):
    path = written(tmp_path, "[weights]\ndouble = [" + "0.5," * 61 + "]\n")
    preset = find_preset(path)
    assert preset.families == ("double",)
    assert (preset.weights, preset.sdxl) == (None, None)
    assert preset.weights_for("double", "name") == BlockWeights.from_numbers([0.5] * 61)
    says = "preset 'own' has no weights for Stable Diffusion XL, only for double: give a preset with a table 'weights.sdxl', or weights"
    with pytest.raises(PresetError, match=f"^preset \\(--preset\\): {re.escape(says)}$"):
        WeightsRequest(path).resolve("sdxl")
    with pytest.raises(PresetError, match=r"'own' has no weights for Stable Diffusion 1\.x, only for double"):
        blockmerge.load_preset(path)
    (shown,) = json.loads(ok(capsys, "presets", "show", path, "--json"))
    assert (shown["weights"], shown["sdxl"], shown["tables"]["double"]["P03"]) == (None, None, 0.5)
    lines = ok(capsys, "presets", "show", path).splitlines()
    labels = ["BASE", "IN", "P00", "P10", "Q00", "Q10", "Q20", "Q30", "OUT"]
    rows = [line.split() for line in lines[2 : 2 + len(labels)]]
    assert [row[0] for row in rows] == labels
    assert [row.count("0.5▄") for row in rows if row[0][1:].isdigit()] == [10, 9, 10, 10, 10, 10]


def test_shipped_presets_are_for_the_families_they_can_be_carried_to():
    for preset in presets():
        assert preset.families == ("sd1", "sd2", "sdxl", "sdxl_refiner", "small")
    with pytest.raises(
        PresetError, match="'high_res' has no weights for Toy Double, only for sd1, sd2, sdxl"
    ):
        WeightsRequest(["high_res@0", "GRAD_V"]).resolve("double")


@pytest.mark.parametrize("number", ["0.5", "'0.5'", "'skip'", "'random(0.2,0.8)'"])
def test_one_number_is_for_every_family(tmp_path, number):
    preset = find_preset(written(tmp_path, f"weights = {number}"))
    assert ", ".join(preset.families) == ALL
    assert preset.weights_for("double", seed=3) == parse_weights(number.strip("'"), "double", seed=3)
    assert preset.weights_for("sdxl", "resolution", 3)["OUT00"] == preset.weights_for("sd1", seed=3)["OUT03"]


def test_one_number_for_a_family_is_for_that_family(tmp_path):
    preset = find_preset(written(tmp_path, "[weights]\nsdxl = 0.25\ndouble = 0.75"))
    assert preset.families == ("sdxl", "double")
    with pytest.raises(PresetError, match=r"has no weights for Stable Diffusion 1.x, only for sdxl, double"):
        preset.weights_for("sd1")
    assert preset.weights is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[weights]\nsd1 = 0.5\nIN00 = 1",
            f"'weights' holds 'IN00' beside the family 'sd1': its keys are either families ({ALL}) or blocks "
            "(BASE, IN00-IN11, M00, OUT00-OUT11)",
        ),
        (
            "weights = {IN00 = 1, sdx = 0.5}",
            f"'weights': unknown block 'sdx': SD1 and SD2 have BASE, IN00-IN11, M00, OUT00-OUT11; families are {ALL}",
        ),
        ("weights.double = 'P99=1'", "'weights.double': unknown block 'P99'"),
        (
            "weights.double = [1, 2]",
            "'weights.double': 2 weights given; 62 are needed (61 without BASE); dec",
        ),
        (
            "weights.small = [" + "1," * 26 + "]",
            "'weights.small': 26 weights given where 3 (or 2 without BASE) are needed",
        ),
        ("weights.double = 1979-05-27", "'weights.double': neither a number, a list, a text nor a table"),
        ("sdxl = 1\nweights.sdxl = 1", "'sdxl' and 'weights.sdxl' are both given: remove one of them"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, text, says):
    with pytest.raises(PresetError, match=re.escape(says)):
        find_preset(written(tmp_path, text))


def test_explain_looks_only_at_presets_of_the_family():
    user_folder().mkdir(parents=True)
    (user_folder() / "own.toml").write_text("[weights]\ndouble = 'P03-P07=0.5'\n")
    for family, blocks, name in (("sd1", oracle.SD, "GRAD_V"), ("double", DOUBLE, "own")):
        known = np.array(list(find_preset(name).weights_for(family).values()), dtype=np.float64)
        (match, *_) = matching_presets(
            family, tuple(blocks), known, np.zeros(len(blocks)), np.ones(len(blocks), dtype=bool)
        )
        assert match.label == name


def test_preset_files_in_the_docs(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "presets.md").read_text()
    examples = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    for text in examples:
        preset = find_preset(written(tmp_path, text))
        assert preset.sdxl is not None
        assert preset.weights_for("sd2") == preset.weights or "sd2 =" in text

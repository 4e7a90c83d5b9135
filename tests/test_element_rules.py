"""Element rules and adjust: their grammar, and which tensors of real files they take."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockmerge import WeightsError
from blockmerge.anatomy import layout
from blockmerge.weights import Adjust, ElementRules, element_rules, random_weights
from tests import oracle
from tests.conftest import FAMILIES

DOCS = Path(__file__).parents[1] / "docs"
U = "model.diffusion_model."
ORDER = {"sd1": oracle.SD, "sd2": oracle.SD, "sdxl": oracle.SDXL}


def taken(text, family):
    """{name: weight} of the tensors of a real file that rules change."""
    rules = ElementRules.parse(text).resolve(family)
    tensors = [(name, oracle.block(name, family)) for name in layout(family)]
    return {name: weight for name, block in tensors if (weight := rules.weight(block, name, 7.0)) != 7.0}


def wanted(family, condition):
    return {name for name in layout(family) if condition(oracle.block(name, family), name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_four_examples(family):
    found = taken("OUT03 OUT04 OUT05:attn2 attn1.to_out:0.5", family)
    expected = wanted(
        family,
        lambda block, name: (
            block in ("OUT03", "OUT04", "OUT05") and ("attn2" in name or "attn1.to_out" in name)
        ),
    )
    assert found == dict.fromkeys(expected, 0.5)
    # 7 tensors, and two transformer blocks in SDXL.
    assert len(found) == 3 * 7 * (2 if family == "sdxl" else 1)

    found = taken("NOT OUT04:attn:1", family)
    assert found == dict.fromkeys(
        wanted(family, lambda block, name: block != "OUT04" and "attn" in name), 1.0
    )
    assert any(name.startswith(f"{U}middle_block") for name in found)
    assert any(oracle.block(name, family) == "BASE" for name in found)  # a block like the others

    found = taken("OUT05:NOT attn proj:0.2", family)
    expected = wanted(
        family, lambda block, name: block == "OUT05" and "attn" not in name and "proj" not in name
    )
    assert found == dict.fromkeys(expected, 0.2)
    assert f"{U}output_blocks.5.0.in_layers.2.weight" in found

    found = (
        taken("OUT02:attn:0.5,OUT02:attn2.to_k:0.2", "sdxl")
        if family == "sdxl"
        else taken("OUT06:attn:0.5,OUT06:attn2.to_k:0.2", family)
    )
    assert {weight for name, weight in found.items() if "attn2.to_k" in name} == {0.2}
    assert {weight for name, weight in found.items() if "attn2.to_k" not in name} == {0.5}


def test_blocks_are_the_familys_own():
    """SuperMerger takes SDXL's OUT00 for IN10, since it looks blocks up in SD1's list."""
    assert all(name.startswith(f"{U}output_blocks.0.") for name in taken("OUT00::0.5", "sdxl"))
    everything_from_m00 = {
        name for name in layout("sdxl") if re.match(rf"{re.escape(U)}(middle|output|out)", name)
    }
    assert (
        set(taken("M00-OUT08::0.5", "sdxl")) == set(taken("OUT08 - M00::0.5", "sdxl")) == everything_from_m00
    )
    assert set(taken("IN08-OUT00::0", "sdxl")) == set(taken("IN08 M00 OUT00::0", "sdxl"))
    assert set(taken("IN08-OUT00::0", "sd1")) == set(taken("IN08 IN09 IN10 IN11 M00 OUT00::0", "sd1"))
    assert set(taken("::0.5", "sd2")) == set(layout("sd2"))
    assert set(taken("NOT BASE::0.5", "sd1")) == {name for name in layout("sd1") if name.startswith(U)}
    assert f"{U}out.2.bias" in taken("OUT08::0", "sdxl")


@pytest.mark.parametrize("separator", [",", "\n", ",\r\n ", "\n\n,", " , "])
def test_later_rules_win_however_they_are_separated(separator):
    name = f"{U}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    rules = ElementRules.parse(
        separator.join(["::0.1", "in01-m0:attn2:-.5", "NOT M00::2", "M00:to_k:skip", "M00:to_q:1"])
    )
    assert len(rules.rules) == 5
    found = rules.resolve("sd1")
    assert found.weight("M00", name, 0.3) is None
    assert found.weight("M00", name.replace("to_k", "to_v"), 0.3) == -0.5
    assert found.weight("M00", name.replace("attn2.to_k", "norm1"), 0.3) == 0.1
    assert found.weight("IN01", name, 0.3) == 2.0
    assert found.weight("M00", name.replace("to_k", "to_q"), 0.3) == 1.0


def test_without_rules_the_weights_stay():
    rules = ElementRules.parse(" \n , ")
    assert not rules
    assert str(rules) == ""
    assert rules.resolve("sd1").weight("M00", "x", None) is None
    assert ElementRules.parse("M00:y:1").resolve("sd1").weight("M00", "x", 0.25) == 0.25


def test_rules_that_take_nothing_are_told():
    tensors = [(oracle.block(name, "sdxl"), name) for name in layout("sdxl")]
    rules = ElementRules.parse(
        "OUT03:atn2:0.5, OUT03:attn2:0.5, IN01:attn:1, NOT IN00-OUT08:attn1:1"
    ).resolve("sdxl")
    # IN01 of SDXL has no attention, and text encoders call it otherwise
    assert rules.idle(iter(tensors)) == ["OUT03:atn2:0.5", "IN01:attn:1", "NOT IN00-OUT08:attn1:1"]


blocks = st.sampled_from(oracle.SD)
words = st.lists(st.one_of(blocks, st.tuples(blocks, blocks).map("-".join)), max_size=3)
parts = st.lists(
    st.sampled_from(["attn", "attn1", "attn2.to_k", "norm", "bias", "0", "proj", "weight", "nothing"]),
    max_size=3,
)
ratios = st.one_of(st.just("skip"), st.floats(-1e6, 1e6).map(repr), st.sampled_from(["1", ".5", "-2e-3"]))
field = st.tuples(st.booleans(), st.booleans())
rule = st.tuples(st.booleans(), words, st.booleans(), parts, ratios)


def as_text(rule):
    not_blocks, blocks, not_parts, parts, ratio = rule
    first = " ".join(["NOT"] * (not_blocks and bool(blocks)) + blocks)
    second = " ".join(["NOT"] * (not_parts and bool(parts)) + parts)
    return f"{first}:{second}:{ratio}"


def by_hand(rules, block, name, otherwise, order):
    for not_blocks, words, not_parts, parts, ratio in rules:
        listed = set()
        for word in words:
            ends = sorted(order.index(end) for end in word.split("-"))
            listed |= set(order[ends[0] : ends[-1] + 1])
        in_block = True if not words else (block not in listed if not_blocks else block in listed)
        hits = [part for part in parts if name.find(part) >= 0]
        if in_block and (True if not parts else (not hits if not_parts else bool(hits))):
            otherwise = None if ratio == "skip" else float(ratio)
    return otherwise


@given(st.lists(rule, max_size=4), st.data())
def test_matching_and_the_way_back_to_text(rules, data):
    text = ",".join(map(as_text, rules))
    parsed = ElementRules.parse(text)
    assert ElementRules.parse(str(parsed)) == parsed
    names = sorted(layout("sd1"))
    for name in data.draw(st.lists(st.sampled_from(names), min_size=5, max_size=5)):
        block = oracle.block(name, "sd1")
        assert parsed.resolve("sd1").weight(block, name, 0.5) == by_hand(rules, block, name, 0.5, oracle.SD)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "OUT03:attn",
            "element rule 1, '>>OUT03:attn<<': expected BLOCKS:ELEMENTS:RATIO, as in OUT03-OUT05:attn2:0.5",
        ),
        ("M00::1, a:b:c:d", "element rule 2, '>>a:b:c:d<<': expected BLOCKS:ELEMENTS:RATIO"),
        (
            "OUT03 OUT99 IN01:attn:1",
            "element rule 1, 'OUT03 >>OUT99<< IN01:attn:1': unknown block 'OUT99'; did you mean",
        ),
        ("NOT M00 attn:attn:0.5", "element rule 1, 'NOT M00 >>ATTN<<:attn:0.5': unknown block 'ATTN'"),
        (
            "IN00-:x:1",
            "element rule 1, '>>IN00-<<:x:1': 'IN00-' is half a range: write both ends, as in IN00-IN05",
        ),
        ("NOT:attn:1", "element rule 1, '>>NOT<<:attn:1': expected names after NOT"),
        ("IN01:NOT:1", "element rule 1, 'IN01:>>NOT<<:1': expected names after NOT"),
        (
            "NOT NOT OUT05:attn:0.5",
            "element rule 1, 'NOT >>NOT<< OUT05:attn:0.5': NOT stands in front of the whole field, once",
        ),
        (
            "OUT05  not OUT06:attn:0.5",
            "element rule 1, 'OUT05 >>NOT<< OUT06:attn:0.5': NOT stands in front of the whole field, once",
        ),
        (
            "M00:attn NOT proj:1",
            "element rule 1, 'M00:attn >>NOT<< proj:1': NOT stands in front of the whole field, once",
        ),
        ("\n\nM00::1\nIN01:much:much", "element rule 2, 'IN01:much:>>much<<': expected a number or skip"),
        ("IN01::", "element rule 1, 'IN01::>><<': expected a number or skip"),
        ("IN01::nan", "element rule 1, 'IN01::>>nan<<': expected a number or skip"),
        ("IN01::-inf", "expected a number or skip"),
        ("IN01::1_0", "expected a number or skip"),
        ("IN01::random", "expected a number or skip"),
        (
            "IN01::2e6",
            "element rule 1, 'IN01::>>2e6<<': weight of the rule is 2000000: at most 1,000,000 is allowed",
        ),
        ("x\x1b[31m:y:1", r"'>>X\x1b[31M<<:y:1'"),
        ("IN01 " * 500 + "IN77:y:1", "IN01 >>IN77<<:y:1'"),
    ],
)
def test_rules_that_cannot_be_read_show_the_place(text, says):
    with pytest.raises(WeightsError) as caught:
        ElementRules.parse(text)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_a_block_that_a_family_does_not_have():
    rules = ElementRules.parse("M00::1, IN02 IN09 OUT01:attn:0.5")
    rules.resolve("sd2")
    with pytest.raises(
        WeightsError,
        match=r"element rule 2, 'IN02 >>IN09<< OUT01:attn:0.5': unknown block 'IN09': SDXL has BASE",
    ):
        rules.resolve("sdxl")


# Adjust, worked out by hand: IN 1, OUT -2, OUT2 3, CONT 4, BRI 5, COL1 6, COL2 7, COL3 8
BY_HAND = {
    "input_blocks.0.0.weight": (0.99, None),
    "input_blocks.0.0.bias": (1.02, None),
    "out.0.weight": (1.02, None),
    "out.0.bias": (0.96, None),
    "out.2.weight": (0.97, None),
}
SHIFT = {
    # 0.02·[4, −5+6+0+8, 5/3+6−7+0, 10/3+0−7+8]
    "sd1": (0.08, 0.18, 0.02 * (5 / 3 - 1), 0.02 * (10 / 3 + 1)),
    "sd2": (0.08, 0.18, 0.02 * (5 / 3 - 1), 0.02 * (10 / 3 + 1)),
    # 0.02·[4, 0+6−7−8, 0+0−7+8, 5+0+0+0]
    "sdxl": (0.08, -0.18, 0.02, 0.1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_adjust_changes_six_tensors(family):
    adjust = Adjust.parse("1, -2, 3, 4, 5, 6, 7, 8")
    changes = {name: change for name in layout(family) if (change := adjust.for_tensor(name, family))}
    assert changes.keys() == {U + name for name in [*BY_HAND, "out.2.bias"]}
    for name, expected in BY_HAND.items():
        assert changes[U + name] == (pytest.approx(expected[0], abs=1e-15), None)
        assert adjust.for_tensor(name, family) == changes[U + name]  # a U-Net on its own
    scale, shift = changes[f"{U}out.2.bias"]
    assert scale == 1.0
    assert shift == pytest.approx(SHIFT[family], abs=1e-15)
    assert layout(family)[f"{U}out.2.bias"] == (len(shift),)


@pytest.mark.parametrize("family", FAMILIES)
def test_adjust_changes_nothing_that_is_not_asked_for(family):
    for text in ("", "0,0,0,0,0,0,0,0", "-0, 0.0"):
        assert not Adjust.parse(text)
        assert not any(Adjust.parse(text).for_tensor(name, family) for name in layout(family))
    only = Adjust.parse("0,0,0,1")
    assert [name for name in layout(family) if only.for_tensor(name, family)] == [f"{U}out.2.bias"]
    assert only.for_tensor("out.2.bias", family).shift == (0.02, 0.0, 0.0, 0.0)


def test_the_text_of_adjust():
    assert Adjust.parse("1,2") == Adjust(into=1, out=2)  # what is left out at the end is 0
    assert str(Adjust.parse("0,0,0,1,0,0.1,-0,-5")) == "0,0,0,1,0,0.1,0,-5"
    assert Adjust.parse(str(Adjust.parse(".1,2e-9,3"))) == Adjust(0.1, 2e-9, 3.0)
    for text, says in {
        "1,2,3,4,5,6,7,8,9": "adjust '1,2,3,4,5,6,7,8,9': 9 numbers given; there are eight: IN,OUT,OUT2,CONT,BRI,COL1,COL2,COL3",
        "1,,2": "adjust '1,,2': OUT is '', which is not a number",
        "0,0,0,much": "adjust '0,0,0,much': CONT is 'much', which is not a number",
        "nan": "IN is 'nan', which is not a number",
        "0,0,0,0,0,0,0,inf": "COL3 is 'inf', which is not a number",
    }.items():
        with pytest.raises(WeightsError) as caught:
            Adjust.parse(text)
        assert says in str(caught.value)


@pytest.mark.parametrize("page", ["rules.md", "presets.md"])
def test_examples_in_the_docs(page):
    blocks = re.findall(r"```pycon\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page, page, 0)
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_the_rules_in_the_docs_can_be_read():
    rows = re.findall(r"^\| `(.*?:.*?)` \|", (DOCS / "rules.md").read_text(), re.MULTILINE)
    assert len(rows) == 4
    for text in [*rows, *re.findall(r'--rules "(.*?)"', (DOCS / "rules.md").read_text())]:
        rules = ElementRules.parse(text)
        tensors = [(oracle.block(name, "sd1"), name) for name in layout("sd1")]
        assert rules.resolve("sd1").idle(tensors) == []


@pytest.mark.parametrize("module", [element_rules, random_weights], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0

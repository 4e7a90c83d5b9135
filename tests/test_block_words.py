"""The words that name blocks, gradients over ranges of them, and other programs' lists of numbers."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockmerge import BlockWeights, RecipeError, WeightsError
from blockmerge.adapters.block_texts import read_blocks
from blockmerge.anatomy import FAMILIES
from blockmerge.anatomy.family import Family
from blockmerge.merging.recipe_changes import with_changes
from blockmerge.weights import ElementRules, WeightsRequest, find_preset, parse_assignments, parse_weights
from tests import oracle, toy_family
from tests.counted_family import counted, flux_blocks, known, numbered

FLUX = counted()
LAYERS = counted("layers", ["BASE", "IN", *numbered("L", 28), "OUT"], aliases={}, number_lists={})
MANY = counted("many", ["BASE", *numbered("L", 120, 3)], aliases={"h.#.": ("L#",)}, number_lists={})
PATHS = counted("paths", ["BASE", *numbered("visual.blocks.", 5), *numbered("model.layers.", 4)], aliases={})


def assert_evenly(found, blocks, first, last):
    expected = np.interp(np.arange(len(blocks)), [0, len(blocks) - 1], [first, last])
    assert [found[block] for block in blocks] == pytest.approx(expected.tolist(), abs=1e-12)
    assert (found[blocks[0]], found[blocks[-1]]) == (first, last)  # exactly
    assert all(weight == 0 for block, weight in found.items() if block not in blocks)


# -- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "family", "blocks", "ends"),
    [
        ("IN00-IN11=0..1", "sd1", oracle.SD[1:13], (0, 1)),
        ("OUT11-OUT00=0..1", "sd1", oracle.SD[:13:-1], (0, 1)),
        ("OUT00-OUT11=1..0", "sd1", oracle.SD[14:], (1, 0)),
        ("in10 - out1 = -0.5 .. 1.5", "sd1", ["IN10", "IN11", "M00", "OUT00", "OUT01"], (-0.5, 1.5)),
        ("OUT01-IN10=.2..0.8", "sd1", ["OUT01", "OUT00", "M00", "IN11", "IN10"], (0.2, 0.8)),
        ("L00-L27=0.2..0.8", LAYERS, numbered("L", 28), (0.2, 0.8)),
        ("L27-L0=0.1..0.7", LAYERS, numbered("L", 28)[::-1], (0.1, 0.7)),
        ("double_blocks.0.-double_blocks.5.=1e-1..3e-1", FLUX, numbered("D", 6), (0.1, 0.3)),
        ("IN00-OUT08=0.3..0.3", "sdxl", oracle.SDXL[1:], (0.3, 0.3)),
    ],
)
def test_gradients_go_evenly_from_the_first_block_to_the_last(text, family, blocks, ends):
    assert_evenly(parse_weights(text, family), blocks, *ends)


@given(st.floats(-2, 3), st.floats(-2, 3), st.integers(0, 27), st.integers(0, 27))
def test_gradients_of_any_length(first, last, start, stop):
    first, last = first + 0.0, last + 0.0
    step = 1 if start <= stop else -1
    blocks = numbered("L", 28)[min(start, stop) : max(start, stop) + 1][::step]
    if start == stop:
        last = first  # one block gets the first number
    found = parse_weights(f"L{start}-L{stop}={first!r}..{last!r}", LAYERS)
    assert_evenly(found, blocks, first, last)


def test_one_block_gets_the_first_number():
    assert parse_weights("IN04=0.25..1")["IN04"] == 0.25
    assert parse_weights("IN04-IN04=0.25..1")["IN04"] == 0.25


def test_gradients_beside_others_and_everywhere(tmp_path):
    found = parse_weights("BASE=skip,IN00-IN11=0..1,IN11=skip,M00=random(0.5,0.5)")
    assert (found["BASE"], found["IN10"], found["IN11"], found["M00"]) == (None, 10 / 11, None, 0.5)
    on_top = WeightsRequest(weights=0.5, changes="OUT00-OUT04=0..1").resolve("sd1")
    assert [on_top[f"OUT{n:02}"] for n in range(6)] == [0, 0.25, 0.5, 0.75, 1, 0.5]
    assert parse_weights({"OUT00-OUT04": "0..1", "out5": 0.5}) == parse_weights("OUT00-OUT04=0..1,OUT05=0.5")
    assert read_blocks("OUT00-OUT04=0..1", FAMILIES["sd1"]) == parse_weights("OUT00-OUT04=0..1")
    held = WeightsRequest(weights="OUT04-OUT00=0..1").change(BlockWeights.flat(0.5), "sd1")
    assert (held["OUT04"], held["OUT03"], held["OUT00"], held["M00"]) == (0, 0.25, 1, 0.5)
    (tmp_path / "own.toml").write_text('weights = "OUT00-OUT04=0..1"\n[more]\n'.replace("[more]\n", ""))
    assert find_preset(str(tmp_path / "own.toml")).weights == parse_weights("OUT00-OUT04=0..1")
    (tmp_path / "own2.toml").write_text('[weights.sd1]\nOUT00-OUT04 = "0..1"\n')
    assert find_preset(str(tmp_path / "own2.toml")).weights == parse_weights("OUT00-OUT04=0..1")
    changed = with_changes({"models": ["a", "b"], "weights": 0.5}, ["OUT00-OUT04=0..1"])
    assert parse_assignments(changed["set"])["OUT03"] == 0.75


FORM = "as in IN00-IN05=0..1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("IN00-IN05=0..", f"IN00-IN05=0..: '0..' is half a gradient: write both ends, {FORM}"),
        ("IN00-IN05=..1", f"'..1' is half a gradient: write both ends, {FORM}"),
        ("IN00-IN05=..", f"'..' is half a gradient: write both ends, {FORM}"),
        ("IN00-IN05=0..x", "'x' in '0..x' is not a number: a gradient goes from one number to another, as"),
        ("IN00-IN05=0..1..2", f"cannot read '0..1..2': a gradient has two ends, {FORM}"),
        ("IN00-IN05=1....5", f"cannot read '1....5': a gradient has two dots, {FORM}"),
        ("OUT01-IN10=.2...8", f"cannot read '.2...8': a gradient has two dots, {FORM}"),
        ("IN00-IN05=skip..1", "'skip' in 'skip..1' is not a number: a gradient goes from one number"),
        ("IN00-IN05=0..random", "'random' in '0..random' is not a number"),
        ("IN00-IN05=random(0,1)..1", "'random(0,1)' in 'random(0,1)..1' is not a number"),
        ("IN00-IN05=0..nan", "'nan' in '0..nan' is not a number"),
        ("IN00-IN05=0..2e6", "weight of IN03 is 1200000: at most"),
        ("0..1", "'0..1' is a gradient, which is for a range of blocks: write it as in IN00-IN05=0..1"),
        (",".join(["0..1"] * 26), "'0..1' is a gradient, which is for a range of blocks"),
        ({"IN00-IN05": "0.."}, "'0..' is half a gradient"),
        (["0..1"] * 26, "weight of BASE is not a number: '0..1'"),
    ],
)
def test_gradients_that_cannot_be_read(text, says):
    with pytest.raises(WeightsError, match=re.escape(says)) as caught:
        parse_weights(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("blocks", ["0..1", ",".join(["0..1"] * 17), ["0..1"] * 26])
def test_a_loras_blocks_take_none_without_a_range(blocks):
    with pytest.raises(WeightsError, match=r"'0\.\.1' is a gradient, which is for a range of blocks"):
        read_blocks(blocks, FAMILIES["sd1"])


# -- digits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["L7", "l07", "L007", "L0007", "h.7.", "H.007"])
def test_as_many_digits_as_anyone_writes(word):
    assert dict(parse_assignments(f"{word}=0.5", MANY)) == {"L007": 0.5}
    expected = {f"L{n:03}": 0.5 for n in range(7, 120)}
    assert dict(parse_assignments(f"{word}-L119=0.5", MANY)) == expected


@pytest.mark.parametrize("word", ["L120", "L00007", "L1000", "LL", "7", "h.120"])
def test_what_is_no_block_of_them(word):
    with pytest.raises(WeightsError, match=r"unknown block '\S+'.* Counted has BASE, L000-L119"):
        parse_assignments(f"{word}=0.5", MANY)


# -- letters alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "family", "blocks"),
    [
        ("IN", "sd1", oracle.SD[1:13]),
        ("in", "sdxl", oracle.SDXL[1:10]),
        ("m", "sdxl", ["M00"]),
        ("OUT", "sdxl", oracle.SDXL[11:]),
        ("IN-M", "sd1", oracle.SD[1:14]),
        ("OUT-M", "sd1", [*oracle.SD[:13:-1], "M00"]),
        ("IN06-OUT", "sd1", oracle.SD[7:]),
        ("D", FLUX, [block for block in FLUX.blocks if re.fullmatch("D[0-9]+", block)]),
        ("IN", LAYERS, ["IN"]),  # a block of its own
        ("L", MANY, numbered("L", 120, 3)),
    ],
)
def test_letters_alone_are_all_blocks_that_have_them(words, family, blocks):
    assert dict(parse_assignments(f"{words}=0.5", family)) == dict.fromkeys(blocks, 0.5)
    if len(blocks) > 1:
        assert_evenly(parse_weights(f"{words}=0.2..0.8", family), blocks, 0.2, 0.8)


def test_letters_alone_in_rules_and_blocks_of_loras():
    assert read_blocks("OUT=0.5", FAMILIES["sdxl"]) == parse_weights("OUT00-OUT08=0.5", "sdxl")
    rules = ElementRules.parse("out:attn:0.5").resolve("sdxl")
    found = {block: rules.weight(block, "x.attn1.to_q.weight", 0.2) for block in oracle.SDXL}
    assert found == {block: 0.5 if block.startswith("OUT") else 0.2 for block in oracle.SDXL}


def test_names_of_a_path():
    found = parse_assignments("Visual.Blocks.3-model.layers.0=0.2..0.6,visual.blocks.00=skip", PATHS)
    assert found == {
        "visual.blocks.03": 0.2,
        "visual.blocks.04": pytest.approx(0.4),
        "model.layers.00": 0.6,
        "visual.blocks.00": None,
    }
    with known(PATHS):
        rules = ElementRules.parse("visual.blocks.00-visual.blocks.01 MODEL.LAYERS.7:attn:0.5")
        with pytest.raises(WeightsError, match=r"unknown block 'MODEL\.LAYERS\.7'"):
            rules.resolve(PATHS)


def test_errors_name_the_blocks_of_the_family_that_is_meant():
    lite = counted(blocks=flux_blocks(8))
    with pytest.raises(
        WeightsError, match=r"'D19'; did you mean '.*'. Counted has BASE, IN, D00-D07, S00-S37"
    ):
        parse_weights("D19=1", lite)
    # Flux.1 has it: no slip of the pen.
    with pytest.raises(WeightsError, match="unknown block 'D08': Counted has BASE, IN, D00-D07, S00-S37"):
        parse_weights("D08=1", lite)
    with pytest.raises(WeightsError, match=r"'double_blocks\.8\.': unknown block 'D08'.* D00-D07"):
        parse_weights("double_blocks.8.=1", lite)
    weights = BlockWeights.flat(0.5, lite.blocks)
    with pytest.raises(WeightsError, match=r"unknown block 'D08'.* these weights have BASE, IN, D00-D07"):
        weights.replace({"D08": 1})


# -- words of other programs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("double_blocks.3.=0.4", "D03=0.4"),
        ("double_blocks.3=0.4", "D03=0.4"),
        ("DOUBLE03=0.4", "D03=0.4"),
        ("double3=0.4", "D03=0.4"),
        ("Double_Blocks.003.=0.4", "D03=0.4"),
        ("double_blocks.0.-double_blocks.5.=0.2", "D00-D05=0.2"),
        ("double_blocks.5. - double_blocks.0. = 0..1", "D05-D00=0..1"),
        ("transformer_blocks.17.-single_blocks.1.=0.2", "D17-S01=0.2"),
        ("DOUBLE17-S1=0.2", "D17-S01=0.2"),
        ("img_in.=0.3", "IN=0.3"),
        ("IMG_IN=0.3", "IN=0.3"),
        ("img_in.=0.3,txt_in.=0.3", "IN=0.3"),
        ("clip=skip,T5=skip,double_blocks.0.=random(0,1)", "BASE=skip,D00=random(0,1)"),
        ("double_blocks.0.-double_blocks.5.=0.2,double_blocks.3.=0.4", "D00-D05=0.2,D03=0.4"),
        ("IN=0.3,IN=0.5", "IN=0.5"),
        ("IN=0.3,img_in.=0.5", "IN=0.5"),
        ("IN=skip,img_in=0.5", "IN=0.5"),
        ("D00-D05=0.2,DOUBLE04=0.3", "D00-D05=0.2,D04=0.3"),
        ("DOUBLE04=0.2,double_blocks.4.=0.3", "D04=0.3"),
    ],
)
def test_aliases(text, meant):
    expected = parse_weights(meant, FLUX)
    assert parse_weights(text, FLUX) == expected
    assert WeightsRequest(weights=0.5, changes=text).resolve(FLUX) == WeightsRequest(
        weights=0.5, changes=meant
    ).resolve(FLUX)
    assert read_blocks(text, FLUX) == read_blocks(meant, FLUX)


def test_aliases_in_mappings_rules_and_recipes():
    assert parse_weights({"double_blocks.3.": 0.4, "CLIP": None}, FLUX) == parse_weights(
        "D03=0.4,BASE=skip", FLUX
    )
    with known(FLUX):
        rules = ElementRules.parse("double_blocks.0.-DOUBLE02 img_in.:attn:0.5").resolve(FLUX)
    assert [block for block in FLUX.blocks if rules.weight(block, "x.attn", 0.0)] == [
        "IN",
        "D00",
        "D01",
        "D02",
    ]
    table = {"first": {"models": ["a", "b"], "weights": 1}, "models": ["first", "c"], "weights": 0.5}
    for text in ("double_blocks.3.=0.4", "double_blocks.3=0.4", "img_in.=0.3"):
        assert with_changes(table, [text])["set"] == text
    with pytest.raises(RecipeError, match="no stage fist; did you mean 'first'"):
        with_changes(table, ["fist.weights=0.4"])


@pytest.mark.parametrize(
    "text",
    [
        "img_in.=0.3,txt_in.=0.5",
        "txt_in.=0.5,img_in.=0.3",
        "IN=0.2,img_in.=0.3,txt_in=skip",
        "CLIP=0,t5=1",
        {"img_in.": 0.3, "txt_in.": 0.5},
    ],
)
def test_words_for_one_block_must_agree(text):
    with pytest.raises(WeightsError, match=r"are both for .*, which has one weight: give it as") as caught:
        parse_weights(text, FLUX)
    entries = text.split(",") if isinstance(text, str) else [f"{word}={n}" for word, n in text.items()]
    assert all(f"'{entry}'" in str(caught.value) for entry in entries[-2:])
    assert re.search(r"both for (IN|BASE),", str(caught.value))


def test_no_family_takes_another_familys_words():
    for word in ("double_blocks.3.", "DOUBLE03", "CLIP", "img_in."):
        with pytest.raises(WeightsError, match="unknown block"):
            parse_weights(f"{word}=1", "sd1")


def test_a_familys_folder_says_them(tmp_path):
    home = toy_family.write(tmp_path)
    text = (home / "family.toml").read_text()
    own = '[aliases]\n"layers.#." = ["L#"]\n"CLIP" = ["BASE"]\nT5 = ["BASE"]\n\n[numbers]\n"4" = "CLIP T5 L00-L01"\n\n'
    (home / "family.toml").write_text(text.replace("[blocks]", own + "[blocks]"))
    family = Family.read(home)
    assert dict(family.aliases) == {"layers.#.": ("L#",), "CLIP": ("BASE",), "T5": ("BASE",)}
    assert dict(parse_weights("layers.1.=0.5,clip=1", family)) == {"BASE": 1, "L00": 0, "L01": 0.5}
    assert dict(parse_weights("0.1,0.1,0.2,0.3", family)) == {"BASE": 0.1, "L00": 0.2, "L01": 0.3}
    for shipped in FAMILIES.values():
        assert not any("-" in word for word in shipped.aliases)


# -- lists of numbers ----------------------------------------------------------------------------------------


def test_as_many_numbers_as_another_program_has():
    numbers = [round(n / 100, 2) for n in range(61)]
    numbers[1] = numbers[0]
    expected = dict(zip(FLUX.blocks, [numbers[0], *numbers[2:]], strict=True))
    for given_as in (numbers, tuple(numbers), np.array(numbers), ",".join(map(str, numbers))):
        assert dict(parse_weights(given_as, FLUX)) == expected
        assert WeightsRequest(weights=given_as).lost(FLUX) == []
    words = ["skip", "skip", *["random(0.2,0.8)"] * 59]
    assert parse_weights(",".join(words), FLUX, seed=7) == parse_weights(
        "BASE=skip,IN-OUT=random(0.2,0.8)", FLUX, seed=7
    )


def test_where_two_numbers_of_it_are_for_one_block_the_first_counts():
    numbers = [0.25, 0.5, *[1.0] * 59]
    for given_as in (numbers, ",".join(map(str, numbers))):
        assert parse_weights(given_as, FLUX)["BASE"] == 0.25
        (note,) = WeightsRequest(weights=given_as).lost(FLUX)
        assert re.fullmatch(
            r"weights \(--weights\): of 61 numbers, CLIP=0\.25 and T5=0\.5 are both for BASE: the first counts",
            note,
        )


def test_the_own_count_goes_first_and_other_models_have_no_such_list():
    assert list(parse_weights([0.5] * 60, FLUX).values()) == [0.5] * 60
    assert list(parse_weights([0.5] * 59, FLUX).values()) == [0.0, *[0.5] * 59]
    longer = counted(blocks=flux_blocks(20))
    assert list(parse_weights([0.5] * 61, longer)) == flux_blocks(20)  # all 61 blocks
    for other in (counted(blocks=flux_blocks(8)), counted(blocks=flux_blocks(22))):
        with pytest.raises(WeightsError, match="61 weights given"):
            parse_weights([0.5] * 61, other)
    with pytest.raises(
        WeightsError,
        match=re.escape(
            "7 weights given; 60 are needed (59 without BASE), or 26 for SD1 and SD2 (25 without BASE), or 20 for "
            "SDXL (19 without BASE), or 61 (CLIP, T5, IN, D00-D18, S00-S37, OUT)"
        ),
    ):
        parse_weights([0.5] * 7, FLUX)

"""Block weights: the texts they are written in, their arithmetic, and the presets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blockmerge
from blockmerge import BlockWeights, PresetError, WeightsError
from blockmerge.adapters.block_texts import read_blocks
from blockmerge.anatomy import FAMILIES
from blockmerge.weights import WeightsRequest, find_preset, parse_weights, presets, unreadable_presets
from blockmerge.weights.grammar import notes_on
from blockmerge.weights.presets import shipped_folder, user_folder
from tests import oracle

number = st.floats(-2, 3, allow_nan=False).map(lambda value: value + 0.0)
lists = st.lists(number, min_size=26, max_size=26)


def values(text, family="sd1", sdxl_map=None):
    return list(parse_weights(text, family, sdxl_map).values())


def test_one_number_is_for_all_blocks():
    assert values("0.5") == values(0.5) == [0.5] * 26
    assert values("0.5", "sdxl") == [0.5] * 20
    assert values(" 1. ") == [1.0] * 26
    assert values(1) == [1.0] * 26


@given(lists)
def test_lists_of_numbers(numbers):
    text = ",".join(map(repr, numbers))
    assert values(text) == numbers
    assert values(text.replace(",", " \n")) == numbers
    assert values(numbers) == numbers
    assert values(tuple(numbers[1:])) == [0.0, *numbers[1:]]
    assert values(",".join(map(repr, numbers[1:]))) == [0.0, *numbers[1:]]


@pytest.mark.parametrize("separator", [",,", ", ,", ";;", ",\n ,", ",\t\t"])
@pytest.mark.parametrize("count", [25, 26, 20])
def test_a_number_left_blank_shifts_no_others(separator, count):
    numbers = ["0.5"] * count
    text = ",".join(numbers[:9]) + separator + ",".join(numbers[9:])
    with pytest.raises(WeightsError, match="number 10 of the list is empty"):
        parse_weights(text)
    with pytest.raises(WeightsError, match="number 10 of the list is empty"):
        read_blocks(text, FAMILIES["sd1"])
    with pytest.raises(WeightsError, match="number 1 of the list is empty"):
        parse_weights("," + ",".join(numbers))


@pytest.mark.parametrize(("family", "full"), [("sd1", 26), ("sdxl", 20), ("sdxl", 26)])
def test_a_last_number_left_blank_is_not_that_of_base(family, full):
    assert values("0.5," * full, family) == values("0.5", family)
    with pytest.raises(WeightsError, match=f"number {full} of the list is empty"):
        parse_weights("0.5," * (full - 1), family)


def test_a_blank_after_brackets_is_counted_and_one_within_is_told_otherwise():
    with pytest.raises(WeightsError, match="number 3 of the list is empty"):
        parse_weights("0.5,random(0.2,0.8,2),,0.5")
    with pytest.raises(WeightsError, match=r"random\(0\.2,,0\.8\)"):
        parse_weights("random(0.2,,0.8)")


def test_numbers_without_base_are_noted():
    for numbers, family, last in (([0.5] * 25, "sd1", 11), ("0.5 " * 25, "sdxl", 11), ("1 " * 19, "sdxl", 8)):
        (note,) = notes_on(numbers, family)
        assert note.endswith(f"numbers are for IN00 to OUT{last:02}: BASE is 0")
    for others in ([0.5] * 26, "0.5", 0.5, "IN00=1", "0.5," * 26):
        assert notes_on(others) == []


def test_lists_for_sdxl():
    numbers = [n / 100 for n in range(26)]
    named = dict(zip(oracle.SD, numbers, strict=True))
    assert values(numbers, "sdxl") == [named[block] for block in oracle.SDXL]
    shifted = {f"OUT{k:02}": named[f"OUT{k + 3:02}"] for k in range(9)}
    assert values(numbers, "sdxl", "resolution") == [
        shifted.get(block, named[block]) for block in oracle.SDXL
    ]
    assert values(numbers[:20], "sdxl") == numbers[:20]
    assert values(numbers[:20], "sdxl", "resolution") == numbers[:20]
    assert values(numbers[:19], "sdxl") == [0.0, *numbers[:19]]


def test_names_and_ranges():
    found = parse_weights("base=1, IN00-IN02=0.3  OUT02-M00 = .5\nIN4=skip,IN02=-1")
    expected = dict.fromkeys(oracle.SD, 0.0) | {"BASE": 1, "IN00": 0.3, "IN01": 0.3, "IN02": -1, "IN04": None}
    expected |= {"M00": 0.5, "OUT00": 0.5, "OUT01": 0.5, "OUT02": 0.5}
    assert dict(found) == expected
    assert dict(parse_weights({"IN04": 0.5, "out11": None})) == dict.fromkeys(oracle.SD, 0.0) | {
        "IN04": 0.5,
        "OUT11": None,
    }


@pytest.mark.parametrize(
    ("text", "family", "says"),
    [
        ("", "sd1", "empty"),
        ("abc", "sd1", "'abc' is not a number"),
        ("nan", "sd1", "'nan' is not a number"),
        ("inf", "sd1", "'inf' is not a number"),
        ("1_000", "sd1", "'1_000' is not a number"),
        ("1e999", "sd1", "not a number"),
        ("0,1,2", "sd1", "3 weights given; 26 are needed"),
        (",".join("1" * 27), "sd1", "27 weights given"),
        (",".join("1" * 20), "sd1", "SDXL's 20 blocks given; sd1 needs 26"),
        (",".join("1" * 19), "sd2", "sd2 needs 26"),
        ("IN12=1", "sd1", "unknown block 'IN12'; did you mean 'IN"),
        ("IN11=1", "sdxl", "unknown block 'IN11': SDXL has BASE, IN00-IN08, M00, OUT00-OUT08"),
        ("BASS=1", "sd1", "did you mean 'BASE'"),
        ("IN01=x", "sd1", "'x' is not a number"),
        ("IN01=", "sd1", "cannot read 'IN01=' in the weights: write BLOCK=NUMBER"),
        ("IN01=1,M00", "sd1", "cannot read 'M00'"),
        ("IN01-=1", "sd1", "cannot read 'IN01-=1' in the weights: write BLOCK=NUMBER"),
        ("=0.5", "sd1", "cannot read '=0.5' in the weights: write BLOCK=NUMBER"),
        ("IN00", "sd1", "'IN00' is not a number: write BLOCK=NUMBER"),
        ("ALL=1", "sd1", "SD1 and SD2 have BASE, IN00-IN11, M00, OUT00-OUT11"),
        ("M00=\u0661", "sd1", "not a number"),
        ("IN\u0661=1", "sd1", "unknown block"),
        ("1e308", "sd1", "weight of BASE is 1e+308: at most 1,000,000 is allowed"),
        ("IN04=-2e6", "sdxl", "weight of IN04 is -2000000"),
        (10**300, "sd1", "at most 1,000,000"),
        ([0.5, "x"] + [0] * 24, "sd1", "not a number"),
        ([True] * 26, "sd1", "not a number"),
        ([float("nan")] * 26, "sd1", "BASE is not a number"),
        ({"IN99": 1}, "sd1", "unknown block 'IN99'"),
        ({"IN01": "much"}, "sd1", "IN01 is not a number"),
        (object(), "sd1", "not a number"),
    ],
)
def test_weights_that_cannot_be_read(text, family, says):
    with pytest.raises(WeightsError) as caught:
        parse_weights(text, family)
    assert says in str(caught.value)


@given(lists, lists, st.floats(0, 1))
def test_arithmetic(first, second, ratio):
    a, b = BlockWeights.from_numbers(first), BlockWeights.from_numbers(second)
    assert a.complement().complement() == pytest.approx(dict(a), abs=1e-12)
    assert a.scale(1.0) == a
    assert a.scale(0.0) == BlockWeights.flat(0.0)
    assert a.interpolate(b, 0.0) == a
    assert a.interpolate(b, 1.0) == b
    assert a.interpolate(a, ratio) == pytest.approx(dict(a), abs=1e-12)
    assert a.interpolate(b, ratio) == pytest.approx(dict(b.interpolate(a, 1 - ratio)), abs=1e-12)
    assert a.replace({"M00": 7.0})["M00"] == 7.0
    assert a.replace({}) == a
    assert hash(a) == hash(BlockWeights.from_numbers(first))
    assert parse_weights(str(a)) == pytest.approx(dict(a), rel=1e-9, abs=1e-9)


def test_arithmetic_keeps_skipped_blocks_and_refuses_mixed_families():
    a = BlockWeights.flat(0.5).replace({"M00": None})
    assert a.scale(2)["M00"] is None
    assert a.complement()["M00"] is None
    assert a.interpolate(BlockWeights.flat(1), 0.5)["M00"] is None
    assert "skip" in str(a)
    with pytest.raises(WeightsError, match="26 and of 20 blocks"):
        a.interpolate(a.for_sdxl(), 0.5)
    with pytest.raises(WeightsError, match="did you mean 'M00'"):
        a.replace({"M01": 1})
    with pytest.raises(WeightsError, match="no weight for block IN00"):
        BlockWeights({"BASE": 1})
    with pytest.raises(WeightsError, match="unknown SDXL mapping 'size'"):
        a.for_sdxl("size")


@pytest.mark.parametrize("wrong", ["x", None, math.nan, True, [0.5]])
def test_arithmetic_refuses_what_is_no_number(wrong):
    a = BlockWeights.flat(0.5)
    with pytest.raises(WeightsError, match="the factor is not a number"):
        a.scale(wrong)
    with pytest.raises(WeightsError, match="the ratio is not a number"):
        a.interpolate(a, wrong)


def test_arithmetic_refuses_what_is_no_block_weights():
    a = BlockWeights.flat(0.5)
    for refused in (lambda: a.add("low_res"), lambda: a.interpolate("low_res", 0.5)):
        with pytest.raises(WeightsError, match="BlockWeights are needed; str given"):
            refused()


def test_the_two_presets_the_project_is_named_for():
    for name, alias, sd, sdxl in (
        ("high_res", "High-Res_replace", oracle.HIGH_RES, oracle.SDXL_HIGH_RES),
        ("low_res", "LOW-RES-REPLACE", oracle.LOW_RES, oracle.SDXL_LOW_RES),
    ):
        assert list(blockmerge.load_preset(name).values()) == oracle.numbers(sd)
        assert blockmerge.load_preset(alias) == blockmerge.load_preset(name)
        preset = find_preset(name)
        assert list(preset.sdxl.values()) == oracle.numbers(sdxl)
        assert preset.weights_for("sdxl") == preset.sdxl
        # carried over by resolution, but for nothing
        assert preset.weights_for("sdxl", "resolution") == preset.sdxl
        assert preset.weights_for("sdxl", "name") == preset.weights.for_sdxl("name")


def test_every_shipped_preset_can_be_read_and_says_where_it_comes_from():
    found = presets()
    assert len(found) == len(list(shipped_folder().iterdir())) == 40
    assert len(blockmerge.preset_names()) == 40
    for preset in found:
        assert preset.source
        assert preset.description
        assert len(preset.weights) == 26
        assert all(0 <= weight <= 1 for weight in preset.weights.values())


@pytest.mark.parametrize(
    ("name", "curve"),
    [
        ("SMOOTHSTEP", lambda x: 3 * x**2 - 2 * x**3),
        ("reverse-smoothstep", lambda x: 1 - (3 * x**2 - 2 * x**3)),
        ("COSINE", lambda x: (1 + __import__("math").cos(__import__("math").pi * x)) / 2),
        ("FLAT_25", lambda x: 0.25),
        ("GRAD_V", lambda x: abs(1 - 2 * x)),
        ("GRAD_A", lambda x: 1 - abs(1 - 2 * x)),
        ("SMOOTHSTEP/2", lambda x: 3 * min(2 * x, 2 - 2 * x) ** 2 - 2 * min(2 * x, 2 - 2 * x) ** 3),
    ],
)
def test_presets_that_follow_a_formula(name, curve):
    numbers = list(blockmerge.load_preset(name).values())
    assert numbers[0] == 0
    assert numbers[1:] == pytest.approx([curve(i / 24) for i in range(25)], abs=1e-9)


def test_unknown_presets_name_the_nearest():
    for name, near in {"hi_res": "high_res", "smothstep": "SMOOTHSTEP", "flat25": "FLAT_25"}.items():
        with pytest.raises(PresetError) as caught:
            blockmerge.load_preset(name)
        assert f"unknown preset '{name}'" in str(caught.value)
        assert near in str(caught.value)


def test_the_users_own_presets():
    folder = user_folder()
    folder.mkdir(parents=True)
    (folder / "mine.toml").write_text('weights = "IN04=0.5"\ndescription = "two\\nlines"\n')
    (folder / "high.toml").write_text("name = 'High-Res'\nweights = 0.75\n".replace("0.75", '"0.75"'))
    (folder / "many.txt").write_text(
        f"preset_name\tpreset_weights\nONE\t{oracle.LOW_RES}\nTWO:{oracle.HIGH_RES}\n"
    )
    names = blockmerge.preset_names()
    assert names[:4] == ["High-Res", "mine", "ONE", "TWO"]
    assert len(names) == 43  # 40, of which one is hidden, and four
    assert blockmerge.load_preset("mine")["IN04"] == 0.5
    assert blockmerge.load_preset("high_res") == BlockWeights.flat(0.75)
    assert blockmerge.load_preset("two") == parse_weights(oracle.HIGH_RES)
    (folder / "mine.toml").write_text('weights = "IN04=0.25"')
    assert blockmerge.load_preset("mine")["IN04"] == 0.25


def test_a_hidden_presets_aliases_lead_to_the_one_that_hides_it():
    user_folder().mkdir(parents=True)
    (user_folder() / "high_res.toml").write_text("weights = 0.75")
    assert blockmerge.load_preset("high-res_replace") == BlockWeights.flat(0.75)
    assert blockmerge.load_preset("low-res_replace") == parse_weights(oracle.LOW_RES)


def test_preset_files_in_the_users_folder_that_cannot_be_read_are_told_of():
    folder = user_folder()
    folder.mkdir(parents=True)
    assert unreadable_presets() == []
    (folder / "my_mix.toml").write_text("weights = [1, 2")
    (folder / "a.txt").write_text("just words")
    (folder / "good.txt").write_text(f"# a comment: 1\n\nGOOD\t{oracle.LOW_RES}\n")
    assert blockmerge.load_preset("good") == parse_weights(oracle.LOW_RES)
    first, second = unreadable_presets()
    assert "a.txt, line 1: expected NAME" in first
    assert "my_mix.toml is not TOML" in second
    with pytest.raises(
        PresetError,
        match=r"^your own preset 'MY-MIX' cannot be read: preset file .*my_mix.toml is not TOML(?!.*a.txt)",
    ):
        blockmerge.load_preset("MY-MIX")
    with pytest.raises(
        PresetError, match=r"^unknown preset 'other' .* and says why it cannot read 2 of your own\)$"
    ):
        blockmerge.load_preset("other")


def test_weights_given_as_a_preset_are_refused():
    with pytest.raises(
        PresetError, match="a preset is a name or a file, not a BlockWeights: give weights as weights="
    ):
        WeightsRequest(preset=BlockWeights.flat(0.5)).check()


def test_preset_files_by_path(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text("weights = [" + ",".join(["0.5"] * 25) + "]\nsdxl = [" + ",".join(["1"] * 20) + "]\n")
    assert list(blockmerge.load_preset(str(own)).values()) == [0.0] + [0.5] * 25
    assert find_preset(str(own)).name == "own"
    supermerger = tmp_path / "mbwpresets.txt"
    supermerger.write_text(
        "preset_name\tpreset_weights\n"
        f"A\t{oracle.HIGH_RES}\n\n"
        "B 2 :1.,1.,1.," + ",".join(["0."] * 23) + "\n"
        "RANDOM\tR" + ",U" * 24 + ",X\n"
        "OF TENSORS\tER" + ",0" * 25 + "\n"
        "MBW\t" + ",".join(["0.5"] * 25) + "\n",
        encoding="utf-8-sig",
    )
    assert blockmerge.load_preset(f"{supermerger}#a") == parse_weights(oracle.HIGH_RES)
    assert list(blockmerge.load_preset(f"{supermerger}#B 2").values()) == [1.0] * 3 + [0.0] * 23
    assert list(blockmerge.load_preset(f"{supermerger}#mbw").values()) == [0.0] + [0.5] * 25
    with pytest.raises(
        PresetError, match=r"holds 4 presets \(A, B 2, RANDOM, MBW\): write mbwpresets.txt#NAME"
    ):
        blockmerge.load_preset(str(supermerger))
    twice = tmp_path / "twice.txt"
    twice.write_text(f"A:{oracle.HIGH_RES}\na:{oracle.LOW_RES}\nB:{oracle.LOW_RES}\n")
    assert blockmerge.load_preset(f"{twice}#B") == parse_weights(oracle.LOW_RES)
    with pytest.raises(PresetError, match=r"twice.txt holds 2 presets of the name 'A'"):
        blockmerge.load_preset(f"{twice}#A")
    with pytest.raises(PresetError, match=r"no preset 'C' in .*mbwpresets.txt"):
        blockmerge.load_preset(f"{supermerger}#C")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.toml", "weights = [1, 2", "not TOML"),
        ("x.toml", "name = 'x'", "has no 'weights'"),
        ("x.toml", "weights = [1, 2]", "2 weights given"),
        ("x.toml", "weights = 1979-05-27", "'weights': neither a number, a list, a text nor a table"),
        ("x.toml", "weight = '0.5'", "unknown key 'weight'"),
        ("x.toml", "name = 3\nweights = '0.5'", "'name' is not a text of one line"),
        ("x.toml", "name = ' '\nweights = '0.5'", "'name' is not a text of one line"),
        ("x.toml", 'name = "a\\nb"\nweights = "0.5"', "'name' is not a text of one line"),
        ("x.toml", "source = 3\nweights = '0.5'", "'source' is not a text"),
        ("x.toml", "aliases = 'x'\nweights = '0.5'", "'aliases' is not a list of texts"),
        ("x.toml", "aliases = [1]\nweights = '0.5'", "'aliases' is not a list of texts"),
        ("x.toml", "weights = " + "1" * 5000, "a number too long"),
        ("x.txt", "# only a comment: 0.5", "holds no preset"),
        (
            "x.toml",
            "weights = '0.5'\nsdxl = [" + ",".join("1" * 26) + "]",
            "'sdxl': 26 weights given where 20",
        ),
        ("x.txt", "just words", "line 1: expected NAME"),
        ("x.txt", "\nname\t1,2,3", "line 2: 3 weights given"),
        ("x.txt", "", "holds no preset"),
        ("x.txt", b"\xff\xfe\x00", "is not text"),
        ("x.txt", "x" * 2_000_000, "too large"),
        ("missing.toml", None, "cannot read preset file"),
    ],
)
def test_preset_files_that_cannot_be_read(tmp_path, name, text, says):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PresetError) as caught:
        blockmerge.load_preset(str(path))
    assert says in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "text", ["0.5", "1", '"skip"', '["skip", 0.25' + ", 1" * 24 + "]", '{BASE = "skip", IN00 = 0.5}']
)
def test_all_forms_of_weights_in_a_toml_file(tmp_path, text):
    path = tmp_path / "x.toml"
    path.write_text(f"weights = {text}")
    expected = {
        "0.5": BlockWeights.flat(0.5),
        "1": BlockWeights.flat(1),
        '"skip"': BlockWeights.flat(None),
        '["skip", 0.25' + ", 1" * 24 + "]": BlockWeights.from_numbers([None, 0.25, *[1] * 24]),
        '{BASE = "skip", IN00 = 0.5}': parse_weights("BASE=skip,IN00=0.5"),
    }[text]
    assert blockmerge.load_preset(str(path)) == expected


def test_community_presets_have_not_been_touched():
    """Their numbers, copied independently when they were collected."""
    collected = json.loads((Path(__file__).parent / "files" / "community-26.json").read_text())
    assert len(collected) == 38
    for name, numbers in collected.items():
        assert list(blockmerge.load_preset(name).values()) == numbers

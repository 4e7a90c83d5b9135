"""`Lora`: what FILE[:STRENGTH[:BLOCKS]] means, and which weights BLOCKS are for a family."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from blockmerge import BlockWeights, RecipeError, WeightsError, open_checkpoint
from blockmerge.adapters import Lora
from blockmerge.anatomy import FAMILIES
from tests.adapter_names import modules
from tests.small_adapters import LINEAR, SHAPES, lora_of

# -- FILE[:STRENGTH[:BLOCKS]] --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "file", "strength", "blocks"),
    [
        ("a.safetensors", "a.safetensors", 1, None),
        ("a.safetensors:0.8", "a.safetensors", 0.8, None),
        ("a.safetensors:-.5:OUTALL", "a.safetensors", -0.5, "OUTALL"),
        ("a.safetensors::OUTALL", "a.safetensors", 1, "OUTALL"),
        ("a.safetensors:", "a.safetensors", 1, None),
        ("a.safetensors:2:", "a.safetensors", 2, None),
        ("a.safetensors:1e-3:BASE=0,IN04-OUT05=1", "a.safetensors", 0.001, "BASE=0,IN04-OUT05=1"),
        ("folder:x/a.safetensors:0.5", "folder:x/a.safetensors", 0.5, None),
        ("a: 0.5 : OUTALL ", "a", 0.5, "OUTALL"),
        ("a:0.5:X:Y", "a", 0.5, "X:Y"),
    ],
)
def test_a_text_is_a_file_a_strength_and_blocks(text, file, strength, blocks):
    assert Lora.parse(text) == Lora(file, strength, blocks)


def test_the_file_is_the_longest_beginning_that_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a:0.5", "style: v2.safetensors"):
        Path(name).touch()
    Path("folder:1").mkdir()
    assert Lora.parse("a:0.5") == Lora("a:0.5")
    assert Lora.parse("a:0.5:0.25") == Lora("a:0.5", 0.25)
    assert Lora.parse("a:0.7:OUTALL") == Lora("a", 0.7, "OUTALL")
    assert Lora.parse("style: v2.safetensors:-1") == Lora("style: v2.safetensors", -1)
    with pytest.raises(RecipeError, match="no file"):
        Lora.parse(":0.5")


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("C:\\x\\a.safetensors:0.8", "C:\\x\\a.safetensors", 0.8),
        ("C:/x/a.safetensors:0.8", "C:/x/a.safetensors", 0.8),
        ("C:a.safetensors:0.8", "C:a.safetensors", 0.8),
        ("C:\\x\\a.safetensors", "C:\\x\\a.safetensors", 1),
        ("\\\\server\\x:y\\a.safetensors:2", "\\\\server\\x:y\\a.safetensors", 2),
    ],
)
def test_a_drive_is_no_strength_on_windows(text, file, strength):
    assert Lora.parse(text, windows=True) == Lora(file, strength)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no file in ''"),
        (":1", "no file in ':1'"),
        ("folder/:1", None),
        ("a:OUTALL", "'OUTALL' in 'a:OUTALL' is not a strength (and there is no file a)"),
        ("a:nan", "'nan' in 'a:nan' is not a strength"),
        ("a:inf", "'inf' in 'a:inf' is not a strength"),
        ("a:0,5", "'0,5' in 'a:0,5' is not a strength"),
        ("a:1_0", "'1_0' in 'a:1_0' is not a strength"),
    ],
)
def test_what_is_no_strength_is_refused(text, said):
    if said is None:
        assert Lora.parse(text).file == "folder/"
        return
    with pytest.raises(RecipeError) as caught:
        Lora.parse(text)
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("style.safetensors:0.8 or style.safetensors:0.5:OUTALL")


@given(
    st.text(max_size=40), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["", "OUTALL"])
)
def test_what_is_written_is_read_back(name, strength, blocks):
    file = f"no folder/{name.replace(':', '')}.safetensors".replace("\0", "")
    text = f"{file}:{strength!r}" + (f":{blocks}" if blocks else "")
    assert Lora.parse(text, windows=False) == Lora(file, strength, blocks or None)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, "0.5", True, None, [1], 10**400])
def test_a_strength_is_a_finite_number(strength):
    with pytest.raises(RecipeError, match="the strength of a LoRA is a finite number"):
        Lora("a", strength)


@pytest.mark.parametrize("strength", [1, 0, -2, 0.5, np.float32(0.5), np.int64(3)])
def test_strengths_are_floats(strength):
    found = Lora("a", strength).strength
    assert (found, type(found)) == (float(strength), float)


@pytest.mark.parametrize("name", ["", 1])
def test_a_name_is_a_text(name):
    with pytest.raises(RecipeError, match="the name of a LoRA is a text"):
        Lora("a", name=name)


def test_what_is_taken_for_a_lora(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = lora_of(LINEAR, alpha=1.0)
    save_file(tensors, path)
    lora = Lora(path, 0.5, "OUTALL", "name")
    assert Lora.of(lora) is lora
    assert Lora.of(f"{path}:0.5") == Lora(str(path), 0.5)
    assert Lora.of(path) == Lora(path)
    assert Lora.of((path, 0.5)) == Lora(path, 0.5)
    assert Lora.of([str(path), 0.5, "OUTALL"]) == Lora(str(path), 0.5, "OUTALL")
    assert Lora.of((str(path),)) == Lora(str(path))
    for source in (tensors, open_checkpoint(path)):
        assert Lora.of(source).file is source
        assert Lora.of((source, 0.5)).strength == 0.5
    for other in (None, 1, (), (1, 2), ("a", 1, None, None, None)):
        with pytest.raises(RecipeError, match="is not a LoRA"):
            Lora.of(other)


def test_a_lora_is_opened_for_a_model(tmp_path):
    path = tmp_path / "a.b.safetensors"
    save_file(lora_of(LINEAR, alpha=1.0), path)
    assert Lora(path).label == Lora(str(path)).label == Lora(open_checkpoint(path)).label == "a.b"
    assert (Lora({}).label, Lora(path, name="n").label) == ("state dict", "n")
    adapter = Lora(path).open(FAMILIES["sd1"], SHAPES)
    assert (adapter.name, adapter.modules[0].factor) == ("a.b.safetensors", 0.5)
    assert Lora(path, name="n").open(FAMILIES["sd1"], SHAPES).name == "n"


# -- BLOCKS --------------------------------------------------------------------------------------------------

PLAIN = {
    17: [
        "BASE",
        "IN01",
        "IN02",
        "IN04",
        "IN05",
        "IN07",
        "IN08",
        "M00",
        "OUT03",
        "OUT04",
        "OUT05",
        "OUT06",
        "OUT07",
        "OUT08",
        "OUT09",
        "OUT10",
        "OUT11",
    ],
    12: ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05"],
}
OF = {"sd1": 17, "sd2": 17, "sdxl": 12}
PRESETS = {  # by the lists of numbers that SuperMerger and lora-block-weight have for 17 blocks
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
}
PRESETS_OF_12 = {  # by the Inspire Pack
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1",
    "INALL": "1,1,1,1,1,0,0,0,0,0,0,0",
    "MIDALL": "1,0,0,0,0,1,0,0,0,0,0,0",
    "OUTALL": "1,0,0,0,0,0,1,1,1,1,1,1",
}


def weights(blocks, family="sd1", **how):
    return dict(Lora("a", blocks=blocks).weights(family, **how))


def the_others_are_0(named, family):
    return {block: named.get(block, 0.0) for block in FAMILIES[family].blocks}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_blocks_all_are_1(family):
    assert weights(None, family) == dict.fromkeys(FAMILIES[family].blocks, 1.0)
    assert weights(None, FAMILIES[family]) == weights(None, family)


@pytest.mark.parametrize("family", OF)
def test_short_lists_are_for_the_blocks_that_plain_loras_meet(family):
    program = {"sd1": "sd15-kohya", "sd2": "sd21-kohya", "sdxl": "sdxl-kohya"}[family]
    blocks = PLAIN[OF[family]]
    assert {said.block for said in modules(family, program).values()} == set(blocks)
    numbers = [number / 8 for number in range(len(blocks))]
    expected = the_others_are_0(dict(zip(blocks, numbers, strict=True)), family)
    for written in (
        numbers,
        tuple(numbers),
        np.array(numbers),
        ",".join(map(str, numbers)),
        " ".join(map(str, numbers)),
    ):
        assert weights(written, family) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_long_lists_are_for_all_blocks(family):
    blocks = FAMILIES[family].blocks
    numbers = [number / 8 for number in range(len(blocks))]
    assert weights(numbers, family) == dict(zip(blocks, numbers, strict=True))


@pytest.mark.parametrize(
    ("family", "count", "said"),
    [
        ("sd1", 12, "12 numbers given for the blocks of a LoRA, which are for Stable Diffusion XL: Stable Diffusion 1.x takes one number, or 17 (BASE, IN01-IN02, IN04-IN05, IN07-IN08, M00, OUT03-OUT11) or 26 ("),
        ("sdxl", 17, "17 numbers given for the blocks of a LoRA, which are for Stable Diffusion 1.x and Stable Diffusion 2.x: "),
        ("sdxl", 26, "26 numbers given"),
        ("sd1", 20, "20 numbers given"),
        ("sd1", 25, "25 numbers given for the blocks of a LoRA: Stable Diffusion 1.x takes one number"),
        ("sdxl_refiner", 17, "17 numbers given"),
        ("sd1", 2, "2 numbers given for the blocks of a LoRA: "),
        ("sd1", 0, "0 numbers given"),
    ],
)  # fmt: skip
def test_lists_of_another_length_are_refused(family, count, said):
    for written in ([1.0] * count, ",".join(["1"] * count)):
        if written:
            with pytest.raises(WeightsError) as caught:
                weights(written, family)
            assert str(caught.value).startswith(f"the blocks of a: {said}")


@pytest.mark.parametrize(("family", "preset"), [(f, name) for f in ("sd1", "sd2") for name in PRESETS])
def test_presets_of_17_blocks(family, preset):
    numbers = map(float, PRESETS[preset].split(","))
    assert weights(preset, family) == the_others_are_0(dict(zip(PLAIN[17], numbers, strict=True)), family)
    assert weights(f" {preset.lower()} ", family) == weights(preset, family)


@pytest.mark.parametrize("preset", PRESETS_OF_12)
def test_presets_of_12_blocks(preset):
    numbers = map(float, PRESETS_OF_12[preset].split(","))
    assert weights(preset, "sdxl") == the_others_are_0(dict(zip(PLAIN[12], numbers, strict=True)), "sdxl")


def test_the_docs_say_what_the_presets_hold():
    page = (Path(__file__).parent.parent / "docs/lora.md").read_text()
    table = page.partition("| LoRA preset |")[2].partition("\n\n")[0].splitlines()[2:]
    for row in table:
        preset, *texts = [cell.strip(" `") for cell in row.strip("|").split("|")]
        for family, text in zip((("sd1", "sd2"), ("sdxl",)), texts, strict=True):
            for name in family if text != "–" and not text.startswith("as ") else ():
                assert weights(text, name) == weights(preset, name), (preset, name)
    assert {row.split("`")[1] for row in table} == {*PRESETS, *PRESETS_OF_12}


def test_there_are_no_other_presets():
    from blockmerge.adapters.block_texts import lora_presets

    found = {name: list(lora_presets(family)) for name, family in FAMILIES.items()}
    transformers = [name for name, family in FAMILIES.items() if family.arms is None]
    assert found == {
        **{name: [] for name in transformers},
        "sd1": list(PRESETS),
        "sd2": list(PRESETS),
        "sdxl": list(PRESETS_OF_12),
        "sdxl_refiner": [],
    }


@pytest.mark.parametrize(
    ("blocks", "family", "said"),
    [
        ("high_res", "sd1", "unknown LoRA preset 'high_res': Stable Diffusion 1.x has NONE, ALL, INS, "),
        ("outal", "sdxl", "unknown LoRA preset 'outal'; did you mean 'OUTALL'?: Stable Diffusion XL has NONE, ALL, INALL, MIDALL, OUTALL; or write weights, as in IN00-IN05=0.5"),
        ("MIDD", "sdxl", "unknown LoRA preset 'MIDD'"),
        ("OUT03", "sdxl", "unknown LoRA preset 'OUT03': Stable Diffusion XL has NONE, ALL, INALL, MIDALL, OUTALL; or write weights, as in OUT03=0.5"),
        ("ALL", "sdxl_refiner", "unknown LoRA preset 'ALL': Stable Diffusion XL refiner has none; or write"),
        ("", "sd1", "unknown LoRA preset ''"),
        ("OUT11=1", "sdxl", "unknown block 'OUT11'"),
        ("OUT03=x", "sdxl", "OUT03=x: 'x' is not a number"),
        ("IN04=nan", "sd1", "IN04=nan: 'nan' is not a number"),
        ("1:1", "sd1", "there is a third ':', and a LoRA is given as FILE[:STRENGTH[:BLOCKS]]"),
        ("1,a," * 8 + "1", "sd1", "weight of IN01 is not a number: 'a'"),
        (math.nan, "sd1", "weight of BASE is not a number"),
        (BlockWeights.flat(1.0), "sdxl", "weights of 26 blocks are given for a LoRA of Stable Diffusion XL, which has 20"),
    ],
)  # fmt: skip
def test_blocks_that_a_family_does_not_have_are_refused(blocks, family, said):
    with pytest.raises(WeightsError) as caught:
        weights(blocks, family)
    assert str(caught.value).startswith(f"the blocks of a: {said}")


def test_blocks_that_cannot_be_read_name_the_file_and_an_unknown_family_does_not():
    with pytest.raises(WeightsError, match=r"^the blocks of style\.safetensors: unknown LoRA preset 'foo'"):
        Lora("folder/style.safetensors", 1, "foo").weights("sd1")
    with pytest.raises(WeightsError, match=r"^unknown family 'sd9'"):
        weights(1, "sd9")


def test_any_weights_are_taken():
    assert weights("OUT03-OUT05=0.5,BASE=1", "sdxl") == the_others_are_0(
        {"OUT03": 0.5, "OUT04": 0.5, "OUT05": 0.5, "BASE": 1.0}, "sdxl"
    )
    assert weights({"M00": -2}, "sd1") == the_others_are_0({"M00": -2.0}, "sd1")
    for half in (0.5, "0.5", BlockWeights.flat(0.5), np.float32(0.5)):
        assert weights(half) == dict.fromkeys(FAMILIES["sd1"].blocks, 0.5)


def test_what_is_skipped_is_0():
    assert weights("BASE=skip,M00=1") == the_others_are_0({"M00": 1.0}, "sd1")
    assert weights("skip") == the_others_are_0({}, "sd1")
    assert weights("1,skip," * 8 + "1")["IN01"] == 0


def test_chance_follows_the_seed():
    drawn = weights("random(0.2,0.4)", seed=1)
    assert all(0.2 <= weight <= 0.4 for weight in drawn.values())
    assert drawn == weights("random(0.2,0.4)", seed=1) != weights("random(0.2,0.4)", seed=2)
    assert weights(" ".join(["random(0.2,0.4)"] * 17), seed=1) == the_others_are_0(
        {block: drawn[block] for block in PLAIN[17]}, "sd1"
    )

"""What is taken for dtypes, rules, adjust and weights, in all the forms that people give them in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import blockmerge
from blockmerge import BlockWeights, RecipeError, WeightsError
from blockmerge.anatomy import FAMILIES
from blockmerge.weights import Adjust, ElementRules, WeightsRequest, parse_weights
from tests.commands import ok
from tests.small_models import small_model

# -- dtypes --------------------------------------------------------------------------------------------------

DTYPES = {
    "F16": ("fp16", "FP16", "half", "float16", "torch.float16", "torch.half", "F16", "Half", torch.float16),
    "BF16": ("bf16", "BF16", "bfloat16", "torch.bfloat16", torch.bfloat16),
    "F32": ("fp32", "FP32", "float32", "float", "torch.float32", "f32", torch.float32, torch.float),
    "F8_E4M3": ("fp8_e4m3fn", "float8_e4m3fn", "FP8_E4M3FN", "torch.float8_e4m3fn", torch.float8_e4m3fn),
    "F8_E5M2": ("fp8_e5m2", "float8_e5m2", "F8_E5M2"),
}


@pytest.fixture(scope="module")
def models():
    return [small_model(seed=seed) for seed in (0, 1)]


@pytest.mark.parametrize(("header", "name"), [(h, name) for h, names in DTYPES.items() for name in names])
def test_dtypes(models, tmp_path, header, name):
    out = tmp_path / "out.safetensors"
    blockmerge.convert(models[0], out, dtype=name)
    written = blockmerge.Merge("a", "b", weights=0.5, dtype=name).to_dict()
    assert written["dtype"] == DTYPES[header][0]
    with safe_open(out, "pt") as file:
        assert file.get_slice("model.diffusion_model.out.2.weight").get_dtype() == header


def test_dtypes_on_the_command_line(pairs, here, capsys):
    for name in ("half", "FP16", "torch.float16", "KEEP"):
        ok(capsys, "convert", pairs()[0], f"{name}.safetensors", "--dtype", name)
    assert load_file("half.safetensors").keys() == load_file("KEEP.safetensors").keys()


@pytest.mark.parametrize("name", ["int8", "fp15", "", "torch", "float64", "complex64", None])
def test_other_dtypes_are_refused(models, name):
    with pytest.raises(RecipeError, match="unknown dtype"):
        blockmerge.Merge(*models, weights=0.5, dtype=name)


# -- rules and adjust ----------------------------------------------------------------------------------------

RULES = "OUT03:in_layers:0.25, NOT BASE:norm:skip"
SAME_RULES = (
    RULES,
    ["OUT03:in_layers:0.25", "NOT BASE:norm:skip"],
    ("OUT03:in_layers:0.25, NOT BASE:norm:skip",),
    ElementRules.parse(RULES),
    list(ElementRules.parse(RULES).rules),
    [ElementRules.parse("OUT03:in_layers:0.25"), "NOT BASE:norm:skip"],
)
ADJUST = "1,2,-3,4"
SAME_ADJUST = (
    ADJUST,
    [1, 2, -3, 4],
    (1.0, 2, -3, 4, 0, 0, 0, 0),
    np.array([1, 2, -3, 4]),
    [np.float32(1), np.int64(2), -3.0, 4],
    Adjust(1, 2, -3, 4),
    Adjust.parse(ADJUST),
)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options",
    [*({"rules": rules} for rules in SAME_RULES), *({"adjust": adjust} for adjust in SAME_ADJUST)],
    ids=lambda options: str({key: type(value).__name__ for key, value in options.items()}),
)
def test_all_forms_are_one(models, tmp_path, options):
    (key,) = options
    texts = {"rules": RULES, "adjust": ADJUST}
    wanted = blockmerge.merge_state_dicts(*models, weights=0.5, **{key: texts[key]})
    assert not same(wanted, blockmerge.merge_state_dicts(*models, weights=0.5))
    assert same(wanted, blockmerge.merge_state_dicts(*models, weights=0.5, **options))
    blockmerge.merge(*models, weights=0.5, output=tmp_path / "out.safetensors", **options)
    assert same(wanted, load_file(tmp_path / "out.safetensors"))
    recipe = blockmerge.Recipe("a", "b", weights=0.5, **options)
    written = recipe.to_dict()
    again = blockmerge.Recipe.from_dict(written)
    assert again == recipe == blockmerge.Recipe("a", "b", weights=0.5, **{key: texts[key]})
    assert again.to_dict() == written
    recipe.dump(tmp_path / "recipe.json")
    assert blockmerge.Recipe.load(tmp_path / "recipe.json") == recipe


def test_a_recipe_with_lists_is_read():
    written = {"models": ["a", "b"], "weights": 0.5, "adjust": [1, 2, -3, 4], "rules": SAME_RULES[1]}
    wanted = blockmerge.Recipe("a", "b", weights=0.5, adjust=ADJUST, rules=RULES)
    assert blockmerge.Recipe.from_dict(written) == wanted


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rules": 5}, "^rules are a text, .*; int given$"),
        ({"rules": [0.5]}, "^rules are a text, .*; float given$"),
        ({"rules": {"OUT03": 1}}, "; dict given$"),
        ({"rules": ["OUT03:attn:1", "OUT66:attn:1"]}, "^element rule 2, '>>OUT66<<"),
        ({"rules": ElementRules.parse(RULES).resolve("sd1")}, "; FamilyRules given$"),
        ({"adjust": 5}, "^adjust is eight numbers, .*; int given$"),
        ({"adjust": {"into": 1}}, "; dict given$"),
        ({"adjust": [1] * 9}, "9 numbers given; there are eight"),
        ({"adjust": [1, "much"]}, "OUT is 'much', which is not a number"),
        ({"adjust": [1, None]}, "OUT is 'None', which is not a number"),
        ({"adjust": [float("nan")]}, "IN is 'nan', which is not a number"),
    ],
)
def test_what_is_neither_is_refused(models, options, says):
    for make in (blockmerge.merge_state_dicts, blockmerge.Recipe):
        with pytest.raises(RecipeError, match=says):
            make(*models, weights=0.5, **options)


@pytest.mark.parametrize("number", [float("inf"), "1", None, True])
def test_an_adjust_of_what_is_no_number(number):
    with pytest.raises(WeightsError, match="adjust: CONT is"):
        Adjust(contrast=number)


# -- BlockWeights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0.5, 1, "0.5", "high_res", [0.5] * 26, None, np.ones(26)])
def test_block_weights_are_made_from_a_mapping(wrong):
    with pytest.raises(
        WeightsError, match=r"mapping .*; \w+ given: BlockWeights\.flat\(0\.5\) .*from_numbers"
    ):
        BlockWeights(wrong)


@pytest.mark.parametrize("wrong", [0.5, "0,0,1", None])
def test_block_weights_from_numbers_need_a_list(wrong):
    with pytest.raises(WeightsError, match=r"takes a list of numbers.* given \(BlockWeights\.flat"):
        BlockWeights.from_numbers(wrong)


def array(weights):
    return np.array(list(weights.values()), dtype=np.float64)


def test_block_weights_are_added_and_multiplied():
    high, low = blockmerge.load_preset("high_res"), blockmerge.load_preset("low_res")
    for found, wanted in (
        (high + low, array(high) + array(low)),
        (high - low, array(high) - array(low)),
        (high * 2, array(high) * 2),
        (0.25 * high, array(high) * 0.25),
        (np.float32(0.25) * high, array(high) * 0.25),
        (high * np.int64(3), array(high) * 3),
        (np.float64(0.25) * high, array(high) * 0.25),
        (high / 4, array(high) / 4),
        (-high, -array(high)),
        (sum([high, low, high]), 2 * array(high) + array(low)),
    ):
        assert isinstance(found, BlockWeights)
        assert found.blocks == high.blocks
        assert np.array_equal(array(found), wanted)
    assert 0.6 * high + 0.4 * low == WeightsRequest(["high_res@0.6", "low_res@0.4"]).resolve("sd1")
    assert str(-0.0 * high) == str(BlockWeights.flat(0))


def test_a_skipped_block_stays_skipped():
    some = parse_weights("IN00=0.5,M00=skip")
    other = parse_weights("OUT03=skip,M00=1")
    for found in (some * 3, -some, some / 2, some + some, some - other, 2 * some + other):
        assert found["M00"] is None
    assert (some + other)["OUT03"] is None
    assert (some + other)["IN00"] == 0.5


def test_what_cannot_be_added_or_multiplied_is_refused():
    some = BlockWeights.flat(0.5)
    sdxl = BlockWeights.flat(0.5, FAMILIES["sdxl"].blocks)
    for wrong in (
        lambda: some + sdxl,
        lambda: some - sdxl,
        lambda: some + 1,
        lambda: 1 + some,
        lambda: some - 0.5,
        lambda: some + "low_res",
        lambda: some * "2",
        lambda: some * None,
        lambda: some * some,
        lambda: some * float("nan"),
        lambda: some / 0,
        lambda: some / "2",
        lambda: some * True,
        lambda: some * 1e7,
    ):
        with pytest.raises(WeightsError):
            wrong()

"""What a user says about weights: presets added up, random weights, and the second weight of a method."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockmerge
from blockmerge import BlockWeights, PresetError, WeightsError
from blockmerge.explaining.known_presets import matching_presets
from blockmerge.weights import WeightsRequest, find_preset, parse_weights, presets, unreadable_presets
from blockmerge.weights.presets import user_folder
from tests import oracle

ratios = st.floats(-3, 3).map(lambda value: value + 0.0)


def array(weights):
    return np.array(list(weights.values()), dtype=np.float64)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@given(first=ratios, second=ratios)
@settings(max_examples=25)
def test_presets_are_added_up(family, first, second):
    found = WeightsRequest([f"high_res@{first!r}", f"low-res_replace@{second!r}", "GRAD_A"]).resolve(family)
    high, low = (
        (oracle.SDXL_HIGH_RES, oracle.SDXL_LOW_RES) if family == "sdxl" else (oracle.HIGH_RES, oracle.LOW_RES)
    )
    grad = np.array([0, *(1 - abs(1 - i / 12) for i in range(25))])
    if family == "sdxl":  # it has no table of its own: by name
        grad = grad[[oracle.SD.index(block) for block in oracle.SDXL]]
    expected = first * np.array(oracle.numbers(high)) + second * np.array(oracle.numbers(low)) + grad
    np.testing.assert_allclose(array(found), expected, rtol=0, atol=1e-9)


@given(st.floats(0, 1))
@settings(max_examples=25)
def test_ratios_that_sum_to_1_interpolate(ratio):
    mixed = WeightsRequest([f"high_res@{1 - ratio!r}", f"GRAD_V@{ratio!r}"]).resolve("sd1")
    assert mixed == blockmerge.load_preset("high_res").interpolate(blockmerge.load_preset("GRAD_V"), ratio)


def test_one_preset_scaled_and_changed():
    assert array(WeightsRequest("low_res@0.5").resolve("sd1")) == pytest.approx(
        np.array(oracle.numbers(oracle.LOW_RES)) / 2
    )
    found = WeightsRequest(("low_res@0.5", "FLAT_25@0"), changes="M00=0.9").resolve("sd1")
    assert found["M00"] == 0.9
    assert found["IN11"] == 0.5
    by_resolution = WeightsRequest("GRAD_V@2", sdxl_map="resolution").resolve("sdxl")
    assert by_resolution["OUT00"] == pytest.approx(2 * blockmerge.load_preset("GRAD_V")["OUT03"])


def test_a_block_that_one_skips_is_skipped(tmp_path):
    (tmp_path / "own.toml").write_text("weights = 'BASE=skip,IN00-OUT11=1'")
    found = WeightsRequest([f"{tmp_path / 'own.toml'}@0", "FLAT_25"]).resolve("sd1")
    assert found["BASE"] is None
    assert found["M00"] == 0.25


def test_files_with_an_at_sign(tmp_path):
    folder = tmp_path / "me@work"
    folder.mkdir()
    (folder / "x@0.5.toml").write_text("weights = 0.8")
    (folder / "many@2").write_text(f"A@0.5:{oracle.HIGH_RES}\nA:{oracle.LOW_RES}\n")
    for text, expected in {
        f"{folder}/x@0.5.toml": BlockWeights.flat(0.8),
        f"{folder}/x@0.5.toml@0.5": BlockWeights.flat(0.4),
        f"{folder}/many@2#A": parse_weights(oracle.LOW_RES),
        f"{folder}/many@2#A@0.5": parse_weights(oracle.HIGH_RES),  # the name as it stands comes first
        f"{folder}/many@2#A@.5": parse_weights(oracle.LOW_RES).scale(0.5),
    }.items():
        assert WeightsRequest(text).resolve("sd1") == expected, text
    assert WeightsRequest(folder / "x@0.5.toml").label == "x@0.5"


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        ("hi_res@0.6", "unknown preset 'hi_res'; did you mean 'high_res'?"),
        ("high_res@much", "'much' in 'high_res@much' is not a number: write NAME@RATIO, as in high_res@0.6"),
        ("high_res@", "'' in 'high_res@' is not a number"),
        ("high_res@inf", "'inf' in 'high_res@inf' is not a number"),
        ("me@work/x.toml", "cannot read preset file me@work/x.toml"),
        ("me@home", "unknown preset 'me@home'"),
        (["high_res", "hihi"], "unknown preset 'hihi'"),
        (["high_res", None], "a preset is a name or a file, not a NoneType"),
        (0.5, "a preset is a name or a file, not a float: give weights as weights="),
    ],
)
def test_presets_that_there_are_not(preset, says):
    with pytest.raises(PresetError) as caught:
        WeightsRequest(preset).check()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ratio_that_makes_weights_too_large():
    with pytest.raises(WeightsError, match="weight of IN01 is 3000000: at most 1,000,000"):
        WeightsRequest("high_res@3e6").resolve("sd1")


def test_no_preset_is_an_error_of_one_line():
    for nothing in (None, 3, BlockWeights.flat(0.5)):
        with pytest.raises(PresetError, match="a preset is a name or a file, not a"):
            blockmerge.load_preset(nothing)


def test_labels():
    assert WeightsRequest("high-res_replace").label == "high_res"
    assert WeightsRequest("grad_v@0.60").label == "GRAD_V@0.6"
    assert WeightsRequest(["high_res@0.6", "GRAD_A"]).label == "high_res@0.6+GRAD_A"
    assert WeightsRequest(["grad_v@0.25"] * 9).label == "+".join(["GRAD_V@0.25"] * 9)
    assert WeightsRequest((), "0.5").label == "0.5"
    assert WeightsRequest(weights="random").label == "random"
    assert WeightsRequest(weights=" IN00=1,M00=2 ").label == "IN00=1,M00=2"
    assert WeightsRequest(default=1.0).label == "1"


def test_several_presets_still_exclude_weights():
    with pytest.raises(
        WeightsError,
        match=r"both a preset and weights are given: give preset \(--preset\) or weights \(--weights\); changes \(--set\) go on top",
    ):
        WeightsRequest(["high_res", "low_res"], 0.5).check()
    with pytest.raises(WeightsError, match="how much of B"):
        WeightsRequest([]).check()
    assert hash(WeightsRequest(["high_res"])) == hash(WeightsRequest(("high_res",)))


def test_beta_is_0_unless_asked_for():
    assert WeightsRequest(beta=True).resolve("sdxl") == BlockWeights.flat(0.0, oracle.SDXL)
    assert WeightsRequest(beta=True, changes="M00=0.5").resolve("sd1") == parse_weights("M00=0.5")
    assert WeightsRequest("high_res@0.5", beta=True).resolve("sd1") == blockmerge.load_preset(
        "high_res"
    ).scale(0.5)
    assert WeightsRequest(weights="IN00-M00=0.2", beta=True).resolve("sd1")["IN03"] == 0.2
    assert WeightsRequest(default=1.0).resolve("sd1") == BlockWeights.flat(1.0)
    for request, says in {
        WeightsRequest(weights="x", beta=True): "weights_beta (--weights-beta): 'x' is not a number",
        WeightsRequest(changes="M07=1", beta=True): "changes_beta (--set-beta): unknown block 'M07'",
        WeightsRequest("hihi", beta=True): "preset_beta (--preset-beta): unknown preset 'hihi'",
        WeightsRequest(
            "high_res", 0.5, beta=True
        ): "both a preset and weights are given for beta: give preset_beta (--preset-beta) or weights_beta (--weights-beta)",
    }.items():
        with pytest.raises(WeightsError) as caught:
            request.resolve("sd1")
        assert says in str(caught.value)


def test_a_comma_for_a_decimal_point():
    hint = "; decimals are written with a point, as in 0.5"
    for text in ("0,5", "BASE=0,5", "IN00-IN05=0,25,M00=1"):
        with pytest.raises(WeightsError, match=f"{hint}$"):
            parse_weights(text)
    for text in ("1,2,3", "BASE=0,half"):
        with pytest.raises(WeightsError) as caught:
            parse_weights(text)
        assert hint not in str(caught.value)


def test_what_the_sdxl_mapping_is_of_use_for():
    for request, wanted in {
        WeightsRequest("high_res"): True,  # a table of its own
        WeightsRequest("GRAD_V"): True,
        WeightsRequest("FLAT_25"): False,
        WeightsRequest(weights=oracle.HIGH_RES): True,
        WeightsRequest(weights="0.5", changes="OUT05=1"): False,
        WeightsRequest(weights="OUT05=1"): False,
        WeightsRequest(weights=",".join(["0.5"] * 20)): False,
    }.items():
        assert request.heeds_map("sdxl") == wanted, request
        assert len(request.resolve("sdxl")) == 20
        if request.preset:
            assert not request.heeds_map("sd1")


@given(st.integers(), st.floats(-5, 5), st.floats(0, 5), st.integers(0, 12))
def test_random_weights_keep_to_their_limits(seed, low, width, digits):
    found = parse_weights(f"random({low!r},{low + width!r},{digits})", seed=seed)
    for weight in found.values():
        assert low <= weight <= low + width
        assert weight in (low + 0.0, low + width) or weight == round(weight, digits)
    assert found == parse_weights(f"random({low!r}, {low + width!r}, {digits})", seed=seed)


def test_random_weights_are_spread_evenly():
    drawn = np.concatenate([array(parse_weights("random(-0.5,1.5,12)", seed=seed)) for seed in range(400)])
    assert len(np.unique(drawn)) == len(drawn) == 400 * 26
    # 10400 draws in 10 bins: 1040 each, give or take 31; and no seed follows the one before
    counts, _ = np.histogram(drawn, bins=10, range=(-0.5, 1.5))
    assert np.abs(counts - 1040).max() < 6 * 31
    assert abs(np.corrcoef(drawn[:-26], drawn[26:])[0, 1]) < 0.06


def test_a_random_weight_depends_on_seed_and_block_alone():
    everywhere = parse_weights("random", seed=5)
    assert everywhere["IN04"] == 0.924  # the same on every machine and in every release
    mixed = parse_weights("OUT05-IN03=random,BASE=0.5", seed=5)
    assert mixed["BASE"] == 0.5
    assert mixed["IN00"] == 0.0
    assert {mixed[block] == everywhere[block] for block in oracle.SD[4:20]} == {True}
    assert parse_weights({"IN04": "random"}, seed=5)["IN04"] == everywhere["IN04"]
    assert parse_weights([0.5] * 5 + ["random"] + [None] * 20, seed=5)["IN04"] == everywhere["IN04"]
    assert parse_weights("random", "sdxl", seed=5)["OUT08"] == everywhere["OUT08"]
    assert parse_weights("random", seed=6) != everywhere
    assert WeightsRequest(weights="random", seed=5).resolve("sd1") == everywhere
    assert WeightsRequest(weights=0, changes="M00=random", seed=5).resolve("sd1")["M00"] == everywhere["M00"]
    assert WeightsRequest(weights="random", seed=5, beta=True).resolve("sd1") != everywhere
    assert parse_weights(str(everywhere)) == everywhere  # what was drawn, written down, is the same merge


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("random(1)", "cannot read 'random(1)': write random, random(0.2,0.8), or random(0.2,0.8,2)"),
        ("random(0.8,0.2)", "random(0.8,0.2): the lower limit comes first"),
        (
            "M00=random(0,1,13)",
            "random(0,1,13): the lower limit comes first, then the upper, then 0 to 12 digits",
        ),
        ("random(nan,1)", "the lower limit comes first"),
        ("random(a,b)", "cannot read 'random(a,b)'"),
        ("IN00=random(0,1", "cannot read 'IN00=random(0,1' in the weights: a ')' is missing"),
        ("random(0,1", "a ')' is missing"),
        ("random 0,1)", "a '(' is missing"),
        ("randomly", "cannot read 'randomly'"),
        ("random(0,2e6)", "at most 1,000,000"),
        ("r", "'r' is not a number"),
        (["random(1)"] * 26, "cannot read 'random(1)'"),
    ],
)
def test_random_weights_that_cannot_be_read(text, says):
    with pytest.raises(WeightsError, match=re.escape(says)):
        parse_weights(text)


@pytest.mark.parametrize("seed", ["x", "7", 1.5, None, True, np.True_, np.float64(1), [1]])
def test_seeds_are_whole_numbers(seed):
    says = f"^a whole number is needed as seed: found {re.escape(str(seed))}$"
    for ask in (
        lambda: WeightsRequest(weights="random", seed=seed),
        lambda: blockmerge.merge("a", "b", weights="random", seed=seed, output="out.safetensors"),
        lambda: blockmerge.merge_state_dicts({}, {}, weights=0.5, method="dare", seed=seed),
    ):
        with pytest.raises(WeightsError, match=says):
            ask()


def test_seeds_of_numpy_are_seeds():
    assert WeightsRequest(weights="random", seed=np.int64(5)).resolve("sd1") == parse_weights(
        "random", seed=5
    )


def test_an_unknown_sdxl_mapping_is_refused_whatever_the_family():
    with pytest.raises(WeightsError, match=r"^unknown SDXL mapping 'size': name or resolution$"):
        WeightsRequest(weights=0.5, sdxl_map="size")


def test_random_presets(tmp_path):
    lists = tmp_path / "mbwpresets.txt"
    custom = "U,0,0,0,0,0,0,0,0,0,0,0,0,R,R,R,R,R,R,R,X,R,R,R,R,0.5"
    lists.write_text(f"DICE\t{custom}\nOF TENSORS\tU,ER{',0' * 24}\nFIXED\t{oracle.HIGH_RES}\n")
    (tmp_path / "x.toml").write_text(
        "weights = ['random(0.25, 0.5)', " + "0," * 25 + "]\nsdxl = 'M00=random'"
    )
    dice = find_preset(f"{lists}#dice")
    assert dice.is_random
    assert not find_preset(f"{lists}#fixed").is_random
    assert dice.weights_for("sd1", seed=3) == parse_weights(custom, seed=3)
    assert dice.weights_for("sd1", seed=3) != dice.weights_for("sd1", seed=4)
    bases = [WeightsRequest(f"{lists}#DICE", seed=seed).resolve("sd1")["BASE"] for seed in range(100)]
    assert -0.5 <= min(bases) < -0.3 < 1.3 < max(bases) <= 1.5
    doubled = WeightsRequest(f"{lists}#DICE@2", seed=3).resolve("sdxl")
    assert array(doubled) == pytest.approx(2 * array(dice.weights_for("sdxl", seed=3)))
    toml = find_preset(str(tmp_path / "x.toml"))
    assert 0.25 <= toml.weights["BASE"] <= 0.5
    assert toml.sdxl["M00"] == parse_weights("random")["M00"]
    with pytest.raises(PresetError, match=r"no preset 'of tensors'"):
        find_preset(f"{lists}#of tensors")


def test_explain_does_not_recognise_random_presets():
    user_folder().mkdir(parents=True)
    (user_folder() / "dice.toml").write_text("weights = 'random'")
    drawn = array(find_preset("dice").weights)
    assert matching_presets("sd1", tuple(oracle.SD), drawn, np.zeros(26), np.ones(26, dtype=bool)) == []
    known = array(blockmerge.load_preset("GRAD_V"))
    assert (
        matching_presets("sd1", tuple(oracle.SD), known, np.zeros(26), np.ones(26, dtype=bool))[0].label
        == "GRAD_V"
    )


_COUNT_OPENED = """
import os, sys
opened = []
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        opened.append(os.path.realpath(os.fspath(arguments[0])))
sys.addaudithook(note)
from blockmerge.cli.main import main
from blockmerge.weights.presets import shipped_folder, user_folder
folders = [os.path.realpath(folder()) for folder in (shipped_folder, user_folder)]
try:
    main()
finally:
    print([sorted(os.path.basename(one) for one in opened if os.path.dirname(one) == home) for home in folders])
"""


@pytest.mark.parametrize(
    ("presets", "shipped"),
    [
        (["HIGH-RES_replace@0.6"], ["high_res.toml"]),
        (["SMOOTHSTEP/2@0.5", "grad-v"], ["grad_v.toml", "smoothstep_div2.toml"]),
        (["mine@0.5"], []),
    ],
)
def test_a_merge_opens_only_the_preset_files_it_needs(pairs, here, presets, shipped):
    user_folder().mkdir(parents=True)
    (user_folder() / "mine.toml").write_text("weights = 0.5")
    options = [word for preset in presets for word in ("--preset", preset)]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _COUNT_OPENED,
            *map(str, pairs()),
            *options,
            "-o",
            "out.safetensors",
            "--seed",
            "1",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (here / "out.safetensors").exists()
    assert done.stdout.splitlines()[-1] == str([shipped, ["mine.toml"]])


def test_every_shipped_preset_is_found_by_all_its_names():
    """Files are named like their presets, and aliases are listed where they can be looked up."""
    for preset in presets():
        for name in (preset.name, *preset.aliases):
            assert find_preset(name) == preset, name
            assert "@" not in name


def test_a_request_keeps_to_the_presets_it_found():
    user_folder().mkdir(parents=True)
    (user_folder() / "mine.toml").write_text("weights = 0.5")
    request = WeightsRequest("mine")
    request.check()
    (user_folder() / "mine.toml").unlink()
    assert request.resolve("sd1") == BlockWeights.flat(0.5)
    assert (request.label, request.is_random) == ("mine", False)
    with pytest.raises(PresetError, match="unknown preset 'mine'"):
        WeightsRequest("mine").check()


def test_aliases_of_the_users_own_hide_a_shipped_preset():
    user_folder().mkdir(parents=True)
    (user_folder() / "mine.toml").write_text("weights = 0.75\naliases = ['GRAD-V', 'low_res_replace']")
    for name in ("grad_v", "low-res_replace", "mine"):
        assert find_preset(name).name == "mine"
    assert find_preset("low_res").name == "low_res"


def test_a_preset_of_the_users_own_that_was_changed_is_read_again():
    user_folder().mkdir(parents=True)
    own = user_folder() / "mine.toml"
    for weight in (0.25, 0.5, 0.125):
        own.write_text(f"weights = {weight}")
        os.utime(own, ns=(0, round(weight * 1e9)))  # older, too: a copy may have kept its times
        assert blockmerge.load_preset("mine") == BlockWeights.flat(weight)
    own.unlink()
    own.symlink_to("nowhere.toml")
    assert find_preset("high_res").name == "high_res"
    assert "cannot read preset file" in unreadable_presets()[0]

"""Weights of other families' blocks go by depth to families whose blocks are counted from the file."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import BlockWeights, PresetError, WeightsError
from blockmerge.anatomy import FAMILIES, register
from blockmerge.explaining.known_presets import matching_presets
from blockmerge.merging.recipe_recorded import is_found_still
from blockmerge.weights import WeightsRequest, find_preset, parse_weights, presets
from tests import oracle, toy_family
from tests.commands import ok
from tests.counted_family import counted, flux_blocks, known, numbered

FLUX = counted()
LITE = counted(blocks=flux_blocks(8))
ONE = counted("one", ["BASE", "L00"])


def by_depth(numbers, count):
    """What numpy makes of it."""
    return np.interp(np.linspace(0, 1, count), np.linspace(0, 1, len(numbers)), numbers)


@given(st.lists(st.floats(-2, 3), min_size=2, max_size=60), st.floats(-2, 3), st.integers(2, 70))
def test_the_others_are_interpolated_and_base_stays(numbers, base, count):
    source = ["BASE", *numbered("L", len(numbers))]
    weights = BlockWeights(dict(zip(source, [base, *numbers], strict=True)), source)
    wanted = counted("wanted", ["BASE", "IN", *numbered("D", count - 1)])
    found = list(weights.for_family(wanted).values())
    assert found[0] == base
    assert found[1:] == pytest.approx(by_depth(numbers, count).tolist(), abs=1e-9)
    assert (found[1], found[-1]) == (numbers[0], numbers[-1])  # exactly
    assert weights.lost_for(wanted) == {}


@pytest.mark.parametrize("count", [26, 25, 20, 19])
def test_lists_of_u_nets(count):
    numbers = [n / 50 for n in range(count)]
    inner = numbers[1:] if count in (26, 20) else numbers
    expected = [numbers[0] if count in (26, 20) else 0.0, *by_depth(inner, 59)]
    for given_as in (numbers, ",".join(map(str, numbers)), np.array(numbers)):
        assert list(parse_weights(given_as, FLUX)) == flux_blocks()
        assert list(parse_weights(given_as, FLUX).values()) == pytest.approx(expected)
        *without_base, note = WeightsRequest(weights=given_as).lost(FLUX)
        assert [said.endswith("BASE is 0") for said in without_base] == [True] * (count in (25, 19))
        assert note == (
            f"weights (--weights): {len(inner)} weights are carried over to Toy Counted's 59 blocks by depth"
        )


def test_a_skip_on_either_side_makes_a_skip():
    source = ["BASE", *numbered("L", 5)]
    weights = BlockWeights(dict(zip(source, [None, 0, None, 1, 1, 0.5], strict=True)), source)
    wanted = counted("wanted", ["BASE", *numbered("L", 9)])
    assert list(weights.for_family(wanted).values()) == [None, 0, None, None, None, 1, 1, 1, 0.75, 0.5]


def test_few_blocks():
    three = BlockWeights({"BASE": 1, "L00": 0, "L01": 0.25, "L02": 1}, ["BASE", "L00", "L01", "L02"])
    assert dict(three.for_family(ONE)) == {"BASE": 1, "L00": 0.25}  # the middle
    two = BlockWeights({"BASE": 1, "L00": 0, "L01": 1}, ["BASE", "L00", "L01"])
    assert dict(two.for_family(ONE)) == {"BASE": 1, "L00": 0.5}
    one = BlockWeights({"BASE": 0, "L00": 0.3}, ["BASE", "L00"])
    assert dict(one.for_family(FLUX)) == {**dict.fromkeys(flux_blocks(), 0.3), "BASE": 0}
    (note,) = WeightsRequest(weights=three).lost(ONE)
    assert note.endswith("3 weights are carried over to Toy Counted's 1 block by depth")


def test_own_numbers_go_in_order_and_others_of_the_name_by_depth():
    with known(FLUX):
        numbers = [n / 100 for n in range(60)]
        assert list(parse_weights(numbers, FLUX).values()) == numbers
        found = parse_weights(numbers, LITE)
        assert list(found) == flux_blocks(8)
        assert list(found.values())[1:] == pytest.approx(by_depth(numbers[1:], 48))
        assert "59 weights are carried over" in WeightsRequest(weights=numbers).lost(LITE)[0]
        assert WeightsRequest(weights=numbers).lost(FLUX) == []
        assert parse_weights(0.5, LITE) == BlockWeights.flat(0.5, LITE.blocks)
        assert WeightsRequest(weights=0.5).lost(LITE) == []


def test_presets_without_a_table_go_by_depth():
    for preset in presets():
        found = preset.weights_for(FLUX)
        numbers = list(preset.weights.values())
        assert list(found.values()) == pytest.approx([numbers[0], *by_depth(numbers[1:], 59)])
        assert preset.serves(FLUX)
    request = WeightsRequest(["smoothstep@0.5", "GRAD_V@2"])
    both = [find_preset(name).weights_for(LITE) for name in ("smoothstep", "GRAD_V")]
    assert request.resolve(LITE) == both[0].scale(0.5).add(both[1].scale(2))
    assert request.lost(LITE) == [
        f"preset '{name}': 25 weights are carried over to Toy Counted's 48 blocks by depth"
        for name in ("SMOOTHSTEP", "GRAD_V")
    ]
    assert not request.heeds_map(LITE)
    assert WeightsRequest("smoothstep", sdxl_map="resolution").resolve(LITE) == both[0]


def test_a_table_of_its_own_goes_first(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text("[weights]\nsd1 = 0.5\ncounted = 'double_blocks.0.-D07=0..1,OUT=0.5'\n")
    with known(FLUX):
        preset = find_preset(str(path))
        for family in (FLUX, LITE):
            assert preset.weights_for(family) == parse_weights("D00-D07=0..1,OUT=0.5", family)
        assert WeightsRequest(str(path)).lost(LITE) == []
        assert preset.others == {"counted": preset.weights_for("counted")}
        assert preset.weights_for("sdxl") == BlockWeights.flat(0.5, oracle.SDXL)
        path.write_text(f"[weights]\ncounted = {[n / 60 for n in range(60)]}\n")
        preset = find_preset(str(path))
        expected = by_depth([n / 60 for n in range(1, 60)], 48)
        assert list(preset.weights_for(LITE).values())[1:] == pytest.approx(expected)
        assert "59 weights are carried over" in WeightsRequest(str(path)).lost(LITE)[0]
        same = ", ".join(name for name, family in FAMILIES.items() if family.blocks == FLUX.blocks)
        with pytest.raises(PresetError, match=rf"has no weights for Stable Diffusion 1\.x, only for {same}:"):
            preset.weights_for("sd1")


def test_a_table_for_models_of_other_blocks(tmp_path, capsys):
    path = tmp_path / "own.toml"
    path.write_text("[weights]\ncounted = 'D18=1'\n")
    with known(LITE):
        preset = find_preset(str(path))
        assert preset.weights_for(FLUX)["D18"] == 1
        with pytest.raises(PresetError, match=r"preset 'own': unknown block 'D18'.* D00-D07"):
            WeightsRequest(str(path)).resolve(LITE)
        assert (preset.others, preset.tables_as_written) == ({}, {"counted": "D18=1"})
        assert "counted  D18=1" in ok(capsys, "presets", "show", str(path))
        assert "tables" not in json.loads(ok(capsys, "presets", "show", str(path), "--json"))[0]
        path.write_text("[weights]\ncounted = 1979-05-27\n")
        with pytest.raises(PresetError, match="neither a number, a list, a text nor a table"):
            find_preset(str(path))


def test_u_nets_take_only_what_they_took():
    with known(FLUX):
        with pytest.raises(WeightsError, match=r"weights for .*Counted's 60 blocks given; sd1 needs 26"):
            BlockWeights.flat(0.5, FLUX.blocks).for_family("sd1")
        with pytest.raises(WeightsError, match="60 weights given; 26 are needed"):
            parse_weights([0.5] * 60, "sdxl")
        with pytest.raises(PresetError, match="has no weights for Stable Diffusion XL"):
            find_preset_of({"counted": 0.5}).weights_for("sdxl")
    with pytest.raises(WeightsError, match="unknown block 'IN04': Counted has"):
        parse_weights("IN04=1", LITE)


def find_preset_of(tables):
    return blockmerge.weights.Preset("own", tables)


def test_a_family_that_says_how_is_not_interpolated():
    way = {block: "BASE" if block == "BASE" else "M00" for block in ONE.blocks}
    told = counted("told", ONE.blocks)
    object.__setattr__(told, "carried", {"sd1": {"name": way, "resolution": way}})
    numbers = [float(block == "M00") for block in oracle.SD]
    assert dict(parse_weights(numbers, told)) == {"BASE": 0, "L00": 1}
    assert all("by depth" not in note for note in WeightsRequest(weights=numbers).lost(told))


def test_explain_knows_presets_by_depth():
    known_weights = np.array(list(find_preset("GRAD_V").weights_for(LITE).values()))
    count = len(LITE.blocks)
    (match, *_) = matching_presets(
        LITE, LITE.blocks, known_weights, np.zeros(count), np.ones(count, dtype=bool)
    )
    assert match.label == "GRAD_V"


@pytest.mark.parametrize(
    ("asked", "found", "is_still"),
    [
        ({"weights": "D00-D07=0..1"}, "D00-D07=0..1", True),
        ({"preset": "GRAD_V"}, [n / 10 for n in range(49)], False),
        ({"weights": 0.5, "set": "double_blocks.3.=0.4"}, "BASE-OUT=0.5,D03=0.4", True),
    ],
)
def test_what_was_recorded_of_a_model_with_other_blocks_than_usual(asked, found, is_still):
    with known(FLUX):
        weights = dict(parse_weights(found, LITE))
        assert is_found_still({**asked, "found": {"weights": weights}}) is is_still
        weights = dict(find_preset("GRAD_V").weights_for(LITE))
        assert is_found_still({"preset": "GRAD_V", "found": {"weights": weights}})


def test_families_by_name_are_the_usual_ones():
    with known(FLUX):
        assert parse_weights(0.5, "counted") == parse_weights(0.5, FLUX)
        assert WeightsRequest(weights=0.5).resolve("counted").blocks == FAMILIES["counted"].blocks


@pytest.fixture
def toy_files(tmp_path):
    """A pair of files of the toy family, whose blocks are counted for once, as their commands see them."""
    folder = tmp_path / "families"
    folder.mkdir()
    with toy_family.registered(folder) as family:
        register(replace(family, arms=None, aliases={"layers.#.": ("L#",)}))
        paths = []
        for name, model in zip("ab", toy_family.make_pair(), strict=True):
            paths.append(str(tmp_path / f"{name}.safetensors"))
            save_file(model, paths[-1], {"format": "pt"})
        yield paths


def test_a_merge_says_it_and_draws_rows(toy_files, tmp_path, capsys):
    out = str(tmp_path / "out.safetensors")
    lines = ok(capsys, *toy_files, "-p", "COSINE", "--set", "layers.1.=0.5", "-o", out).splitlines()
    assert "- preset 'COSINE': 25 weights are carried over to Toy Transformer's 2 blocks by depth" in lines
    assert [line.split() for line in lines[2:4]] == [["BASE", "0", "░" * 12], ["L00", "1█", "0.5▄"]]
    found = json.loads(
        ok(
            capsys,
            *toy_files,
            "-w",
            "L00-L01=0.25..0.75",
            "--dry-run",
            "--json",
            "-o",
            str(tmp_path / "2.safetensors"),
        )
    )
    assert found["weights"] == {"BASE": 0.0, "L00": 0.25, "L01": 0.75}
    a, b = map(load_file, toy_files)
    merged = load_file(out)
    name = "model.diffusion_model.layers.1.norm.weight"
    assert torch.equal(merged[name], torch.lerp(a[name], b[name], 0.5))
    name = "model.diffusion_model.layers.0.norm.weight"
    assert torch.equal(merged[name], b[name])
    recipe = ok(capsys, "recipe", out)
    assert "COSINE" in recipe
    assert "layers.1.=0.5" in recipe
    ok(capsys, "verify", out)
    explained = ok(capsys, "explain", out, *toy_files)
    assert "merging again gives the same file, to the last bit" in explained

"""Weights that are lost on the way from one family's blocks to another's, and what the user is told."""

from __future__ import annotations

import json

import pytest

import blockmerge
from blockmerge import BlockWeights, WeightsError
from blockmerge.anatomy import FAMILIES
from blockmerge.demo import make_state_dicts
from blockmerge.weights import WeightsRequest
from tests.commands import ok
from tests.toy_family import registered

SD1 = FAMILIES["sd1"].blocks


def with_weights(**blocks):
    return BlockWeights.flat(0, SD1).replace(blocks)


def lost_notes(result):
    return [note for note in result.notes if "no place there" in note]


@pytest.fixture(scope="module")
def sdxl():
    return make_state_dicts("sdxl")


LOST = [
    (with_weights(IN11=1), None, {"IN11": 1.0}),
    (with_weights(OUT09=0.5, OUT11=0.25), None, {"OUT09": 0.5, "OUT11": 0.25}),
    (with_weights(IN09=0.3, IN08=0.3), None, {}),  # that of the nearest that is kept
    (with_weights(IN10=0.3, M00=0.3), None, {"IN10": 0.3}),
    (BlockWeights.flat(0.5, SD1), None, {}),
    (with_weights(), None, {}),
    (with_weights(IN04=1, OUT03=1), None, {}),
    (with_weights(OUT00=1), "resolution", {"OUT00": 1.0}),
    (with_weights(OUT00=1), "name", {}),
    (with_weights(OUT11=1), "resolution", {}),
    (with_weights(IN09=None), None, {"IN09": None}),
    (with_weights(IN08=None, IN09=None, IN10=None, IN11=None), None, {}),
]


@pytest.mark.parametrize(("weights", "way", "lost"), LOST)
def test_which_weights_are_missed(weights, way, lost):
    assert weights.lost_for("sdxl", way) == lost
    assert weights.lost_for("sd2", way) == {}


def test_the_families_own_data_says_which_are_kept():
    """Not the names of families: whatever is carried over, from whichever family."""
    for name, family in FAMILIES.items():
        for source, ways in family.carried.items():
            for way, sources in ways.items():
                blocks = FAMILIES[source].blocks
                for block in blocks:
                    one = BlockWeights.flat(0, blocks).replace({block: 1})
                    expected = {} if block in sources.values() else {block: 1.0}
                    assert one.lost_for(name, way) == expected


@pytest.mark.parametrize(("weights", "way", "lost"), LOST)
def test_a_merge_notes_them(sdxl, tmp_path, weights, way, lost):
    recipe = blockmerge.Merge(*sdxl, weights=weights, sdxl_map=way)
    notes = lost_notes(recipe.plan(tmp_path / "out.safetensors").summary())
    assert len(notes) == bool(lost)
    if lost:
        (note,) = notes
        assert note.startswith("weights (--weights): 26 weights go to Stable Diffusion XL's 20 blocks, and ")
        assert "give 20 weights" in note
        for block in SD1:
            assert (f"{block}=" in note) == (block in lost)


@pytest.mark.parametrize("preset", ["GRAD_V", "COSINE", "GRAD_A@0.5"])
def test_presets_without_a_table(sdxl, tmp_path, preset):
    (note,) = lost_notes(blockmerge.merge(*sdxl, preset=preset, output=tmp_path / "out.safetensors"))
    assert note.startswith(f"preset '{preset.partition('@')[0]}': 26 weights go to")


def test_what_loses_nothing_has_no_note(sdxl, tmp_path):
    for options in ({"preset": "high_res"}, {"weights": 0.5}, {"preset": "FLAT_25"}, {"preset": "GRAD_V@0"}):
        out = tmp_path / "out.safetensors"
        assert not lost_notes(blockmerge.merge(*sdxl, output=out, overwrite=True, **options))
    sd1 = make_state_dicts("sd1")
    assert not lost_notes(blockmerge.merge(*sd1, weights=with_weights(IN11=1), output=out, overwrite=True))


def test_the_second_weight_is_told_apart(sdxl, tmp_path):
    recipe = blockmerge.Merge(
        *sdxl, sdxl[0], method="triple_sum", weights=0.25, weights_beta=with_weights(IN11=1)
    )
    (note,) = lost_notes(recipe.plan(tmp_path / "out.safetensors").summary())
    assert note.startswith("weights_beta (--weights-beta): 26 weights go to")


def test_the_command_says_so_too(pairs, here, capsys):
    a, b = pairs("sdxl")
    numbers = ",".join(str(float(block == "IN11")) for block in SD1)
    out = ok(capsys, a, b, "-w", numbers, "--dry-run")
    assert "- weights (--weights): 26 weights go to" in out
    assert "IN11=1 has no place there" in out
    noted = json.loads(ok(capsys, a, b, "-w", numbers, "--dry-run", "--json"))["notes"]
    assert any("IN11=1 has no place there" in note for note in noted)


def test_a_live_merge_notes_them(sdxl):
    import torch

    module = torch.nn.Module()
    for name, tensor in sdxl[0].items():
        at = module
        if not name.startswith("model.diffusion_model."):
            continue
        *path, last = name.removeprefix("model.diffusion_model.").split(".")
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        at.register_parameter(last, torch.nn.Parameter(tensor.clone()))
    with blockmerge.LiveMerge(module, *sdxl) as live:
        assert live.notes == ()
        live.apply(weights=with_weights(IN11=1))
        (note,) = live.notes
        assert "IN11=1 has no place there" in note
        live.apply(weights=0.5)
        assert live.notes == ()


def test_names_are_those_of_the_models_own_blocks():
    with pytest.raises(WeightsError, match="IN11"):
        WeightsRequest(weights="IN11=1").resolve("sdxl")


def test_a_family_to_which_nothing_is_carried(tmp_path):
    with registered(tmp_path):
        assert WeightsRequest(weights=0.5).lost("toy") == []
        with pytest.raises(WeightsError):
            BlockWeights.flat(0, SD1).lost_for("toy")

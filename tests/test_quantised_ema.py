"""EMA copies in scaled fp8, whose names have lost their dots, are codes times scales like all others."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import blockmerge
from blockmerge import CheckpointError
from tests.quantising import SPELLINGS, quantised, saved
from tests.small_models import small_model

U, EMA = "model.diffusion_model.", "model_ema.diffusion_model"
PROJ = "middle_block1proj_inweight"


def as_ema(name):
    return EMA + name.removeprefix(U).replace(".", "")


def with_scaled_ema(folder, name, spelling, *, seed=0, beside=True):
    """Write a model with EMA copies in scaled fp8, or only these; returns its path and what the copies mean."""
    model = small_model("sd1", seed=seed)
    unet = {one: tensor for one, tensor in model.items() if one.startswith(U)}
    codes, metadata, plain = quantised(unet, spelling)
    tensors = {as_ema(one) if one.startswith(U) else one: tensor for one, tensor in codes.items()}
    if spelling == "metadata":
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        layers = {as_ema(layer): said for layer, said in layers.items()}
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    others = {one: tensor for one, tensor in model.items() if beside or not one.startswith(U)}
    return saved(folder, name, {**others, **tensors}, metadata), {
        as_ema(one): t.float() for one, t in plain.items()
    }


def close(found, wanted):
    return torch.allclose(found.float(), wanted, rtol=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_copies_are_merged_as_what_they_stand_for(tmp_path, spelling):
    a, of_a = with_scaled_ema(tmp_path, "a", spelling)
    b, of_b = with_scaled_ema(tmp_path, "b", spelling, seed=1)
    out = load_file(
        blockmerge.merge(a, b, weights=0.25, ema="keep", output=tmp_path / "m.safetensors").output
    )
    assert {name for name in out if name.startswith("model_ema.")} == of_a.keys()
    for name, wanted in of_a.items():
        assert close(out[name], 0.75 * wanted + 0.25 * of_b[name]), name


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("beside", [True, False])
def test_copies_become_the_unet_as_what_they_stand_for(tmp_path, spelling, beside):
    a, of_a = with_scaled_ema(tmp_path, "a", spelling, beside=beside)
    result = blockmerge.convert(a, tmp_path / "out.safetensors", ema="use" if beside else "drop")
    out = load_file(result.output)
    assert out.keys() == small_model("sd1").keys()
    for name, tensor in out.items():
        if name.startswith(U):
            assert close(tensor, of_a[as_ema(name)]), name
    assert not any("left out" in note for note in result.notes)


def test_copies_of_one_model_only_are_kept_as_what_they_stand_for(tmp_path):
    a, of_a = with_scaled_ema(tmp_path, "a", "scaled_fp8")
    b = saved(tmp_path, "b", small_model("sd1", seed=1))
    out = load_file(blockmerge.merge(a, b, weights=0.5, ema="keep", output=tmp_path / "m.safetensors").output)
    assert out[EMA + PROJ].dtype == torch.bfloat16
    assert close(out[EMA + PROJ], of_a[EMA + PROJ])
    assert not any("scale" in name for name in out)


def test_a_scale_that_is_missing_is_told_where_copies_are_taken(tmp_path):
    path, _ = with_scaled_ema(tmp_path, "a", "scaled_fp8")
    tensors = load_file(path)
    del tensors[EMA + PROJ.replace("weight", "scale_weight")]
    path = saved(tmp_path, "broken", tensors)
    for ema in ("keep", "use"):
        with pytest.raises(CheckpointError, match=f"{PROJ} should be scaled fp8, and its scale is not there"):
            blockmerge.convert(path, tmp_path / "out.safetensors", ema=ema)
    out = load_file(blockmerge.convert(path, tmp_path / "out.safetensors").output)
    assert out.keys() == small_model("sd1").keys()


def test_other_kinds_are_refused_by_name_where_copies_are_taken(tmp_path):
    model = small_model("sd1")
    codes = torch.zeros(8, 8, dtype=torch.float8_e4m3fn)
    blocks = {EMA + PROJ: codes, EMA + PROJ + "_scale_inv": torch.ones(1, 1)}
    path = saved(tmp_path, "a", {**model, **blocks})
    with pytest.raises(CheckpointError, match="block-scaled fp8"):
        blockmerge.convert(path, tmp_path / "out.safetensors", ema="keep")
    assert load_file(blockmerge.convert(path, tmp_path / "out.safetensors").output).keys() == model.keys()

"""What is quantised and cannot be read is refused by its name, in every command, and what is wrong with scales
is told.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import LiveMerge
from blockmerge.errors import BlockmergeError, CheckpointError
from blockmerge.inspecting import repair
from tests.quantising import E4M3, quantised, saved
from tests.refusals import snapshot
from tests.small_models import small_model
from tests.test_live import module_of, unet_of

U = "model.diffusion_model."


@pytest.fixture(scope="module")
def pair():
    """A small SDXL model in float16 and another in bfloat16."""
    return small_model("sdxl"), small_model("sdxl", torch.bfloat16, seed=1)


# -- everything else is refused ------------------------------------------------------------------------------

LINEAR = U + "middle_block.1.proj_in"


def said(text):
    return torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8).clone()


def packed(shape=(8, 1)):
    return torch.zeros(shape, dtype=torch.uint8)


F32 = torch.ones(4)
OTHERS = {
    "bitsandbytes nf4": {
        ".weight": packed(), ".weight.absmax": F32, ".weight.quant_map": torch.ones(16),
        ".weight.quant_state.bitsandbytes__nf4": said({"blocksize": 64}),
    },
    "bitsandbytes fp4": {
        ".weight": packed(), ".weight.absmax": packed((4,)), ".weight.nested_absmax": F32,
        ".weight.quant_state.bitsandbytes__fp4": said({}),
    },
    "bitsandbytes 4-bit": {".weight": packed(), ".weight.absmax": F32, ".weight.quant_map": torch.ones(16)},
    "bitsandbytes int8": {".weight": packed().to(torch.int8), ".SCB": F32, ".weight_format": packed(())},
    "nvfp4": {".weight": packed(), ".weight_scale": F32.to(E4M3), ".weight_scale_2": torch.tensor(1.0)},
    "mxfp8": {".weight": torch.ones(4, 4).to(E4M3), ".weight_scale": packed((4, 1))},
    "block-scaled fp8": {".weight": torch.ones(4, 4).to(E4M3), ".weight_scale_inv": torch.ones(1, 1)},
    "weights smoothed by pre_quant_scale": {
        ".weight": torch.ones(4, 4).to(E4M3), ".weight_scale": torch.tensor(1.0), ".pre_quant_scale": F32,
    },
    "int8": {".weight": packed((4, 4)).to(torch.int8), ".weight_scale": F32},
    "int8 tensorwise with convrot": {
        ".weight": packed((4, 4)).to(torch.int8), ".weight_scale": torch.tensor(1.0),
        ".comfy_quant": said({"format": "int8_tensorwise", "convrot": True}),
    },
    "float8 e4m3fn with convrot": {
        ".weight": torch.ones(4, 4).to(E4M3), ".weight_scale": torch.tensor(1.0),
        ".comfy_quant": said({"format": "float8_e4m3fn", "convrot": True}),
    },
    "awq w4a16": {".weight": packed(), ".comfy_quant": said({"format": "awq_w4a16"})},
    "packed integers (U8)": {".weight": packed(), ".weight_scale": F32},
    "SVDQuant": {".qweight": packed().to(torch.int8), ".wscales": F32, ".smooth_factor": F32, ".lora_down": F32},
    "AWQ or GPTQ": {".qweight": packed().to(torch.int32), ".qzeros": packed().to(torch.int32), ".scales": F32},
    "GPTQ": {".qweight": packed().to(torch.int32), ".g_idx": packed().to(torch.int32), ".scales": F32},
}  # fmt: skip


def other_kind(model, kind):
    whole = {name: tensor for name, tensor in model.items() if not name.startswith(LINEAR)}
    return {**whole, **{LINEAR + end: tensor for end, tensor in OTHERS[kind].items()}}


def commands(path, other, folder):
    """All that computes or converts."""
    out = folder / "out.safetensors"
    return {
        "merge": lambda: blockmerge.merge(other, path, output=out),
        "convert": lambda: blockmerge.convert(path, folder / "out", naming="diffusers"),
        "fix": lambda: repair(path, out),
        "similarity": lambda: blockmerge.similarity(path, [other]),
        "weights": lambda: blockmerge.similarity(path, [other], "weights"),
        "explain": lambda: blockmerge.explain(path, [other]),
        "state dicts": lambda: blockmerge.merge_state_dicts(load_file(other), load_file(path)),
    }


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused_by_name_before_anything_is_written(tmp_path, pair, kind):
    other = saved(tmp_path, "fine", pair[0])
    path = saved(tmp_path, "odd", other_kind(pair[0], kind))
    before = snapshot(tmp_path)
    for command, call in commands(path, other, tmp_path).items():
        with pytest.raises(CheckpointError) as caught:
            call()
        label = "state dict B" if command == "state dicts" else "odd.safetensors"
        text = str(caught.value)
        assert f"{label} is quantised as {kind} ({LINEAR}" in text, command
        assert "\n" not in text
    assert snapshot(tmp_path) == before
    found = blockmerge.inspect(path)
    assert found.quantised == kind
    problems = blockmerge.check(path).problems
    (problem,) = (one for one in problems if one.code == "quantised_weights")
    assert kind in problem.message
    assert all(name.startswith(LINEAR) for name in problem.tensors)
    assert {"unknown_tensors", "missing_tensors", "wrong_shape", "no_unet"}.isdisjoint(
        one.code for one in problems
    )
    row = blockmerge.similarity(other, [path, other], "weights").references[-1]
    assert kind in row.error


def test_packed_weights_do_not_make_one_family_another(tmp_path):
    """SD1 projects with a convolution and SD2 with a matrix, as which packed weights are stored."""
    for family, told in (("sd1", None), ("sd2", None), ("sdxl", "sdxl")):
        model = small_model(family, for_a_folder=True)
        for name in [name for name in model if name.endswith("proj_in.weight")]:
            model |= {name: packed(), f"{name}.absmax": torch.ones(1)}
        model[U + "input_blocks.1.1.proj_in.weight"] = packed()
        if family == "sdxl":
            del model[U + "input_blocks.1.1.proj_in.weight"]
        path = saved(tmp_path, family, model)
        found = blockmerge.inspect(path)
        assert found.family == told
        assert (found.why_unknown is None) == (told is not None)
        assert blockmerge.check(path).family == told


def test_a_vae_file_and_a_live_model_of_other_kinds(tmp_path, pair):
    other = saved(tmp_path, "fine", pair[0])
    vae = {"decoder.conv_in.weight": packed((8, 1)), "decoder.conv_in.weight.absmax": F32}
    with pytest.raises(CheckpointError, match=r"vae.safetensors is quantised as bitsandbytes 4-bit \("):
        blockmerge.convert(other, tmp_path / "o.safetensors", vae=saved(tmp_path, "vae", vae))
    unet = unet_of(pair[0])
    with pytest.raises(CheckpointError, match="state dict B is quantised as nvfp4"):
        LiveMerge(module_of(unet), unet, unet_of(other_kind(pair[0], "nvfp4")))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("name", [LINEAR + ".weight", "first_stage_model.encoder.conv_in.weight"])
def test_integers_where_floats_belong(tmp_path, pair, name, dtype):
    assert name in pair[0]
    spelled = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32", torch.bool: "BOOL"}[dtype]
    other = saved(tmp_path, "fine", pair[0])
    path = saved(tmp_path, "odd", {**pair[0], name: pair[0][name].to(dtype)})
    before = snapshot(tmp_path)
    for call in commands(path, other, tmp_path).values():
        with pytest.raises(CheckpointError, match=rf" has {spelled} in place of floats \({name}\)"):
            call()
    assert snapshot(tmp_path) == before
    assert "integer_weights" in {problem.code for problem in blockmerge.check(path).problems}


# -- faults of scaled fp8 ------------------------------------------------------------------------------------

WEIGHT, SCALE = LINEAR + ".weight", LINEAR + ".scale_weight"
FAULTS = [
    ({SCALE: None}, f"{WEIGHT} should be scaled fp8, and its scale is not there"),
    ({WEIGHT: None}, f"{SCALE} is the scale of {WEIGHT}, which is not there"),
    ({SCALE: torch.ones(3)}, f"{SCALE} has the shape [3], expected [1] or ["),
    ({SCALE: torch.ones(2, 2)}, "(block-scaled fp8 is not read yet)"),
    ({SCALE: torch.ones(0)}, f"{SCALE} has the shape [0], expected [1] or ["),
    ({SCALE: torch.tensor(torch.nan)}, f"{SCALE} holds NaN or infinity"),
    ({SCALE: torch.tensor(1e300, dtype=torch.float64)}, f"{SCALE} holds NaN or infinity"),
    ({SCALE: torch.tensor(1)}, f"{SCALE} is I64, expected F32"),
    ({WEIGHT: "half"}, f"{WEIGHT} is F16 and has the scale {SCALE}, as only fp8 has"),
    ({LINEAR + ".weight_scale": torch.tensor(1.0)}, f"{LINEAR}.weight_scale is the second scale beside {SCALE}"),
    ({LINEAR + ".comfy_quant": said({"format": "float8_e5m2"})}, f"{WEIGHT} is F8_E4M3, although it is said to be F8_E5M2"),
    ({LINEAR + ".comfy_quant": said("float8_e4m3fn")}, f"{LINEAR}.comfy_quant is not the JSON object that says"),
    ({LINEAR + ".comfy_quant": torch.full((5,), 255, dtype=torch.uint8)}, f"{LINEAR}.comfy_quant is not the JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), FAULTS)
def test_what_is_wrong_with_scales_is_told_with_their_names(tmp_path, pair, changes, says):
    scaled, _, _ = quantised(pair[0])
    for name, tensor in changes.items():
        scaled[name] = scaled[name].half() if isinstance(tensor, str) else tensor
        if tensor is None:
            del scaled[name]
    other, path = saved(tmp_path, "fine", pair[0]), saved(tmp_path, "odd", scaled)
    before = snapshot(tmp_path)
    for call in commands(path, other, tmp_path).values():
        with pytest.raises(BlockmergeError) as caught:
            call()
        assert "is scaled fp8 with 1 fault: " in str(caught.value)
        assert says in str(caught.value)
    assert snapshot(tmp_path) == before
    assert "scaled fp8" in blockmerge.inspect(path).quantised
    (problem,) = (one for one in blockmerge.check(path).problems if one.code == "quantised_weights")
    assert says in problem.message


def test_rows_of_scales_with_an_infinite_one(pair):
    scaled, _, _ = quantised(pair[0], by_row=True)
    scaled[SCALE][2] = torch.inf
    with pytest.raises(CheckpointError, match=f"state dict A is scaled fp8 with 1 fault: {SCALE} holds NaN"):
        blockmerge.merge_state_dicts(scaled, pair[1], weights=0.5)


def test_names_that_only_look_alike_are_left_alone(pair):
    extras = {
        "scale": torch.ones(2), "model.scales": torch.ones(2), "denoiser.sigma_scale": torch.ones(1),
        "extra.layer_scale": torch.rand(4), "extra.input_scale": torch.rand(4), "extra.weight": torch.rand(4, 4),
        "extra.steps": torch.tensor([1, 2]), "my_scale_weight": torch.rand(2), "logit_scale": torch.tensor(4.6),
        "model_ema.num_updates": torch.tensor(7), "extra.weight_g": torch.rand(2), "extra.quantizer": torch.ones(1),
    }  # fmt: skip
    model = {**pair[0], **extras}
    out = blockmerge.merge_state_dicts(model, pair[1], weights=0.5)
    for name, tensor in extras.items():
        if not name.startswith("model_ema."):
            assert torch.equal(out[name], tensor), name


def test_metadata_that_another_file_has_left_says_nothing(tmp_path, pair):
    layers = {"somewhere.else": {"format": "nvfp4"}}
    stale = {"_quantization_metadata": json.dumps({"layers": layers})}
    path = saved(tmp_path, "stale", pair[0], stale)
    result = blockmerge.convert(path, tmp_path / "o.safetensors")
    assert all(torch.equal(tensor, pair[0][name]) for name, tensor in load_file(result.output).items())
    assert "_quantization_metadata" not in blockmerge.inspect(result.output).metadata
    assert blockmerge.inspect(path).quantised is None


@pytest.mark.parametrize(
    ("suffix", "dtype", "kind"),
    [
        ("scale", torch.float8_e4m3fn, "scales of their own"),
        ("scales", torch.int8, "scales of their own"),
        ("weight._data", None, "quanto"),
        ("_weight_qdata", None, "torchao"),
        ("W_q", None, "HQQ"),
    ],
)
def test_kinds_that_write_scales_of_their_own_are_refused(tmp_path, suffix, dtype, kind):
    from blockmerge.demo import make_state_dicts

    state = {name: tensor.half() for name, tensor in make_state_dicts("sd1")[0].items()}
    layer = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q."
    if dtype is not None:
        state[layer + "weight"] = state[layer + "weight"].to(dtype)
    state[layer + suffix] = torch.ones(len(state[layer + "weight"]), 1)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=f"odd.safetensors is quantised as .*{kind}"):
        blockmerge.convert(tmp_path / "odd.safetensors", tmp_path / "out.safetensors", dtype="fp16")
    assert not (tmp_path / "out.safetensors").exists()

"""`check`: every code is found in a model broken in just that way, and in no healthy one.

Over 500 lines: one case for every code there is, side by side.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import component_of, components_of, layout, layout_gaps
from blockmerge.checkpoints import StateDict, TensorInfo, encode_header
from blockmerge.cli.main import run
from blockmerge.demo import demo_layout, make_state_dicts
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.inspecting import KINDS
from blockmerge.inspecting.metadata import check_metadata
from blockmerge.inspecting.values import BITS, PIECE_BYTES, peaks_of
from blockmerge.rendering.terminal import print_check
from tests.conftest import FAMILIES, unchanged
from tests.test_reports import drawn

UNET = "model.diffusion_model."
CONV = UNET + "input_blocks.3.0.op.weight"
NORM = UNET + "out.0.weight"
BIAS = UNET + "out.0.bias"
VAE = "first_stage_model.decoder.conv_out.weight"
IDS = {
    "sd1": "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "sdxl": "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
}
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


@pytest.fixture(scope="module")
def states():
    made = {}

    def state(family="sd1"):
        if family not in made:
            made[family] = {
                name: as_dtype(tensor, torch.float16) for name, tensor in make_state_dicts(family)[0].items()
            }
        return dict(made[family])

    return state


def as_dtype(tensor, dtype):
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def checked(state, folder, metadata=None):
    path = folder / "m.safetensors"
    save_file(state, path, metadata={"format": "pt"} if metadata is None else metadata)
    return blockmerge.check(path)


def found(result):
    """{code: tensors}, having held that what the table of codes says is what is told."""
    for problem in result.problems:
        assert (problem.severity, problem.fixable) == (
            KINDS[problem.code].severity,
            KINDS[problem.code].fixable,
        )
        assert "\n" not in problem.message
    order = [("error", "warning", "note").index(problem.severity) for problem in result.problems]
    assert order == sorted(order)
    return {problem.code: set(problem.tensors) for problem in result.problems}


# -- healthy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype"), [("sd1", "F16"), ("sd2", "F32"), ("sdxl", "BF16")])
def test_a_healthy_model_has_no_problems(pairs, family, dtype):
    for path in pairs(family, (dtype, dtype)):
        with unchanged(path):
            result = blockmerge.check(path)
        assert result.problems == result.faults == result.fixed == ()
        assert (result.name, result.family, result.variant, result.naming) == (
            path.name,
            family,
            "base",
            "ldm",
        )


@pytest.mark.parametrize("channels", [5, 8, 9])
def test_variants_are_healthy_too(states, channels):
    family = "sd2" if channels == 5 else "sd1"
    state = states(family)
    first = UNET + "input_blocks.0.0.weight"
    state[first] = state[first].repeat(1, 3, 1, 1)[:, :channels]
    if channels == 5:
        state["depth_model.model.pretrained.weight"] = torch.ones(3)
    result = blockmerge.check(state)
    assert result.problems == ()
    assert result.variant == {5: "depth", 8: "pix2pix", 9: "inpainting"}[channels]


def test_what_real_files_may_lack_is_not_missed(states):
    without = ("position_ids", "logit_scale")
    for family in FAMILIES:
        state = {name: tensor for name, tensor in states(family).items() if not name.endswith(without)}
        assert blockmerge.check(state).problems == ()
    # SD2 from a diffusers folder: 23 layers of 24, and no projection.
    lost = re.compile(r"cond_stage_model\.model\.(transformer\.resblocks\.23\..*|text_projection)")
    state = {name: tensor for name, tensor in states("sd2").items() if not lost.fullmatch(name)}
    assert len(state) == 1228 - 13
    assert blockmerge.check(state).problems == ()
    # SDXL needs both for its pooled output.
    sdxl = states("sdxl")
    del sdxl["conditioner.embedders.1.model.text_projection"]
    assert found(blockmerge.check(sdxl)) == {
        "missing_tensors": {"conditioner.embedders.1.model.text_projection"}
    }


# -- names, shapes and dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [NORM, VAE])
def test_a_missing_tensor(states, family, name):
    state = states(family)
    del state[name]
    assert found(blockmerge.check(state)) == {"missing_tensors": {name}}


def test_a_missing_component(states):
    state = {
        name: tensor
        for name, tensor in states("sdxl").items()
        if component_of(name) in ("unet", "text_encoder")
    }
    result = blockmerge.check(state)
    assert [problem.code for problem in result.problems] == ["missing_component", "missing_component"]
    assert [
        "second text encoder" in problem.message or "VAE" in problem.message for problem in result.problems
    ] == [True, True]


def test_a_bare_unet_lacks_only_the_rest(states):
    state = {name.removeprefix(UNET): tensor for name, tensor in states().items() if name.startswith(UNET)}
    assert [problem.code for problem in blockmerge.check(state).problems] == ["missing_component"] * 2


def test_no_unet(states, tmp_path):
    vae = {name: tensor for name, tensor in states().items() if component_of(name) == "vae"}
    vae[VAE] = torch.full_like(vae[VAE], math.nan)
    result = checked(vae, tmp_path)
    assert found(result) == {"component_alone": set(), "nan_or_infinity": {VAE}}
    assert (result.family, result.variant, result.naming) == (None, None, None)
    vae.popitem()
    assert found(checked(vae, tmp_path)) == {"no_unet": set(), "nan_or_infinity": {VAE}}
    assert found(checked({}, tmp_path)) == {"no_unet": set()}


@pytest.mark.parametrize("component", ["vae", "text_encoder", "text_encoder_2"])
def test_a_component_alone_is_not_wrong(pairs, tmp_path, component):
    for naming, name in (("ldm", "one.safetensors"), ("diffusers", "one")):
        one = blockmerge.convert(pairs("sdxl")[0], tmp_path / name, only=component, naming=naming).output
        result = blockmerge.check(one)
        # A text encoder is a model of an unknown kind, which merges by the numbered list in its names.
        expected = ["component_alone"] if component == "vae" else []
        assert [problem.code for problem in result.problems] == expected, result.problems


@pytest.mark.parametrize(
    ("name", "code"),
    [
        (UNET + "input_blocks.1.2.weight", "unknown_tensors"),
        ("first_stage_model.decoder.extra", "unknown_tensors"),
        ("conditioner.embedders.0.weight", "unknown_tensors"),
        ("first_stage_model.loss.logvar", "leftovers"),
        ("first_stage_model.model_ema.decay", "leftovers"),
        ("betas", "leftovers"),
        ("loss.discriminator.main.0.weight", "leftovers"),
        ("optimizer.state.0", "leftovers"),
        ("model_ema.num_updates", "leftovers"),
        ("v_pred", "prediction_marker"),
        ("edm_vpred.sigma_max", "prediction_marker"),
    ],
)
def test_an_additional_tensor(states, name, code):
    result = blockmerge.check({**states(), name: torch.ones(3, dtype=torch.float16)})
    assert found(result) == {code: {name}}
    assert result.problems[0].bytes == (None if code == "prediction_marker" else 6)


def test_ema_copies(states):
    state = states()
    copies = {
        "model_ema.diffusion_model" + name.removeprefix(UNET).replace(".", ""): name
        for name in state
        if UNET in name
    }
    ema = {copy: state[name].clone() for copy, name in copies.items()}
    whole = blockmerge.check({**state, **ema})
    assert found(whole) == {"ema": set(ema)}
    assert "whole" in whole.problems[0].message
    assert whole.problems[0].bytes == sum(tensor.nbytes for tensor in ema.values())
    some = dict(list(ema.items())[:5])
    part = blockmerge.check({**state, **some})
    assert found(part) == {"ema": set(some)}
    assert "whole" not in part.problems[0].message
    alone = {
        **ema,
        **{name: tensor for name, tensor in state.items() if UNET not in name},
        "model_ema.decay": torch.ones(()),
    }
    assert found(blockmerge.check(alone)) == {"ema_only": set(ema), "leftovers": {"model_ema.decay"}}
    # What is wrong with a copy is no fault of the model.
    ema[next(iter(ema))] = torch.full((3,), math.inf)
    assert found(blockmerge.check({**state, **ema})) == {"ema": set(ema), "leftover_nan": {next(iter(ema))}}


def test_text_encoders_in_novelais_form(states):
    state = states()
    nai = {
        name.replace("text_model.", ""): tensor.clone()
        for name, tensor in state.items()
        if "text_model." in name
    }
    alone = {**{name: tensor for name, tensor in state.items() if "text_model." not in name}, **nai}
    assert found(blockmerge.check(alone)) == {"novelai_names": set(nai)}
    assert found(blockmerge.check({**state, **nai})) == {"two_names": set(nai)}


@pytest.mark.parametrize(("name", "change"), [
    (CONV, lambda tensor: tensor[:-1]),
    (VAE, lambda tensor: tensor[..., 0]),
    ("first_stage_model.decoder.mid.attn_1.q.weight", lambda tensor: tensor[:, :, 0, 0]),
    (UNET + "time_embed.0.bias", lambda tensor: tensor[None]),
])  # fmt: skip
def test_a_wrong_shape(states, name, change):
    state = states()
    wrong = change(state[name]).contiguous()
    result = blockmerge.check({**state, name: wrong})
    assert found(result) == {"wrong_shape": {name}}
    assert f"{name} is {list(wrong.shape)}, expected {list(state[name].shape)}" in result.problems[0].message


@given(st.data(), st.sampled_from(FAMILIES), st.booleans())
@settings(max_examples=60)
def test_any_single_damage_to_a_layout_is_named(data, family, full_size):
    shapes = demo_layout(family, full_size=full_size)
    component = data.draw(st.sampled_from(components_of(family)))
    names = [name for name in shapes if component_of(name) == component and not name.endswith("logit_scale")]
    name = data.draw(st.sampled_from(names))
    damage = data.draw(st.sampled_from(["missing", "axis", "width", "unknown"]))
    shape = shapes[name]
    axis = data.draw(st.integers(0, len(shape) - 1))
    if damage == "missing":
        del shapes[name]
    elif damage == "unknown":
        shapes[name + ".more"] = (2,)
    elif damage == "axis":
        shapes[name] = (*shape, 1)
    else:
        extent = layout(family)[name][axis]
        known_elsewhere = sum(extent in layout(family)[other] for other in names) > 2
        # A thin model's widths are told from where else they are; the first convolution's channels tell the
        # variant.
        assume(full_size or extent < 128 or known_elsewhere)
        assume((name, axis) != (UNET + "input_blocks.0.0.weight", 1))
        shapes[name] = (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :])
    gaps = layout_gaps(shapes, family, component)
    optional = re.search(
        r"position_ids|cond_stage_model\.model\.(text_projection|transformer\.resblocks\.23\.)", name
    )
    assert gaps.missing == ((name,) if damage == "missing" and not optional else ())
    assert gaps.unknown == ((name + ".more",) if damage == "unknown" else ())
    assert gaps.misshapen == ({name: shape} if damage in ("axis", "width") else {})
    for other in components_of(family):
        if other != component:
            gaps = layout_gaps(shapes, family, other)
            assert not gaps.missing
            assert not gaps.unknown
            assert not gaps.misshapen


@pytest.mark.parametrize(("dtype", "code"), [
    (torch.float64, "float64_weights"), (torch.float8_e4m3fn, "fp8_weights"), (torch.float8_e5m2, "fp8_weights"),
    (torch.uint8, "integer_weights"), (torch.float32, None),
])  # fmt: skip
def test_dtypes(states, dtype, code):
    state = states()
    state[VAE] = state[VAE].to(dtype)
    mixed = {} if dtype == torch.uint8 else {"mixed_dtypes": {VAE}}
    assert found(blockmerge.check(state)) == {**({code: {VAE}} if code else {}), **mixed}


def test_components_may_have_their_own_dtypes(states):
    state = {
        name: as_dtype(t, torch.float32) if component_of(name) == "vae" else t
        for name, t in states("sdxl").items()
    }
    assert blockmerge.check(state).problems == ()


# -- position_ids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ids", "code", "says"), [
    (torch.arange(77, dtype=torch.int32)[None], None, ""),
    (torch.arange(77.0)[None], "float_position_ids", "F32"),
    (torch.arange(77.0)[None].half(), "float_position_ids", "F16"),
    (torch.arange(77.0)[None].bfloat16(), "float_position_ids", "BF16"),
    (torch.arange(77)[None] + (torch.arange(77) > 40), "broken_position_ids", "36 positions not 0 … 76: the first is 42 in place of 41"),
    (torch.arange(77.0)[None] * (1 - 2**-20), "broken_position_ids", "76 positions not exactly 0 … 76"),
    (torch.zeros(1, 77), "broken_position_ids", "the first is 0.0 in place of 1"),
    (torch.arange(77)[None] * torch.tensor(0.99), "broken_position_ids", "the first is 0.99 in place of 1"),
    (torch.full((1, 77), math.nan), "broken_position_ids", "the first is nan in place of 0"),
    (torch.arange(77), "broken_position_ids", "shape is [77], expected [1, 77]"),
    (torch.ones(1, 77, dtype=torch.bool), "broken_position_ids", "dtype is BOOL"),
])  # fmt: skip
def test_position_ids(states, ids, code, says):
    result = blockmerge.check({**states(), IDS["sd1"]: ids})
    assert found(result) == ({code: {IDS["sd1"]}} if code else {})
    assert code is None or any(says in problem.message for problem in result.problems)


def test_position_ids_of_sdxl(states):
    assert found(blockmerge.check({**states("sdxl"), IDS["sdxl"]: torch.ones(1, 77)})) == {
        "broken_position_ids": {IDS["sdxl"]}
    }


# -- values --------------------------------------------------------------------------------------------------


def test_the_bits_of_every_float_are_known():
    assert BITS.keys() == FLOAT_DTYPES == DTYPES.keys()


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.binary(min_size=8, max_size=8), min_size=1, max_size=40))
def test_peaks_agree_with_torch(dtype, raw):
    values = torch.frombuffer(bytearray(b"".join(raw)), dtype=DTYPES[dtype])
    peak = peaks_of(StateDict({"x": values}), ["x"], threads=2)["x"]
    exact = values.double()
    assert peak.is_finite == bool(exact.isfinite().all())
    assert peak.is_zero == bool((exact == 0).all())
    if peak.is_finite:
        assert peak.overflows_fp16 == bool(values.to(torch.float16).isinf().any())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_borders(dtype):
    """65519.99… still rounds to 65504 and 65520 to infinity: torch's own conversion decides."""
    largest = torch.finfo(DTYPES[dtype]).max
    numbers = [0.0, -0.0, 5e-5, 65504.0, 65519.99609375, 65520.0, -65520.0, 65536.0, 1e30, largest, -largest]
    for value in [value for value in numbers if abs(value) <= largest] + [math.nan, math.inf, -math.inf]:
        tensor = torch.tensor([value], dtype=DTYPES[dtype])
        peak = peaks_of(StateDict({"x": tensor}), ["x"])["x"]
        assert peak.is_finite == bool(tensor.double().isfinite())
        assert peak.is_zero == bool(tensor.double() == 0)
        assert peak.overflows_fp16 == (peak.is_finite and bool(tensor.half().isinf()))


@given(st.data(), st.sampled_from(sorted(DTYPES)), st.integers(1, 4))
@settings(max_examples=25)
def test_one_bad_number_is_found_wherever_it_is(data, dtype, threads):
    elements = (2 * PIECE_BYTES + 24) // DTYPES[dtype].itemsize
    tensors = {name: torch.full((elements,), -0.5).to(DTYPES[dtype]) for name in ("a", "b", "empty")}
    tensors["empty"] = tensors["empty"][:0]
    name, place = data.draw(st.sampled_from("ab")), data.draw(st.integers(0, elements - 1))
    bad = (
        math.nan
        if dtype == "F8_E4M3"
        else data.draw(st.sampled_from([math.nan, -math.nan, math.inf, -math.inf]))
    )
    tensors[name][place] = bad
    seen = []
    peaks = peaks_of(
        StateDict(tensors), list(tensors), threads, lambda done, total: seen.append((done, total))
    )
    assert {name: peak.is_finite for name, peak in peaks.items()} == {"a": name != "a", "b": name != "b"}
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_nan_by_name(states, tmp_path, dtype):
    state = {key: as_dtype(tensor, DTYPES[dtype]) for key, tensor in states().items()}
    for name in (CONV, BIAS, VAE):
        state[name] = state[name].clone()
        state[name].view(-1)[-1] = math.nan
    assert found(checked(state, tmp_path))["nan_or_infinity"] == {CONV, BIAS, VAE}


def test_schedules_may_be_infinite(states):
    name = "sqrt_recip_alphas_cumprod"
    assert found(blockmerge.check({**states(), name: torch.tensor([1.0, math.inf])})) == {"leftovers": {name}}


def test_zeros(states):
    state = states()
    for name in (CONV, NORM, BIAS):
        state[name] = torch.zeros_like(state[name])
    assert found(blockmerge.check(state)) == {"zero_weights": {CONV, NORM}}


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_what_float16_cannot_hold(states, dtype):
    state = {name: as_dtype(tensor, DTYPES[dtype]) for name, tensor in states().items()}
    state[VAE] = state[VAE].clone()
    state[VAE].view(-1)[3] = -1e5
    codes = found(blockmerge.check(state))
    codes.pop("float64_weights", None)
    assert codes == {"overflows_fp16": {VAE}}


# -- metadata and the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("metadata", "code"), [
    ({}, None),
    ({"modelspec.architecture": "stable-diffusion-v1"}, None),
    ({"modelspec.architecture": "stable-diffusion-v1-inpainting"}, None),
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, "metadata_architecture"),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "metadata_architecture"),
    ({"sd_merge_recipe": '{"type": "webui"}', "sd_merge_models": "{}"}, None),
    ({"sd_merge_recipe": "{'type': 'webui'}"}, "metadata_json"),
    ({"sd_merge_models": "[" * 100_000}, "metadata_json"),
    ({"model": "C:\\models\\a.safetensors"}, "metadata_paths"),
    ({"model": '{"a": "C:\\\\models"}'}, "metadata_paths"),
    ({"model": "D:/models/a.ckpt"}, "metadata_paths"),
    ({"model": "/home/someone/a.ckpt"}, "metadata_paths"),
    ({"model": '{"a":"/Users/someone"}'}, "metadata_paths"),
    ({"model": "file:///mnt/disk/a.ckpt"}, "metadata_paths"),
    ({"model": "\\\\server\\share"}, "metadata_paths"),
    ({"model": "https://example.org/home/page, 1:/2, and/or/home, data:image/png;base64,/9j/4A"}, None),
])  # fmt: skip
def test_metadata(metadata, code):
    problems = list(check_metadata(metadata, "sd1"))
    assert [problem.code for problem in problems] == ([code] if code else [])
    assert all(key in problem.message for problem in problems for key in metadata)


def test_metadata_of_a_file(states, tmp_path):
    metadata = {
        "format": "pt",
        "modelspec.architecture": "stable-diffusion-v2-512",
        "from": "C:/models",
        "sd_merge_recipe": "?",
    }
    codes = {"metadata_architecture": set(), "metadata_paths": set(), "metadata_json": set()}
    assert found(checked(states(), tmp_path, metadata)) == codes


def test_a_file_without_a_format(states, tmp_path):
    assert found(checked(states(), tmp_path, {})) == {"no_format": set()}


def test_unaligned_data(states, tmp_path):
    state = {name: as_dtype(tensor, torch.float32) for name, tensor in states().items()}
    state[BIAS] = state[
        BIAS
    ].half()  # half as many bytes: the next tensor begins between two floats where it is of odd length
    state[UNET + "odd"] = torch.ones(3, dtype=torch.float16)
    for pad in (8, 1):
        tensors, data = {}, b""
        for name, tensor in sorted(state.items()):
            kind = {torch.int64: "I64", torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
            tensors[name] = TensorInfo(kind, tuple(tensor.shape), len(data))
            data += tensor.numpy().tobytes()
        header = encode_header(tensors, {"format": "pt"}, pad)
        while pad == 1 and len(header) % 8 == 0:
            header = (int.from_bytes(header[:8], "little") + 1).to_bytes(8, "little") + header[8:] + b" "
        (tmp_path / "m.safetensors").write_bytes(header + data)
        result = blockmerge.check(tmp_path / "m.safetensors")
        size = {"I64": 8, "F32": 4, "F16": 2}
        askew = {name for name, info in tensors.items() if (len(header) + info.offset) % size[info.dtype]}
        assert askew
        assert found(result)["unaligned_data"] == askew
        assert load_file(tmp_path / "m.safetensors").keys() == state.keys()


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken(states, tmp_path):
    state = states()
    del state[NORM]
    state = {name: tensor for name, tensor in state.items() if component_of(name) != "text_encoder"}
    state["betas"] = torch.zeros(1000)
    save_file(state, tmp_path / "m.safetensors", metadata={"format": "pt"})
    return tmp_path / "m.safetensors"


def test_the_report(broken, capsys):
    assert run(["check", str(broken)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "m.safetensors  Stable Diffusion 1.x, base, ldm names",
        f"error    missing_tensors    the U-Net lacks 1 tensor ({NORM})",
        "warning  missing_component  there is no text encoder: a loader of whole models has to get one elsewhere",
        "note     leftovers          1 tensor that no loader needs (betas), 4.0 kB",
        "1 error, 1 warning, 1 note",
    ]
    assert err == "Error: m.safetensors has 2 faults: missing_tensors, missing_component\n"
    assert run(["check", str(broken), "-q"]) == 1
    assert capsys.readouterr() == ("", err)


def test_json(broken, capsys):
    assert run(["check", str(broken), "--json", "--threads", "1"]) == 1
    report = json.loads(capsys.readouterr().out)
    keys = {"name", "family", "variant", "naming", "problems", "fixed", "output", "notes"}
    assert report.keys() == keys
    assert (report["name"], report["family"], report["fixed"]) == ("m.safetensors", "sd1", [])
    assert report["output"] is None
    first, _, last = report["problems"]
    assert {"code", "severity", "message", "tensors"} <= first.keys()
    assert (first["code"], first["severity"], first["tensors"], first["bytes"]) == (
        "missing_tensors",
        "error",
        [NORM],
        None,
    )
    assert (last["code"], last["severity"], last["fixable"], last["bytes"]) == (
        "leftovers",
        "note",
        True,
        4000,
    )


def test_notes_alone_are_no_fault(states, tmp_path, capsys):
    save_file({**states(), "v_pred": torch.ones(())}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert run(["check", str(tmp_path / "m.safetensors")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.endswith("1 note\n")


def test_a_healthy_model_in_words(pairs, capsys):
    assert run(["check", str(pairs()[0])]) == 0
    assert capsys.readouterr() == (
        "a.safetensors  Stable Diffusion 1.x, base, ldm names\nnothing is wrong\n",
        "",
    )


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys):
    (tmp_path / "m.safetensors").write_bytes(b"\xffno header at all")
    assert run(["check", str(tmp_path / "m.safetensors")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "not a valid safetensors file" in err
    assert err.count("\n") == 1


def test_hostile_names_stay_on_their_line(states):
    hostile = {name: torch.ones(1, dtype=torch.float16) for name in (UNET + "\x1b[31m\nfree", "\x1b]0;\x07")}
    result = blockmerge.check({**states(), **hostile})
    text = drawn(lambda console: print_check(console, result))
    assert "\x1b" not in text
    assert text.count("\n") == 4


def test_check_never_loads_torch(pairs):
    code = "import sys, blockmerge; blockmerge.check(sys.argv[1]); assert 'torch' not in sys.modules"
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code, pairs()[0]], check=True, env={**os.environ, "PYTHONPATH": str(root)}
    )


def test_every_code_is_in_the_docs():
    text = (Path(__file__).parents[1] / "docs" / "check.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (yes|no) \|", text, re.M)
    assert rows == [(code, kind.severity, "yes" if kind.fixable else "no") for code, kind in KINDS.items()]

"""What a file's modules are: kinds, ranks, alphas."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from blockmerge import CheckpointError, IncompatibleModelsError
from blockmerge.adapters import KINDS, Adapter
from blockmerge.adapters.alphas import number
from blockmerge.checkpoints import open_source
from tests.small_adapters import (
    CONV,
    FIRST,
    LINEAR,
    NORM,
    PLAIN,
    POINT,
    SHAPES,
    lora_of,
    narrow,
    refused,
    tensors_of,
)

PARTS = {  # by the layer: what modules have, by the reference of their kinds
    ("lora", LINEAR): {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2)},
    ("lora", POINT): {"lora_down.weight": (2, 6, 1, 1), "lora_up.weight": (8, 2, 1, 1)},
    ("lora", f"{POINT} flat"): {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2)},
    ("lora", f"{LINEAR} bias"): {
        "lora_A.default.weight": (2, 6),
        "lora_B.default.weight": (8, 2),
        "lora_B.default.bias": (8,),
    },
    ("locon", CONV): {"lora_down.weight": (2, 6, 3, 3), "lora_up.weight": (8, 2, 1, 1)},
    ("locon", f"{CONV} mid"): {
        "lora_down.weight": (2, 6, 1, 1),
        "lora_mid.weight": (2, 2, 3, 3),
        "lora_up.weight": (8, 2, 1, 1),
    },
    ("loha", CONV): {
        "hada_w1_a": (8, 2),
        "hada_w1_b": (2, 54),
        "hada_w2_a": (8, 2),
        "hada_w2_b": (2, 54),
    },
    ("loha", f"{CONV} t"): {
        "hada_t1": (2, 2, 3, 3),
        "hada_w1_a": (2, 8),
        "hada_w1_b": (2, 6),
        "hada_t2": (2, 2, 3, 3),
        "hada_w2_a": (2, 8),
        "hada_w2_b": (2, 6),
    },
    ("lokr", f"{LINEAR} whole"): {"lokr_w1": (2, 3), "lokr_w2": (4, 2)},
    ("lokr", LINEAR): {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 2)},
    ("lokr", f"{LINEAR} first"): {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3), "lokr_w2": (4, 2)},
    ("lokr", f"{CONV} whole"): {"lokr_w1": (2, 3), "lokr_w2": (4, 2, 3, 3)},
    ("lokr", CONV): {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 18)},
    ("lokr", f"{CONV} t"): {
        "lokr_w1_a": (2, 1),
        "lokr_w1_b": (1, 3),
        "lokr_t2": (2, 2, 3, 3),
        "lokr_w2_a": (2, 4),
        "lokr_w2_b": (2, 2),
    },
    ("full", CONV): {"diff": (8, 6, 3, 3), "diff_b": (8,)},
    ("full", NORM): {"diff": (8,)},
    ("full", f"{LINEAR} bias"): {"diff_b": (8,)},
    ("norm", NORM): {"w_norm": (8,), "b_norm": (8,)},
    ("dora", LINEAR): {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2), "dora_scale": (8, 1)},
    ("dora", f"{LINEAR} in"): {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2), "dora_scale": (1, 6)},
    ("dora", f"{CONV} in"): {
        "lora_down.weight": (2, 6, 3, 3),
        "lora_up.weight": (8, 2, 1, 1),
        "dora_scale": (1, 6, 1, 1),
    },
    ("dora", f"{CONV} peft"): {
        "lora_A.weight": (2, 6, 3, 3),
        "lora_B.weight": (8, 2, 1, 1),
        "lora_magnitude_vector": (1, 8, 1, 1),
    },
    ("dora", f"{PLAIN} loha"): {
        "hada_w1_a": (8, 2),
        "hada_w1_b": (2, 6),
        "hada_w2_a": (8, 2),
        "hada_w2_b": (2, 6),
        "dora_scale": (8, 1),
    },
    ("glora", LINEAR): {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (8, 2), "b2.weight": (2, 6)},
    ("glora", CONV): {
        "a1.weight": (6, 2, 1, 1),
        "a2.weight": (2, 6, 1, 1),
        "b1.weight": (8, 2, 1, 1),
        "b2.weight": (2, 6, 3, 3),
    },
    ("ia3", LINEAR): {"weight": (1, 6), "on_input": ()},
    ("oft", LINEAR): {"oft_blocks": (2, 4, 4), "rescale": (8, 1)},
    ("oft", f"{LINEAR} old"): {"oft_diag": (4, 2, 2)},
    ("boft", CONV): {"oft_blocks": (2, 2, 4, 4)},
}


# -- kinds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layer"), PARTS, ids=lambda value: value.removeprefix("lora_unet_mid_"))
def test_a_module_is_of_its_kind_and_fits(kind, layer):
    name = layer.partition(" ")[0]
    tensors = tensors_of(name, PARTS[kind, layer])
    (module,) = narrow(tensors).modules
    assert (module.name, module.kind) == (name, kind)
    assert module.target.block == "M00"
    assert module.rank == (2 if kind in ("lora", "locon", "loha", "dora", "glora") else module.rank)
    assert {one.name for one in module.parts.values()} == tensors.keys()
    assert module.kind in KINDS
    assert module.inputs_of(SHAPES[module.target.ldm]) in (1, 6)


@pytest.mark.parametrize(("kind", "layer"), PARTS, ids=lambda value: value.removeprefix("lora_unet_mid_"))
def test_a_part_of_another_size_does_not_fit(kind, layer):
    name = layer.partition(" ")[0]
    for part, shape in PARTS[kind, layer].items():
        for axis in range(len(shape)):
            other = (*shape[:axis], shape[axis] + 4, *shape[axis + 1 :])
            tensors = tensors_of(name, {**PARTS[kind, layer], part: other})
            with pytest.raises((CheckpointError, IncompatibleModelsError), match=name):
                narrow(tensors)


@pytest.mark.parametrize(("kind", "layer"), PARTS, ids=lambda value: value.removeprefix("lora_unet_mid_"))
def test_half_a_module_is_refused(kind, layer):
    name = layer.partition(" ")[0]
    beside = {"lora_B.default.bias", "dora_scale", "lora_magnitude_vector", "rescale", "diff_b", "b_norm"}
    for part in PARTS[kind, layer].keys() - beside:
        rest = {one: shape for one, shape in PARTS[kind, layer].items() if one != part}
        if rest and rest.keys() - {"diff_b", "b_norm"}:
            with pytest.raises((CheckpointError, IncompatibleModelsError), match=name):
                narrow(tensors_of(name, rest))


def test_ranks_of_lokr_are_those_of_what_is_a_product():
    ranks = {
        layer: narrow(tensors_of(layer.partition(" ")[0], parts)).modules[0].rank
        for (kind, layer), parts in PARTS.items()
        if kind == "lokr"
    }
    assert list(ranks.values()) == [None, 2, 2, None, 2, 2]


def test_lokr_of_whole_factors_has_no_alpha():
    tensors = tensors_of(LINEAR, PARTS["lokr", f"{LINEAR} whole"]) | {f"{LINEAR}.alpha": torch.tensor(1e9)}
    (module,) = narrow(tensors).modules
    assert (module.factor, module.alpha) == (1.0, None)


def test_dora_says_over_what_it_is():
    (module,) = narrow(tensors_of(PLAIN, PARTS["dora", f"{PLAIN} loha"])).modules
    assert (module.kind, module.form) == ("dora", "loha")
    (module,) = narrow(tensors_of(CONV, PARTS["dora", f"{CONV} peft"])).modules
    # PEFT's vector is one for each row, however it lies.
    assert module.parts["dora_scale"].shape == (8, 1)
    (module,) = narrow(tensors_of(CONV, PARTS["dora", f"{CONV} in"])).modules
    assert module.parts["dora_scale"].shape == (1, 6, 1, 1)


def test_older_glora_is_told_by_its_shapes():
    old = {"a2.weight": (6, 2), "a1.weight": (2, 6), "b2.weight": (8, 2), "b1.weight": (2, 6)}
    (module,) = narrow(tensors_of(LINEAR, old)).modules
    assert module.rank == 2
    assert {part: one.shape for part, one in module.parts.items()} == {
        "a1": (6, 2),
        "a2": (2, 6),
        "b1": (8, 2),
        "b2": (2, 6),
    }
    assert module.parts["a1"].name.endswith("a2.weight")


@pytest.mark.parametrize(("on_input", "size"), [(True, 6), (False, 8)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bool])
def test_ia3_says_which_side_it_scales(on_input, size, dtype):
    tensors = {
        f"{LINEAR}.weight": torch.ones(1, size),
        f"{LINEAR}.on_input": torch.tensor(on_input).to(dtype),
    }
    (module,) = narrow(tensors).modules
    assert module.on_input is on_input
    with pytest.raises(IncompatibleModelsError, match=rf"weight is \[1, {size}\], expected"):
        narrow(tensors | {f"{LINEAR}.on_input": torch.tensor(not on_input).to(dtype)})


def test_of_oft_alpha_is_a_limit():
    def alpha(name, value):
        tensors = {f"{name}.oft_blocks": torch.ones(2, 4, 4)}
        if value is not None:
            tensors[f"{name}.alpha"] = torch.tensor(value)
        (module,) = narrow(tensors).modules
        assert module.factor == 1
        return module.alpha

    own = LINEAR.replace("lora_unet_", "oft_unet_")
    assert [alpha(LINEAR, value) for value in (None, 0.0, 0.5)] == [None, None, 0.5]
    assert [alpha(own, value) for value in (None, 0.0, 0.5)] == [None, 0.0, 0.5]


@pytest.mark.parametrize("channels", [4, 9])
def test_a_first_convolution_with_more_channels_keeps_the_others(channels):
    (module,) = narrow(lora_of(FIRST, shape=(8, channels, 3, 3))).modules
    assert module.inputs_of((8, 9, 3, 3)) == channels
    with pytest.raises(IncompatibleModelsError, match=r"\[2, 8, 3, 3\], expected 81 columns"):
        narrow(lora_of(FIRST, shape=(8, 8, 3, 3)))


# -- alpha ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.int64]
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_of_any_dtype_is_divided_by_the_rank(dtype, shape):
    tensors = lora_of(LINEAR, rank=4) | {f"{LINEAR}.alpha": torch.full(shape, 2).to(dtype)}
    (module,) = narrow(tensors).modules
    assert (module.rank, module.alpha, module.factor) == (4, 2.0, 0.5)


def test_without_alpha_the_factor_is_one():
    adapter = narrow(lora_of(LINEAR, rank=4))
    assert (adapter.modules[0].alpha, adapter.modules[0].factor, adapter.notes) == (4.0, 1.0, ())


def test_alpha_0_is_the_rank_with_a_note():
    adapter = narrow(lora_of(LINEAR, rank=4, alpha=0.0))
    module = adapter.modules[0]
    assert (module.alpha, module.stored_alpha, module.factor) == (4.0, 0.0, 1.0)
    assert adapter.notes == ("x has alpha 0 in 1 module: the rank is taken in its place, as trainers do",)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_alpha_that_is_not_finite_is_refused(value):
    said = refused(lora_of(LINEAR, alpha=value))
    assert said == (
        f"x has 1 module without a finite alpha to scale by ({LINEAR} has alpha {value}): download it again, or "
        "have its trainer save it anew"
    )


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 2)])
def test_an_alpha_that_is_not_one_number_is_refused(shape):
    said = refused(lora_of(LINEAR) | {f"{LINEAR}.alpha": torch.ones(shape)})
    assert f"{LINEAR}.alpha is {list(shape)}, expected a single number" in said


@given(st.integers(0, 2**16 - 1), st.sampled_from(["F16", "BF16", "F8_E4M3", "F8_E5M2"]))
def test_numbers_are_read_as_torch_reads_them(bits, dtype):
    size = 2 if dtype in ("F16", "BF16") else 1
    data = bits.to_bytes(2, "little")[:size]
    own = {"F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[dtype]
    expected = torch.frombuffer(bytearray(data), dtype=getattr(torch, own)).double().item()
    assert number(data, dtype) == expected or (math.isnan(number(data, dtype)) and math.isnan(expected))


@given(st.floats(), st.floats(width=32), st.integers(-(2**31), 2**31 - 1))
def test_numbers_of_wide_dtypes_are_read(double, single, whole):
    for data, dtype, value in (
        (struct.pack("<d", double), "F64", double),
        (struct.pack("<f", single), "F32", single),
        (struct.pack("<i", whole), "I32", whole),
    ):
        assert number(data, dtype) == value or math.isnan(value)


PEFT = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def peft_of(name, rank=4):
    return {f"{name}.lora_A.weight": torch.ones(rank, 6), f"{name}.lora_B.weight": torch.ones(8, rank)}


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"unet.lora_alpha": 8, "unet.r": 4}, 2.0),
        ({"unet.lora_alpha": 8, "unet.r": 4, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2, "attn1.to_q": 1}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"o_q": 2, "attn2.to_q": 3}}, 2.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": None}, 2.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
        ({"lora_alpha": 2}, 0.5),
        ({}, 1.0),
    ],
)
def test_alpha_is_in_what_diffusers_writes(settings, factor):
    adapter = narrow(peft_of(PEFT), {"lora_adapter_metadata": json.dumps(settings)})
    assert adapter.modules[0].factor == factor
    assert adapter.modules[0].alpha == 4 * factor
    if "unet.use_rslora" in settings:
        assert adapter.modules[0].stored_alpha == settings["unet.lora_alpha"]
        assert adapter.notes == ("x is an rs-LoRA (use_rslora): alpha counts times the root of the rank",)


def test_a_tensors_alpha_wins_over_what_diffusers_writes():
    tensors = peft_of(PEFT) | {f"{PEFT}.alpha": torch.tensor(4.0)}
    assert narrow(tensors, {"lora_adapter_metadata": '{"unet.lora_alpha": 8}'}).modules[0].factor == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "is not a JSON object of settings"),
        ("{" * 100, "is not a JSON object of settings"),
        ("[1]", "is not a JSON object of settings"),
        ('{"unet.lora_alpha": "8"}', "an alpha that is not a number"),
        ('{"unet.lora_alpha": NaN}', "an alpha that is not a number"),
        ('{"unet.lora_alpha": 1e999}', "an alpha that is not a number"),
        ('{"unet.lora_alpha": 1' + "0" * 400 + "}", "an alpha that is not a number"),
        ('{"unet.lora_alpha": true}', "an alpha that is not a number"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_q": null}}', "an alpha that is not a number"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}', "an alpha that is not a number"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {".*to_q": 1}}', "only names of modules are read"),
        ('{"unet.peft_type": "LOHA", "unet.alpha": 1}', "says PEFT's LOHA: only LORA is read"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(text, said):
    assert said in refused(peft_of(PEFT), metadata={"lora_adapter_metadata": text})


@pytest.mark.parametrize("prefix", ["base_model.model.", "unet.base_model.model."])
def test_what_peft_itself_saves_has_its_settings_beside_it(tmp_path, prefix):
    path = tmp_path / "adapter_model.safetensors"
    save_file(peft_of(prefix + PEFT.removeprefix("unet.")), path)
    source = open_source(path)
    without = Adapter.of(source, "sd1", shapes=SHAPES)
    assert without.modules[0].factor == 1
    assert without.notes == (
        "adapter_model.safetensors is as PEFT saves it, without the adapter_config.json that has its alpha: "
        "the rank is taken in its place",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "peft_type": "LORA", "r": 4}))
    beside = Adapter.of(source, "sd1", shapes=SHAPES)
    assert (beside.modules[0].factor, beside.notes) == (0.5, ())
    (tmp_path / "adapter_config.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        Adapter.of(source, "sd1", shapes=SHAPES)

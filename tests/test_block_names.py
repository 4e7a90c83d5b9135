"""Which block a tensor is in, by every spelling of its name that merging takes."""

from __future__ import annotations

import re

import pytest
import torch

import blockmerge
from blockmerge import RecipeError, block_of
from blockmerge.demo import make_state_dicts
from tests.other_names import in_diffusers
from tests.small_models import small_model

UNET = "model.diffusion_model."


def spellings(family):
    """{spelling: (A, B)} of a thin model whose second has other values everywhere."""
    pair = [small_model(family, seed=seed) for seed in (0, 1)]
    folders = [in_diffusers(model, family) for model in pair]
    dotted = [{name.replace("/", ".", 1): one for name, one in model.items()} for model in folders]
    bare = [
        {name.removeprefix("unet/"): one for name, one in model.items() if name.startswith("unet/")}
        for model in folders
    ]
    unets = [
        {name.removeprefix(UNET): one for name, one in model.items() if name.startswith(UNET)}
        for model in pair
    ]
    ema = [
        {
            "model_ema.diffusion_model" + name.removeprefix(UNET).replace(".", ""): one
            for name, one in model.items()
            if name.startswith(UNET)
        }
        for model in pair
    ]
    return {"ldm": pair, "folder": folders, "dotted": dotted, "bare": bare, "U-Net": unets, "ema": ema}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_merge_changes_the_tensors_that_are_said_to_be_in_a_block(family):
    """The oracle is merging itself: one block of B, and which of A's tensors have changed."""
    for spelling, (a, b) in spellings(family).items():
        for block in ("IN00", "IN04", "M00", "OUT05"):
            merged = blockmerge.merge_state_dicts(a, b, weights=f"{block}=1")
            by_plain_name = {block_of(name, family): name for name in merged}
            assert block in by_plain_name, spelling
            changed = {
                name
                for name in merged.keys() & a.keys()
                if not torch.equal(merged[name], a[name]) and block_of(name, family) != block
            }
            assert not changed, (spelling, block)
            if spelling != "ema":  # they come out under plain names
                same = [
                    name
                    for name in merged
                    if block_of(name, family) == block
                    and torch.equal(merged[name], a[name])
                    and not torch.equal(a[name], b[name])
                ]
                assert not same, (spelling, block)


@pytest.mark.parametrize(
    ("name", "family", "block"),
    [
        ("unet.down_blocks.1.attentions.0.proj_in.weight", None, "IN04"),
        ("unet/down_blocks.1.attentions.0.proj_in.weight", None, "IN04"),
        ("down_blocks.1.attentions.0.proj_in.weight", None, "IN04"),
        ("unet.conv_out.bias", "sdxl", "OUT08"),
        ("unet.add_embedding.linear_1.weight", "sdxl", "IN00"),
        ("unet.mid_block.resnets.0.conv1.bias", "sd2", "M00"),
        ("model_ema.diffusion_modelinput_blocks41proj_inweight", None, "IN04"),
        ("model_ema.diffusion_modelout2bias", "sdxl", "OUT08"),
        ("text_encoder.text_model.final_layer_norm.bias", None, "BASE"),
        ("text_encoder_2/text_model.final_layer_norm.bias", "sdxl", "BASE"),
        ("vae.decoder.conv_in.weight", None, "BASE"),
    ],
)
def test_spellings(name, family, block):
    assert block_of(name, family) == block


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w1_a",
        "lycoris_down_blocks_0_resnets_0_conv1.lokr_w1",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.default.weight",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
        "model.diffusion_model.input_blocks.4.1.proj_in.dora_scale",
        "model.diffusion_model.input_blocks.4.1.proj_in.diff",
        "model.diffusion_model.middle_block.1.proj_in.lora_magnitude_vector",
        "lora_unet_mid_block_attentions_0_proj_out.oft_blocks",
    ],
)
def test_the_names_of_loras_are_refused(name):
    with pytest.raises(RecipeError, match=f"^{re.escape(name)} is a name in a LoRA or another adapter"):
        block_of(name)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_no_name_of_a_model_is_taken_for_a_loras(family):
    model = make_state_dicts(family)[0]
    for name in (*model, *in_diffusers(model, family)):
        block_of(name, family)


def test_a_model_with_such_a_tensor_is_still_compared(tmp_path):
    """They are not asked for by whoever looks at whole files."""
    from safetensors.torch import save_file

    a, b = make_state_dicts("sd1")
    for name, model in (("a", a), ("b", b)):
        save_file({**model, "trained.alpha": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    found = blockmerge.similarity(paths[0], paths[1], "weights").references[0]
    assert found.error is None
    assert blockmerge.explain(dict(a), paths).method == "copy"
    assert blockmerge.inspect(paths[0]).components["other"].tensors == 1

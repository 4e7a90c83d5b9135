"""`lora convert`: names, values there and back, what diffusers makes of it, and what is refused.

Over 500 lines: both directions are held against the same few LoRAs.
"""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import blockmerge
from blockmerge import CheckpointError, NonFiniteError, OutputError, RecipeError
from blockmerge.cli.main import run
from tests import thin_unet
from tests.adapter_names import modules
from tests.commands import ok
from tests.lora_oracle import Factors
from tests.small_models import small_model

PIPELINES = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def saved(tensors, path, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def converted(source, path, to, **how):
    return blockmerge.convert_lora(source, output=path, to=to, **how), load_file(path)


# -- pipelines in which every layer may have a LoRA ----------------------------------------------------------


def text_config(width):
    return CLIPTextConfig(
        vocab_size=50, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=12, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def pipeline(family):
    torch.manual_seed(0)
    config = thin_unet.config(family)
    parts = {
        "unet": UNet2DConditionModel(**config),
        "text_encoder": CLIPTextModel(text_config(16)),
        "vae": None,
        "tokenizer": None,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "feature_extractor": None,
    }
    if family == "sdxl":
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(text_config(20)), "tokenizer_2": None}
    else:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    return PIPELINES[family](**parts)


UNET_LAYERS = (
    "attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_shortcut",
    "downsamplers.0.conv", "time_emb_proj", "time_embedding.linear_1", "conv_in", "conv_out", "add_embedding.linear_2",
)  # fmt: skip
TEXT_LAYERS = ("q_proj", "out_proj", "mlp.fc1")


def layers(pipe):
    """Yield (kohya's name, diffusers' name, the layer) of what gets a LoRA."""
    for component, prefix in (
        ("unet", "lora_unet_"),
        ("text_encoder", "lora_te1_"),
        ("text_encoder_2", "lora_te2_"),
    ):
        model = getattr(pipe, component, None)
        if model is None:
            continue
        for name, layer in model.named_modules():
            if name.endswith(UNET_LAYERS if component == "unet" else TEXT_LAYERS):
                full = name if component == "unet" or name.startswith("text_model.") else f"text_model.{name}"
                yield prefix + full.replace(".", "_"), f"{component}.{full}", layer


def kohya_lora(pipe, alpha=2.0, seed=0, **options):
    """A LoRA in kohya's form for all these layers; convolutions have another rank and alpha."""
    found = {}
    for number, (name, _, layer) in enumerate(layers(pipe)):
        shape = layer.weight.shape
        rank, own = (2, alpha / 2) if len(shape) == 4 and shape[2] > 1 else (4, alpha)
        parts = Factors(shape, seed=seed + number, dtype=torch.float32, **options).lora(rank)
        found |= {f"{name}.{part}": 0.5 * tensor for part, tensor in parts.items()}
        found[f"{name}.alpha"] = torch.tensor(own)
    return found


def product(tensors, module, shape):
    up, down = tensors[f"{module}.lora_up.weight"].double(), tensors[f"{module}.lora_down.weight"].double()
    alpha = tensors.get(f"{module}.alpha", torch.tensor(float(len(down))))
    return (alpha.double() / len(down) * (up.flatten(1) @ down.flatten(1))).reshape(shape)


def outputs(pipe):
    generator = torch.Generator().manual_seed(1)
    unet = pipe.unet
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 5, unet.config.cross_attention_dim, generator=generator)
    more = {}
    if hasattr(pipe, "text_encoder_2"):
        ids = torch.ones(1, 6, dtype=torch.long)
        size = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        more = {
            "added_cond_kwargs": {"text_embeds": torch.randn(1, size, generator=generator), "time_ids": ids}
        }
    found = [unet(noise, torch.tensor(10), text, **more).sample]
    tokens = torch.tensor([[1, 7, 9, 2]])
    for encoder in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, encoder, None) is not None:
            found.append(getattr(pipe, encoder)(tokens, output_hidden_states=True).hidden_states[-1])
    return found


# One of the larger family is enough: alphas are the same there.
@pytest.mark.parametrize(
    ("family", "alpha"),
    [(one, alpha) for one in PIPELINES for alpha in (4.0, 1.0, 3.0)[2 * (one == "sdxl") :]],
)
@torch.no_grad()
def test_diffusers_does_what_it_is(family, alpha, tmp_path):
    """Loaded by diffusers, the converted file does what the factors say: of several ranks, with and without
    a power of two for alpha / rank.
    """
    pipe = pipeline(family)
    lora = kohya_lora(pipe, alpha)
    result, _ = converted(saved(lora, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers")
    assert result.modules == len([*layers(pipe)])
    wanted = pipeline(family)
    before = outputs(wanted)
    for name, _, layer in layers(wanted):
        layer.weight += product(lora, name, layer.weight.shape).float()
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    for one, other, old in zip(outputs(pipe), outputs(wanted), before, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
        assert not torch.allclose(one, old, atol=1e-2)


@torch.no_grad()
def test_a_dora_in_diffusers_form_is_read_by_diffusers(tmp_path):
    pipe = pipeline("sd1")
    lora = kohya_lora(pipe, 2.0)
    for name, _, layer in layers(pipe):
        ones = [1] * (layer.weight.dim() - 1)
        lora[f"{name}.dora_scale"] = (layer.weight.flatten(1).norm(dim=1) * 1.1).view(-1, *ones)
    result, tensors = converted(
        saved(lora, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers"
    )
    assert "unet.conv_in.lora_magnitude_vector.weight" in tensors
    wanted = pipeline("sd1")
    for name, _, layer in layers(wanted):
        whole = layer.weight.double() + product(lora, name, layer.weight.shape)
        norm = whole.flatten(1).norm(dim=1).view(lora[f"{name}.dora_scale"].shape)
        layer.weight.copy_((lora[f"{name}.dora_scale"].double() * whole / norm).float())
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    for one, other in zip(outputs(pipe), outputs(wanted), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    _, back = converted(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    assert_same_values(back, lora)
    assert result.notes == () or all("widths" in note for note in result.notes)


@pytest.mark.parametrize("family", PIPELINES)
def test_diffusers_makes_the_same_of_both_forms(family, tmp_path):
    lora = kohya_lora(pipeline(family), 1.0)
    if family == "sd1":
        lora = {name.replace("lora_te1_", "lora_te_"): tensor for name, tensor in lora.items()}
    converted(saved(lora, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers")
    theirs, ours = (deltas(family, tmp_path, name) for name in ("a.safetensors", "b.safetensors"))
    # diffusers reads no kohya name of this one.
    assert ours.keys() - theirs.keys() == ({"unet.add_embedding.linear_2"} if family == "sdxl" else set())
    assert theirs.keys() <= ours.keys()
    assert len(ours) == len([*layers(pipeline(family))])
    for name, delta in theirs.items():
        assert torch.allclose(ours[name], delta, rtol=1e-5, atol=1e-6), name


@torch.no_grad()
def deltas(family, folder, file):
    """{layer: what is added to its weight} of a LoRA that diffusers has loaded."""
    pipe = pipeline(family)
    pipe.load_lora_weights(folder, weight_name=file)
    return {
        f"{component}.{name}": module.get_delta_weight(module.active_adapters[0])
        for component in ("unet", "text_encoder", "text_encoder_2")
        for name, module in getattr(getattr(pipe, component, None), "named_modules", list)()
        if isinstance(module, BaseTunerLayer)
    }


# -- names ---------------------------------------------------------------------------------------------------


def tensors_of(program, family, down, up, dtype=torch.float16):
    found = {}
    for number, (name, one) in enumerate(modules(family, program).items()):
        generator = torch.Generator().manual_seed(number)
        rows, inputs, *kernel = one.shape
        found[f"{name}.{down}"] = torch.randn(2, inputs, *kernel, generator=generator).to(dtype)
        found[f"{name}.{up}"] = torch.randn(rows, 2, *[1] * len(kernel), generator=generator).to(dtype)
    return found


KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")


@pytest.mark.parametrize(
    "program", ["sd15-kohya", "sd15-kohya-locon", "sd21-kohya", "sdxl-kohya", "sdxl-kohya-locon"]
)
def test_kohyas_names_come_back(program, tmp_path):
    family = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[program.partition("-")[0]]
    lora = tensors_of(program, family, *KOHYA)
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    result, found = converted(saved(lora, tmp_path / "a.safetensors"), there, "diffusers")
    assert result.modules == len(modules(family, program))
    assert all(name.split(".")[0] in ("unet", "text_encoder", "text_encoder_2") for name in found)
    _, again = converted(there, back, "kohya")
    assert {
        name: tensor for name, tensor in again.items() if not name.endswith("alpha")
    }.keys() == lora.keys()
    for name, tensor in lora.items():
        assert torch.equal(again[name], tensor), name
    assert all(tensor == 2 for name, tensor in again.items() if name.endswith("alpha"))


def test_peft_names_are_those_of_the_program_that_writes_them(tmp_path):
    """sd-scripts' names of SDXL become those that PEFT writes, and the reverse, tensor for tensor."""
    by_meaning = {(one.ldm, one.rows): name for name, one in modules("sdxl", "sdxl-kohya").items()}
    peft = modules("sdxl", "sdxl-peft")
    assert len(peft) == 824
    lora = tensors_of("sdxl-peft", "sdxl", *PEFT)
    _, found = converted(saved(lora, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "kohya")
    for name, one in peft.items():
        kohya = by_meaning[one.ldm, one.rows]
        assert torch.equal(found[f"{kohya}.lora_down.weight"], lora[f"{name}.lora_A.weight"])
        assert torch.equal(found[f"{kohya}.lora_up.weight"], lora[f"{name}.lora_B.weight"])
    _, again = converted(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers")
    assert_same(again, {in_full(name): tensor for name, tensor in lora.items()})


def in_full(name):
    return name if name.startswith(("unet.", "text_encoder")) else f"unet.{name}"


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same_values(found, wanted):
    """The same but for spellings of the first text encoder, in which other programs differ."""
    named = {name.replace("lora_te1_", "lora_te_"): tensor for name, tensor in wanted.items()}
    assert_same({name.replace("lora_te1_", "lora_te_"): tensor for name, tensor in found.items()}, named)


def test_older_spellings_become_the_usual_ones(tmp_path):
    old = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": torch.ones(
            2, 1280
        ),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": torch.ones(
            1280, 2
        ),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": torch.ones(
            2, 768
        ),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": torch.ones(
            768, 2
        ),
    }
    _, found = converted(saved(old, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers")
    assert found.keys() == {
        f"{module}.{part}"
        for part in PEFT
        for module in (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        )
    }


# -- values --------------------------------------------------------------------------------------------------

PLACE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
CONV = "lora_unet_mid_block_resnets_0_conv1"
THERE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"


def small(kind=Factors.lora, alpha=None, shape=(1280, 1280), place=PLACE, **options):
    parts = kind(Factors(shape, **options))
    found = {f"{place}.{part}": tensor for part, tensor in parts.items()}
    return found if alpha is None else {**found, f"{place}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [1.5, 6.0, 0.75, 3.0, 0.0])
def test_there_and_back_is_bit_for_bit_where_alpha_by_rank_is_a_power_of_two(alpha, dtype, tmp_path):
    lora = small(alpha=alpha, dtype=dtype)
    lora[f"{PLACE}.alpha"] = lora[f"{PLACE}.alpha"].to(dtype)
    there = tmp_path / "b.safetensors"
    result, found = converted(saved(lora, tmp_path / "a.safetensors"), there, "diffusers")
    assert not any("alpha / rank" in note for note in result.notes)
    factor = (alpha or 3) / 3
    assert torch.equal(found[f"{THERE}.lora_B.weight"], lora[f"{PLACE}.lora_up.weight"] * factor)
    assert torch.equal(found[f"{THERE}.lora_A.weight"], lora[f"{PLACE}.lora_down.weight"])
    _, back = converted(there, tmp_path / "c.safetensors", "kohya")
    lora[f"{PLACE}.alpha"] = torch.tensor(alpha or 3.0).to(dtype)
    assert_same(back, lora)


def test_another_alpha_is_one_rounding_which_is_told(tmp_path):
    lora = small(alpha=1.0)
    result, found = converted(
        saved(lora, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers"
    )
    assert any(f"rounds it once more in 1 module ({PLACE})" in note for note in result.notes)
    wanted = (lora[f"{PLACE}.lora_up.weight"].double() / 3).half()
    assert torch.equal(found[f"{THERE}.lora_B.weight"], wanted)
    _, back = converted(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    assert back[f"{PLACE}.alpha"] == 3  # the rank: taking it out again would be another rounding
    assert torch.equal(back[f"{PLACE}.lora_up.weight"], wanted)


def test_what_is_too_small_for_its_dtype_is_told_and_kept_by_a_wider_one(tmp_path):
    """A half of the least numbers of fp16 is none."""
    lora = small(alpha=1.5)
    lora[f"{PLACE}.lora_up.weight"][0, 0] = 2.0**-24
    path = saved({**lora, f"{PLACE}.alpha": torch.tensor(1.5).half()}, tmp_path / "a.safetensors")
    result, _ = converted(path, tmp_path / "b.safetensors", "diffusers")
    (note,) = [note for note in result.notes if "alpha / rank" in note]
    assert f"the values nearest to 0 fewer digits in 1 module ({PLACE}): dtype fp32" in note
    _, back = converted(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    assert torch.allclose(
        back[f"{PLACE}.lora_up.weight"], lora[f"{PLACE}.lora_up.weight"], rtol=0, atol=2.0**-24
    )
    result, _ = converted(path, tmp_path / "d.safetensors", "diffusers", dtype="fp32")
    assert not any("alpha / rank" in note for note in result.notes)
    _, back = converted(tmp_path / "d.safetensors", tmp_path / "e.safetensors", "kohya", dtype="fp16")
    assert_same(back, load_file(path))


def test_alphas_of_peft_become_tensors(tmp_path):
    lora = {f"{THERE}.lora_A.weight": torch.randn(4, 1280), f"{THERE}.lora_B.weight": torch.randn(1280, 4)}
    settings = {"unet.lora_alpha": 2, "unet.r": 4, "unet.peft_type": "LORA"}
    saved(lora, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    _, found = converted(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert found[f"{PLACE}.alpha"] == 2
    assert torch.equal(found[f"{PLACE}.lora_up.weight"], lora[f"{THERE}.lora_B.weight"])
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "b.safetensors")
    _, there = converted(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "diffusers")
    assert torch.equal(there[f"{THERE}.lora_B.weight"], lora[f"{THERE}.lora_B.weight"] / 2)


def test_axes_are_those_of_the_weight(tmp_path):
    lora = {
        **small(place=PLACE, kind=Factors.flat_lora),
        f"{CONV[:-5]}conv1.lora_down.weight": torch.randn(2, 1280 * 9),
        f"{CONV[:-5]}conv1.lora_up.weight": torch.randn(1280, 2),
    }
    for to, (down, up) in (("kohya", KOHYA), ("diffusers", PEFT)):
        path = tmp_path / f"{to}.safetensors"
        _, found = converted(saved(lora, tmp_path / "a.safetensors"), path, to)
        place, conv = (PLACE, CONV) if to == "kohya" else (THERE, "unet.mid_block.resnets.0.conv1")
        assert found[f"{place}.{down}"].shape == (3, 1280)
        assert found[f"{place}.{up}"].shape == (1280, 3)
        assert found[f"{conv}.{down}"].shape == (2, 1280, 3, 3)
        assert found[f"{conv}.{up}"].shape == (1280, 2, 1, 1)


def test_a_bias_goes_along(tmp_path):
    lora = small(kind=Factors.biased_lora, alpha=1.5)
    _, found = converted(saved(lora, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "kohya")
    assert torch.equal(found[f"{PLACE}.diff_b"], lora[f"{PLACE}.lora_B.bias"] / 2)
    _, there = converted(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers")
    assert torch.equal(there[f"{THERE}.lora_B.bias"], lora[f"{PLACE}.lora_B.bias"] / 2)


KINDS = {
    "loha": (Factors.loha, "loha"),
    "tucker": (Factors.tucker, "locon with a core"),
    "lokr": (lambda factors: factors.lokr("whole", "product"), "lokr"),
    "full": (Factors.full_biased, "full"),
}
TURNED = {"oft_blocks": torch.randn(4, 320, 320), "alpha": torch.tensor(0.5)}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_diffusers_has_no_place_for_are_refused_and_kept_in_kohyas_form(kind, tmp_path):
    make, said = KINDS[kind]
    shape, place = ((64, 32, 3, 3), CONV) if kind == "tucker" else ((64, 32), PLACE)
    lora = small(make, shape=shape, place=place, alpha=None if kind == "full" else 1.5)
    path = saved(lora, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"1 module that diffusers' form has no place for: 1 of {said}.* \({place}\)"
    ):
        blockmerge.convert_lora(path, output=tmp_path / "b.safetensors", to="diffusers")
    assert not (tmp_path / "b.safetensors").exists()
    other = {name.replace("lora_unet_", "lycoris_"): tensor for name, tensor in lora.items()}
    _, found = converted(saved(other, path), tmp_path / "b.safetensors", "kohya")
    assert_same({name: one for name, one in found.items() if name.rpartition(".")[2] != "alpha"},
                {name: one for name, one in lora.items() if name.rpartition(".")[2] != "alpha"})  # fmt: skip
    if kind != "full":
        assert found[f"{place}.alpha"] == 1.5


def test_what_looks_at_the_weight_is_kept_in_kohyas_form(tmp_path):
    lora = {f"oft_unet_{PLACE[10:]}.{part}": tensor for part, tensor in TURNED.items()}
    path = saved(lora, tmp_path / "a.safetensors")
    _, found = converted(path, tmp_path / "b.safetensors", "kohya")
    assert_same(found, lora)
    with pytest.raises(CheckpointError, match="bake it into a model"):
        blockmerge.convert_lora(path, output=tmp_path / "c.safetensors", to="diffusers")


REFUSED = {
    "dora per input": ({"dora_scale": torch.ones(1, 1280)}, "magnitudes are per input"),
    "dora with a bias": ({"dora_scale": torch.ones(1280, 1), "diff_b": torch.ones(1280)}, "dora with a bias"),
    "two biases": ({"lora_up.bias": torch.ones(1280), "diff_b": torch.ones(1280)}, "two biases"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_more_that_diffusers_does_not_read_is_refused(case, tmp_path):
    parts, said = REFUSED[case]
    lora = small() | {f"{PLACE}.{part}": tensor for part, tensor in parts.items()}
    with pytest.raises(CheckpointError, match=said):
        blockmerge.convert_lora(
            saved(lora, tmp_path / "a.safetensors"), output=tmp_path / "b.safetensors", to="diffusers"
        )


def test_some_doras_among_others_are_refused(tmp_path):
    lora = (
        small() | small(place=CONV, shape=(1280, 1280, 3, 3)) | {f"{PLACE}.dora_scale": torch.ones(1280, 1)}
    )
    with pytest.raises(CheckpointError, match="1 of 2 modules of the unet as DoRA"):
        blockmerge.convert_lora(
            saved(lora, tmp_path / "a.safetensors"), output=tmp_path / "b.safetensors", to="diffusers"
        )


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", torch.float16])
def test_a_dtype_is_for_all(dtype, tmp_path):
    lora = small(alpha=1.5, dtype=torch.float32)
    _, found = converted(
        saved(lora, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "kohya", dtype=dtype
    )
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype, dtype)
    assert_same(found, {name: tensor.to(wanted) for name, tensor in lora.items()})


# -- baked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_baked_it_is_the_same_to_the_bit(family, tmp_path):
    model = small_model(family, torch.float32)
    saved(model, tmp_path / "model.safetensors")
    from blockmerge.adapters import targets_of
    from blockmerge.anatomy import FAMILIES

    lora = {}
    done = set()
    for name, target in targets_of(FAMILIES[family]).items():
        place = target.ldm, target.place
        shape = target.shape_in(FAMILIES[family], {one: tuple(tensor.shape) for one, tensor in model.items()})
        if name.startswith("lora_") and shape is not None and len(shape) > 1 and place not in done:
            done.add(place)
            lora |= small(alpha=1.5, shape=shape, place=name, seed=len(done))
    assert any(part is not None for _, part in done) == (family != "sd1")
    original = saved(lora, tmp_path / "a.safetensors")
    for to in ("diffusers", "kohya"):
        blockmerge.convert_lora(original, output=tmp_path / f"{to}.safetensors", to=to)
    files = [original, tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"]
    for file in files:
        blockmerge.bake(
            tmp_path / "model.safetensors", [(file, 0.7)], output=tmp_path / f"baked-{file.stem}.safetensors"
        )
    baked = [load_file(tmp_path / f"baked-{file.stem}.safetensors") for file in files]
    assert_same(baked[1], baked[0])
    assert_same(baked[2], baked[0])
    found = blockmerge.lora_similarity(original, files[1], blocks=True)
    assert found.similarity == pytest.approx(1, abs=1e-12)


# -- metadata ------------------------------------------------------------------------------------------------

TRAINED = {
    "ss_base_model_version": "sd_v1",
    "ss_network_dim": "3",
    "ss_network_alpha": "1.5",
    "ss_network_module": "networks.lora",
    "ss_network_args": '{"rank_dropout": "0.1"}',
    "ss_tag_frequency": '{"10_cat": {"cat": 30}}',
    "ss_training_comment": "mine",
    "modelspec.title": "Cats",
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "0" * 8,
    "note": "/home/me/cats",
}


def test_training_metadata_stay_where_they_stay_true(tmp_path):
    path = saved(small(alpha=1.5), tmp_path / "a.safetensors", TRAINED)
    converted(path, tmp_path / "b.safetensors", "diffusers")
    converted(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "kohya")
    there, back = metadata_of(tmp_path / "b.safetensors"), metadata_of(tmp_path / "c.safetensors")
    for key in (
        "ss_base_model_version",
        "ss_tag_frequency",
        "ss_training_comment",
        "modelspec.title",
        "ss_network_args",
    ):
        assert there[key] == back[key] == TRAINED[key]
    assert (there["ss_network_dim"], there["ss_network_alpha"]) == ("3", "3.0")  # it has gone into the factor
    assert (back["ss_network_dim"], back["ss_network_alpha"]) == ("3", "1.5")
    assert "note" not in there
    for name, said in (("b", there), ("c", back)):
        raw = (tmp_path / f"{name}.safetensors").read_bytes()
        data = raw[8 + int.from_bytes(raw[:8], "little") :]
        assert said["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
        assert json.loads(said["blockmerge.recipe"])["method"] == "lora convert"
        assert said["format"] == "pt"


def test_kohyas_form_says_what_programs_look_for(tmp_path):
    lora = tensors_of("sdxl-peft", "sdxl", *PEFT)
    converted(saved(lora, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "kohya")
    said = metadata_of(tmp_path / "b.safetensors")
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == (
        "networks.lora",
        "2",
        "2.0",
    )
    converted(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "diffusers")
    assert not any(key.startswith("ss_") for key in metadata_of(tmp_path / "c.safetensors"))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", '{"alpha": "x"}', '{"alpha": -1}', '{"modules": 3}', '{"alpha": 0.1}']
)
def test_odd_notes_of_alphas_are_passed_over(text, tmp_path):
    lora = {f"{THERE}.lora_A.weight": torch.randn(4, 1280), f"{THERE}.lora_B.weight": torch.randn(1280, 4)}
    saved(lora, tmp_path / "a.safetensors", {"blockmerge.alphas": text})
    _, found = converted(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert found[f"{PLACE}.alpha"] == 4
    assert torch.equal(found[f"{PLACE}.lora_up.weight"], lora[f"{THERE}.lora_B.weight"])


def test_embeddings_go_along_or_are_named(tmp_path):
    lora = small() | {
        "bundle_emb.word.clip_l": torch.ones(1, 768),
        "bundle_emb.word.clip_g": torch.ones(1, 8),
    }
    path = saved(lora, tmp_path / "a.safetensors")
    _, found = converted(path, tmp_path / "b.safetensors", "kohya")
    assert torch.equal(found["bundle_emb.word.clip_l"], torch.ones(1, 768))
    assert found["bundle_emb.word.clip_g"].shape == (1, 8)
    result, found = converted(path, tmp_path / "c.safetensors", "diffusers")
    assert not any(name.startswith("bundle_emb") for name in found)
    assert any("2 tensors of embeddings are left out" in note for note in result.notes)


# -- what is asked for ---------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return saved(small(alpha=1.5), tmp_path / "a.safetensors", TRAINED)


def test_on_the_command_line(file, tmp_path, capsys):
    out = tmp_path / "b.safetensors"
    said = json.loads(ok(capsys, "lora", "convert", file, "-o", out, "--to", "diffusers", "--json"))
    assert {"output", "modules", "notes"} <= said.keys()
    assert (said["output"], said["modules"]) == (str(out), 1)
    assert "diffusers form" in ok(
        capsys, "lora", "convert", file, "-o", out, "--to", "diffusers", "--overwrite"
    )
    assert (
        ok(
            capsys,
            "lora",
            "convert",
            file,
            "-o",
            out,
            "--to",
            "kohya",
            "--overwrite",
            "-q",
            "--dtype",
            "bf16",
        )
        == ""
    )
    assert load_file(out)[f"{PLACE}.alpha"].dtype == torch.bfloat16
    assert run(["lora", "convert", str(file), "-o", str(out), "--to", "kohya"]) == 1
    assert "exists" in capsys.readouterr().err


def test_the_threads_change_nothing(tmp_path):
    lora = tensors_of("sd15-kohya", "sd1", *KOHYA)
    path = saved(lora, tmp_path / "a.safetensors")
    for threads in (1, 8):
        blockmerge.convert_lora(
            path, output=tmp_path / f"{threads}.safetensors", to="diffusers", threads=threads
        )
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "8.safetensors").read_bytes()


def nan(lora):
    lora[f"{PLACE}.lora_up.weight"][3, 1] = math.nan
    return lora


BAD = {
    "nan": (lambda: nan(small()), "kohya", {}, NonFiniteError, "holds NaN or infinity"),
    "too large": (lambda: {n: t * 1e5 for n, t in small(dtype=torch.float32).items()}, "kohya", {"dtype": "fp16"},
                  NonFiniteError, "too large for F16"),
    "a form": (small, "ldm", {}, RecipeError, "'ldm' is not a form of LoRAs"),
    "a near form": (small, "diffuser", {}, RecipeError, "did you mean 'diffusers'"),
    "a dtype": (small, "kohya", {"dtype": "fp8_e4m3fn"}, RecipeError, "is not a dtype"),
    "unknown modules": (lambda: small() | small(place="lora_unet_strange"), "kohya", {}, CheckpointError,
                        r"1 module that Stable Diffusion 1\.x does not have \(lora_unet_strange\): .*bake --partial"),
    "a model": (lambda: small_model("sd1"), "kohya", {}, CheckpointError, "not a LoRA"),
    "twice": (lambda: small() | small(place=THERE), "kohya", {}, CheckpointError, "twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(case, tmp_path):
    make, to, how, error, said = BAD[case]
    path = saved(make(), tmp_path / "a.safetensors")
    with pytest.raises(error, match=said) as caught:
        blockmerge.convert_lora(path, output=tmp_path / "b.safetensors", to=to, **how)
    assert "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == [path]


def test_an_alpha_of_0_that_counts_is_not_made_one_that_is_taken_for_the_rank(tmp_path):
    """PEFT's 0 adds nothing, and a tensor of 0 is the rank."""
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {f"{THERE}.lora_A.weight": torch.ones(2, 1280), f"{THERE}.lora_B.weight": torch.ones(1280, 2)}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 0})})
    assert blockmerge.inspect_lora(path).norm == 0
    with pytest.raises(CheckpointError, match="alpha 0 in the settings of 1 module, which therefore add"):
        blockmerge.convert_lora(path, output=out, to="kohya")
    assert not out.exists()
    blockmerge.convert_lora(path, output=out, to="diffusers")
    assert blockmerge.inspect_lora(out).norm == 0


def test_the_input_is_spared(file, tmp_path):
    before = file.read_bytes()
    for output in (file, tmp_path / "." / "a.safetensors"):
        with pytest.raises(OutputError, match="is the input"):
            blockmerge.convert_lora(file, output=output, to="kohya", overwrite=True)
    with pytest.raises(CheckpointError, match="is a folder"):
        blockmerge.convert_lora(tmp_path, output=tmp_path / "b.safetensors", to="kohya")
    file.write_bytes(before[:-50])
    with pytest.raises(CheckpointError, match="cut short"):
        blockmerge.convert_lora(file, output=tmp_path / "b.safetensors", to="kohya")

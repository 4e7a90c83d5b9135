"""Which family an adapter is for; and files that are no adapters, or damaged ones: each refused in one line."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from blockmerge import CheckpointError, IncompatibleModelsError, RecipeError, UnknownFamilyError
from blockmerge.adapters import Adapter
from blockmerge.anatomy import FAMILIES
from blockmerge.checkpoints import open_source
from blockmerge.demo import demo_layout, make_state_dicts
from tests.adapter_names import ALL, modules
from tests.small_adapters import CONV, LINEAR, PLAIN, SHAPES, lora_of, narrow, opened, refused, tensors_of

TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
SUFFIXES = {
    "sdxl-peft": (".lora_A.weight", ".lora_B.weight"),
    "sd15-attn-procs": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


def made(family, program, rank=1):
    """A program's adapter, at its real widths."""
    found = {}
    for name, said in modules(family, program).items():
        down, up = SUFFIXES.get(program, (".lora_down.weight", ".lora_up.weight"))
        if name.endswith("_lora"):
            down, up = ".down.weight", ".up.weight"
        first, *rest = said.shape
        found[name + down] = torch.ones(rank, *rest, dtype=torch.float16)
        found[name + up] = torch.ones(first, rank, *(1 for _ in rest[1:]), dtype=torch.float16)
    return found


@pytest.mark.parametrize(("family", "program"), ALL, ids=lambda value: value)
def test_a_programs_adapter_is_of_its_family_alone(family, program):
    tensors, said = made(family, program), modules(family, program)
    adapter = opened(tensors)
    assert (adapter.family.name, adapter.unmet, adapter.embeddings, adapter.notes) == (family, (), (), ())
    assert adapter.kinds.keys() <= {"lora", "locon"}
    assert adapter.kinds.get("locon", 0) == sum(one.shape[2:] == (3, 3) for one in said.values())
    assert adapter.blocks == Counter(one.block for one in said.values())
    assert {one.name: one.target.ldm for one in adapter.modules} == {name: s.ldm for name, s in said.items()}
    for other in TITLES.keys() - {family}:
        line = refused(tensors, IncompatibleModelsError, family=other, shapes=None)
        assert line.startswith(f"x is a LoRA for {TITLES[family]}, not for {TITLES[other]}: ")
        assert ", expected " in line


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_model_with_other_widths_tells_its_own(family):
    """Those of thin models, which also lack text encoders here."""
    program = {"sd1": "sd15-kohya", "sd2": "sd21-kohya", "sdxl": "sdxl-kohya"}[family]
    thin = demo_layout(family)
    unet = {name: shape for name, shape in thin.items() if name.startswith("model.diffusion_model.")}
    tensors = {}
    for name, said in modules(family, program).items():
        shape = thin[said.ldm]
        rows = shape[0] if said.rows is None else shape[0] // 3
        tensors |= lora_of(name, rank=1, shape=(rows, *shape[1:]))
    adapter = opened(tensors, family=family, shapes=thin)
    assert (len(adapter.modules), adapter.unmet, adapter.notes) == (len(tensors) // 2, (), ())
    assert len(opened(tensors, family=family, shapes=unet).modules) == len(adapter.modules)
    # Without such a model its names tell the family, and a note says so.
    alone = opened(tensors)
    assert alone.family.name == family
    assert alone.notes == (f"the widths of x are not those of {TITLES[family]}, whose modules it has",)
    with pytest.raises(IncompatibleModelsError, match=f"is for a {TITLES[family]} model of other widths"):
        opened(made(family, program), family=family, shapes=thin)


def test_what_fits_several_families_is_told_by_the_metadata_or_taken_for_the_first():
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = lora_of(name, shape=(1280, 1280))
    # 1×1 convolutions and matrices differ in their axes.
    proj = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 1280, 1, 1)}
    proj["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = torch.ones(1280, 2, 1, 1)
    flat = {name: tensor[..., 0, 0] for name, tensor in proj.items()}
    assert opened(tensors).family.name == "sd1"
    assert opened(tensors).notes == (
        "x fits Stable Diffusion 2.x and Stable Diffusion XL as well: it is taken for Stable Diffusion 1.x",
    )
    for family, metadata in {
        "sd1": {"ss_base_model_version": "sd_v1"},
        "sd2": {"ss_base_model_version": "sd_v2_v"},
        "sdxl": {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    }.items():
        assert opened(tensors, metadata).family.name == family
    assert opened(tensors | proj).family.name == "sd1"
    assert opened(tensors | flat).family.name == "sd2"
    for family in TITLES:
        assert opened(tensors | flat, family=family).notes == ()


def test_a_text_encoder_that_families_share_fits_both():
    tensors = lora_of("lora_te1_text_model_encoder_layers_0_mlp_fc1", shape=(3072, 768))
    assert opened(tensors).family.name == "sd1"
    assert [opened(tensors, family=one).family.name for one in ("sd1", "sdxl")] == ["sd1", "sdxl"]
    with pytest.raises(IncompatibleModelsError, match="expected 4096 rows"):
        opened(tensors, family="sd2")


def test_one_module_that_does_not_fit_is_named():
    tensors = made("sd1", "sd15-kohya")
    tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = torch.ones(1288, 1)
    for error, family in ((UnknownFamilyError, None), (IncompatibleModelsError, "sd1")):
        line = refused(tensors, error, family=family, shapes=None)
        assert (
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight is [1288, 1], expected 1280 rows" in line
        )


DEEP = "lora_unet_input_blocks_7_1_transformer_blocks_{}_attn1_to_q"
"""A layer that SDXL has ten of, and the others one."""


def deep(numbers, shape):
    return {key: one for n in numbers for key, one in lora_of(DEEP.format(n), shape=shape).items()}


def test_a_family_that_knows_only_some_of_the_modules_is_not_the_one():
    """The first layer alone would fit SD1, which has none of the others."""
    first = deep([0], (1280, 1280))
    assert opened(first | deep(range(1, 10), (1280, 1280))).family.name == "sdxl"
    line = refused(first | deep(range(1, 10), (64, 48)), UnknownFamilyError, family=None, shapes=None)
    assert line == (
        "x has the module names of Stable Diffusion XL, and does not fit it: "
        f"{DEEP.format(1)}.lora_up.weight is [64, 2], expected 1280 rows; 8 other modules do not fit either"
    )
    others = deep(range(10), (64, 48))
    assert opened(others).family.name == "sdxl"
    line = refused(others, IncompatibleModelsError, family="sd1", shapes=None)
    lacking = ", ".join(map(DEEP.format, (1, 2, 3)))
    assert line == (
        "x is a LoRA for Stable Diffusion XL, not for Stable Diffusion 1.x: "
        f"that lacks 9 of its modules ({lacking} and 6 more)"
    )
    line = refused(others, IncompatibleModelsError, family="sd1", shapes=demo_layout("sd1"))
    assert line.startswith(
        "x has the module names of Stable Diffusion XL, and is not for this Stable Diffusion 1.x"
    )


def of_convolution(*kernel, channels=8, mid=None):
    parts = {"lora_up.weight": (8, 2, 1, 1), "lora_down.weight": (2, channels, *kernel)}
    return tensors_of(CONV, parts | ({} if mid is None else {"lora_mid.weight": (2, 2, *mid)}))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (of_convolution(1, 1), "lora_down.weight is [2, 8, 1, 1], expected a kernel of 3×3"),
        (of_convolution(5, 5, channels=9), "lora_down.weight is [2, 9, 5, 5], expected a kernel of 3×3"),
        (of_convolution(1, 1, mid=(5, 5)), "lora_mid.weight is [2, 2, 5, 5], expected a kernel of 3×3"),
        (lora_of(LINEAR, shape=(8, 6, 3, 3)), "lora_down.weight is [2, 6, 3, 3], expected no kernel"),
    ],
)
def test_whatever_the_widths_a_kernel_is_the_layers(tensors, said):
    line = refused(tensors, UnknownFamilyError, family=None, shapes=None)
    assert line.startswith("x has the module names of Stable Diffusion 1.x, and does not fit it: ")
    assert said in line


def test_a_kernel_of_both_factors_is_refused():
    line = refused(of_convolution(3, 3, mid=(3, 3)), family=None, shapes=None)
    assert f"{CONV}.lora_down.weight is [2, 8, 3, 3], expected no kernel" in line


def test_a_lora_of_no_known_family_says_what_it_has():
    tensors = lora_of("transformer.single_transformer_blocks.0.attn.to_q", shape=(8, 8))
    line = refused(tensors, UnknownFamilyError, family=None, shapes=None)
    assert line == (
        "x is a LoRA for a model whose LoRAs are not read yet: its modules are called "
        "transformer.single_transformer_blocks.0.attn.to_q"
    )
    with pytest.raises(IncompatibleModelsError, match=r"has no module that Stable Diffusion 1\.x has"):
        opened(tensors, family="sd1")


def test_modules_that_no_table_knows_are_listed():
    adapter = narrow(lora_of(LINEAR) | lora_of("lora_unet_something_new"))
    assert adapter.unmet == ("lora_unet_something_new",)
    assert [one.target is None for one in adapter.modules] == [False, True]


def test_an_unknown_family_is_refused():
    with pytest.raises(RecipeError, match=f"unknown family 'sd9': {', '.join(FAMILIES)}"):
        opened(lora_of(LINEAR), family="sd9")


def test_embeddings_that_travel_along_are_set_aside_and_listed():
    tensors = lora_of(LINEAR) | {"bundle_emb.sks.string_to_param.*": torch.ones(2, 768)}
    adapter = narrow(tensors)
    assert adapter.embeddings == ("bundle_emb.sks.string_to_param.*",)
    assert adapter.notes == (
        "x brings 1 tensor of embeddings along, which are left aside (bundle_emb.sks.string_to_param.*)",
    )


# -- not an adapter ------------------------------------------------------------------------------------------

OTHERS = {
    "a model": (lambda: make_state_dicts("sd1")[0], "is a model (a checkpoint), not a LoRA"),
    "a U-Net": (lambda: {"conv_in.weight": torch.ones(8, 4, 3, 3), "down_blocks.0.x.weight": torch.ones(2)}, "is a model"),
    "a VAE": (lambda: {"decoder.conv_in.weight": torch.ones(2), "encoder.conv_in.weight": torch.ones(2)}, "is a VAE alone, not a LoRA"),
    "an embedding": (lambda: {"emb_params": torch.ones(8, 768)}, "is a textual inversion (an embedding), not a LoRA"),
    "a text encoder": (lambda: {"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2)}, "is a text encoder alone, not a LoRA"),
    "nothing": (dict, "is not a LoRA: it holds none of their tensors (it has no tensor at all)"),
    "something": (lambda: {"abc": torch.ones(2)}, "is not a LoRA: it holds none of their tensors (it has abc)"),
    "embeddings": (lambda: {"bundle_emb.x.clip_l": torch.ones(2)}, "is not a LoRA: it holds none"),
    "a Control-LoRA": (
        lambda: {"lora_controlnet": torch.ones(0), "input_blocks.0.0.weight": torch.ones(2), "out.2.up": torch.ones(2), "time_embed.0.down": torch.ones(2)},
        "is a",
    ),
    "an IP-Adapter": (lambda: {"image_proj.proj.weight": torch.ones(2), "ip_adapter.1.to_k_ip.weight": torch.ones(2)}, "is an IP-Adapter, not a LoRA"),
    "cloneofsimo's": (lambda: {"unet:0:up": torch.ones(2), "unet:0:down": torch.ones(2)}, "is a LoRA (cloneofsimo's names), which is not read: LoRA, LoCon"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_lora_is_called_what_it_is(kind):
    make, said = OTHERS[kind]
    assert refused(make()).startswith(f"x {said}")


def test_what_else_is_in_the_file_is_refused_by_name():
    line = refused(lora_of(LINEAR) | {"lora_unet_a.surprise": torch.ones(2)})
    assert line == (
        "x holds 1 tensor that no LoRA has (lora_unet_a.surprise): LoRA, LoCon, LoHa, LoKr, full, norm, DoRA, "
        "GLoRA, IA3, OFT and BOFT are read"
    )
    line = refused(lora_of(LINEAR) | make_state_dicts("sd1")[0])
    assert line.startswith("x is a model (a checkpoint) and holds 11")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("set_weight", "is a weight in place of the model's (ComfyUI), which is not read"),
        ("scale", "is a scale in place of alpha, which is not read"),
        ("oft_R.weight", "is OFT on the input side (OneTrainer, PEFT), which is not read"),
        ("bias_indices", "is a sparse bias (LyCORIS' extraction), which is not read"),
        ("bm.weight", "is GLoRA with a kernel of its own, which is not read"),
        ("hada_w1_a", "do not belong together: they are of different kinds"),
        ("diff", "do not belong together: they are of different kinds"),
    ],
)
def test_parts_that_are_not_read_are_named(part, said):
    line = refused(lora_of(LINEAR) | {f"{LINEAR}.{part}": torch.ones(2)})
    assert line.startswith("x cannot be read as a LoRA: 1 module of 1 cannot be used: ")
    assert f"{LINEAR}.{part}" in line
    assert said in line
    assert ("lora extract" in line) == ("is not read" in line)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{LINEAR}.lora_down.weight": torch.ones(2, 6)}, f"{LINEAR}.lora_down.weight without up"),
        ({f"{LINEAR}.lora_up.weight": torch.ones(8, 2)}, f"{LINEAR}.lora_up.weight without down"),
        ({f"{LINEAR}.alpha": torch.ones(())}, f"{LINEAR}.alpha without anything that it belongs to"),
        ({f"{LINEAR}.hada_w1_a": torch.ones(8, 2)}, "without hada_w1_b and hada_w2_a and hada_w2_b"),
        (lora_of(LINEAR, rank=0), f"{LINEAR}.lora_down.weight is [0, 6]: rank 0, which changes nothing"),
        (lora_of(LINEAR, shape=(0, 6)), f"{LINEAR}.lora_up.weight is [0, 2]: it is empty"),
        (lora_of(LINEAR, dtype=torch.int8), f"{LINEAR}.lora_down.weight is I8, expected floats"),
        (lora_of(LINEAR, dtype=torch.complex64), f"{LINEAR}.lora_down.weight is C64, expected floats"),
        (
            tensors_of(LINEAR, {"lora_down.weight": (2, 6), "lora_up.weight": (8, 3)}),
            f"{LINEAR}.lora_down.weight is [2, 6], which does not go with {LINEAR}.lora_up.weight is [8, 3]",
        ),
        (tensors_of(LINEAR, {"lora_down.weight": (6,), "lora_up.weight": (8, 3)}), "is [6], expected 2 axes"),
        (
            tensors_of(CONV, {"oft_blocks": (3, 2, 4, 4)}),
            f"{CONV}.oft_blocks is [3, 2, 4, 4]: 2 blocks of 4 rows cannot be shuffled in 3 stages",
        ),
    ],
)  # fmt: skip
def test_modules_whose_parts_do_not_belong_together_are_refused(tensors, said):
    assert said in refused(tensors)


def test_a_bias_where_the_layer_has_none_does_not_fit():
    tensors = lora_of(PLAIN) | {f"{PLAIN}.diff_b": torch.ones(8)}
    line = refused(tensors, IncompatibleModelsError)
    assert line.endswith(f"{PLAIN}.diff_b is there, expected none: that layer has no bias")


@pytest.mark.parametrize(
    "other",
    [
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0",
        "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
    ],
)
def test_a_module_under_two_names_is_refused(other):
    line = refused(lora_of(LINEAR) | lora_of(other))
    assert line == (
        f"x has 1 module twice, under two names ({LINEAR} and {other}): nothing says which counts; "
        "save it again with one of each"
    )


def test_a_tensor_under_two_names_is_refused():
    line = refused(lora_of(LINEAR) | {f"{LINEAR}.lora_A.weight": torch.ones(2, 6)})
    assert line == (
        f"x holds 1 tensor of modules a second time, under other names ({LINEAR}.lora_A.weight): "
        "nothing says which counts; save it again with one of each"
    )


def test_many_faults_are_counted_and_the_first_named():
    tensors = {}
    for number in range(40):
        tensors[f"lora_unet_module_{number:02}.lora_down.weight"] = torch.ones(2, 6)
    line = refused(tensors)
    assert "40 modules of 40 cannot be used: lora_unet_module_00." in line
    assert line.endswith(
        "lora_unet_module_01.lora_down.weight without up and 38 more; download it again, or save it without them"
    )
    assert len(line) < 400


def test_names_that_a_terminal_would_obey_are_escaped():
    line = refused({"lora_\x1b[2J.lora_down.weight": torch.ones(2, 6)})
    assert "\x1b" not in line


# -- files ---------------------------------------------------------------------------------------------------


def test_files_are_read_and_named(tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(lora_of(LINEAR, alpha=1.0), path)
    adapter = Adapter.of(open_source(path), "sd1", shapes=SHAPES)
    assert (adapter.name, adapter.modules[0].factor) == ("style.safetensors", 0.5)
    assert adapter.modules[0].parts["up"].source is adapter.source
    assert Adapter.of(open_source(path), "sd1", "the style", shapes=SHAPES).name == "the style"
    torch.save(lora_of(LINEAR, alpha=1.0), tmp_path / "style.pt")
    adapter = Adapter.of(open_source(tmp_path / "style.pt"), "sd1", shapes=SHAPES)
    assert (adapter.name, adapter.modules[0].factor) == ("style.pt", 0.5)


def test_a_download_that_broke_off_is_refused(tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(lora_of(LINEAR, rank=20_000), path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"style\.safetensors"):
        open_source(path)
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(CheckpointError, match=r"style\.safetensors is broken off"):
        Adapter.of(open_source(path), "sd1", shapes=SHAPES)

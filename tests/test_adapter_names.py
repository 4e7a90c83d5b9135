"""Which tensor a module of an adapter means, in whatever spelling: against names written down from the programs
that make them (`adapter_names.py`), and against the rules by which the others spell the same.
"""

from __future__ import annotations

import pytest

from blockmerge.adapters import targets_of
from blockmerge.adapters.parts import SUFFIXES, part_of
from blockmerge.adapters.targets import spellings_of
from blockmerge.anatomy import FAMILIES, Family
from tests import toy_family
from tests.adapter_names import ALL, modules

UNET = "model.diffusion_model."
TEXT = {  # component as diffusers calls it: (kohya's, ComfyUI's and OMI's name of it)
    ("sd1", "text_encoder"): (("lora_te_", "lora_te1_"), "clip_l"),
    ("sd2", "text_encoder"): (("lora_te_", "lora_te1_"), "clip_h"),
    ("sdxl", "text_encoder"): (("lora_te1_",), "clip_l"),
    ("sdxl", "text_encoder_2"): (("lora_te2_",), "clip_g"),
    ("sdxl_refiner", "text_encoder_2"): (("lora_te_", "lora_te2_"), "clip_g"),
}


@pytest.mark.parametrize(("family", "program"), ALL, ids=lambda value: value)
def test_every_module_means_the_tensor_rows_and_block_that_it_should(family, program):
    own = FAMILIES[family]
    targets = targets_of(own)
    met = set()
    for name, said in modules(family, program).items():
        target = targets[name]
        assert (target.ldm, target.block, target.shape) == (said.ldm, said.block, said.shape), name
        assert (target.bias and target.bias.ldm) == said.bias, name
        assert rows_of(target, own) == said.rows, name
        met.add((target.ldm, target.place))
    assert len(met) == len(modules(family, program))


def rows_of(target, family):
    """(first, last + 1) of the rows that a target is of its tensor; None for all."""
    if target.place is None:
        return None
    origin = family.relation_of(target.ldm).origins_in_diffusers(target.ldm)[target.place]
    (rows,) = origin.rows
    count = family.layout[target.ldm][0] // rows.of
    return rows.start * count, rows.stop * count


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_no_two_meanings_collide(family):
    found = {}
    for name, target in spellings_of(FAMILIES[family]):
        assert found.setdefault(name, target) == target, name
    assert found == targets_of(FAMILIES[family])


def unet_spellings(diffusers, ldm):
    """All that is written for a U-Net's module, by its diffusers and LDM names with dots."""
    for name in (diffusers, ldm):
        yield from (prefix + name for prefix in ("", "unet.", "diffusion_model.", "base_model.model."))
        yield "unet.base_model.model." + name
        yield from (prefix + name.replace(".", "_") for prefix in ("lora_unet_", "lycoris_", "oft_unet_"))
    if ".attn" in diffusers:
        for prefix in ("", "unet."):
            processor = prefix + diffusers.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
            yield processor + "_lora"
            yield processor


def text_spellings(name, component, underscored, clip):
    """The same of a text encoder's module, by its name in transformers, which begins with text_model."""
    for inner in (name, name.removeprefix("text_model.")):
        for prefix in (f"{component}.", f"{component}.base_model.model.", f"{clip}."):
            yield prefix + inner
        yield f"text_encoders.{clip}.transformer.{inner}"
        yield from (prefix + inner.replace(".", "_") for prefix in underscored)
    if "self_attn" in name:
        for which in ("q", "k", "v", "out"):
            if name.endswith(f"{which}_proj"):
                yield f"{component}.{name.removesuffix(f'{which}_proj')}to_{which}_lora"


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.adapters])
def test_all_spellings_of_a_place_have_one_target(family):
    own = FAMILIES[family]
    targets = targets_of(own)
    for ldm, listed in own.listed.items():
        if listed.component == "vae":
            continue
        for place in own.relation_of(ldm).diffusers:
            component, _, name = place.removesuffix(".weight").partition("/")
            if not place.endswith(".weight"):
                continue
            if component == "unet":
                spellings = list(unet_spellings(name, ldm.removeprefix(UNET).removesuffix(".weight")))
            else:
                spellings = list(text_spellings(name, component, *TEXT[family, component]))
            found = [targets[one] for one in spellings]
            assert found == found[:1] * len(found), place
            assert found[0].ldm == ldm


@pytest.mark.parametrize(("family", "count"), [("sd1", 881), ("sd2", 969), ("sdxl", 2459)])
def test_kohyas_two_spellings_have_as_many_names_as_were_counted(family, count):
    """All layers with a weight, of the U-Net under both names, of text encoders under transformers' alone."""
    names = targets_of(FAMILIES[family])
    unet = [name for name in names if name.startswith("lora_unet_")]
    text = [
        name
        for name in names
        if name.startswith(("lora_te1_", "lora_te2_")) and ("_text_model_" in name or "_text_proj" in name)
    ]
    assert len(unet) + len(text) == count


def test_what_is_no_module_is_not_in_the_table():
    for family in FAMILIES.values():
        targets = targets_of(family)
        for name in (
            "lora_te_text_model_encoder_layers_99_mlp_fc1",
            "lora_unet_input_blocks_99_0_in_layers_2",
            "first_stage_model.encoder.conv_in",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_processor_to_q_lora",
            "",
        ):
            assert name not in targets


def test_parts_that_lie_otherwise_have_the_shape_and_place_of_the_module():
    targets = targets_of(FAMILIES["sdxl"])
    projection = targets["lora_te2_text_projection"]
    assert projection.place == "text_encoder_2/text_projection.weight"
    assert projection.ldm == "conditioner.embedders.1.model.text_projection"
    assert (projection.shape, projection.bias) == ((1280, 1280), None)
    value = targets["text_encoder_2.text_model.encoder.layers.31.self_attn.v_proj"]
    assert value.bias is not None
    assert value.bias.place == "text_encoder_2/text_model.encoder.layers.31.self_attn.v_proj.bias"
    sizes = {value.ldm: (120, 40), projection.ldm: (40, 24)}
    assert value.shape_in(FAMILIES["sdxl"], sizes) == (40, 40)
    assert projection.shape_in(FAMILIES["sdxl"], sizes) == (24, 40)
    assert targets["lora_unet_out_2"].shape_in(FAMILIES["sdxl"], sizes) is None


def test_a_family_in_a_folder_of_its_own_has_its_table(tmp_path):
    folder = toy_family.write(tmp_path)
    description = (folder / "family.toml").read_text()
    (folder / "family.toml").write_text(
        description + '\n[adapters.names.unet]\nunderscored = ["lora_toy_"]\ndotted = ["toy."]\n'
    )
    toy = Family.read(folder)
    targets = targets_of(toy)
    key = targets["lora_toy_blocks_1_attn_to_k"]
    assert key == targets["toy.blocks.1.attn.to_k"]
    assert (key.shape, key.block, key.place) == ((8, 16), "L01", "unet/blocks.1.attn.to_k.weight")
    assert (key.bias.ldm, key.bias.place) == (
        "model.diffusion_model.layers.1.qkv.bias",
        "unet/blocks.1.attn.to_k.bias",
    )
    # Rows that change places are not the tensor as it stands, which LDM's name of it is.
    swapped, whole = targets["toy.norm_out.linear"], targets["toy.final.modulation"]
    assert swapped.place == "unet/norm_out.linear.weight"
    assert (whole.place, whole.ldm) == (None, swapped.ldm)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_a_b.lora_down.weight", ("lora_unet_a_b", "down")),
        ("unet.a.b.lora_A.weight", ("unet.a.b", "down")),
        ("unet.a.b.lora_A.default.weight", ("unet.a.b", "down")),
        ("unet.a.b.lora_B.default_0.weight", ("unet.a.b", "up")),
        ("unet.a.b.lora_B.bias", ("unet.a.b", "up_bias")),
        ("unet.a.b.lora.up.weight", ("unet.a.b", "up")),
        ("a.q_proj.lora_linear_layer.down.weight", ("a.q_proj", "down")),
        ("a.processor.to_q_lora.down.weight", ("a.processor.to_q_lora", "down")),
        ("a.lora_magnitude_vector", ("a", "magnitude")),
        ("a.lora_magnitude_vector.default.weight", ("a", "magnitude")),
        ("a.b.hada_t2", ("a.b", "hada_t2")),
        ("a.b.bm.weight", ("a.b", "bm")),
        ("a.b.weight", ("a.b", "ia3_weight")),
        ("a.oft_R.weight", ("a", "oft_R")),
        ("lora_down.weight", ("lora_down", "ia3_weight")),
        ("alpha", None),
        ("a.bias", None),
        ("", None),
        ("...", None),
    ],
)
def test_a_tensor_is_a_part_of_a_module(name, said):
    assert part_of(name) == said


def test_every_suffix_is_found():
    for suffix, part in SUFFIXES.items():
        assert part_of(f"some.module.{suffix.replace('*', 'default')}") == ("some.module", part)

"""Families, components and blocks, held against the facts about real files and diffusers' own converter."""

from __future__ import annotations

import pytest
import torch

from blockmerge import RecipeError, UnknownFamilyError, block_of
from blockmerge.anatomy import FAMILIES, component_of, identify, layout, plain_names_of_ema
from blockmerge.demo import demo_layout
from tests import oracle

# block: (SD1.5 tensors, parameters, SD2.1 tensors, parameters, SDXL tensors, parameters), from complete real
# files
TABLE = """
text 197 123060557 294 354032641 587 817720398
VAE 248 83653863 248 83653863 248 83653863
IN00 6 2062400 6 2062400 10 7307840
IN01 36 4801280 36 4965120 10 2255040
IN02 36 4801280 36 4965120 10 2255040
IN03 2 921920 2 921920 2 921920
IN04 38 15746560 38 16074240 58 27390080
IN05 36 17384960 36 17712640 56 29028480
IN06 2 3687040 2 3687040 2 3687040
IN07 38 59345920 38 60001280 218 375425280
IN08 36 65899520 36 66554880 216 381978880
IN09 2 14746880 2 14746880 - -
IN10 10 31138560 10 31138560 - -
IN11 10 31138560 10 31138560 - -
M00 46 97038080 46 97693440 226 413117440
OUT00 12 49164800 12 49164800 218 400005120
OUT01 12 49164800 12 49164800 218 400005120
OUT02 14 63911680 14 63911680 220 406558720
OUT03 38 83925760 38 84581120 58 37633280
OUT04 38 83925760 38 84581120 58 33536000
OUT05 40 90479360 40 91134720 60 35174400
OUT06 38 25989760 38 26317440 12 4407040
OUT07 38 21892480 38 22220160 12 3382400
OUT08 40 23530880 40 23858560 16 3394564
OUT09 38 6953280 38 7117120 - -
OUT10 38 5928640 38 6092480 - -
OUT11 42 5940804 42 6104644 - -
"""


@pytest.mark.parametrize(
    ("family", "column", "count"), [("sd1", 1, 1131), ("sd2", 3, 1228), ("sdxl", 5, 2515)]
)
def test_every_name_has_one_block_and_the_blocks_have_the_known_sizes(family, column, count):
    shapes = layout(family)
    assert len(shapes) == count
    found: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        component, block = component_of(name), block_of(name, family)
        assert (block == "BASE") == (component != "unet")
        row = found.setdefault({"vae": "VAE", "unet": block}.get(component, "text"), [0, 0])
        row[0] += 1
        row[1] += torch.Size(shape).numel()
    wanted = {}
    for line in TABLE.strip().splitlines():
        words = line.split()
        if words[column] != "-":
            wanted[words[0]] = [int(words[column]), int(words[column + 1])]
    assert found == wanted


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_blocks_agree_with_the_table_written_as_string_surgery(family):
    for name in layout(family):
        assert block_of(name, family) == oracle.block(name, family)
        if component_of(name) == "unet":
            assert block_of(name.removeprefix("model.diffusion_model."), family) == block_of(name, family)


@pytest.mark.parametrize(
    ("name", "family", "block"),
    [
        ("model.diffusion_model.input_blocks.4.1.proj_in.weight", None, "IN04"),
        ("model.diffusion_model.input_blocks.1.0.in_layers.0.bias", "sd1", "IN01"),
        ("model.diffusion_model.input_blocks.10.0.in_layers.0.bias", "sd1", "IN10"),
        ("input_blocks.11.0.in_layers.0.bias", "sd2", "IN11"),
        ("model.diffusion_model.time_embed.0.weight", "sd1", "IN00"),
        ("model.diffusion_model.label_emb.0.0.weight", "sdxl", "IN00"),
        ("model.diffusion_model.out.2.bias", None, "OUT11"),
        ("model.diffusion_model.out.2.bias", "sdxl", "OUT08"),
        ("conv_out.bias", "sdxl", "OUT08"),
        ("first_stage_model.decoder.conv_in.weight", None, "BASE"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", None, "BASE"),
        ("something.else", None, "BASE"),
    ],
)
def test_block_of(name, family, block):
    assert block_of(name, family) == block


def test_block_of_refuses_what_a_family_does_not_have():
    with pytest.raises(RecipeError, match="IN11, which sdxl does not have"):
        block_of("model.diffusion_model.input_blocks.11.0.weight", "sdxl")
    with pytest.raises(RecipeError, match="unknown family 'sd4'"):
        block_of("x", "sd4")


@pytest.mark.parametrize("name", [3, None, ["model.diffusion_model.out.0.bias"], b"x"])
def test_block_of_takes_names_alone(name):
    with pytest.raises(RecipeError, match=f"^a tensor's name is a text; {type(name).__name__} given$"):
        block_of(name)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
@pytest.mark.parametrize("full_size", [False, True])
def test_families_are_told_from_names_and_shapes(family, full_size):
    shapes = demo_layout(family, full_size=full_size)
    unet = {name: shape for name, shape in shapes.items() if component_of(name) == "unet"}
    bare = {name.removeprefix("model.diffusion_model."): shape for name, shape in unet.items()}
    for part in (shapes, unet, bare):
        anatomy = identify(part)
        assert (anatomy.family.name, anatomy.variant, anatomy.naming) == (family, "base", "ldm")


@pytest.mark.parametrize(
    ("family", "channels", "variant"),
    [("sd1", 9, "inpainting"), ("sd1", 8, "pix2pix"), ("sd2", 5, "depth"), ("sdxl", 9, "inpainting")],
)
def test_variants_are_told_from_the_first_convolution(family, channels, variant):
    shapes = {**demo_layout(family), "model.diffusion_model.input_blocks.0.0.weight": (8, channels, 3, 3)}
    assert identify(shapes).variant == variant


def test_what_is_no_known_unet_is_refused_with_a_reason():
    with pytest.raises(UnknownFamilyError, match="no diffusion model"):
        identify({"bert.embeddings.weight": (512, 4)})
    with pytest.raises(UnknownFamilyError, match="is a VAE alone, 1 tensor in ldm names"):
        identify({"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)})
    with pytest.raises(UnknownFamilyError, match="highest input block is 0"):
        identify({"input_blocks.0.0.weight": (320, 4, 3, 3)})
    shapes = {**demo_layout("sd1"), "model.diffusion_model.input_blocks.0.0.weight": (8, 7, 3, 3)}
    with pytest.raises(UnknownFamilyError, match=r"shape \[8, 7, 3, 3\]"):
        identify(shapes)
    with pytest.raises(UnknownFamilyError, match="OUT99, which sd1 does not have"):
        identify({**demo_layout("sd1"), "model.diffusion_model.output_blocks.99.0.x": (1,)})


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_names_are_in_the_same_blocks(family):
    """diffusers' own converter says which diffusers name is which LDM name."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from tests.thin_unet import config

    shapes = {name: shape for name, shape in demo_layout(family).items() if component_of(name) == "unet"}
    numbered = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(shapes.items())}
    names = list(numbered)
    converted = convert_ldm_unet_checkpoint(dict(numbered), config=config(family))
    assert len(converted) == len(numbered)
    for name, tensor in converted.items():
        assert block_of(name, family) == block_of(names[int(tensor.flatten()[0])], family), name
        assert component_of(name) == "unet"
    assert identify({name: tuple(tensor.shape) for name, tensor in converted.items()}).family.name == family


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_ema_names_lead_back_to_plain_ones(family):
    unet = [name for name in layout(family) if component_of(name) == "unet"]
    ema = {
        "model_ema."
        + name.removeprefix("model.").replace("diffusion_model.", "diffusion_model").replace(".", ""): name
        for name in unet
    }
    assert len(ema) == len(unet)
    assert plain_names_of_ema([*ema, "model_ema.decay", "model_ema.num_updates"]) == ema
    assert plain_names_of_ema(layout(family)) == {}
    assert "model_ema.diffusion_modelinput_blocks00weight" in ema


def test_block_orders():
    assert ",".join(FAMILIES["sd1"].blocks) == ",".join(oracle.SD)
    assert ",".join(FAMILIES["sdxl"].blocks) == ",".join(oracle.SDXL)

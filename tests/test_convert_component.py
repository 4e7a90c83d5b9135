"""`convert` of one component: of a file that holds nothing else, and out of a whole model with ``--only``.

What is written is loaded by diffusers and transformers.
"""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import component_of
from blockmerge.demo import make_state_dicts
from tests.commands import ok
from tests.effort import in_turn
from tests.forms import write
from tests.oracle import bits
from tests.other_names import in_diffusers
from tests.refusals import assert_refused
from tests.thin_transformers import THIN

PREFIXES = {
    ("sd1", "vae"): "first_stage_model.",
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "vae"): "first_stage_model.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
}
CLASSES = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
}


@pytest.fixture(scope="module")
def whole():
    """A function that gives whole thin models as dicts, in LDM names."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = {name: one.half() for name, one in make_state_dicts(family)[0].items()}
        return made[family]

    return of


def part_of(model, component):
    return {name: tensor for name, tensor in model.items() if component_of(name) == component}


def bare(model, family, component):
    """A component in LDM names as it is published alone: without prefix."""
    prefix = PREFIXES[family, component]
    return {name.removeprefix(prefix): one for name, one in part_of(model, component).items()}


def in_folder(model, family, component):
    """A component under diffusers' names, by the tests' own tables."""
    return {
        name.removeprefix(f"{component}/"): tensor
        for name, tensor in in_diffusers(model, family).items()
        if name.startswith(f"{component}/")
    }


def same(found, expected):
    """Whether both hold the same bits, position numbers apart, which become whole numbers again."""
    found, expected = (
        {name: one for name, one in each.items() if "position_ids" not in name} for each in (found, expected)
    )
    return found.keys() == expected.keys() and all(
        torch.equal(bits(found[name]), bits(one)) for name, one in expected.items()
    )


@pytest.mark.parametrize(("of", "form"), in_turn(PREFIXES, ["safetensors", "folder", "zip", "folder"]))
def test_only_takes_one_component_out(here, capsys, whole, of, form):
    family, component = of
    model = whole(family)
    path = write(model, here / "model", form, family)
    ok(capsys, "convert", path, "ldm.safetensors", "--only", component, "--to", "ldm")
    if form != "folder" or component == "vae":  # a folder lacks some of OpenCLIP's tensors
        assert same(load_file("ldm.safetensors"), bare(model, family, component))
    ok(capsys, "convert", path, "alone", "--only", component, "--to", "diffusers")
    (file,) = (here / "alone").glob("*.safetensors")
    assert same(load_file(file), in_folder(model, family, component))
    assert (here / "alone" / "config.json").is_file()


@pytest.mark.parametrize(
    ("family", "component"),
    [("sdxl", "text_encoder_2"), *((f, c) for f in ("sd1", "sd2", "sdxl") for c in list(CLASSES)[:3])],
)
def test_diffusers_loads_the_folder_of_one_component(here, whole, family, component):
    save_file(whole(family), "model.safetensors")
    blockmerge.convert("model.safetensors", "alone", only=component, naming="diffusers", dtype="fp32")
    loaded, told = CLASSES[component].from_pretrained("alone", output_loading_info=True)
    assert {what: list(names) for what, names in told.items() if names} == {}
    wanted = in_folder(whole(family), family, component)
    state = loaded.state_dict()
    prefix = "" if any(name.startswith("text_model.") for name in state) else "text_model."
    for name, tensor in wanted.items():
        if "position_ids" not in name:
            assert torch.equal(state[name.removeprefix(prefix)], tensor.float()), name


def test_diffusers_loads_a_vae_that_is_a_single_file(here, whole):
    save_file(whole("sd1"), "model.safetensors")
    blockmerge.convert("model.safetensors", "vae.safetensors", only="vae", dtype="fp32")
    blockmerge.convert("vae.safetensors", "vae", naming="diffusers")
    loaded = diffusers.AutoencoderKL.from_single_file(
        "vae.safetensors", config="vae", local_files_only=True, torch_dtype=torch.float32
    )
    wanted = diffusers.AutoencoderKL.from_pretrained("vae").state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    image = torch.rand(1, 3, 16, 16)
    assert torch.isfinite(loaded.encode(image).latent_dist.mean).all()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_loads_a_unet_that_is_a_single_file(here, whole, family):
    save_file(whole(family), "model.safetensors")
    blockmerge.convert("model.safetensors", "unet.safetensors", only="unet", dtype="fp32")
    blockmerge.convert("unet.safetensors", "unet", only="transformer", naming="diffusers")
    assert same(
        load_file("unet.safetensors"), {n: t.float() for n, t in part_of(whole(family), "unet").items()}
    )
    loaded = diffusers.UNet2DConditionModel.from_single_file(
        "unet.safetensors", config="unet", local_files_only=True, torch_dtype=torch.float32
    )
    wanted = diffusers.UNet2DConditionModel.from_pretrained("unet").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("family", "component"),
    [("sd1", "vae"), ("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder_2")],
)
def test_a_component_alone_goes_there_and_back(here, capsys, whole, family, component):
    """LDM names → its folder → another folder in fp32 → a file in LDM names: the same values."""
    own = bare(whole(family), family, component)
    save_file(own, "lone.safetensors", {"format": "pt"})
    ok(capsys, "convert", "lone.safetensors", "again.safetensors")
    ok(capsys, "convert", "lone.safetensors", "one", "--to", "diffusers")
    ok(capsys, "convert", "one", "two", "--dtype", "fp32")
    ok(capsys, "convert", "two", "back.safetensors", "--to", "ldm", "--dtype", "fp16")
    assert same(load_file("again.safetensors"), own)
    found = load_file("back.safetensors")
    assert same(found, {name: own[name] for name in found})
    if component == "vae" or family == "sd1":
        assert found.keys() == own.keys()
    (file,) = (here / "two").glob("*.safetensors")
    assert {t.dtype for n, t in load_file(file).items() if "position" not in n or "weight" in n} == {
        torch.float32
    }
    assert json.loads((here / "one/config.json").read_text()) == json.loads(
        (here / "two/config.json").read_text()
    )


def test_a_vae_file_with_prefix_or_leftovers(here, capsys, whole):
    own = part_of(whole("sd1"), "vae")
    save_file({**own, "loss.logvar": torch.zeros(1)}, "lone.safetensors")
    said = ok(capsys, "convert", "lone.safetensors", "out.safetensors", "--dtype", "fp16")
    assert "loss.logvar" in said
    assert same(load_file("out.safetensors"), bare(own, "sd1", "vae"))


def test_a_config_that_fits_several_families_is_said_and_can_be_given(here, capsys, whole):
    """The SDXL VAE has the tensors of SD1's, and another scaling factor."""
    xl = write(whole("sdxl"), here / "xl", "safetensors", "sdxl")
    ok(capsys, "convert", xl, "folder", "--to", "diffusers")
    ok(capsys, "convert", xl, "vae.safetensors", "--only", "vae")
    said = ok(capsys, "convert", "vae.safetensors", "one", "--to", "diffusers")
    assert "settings differ" in said
    assert "--configs" in said
    ok(capsys, "convert", "vae.safetensors", "two", "--to", "diffusers", "--configs", "folder")
    ok(capsys, "convert", xl, "three", "--to", "diffusers", "--only", "vae")
    factors = [json.loads((here / one / "config.json").read_text())["scaling_factor"] for one in
               ("one", "two", "three")]  # fmt: skip
    assert factors == [0.18215, 0.13025, 0.13025]


def test_a_config_of_another_family_is_warned_of(here, capsys, whole):
    one = write(whole("sd1"), here / "one", "safetensors", "sd1")
    save_file(whole("sdxl"), "xl.safetensors")
    ok(capsys, "convert", one, "folder", "--to", "diffusers")
    arguments = ("--to", "diffusers", "--only", "vae", "--configs", "folder")
    said = ok(capsys, "convert", "xl.safetensors", "vae", *arguments)
    assert "warning" in said
    assert "scaling_factor 0.18215, not 0.13025" in " ".join(said.split())
    assert "warning" not in ok(capsys, "convert", one, "own", *arguments)


@pytest.mark.parametrize("name", ["schnell", "sd3"])
def test_a_transformer_is_taken_out(here, capsys, name):
    one = THIN[name]
    model = one.build()
    core = one.original(model)
    beside = {"vae.decoder.conv_in.weight": torch.ones(4, 16, 3, 3)}
    save_file({**{f"model.diffusion_model.{n}": t for n, t in core.items()}, **beside}, "whole.safetensors")
    ok(capsys, "convert", "whole.safetensors", "core.safetensors", "--only", "transformer")
    assert same(load_file("core.safetensors"), core)
    ok(capsys, "convert", "whole.safetensors", "folder", "--only", "unet", "--to", "diffusers")
    loaded, told = getattr(diffusers, one.kind).from_pretrained("folder", output_loading_info=True)
    assert {what: list(names) for what, names in told.items() if names} == {}
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_what_is_not_there_is_refused(here, capsys, whole):
    save_file(whole("sd1"), "a.safetensors")
    save_file(bare(whole("sd1"), "sd1", "vae"), "vae.safetensors")
    for arguments, says in [
        (("a.safetensors", "x.safetensors", "--only", "text_encoder_2"), "has no text_encoder_2"),
        (("a.safetensors", "x.safetensors", "--only", "vea"), "did you mean 'vae'?"),
        (("a.safetensors", "x.safetensors", "--only", "vae", "--vae", "vae.safetensors"), "leave out vae"),
        (("a.safetensors", "x.safetensors", "--only", "unet", "--ema", "keep"), "no EMA copies"),
        (("vae.safetensors", "x.safetensors", "--only", "unet"), "has no unet"),
    ]:
        assert_refused(capsys, here, "convert", *arguments, says=says)


def test_nothing_is_baked_into_one_component(here, capsys, whole):
    for component in ("vae", "text_encoder"):
        save_file(bare(whole("sd1"), "sd1", component), f"{component}.safetensors")
    for name in ("vae", "text_encoder"):
        arguments = (f"{name}.safetensors", "x.safetensors", "--vae", "vae.safetensors")
        assert_refused(capsys, here, "convert", *arguments, says="leave out vae")


def test_metadata_of_the_whole_is_not_that_of_a_part(here, capsys, whole):
    said = {"format": "pt", "modelspec.architecture": "stable-diffusion-v1", "mine": "stays"}
    save_file(whole("sd1"), "a.safetensors", said)
    for component, names in {"vae": {"mine"}, "unet": {"mine", "modelspec.architecture"}}.items():
        ok(capsys, "convert", "a.safetensors", f"{component}.safetensors", "--only", component)
        with safe_open(f"{component}.safetensors", "pt") as file:
            found = file.metadata()
        assert found.keys() - {"format", "blockmerge.recipe"} == names


def test_an_incomplete_vae_is_not_taken_for_one(here, capsys, whole):
    own = bare(whole("sd1"), "sd1", "vae")
    del own["decoder.mid.block_1.conv1.weight"]
    save_file(own, "vae.safetensors")
    assert_refused(capsys, here, "convert", "vae.safetensors", "x.safetensors", says="is a VAE alone")


def test_a_recipe_remembers_what_was_taken(here, whole):
    save_file(whole("sd1"), "a.safetensors")
    blockmerge.convert("a.safetensors", "vae.safetensors", only="vae", dtype="bf16")
    assert blockmerge.verify("vae.safetensors").same
    recipe = blockmerge.Recipe.from_dict({"models": ["a.safetensors"], "method": "convert", "only": "vae"})
    assert recipe.to_dict()["only"] == "vae"
    run = {"version": "0.1.0", "method": "convert", "models": ["a.safetensors"], "only": ["vae"]}
    with pytest.raises(blockmerge.errors.RecipeError, match="only is"):
        blockmerge.Recipe.from_dict(run, models=["a.safetensors"])

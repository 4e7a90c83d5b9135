"""A U-Net is held against its family's whole layout: complete, a known derivative, incomplete, or not it."""

from __future__ import annotations

import json
import re
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import IncompatibleModelsError, UnknownFamilyError
from blockmerge.anatomy import FAMILIES
from blockmerge.anatomy.configs import folder_configs
from blockmerge.anatomy.structure import names_in_config
from blockmerge.demo import make_state_dicts
from tests.commands import ok
from tests.effort import some

UNET = "model.diffusion_model."
SSD_1B = (
    r"middle_block\.[12]\.|(input_blocks\.[78]|output_blocks\.[01])\.1\.transformer_blocks\.[4-9]|"
    r"output_blocks\.[45]\.1\.transformer_blocks\.1\."
)
VEGA = (
    r"middle_block\.[12]\.|(input_blocks\.[78]|output_blocks\.[012])\.1\.transformer_blocks\.[2-9]|"
    r"(input_blocks\.[45]|output_blocks\.[345])\.1\.transformer_blocks\.1\."
)
CUT = {
    "SSD-1B": ("sdxl", SSD_1B, "ssd-1b"),
    "Segmind-Vega": ("sdxl", VEGA, "vega"),
    "BK-SDM-Base": ("sd1", {"layers_per_block": 1}, "base-sd"),
    "BK-SDM-Small": ("sd1", {"layers_per_block": 1, "mid_block_type": None}, "small-sd"),
    "BK-SDM-v2-Small": ("sd2", {"layers_per_block": 1, "mid_block_type": None}, "small-sd"),
    "a cut of one's own": ("sdxl", r"transformer_blocks\.[5-9]\.", "distilled"),
    "without the middle": ("sdxl", r"middle_block\.", "distilled"),
}


@pytest.fixture(scope="module")
def states():
    known = {}

    def of(family):
        if family not in known:
            known[family] = [{n: t.half() for n, t in one.items()} for one in make_state_dicts(family)]
        return known[family]

    return of


def in_diffusers(family, state):
    """{name in a folder: shape}."""
    origins = FAMILIES[family].origins(state, "ldm", "diffusers").items()
    return {name: tuple(state[one.rows[0].name].shape[: one.axes]) for name, one in origins}


def made_by_diffusers(family, state, changes):
    """The U-Net that diffusers makes of a family's config with changes, as a state dict alone."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = folder_configs(in_diffusers(family, state), family)["unet/config.json"]
    return UNet2DConditionModel.from_config({**config, **changes}).half().state_dict()


def of_kind(kind, states, path):
    family, how, variant = CUT[kind]
    whole = states(family)[0]
    state = cut(whole, how) if isinstance(how, str) else made_by_diffusers(family, whole, how)
    return saved(state, path), family, variant


def cut(state, pattern):
    return {name: tensor for name, tensor in state.items() if not re.search(pattern, name)}


def saved(state, path):
    save_file(state, path)
    return path


@pytest.mark.parametrize("kind", CUT)
def test_cut_models_are_called_so_everywhere(states, tmp_path, capsys, kind):
    model, family, variant = of_kind(kind, states, tmp_path / "model.safetensors")
    _, title = FAMILIES[family].title_and_kind(variant)
    assert (blockmerge.inspect(model).family, blockmerge.inspect(model).variant) == (family, variant)
    checked = blockmerge.check(model)
    assert checked.variant == variant
    assert "derivative" in {problem.code for problem in checked.problems}
    assert not {"missing_tensors", "wrong_shape"} & {problem.code for problem in checked.problems}
    converted = blockmerge.convert(model, tmp_path / "out.safetensors")
    assert converted.variant == variant
    assert any(title in note for note in converted.notes)
    capsys.readouterr()
    assert title in ok(capsys, "inspect", model)


@pytest.mark.parametrize("kind", CUT)
def test_cut_models_make_folders_that_diffusers_has_exactly(states, tmp_path, kind):
    from diffusers import UNet2DConditionModel

    model, _, _ = of_kind(kind, states, tmp_path / "model.safetensors")
    folder = tmp_path / "folder"
    blockmerge.convert(model, folder, naming="diffusers")
    _, info = UNet2DConditionModel.from_pretrained(folder / "unet", output_loading_info=True)
    assert not any(
        info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    # There and back, into LDM's names.
    unets = []
    for number, source in enumerate((model, folder)):
        blockmerge.convert(source, tmp_path / f"{number}.safetensors", naming="ldm")
        unets.append(
            {n: t for n, t in load_file(tmp_path / f"{number}.safetensors").items() if n.startswith(UNET)}
        )
    assert unets[0].keys() == unets[1].keys()
    assert all(torch.equal(tensor, unets[1][name]) for name, tensor in unets[0].items())


def test_cut_models_merge_with_their_own_kind_only(states, tmp_path):
    a, b = (
        saved(cut(one, SSD_1B), tmp_path / f"{n}.safetensors")
        for n, one in zip("ab", states("sdxl"), strict=True)
    )
    full = saved(states("sdxl")[1], tmp_path / "full.safetensors")
    vega = saved(cut(states("sdxl")[1], VEGA), tmp_path / "vega.safetensors")
    out = tmp_path / "out.safetensors"
    result = blockmerge.merge(a, b, weights=0.5, output=out)
    assert result.variant == "ssd-1b"
    one, two, found = load_file(a), load_file(b), load_file(out)
    name = UNET + "input_blocks.7.1.transformer_blocks.3.attn1.to_q.weight"
    assert torch.equal(found[name], ((one[name].float() + two[name].float()) / 2).half())
    for pair in ((a, full), (full, a), (a, vega)):
        with pytest.raises(IncompatibleModelsError, match=r"\w+\.safetensors is (SSD-1B|Segmind-Vega)"):
            blockmerge.merge(*pair, weights=0.5, output=tmp_path / "no.safetensors")


def test_what_is_merely_damaged_is_no_derivative(states, tmp_path, capsys):
    model = saved(cut(states("sd1")[0], r"input_blocks\.4\."), tmp_path / "model.safetensors")
    found = blockmerge.inspect(model)
    assert (found.variant, len(found.missing)) == ("base", 38)
    assert "missing_tensors" in {problem.code for problem in blockmerge.check(model).problems}
    assert "incomplete" in ok(capsys, "inspect", model)
    with pytest.raises(IncompatibleModelsError, match=r"model\.safetensors cannot become a diffusers folder"):
        blockmerge.convert(model, tmp_path / "folder", naming="diffusers")
    notes = blockmerge.convert(model, tmp_path / "out.safetensors").notes
    assert any(note.startswith("warning: model.safetensors lacks 38 U-Net tensors") for note in notes)


def test_half_a_unet_is_none(states, tmp_path):
    save_file(states("sd1")[0], tmp_path / "whole.safetensors")
    blockmerge.convert(tmp_path / "whole.safetensors", tmp_path / "folder", naming="diffusers")
    unet = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    controlnet = cut(unet, r"up_blocks|conv_out|conv_norm_out")
    for extra in ({}, {"controlnet_cond_embedding.conv_in.weight": torch.ones(4, 3, 3, 3)}):
        model = saved({**controlnet, **extra}, tmp_path / "control.safetensors")
        for command in (
            lambda model=model: blockmerge.convert(model, tmp_path / "x.safetensors"),
            lambda model=model: blockmerge.merge(
                model, model, weights=0.5, output=tmp_path / "x.safetensors"
            ),
        ):
            with pytest.raises(UnknownFamilyError, match=r"control\.safetensors "):
                command()
        assert blockmerge.inspect(model).family is None


ADDED = {
    "unCLIP": (
        "sd2",
        {UNET + "label_emb.0.0.weight": (32, 64), "embedder.model.visual.proj": (4, 4)},
        "unclip",
    ),
    "LCM": ("sd1", {"unet/time_embedding.cond_proj.weight": (8, 6)}, "lcm"),
    "GLIGEN": ("sd1", {UNET + "position_net.linears.0.weight": (4, 4)}, "gligen"),
}


@pytest.mark.parametrize("kind", ADDED)
def test_what_was_added_to_is_called_so(states, kind):
    family, extra, variant = ADDED[kind]
    model = {**states(family)[0], **{name: torch.ones(shape) for name, shape in extra.items()}}
    assert (blockmerge.inspect(model).family, blockmerge.inspect(model).variant) == (family, variant)
    checked = blockmerge.check(model)
    assert (checked.family, checked.variant) == (family, variant)
    assert not {"unknown_tensors", "foreign_tensors"} & {problem.code for problem in checked.problems}


def test_an_lcm_keeps_its_guidance(states, tmp_path):
    from diffusers import UNet2DConditionModel

    save_file(states("sd1")[0], tmp_path / "whole.safetensors")
    blockmerge.convert(tmp_path / "whole.safetensors", tmp_path / "folder", naming="diffusers")
    unet = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    lcm = saved({**unet, "time_embedding.cond_proj.weight": torch.ones(8, 6)}, tmp_path / "lcm.safetensors")
    # A file of LDM names has no place for what a loader of an LCM needs.
    with pytest.raises(IncompatibleModelsError, match=r"cond_proj\.weight.*LCM"):
        blockmerge.convert(lcm, tmp_path / "out.safetensors", naming="ldm")
    blockmerge.convert(lcm, tmp_path / "made", naming="diffusers")
    _, info = UNet2DConditionModel.from_pretrained(tmp_path / "made" / "unet", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_configs_of_another_build_are_refused(states, tmp_path):
    save_file(states("sdxl")[0], tmp_path / "full.safetensors")
    blockmerge.convert(tmp_path / "full.safetensors", tmp_path / "full", naming="diffusers")
    model = saved(cut(states("sdxl")[0], SSD_1B), tmp_path / "ssd.safetensors")
    with pytest.raises(IncompatibleModelsError, match=r"full has configs of another kind of model"):
        blockmerge.convert(model, tmp_path / "out", naming="diffusers", configs=tmp_path / "full")


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        *product(["sd1", "sd2", "sdxl", "sdxl_refiner"], [None]),
        *some(product(["sd1", "sd2", "sdxl", "sdxl_refiner"], [SSD_1B, VEGA, r"middle_block\."]), of=3),
    ],
)
def test_a_config_names_what_diffusers_makes_of_it(states, tmp_path, family, pattern):
    """Our list of names against diffusers' and transformers' own classes, for every component."""
    import diffusers
    import transformers

    state = states(family)[0] if pattern is None else cut(states(family)[0], pattern)
    configs = folder_configs(in_diffusers(family, state), family)
    made = {
        "unet": lambda config: diffusers.UNet2DConditionModel.from_config(config),
        "vae": lambda config: diffusers.AutoencoderKL.from_config(config),
        "text_encoder": lambda config: transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)),
        "text_encoder_2": lambda config: transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**config)
        ),
    }
    looked_at = 0
    for path, config in configs.items():
        component = path.partition("/")[0]
        if path.endswith("/config.json") and component in made:
            config = json.loads(json.dumps(config))
            model = made[component](config)
            names = {
                n if n.startswith("text_") or component in ("unet", "vae") else f"text_model.{n}"
                for n in model.state_dict()
            }
            assert names_in_config(config) == {n for n in names if not n.endswith("position_ids")}
            looked_at += 1
    assert looked_at >= 3

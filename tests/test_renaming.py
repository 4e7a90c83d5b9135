"""LDM ↔ diffusers: against diffusers' own converters, on every name of real files, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import FAMILIES, layout, origins_in_diffusers, relation_of
from blockmerge.demo import make_state_dicts
from tests.forms import assert_same, in_diffusers, read
from tests.oracle import bits
from tests.thin_unet import config

FILES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
DROPPED = {
    "sd1": set(),
    "sd2": {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"}
    | {name for name in layout("sd2") if ".resblocks.23." in name},
    "sdxl": {"conditioner.embedders.1.model.logit_scale"},
    "sdxl_refiner": {"conditioner.embedders.0.model.logit_scale"},
}
"""What diffusers has no place for, from the reference: the last of OpenCLIP's layers in SD2, and its
scales.
"""


U_NETS = [name for name in FAMILIES if FAMILIES[name].arms]
"""Transformers have tests of their own: test_transformer_renaming.py."""


def diffusers_list(family):
    table = json.loads((Path(__file__).parent / "layouts" / f"{FILES[family]}-diffusers.json").read_text())
    return {
        f"{component}/{name}": tuple(shape)
        for component, names in table.items()
        for name, shape in names.items()
    }


@pytest.mark.parametrize("family", FILES)
def test_names_and_shapes_are_those_of_real_folders(family):
    expected = diffusers_list(family)
    origins = origins_in_diffusers(layout(family), family)
    # OpenCLIP has no position_ids in LDM naming; loaders make them anew.
    lost = {name for name in expected if name.endswith("position_ids")} if family != "sd1" else set()
    assert expected.keys() - origins.keys() <= lost
    assert origins.keys() <= expected.keys()
    assert {name for name in layout(family) if not relation_of(name, family).diffusers} == DROPPED[family]


def by_diffusers(family, model):
    """The model as diffusers' own single-file converters make it, {component/name: tensor}."""
    from diffusers.loaders import single_file_utils as diffusers

    found = {}

    def add(component, tensors):
        found.update({f"{component}/{name}": tensor for name, tensor in tensors.items()})

    add("unet", diffusers.convert_ldm_unet_checkpoint(dict(model), config=config(family)))
    vae = {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
    add("vae", diffusers.convert_ldm_vae_checkpoint(dict(model), vae))
    if family == "sd1":
        add("text_encoder", diffusers.convert_ldm_clip_checkpoint(dict(model)))
    if family == "sdxl":
        add(
            "text_encoder",
            diffusers.convert_ldm_clip_checkpoint(
                dict(model), remove_prefix="conditioner.embedders.0.transformer."
            ),
        )
    if family != "sd1":
        component, prefix = {
            "sd2": ("text_encoder", "cond_stage_model.model."),
            "sdxl": ("text_encoder_2", "conditioner.embedders.1.model."),
        }[family]
        width = model[prefix + "ln_final.weight"].shape[0]
        text_model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
        add(component, diffusers.convert_open_clip_checkpoint(text_model, dict(model), prefix))
    return found


@pytest.fixture(scope="module", params=list(FILES))
def case(request):
    return request.param, make_state_dicts(request.param)[0]


def test_folders_hold_what_diffusers_own_converters_make(case, tmp_path):
    family, model = case
    blockmerge.convert(model, tmp_path / "folder", naming="diffusers")
    ours = read(tmp_path / "folder")
    theirs = by_diffusers(family, model)
    # The converters hand on what CLIPTextModel has no place for, and it is dropped when the model is loaded.
    unused = (
        {f"text_encoder/{name}" for name in ("text_projection.weight", "logit_scale")}
        if family == "sd2"
        else set()
    )
    unused |= {name for name in theirs if name.startswith("text_encoder/text_model.encoder.layers.23.")}
    assert ours.keys() == theirs.keys() - unused
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(bits(tensor), bits(theirs[name])), name


@pytest.mark.parametrize("family", U_NETS)
def test_there_and_back_gives_the_same_bits(family, tmp_path):
    model = make_state_dicts(family)[0]
    save_file(model, tmp_path / "a.safetensors")
    there = blockmerge.convert(tmp_path / "a.safetensors", tmp_path / "folder", naming="diffusers")
    back = blockmerge.convert(tmp_path / "folder", tmp_path / "b.safetensors")
    again = blockmerge.convert(tmp_path / "b.safetensors", tmp_path / "again", naming="diffusers")
    assert (there.naming, back.naming, again.naming) == ("diffusers", "ldm", "diffusers")
    result = load_file(tmp_path / "b.safetensors")
    assert model.keys() - result.keys() == DROPPED[family]
    assert_same(result, {name: tensor for name, tensor in model.items() if name not in DROPPED[family]})
    assert_same(read(tmp_path / "again"), read(tmp_path / "folder"))
    said = " ".join(there.notes)
    assert ("has no place for" in said) == bool(DROPPED[family])
    assert there.tensors.dropped == len(DROPPED[family])
    for name in sorted(DROPPED[family])[:1]:
        assert name.rpartition(".")[2] in said


@pytest.mark.parametrize("family", U_NETS)
def test_any_two_namings_merge_to_the_same_values(family):
    a, b = make_state_dicts(family, seed=3)
    in_ldm = blockmerge.merge_state_dicts(a, b, preset="high_res")
    # Where A is a folder's, what a folder has no place for cannot be in the result.
    renamed_a, renamed_b, renamed = (dotted(model, family) for model in (a, b, in_ldm))
    for first, second, expected in (
        (a, renamed_b, in_ldm),
        (renamed_a, b, renamed),
        (renamed_a, renamed_b, renamed),
    ):
        assert_same(blockmerge.merge_state_dicts(first, second, preset="high_res"), expected)


def dotted(model, family):
    """The model as one dict with `unet.…`, `vae.…`."""
    return {name.replace("/", ".", 1): tensor for name, tensor in in_diffusers(model, family).items()}


def test_old_vae_names_and_text_encoders_of_transformers_5(tmp_path):
    model = make_state_dicts("sdxl")[0]
    blockmerge.convert(model, tmp_path / "new", naming="diffusers")
    (tmp_path / "old" / "vae").mkdir(parents=True)
    (tmp_path / "old" / "text_encoder").mkdir()
    (tmp_path / "old" / "unet").symlink_to(tmp_path / "new" / "unet")
    (tmp_path / "old" / "text_encoder_2").symlink_to(tmp_path / "new" / "text_encoder_2")
    vae = load_file(tmp_path / "new" / "vae" / "diffusion_pytorch_model.safetensors")
    for new, old in (
        ("to_q.", "query."),
        ("to_k.", "key."),
        ("to_v.", "value."),
        ("to_out.0.", "proj_attn."),
    ):
        vae = {name.replace(new, old): tensor for name, tensor in vae.items()}
    assert any(".query." in name for name in vae)
    save_file(vae, tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(tmp_path / "new" / "text_encoder" / "model.safetensors")
    text = {
        name.removeprefix("text_model."): tensor
        for name, tensor in text.items()
        if not name.endswith("position_ids")
    }
    save_file(text, tmp_path / "old" / "text_encoder" / "model.safetensors")
    blockmerge.convert(tmp_path / "old", tmp_path / "back.safetensors")
    result = load_file(tmp_path / "back.safetensors")
    missing = DROPPED["sdxl"] | {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids"}
    assert_same(result, {name: tensor for name, tensor in model.items() if name not in missing})


@given(st.sampled_from(sorted(FAMILIES)), st.text("abcdefghijklmnopqrstuvwxyz0123456789_.", max_size=60))
def test_unknown_names_have_no_place_and_never_an_exception(family, tail):
    for prefix in (
        "",
        "model.diffusion_model.",
        "first_stage_model.",
        "cond_stage_model.model.",
        "conditioner.embedders.1.model.",
    ):
        relation = relation_of(prefix + tail, family)
        assert len(relation.diffusers) in (0, 1, 3)

"""A new family is one new folder: a toy one is known, and its rows find their way there and back."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import blockmerge
from blockmerge import CheckpointError, RecipeError, UnknownFamilyError
from blockmerge.anatomy import (
    FAMILIES,
    Origin,
    Rows,
    canonical_name,
    component_of,
    components_of,
    identify,
    layout_gaps,
)
from blockmerge.rendering.u_net import WeightsU
from tests import toy_family

U = "model.diffusion_model."


@pytest.fixture
def toy(tmp_path):
    with toy_family.registered(tmp_path) as family:
        yield family


def rows(tensors, origin):
    """What an origin says, with torch."""
    parts = []
    for one in origin.rows:
        unit, rest = divmod(len(tensors[one.name]), one.of)
        assert rest == 0
        parts.append(tensors[one.name][unit * one.start : unit * one.stop])
    return torch.cat(parts)


def moved(tensors, family, naming, wanted):
    return {name: rows(tensors, origin) for name, origin in family.origins(tensors, naming, wanted).items()}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_it_is_known_in_both_namings_with_prefix_and_without(toy):
    a, _ = toy_family.make_pair()
    there = moved(a, toy, "ldm", "diffusers")
    unet = {name: tensor for name, tensor in a.items() if name.startswith(U)}
    for tensors, naming in (
        (a, "ldm"),
        (unet, "ldm"),
        ({name.removeprefix(U): tensor for name, tensor in unet.items()}, "ldm"),
        (there, "diffusers"),
    ):
        anatomy = identify(shapes(tensors))
        assert (anatomy.family, anatomy.variant, anatomy.naming) == (toy, "base", naming)
    assert identify({**shapes(a), U + "embed.weight": (16, 9)}).variant == "inpainting"
    with pytest.raises(UnknownFamilyError, match="which no toy model has"):
        identify({**shapes(a), U + "embed.weight": (16, 5)})
    with pytest.raises(UnknownFamilyError, match=r"neither SD1, SD2, SDXL nor Toy \(it has 8 layers\)"):
        identify({**shapes(a), U + "layers.7.x": (1,)})


def test_blocks_components_and_spellings(toy):
    assert toy.blocks == ("BASE", "L00", "L01")
    for name, block, component in (
        ("layers.0.qkv.weight", "L00", "unet"),
        (U + "final.modulation.bias", "L01", "unet"),
        ("unet/blocks.1.attn.to_k.bias", "L01", "unet"),
        ("layers.1.of.another.tool", "L01", "unet"),
        ("toy_text.embed.weight", "BASE", "text_encoder"),
        ("text_encoder/embed.weight", "BASE", "text_encoder"),
        ("something", "BASE", "other"),
    ):
        assert blockmerge.block_of(name, "toy") == toy.block_of(name) == block
        assert component_of(name) == component
    with pytest.raises(RecipeError, match="would be in L02, which toy does not have"):
        toy.block_of("layers.2.x")
    assert canonical_name("layers.0.qkv.bias") == U + "layers.0.qkv.bias"
    assert canonical_name("norm_out.linear.bias") == "unet/norm_out.linear.bias"
    assert components_of("toy") == ("unet", "text_encoder")
    assert layout_gaps({}, "toy", "text_encoder").missing == ("toy_text.embed.weight", "toy_text.norm.bias")


def test_rows_go_where_they_belong_and_come_back(toy):
    a, _ = toy_family.make_pair()
    there = moved(a, toy, "ldm", "diffusers")
    shift, scale = a[U + "final.modulation.weight"].chunk(2)
    assert torch.equal(there["unet/norm_out.linear.weight"], torch.cat([scale, shift]))
    q, k, v = a[U + "layers.1.qkv.weight"].split([24, 8, 8])
    for name, part in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(there[f"unet/blocks.1.attn.to_{name}.weight"], part)
    back = moved(there, toy, "diffusers", "ldm")
    assert back.keys() == a.keys()
    assert all(torch.equal(back[name], a[name]) for name in a)
    assert moved(a, toy, "ldm", "ldm").keys() == a.keys()
    again = moved(back, toy, "ldm", "diffusers")
    assert all(torch.equal(again[name], there[name]) for name in there)


def test_how_origins_are_written(toy):
    found = toy.origins(toy.layout, "ldm", "diffusers")
    qkv, modulation = U + "layers.0.qkv.weight", U + "final.modulation.bias"
    assert found["unet/blocks.0.attn.to_k.weight"] == Origin((Rows(qkv, 3, 4, 5),))
    assert found["unet/norm_out.linear.bias"] == Origin(
        (Rows(modulation, 1, 2, 2), Rows(modulation, 0, 1, 2))
    )
    back = toy.origins(found, "diffusers", "ldm")
    parts = [Rows(f"unet/blocks.0.attn.to_{letter}.weight") for letter in "qkv"]
    assert back[qkv] == Origin(tuple(parts))
    place = "unet/norm_out.linear.bias"
    assert back[modulation] == Origin((Rows(place, 1, 2, 2), Rows(place, 0, 1, 2)))
    lonely = toy.origins(["unet/blocks.0.attn.to_q.weight"], "diffusers", "ldm")
    assert lonely == {"unet/blocks.0.attn.to_q.weight": Origin((Rows("unet/blocks.0.attn.to_q.weight"),))}


def test_inspect_shows_its_blocks(toy, tmp_path):
    a, _ = toy_family.make_pair()
    save_file(a, tmp_path / "toy.safetensors", {"format": "pt"})
    found = blockmerge.inspect(tmp_path / "toy.safetensors")
    assert (found.family, found.variant, found.naming) == ("toy", "base", "ldm")
    assert {block: part.tensors for block, part in found.blocks.items()} == {"L00": 6, "L01": 7}
    assert set(found.components) == {"unet", "text_encoder"}
    assert [problem.code for problem in blockmerge.check(tmp_path / "toy.safetensors").problems] == []


def test_its_blocks_are_drawn_in_two_arms(toy):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(WeightsU({"BASE": 0.0, "L00": 0.5, "L01": 1.0}))
    base, gap, arms = (line.rstrip() for line in console.export_text().splitlines())
    assert (base.split()[0], gap) == ("BASE", "")
    assert [word for word in arms.split() if word.startswith("L")] == ["L00", "L01"]


def test_attention_similarity_is_refused_where_the_family_names_no_layers(toy):
    a, b = toy_family.make_pair()
    with pytest.raises(CheckpointError, match="is Toy Transformer, and attention similarity is for U-Nets"):
        blockmerge.similarity(a, [b])
    (only,) = blockmerge.similarity(a, [b], method="weights").references
    assert set(only.blocks) == {"BASE", "L00", "L01"}


def test_it_is_gone_when_it_is_taken_out(tmp_path):
    before = list(FAMILIES)
    assert component_of("layers.0.qkv.weight") == "other"
    with toy_family.registered(tmp_path):
        assert "toy" in FAMILIES
        assert component_of("layers.0.qkv.weight") == "unet"
        assert canonical_name("embed.bias") == U + "embed.bias"
    assert list(FAMILIES) == before
    assert component_of("layers.0.qkv.weight") == "other"
    assert canonical_name("embed.bias") == "embed.bias"
    with pytest.raises(RecipeError, match="unknown family 'toy'"):
        blockmerge.block_of("embed.bias", "toy")

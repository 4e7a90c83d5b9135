"""Tensors that are never blended do not stand in the way of a merge; what is blended must fit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import IncompatibleModelsError
from blockmerge.demo import make_state_dicts

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model."
ROWS = TEXT + "embeddings.position_embedding.weight"
IDS = TEXT + "embeddings.position_ids"
TOKENS = TEXT + "embeddings.token_embedding.weight"
UNCLIP = {
    UNET + "label_emb.0.0.weight": torch.full((32, 64), 0.5),
    UNET + "label_emb.0.0.bias": torch.full((32,), 0.25),
    "embedder.model.visual.proj": torch.full((4, 4), 0.125),
    "noise_augmentor.data_std": torch.full((1, 8), 2.0),
}


@pytest.fixture(scope="module")
def states():
    known = {}

    def of(family, seed=0):
        if (family, seed) not in known:
            known[family, seed] = make_state_dicts(family, seed=seed)
        return [dict(one) for one in known[family, seed]]

    return of


@pytest.fixture
def merged(tmp_path):
    def merge(*models, **options):
        paths = [tmp_path / f"{letter}.safetensors" for letter in "abc"[: len(models)]]
        for path, model in zip(paths, models, strict=True):
            save_file(model, path)
        result = blockmerge.merge(*paths, output=tmp_path / "out.safetensors", overwrite=True, **options)
        return load_file(tmp_path / "out.safetensors"), result

    return merge


def long_clip(state, rows=248):
    width = state[ROWS].shape[1]
    return {**state, ROWS: torch.randn(rows, width), IDS: torch.arange(rows)[None]}


# -- what only A has ---------------------------------------------------------------------------------------------


def test_the_published_recipe_of_unclip(states, merged):
    """Karlo's way of tuning an unCLIP model: unclip + (tuned − base)."""
    base, tuned = states("sd2")
    unclip = {**states("sd2", 1)[0], **UNCLIP}
    out, result = merged(unclip, tuned, base, method="add_difference", weights=1)
    assert out.keys() == unclip.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in UNCLIP.items())
    name = UNET + "out.2.weight"
    assert torch.equal(
        out[name], (unclip[name].double() + tuned[name].double() - base[name].double()).float()
    )
    assert result.variant == "unclip"
    assert any("only in a.safetensors" in note and "label_emb.0.0" in note for note in result.notes)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("sd1", UNET + "position_net.null_positive_feature"),
        ("sdxl", UNET + "time_embed.cond_proj.weight"),
        ("sd1", UNET + "input_blocks.1.1.transformer_blocks.0.fuser.alpha_attn"),
        ("sdxl", UNET + "middle_block.9.a_new_layer.weight"),
    ],
)
def test_what_only_a_has_in_its_unet_is_kept_and_what_only_b_has_is_refused(states, merged, family, name):
    a, b = states(family)
    extra = {**a, name: torch.ones(3)}
    out, result = merged(extra, b, weights=0.5)
    assert torch.equal(out[name], extra[name])
    assert any(name in note for note in result.notes)
    with pytest.raises(
        IncompatibleModelsError, match=r"b\.safetensors has 1 U-Net tensor .*give it as the first"
    ):
        merged(b, extra, weights=0.5)
    # Where all have it, what is known is merged, and the rest is A's.
    out, result = merged(extra, {**b, name: torch.full((3,), 3.0)}, weights=0.5)
    assert torch.equal(out[name], torch.full((3,), 1.0 if "a_new_layer" in name else 2.0))
    state_dicts = blockmerge.merge_state_dicts(extra, b, weights=0.5)
    assert torch.equal(state_dicts[name], extra[name])


def test_a_lacking_tensor_of_the_family_is_still_refused(states, merged):
    a, b = states("sd1")
    without = {name: tensor for name, tensor in b.items() if name != UNET + "out.2.bias"}
    for pair in ((a, without), (without, a)):
        with pytest.raises(
            IncompatibleModelsError, match=r"lacks 1 U-Net tensor of the other .*out\.2\.bias"
        ):
            merged(*pair, weights=0.5)


# -- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["BASE=0,M00=0.5", "BASE=skip,M00=0.5"], ids=["weight 0", "skip"])
@pytest.mark.parametrize("longer", ["a", "b"])
def test_shapes_do_not_matter_where_a_is_copied(states, merged, weights, longer):
    a, b = states("sd1")
    a, b = (long_clip(one) if letter == longer else one for letter, one in zip("ab", (a, b), strict=True))
    out, result = merged(a, b, weights=weights)
    for name in (ROWS, IDS):
        assert torch.equal(out[name], a[name])
    assert any("of several shapes" in note and ROWS in note for note in result.notes)


def test_shapes_do_not_matter_where_b_is_copied_outside_the_unet(states, merged):
    a, b = states("sd1")
    b = long_clip(b)
    out, _ = merged(a, b, weights="BASE=1,M00=0.5")
    assert torch.equal(out[ROWS], b[ROWS])
    assert torch.equal(out[IDS], b[IDS])  # A's 77 would not fit


def test_other_vocabularies_and_rules(states, merged):
    a, b = states("sd1")
    b = {**b, TOKENS: torch.cat([b[TOKENS], torch.zeros(2, b[TOKENS].shape[1])])}
    with pytest.raises(IncompatibleModelsError, match=rf"{TOKENS} \(shapes differ: .*; BASE=skip leaves"):
        merged(a, b, weights=0.5)
    out, _ = merged(a, b, weights=0.5, rules="BASE:token_embedding:0")
    assert torch.equal(out[TOKENS], a[TOKENS])
    out, _ = merged(a, b, weights=0.5, changes="BASE=skip")
    assert torch.equal(out[TOKENS], a[TOKENS])


def test_a_unet_of_other_widths_is_a_fault_unless_it_is_left_out(states, merged):
    a, b = states("sd1")
    name = UNET + "middle_block.0.in_layers.2.weight"
    b[name] = torch.ones(7, 7, 3, 3)
    for weights in ("M00=0.5", "M00=1"):
        with pytest.raises(
            IncompatibleModelsError, match=r"shapes differ: .*; M00=skip leaves its block out"
        ):
            merged(a, b, weights=f"BASE=0,{weights}")
    out, _ = merged(a, b, weights="BASE=0.5,M00=0")
    assert torch.equal(out[name], a[name])


def test_a_note_says_whose_input_channels_the_output_has(states, merged):
    a, b = states("sd1")
    first = UNET + "input_blocks.0.0.weight"
    rows, _, *kernel = b[first].shape
    wide = {**b, first: torch.randn(rows, 9, *kernel)}
    out, result = merged(a, wide, weights="IN00=skip,IN01=0.5")
    assert out[first].shape[1] == 9
    assert any("9 input channels, not the 4 of a.safetensors" in note for note in result.notes)


def test_an_incomplete_component_is_warned_of(states, tmp_path):
    a, _ = states("sd1")
    damaged = {name: tensor for name, tensor in a.items() if "decoder.mid" not in name}
    notes = blockmerge.convert(damaged, tmp_path / "out.safetensors").notes
    assert any(note.startswith("warning: ") and "tensors of the VAE" in note for note in notes)


# -- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [77, 248, 154])
def test_positions_are_as_many_as_the_embedding_has_rows(states, tmp_path, rows):
    model = long_clip(states("sd1")[0], rows)
    assert not {"broken_position_ids", "wrong_shape"} & {p.code for p in blockmerge.check(model).problems}
    broken = {**model, IDS: torch.arange(rows).float()[None] + 0.25}
    assert "broken_position_ids" in {problem.code for problem in blockmerge.check(broken).problems}
    for given in (model, broken, {**model, IDS: torch.arange(5)[None]}):
        blockmerge.convert(given, tmp_path / "out.safetensors", overwrite=True)
        assert torch.equal(load_file(tmp_path / "out.safetensors")[IDS], torch.arange(rows)[None])
    # Cut to 77 beside a longer embedding, they are wrong.
    short = {**model, IDS: torch.arange(76)[None]}
    assert "broken_position_ids" in {problem.code for problem in blockmerge.check(short).problems}


def test_positions_of_sdxls_first_encoder(states, tmp_path):
    prefix = "conditioner.embedders.0.transformer.text_model.embeddings."
    model = states("sdxl")[0]
    width = model[prefix + "position_embedding.weight"].shape[1]
    model |= {
        prefix + "position_embedding.weight": torch.randn(248, width),
        prefix + "position_ids": torch.arange(248)[None],
    }
    blockmerge.convert(model, tmp_path / "out.safetensors")
    assert torch.equal(
        load_file(tmp_path / "out.safetensors")[prefix + "position_ids"], torch.arange(248)[None]
    )
    blockmerge.convert(tmp_path / "out.safetensors", tmp_path / "folder", naming="diffusers")
    config = (tmp_path / "folder" / "text_encoder" / "config.json").read_text()
    assert '"max_position_embeddings": 248' in config

"""A thousand models and more: what a run reads is the model itself, whatever its number. And letters that
mean a model.
"""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.demo import write_pair
from tests.small_models import small_model, write_folder

U = "model.diffusion_model."
SHAPES = {
    f"{U}input_blocks.0.0.weight": (2, 4, 3, 3),
    f"{U}input_blocks.1.1.proj_in.weight": (2, 2, 1, 1),
    f"{U}input_blocks.11.0.in_layers.0.weight": (3,),
    f"{U}out.2.bias": (3,),
}


def tiny(value):
    return {name: torch.full(shape, float(value), dtype=torch.float16) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("count", "heavy"), [(1000, -1), (1001, -1)])
def test_all_the_weight_on_one_of_a_thousand_models(count, heavy, tmp_path):
    """A model's number once met the marker of a view, and all of the weight went to A."""
    models = [tiny(number) for number in range(count)]
    ratios = [0.0] * count
    ratios[heavy] = 1.0
    out = tmp_path / "out.safetensors"
    result = blockmerge.merge(*models, method="average", ratios=ratios, output=out)
    wanted = tiny(range(count)[heavy])
    in_memory = blockmerge.merge_state_dicts(*models, method="average", ratios=ratios)
    for found in (load_file(out), in_memory):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert len(result.models) == count


def test_more_files_than_a_worker_may_open(tmp_path):
    paths = [tmp_path / f"{number}.safetensors" for number in range(60)]
    for number, path in enumerate(paths):
        save_file(tiny(number), path)
    out = tmp_path / "out.safetensors"
    blockmerge.merge(*paths, method="average", output=out, threads=2)
    assert all((tensor == 29.5).all() for tensor in load_file(out).values())


# -- letters of models, and files that are called alike ------------------------------------------------------


@pytest.fixture
def models(here):
    """Three files; their VAEs differ."""
    for seed, letter in enumerate("xyz"):
        save_file(small_model(seed=seed), f"{letter}.safetensors", {"format": "pt"})
    return [f"{letter}.safetensors" for letter in "xyz"]


VAE = "first_stage_model.encoder.conv_in.weight"


@pytest.mark.parametrize(("letter", "number"), [("a", 0), ("b", 1), ("c", 2)])
def test_a_letter_is_a_model(models, letter, number):
    options = {"method": "add_difference", "weights": 0.5, "vae": letter}
    blockmerge.merge(*models, output="out.safetensors", **options)
    given = [load_file(path) for path in models]
    assert torch.equal(load_file("out.safetensors")[VAE], given[number][VAE])
    assert torch.equal(blockmerge.merge_state_dicts(*given, **options)[VAE], given[number][VAE])


@pytest.mark.parametrize("name", ["ab", "ca", "auto2", "d"])
def test_what_is_no_letter_is_a_file(models, name, here):
    """Texts within "abc" were once taken for a letter, and a folder of that name was not looked at."""
    options = {"method": "add_difference", "weights": 0.5, "vae": name}
    with pytest.raises(
        blockmerge.CheckpointError,
        match=rf"{re.escape(name)}: no such file.*takes auto, a, b, c, blend, a file",
    ):
        blockmerge.merge(*models, output="out.safetensors", **options)
    with pytest.raises(
        blockmerge.RecipeError, match=f"unknown VAE choice '{re.escape(name)}': auto, a, b, c or blend"
    ):
        blockmerge.merge_state_dicts(*map(load_file, models), **options)
    write_pair("whole.safetensors", "other.safetensors", seed=9)
    whole = load_file("whole.safetensors")
    vae = {key: tensor for key, tensor in whole.items() if key.startswith("first_stage_model.")}
    write_folder(here / "made", vae, "sd1")
    (here / "made" / "vae").rename(here / name)
    (here / name / "config.json").write_text("{}")
    result = blockmerge.merge(*models, output="out.safetensors", **options)
    assert torch.equal(load_file("out.safetensors")[VAE], vae[VAE])
    assert result.tensors.from_vae == len(vae)
    blockmerge.convert(models[0], "converted.safetensors", vae=name)
    assert torch.equal(load_file("converted.safetensors")[VAE], vae[VAE])


@pytest.mark.parametrize("run", [blockmerge.merge, blockmerge.convert])
def test_an_empty_text_is_no_vae(run, models):
    arguments = (models[0], "out.safetensors") if run is blockmerge.convert else models[:2]
    options = {} if run is blockmerge.convert else {"output": "out.safetensors", "weights": 0.5}
    letters = "" if run is blockmerge.convert else "auto, a, b, blend, "
    with pytest.raises(
        blockmerge.RecipeError, match=rf"^vae \(--vae\) is empty: it takes {letters}a file or a folder$"
    ):
        run(*arguments, vae="", **options)


def test_high_res_on_sd1_is_fourteen_runs(pairs, tmp_path):
    plan = blockmerge.Merge(*pairs(), preset="high_res").plan(tmp_path / "out.safetensors")
    assert plan.summary().runs == 14

"""A recipe merged live: the U-Net of the file that it would write."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import blockmerge
from blockmerge import LiveMerge, Merge, Recipe
from blockmerge.errors import RecipeError
from tests import oracle
from tests.test_live import PREFIX, module_of, unet_of, values
from tests.thin_loras import make_lora


@pytest.fixture(scope="module")
def files(pairs):
    return [*pairs(), *pairs(seed=1)]


def of_file(recipe, tmp_path, dtype="F16"):
    output = tmp_path / "made.safetensors"
    recipe.run(output, overwrite=True)
    return unet_of(load_file(output))


def assert_near(module, wanted):
    """Within one step: float32 inside a stage may meet the last bit of a result otherwise."""
    found = {name.removeprefix(PREFIX): tensor for name, tensor in values(module).items()}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        error = (tensor.double() - wanted[name].double()).abs()
        assert (error <= oracle.step_at(wanted[name], tensor.dtype)).all(), name


def module_like(file):
    return module_of({n: t for n, t in load_file(file).items() if n.startswith(PREFIX)})


def recipes(files, tmp_path):
    a, b, c, d = files
    x = Merge(a, b, preset="high_res")
    yield "stages", Merge(Merge(x, c, d, method="add_difference", weights=1), b, preset="low_res")
    yield "flat", Merge(a, b, weights=0.3)
    yield "twice", Merge(x, Merge(x, c, weights=0.25), weights="IN00-IN05=0.5,OUT03=skip")
    yield "rows", Merge(x, c, method="tensor_sum", weights=0.5, weights_beta=0.25)
    yield "whole tensors", Merge(x, c, method="slerp", weights=0.5, rules="IN04:attn2:0.9")
    yield "chance", Merge(x, c, method="dare", weights=0.5, seed=3)
    lora = make_lora(tmp_path / "style.safetensors", "sd1", scale=0.5)
    yield (
        "lora",
        Merge(Merge(a, b, weights=0.5, loras=[(lora, 0.7)], partial=True), c, weights=0.25, clip=True),
    )


@pytest.mark.parametrize("number", range(7))
def test_the_unet_is_that_of_the_recipes_file(files, tmp_path, number):
    name, recipe = list(recipes(files, tmp_path))[number]
    module = module_like(files[1])
    with LiveMerge(module, recipe):
        assert_near(module, of_file(recipe, tmp_path))
    assert name


def test_stages_get_other_weights_by_their_names(files, tmp_path):
    a, b, c, _ = files
    (tmp_path / "mix.toml").write_text(
        f"[X]\nmodels = ['{a}', '{b}']\npreset = 'high_res'\n[final]\nmodels = ['X', '{c}']\nweights = 0.5\n"
    )
    recipe = Recipe.load(tmp_path / "mix.toml")
    module = module_like(a)
    before = {name: tensor.clone() for name, tensor in values(module).items()}
    live = LiveMerge(module, recipe)
    so_far: list[str] = []  # the same as ``--set`` takes it
    for changes, texts in (
        ({"final": {"weights": 0.3}}, ["final.weights=0.3"]),
        (
            {"X": {"weights": 0.75}, "final": {"preset": "low_res"}},
            ["X.weights=0.75", "final.preset=low_res"],
        ),
        ({"X": {"preset": "low_res", "set": "OUT05=0.7"}}, ["X.preset=low_res", "X.set='OUT05=0.7'"]),
        ({"final": {"weights": 1}}, ["final.weights=1"]),
    ):
        live.apply(changes)
        so_far += texts
        assert_near(module, of_file(Recipe.load(tmp_path / "mix.toml", changes=so_far), tmp_path))
    live.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(module).items())
    with pytest.raises(RecipeError, match="closed"):
        live.apply({"final": {"weights": 0.3}})


def test_what_does_not_change_live_is_refused(files):
    a, b, c, _ = files
    x = Merge(a, b, weights=0.5)
    with LiveMerge(module_like(a), Merge(x, c, weights=0.5)) as live:
        for changes, says in (
            ({"Y": {"weights": 0.3}}, "no stage Y .*stages are result, stage1"),
            ({"result": {"method": "slerp"}}, "only weights change live, not method"),
            ({"result": 0.3}, "a table of weights is needed; float given"),
            ({"result": {"weights": "x"}}, "x"),
        ):
            with pytest.raises(blockmerge.BlockmergeError, match=says):
                live.apply(changes)
        with pytest.raises(RecipeError, match="a recipe is changed by stages"):
            live.apply(weights=0.3)
    with pytest.raises(RecipeError, match="leave out method"):
        LiveMerge(module_like(a), x, method="slerp")
    with pytest.raises(RecipeError, match="cosine_a is not merged live"):
        LiveMerge(module_like(a), Merge(x, c, method="cosine_a", weights=0.5))
    with (
        LiveMerge(module_like(a), a, b) as live,
        pytest.raises(RecipeError, match="only a recipe has stages"),
    ):
        live.apply({"final": {"weights": 0.3}})

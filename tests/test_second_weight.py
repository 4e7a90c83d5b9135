"""A method whose second weight says how much a model counts is not run without it."""

from __future__ import annotations

import re

import pytest
import torch

import blockmerge
from blockmerge import WeightsError
from blockmerge.demo import make_state_dicts
from blockmerge.methods import METHODS
from tests.commands import ok
from tests.refusals import assert_refused

NEEDS = r"needs its second weight, beta, too, or a model would count for nothing: give weights_beta "
NAMED = ["--weights-beta", "--preset-beta", "weights_beta"]


@blockmerge.merge_method
def own(a, b, c, *, alpha, beta):
    """Its third model counts by beta alone."""
    return a + alpha * (b - a) + beta * (c - a)


@blockmerge.merge_method
def own_with_default(a, b, c, *, alpha, beta=0.25):
    """One need not say beta."""
    return a + alpha * (b - a) + beta * (c - a)


@pytest.fixture(scope="module")
def models():
    a, b = make_state_dicts("sd1")
    return a, b, make_state_dicts("sd1", seed=5)[1]


def unet(model):
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    return model[name]


@pytest.mark.parametrize("method", ["triple_sum", "sum_twice", own])
def test_without_it_the_merge_is_refused(models, tmp_path, method):
    with pytest.raises(WeightsError, match=NEEDS):
        blockmerge.merge_state_dicts(*models, method=method, weights=0.3)
    with pytest.raises(WeightsError, match=NEEDS):
        blockmerge.merge(*models, method=method, weights=0.3, output=tmp_path / "out.safetensors")
    recipe = blockmerge.Merge(*models, method=method, preset="high_res")
    with pytest.raises(WeightsError, match=NEEDS):
        recipe.plan(tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["triple_sum", "sum_twice", own])
@pytest.mark.parametrize(
    "beta",
    [{"weights_beta": 0.4}, {"preset_beta": "FLAT_25"}, {"changes_beta": "IN04=0.4"}, {"weights_beta": 0}],
)
def test_however_it_is_said(models, method, beta):
    merged = blockmerge.merge_state_dicts(*models, method=method, weights=0.3, **beta)
    share = {"weights_beta": 0.4, "preset_beta": 0.25, "changes_beta": 0.4}[next(iter(beta))]
    share = 0.0 if beta == {"weights_beta": 0} else share
    a, b, c = (unet(model).double() for model in models)
    exact = (
        (1 - share) * (0.7 * a + 0.3 * b) + share * c
        if method == "sum_twice"
        else a + 0.3 * (b - a) + share * (c - a)
    )
    assert (unet(merged).double() - exact).abs().max() < 2e-3


def test_methods_that_need_none(models):
    """Where a model counts without it, 0 means something: a place, or a share of likeness."""
    for method in METHODS.values():
        if "beta" in method.weights and method.name not in ("triple_sum", "sum_twice"):
            assert method.weights["beta"] == 0
            count = method.models
            others = blockmerge.merge_state_dicts(*models[:count], method=method.name, weights=0.5)
            changed = [*models[: count - 1], {n: t.flip(0) for n, t in models[count - 1].items()}]
            other = blockmerge.merge_state_dicts(*changed, method=method.name, weights=0.5, vae="a")
            assert not torch.equal(unet(others), unet(other)), method.name
    blockmerge.merge_state_dicts(*models, method=own_with_default, weights=0.5)


def test_the_command(pairs, here, capsys):
    a, b = pairs()
    for method in ("triple_sum", "sum_twice"):
        assert_refused(capsys, here, a, b, a, "-m", method, "-w", "0.3", says=[method, *NAMED])
        assert_refused(capsys, here, a, b, a, "-m", method, "-p", "high_res", "--dry-run", says=NAMED)
        ok(capsys, a, b, a, "-m", method, "-w", "0.3", "--weights-beta", "0", "--dry-run")
    assert_refused(capsys, here, "nowhere", b, a, "-m", "triple_sum", "-w", "1", says="nowhere")
    ok(capsys, a, b, "-m", "tensor_sum", "-w", "0.3", "--dry-run")


def test_a_recipe_that_was_written_down(models, tmp_path):
    from safetensors.torch import save_file

    for name, model in zip("abc", models, strict=True):
        save_file(model, tmp_path / f"{name}.safetensors")
    written = {
        "models": [str(tmp_path / f"{name}.safetensors") for name in "abc"],
        "method": "triple_sum",
        "weights": 0.3,
    }
    with pytest.raises(WeightsError, match=NEEDS):
        blockmerge.Recipe.from_dict(written).plan(tmp_path / "out.safetensors")
    blockmerge.Recipe.from_dict({**written, "weights_beta": 0}).plan(tmp_path / "out.safetensors")


def test_a_live_merge(models):
    module = torch.nn.Module()
    for name, tensor in models[0].items():
        if not name.startswith("model.diffusion_model."):
            continue
        at = module
        *path, last = name.removeprefix("model.diffusion_model.").split(".")
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        at.register_parameter(last, torch.nn.Parameter(tensor.clone()))
    with blockmerge.LiveMerge(module, *models, method="triple_sum") as live:
        live.apply(weights=0.3)  # nothing is written: it is said, not refused
        (note,) = live.notes
        assert re.match(NEEDS, note.removeprefix("triple_sum "))
        live.apply(weights=0.3, weights_beta=0.2)
        assert live.notes == ()
        live.apply(weights="OUT05=0.7", keep=True)  # what is kept is said already
        assert live.weights_beta["OUT05"] == 0.2

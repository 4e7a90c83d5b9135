"""A recipe is data with an inverse: written down, read back, it is the same and makes the same file.

Over 500 lines: everything that a recipe can ask for is written down, read back and run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import Merge, OutputError, Recipe, RecipeError
from blockmerge.merging.planning.request import vae_choice
from blockmerge.methods import METHODS
from tests import oracle
from tests.effort import many
from tests.forms import ema_of
from tests.refusals import snapshot
from tests.small_models import small_model

BLOCKS = oracle.SD
VAE = "first_stage_model."


def through_json(written):
    return json.loads(json.dumps(written, allow_nan=False))


def of_file(path):
    """The recipe in a file's metadata, or in that of a folder's U-Net."""
    path = path if path.is_file() else path / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["blockmerge.recipe"])


def the_same(one, other):
    """Hold that two outputs are the same bytes, as files or as folders."""
    assert one.is_file() == other.is_file()
    assert one.is_dir() or one.read_bytes() == other.read_bytes()
    assert not one.is_dir() or below(one) == below(other)


def below(folder):
    return {os.path.relpath(path, folder): content for path, content in snapshot(folder).items()}


# -- written and read ----------------------------------------------------------------------------------------

weight = st.floats(-2, 2).map(lambda value: round(value, 6)) | st.integers(-1, 2)
one_weight = weight | st.none() | st.sampled_from(["skip", "random", "random(0.2,0.8,2)"])
weights_of_any_form = st.one_of(
    weight,
    weight.map(np.float64),
    st.sampled_from(["0.5", "random", "U", "BASE=0,IN00-IN05=0.3,M00=skip", oracle.HIGH_RES]),
    st.lists(one_weight, min_size=25, max_size=26),
    st.lists(weight, min_size=26, max_size=26).map(tuple),
    st.lists(weight, min_size=26, max_size=26).map(np.array),
    st.dictionaries(st.sampled_from(BLOCKS), one_weight, min_size=1),
    st.lists(weight | st.none(), min_size=26, max_size=26).map(blockmerge.BlockWeights.from_numbers),
)
changes = st.sampled_from(["BASE=0.5,OUT11=1", "M00=skip", "IN00-IN02=random(0,1)"])
presets = st.lists(
    st.sampled_from(["high_res", "Low-Res", "GRAD_V@0.5", "COSINE@0.123456789", "high-res_replace@-1"]),
    min_size=1, max_size=3,
)  # fmt: skip
ratio = st.sampled_from([0.25, 0.5, 0.75])
numbers_of = {
    "average": st.fixed_dictionaries({}, optional={"ratios": st.sampled_from(["2,1", (3, 1), [0.5, 2], np.array([1, 4])])}),
    "ties": st.fixed_dictionaries({}, optional={"density": ratio | st.just("0.25") | ratio.map(np.float32)}),
    "dare": st.fixed_dictionaries({}, optional={"drop_rate": ratio}),
    "extract": st.fixed_dictionaries({}, optional={"gamma": ratio}),
}  # fmt: skip


@st.composite
def options(draw, method=None, sound=False):
    """Everything that can be asked for; when `sound`, only what a plan of two models of SD1 accepts."""
    method = METHODS[method or draw(st.sampled_from(sorted(METHODS)))]
    found = {"method": method.name, **draw(numbers_of.get(method.name, st.just({})))}
    suffixes = ["", "_beta"] if "beta" in method.weights else [""]
    for suffix in suffixes:
        key = "weights" if draw(st.booleans()) else "preset"
        found[key + suffix] = draw(weights_of_any_form if key == "weights" else presets | st.just("high_res"))
        if draw(st.booleans()):
            found["changes" + suffix] = draw(changes)
    clip = st.booleans() if method.models != 1 else st.just(False)
    rules = ["", "OUT03-OUT05:attn2:0.8, NOT BASE:norm:0", "IN01 M00:attn1 ff:skip", ":in_layers:0.125"]
    more = {
        "rules": st.sampled_from(rules),
        "adjust": st.sampled_from(["", "0,0,0,1", "1,2,-3,4,5,6.5,7,8"]),
        "clip": clip,
        "seed": st.integers(0, 2**70),
        "vae": st.sampled_from(["auto", "a", "b", "blend"]),
        "dtype": st.sampled_from(["keep", "fp16", "bf16", "fp32", "fp8_e5m2", torch.bfloat16]),
        "sdxl_map": st.sampled_from([None, "name", "resolution"]),
        "allow_nonfinite": st.booleans(),
        "naming": st.sampled_from([None, "ldm", "diffusers"]),
        "ema": st.sampled_from(["drop", "keep"] if sound else ["drop", "keep", "use"]),
        "prune": st.booleans(),
    }
    anywhere = {
        "vae": st.sampled_from(["auto", "b", "some/folder/my vae.safetensors", "ab", "./a"]),
        "configs": st.none() | st.just("some/folder"),
        "variant": st.none() | st.just("fp16"),
    }
    return {**found, **draw(st.fixed_dictionaries({}, optional=more if sound else more | anywhere))}


@settings(max_examples=300)
@given(options(), st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_what_is_written_is_read_back(given_options, models):
    recipe = Recipe(*models, **given_options)
    written = recipe.to_dict()
    assert through_json(written) == written
    again = Recipe.from_dict(through_json(written))
    assert again == recipe
    assert again.to_dict() == written
    assert Recipe.from_dict(written, models=models[::-1]) == Recipe(*models[::-1], **given_options)


def test_the_written_form_is_the_options_of_the_command_line():
    recipe = Merge(
        "x/a.safetensors", "b.ckpt", method="dare", preset=["high_res@0.6", "GRAD_A"], changes="BASE=0",
        drop_rate=0.75, seed=3, rules="OUT06:attn:0.5, :norm:skip", naming="diffusers", clip=True,
    )  # fmt: skip
    assert recipe.to_dict() == {
        "models": ["x/a.safetensors", "b.ckpt"], "method": "dare", "preset": ["high_res@0.6", "GRAD_A"], "set": "BASE=0",
        "drop_rate": 0.75, "seed": 3, "rules": ["OUT06:attn:0.5", ":norm:skip"], "to": "diffusers", "clip": True,
    }  # fmt: skip
    assert Merge("a", "b", weights=0).to_dict() == {"models": ["a", "b"], "weights": 0}
    assert Merge is Recipe


def test_a_recipe_is_dumped_and_loaded(here):
    recipe = Recipe("a.safetensors", "b.safetensors", weights=[0.1] * 26, vae="ab", ema="keep")
    recipe.dump("mix.json")
    assert Recipe.load("mix.json") == recipe
    with pytest.raises(OutputError, match=r"mix\.json exists"):
        recipe.dump("mix.json")
    recipe.dump("mix.json", overwrite=True)
    (here / "a.safetensors").write_bytes(b"x")
    with pytest.raises(OutputError, match="is the input"):
        recipe.dump("a.safetensors", overwrite=True)
    with pytest.raises(
        RecipeError, match=r"model 2 is in memory, and a recipe that is written down can only"
    ):
        Recipe("a", {}, weights=0.5).dump("other.json")
    with pytest.raises(RecipeError, match=r"cannot be written down"):
        Recipe("a", "b", weights=float("nan")).dump("other.json")
    assert sorted(path.name for path in here.iterdir()) == ["a.safetensors", "mix.json"]


def test_nothing_that_a_recipe_names_is_overwritten_by_its_own_text(pairs, tmp_path):
    a, b = pairs()
    other = tmp_path / "vae.safetensors"
    other.write_bytes(a.read_bytes())
    (tmp_path / "configs").mkdir()
    settings_ = tmp_path / "configs" / "model_index.json"
    settings_.write_text("{}", encoding="utf-8")
    before = snapshot(tmp_path)
    for recipe, path in (
        (Recipe(str(a), str(b), weights=0.5, vae=str(other)), other),
        (Recipe(a, b, weights=0.5, configs=tmp_path / "configs"), settings_),
        (Recipe(Recipe(a, b, weights=0.5), a, weights=0.5), b),
    ):
        with pytest.raises(OutputError, match=path.name):
            recipe.dump(path, overwrite=True)
    assert snapshot(tmp_path) == before


def test_recipes_of_models_in_memory_are_equal_where_those_are_one():
    one, other = ({"x": torch.zeros(2)} for _ in range(2))
    recipe = Recipe(one, "b", weights=0.5)
    assert recipe == Recipe(one, "b", weights=0.5)
    assert hash(recipe) == hash(Recipe(one, "b", weights=0.5))
    assert recipe != Recipe(other, "b", weights=0.5)
    assert recipe != Recipe(one, "b", weights=0.25)
    assert recipe != Recipe(one, "b", weights=0.5, vae="a")
    assert len({recipe, Recipe(one, "b", weights=0.5), Recipe("a", "b", weights=0.5)}) == 2


TWO = {"models": ["a", "b"]}


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (5, "a recipe is a table of options; int given"),
        ({}, "recipe: models are a list of files, A first"),
        ({"models": "ab"}, "recipe: models are a list of files, A first"),
        ({"models": ["a", 3]}, "recipe: a model is a file; int given"),
        ({**TWO, "wieghts": 1}, "unknown argument 'wieghts': weighted_sum has no such number; did you mean 'weights'?"),
        ({**TWO, 3: 1}, "unknown argument '3': weighted_sum has no such number"),
        ({**TWO, "preset": 3}, "recipe: preset is a text or a list of texts; int given"),
        ({**TWO, "preset": [3]}, "recipe: preset are texts; int given"),
        ({**TWO, "weights": True}, "recipe: weights is a text, a number, a list or a table; bool given"),
        ({**TWO, "dtype": [1]}, "recipe: dtype is a text; list given"),
        ({**TWO, "dtype": "fp61"}, "unknown dtype 'fp61'; did you mean 'fp16'? (keep, fp16, bf16, fp32, fp8_e4m3fn, fp8_e5m2)"),
        ({**TWO, "clip": "no"}, "clip is True or False; str given"),
        ({**TWO, "seed": 1.5}, "a whole number is needed as seed: found 1.5"),
        ({**TWO, "rules": [3]}, "recipe: rules are texts; int given"),
        ({**TWO, "vae": ""}, "vae (--vae) is empty: it takes auto, a, b, blend, a file or a folder"),
        ({**TWO, "numbers": 1}, "recipe: numbers is a table; int given"),
        ({**TWO, "method": "nosuch"}, "unknown method 'nosuch' ('blockmerge methods' lists them)"),
        ({**TWO, "found": {"weights": None}}, "recipe: found has no weights"),
        ({**TWO, "found": {"x": 1}}, "recipe: unknown key x in found"),
        ({**TWO, "version": "1"}, "this recipe has names only, no paths: give its models, a, b"),
        ({"models": ["a"], "version": "1", "vae": "/etc/passwd"},
         "this recipe has names only, no paths: give its models, a and its vae, /etc/passwd"),
        ({**TWO, "version": "1", "asked": {"output": "x"}}, "recipe: unknown key output in asked"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(written, says, here):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(written)
    assert str(caught.value) == says
    if isinstance(written, dict):
        (here / "x.json").write_text(json.dumps(written))
        with pytest.raises(RecipeError) as caught:
            Recipe.load("x.json")
        assert str(caught.value) == f"x.json: {says}"


def test_files_that_hold_no_recipe(here):
    (here / "list.json").write_text("[" * 100_000)
    (here / "long.json").write_text(" " * (1 << 20) + "{}")
    (here / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, says in {
        "list": "is not a recipe: it is not JSON",
        "long": "is too large",
        "binary": "is not JSON",
    }.items():
        with pytest.raises(RecipeError, match=says):
            Recipe.load(f"{name}.json")
    for path, says in {".": "cannot read the recipe .*: ", "nul\0": "cannot read the recipe"}.items():
        with pytest.raises(RecipeError, match=says):
            Recipe.load(path)
    deep = {"models": ["a", "b"]}
    for _ in range(100_000):
        deep = {"models": [deep]}
    with pytest.raises(RecipeError, match="merges within merges, too deep"):
        Recipe.from_dict(deep)
    while isinstance(deep["models"][0], dict):  # taken apart from outside: its end would be as deep
        deep = deep["models"][0]


def test_a_merge_within_a_merge_is_kept(pairs):
    a, b = pairs()
    inner = Merge(a, b, preset="high_res")
    recipe = Merge(a, inner, weights=0.5)
    assert Recipe.from_dict(through_json(recipe.to_dict())) == recipe
    assert recipe.to_dict()["models"][1] == {"models": [str(a), str(b)], "preset": "high_res"}


# -- to the same file ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(pairs, tmp_path_factory):
    """A folder of three models, a VAE and a diffusers folder, thin ones of SD1."""
    home = tmp_path_factory.mktemp("folder of models")
    files = [*pairs(), pairs(seed=1)[1]]
    for letter, path in zip("abc", files, strict=True):
        os.link(path, home / f"{letter}.safetensors")
    third = load_file(files[2])
    save_file({n: t for n, t in third.items() if n.startswith(VAE)}, home / "my.vae.safetensors")
    blockmerge.convert(files[0], home / "folder", naming="diffusers")
    (home / "folder" / "tokenizer").mkdir()
    (home / "folder" / "tokenizer" / "vocab.json").write_text("{}")
    return home


def hold_both_inverses(recipe, home, folder, name="out.safetensors", **given):
    """Run a recipe, the one that was written, and the one in the output's metadata, for the same bytes."""
    results = [
        recipe.run(folder / f"1{name}"),
        Recipe.from_dict(through_json(recipe.to_dict())).run(folder / f"2{name}"),
    ]
    the_same(results[0].output, results[1].output)
    written = of_file(results[0].output)
    assert written == through_json(results[0].recipe)
    again = Recipe.from_dict(written, models=recipe.models, **given)
    results.append(again.run(folder / f"3{name}"))
    the_same(results[0].output, results[2].output)
    assert Recipe.from_dict(through_json(again.to_dict())) == again
    for result in results[1:]:
        assert {**result.to_dict(), "seconds": 0, "output": ""} == {
            **results[0].to_dict(),
            "seconds": 0,
            "output": "",
            "notes": result.to_dict()["notes"],
        }
    text = json.dumps(written)
    assert str(home) not in text
    assert home.name not in text
    return results[0]


@settings(max_examples=many(12))
@given(options(sound=True))
def test_a_recipe_read_back_makes_the_same_file(folders, homes, given_options):
    folder = next(homes)
    folder.mkdir()
    method = METHODS[given_options["method"]]
    count = method.models or method.least
    if given_options.get("vae") == "b" and count == 1:
        del given_options["vae"]
    given_options["allow_nonfinite"] = True
    models = [folders / f"{letter}.safetensors" for letter in "abc"[:count]]
    name = "out" if given_options.get("naming") == "diffusers" else "out.safetensors"
    hold_both_inverses(Recipe(*models, **given_options), folders, folder, name)


@pytest.mark.parametrize(
    "asked",
    [
        {"preset": "high_res", "vae": "my.vae.safetensors"},
        {"preset": ["high_res@0.6", "GRAD_A@0.4"], "changes": "OUT11=random", "seed": 5, "naming": "diffusers", "configs": "folder"},
        {"weights": 0.3, "vae": "folder", "prune": True, "dtype": "bf16"},
        {"weights": "random", "rules": "OUT03-OUT05:attn2:0.8", "adjust": "0,0,0,1", "clip": True},
        {"method": "extract", "count": 3, "weights": 0.5, "preset_beta": "low_res", "gamma": 2.5},
        {"method": "average", "count": 3, "ratios": (2, 1, 1)},
        {"method": "convert", "count": 1, "dtype": "fp32", "naming": "diffusers"},
    ],
)  # fmt: skip
def test_files_that_a_recipe_names_are_given(folders, tmp_path, asked):
    asked = dict(asked)
    models = [folders / f"{letter}.safetensors" for letter in "abc"[: asked.pop("count", 2)]]
    places = {key: folders / asked[key] for key in ("vae", "configs") if key in asked}
    given_options = {**asked, **places}
    if asked.get("method") == "convert":
        del given_options["method"]
        blockmerge.convert(*models, tmp_path / "x", **given_options)
        recipe = Recipe.from_dict(of_file(tmp_path / "x"), models=models)
    else:
        recipe = Recipe(*models, **given_options)
    name = "out" if asked.get("naming") == "diffusers" else "out.safetensors"
    hold_both_inverses(recipe, folders, tmp_path, name, **places)
    written = of_file(tmp_path / f"1{name}")
    for key, place in places.items():
        fewer = {name: path for name, path in places.items() if name != key}
        with pytest.raises(RecipeError, match=f"give its {key}, {place.name}"):
            Recipe.from_dict(written, models=models, **fewer)
    with pytest.raises(RecipeError, match=r"the recipe is one of . models? .*; 4 given"):
        Recipe.from_dict(written, models=["x"] * 4, **places)


def test_options_that_only_other_models_have(pairs, folders, tmp_path):
    """Weights carried over to SDXL, EMA copies as the U-Net, a folder's other weights."""
    sdxl = Recipe(*pairs("sdxl"), preset="COSINE", sdxl_map="resolution")
    by_name = (
        Recipe(*pairs("sdxl"), preset="COSINE", sdxl_map="name").plan(tmp_path / "x.safetensors").summary()
    )
    assert hold_both_inverses(sdxl, folders, tmp_path, "sdxl.safetensors").weights != by_name.weights
    model = small_model()
    save_file(model | ema_of(model), tmp_path / "ema.safetensors")
    ema = Recipe(*[tmp_path / "ema.safetensors"] * 2, weights=0.5, ema="use")
    hold_both_inverses(ema, folders, tmp_path, "used.safetensors")
    variant = tmp_path / "variant"
    for letter, folder in (("b", variant), ("a", tmp_path / "plain")):
        blockmerge.convert(folders / f"{letter}.safetensors", folder, naming="diffusers")
    for file in (tmp_path / "plain").rglob("*.safetensors"):
        place = variant / file.relative_to(tmp_path / "plain")
        file.rename(place.with_suffix(".fp16.safetensors"))
    two = Recipe(variant, folders / "c.safetensors", weights=0.25, variant="fp16", naming="ldm")
    hold_both_inverses(two, folders, tmp_path, "variant.safetensors")
    expected = blockmerge.merge(
        folders / "a.safetensors", folders / "c.safetensors", weights=0.25, output=tmp_path / "e.safetensors"
    )
    found = load_file(tmp_path / "1variant.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in load_file(expected.output).items())


def test_a_preset_that_has_changed_or_is_gone_changes_nothing(folders, here):
    preset = here / "presets" / "mine.toml"
    preset.parent.mkdir()
    preset.write_text('name = "my own+one"\nweights = "IN00-IN05=0.3,OUT05=random"')
    models = [folders / f"{letter}.safetensors" for letter in "ab"]
    recipe = Recipe(*models, preset=f"{preset}@0.5", changes="M00=0.25", seed=4)
    first = recipe.run("1.safetensors")
    assert first.preset == "my own+one@0.5"
    written = of_file(first.output)
    assert str(here) not in json.dumps(written)
    assert written["asked"] == {"preset": ["mine.toml@0.5"], "set": "M00=0.25", "seed": 4}
    again = Recipe.from_dict(written, models=models)
    preset.write_text('name = "other"\nweights = "0.9"')
    the_same(first.output, again.run("2.safetensors").output)
    preset.unlink()
    the_same(first.output, again.run("3.safetensors").output)
    again.dump("again.json")
    the_same(first.output, Recipe.load("again.json").run("4.safetensors").output)
    assert again.plan("5.safetensors").summary().preset == first.preset
    the_same(first.output, recipe.run("6.safetensors").output)  # it has looked the preset up once
    with pytest.raises(blockmerge.PresetError):
        Recipe(*models, preset=f"{preset}@0.5").run("7.safetensors")


def test_what_was_found_is_for_what_was_asked(folders, here):
    models = [folders / f"{letter}.safetensors" for letter in "ab"]
    written = Recipe(*models, preset="high_res", changes="M00=0.25", seed=4).run("1.safetensors").recipe
    asked = Recipe.from_dict(written, models=models).to_dict()
    for edited in ({"preset": "low_res"}, {"set": "M00=0.5"}, {"weights": 0.5, "preset": None}, {"seed": 5}):
        with pytest.raises(
            RecipeError, match=r"^recipe: its found are the weights of other .*: remove found"
        ):
            Recipe.from_dict({**asked, **edited})
        free = {key: value for key, value in {**asked, **edited}.items() if key != "found"}
        Recipe.from_dict(free)
    with pytest.raises(RecipeError, match="remove found"):
        Recipe.from_dict(
            {"models": ["a", "b"], "preset": "high_res", "found": {"weights": written["weights"]}}
        )
    first, last = list(written["weights"])[:2]
    for weights in ({}, {first: 0.5}, {**written["weights"], "D00": 0.5}):
        broken = Recipe.from_dict({**written, "weights": weights}, models=models)
        with pytest.raises(blockmerge.WeightsError, match=rf"found for {len(weights)} blocks?.* have 26"):
            broken.run("2.safetensors")
    for weight in ("random", "0.5", True):
        with pytest.raises(
            RecipeError, match=rf"^recipe: {last} was found to be {weight}, which is not a number"
        ):
            Recipe.from_dict({**written, "weights": {**written["weights"], last: weight}}, models=models)
    with pytest.raises(RecipeError, match=r"^recipe: unknown key later, written by version 9\.9; this is "):
        Recipe.from_dict({**written, "version": "9.9", "later": 1}, models=models)


@pytest.mark.parametrize(("family", "other"), [("sd1", "sdxl"), ("sdxl", "sd1")])
def test_what_was_found_for_a_family_is_not_for_another(pairs, here, family, other):
    written = Recipe(*pairs(family), weights=0.5).run("1.safetensors").recipe
    with pytest.raises(blockmerge.WeightsError, match="is for models of that file's family"):
        Recipe.from_dict(written, models=pairs(other)).run("2.safetensors")
    assert [path.name for path in here.iterdir()] == ["1.safetensors"]


@pytest.mark.parametrize("vae", [0, 1, 2, -1, True, False, 1.5, b"a", ["a"]])
def test_a_vae_that_is_no_model(folders, here, vae):
    models = [folders / f"{letter}.safetensors" for letter in "ab"]
    says = rf"vae \(--vae\) is a {type(vae).__name__}, which is not a model"
    with pytest.raises(RecipeError, match=says):
        blockmerge.merge(*models, weights=0.5, vae=vae, output="out.safetensors")
    with pytest.raises(RecipeError, match=says):
        blockmerge.convert(models[0], "out.safetensors", vae=vae)
    with pytest.raises(RecipeError, match="unknown VAE choice"):
        blockmerge.merge_state_dicts(*map(load_file, models), weights=0.5, vae=vae)
    written = Recipe(*models, weights=0.5).to_dict()
    with pytest.raises(RecipeError, match=says):
        Recipe.from_dict(written, vae=vae)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["b", "auto", "blend"])
def test_an_opened_vae_is_told_from_a_word(folders, here, name):
    os.link(folders / "my.vae.safetensors", name)
    models = [str(folders / f"{letter}.safetensors") for letter in "ab"]
    for vae in (blockmerge.open_checkpoint(name), Path(name)):
        recipe = Recipe(*models, weights=0.5, vae=vae)
        assert recipe.to_dict()["vae"] == os.path.join(".", name)
        assert Recipe.from_dict(recipe.to_dict()).plan("out.safetensors").summary().tensors.from_vae == 248


def test_arguments_that_are_something_else(folders, here):
    models = [folders / f"{letter}.safetensors" for letter in "ab"]
    dicts = [load_file(path) for path in models]
    written = Recipe(*models, weights=0.5).to_dict()
    for changes in (3, ["BASE=1"], b"x"):
        for merge in (blockmerge.merge, Recipe):
            with pytest.raises(
                blockmerge.WeightsError, match=rf"^changes \(--set\) .*{type(changes).__name__} given"
            ):
                merge(
                    *models, weights=0.5, changes=changes, **({"output": "o"} if merge is not Recipe else {})
                )
    recipe = Recipe(*models, weights=0.5, changes={"BASE": 1})
    assert Recipe.from_dict(through_json(recipe.to_dict())) == recipe
    for given_models, what in (("ab", "str"), (3, "int"), (dict.fromkeys("ab"), "dict")):
        with pytest.raises(RecipeError, match=rf"^models are a list of them, A first; {what} given"):
            Recipe.from_dict(written, models=given_models)
    with pytest.raises(RecipeError, match=r"^methods are functions by their names"):
        Recipe.from_dict(written, methods=3)
    for path in (None, 3, True):
        with pytest.raises(RecipeError, match=r"^a recipe's file is a path"):
            recipe.dump(path)
        with pytest.raises(RecipeError, match=r"^a recipe's file is a path"):
            Recipe.load(path)
    with pytest.raises(RecipeError, match=r"a\.safetensors is too large for a recipe: .*Recipe\.from_dict"):
        Recipe.load(models[0])
    with pytest.raises(RecipeError, match=r"^model 1 is a bytes, and a recipe"):
        Recipe(b"a", "b", weights=0.5).to_dict()
    in_memory = Recipe.from_dict({"weights": 0.25}, models=dicts).run("out.safetensors")
    the_same(in_memory.output, Recipe(*dicts, weights=0.25).run("two.safetensors").output)


def test_ratios_are_kept_in_full(folders, here):
    models = [folders / f"{letter}.safetensors" for letter in "ab"]
    result = Recipe(*models, preset=["HIGH-RES@0.123456789", "low_res"]).run("1.safetensors")
    assert result.recipe["asked"] == {"preset": ["high_res@0.123456789", "low_res"]}
    assert result.recipe["preset"] == "high_res@0.123457+low_res"


def test_recipes_of_earlier_versions_are_read(folders, here):
    """They have no `asked`, `vae_file`, `naming`, `variant`, `configs` and `files`."""
    models = [folders / f"{letter}.safetensors" for letter in "ab"]
    vae = folders / "my.vae.safetensors"
    first = Recipe(*models, preset="high_res", changes="M00=skip", vae=vae, dtype="bf16").run("1.safetensors")
    late = ("asked", "vae_file", "naming", "variant", "configs", "files")
    early = {key: value for key, value in of_file(first.output).items() if key not in late}
    assert set(early) == {
        "version", "method", "models", "preset", "weights", "weights_beta", "numbers", "rules", "adjust", "clip", "vae",
        "dtype", "ema", "prune", "allow_nonfinite",
    }  # fmt: skip
    second = Recipe.from_dict(early, models=models, vae=vae).run("2.safetensors")
    ours, theirs = load_file(first.output), load_file(second.output)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (second.preset, second.weights) == (first.preset, first.weights)
    with pytest.raises(RecipeError, match=r"give its vae, my\.vae\.safetensors$"):
        Recipe.from_dict(early, models=models)


def test_no_code_is_run_because_a_recipe_names_it(folders, here, monkeypatch):
    name = f"own_of_recipe_{os.getpid()}_{threading.get_ident()}"
    (here / f"{name}.py").write_text(
        "import blockmerge\n\n@blockmerge.merge_method\ndef mine(a, b, *, alpha, share=1.0):\n    return a + alpha * share * (b - a)\n"
    )
    models = [folders / f"{letter}.safetensors" for letter in "ab"]
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    first = Recipe(*models, weights=0.5, method=f"{name}:mine", share=0.5).run("1.safetensors")
    recipe = Recipe(*models, weights=0.5, method=f"{name}:mine", share=0.5)
    function = sys.modules.pop(name).mine
    for written, given_models in ((recipe.to_dict(), None), (of_file(first.output), models)):
        assert written["method"] == f"{name}:mine"
        with pytest.raises(
            RecipeError, match=f"^the recipe's method {name}:mine is .* no code is run because"
        ):
            Recipe.from_dict(written, models=given_models)
        assert name not in sys.modules
        again = Recipe.from_dict(written, models=given_models, methods={f"{name}:mine": function})
        the_same(first.output, again.run("2.safetensors", overwrite=True).output)
        assert name not in sys.modules
        with pytest.raises(RecipeError, match=r"the recipe's method is .*:mine; ties given for it"):
            Recipe.from_dict(written, models=given_models, methods={f"{name}:mine": METHODS["ties"]})


def test_a_plan_says_what_its_run_does(folders, here):
    recipe = Merge(folders / "a.safetensors", folders / "b.safetensors", preset="high_res")
    plan = recipe.plan("out.safetensors", threads=1)
    summary = plan.summary()
    assert list(here.iterdir()) == []
    seen = []
    result = plan.run(progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (result.bytes, result.bytes)
    changed = {"seconds": 0, "dry_run": False}
    assert {**summary.to_dict(), **changed} == {**result.to_dict(), **changed}
    assert summary.dry_run
    assert through_json(result.to_dict())["recipe"] == result.recipe
    assert recipe.run("other.safetensors", dry_run=True).dry_run
    with pytest.raises(OutputError, match=r"^out\.safetensors exists: give another name"):
        plan.run()
    direct = blockmerge.merge(*recipe.models, preset="high_res", output="direct.safetensors")
    the_same(result.output, direct.output)


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(folders, here):
    a, b = folders / "a.safetensors", folders / "b.safetensors"
    lora = {f"lora_unet_mid_block_attentions_0_proj_in.lora_{part}.weight": torch.zeros(shape) for part, shape in
            {"down": (2, 32, 1, 1), "up": (32, 2, 1, 1)}.items()}  # fmt: skip
    calls = {
        "merge": lambda **options: blockmerge.merge(a, b, weights=0.5, **options),
        "bake": lambda **options: blockmerge.bake(a, [lora], **options),
        "convert": lambda **options: blockmerge.convert(a, **options),
        "again": lambda **options: blockmerge.again(
            "merge.safetensors", models=[folders], changes=["M00=1"], **options
        ),
    }
    for name, call in calls.items():
        output = f"{name}.safetensors"
        before = snapshot(here)
        planned = call(output=output, dry_run=True)
        assert snapshot(here) == before, name
        assert planned.dry_run
        assert not planned.output.exists()
        with pytest.raises(RecipeError, match=r"^dry_run is True or False; str given$"):
            call(output=output, dry_run="no")
        done = call(output=output)
        assert not done.dry_run
        assert planned.bytes == done.bytes == done.output.stat().st_size
        assert planned.weights == done.weights
        with pytest.raises(OutputError, match="exists"):
            call(output=output)
        before = snapshot(here)
        there = f"{output} exists: give another name, or overwrite (--overwrite)"
        assert call(output=output, dry_run=True).notes == (*planned.notes, there)
        replaced = call(output=output, dry_run=True, overwrite=True)
        assert replaced.notes == (*planned.notes, f"{output} exists: it would be replaced")
        assert snapshot(here) == before


# -- the choice of a VAE -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vae", "models", "means"),
    [
        ("a", 1, 0), ("b", 1, "b"), ("b", 2, 1), ("c", 2, "c"), ("c", 3, 2), ("z", 26, 25), ("z", 100, 25), ("{", 100, "{"),
        ("ab", 2, "ab"), ("bc", 3, "bc"), ("abc", 3, "abc"), ("A", 2, "A"), ("auto", 2, "auto"), ("blend", 2, "blend"), ("./a", 2, "./a"),
    ],
)  # fmt: skip
def test_what_a_choice_of_vae_means(vae, models, means):
    found = vae_choice(vae, models)
    assert (type(found), found) == (type(means), means)


def test_a_vae_in_a_folder_of_letters(folders, here):
    models = [folders / f"{letter}.safetensors" for letter in "ab"]
    blockmerge.convert(folders / "c.safetensors", "ab", naming="diffusers")
    os.link(folders / "my.vae.safetensors", "c")
    os.link(folders / "my.vae.safetensors", "a")
    wanted = load_file(folders / "my.vae.safetensors")
    third = [*models, folders / "b.safetensors"]
    os.rename("ab", "bc")
    for given_models, vae, method in (
        (third, "bc", "add_difference"),
        (models, "c", "weighted_sum"),
        (models, here / "a", "slerp"),
        (models, "./a", "dare"),
    ):
        out = blockmerge.merge(
            *given_models, weights=0.5, vae=vae, method=method, output="out.safetensors", overwrite=True
        )
        found = load_file(out.output)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert out.tensors.from_vae == len(wanted)
    os.chdir(here)
    for vae in (type(here)("a"), "a"):
        out = blockmerge.merge(*models, weights=0.5, vae=vae, output="out.safetensors", overwrite=True)
        assert out.tensors.from_vae == (0 if vae == "a" else len(wanted))


@pytest.mark.parametrize("run", ["merge", "convert"])
def test_a_vae_that_is_nothing_or_not_there(folders, here, run):
    models = [folders / f"{letter}.safetensors" for letter in "ab"[: 2 if run == "merge" else 1]]
    asked = {"weights": 0.5} if run == "merge" else {}
    letters = "auto, a, b, blend, " if run == "merge" else ""
    with pytest.raises(RecipeError, match=rf"^vae \(--vae\) is empty: it takes {letters}a file or a folder$"):
        getattr(blockmerge, run)(*models, **asked, vae="", output="out.safetensors")
    with pytest.raises(
        blockmerge.CheckpointError, match=r"ab: no such file.*vae \(--vae\) takes .*a file or a folder"
    ):
        getattr(blockmerge, run)(*models, **asked, vae="ab", output="out.safetensors")
    assert list(here.iterdir()) == []

"""Recipes of several stages: held against the commands that they stand for, and against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import Merge
from blockmerge.errors import BlockmergeError, RecipeError
from blockmerge.methods import METHODS
from tests import method_oracle, oracle
from tests.effort import many
from tests.small_models import small_model, write_folder
from tests.thin_loras import make_lora

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """{family: files of it, of several dtypes and namings}; each is the first plus a difference."""
    folder = tmp_path_factory.mktemp("leaves")
    found = {}
    for family in ("sd1", "sdxl"):
        base = small_model(family, torch.float32)
        found[family] = []
        for number in range(6):
            other = small_model(family, torch.float32, seed=number)
            model = {
                name: tensor + 0.1 * other[name] if tensor.is_floating_point() else tensor
                for name, tensor in base.items()
            }
            dtype = DTYPES[0] if number < 3 else DTYPES[number - 3]
            path = folder / f"{family}-{number}.safetensors"
            save_file({n: t.to(dtype) if t.is_floating_point() else t for n, t in model.items()}, path)
            found[family].append(path)
        # A LoRA for the layers that these small models have, too.
        found[family].append(make_lora(folder / f"{family}-lora.safetensors", family, rank=2, scale=0.3))
    return found


def methods():
    """Every built-in method, with how it may be asked for."""
    return sorted(name for name, method in METHODS.items() if method.weights)


@st.composite
def trees(draw, count, depth=3):
    """A merge of files 0 … count - 1, and of merges: (method, models, options)."""
    method = METHODS[draw(st.sampled_from(methods()))]
    models = []
    wanted = method.models or draw(st.integers(2, 3))
    for _ in range(wanted):
        if depth > 1 and draw(st.integers(0, 2)) == 0:
            models.append(draw(trees(count, depth - 1)))
        else:
            models.append(draw(st.integers(0, count - 1)))
    options = {"method": method.name}
    if "alpha" in method.weights:
        options["weights"] = draw(
            st.sampled_from([0.5, 0.25, 1, 0, "BASE=0.25,IN00-IN05=1,OUT03=0.5,M00=skip"])
        )
    if "beta" in method.weights:
        options["weights_beta"] = draw(st.sampled_from([0.5, 0]))
    if method.models != 1:
        options["vae"] = draw(st.sampled_from(["auto", "a", "blend"]))
    if draw(st.booleans()):
        options["rules"] = "BASE:attn:0.75"
    if method.random:
        options["seed"] = draw(st.integers(0, 3))
    if draw(st.integers(0, 3)) == 0:
        options["loras"] = [("lora", draw(st.sampled_from([0.75, -0.5])))]
        options["partial"] = True
    return method.name, models, options


def with_files(options, files):
    """The options of a merge with the LoRA's file for its name."""
    loras = [(files[-1], strength) for _, strength in options.get("loras", ())]
    return {**options, **({"loras": loras} if loras else {})}


def recipe_of(tree, files, **result):
    _, models, options = tree
    given = [files[one] if isinstance(one, int) else recipe_of(one, files) for one in models]
    return Merge(*given, **with_files(options, files), **result)


def by_commands(tree, files, folder, output=None):
    """The same by a command for each merge, each written to a file."""
    _, models, options = tree
    given = [files[one] if isinstance(one, int) else by_commands(one, files, folder) for one in models]
    output = output or folder / f"stage{len(list(folder.iterdir()))}.safetensors"
    blockmerge.merge(*given, **with_files(options, files), output=output)
    return output


@settings(deadline=None, max_examples=many(25), suppress_health_check=list(HealthCheck))
@given(tree=trees(6), family=st.sampled_from(["sd1", "sdxl"]))
def test_rounded_each_is_the_separate_commands_bit_for_bit(leaves, tmp_path_factory, tree, family):
    folder = tmp_path_factory.mktemp("each")
    files = leaves[family]
    try:
        separate = by_commands(tree, files, folder)
    except BlockmergeError as error:
        with pytest.raises(type(error)):
            recipe_of(tree, files, rounding="each").run(folder / "out.safetensors")
        return
    recipe_of(tree, files, rounding="each").run(folder / "out.safetensors")
    expected, got = load_file(separate), load_file(folder / "out.safetensors")
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == got[name].dtype, name
        assert torch.equal(oracle.bits(tensor), oracle.bits(got[name])), name


IN_FLOAT64 = [
    "weighted_sum", "sigmoid", "inverse_sigmoid", "scale", "add_difference", "triple_sum", "sum_twice",
    "average",
]  # fmt: skip
"""Methods that are smooth: one rounding more or less changes the result by about as much."""


@st.composite
def smooth_trees(draw, count, depth=3):
    name = draw(st.sampled_from(IN_FLOAT64))
    method = METHODS[name]
    models = [
        draw(smooth_trees(count, depth - 1))
        if depth > 1 and draw(st.booleans())
        else draw(st.integers(0, count - 1))
        for _ in range(method.models or draw(st.integers(2, 4)))
    ]
    weights = {weight: draw(st.floats(-0.5, 1.5).map(lambda x: round(x, 3))) for weight in method.weights}
    options = {"method": name, "weights": weights["alpha"]}
    if "beta" in weights:
        options["weights_beta"] = weights["beta"]
    return name, models, options


def in_float64(tree, tensors):
    """One tensor of a tree, and the largest values that were met on the way."""
    if isinstance(tree, int):
        return tensors[tree], np.abs(tensors[tree])
    name, models, options = tree
    arrays, sizes = zip(*(in_float64(one, tensors) for one in models), strict=True)
    weights = {"alpha": options["weights"]}
    if "weights_beta" in options:
        weights["beta"] = options["weights_beta"]
    with np.errstate(all="ignore"):
        made = getattr(method_oracle, name)(*arrays, **weights)
    return made, np.max([np.abs(made), *sizes], axis=0)


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(tree=smooth_trees(6), dtype=st.sampled_from(["keep", "fp16", "bf16", "fp32"]))
def test_a_recipe_is_its_tree_in_float64_rounded_once(leaves, tmp_path_factory, tree, dtype):
    files = leaves["sd1"]
    output = tmp_path_factory.mktemp("end") / "out.safetensors"
    recipe_of(tree, files, dtype=dtype).run(output)
    loaded, got = [load_file(file) for file in files[:-1]], load_file(output)
    for name, tensor in got.items():
        if not tensor.is_floating_point() or name.startswith("first_stage_model."):
            continue  # each stage decides whose VAE it takes
        exact, sizes = in_float64(tree, [model[name].double().numpy() for model in loaded])
        error = (tensor.double() - torch.from_numpy(exact)).abs()
        # Half a step of the result, and what float32 itself costs where values cancel.
        allowed = oracle.step_at(torch.from_numpy(exact), tensor.dtype) + 2.0**-20 * torch.from_numpy(
            sizes
        ) * (tensor.dtype != torch.float32)
        assert (error <= allowed).all(), (name, error.max())


def test_the_dtype_is_as_a_file_of_each_stage_would_have_it(leaves, tmp_path):
    half, single = leaves["sd1"][0], leaves["sd1"][5]
    inner = Merge(half, single, weights=0.5)
    Merge(single, inner, weights=0.5).run(tmp_path / "single.safetensors")
    Merge(inner, single, weights=0.5).run(tmp_path / "half.safetensors")
    kinds = {
        file: {tensor.dtype for tensor in load_file(tmp_path / file).values() if tensor.is_floating_point()}
        for file in ("single.safetensors", "half.safetensors")
    }
    assert kinds == {"single.safetensors": {torch.float32}, "half.safetensors": {torch.float16}}


def test_a_stage_of_weight_0_or_1_is_its_model_and_the_others_are_not_read(leaves, tmp_path):
    a, b, c = leaves["sd1"][:3]
    cut = tmp_path / "cut.safetensors"  # whose header is whole, and whose values are not numbers
    tensors = load_file(b)
    save_file({n: t * float("nan") if t.is_floating_point() else t for n, t in tensors.items()}, cut)
    stage = Merge(a, cut, weights=0)
    Merge(stage, c, weights=0.25).run(tmp_path / "staged.safetensors")
    blockmerge.merge(a, c, weights=0.25, output=tmp_path / "flat.safetensors")
    staged, flat = (load_file(tmp_path / f"{name}.safetensors") for name in ("staged", "flat"))
    assert all(torch.equal(oracle.bits(staged[name]), oracle.bits(flat[name])) for name in flat)


def test_a_bake_or_a_merge_of_one_stage_is_that_merge(leaves, tmp_path):
    a, b = leaves["sd1"][:2]
    stage = Merge(a, b, preset="high_res")
    Merge(stage, a, weights=0, vae="a").run(tmp_path / "staged.safetensors")
    blockmerge.merge(a, b, preset="high_res", output=tmp_path / "flat.safetensors")
    staged, flat = (load_file(tmp_path / f"{name}.safetensors") for name in ("staged", "flat"))
    assert all(torch.equal(oracle.bits(staged[name]), oracle.bits(flat[name])) for name in flat)


@pytest.mark.parametrize("rounding", ["end", "each"])
def test_folders_and_files_as_leaves_give_the_same_values(tmp_path, rounding):
    models = [small_model("sd1", seed=seed, for_a_folder=True) for seed in range(3)]
    files, folders = [], []
    for number, model in enumerate(models):
        files.append(tmp_path / f"{number}.safetensors")
        save_file(model, files[-1])
        folders.append(write_folder(tmp_path / f"folder{number}", model, "sd1"))
    for name, models in (("files", files), ("folders", folders)):
        stage = Merge(models[0], models[1], preset="high_res")
        recipe = Merge(stage, models[2], method="slerp", weights=0.3, naming="ldm", rounding=rounding)
        recipe.run(tmp_path / f"{name}.safetensors")
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("files", "folders"))
    assert one.keys() == other.keys()
    assert all(torch.equal(oracle.bits(one[name]), oracle.bits(other[name])) for name in one)


@pytest.mark.parametrize(
    ("option", "value"),
    [("dtype", "fp16"), ("naming", "ldm"), ("prune", True), ("allow_nonfinite", True), ("rounding", "each")],
)
def test_what_only_a_result_has_is_refused_in_a_stage(leaves, tmp_path, option, value):
    a, b = leaves["sd1"][:2]
    stage = Merge(a, b, weights=0.5, **{option: value})
    with pytest.raises(RecipeError, match=r"stage stage1: \w+ of a stage: only the result is written"):
        Merge(stage, a, weights=0.5).run(tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_stage_is_named_by_what_is_wrong_in_it(leaves, tmp_path):
    sd1, sdxl = leaves["sd1"][0], leaves["sdxl"][0]
    with pytest.raises(BlockmergeError, match=r"^stage stage1: sd1-0.safetensors is .* only models of one"):
        Merge(Merge(sd1, sdxl, weights=0.5), sd1, weights=0.5).run(tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


def test_trees_that_are_too_large_are_refused_at_once(leaves, tmp_path):
    a, b = leaves["sd1"][:2]
    doubling = Merge(a, b, weights=0.5)
    for _ in range(30):
        doubling = Merge(doubling, doubling, weights=0.5)
    with pytest.raises(RecipeError, match="and 1000 are the most"):
        doubling.run(tmp_path / "out.safetensors")
    deep = Merge(a, b, weights=0.5)
    for _ in range(10_000):
        deep = Merge(deep, a, weights=0.5)
    with pytest.raises(RecipeError, match="more than 40 stages in one another"):
        deep.run(tmp_path / "out.safetensors")
    chain = Merge(a, b, weights=0.5)
    for _ in range(38):
        chain = Merge(chain, b, weights=0.5)
    chain.run(tmp_path / "out.safetensors")


def test_a_lora_in_a_stage_is_added_as_its_own_command_adds_it(leaves, tmp_path):
    *_, single, lora = leaves["sd1"]  # float32, where another order of sums is other bits
    inner = {"method": "bake", "loras": [(lora, 0.7)], "partial": True}
    Merge(Merge(single, **inner), single, weights=0.25, rounding="each").run(tmp_path / "staged.safetensors")
    blockmerge.bake(single, [(lora, 0.7)], partial=True, output=tmp_path / "baked.safetensors")
    blockmerge.merge(
        tmp_path / "baked.safetensors", single, weights=0.25, output=tmp_path / "two.safetensors"
    )
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("staged", "two"))
    assert all(torch.equal(oracle.bits(one[name]), oracle.bits(two[name])) for name in two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_quantised_model_in_a_stage_does_not_make_the_result_bfloat16(tmp_path, dtype):
    model = small_model("sd1", dtype)
    save_file(model, tmp_path / "a.safetensors")
    scaled = {**model, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name in [name for name in model if name.endswith(".weight") and model[name].dim() == 2]:
        scaled[name] = model[name].to(torch.float8_e4m3fn)
        scaled[f"{name.removesuffix('weight')}scale_weight"] = torch.tensor(1.0)
    save_file(scaled, tmp_path / "b.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for rounding in ("end", "each"):
        recipe = Merge(Merge(a, b, weights=0.5), a, weights=0.25, rounding=rounding)
        recipe.run(tmp_path / "out.safetensors", overwrite=True)
        found = load_file(tmp_path / "out.safetensors")
        assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {dtype}


def test_ema_copies_are_of_the_result_alone(leaves, tmp_path):
    a, b = leaves["sd1"][:2]
    with pytest.raises(RecipeError, match="ema='keep' of a stage"):
        Merge(Merge(a, b, weights=0.5, ema="keep"), a, weights=0.5).run(tmp_path / "out.safetensors")
    with pytest.raises(BlockmergeError, match="no EMA copies to use"):
        Merge(Merge(a, b, weights=0.5), a, weights=0.5, ema="use").run(tmp_path / "out.safetensors")


def test_stages_of_one_name_are_told_apart(leaves, tmp_path):
    a, b = leaves["sd1"][:2]
    inner = Merge(Merge(a, b, weights=0.5).named("x"), b, weights=0.5).named("x")
    Merge(Merge(inner, b, weights=0.5).named("x_"), a, weights=0.25).run(tmp_path / "out.safetensors")
    assert blockmerge.verify(tmp_path / "out.safetensors", models=[a.parent]).same


def test_a_model_that_is_given_twice_is_counted_once(leaves, tmp_path):
    a, b = leaves["sd1"][:2]
    counts = Merge(a, a, weights=0, vae="b").run(tmp_path / "out.safetensors").tensors
    assert min(counts.computed, counts.from_a, counts.from_b, counts.from_vae) >= 0
    assert counts.from_a + counts.from_b + counts.computed == counts.written


def test_what_is_made_of_a_stage_is_not_called_as_its_a(leaves, tmp_path):
    a, b = leaves["sd1"][:2]
    save_file(load_file(a), tmp_path / "famous.safetensors", {"modelspec.title": "Famous", "format": "pt"})
    recipe = Merge(Merge(tmp_path / "famous.safetensors", b, weights=0.5), method="convert", dtype="bf16")
    recipe.run(tmp_path / "out.safetensors")
    assert "modelspec.title" not in blockmerge.open_checkpoint(tmp_path / "out.safetensors").metadata


def test_the_vae_is_said_once_with_the_file_that_it_is_from(leaves, tmp_path):
    a, b, *_ = leaves["sd1"]
    output = tmp_path / "out.safetensors"

    def said(**options):
        inner = Merge(a, b, weights=0.9, **options)
        outer = Merge(Merge(inner, a, weights=0.2), a, weights=0.3)
        notes = [note for note in outer.plan(output).summary().notes if "the VAE is " in note]
        outer.run(output, overwrite=True)
        found = load_file(output)
        [vae] = {
            path.name
            for path in (a, b)
            if all(
                torch.equal(tensor.to(found[name].dtype), found[name])
                for name, tensor in load_file(path).items()
                if name.startswith("first_stage_model.")
            )
        } or {"stage2"}
        return notes, f"the VAE is taken whole from {vae} (merge --vae blend would blend it)"

    for options in ({}, {"vae": "a"}, {"vae": "blend"}):
        notes, whole = said(**options)
        assert notes == [whole], options

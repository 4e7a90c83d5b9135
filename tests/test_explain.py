"""Where merges come from: merges made by an independent oracle (float64, rounded once) or in the way of other
tools.

Over 500 lines: all merges that are explained are made by one oracle.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import FAMILIES, block_of, component_of
from blockmerge.demo import make_state_dicts
from blockmerge.weights import find_preset
from tests.every_pair import every_pair
from tests.refusals import assert_refused

BLOCKS = {name: family.blocks for name, family in FAMILIES.items()}
SD_BLOCKS = BLOCKS["sd1"]
SIGNS = re.compile(
    r"input_blocks\.(0\.0|1\.1\.proj_in|4\.1\.proj_in)|middle_block\.1\.proj_in|label_emb|attn2\.to_k|out\.2"
)
CONV = "model.diffusion_model.input_blocks.4.1.proj_in.weight"


def cast(model, dtype):
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model.items()
    }


@cache
def base_of(family):
    """A thin model with every fourth tensor of a block, and what tells the family: enough numbers to tell a
    weight by.
    """
    seen, kept = Counter(), {}
    for name, tensor in make_state_dicts(family)[0].items():
        place = component_of(name), block_of(name, family)
        if seen[place] % 4 == 0 or SIGNS.search(name):
            kept[name] = tensor
        seen[place] += 1
    return kept


@cache
def relative(family, difference, number):
    return tuned(base_of(family), difference, seed=number)


def relatives(count, difference=0.05, family="sd1", dtype=torch.float16):
    """A model and `count - 1` fine-tunes of it, named a, b, c, …"""
    models = {"a": base_of(family)}
    for number, name in enumerate("bcdefghij"[: count - 1]):
        models[name] = relative(family, difference, number)
    return {name: cast(model, dtype) for name, model in models.items()}


def tuned(model, difference, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (
            t.float() + difference * t.float().std(correction=0) * torch.randn(t.shape, generator=generator)
        ).to(t.dtype)
        if t.is_floating_point()
        else t
        for name, t in model.items()
    }


def mixed(models, shares, family="sd1"):
    """Σ share·model with shares by block (VAE: "VAE"), in float64, rounded once to the first model's
    dtype.
    """
    first, *_ = models.values()
    made = {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            made[name] = tensor
            continue
        of = shares["VAE" if component_of(name) == "vae" else block_of(name, family)]
        made[name] = sum(share * models[m][name].double() for m, share in of.items()).to(tensor.dtype)
    return made


def random_shares(names, seed, family="sd1"):
    """Random weights of all models but the first for every block; the VAE is the first model's."""
    numbers = np.random.default_rng(seed)
    base, *others = names
    shares = {}
    for block in BLOCKS[family]:
        weights = numbers.random(len(others)) / len(others)
        shares[block] = {base: 1 - weights.sum(), **dict(zip(others, weights, strict=True))}
    return {**shares, "VAE": {base: 1.0}}


def preset_shares(preset, family="sd1", ratio=1.0):
    weights = find_preset(preset).weights_for(family)
    return {
        **{block: {"a": 1 - ratio * w, "b": ratio * w} for block, w in weights.items()},
        "VAE": {"a": 1.0},
    }


def explain(tmp_path, merge, candidates, **options):
    paths = []
    for name, model in {"merge": merge, **candidates}.items():
        paths.append(tmp_path / f"{name}.safetensors")
        save_file({n: t.contiguous() for n, t in model.items()}, paths[-1])
    return blockmerge.explain(paths[0], paths[1:], **options)


def letters(found):
    return tuple(name.removesuffix(".safetensors") for name in found.parents)


def assert_weights(found, shares, within):
    assert sum(origin.determined for origin in found.blocks.values()) > len(found.blocks) / 2
    for block, origin in found.blocks.items():
        if not origin.determined:
            continue
        for name, weight in origin.weights.items():
            error = abs(weight - shares[block].get(name.removesuffix(".safetensors"), 0.0))
            assert error <= (origin.uncertainty if within is None else within), (
                block,
                name,
                weight,
                shares[block],
            )


@pytest.mark.parametrize(
    ("family", "parents", "difference"), every_pair(["sd1", "sd2", "sdxl"], [2, 3, 4], [0.05, 0.01, 0.002])
)
def test_weights_are_recovered(tmp_path, family, parents, difference):
    models = relatives(parents, difference, family)
    shares = random_shares(list(models), seed=parents, family=family)
    found = explain(tmp_path, mixed(models, shares, family), models)
    assert letters(found) == tuple(models)
    assert found.method == {2: "weighted_sum", 3: "triple_sum", 4: "linear"}[parents]
    assert found.exact
    assert all(origin.determined and origin.explained for origin in found.blocks.values())
    assert_weights(found, shares, 0.005 if difference == 0.05 else None)
    assert_weights(found, shares, None)
    assert found.components["vae"].weights[found.candidates[1]] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes(tmp_path, dtype):
    models = relatives(2, dtype=dtype)
    shares = random_shares(list(models), seed=5)
    found = explain(tmp_path, mixed(models, shares), models)
    assert found.exact
    assert_weights(found, shares, None)


PRESETS = ["high_res", "low_res", "GRAD_V", "GRAD_A", "WRAP12", "MID12_50", "OUT07", "RING08_SOFT", "COSINE", "SMOOTHSTEP", "TRUE_CUBIC_HERMITE", "FLAT_25", "RING10_3"]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_named(tmp_path, preset):
    models = relatives(3)
    found = explain(tmp_path, mixed(models, preset_shares(preset)), models)
    assert (found.preset, found.base, letters(found), found.exact) == (
        preset,
        "a.safetensors",
        ("a", "b"),
        True,
    )
    assert_weights(found, preset_shares(preset), 1e-9)  # the preset's own numbers


@pytest.mark.parametrize("preset", ["high_res", "low_res"])
def test_presets_of_sdxl(tmp_path, preset):
    models = relatives(2, family="sdxl")
    found = explain(tmp_path, mixed(models, preset_shares(preset, "sdxl"), "sdxl"), models)
    assert (found.preset, found.exact) == (preset, True)


def test_a_scaled_preset(tmp_path):
    models = relatives(2)
    assert explain(tmp_path, mixed(models, preset_shares("GRAD_V", ratio=0.6)), models).preset == "GRAD_V@0.6"


def test_a_preset_with_its_own_base(tmp_path):
    models = relatives(2)
    shares = {**preset_shares("high_res"), "BASE": {"a": 0.3, "b": 0.7}, "VAE": {"b": 1.0}}
    found = explain(tmp_path, mixed(models, shares), models)
    assert (found.preset, found.exact) == ("high_res", True)
    assert found.blocks["BASE"].weights == {"b.safetensors": pytest.approx(0.7, abs=1e-9)}
    assert found.components["vae"].weights == {"b.safetensors": 1}


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.4])
def test_add_difference(tmp_path, alpha):
    models = relatives(4)
    shares = {block: {"c": 1.0, "b": alpha, "a": -alpha} for block in SD_BLOCKS}
    found = explain(tmp_path, mixed(models, {**shares, "VAE": {"c": 1.0}}), models)
    assert (found.method, found.base, set(letters(found))) == (
        "add_difference",
        "c.safetensors",
        {"a", "b", "c"},
    )
    assert found.exact
    assert_weights(found, shares, 1e-6)


def test_a_full_difference_has_two_bases(tmp_path):
    """c + (b − a) is b + (c − a): either may be called the base."""
    models = relatives(3)
    found = explain(
        tmp_path,
        mixed(models, {block: {"c": 1.0, "b": 1.0, "a": -1.0} for block in (*SD_BLOCKS, "VAE")}),
        models,
    )
    assert (found.method, found.exact) == ("add_difference", True)
    assert found.base in ("b.safetensors", "c.safetensors")
    assert found.blocks["IN04"].weights["a.safetensors"] == -1


def test_two_of_six(tmp_path):
    models = relatives(6)
    shares = random_shares(["b", "e"], seed=9)
    found = explain(tmp_path, mixed(models, shares), models)
    assert set(letters(found)) == {"b", "e"}
    assert found.exact


@pytest.mark.parametrize("order", ["a b ab", "ab b a"])
def test_true_parents_before_a_merge_of_them(tmp_path, order):
    models = relatives(2)
    models["ab"] = mixed(models, {block: {"a": 0.5, "b": 0.5} for block in (*SD_BLOCKS, "VAE")})
    shares = preset_shares("high_res")
    found = explain(tmp_path, mixed(models, shares), {name: models[name] for name in order.split()})
    assert set(letters(found)) == {"a", "b"}
    assert (found.preset, found.exact) == ("high_res", True)


def test_a_fine_tune_is_no_merge(tmp_path):
    models = relatives(4)
    found = explain(tmp_path, tuned(models["b"], 0.02, seed=77), models)
    assert (found.method, found.parents, found.exact, found.preset) == (None, (), False, None)
    assert found.base == "b.safetensors"  # the nearest
    assert "not, or not only, a merge of these" in found.verdict


def test_a_missing_parent(tmp_path):
    models = relatives(4)
    made = mixed(models, {block: {"a": 0.6, "b": 0.3, "c": 0.1} for block in (*SD_BLOCKS, "VAE")})
    del models["c"]
    found = explain(tmp_path, made, models)
    assert (found.method, found.parents, found.exact) == (None, (), False)
    assert not any(origin.explained for origin in found.blocks.values())


def test_a_copy(tmp_path):
    models = relatives(3)
    found = explain(tmp_path, models["b"], models)
    assert (found.method, letters(found), found.exact) == ("copy", ("b",), True)
    half = explain(tmp_path, cast(models["b"], torch.bfloat16), models)
    assert (half.method, letters(half), half.exact) == ("copy", ("b",), True)


def test_weights_0_and_1_are_numbers(tmp_path):
    models = relatives(2)
    shares = {block: {"a": 1.0} if number % 2 else {"b": 1.0} for number, block in enumerate(SD_BLOCKS)}
    found = explain(tmp_path, mixed(models, {**shares, "VAE": {"a": 1.0}}), models)
    for number, block in enumerate(SD_BLOCKS):
        (weight,) = found.blocks[block].weights.values()
        assert weight == (number % 2 if found.base == "b.safetensors" else 1 - number % 2)
        assert found.blocks[block].residual == pytest.approx(0, abs=1e-12)


def test_equal_blocks_are_undetermined(tmp_path):
    models = relatives(3)
    for name in models["b"]:
        if "input_blocks.5." in name:
            models["b"][name] = models["a"][name]
    found = explain(tmp_path, mixed(models, preset_shares("high_res")), models)
    assert not found.blocks["IN05"].determined
    assert found.blocks["IN05"].weights == {"b.safetensors": None}
    assert (found.preset, found.exact) == ("high_res", True)


def test_collinear_blocks_are_undetermined(tmp_path):
    models = relatives(3, dtype=torch.float32)
    inside = [name for name in models["a"] if "output_blocks.4." in name]
    for name in inside:  # exactly halfway between the other two
        models["c"][name] = models["a"][name] + (models["b"][name] - models["a"][name]) / 2
    shares = {block: {"a": 0.5, "b": 0.2, "c": 0.3} for block in (*SD_BLOCKS, "VAE")}
    found = explain(tmp_path, mixed(models, shares), models)
    assert not found.blocks["OUT04"].determined
    assert found.blocks["OUT03"].determined
    assert found.exact


def test_text_encoder_and_vae_are_told_apart(tmp_path):
    models = relatives(3)
    shares = {**preset_shares("low_res"), "BASE": {"b": 1.0}, "VAE": {"c": 1.0}}
    found = explain(tmp_path, mixed(models, shares), models)
    assert (found.preset, letters(found)) == ("low_res", ("a", "b"))
    assert found.components["text_encoder"].weights == {"b.safetensors": pytest.approx(1)}
    assert not found.components["vae"].explained
    assert "the VAE is that of c.safetensors" in found.notes
    assert not found.exact


def test_weights_that_change_within_blocks(tmp_path):
    models = relatives(2)
    made = mixed(models, preset_shares("FLAT_25"))
    attention = [name for name in made if "attn2" in name]
    for name in attention:
        made[name] = (0.2 * models["a"][name].double() + 0.8 * models["b"][name].double()).half()
    found = explain(tmp_path, made, models, tensors=True)
    assert (found.method, found.exact) == ("weighted_sum", True)
    assert "change within blocks" in found.verdict
    for name, origin in found.tensors.items():
        if component_of(name) == "unet" and origin.determined:
            other = next(n for n in found.candidates if n != found.base)
            expected = 0.8 if name in attention else 0.25
            assert origin.weights[other] == pytest.approx(
                expected if other[0] == "b" else 1 - expected, abs=max(0.005, origin.uncertainty)
            )


def three_roundings(models, shares):
    """As web UIs do it: all in half precision, product by product."""
    made = {}
    for name, tensor in models["a"].items():
        if not tensor.is_floating_point():
            made[name] = tensor
            continue
        w = shares["VAE" if component_of(name) == "vae" else block_of(name)].get("b", 0.0)
        made[name] = (1 - w) * tensor + w * models["b"][name]
    return made


@pytest.mark.parametrize("preset", ["high_res", "GRAD_A", "SMOOTHSTEP"])
def test_merges_of_other_tools(tmp_path, preset):
    models = relatives(3)
    found = explain(tmp_path, three_roundings(models, preset_shares(preset)), models)
    assert (found.preset, letters(found), found.exact) == (preset, ("a", "b"), True)


def test_our_own_merges(pairs, tmp_path):
    a, b = pairs()
    blockmerge.merge(a, b, weights="0.35", output=tmp_path / "m.safetensors", vae="blend")
    found = blockmerge.explain(tmp_path / "m.safetensors", [a, b])
    assert found.exact
    assert {name for origin in found.blocks.values() for name in origin.weights} == {"b.safetensors"}
    assert all(
        origin.weights["b.safetensors"] == pytest.approx(0.35, abs=1e-12) for origin in found.blocks.values()
    )
    assert blockmerge.explain(tmp_path / "m.safetensors", [b, a]).base == "a.safetensors"  # found, not asked


def test_a_true_recipe_is_the_explanation_and_a_false_one_a_warning(pairs, tmp_path):
    a, b = pairs()
    output = tmp_path / "m.safetensors"
    blockmerge.merge(a, b, method="slerp", weights="BASE=0.25,IN04=0.5,M00=skip", output=output)
    found = blockmerge.explain(output, [b, a])
    assert (found.method, found.exact, found.parents) == ("slerp", True, ("a.safetensors", "b.safetensors"))
    assert "made by slerp of a.safetensors and b.safetensors. Its own recipe says so" in found.verdict
    assert {block: origin.weights["b.safetensors"] for block, origin in found.blocks.items()} == {
        block: {"BASE": 0.25, "IN04": 0.5}.get(block, 0.0) for block in found.blocks
    }
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    false = json.loads(metadata["blockmerge.recipe"])
    false["weights"] |= {"IN04": 0.75}
    tensors = load_file(output)
    save_file(tensors, output, {**metadata, "blockmerge.recipe": json.dumps(false)})
    found = blockmerge.explain(output, [a, b])
    assert found.notes[0].startswith("warning: its own recipe does not give this file: ")
    assert "own recipe says so" not in found.verdict
    save_file(tensors, output, metadata)
    alone = blockmerge.explain(output, [a])
    assert any("it names b.safetensors, not among the candidates" in note for note in alone.notes)


def test_a_recipe_of_stages_is_explained_by_its_models(pairs, tmp_path):
    a, b = pairs()
    stage = blockmerge.Merge(a, b, preset="high_res")
    blockmerge.merge(stage, b, preset="low_res", output=tmp_path / "m.safetensors")
    found = blockmerge.explain(tmp_path / "m.safetensors", [a, b])
    assert found.exact
    assert found.parents == ("a.safetensors", "b.safetensors")
    assert "made in 2 merges of a.safetensors and b.safetensors" in found.verdict


def test_a_folder_that_holds_the_merge_too(pairs, tmp_path):
    for path in pairs():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    blockmerge.merge(*pairs(), preset="high_res", output=tmp_path / "m.safetensors")
    (tmp_path / "broken.safetensors").touch()
    found = blockmerge.explain(tmp_path / "m.safetensors", tmp_path)
    assert (found.preset, found.candidates) == ("high_res", ("a.safetensors", "b.safetensors"))
    assert "is empty" in found.left_out["broken.safetensors"]


def test_threads_change_no_digit(pairs, tmp_path):
    blockmerge.merge(*pairs(), preset="GRAD_V", output=tmp_path / "m.safetensors")
    one, three = (
        blockmerge.explain(tmp_path / "m.safetensors", pairs(), threads=threads) for threads in (1, 3)
    )
    assert one == three


def test_nan_is_told_by_name(pairs, tmp_path, capsys):
    a, b = pairs()
    for holder in ("merge", "candidate"):
        tensors = load_file(b)
        tensors[CONV].view(-1)[3] = torch.nan
        save_file(tensors, tmp_path / f"{holder}.safetensors")
    assert_refused(
        capsys,
        tmp_path,
        "explain",
        tmp_path / "merge.safetensors",
        a,
        b,
        says=["merge.safetensors holds NaN", CONV],
    )
    says = ["candidate.safetensors holds NaN", CONV]
    assert_refused(capsys, tmp_path, "explain", a, tmp_path / "candidate.safetensors", says=says)
    blockmerge.merge(a, b, preset="high_res", output=tmp_path / "m.safetensors")
    save_file(load_file(tmp_path / "m.safetensors"), tmp_path / "m.safetensors")  # without its recipe
    found = blockmerge.explain(tmp_path / "m.safetensors", [a, tmp_path / "candidate.safetensors", b])
    assert (found.preset, found.exact) == ("high_res", True)
    assert CONV in found.left_out["candidate.safetensors"]


def test_names_stay_when_one_of_the_same_name_is_left_out(tmp_path):
    models = relatives(3)
    broken = {**models["c"], CONV: torch.full_like(models["c"][CONV], torch.nan)}
    made = mixed(models, preset_shares("high_res"))
    paths = [tmp_path / place / "a.safetensors" for place in ("broken", "good")]
    for path, model in zip(paths, (broken, models["a"]), strict=True):
        path.parent.mkdir()
        save_file(model, path)
    save_file(models["b"], tmp_path / "b.safetensors")
    save_file(made, tmp_path / "m.safetensors")
    found = blockmerge.explain(tmp_path / "m.safetensors", [*paths, tmp_path / "b.safetensors"])
    assert set(found.parents) == {"a.safetensors (2)", "b.safetensors"}
    assert found.left_out.keys() == {"a.safetensors"}


def test_many_candidates_of_which_nothing_can_be_told(tmp_path):
    """All lie on one line, so no weights are determined, and the merge lies elsewhere."""
    two = relatives(2, dtype=torch.float32)
    on_a_line = {
        f"c{number}": {
            name: torch.lerp(t, two["b"][name], number / 8) if t.is_floating_point() else t
            for name, t in two["a"].items()
        }
        for number in range(6)
    }
    found = explain(tmp_path, tuned(two["b"], 0.02, seed=4), on_a_line)
    assert (found.method, found.parents, found.exact) == (None, (), False)


def test_bystanders_change_nothing(tmp_path):
    """Neither a candidate in a coarse dtype nor one of huge values hides what the true parents show."""
    models = relatives(2, 0.005)
    models["coarse"] = cast(relatives(4, 0.02)["d"], torch.float8_e4m3fn)
    models["huge"] = {name: t * 50 if t.is_floating_point() else t for name, t in relatives(3)["c"].items()}
    made = mixed(models, preset_shares("high_res"))
    found = explain(tmp_path, made, models)
    assert (found.preset, letters(found), found.exact) == ("high_res", ("a", "b"), True)
    made[CONV].view(-1)[5] += 30 * abs(made[CONV].view(-1)[5]) * 2**-10
    assert not explain(tmp_path, made, models).exact
    assert explain(tmp_path, tuned(models["b"], 0.005, seed=8), models).method is None


def test_candidates_in_a_coarser_dtype(tmp_path):
    models = {name: cast(model, torch.bfloat16) for name, model in relatives(2).items()}
    found = explain(tmp_path, mixed(relatives(2), preset_shares("high_res")), models)
    assert (found.preset, letters(found), found.exact) == ("high_res", ("a", "b"), False)


def test_what_a_dtype_cannot_tell(tmp_path):
    """In fp8, differences of 0.2 % are far below a step: no weight is claimed that is not there."""
    models, shares = relatives(2, 0.002), preset_shares("low_res")
    found = explain(tmp_path, cast(mixed(models, shares), torch.float8_e5m2), models)
    for block, origin in found.blocks.items():
        for name, weight in origin.weights.items():
            assert weight is None or abs(weight - shares[block].get(name[0], 0)) <= origin.uncertainty
    assert found.preset in (None, "low_res")


def test_an_average_of_six(tmp_path):
    models = relatives(7)
    made = mixed(models, {block: dict.fromkeys("abcdef", 1 / 6) for block in (*SD_BLOCKS, "VAE")})
    found = explain(tmp_path, made, models)
    assert (set(letters(found)), found.method, found.exact) == (set("abcdef"), "linear", True)


def test_candidates_without_the_rest(tmp_path):
    """U-Nets alone explain the U-Net, and no more is claimed."""
    models = relatives(2)
    made = mixed(models, preset_shares("high_res"))
    unets = {n: {k: t for k, t in model.items() if "diffusion_model" in k} for n, model in models.items()}
    found = explain(tmp_path, made, unets)
    assert (found.preset, found.exact) == ("high_res", False)
    assert "all that was compared is the same" in found.verdict
    found = explain(tmp_path, made, {"a": unets["a"], "b": models["b"]})
    assert found.preset == "high_res"
    assert found.blocks["BASE"].weights == {"b.safetensors": None}


def test_one_candidate_that_is_none(tmp_path):
    models = relatives(2)
    found = explain(tmp_path, models["a"], {"b": models["b"]})
    assert found.verdict.startswith("merge.safetensors is not a copy of b.safetensors")


def test_one_altered_block(tmp_path):
    models = relatives(2)
    made = mixed(models, preset_shares("FLAT_75"))
    made["model.diffusion_model.out.2.bias"] += 0.5
    found = explain(tmp_path, made, models)
    assert found.parents == ()
    assert "do explain 24 of 25 blocks" in found.verdict


def test_the_vae_tells_which_is_the_base(tmp_path):
    models = relatives(2)
    made = mixed(models, preset_shares("GRAD_V"))
    for order in ("ab", "ba"):
        assert explain(tmp_path, made, {name: models[name] for name in order}).preset == "GRAD_V"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope.safetensors", "a.safetensors"], "nope.safetensors"),
        (["a.safetensors", "nope.safetensors"], "no candidate can be compared"),
        (["a.safetensors", "a.safetensors"], "the only one is that file itself"),
        (["a.safetensors", "xl.safetensors"], "xl.safetensors is Stable Diffusion XL"),
        (["a.safetensors", "b.safetensors", "-o", "b.safetensors", "--overwrite"], "ending of a model"),
    ],
)
def test_what_cannot_be_done_is_refused(pairs, tmp_path, capsys, arguments, says):
    for path in pairs():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "xl.safetensors").write_bytes(pairs("sdxl")[0].read_bytes())
    assert_refused(capsys, tmp_path, "explain", *arguments, says=says)

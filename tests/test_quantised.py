"""Scaled fp8 means codes times scales, everywhere."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import LiveMerge
from blockmerge.cli.main import run
from blockmerge.demo import make_state_dicts
from blockmerge.inspecting import repair
from blockmerge.methods import METHODS
from blockmerge.streaming import PAGE
from tests import oracle
from tests.effort import in_turn
from tests.quantising import E4M3, E5M2, SPELLINGS, codes_of, is_quantised, meant, quantised, saved
from tests.small_models import small_model, write_folder
from tests.test_live import module_of, unet_of

U = "model.diffusion_model."
FORMS = [(spelling, E4M3, row) for spelling in SPELLINGS for row in (False, True)]
FORMS += [("scaled_fp8", E5M2, False), ("comfy_quant", E5M2, True)]


@pytest.fixture(scope="module")
def pair():
    """A small SDXL model in float16 and another in bfloat16."""
    return small_model("sdxl"), small_model("sdxl", torch.bfloat16, seed=1)


def same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(oracle.bits(found[name]), oracle.bits(tensor)), name


def expected_dtypes(out, a):
    """What was scaled fp8 in A is bfloat16, all else as it was."""
    for name, tensor in a.items():
        assert out[name].dtype == (torch.bfloat16 if is_quantised(name, tensor) else tensor.dtype), name


# -- merged like what was dequantised before -----------------------------------------------------------------


@pytest.mark.parametrize(("spelling", "dtype", "by_row"), FORMS)
def test_merged_with_the_bits_of_weights_dequantised_by_torch(tmp_path, pair, spelling, dtype, by_row):
    a, b = pair
    codes, metadata, plain = quantised(a, spelling, dtype, by_row=by_row)
    scaled = saved(tmp_path, "scaled", codes, {**metadata, "format": "pt"})
    other = saved(tmp_path, "b", b)
    result = blockmerge.merge(scaled, other, weights=0.3, vae="a", output=tmp_path / "out.safetensors")
    out = load_file(result.output)
    expected_dtypes(out, a)
    before = saved(tmp_path, "plain", plain)
    wanted = load_file(
        blockmerge.merge(
            before, other, weights=0.3, vae="a", dtype="bf16", output=tmp_path / "w.safetensors"
        ).output
    )
    same_bits(
        {name: one for name, one in out.items() if is_quantised(name, one)},
        {name: one for name, one in wanted.items() if is_quantised(name, one)},
    )
    assert out.keys() == a.keys()
    for name, tensor in out.items():
        if is_quantised(name, tensor):
            exact = 0.7 * plain[name].double() + 0.3 * b[name].double()
            assert (tensor.double() - exact).abs().max() <= exact.abs().max() * 2.0**-8, name
    assert any("converted from scaled F8_" in note and note.endswith("to BF16") for note in result.notes)
    kept = blockmerge.inspect(result.output).metadata
    assert "_quantization_metadata" not in kept


@pytest.mark.parametrize("by_row", [False, True])
def test_a_model_that_is_merged_into_another_keeps_the_others_dtypes(tmp_path, pair, by_row):
    a, b = pair
    codes, metadata, plain = quantised(b, "comfy_quant", by_row=by_row)
    files = saved(tmp_path, "a", a), saved(tmp_path, "b", codes, metadata), saved(tmp_path, "p", plain)
    for method, weights in (("weighted_sum", 0.4), ("weighted_sum", 1.0), ("slerp", 0.4)):
        options = {"method": method, "weights": weights, "vae": "a", "overwrite": True}
        out = blockmerge.merge(files[0], files[1], output=tmp_path / "o.safetensors", **options).output
        wanted = blockmerge.merge(files[0], files[2], output=tmp_path / "w.safetensors", **options).output
        same_bits(load_file(out), load_file(wanted))
        assert {name: t.dtype for name, t in load_file(out).items()} == {n: t.dtype for n, t in a.items()}


@pytest.fixture(scope="module")
def three(tmp_path_factory, pair):
    """Paths of three models in scaled fp8, the second with scales for each row, and of what they stand for."""
    folder = tmp_path_factory.mktemp("three")
    models = [quantised(one, by_row=n == 1) for n, one in enumerate((*pair, small_model("sdxl", seed=2)))]
    return [
        [saved(folder, f"{kind}{number}", model[place]) for number, model in enumerate(models)]
        for kind, place in (("scaled", 0), ("plain", 2))
    ]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_sees_the_weights(tmp_path, three, name):
    method = METHODS[name]
    given = {"alpha": {"weights": 0.4}, "beta": {"weights_beta": 0.3}}
    options = {"method": name, "vae": "a", "dtype": "bf16"}
    for weight in method.weights:
        options |= given[weight]
    out, wanted = (
        load_file(
            blockmerge.merge(
                *models[: method.models or 3], output=tmp_path / f"{n}.safetensors", **options
            ).output
        )
        for n, models in enumerate(three)
    )
    same_bits(out, wanted)


@pytest.mark.parametrize(
    "name", ["weighted_sum", "slerp", "dare", "tensor_sum", "ties", "smooth_add_difference"]
)
def test_files_and_state_dicts_give_the_same_bits(tmp_path, pair, name):
    models = [*pair, small_model("sdxl", seed=2)][: METHODS[name].models or 3]
    dicts = [quantised(model, by_row=number == 0)[0] for number, model in enumerate(models)]
    paths = [saved(tmp_path, str(number), one) for number, one in enumerate(dicts)]
    options = {"method": name, "weights": 0.4, "vae": "a"}
    out = blockmerge.merge(*paths, output=tmp_path / "o.safetensors", **options, threads=1).output
    same_bits(load_file(out), blockmerge.merge_state_dicts(*dicts, **options))
    more = blockmerge.merge(*paths, output=tmp_path / "p.safetensors", **options, threads=3).output
    assert more.read_bytes() == out.read_bytes()


def test_adjusted_and_clipped_are_what_they_are_of_dequantised_weights(tmp_path, pair):
    a, b = pair
    codes, _, plain = quantised(a, by_row=True)
    files = [saved(tmp_path, name, one) for name, one in (("s", codes), ("p", plain), ("b", b))]
    options = {"weights": 0.5, "adjust": "1,0.5,0.5,1,0,0,0,0", "clip": True, "dtype": "bf16", "vae": "a"}
    one, two = (
        blockmerge.merge(first, files[2], output=tmp_path / f"{first.stem}.out.safetensors", **options).output
        for first in files[:2]
    )
    same_bits(load_file(one), load_file(two))


def test_rows_are_cut_wherever_a_page_ends(tmp_path, pair):
    """As direct writes need it: a scale for each row makes no merge slower."""
    codes = saved(tmp_path, "s", quantised(pair[0], by_row=True)[0])
    plan = blockmerge.Merge(codes, saved(tmp_path, "b", pair[1]), weights=0.5).plan(
        tmp_path / "o.safetensors"
    )
    (file,) = plan.planned.files
    assert {run.grain for run in file.runs} == {1}
    assert all(start % PAGE == 0 for start, _ in file.pieces(PAGE))
    out = plan.run().output.read_bytes()
    for size in (PAGE, 5 * PAGE):
        small = replace(plan, pace=replace(plan.pace, piece_bytes=size, chunk_bytes=100), overwrite=True)
        assert small.run().output.read_bytes() == out


# -- converted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spelling", "dtype", "by_row"), FORMS[:4] + FORMS[-2:])
def test_converted_to_bfloat16_and_to_what_is_asked(tmp_path, pair, spelling, dtype, by_row):
    codes, metadata, plain = quantised(pair[0], spelling, dtype, by_row=by_row)
    path = saved(tmp_path, "s", codes, metadata)
    out = load_file(blockmerge.convert(path, tmp_path / "o.safetensors").output)
    same_bits(out, {name: t.bfloat16() if is_quantised(name, t) else t for name, t in plain.items()})
    for short, wanted in (("fp16", torch.float16), ("fp32", torch.float32)):
        out = load_file(
            blockmerge.convert(path, tmp_path / "o.safetensors", dtype=short, overwrite=True).output
        )
        floats = {name: t.to(wanted) if t.is_floating_point() else t for name, t in plain.items()}
        same_bits(out, floats)


def test_a_torch_file_too(tmp_path, pair):
    codes, _, plain = quantised(pair[0], by_row=True)
    torch.save({"state_dict": codes}, tmp_path / "s.ckpt")
    out = load_file(blockmerge.convert(tmp_path / "s.ckpt", tmp_path / "o.safetensors", prune=True).output)
    same_bits(out, {name: t.bfloat16() if is_quantised(name, t) else t for name, t in plain.items()})


@pytest.mark.parametrize(("family", "by_row"), in_turn(["sd1", "sd2", "sdxl"], [False, True]))
def test_under_other_names(tmp_path, family, by_row):
    """Convolutions that become matrices, joined and transposed ones, both ways, as of dequantised weights."""

    def all_weights(name, tensor):
        return name.endswith("weight") and tensor.dim() > 1 and not name.endswith("in_proj_weight")

    model = small_model(family, for_a_folder=True)
    codes, _, plain = quantised(model, by_row=by_row, of=all_weights)
    folders = [
        blockmerge.convert(
            saved(tmp_path, name, one), tmp_path / f"{name}-folder", naming="diffusers", dtype="bf16"
        ).output
        for name, one in (("s", codes), ("p", plain))
    ]
    files = sorted(path.relative_to(folders[1]) for path in folders[1].rglob("*.safetensors"))
    assert files == sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.safetensors"))
    for path in files:
        same_bits(load_file(folders[0] / path), load_file(folders[1] / path))

    write_folder(tmp_path / "s-made", model, family)
    write_folder(tmp_path / "p-made", model, family)
    for path in (tmp_path / "s-made").rglob("*.safetensors"):
        codes, _, plain = quantised(load_file(path), "comfy_quant", by_row=by_row, of=all_weights)
        save_file(codes, path, metadata={"format": "pt"})
        save_file(plain, tmp_path / "p-made" / path.relative_to(tmp_path / "s-made"))
    other = saved(tmp_path, "other", small_model(family, seed=3, for_a_folder=True))
    for name, others in (("converted", ()), ("merged", (other,))):
        made = [
            load_file(
                blockmerge.convert(
                    folder, tmp_path / f"{name}-{folder.name}.safetensors", dtype="bf16"
                ).output
                if not others
                else blockmerge.merge(
                    folder,
                    *others,
                    weights=0.5,
                    vae="a",
                    dtype="bf16",
                    output=tmp_path / f"{name}-{folder.name}.safetensors",
                ).output
            )
            for folder in (tmp_path / "s-made", tmp_path / "p-made")
        ]
        same_bits(*made)


def test_a_bare_u_net_and_a_vae_of_its_own(tmp_path, pair):
    a, _ = pair
    unet = {name.removeprefix(U): tensor for name, tensor in a.items() if name.startswith(U)}
    codes, _, plain = quantised(unet, "scaled_fp8")
    out = blockmerge.merge_state_dicts(codes, unet, weights=0.5)
    assert out.keys() == unet.keys()
    wanted = {name: t.lerp(unet[name].float(), 0.5).bfloat16() for name, t in plain.items() if t.dim() > 1}
    same_bits({name: out[name] for name in wanted}, wanted)

    whole = make_state_dicts("sd1")
    vae = {
        name.removeprefix("first_stage_model."): tensor.half()
        for name, tensor in whole[1].items()
        if name.startswith("first_stage_model.")
    }
    codes, _, plain = quantised(vae, "comfy_quant", by_row=True)
    model = saved(tmp_path, "model", whole[0])
    result = blockmerge.convert(model, tmp_path / "o.safetensors", vae=saved(tmp_path, "vae", codes))
    out = load_file(result.output)
    for name, tensor in plain.items():
        found = out[f"first_stage_model.{name}"]
        assert torch.equal(found, tensor.to(found.dtype)), name
    assert out.keys() == whole[0].keys()


def test_bytes_that_are_said_to_be_fp8(pair, tmp_path):
    """Whole numbers as the container of 8-bit floats, where a format says so."""
    codes, _, plain = quantised(pair[0], "comfy_quant")
    bytes_of = {n: t.view(torch.uint8) if t.dtype == E4M3 else t for n, t in codes.items()}
    wanted = {name: t.bfloat16() if is_quantised(name, t) else t for name, t in plain.items()}
    path = saved(tmp_path, "u8", bytes_of)
    same_bits(load_file(blockmerge.convert(path, tmp_path / "o.safetensors").output), wanted)
    out = blockmerge.merge_state_dicts(bytes_of, pair[1], weights=0)
    same_bits(out, wanted)


def test_layers_left_as_they_were_may_have_a_scale_of_one(pair):
    codes, _, plain = quantised(pair[0])
    name = next(name for name in plain if is_quantised(name, plain[name]))
    codes = {**codes, name: pair[0][name], name[:-6] + "scale_weight": torch.tensor([1.0])}
    out = blockmerge.merge_state_dicts(codes, pair[1], weights=0)
    assert torch.equal(out[name], pair[0][name])


def test_plain_fp8_stays_as_it_is(tmp_path, pair):
    plain = {n: t.to(E4M3) if is_quantised(n, t) else t for n, t in pair[0].items()}
    path = saved(tmp_path, "p", plain)
    same_bits(load_file(blockmerge.convert(path, tmp_path / "o.safetensors").output), plain)
    out = blockmerge.merge_state_dicts(plain, pair[1], weights=0.5)
    assert {name: t.dtype for name, t in out.items()} == {name: t.dtype for name, t in plain.items()}
    assert blockmerge.inspect(path).quantised is None
    assert {p.code for p in blockmerge.check(path).problems} >= {"fp8_weights"}


# -- live, compared, explained -------------------------------------------------------------------------------


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_live(tmp_path, as_file, by_row):
    a, b = (
        {name: tensor.half() for name, tensor in unet_of(model).items()} for model in make_state_dicts("sd1")
    )
    codes, _, plain = quantised(a, by_row=by_row)
    found = {}
    for name, model in (("codes", codes), ("plain", plain)):
        module = module_of(a)
        given = saved(tmp_path, name, model) if as_file else model
        with LiveMerge(module, given, b) as live:
            live.apply(weights=0.3)
            found[name] = {key: one.detach().clone() for key, one in module.named_parameters()}
    same_bits(found["codes"], found["plain"])


@pytest.mark.parametrize("spelling", ["scaled_fp8", "comfy_quant"])
def test_a_scaled_model_is_like_its_own_original(tmp_path, spelling):
    original, _ = make_state_dicts("sd1")
    scaled, _, plain = quantised(original, spelling, by_row=spelling == "comfy_quant")
    path, meant_by_it = saved(tmp_path, "s", scaled), saved(tmp_path, "p", plain)
    # Eight bits are not sixteen: attention, which is exponentials of products, shows it.
    for method, least in (("attention", 99.5), ("weights", 0.999)):
        row, wanted = blockmerge.similarity(original, [path, meant_by_it], method).references
        assert row.error is None
        assert row.similarity == wanted.similarity > least
        assert row.parts == wanted.parts
        assert not row.notes
        table = blockmerge.similarity_matrix([path, meant_by_it], method)
        assert table.similarity[0][1] == pytest.approx(table.similarity[0][0], abs=1e-5)


@pytest.mark.parametrize("by_row", [False, True])
def test_explained(tmp_path, by_row):
    parents = make_state_dicts("sd1")
    scaled = [quantised(one, by_row=by_row)[0] for one in parents]
    paths = [saved(tmp_path, name, one) for name, one in zip("ab", scaled, strict=True)]
    weights = {"IN04": 0.25, "OUT05": 0.7, "BASE": 0.5}
    merge = blockmerge.merge(*paths, weights=weights, output=tmp_path / "m.safetensors").output
    found = blockmerge.explain(merge, paths)
    assert found.exact
    assert found.method == "weighted_sum"
    for block, weight in weights.items():
        assert found.blocks[block].weights["b.safetensors"] == pytest.approx(weight, abs=0.02)
    # The merge in scaled fp8 itself, of models that are not.
    plain = [saved(tmp_path, f"p{number}", one) for number, one in enumerate(parents)]
    merge = blockmerge.merge(*plain, weights=weights, output=tmp_path / "n.safetensors").output
    again = saved(tmp_path, "again", quantised(load_file(merge), by_row=by_row)[0])
    found = blockmerge.explain(again, plain)
    assert found.method == "weighted_sum"
    assert found.blocks["OUT05"].weights["p1.safetensors"] == pytest.approx(0.7, abs=0.02)


# -- what it is called ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_inspect_and_check_say_what_it_is(tmp_path, capsys, spelling):
    model, _ = make_state_dicts("sd1")
    model = {name: t.half() if t.is_floating_point() else t for name, t in model.items()}
    scaled, metadata, plain = quantised(model, spelling, by_row=True)
    path = saved(tmp_path, "s", scaled, {**metadata, "format": "pt"})
    count = sum(is_quantised(name, tensor) for name, tensor in plain.items())
    found = blockmerge.inspect(path)
    assert found.quantised == f"scaled fp8 ({count} weights, F8_E4M3)"
    assert (found.family, found.variant) == ("sd1", "base")
    assert run(["inspect", str(path)]) == 0
    assert f"its weights are quantised: scaled fp8 ({count} weights" in capsys.readouterr().out
    problems = {problem.code: problem for problem in blockmerge.check(path).problems}
    assert problems.keys() == {"scaled_fp8"}
    assert len(problems["scaled_fp8"].tensors) == count
    repaired = repair(path, tmp_path / "fixed.safetensors")
    assert repaired.fixed == ("scaled_fp8",)
    assert load_file(tmp_path / "fixed.safetensors").keys() == model.keys()


# -- where people load it ------------------------------------------------------------------------------------


def test_diffusers_loads_the_merge_and_draws(tmp_path):
    from diffusers import UNet2DConditionModel

    from tests.thin_unet import config

    a, b = make_state_dicts("sdxl")
    a = {name: tensor.half() for name, tensor in a.items()}
    scaled, _, plain = quantised(a, "comfy_quant", by_row=True)
    merged = blockmerge.merge(
        saved(tmp_path, "a", scaled), saved(tmp_path, "b", b), weights=0.4, output=tmp_path / "m.safetensors"
    ).output
    folder = blockmerge.convert(merged, tmp_path / "folder", naming="diffusers", dtype="fp32").output
    unet, told = UNet2DConditionModel.from_pretrained(folder / "unet", output_loading_info=True)
    assert not any(told.values())
    name = U + "input_blocks.4.1.proj_in.weight"
    expected = (0.6 * plain[name] + 0.4 * b[name].float()).bfloat16().float()
    found = unet.state_dict()["down_blocks.1.attentions.0.proj_in.weight"]
    assert torch.allclose(found, expected, rtol=2.0**-7, atol=1e-6)
    (tmp_path / "config.json").write_text(
        json.dumps(dict(config("sdxl"), _class_name="UNet2DConditionModel"))
    )
    single = UNet2DConditionModel.from_single_file(
        str(merged), config=str(tmp_path), torch_dtype=torch.float32, local_files_only=True
    )
    assert torch.equal(single.state_dict()["down_blocks.1.attentions.0.proj_in.weight"], found)


def test_codes_and_scales_of_the_tests_are_what_they_should_be():
    weight = torch.randn(8, 4)
    for by_row in (False, True):
        codes, scale = codes_of(weight, by_row=by_row)
        assert scale.shape == ((8,) if by_row else ())
        assert (meant(codes, scale) - weight).abs().max() < 0.05 * weight.abs().max()

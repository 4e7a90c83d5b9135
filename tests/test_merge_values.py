"""The numbers: merged files held against a float64 oracle, and the identities every merge must obey."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.checkpoints import Model
from blockmerge.inspecting import repair
from blockmerge.merging.execute import Pace, execute
from blockmerge.merging.outputs import choose_output
from blockmerge.merging.planning.plan import make_plan
from blockmerge.merging.planning.request import MergeRequest
from blockmerge.weights import WeightsRequest
from tests import oracle
from tests.conftest import FAMILIES, unchanged
from tests.effort import many
from tests.every_pair import every_pair

PRESETS = {
    "high_res": (oracle.HIGH_RES, oracle.SDXL_HIGH_RES),
    "low-res_replace": (oracle.LOW_RES, oracle.SDXL_LOW_RES),
}


@pytest.mark.parametrize(
    ("family", "dtype", "preset"), every_pair(FAMILIES, ["F16", "BF16", "F32"], [*PRESETS, "GRAD_V", "all_b"])
)
def test_merged_values_equal_the_oracle(pairs, tmp_path, family, dtype, preset):
    a, b = pairs(family, (dtype, dtype))
    output = tmp_path / "out.safetensors"
    with unchanged(a, b):
        blockmerge.merge(a, b, preset=preset, output=output)
    blocks = oracle.SDXL if family == "sdxl" else oracle.SD
    if preset in PRESETS:
        weights = dict(zip(blocks, oracle.numbers(PRESETS[preset][family == "sdxl"]), strict=True))
    elif preset == "GRAD_V":  # falls in twelfths from IN00 to the middle and rises again
        falling = [(12 - n) / 12 for n in range(13)]
        sd = dict(zip(oracle.SD, [0.0, *falling, *falling[-2::-1]], strict=True))
        weights = {block: sd[block] for block in blocks}
    else:
        weights = dict.fromkeys(blocks, 1.0)
    oracle.assert_merged(load_file(output), load_file(a), load_file(b), weights, family)


@pytest.mark.parametrize(
    ("family", "weight"),
    [*(("sd1", weight) for weight in (0.5, 0.123, 1.5, -0.25)), ("sd2", 1.5), ("sdxl", 0.123)],
)
def test_a_flat_weight_with_the_vae_blended(pairs, tmp_path, family, weight):
    a, b = pairs(family)
    output = tmp_path / "out.safetensors"
    blockmerge.merge(a, b, weights=weight, vae="blend", output=output)
    blocks = oracle.SDXL if family == "sdxl" else oracle.SD
    out, first, second = load_file(output), load_file(a), load_file(b)
    if 0 <= weight <= 1:
        oracle.assert_merged(out, first, second, dict.fromkeys(blocks, weight), family, vae="blend")
    else:  # beyond the models, the result may be larger than both
        for name in out:
            if out[name].is_floating_point():
                exact = (1 - weight) * first[name].double() + weight * second[name].double()
                assert (out[name].double() - exact).abs().le(oracle.step_at(exact, torch.float16)).all()


@given(
    st.lists(
        st.tuples(st.floats(-1000, 1000, width=32), st.floats(-1000, 1000, width=32)), min_size=1, max_size=64
    ),
    st.floats(0, 1),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_a_weighted_sum_is_within_one_step_for_any_values(values, alpha, dtype):
    from blockmerge.methods.builtin.weighted_sums import weighted_sum

    a, b = (torch.tensor(side).to(dtype) for side in zip(*values, strict=True))
    out = weighted_sum(a, b, alpha=alpha, out=torch.empty_like(a))
    exact = (1 - alpha) * a.double() + alpha * b.double()
    assert ((out.double() - exact).abs() <= oracle.step_at(torch.maximum(a.abs(), b.abs()), dtype)).all()


def test_float32_of_opposite_signs_is_within_one_step():
    """Where float32 arithmetic itself is not: 1.7 steps were seen."""
    from blockmerge.methods.builtin.weighted_sums import weighted_sum

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1 << 20, generator=generator)
    b = -a * (1 + 1e-3 * torch.randn(1 << 20, generator=generator))
    for alpha in (0.1, 1 / 3, 0.5, 0.67, 0.9):
        out = weighted_sum(a, b, alpha=alpha, out=torch.empty_like(a))
        exact = (1 - alpha) * a.double() + alpha * b.double()
        assert (
            (out.double() - exact).abs() / oracle.step_at(torch.maximum(a.abs(), b.abs()), torch.float32)
        ).max() <= 1


def test_merging_a_model_with_itself_gives_that_model(pairs, tmp_path):
    a, _ = pairs()
    blockmerge.merge(a, a, weights=0.37, vae="blend", output=tmp_path / "out.safetensors")
    out, first = load_file(tmp_path / "out.safetensors"), load_file(a)
    assert all(torch.equal(out[name], first[name]) for name in first)


def test_the_complement_merges_the_other_way_round(pairs, tmp_path):
    a, b = pairs()
    weights = blockmerge.load_preset("high_res")
    blockmerge.merge(a, b, weights=weights, vae="blend", output=tmp_path / "ab.safetensors")
    blockmerge.merge(b, a, weights=weights.complement(), vae="blend", output=tmp_path / "ba.safetensors")
    one, other = load_file(tmp_path / "ab.safetensors"), load_file(tmp_path / "ba.safetensors")
    for name in one:
        difference = (one[name].double() - other[name].double()).abs()
        assert (difference <= oracle.step_at(one[name].double().abs(), torch.float16)).all() or not one[
            name
        ].is_floating_point()


@settings(max_examples=many(25))
@given(
    threads=st.integers(1, 9),
    piece=st.integers(1, 200),
    chunk=st.integers(3_000, 300_000),
    direct=st.booleans(),
    mixed=st.booleans(),
)
def test_the_result_does_not_depend_on_threads_or_cuts(pairs, tmp_path, threads, piece, chunk, direct, mixed):
    a, b = pairs("sd1", ("F16", "F32") if mixed else ("F16", "F16"))
    models = [Model.of(blockmerge.open_checkpoint(path)) for path in (a, b)]
    plan = make_plan(
        models, MergeRequest(WeightsRequest("high_res")), choose_output("out.safetensors", models[0])
    )

    def bytes_with(pace):
        path = tmp_path / "out"
        path.write_bytes(b"")
        execute(plan, lambda _: path, pace, shown_as=path)
        return path.read_bytes()[: plan.size]

    reference = bytes_with(Pace(1, 64 << 20, 64 << 20, direct=False))
    assert bytes_with(Pace(threads, piece * 4096, chunk, direct)) == reference


@pytest.mark.parametrize(
    ("family", "dtypes"),
    [*(("sd1", dtypes) for dtypes in (("F16", "F16"), ("BF16", "BF16"), ("F32", "F32"), ("F16", "F32"))),
     ("sd2", ("F16", "F32")), ("sdxl", ("BF16", "BF16"))],
)  # fmt: skip
def test_state_dicts_give_the_same_bits_as_files(pairs, tmp_path, family, dtypes):
    a, b = pairs(family, dtypes)
    blockmerge.merge(a, b, preset="low_res", output=tmp_path / "out.safetensors")
    first, second = load_file(a), load_file(b)
    kept = {name: tensor.clone() for name, tensor in first.items()}
    merged = blockmerge.merge_state_dicts(first, second, preset="low_res", check_finite=True)
    out = load_file(tmp_path / "out.safetensors")
    assert merged.keys() == out.keys()
    for name in out:
        assert torch.equal(oracle.bits(merged[name]), oracle.bits(out[name])), name
        assert merged[name].data_ptr() != first[name].data_ptr() or not merged[name].numel()
        assert torch.equal(first[name], kept[name])


def test_state_dicts_can_be_merged_into_a_file(pairs, tmp_path):
    a, b = pairs()
    first, second = load_file(a), load_file(b)
    strided = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in first.items()}
    blockmerge.merge(a, b, preset="high_res", output=tmp_path / "files.safetensors")
    blockmerge.merge(strided, second, preset="high_res", output=tmp_path / "dicts.safetensors")
    one, other = load_file(tmp_path / "files.safetensors"), load_file(tmp_path / "dicts.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_unet_in_diffusers_names_merges_in_memory(pairs):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from tests.thin_unet import config

    a, b = (
        {name: tensor for name, tensor in load_file(path).items() if name.startswith("model.")}
        for path in pairs()
    )
    expected = convert_ldm_unet_checkpoint(
        blockmerge.merge_state_dicts(a, b, preset="high_res"), config=config("sd1")
    )
    converted = [convert_ldm_unet_checkpoint(dict(side), config=config("sd1")) for side in (a, b)]
    merged = blockmerge.merge_state_dicts(*converted, preset="high_res")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)


def test_nan_in_memory_is_looked_for_only_when_asked(pairs):
    a, b = (load_file(path) for path in pairs())
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    b[name] = b[name].clone()
    b[name][0, 0] = float("nan")
    assert blockmerge.merge_state_dicts(a, b, weights=0.5)[name].isnan().any()
    with pytest.raises(blockmerge.NonFiniteError, match=name.replace(".", r"\.")):
        blockmerge.merge_state_dicts(a, b, weights=0.5, check_finite=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [("F16", "F16"), ("F32", "F32")])
def test_on_a_gpu_values_equal_the_oracle_and_stay_there(pairs, tmp_path, dtypes):
    a, b = pairs("sd1", dtypes)
    weights = dict(zip(oracle.SD, oracle.numbers(oracle.HIGH_RES), strict=True))
    blockmerge.merge(a, b, preset="high_res", device="cuda", output=tmp_path / "out.safetensors")
    oracle.assert_merged(load_file(tmp_path / "out.safetensors"), load_file(a), load_file(b), weights, "sd1")
    merged = blockmerge.merge_state_dicts(
        load_file(a, device="cuda"), load_file(b, device="cuda"), preset="high_res"
    )
    assert {tensor.device.type for tensor in merged.values()} == {"cuda"}
    oracle.assert_merged({n: t.cpu() for n, t in merged.items()}, load_file(a), load_file(b), weights, "sd1")


def test_the_result_opens_with_diffusers_and_runs(pairs, tmp_path):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from tests.thin_unet import config

    a, b = pairs("sd1", ("F32", "F32"))
    blockmerge.merge(a, b, preset="high_res", output=tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert len(file.keys()) == 1131
    checkpoint = load_file(tmp_path / "out.safetensors")
    unet = UNet2DConditionModel.from_config(config("sd1"))
    converted = convert_ldm_unet_checkpoint(checkpoint, config=dict(unet.config))
    missing, unexpected = unet.load_state_dict(converted, strict=False)
    assert (missing, unexpected) == ([], [])
    with torch.no_grad():
        sample = unet(torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 77, 24)).sample
    assert sample.shape == (1, 4, 8, 8)
    assert sample.isfinite().all()


def test_the_layout_of_the_output(pairs, tmp_path):
    """A's order, data at a page, every tensor aligned; read with the json module alone."""
    a, b = pairs()
    output = tmp_path / "out.safetensors"
    blockmerge.merge(a, b, preset="high_res", output=output)
    raw = output.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    first = json.loads(a.read_bytes()[8 : 8 + int.from_bytes(a.read_bytes()[:8], "little")])
    first.pop("__metadata__")
    assert (8 + length) % 4096 == 0
    assert sorted(header, key=lambda name: header[name]["data_offsets"]) == sorted(
        first, key=lambda n: first[n]["data_offsets"]
    )
    for entry in header.values():
        assert entry["data_offsets"][0] % {"F16": 2, "I64": 8}[entry["dtype"]] == 0
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(raw) - 8 - length


def test_tensors_of_odd_widths_stay_aligned_and_loadable(pairs, tmp_path):
    """Three bytes before an int64: A's order would put it at an odd offset, where safetensors cannot read
    it.
    """
    a, b = (load_file(path) for path in pairs())
    odd = {"aaa": torch.tensor([1, 2, 3], dtype=torch.uint8), "zzz": torch.tensor([5], dtype=torch.int64)}
    blockmerge.merge({**odd, **a}, b, weights=0.5, output=tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    assert out["aaa"].tolist() == [1, 2, 3]
    assert out["zzz"].tolist() == [5]


def test_torch_keeps_its_threads(pairs, tmp_path):
    import threading

    before = torch.get_num_threads()
    a, b = pairs()
    blockmerge.merge(a, b, weights=0.5, output=tmp_path / "out.safetensors")
    seen = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before, before]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp8_e4m3fn", "fp8_e5m2"])
def test_output_dtypes(pairs, tmp_path, dtype):
    a, b = pairs("sd1", ("F32", "BF16"))
    output = tmp_path / "out.safetensors"
    blockmerge.merge(a, b, preset="high_res", dtype=dtype, output=output)
    wanted = {
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
        "fp8_e4m3fn": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
    }[dtype]
    out, first, second = load_file(output), load_file(a), load_file(b)
    weights = dict(zip(oracle.SD, oracle.numbers(oracle.HIGH_RES), strict=True))
    for name, tensor in out.items():
        if name.endswith("position_ids"):
            assert torch.equal(tensor, first[name])
            continue
        assert tensor.dtype == wanted
        weight = oracle.weight_of(name, "sd1", weights)
        exact = (1 - weight) * first[name].double() + weight * second[name].double()
        # one rounding: the nearest of all values the dtype has, up to the error of the wider arithmetic
        assert torch.allclose(
            tensor.double(),
            exact.to(wanted).double(),
            rtol=2.0**-2 if "fp8" in dtype else 2.0**-7,
            atol=2.0**-9,
        )
        if wanted == torch.float32:
            assert (
                (tensor.double() - exact).abs()
                <= oracle.step_at(torch.maximum(first[name].abs(), second[name].abs()), wanted)
            ).all()


def test_output_dtypes_may_be_torchs_own(pairs, tmp_path):
    a, b = pairs()
    for name, dtype in (("text", "bf16"), ("torch", torch.bfloat16)):
        blockmerge.merge(a, b, weights=0.5, output=tmp_path / f"{name}.safetensors", dtype=dtype)
    assert (tmp_path / "text.safetensors").read_bytes() == (tmp_path / "torch.safetensors").read_bytes()
    with pytest.raises(blockmerge.RecipeError, match=r"unknown dtype 'torch.float64'"):
        blockmerge.merge(a, b, weights=0.5, output=tmp_path / "no.safetensors", dtype=torch.float64)


def test_the_recipe_is_in_the_metadata_and_what_would_lie_is_not(pairs, tmp_path):
    a, b = pairs()
    lying = {
        "modelspec.title": "My model",
        "modelspec.date": "2024-01-01",
        "modelspec.hash_sha256": "0x0",
        "sshs_model_hash": "0",
        "sd_merge_recipe": "{}",
        "blockmerge.recipe": "{}",
    }
    true = {"format": "pt", "modelspec.architecture": "stable-diffusion-v1", "note": "Ä 'quoted' \n ok"}
    save_file(load_file(a), tmp_path / "named.safetensors", metadata={**lying, **true})
    blockmerge.merge(
        tmp_path / "named.safetensors", b, preset="high-res_replace", output=tmp_path / "out.safetensors"
    )
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata.pop("blockmerge.recipe"))
    assert metadata == true
    assert recipe["models"] == ["named.safetensors", "b.safetensors"]
    assert recipe["method"] == "weighted_sum"
    assert recipe["preset"] == "high_res"
    assert list(recipe["weights"].values()) == oracle.numbers(oracle.HIGH_RES)
    assert recipe["version"] == blockmerge.__version__
    assert recipe["dtype"] == "keep"
    assert recipe["vae"] == "auto"
    assert str(tmp_path) not in json.dumps(recipe)


def test_whose_model_it_is_stays_true_where_nothing_but_the_form_changes(pairs, tmp_path):
    """As what is no hash does; and what is lost is told, by converting, repairing and merging."""
    a, b = pairs()
    own = {"modelspec.author": "me", "modelspec.title": "Mine", "modelspec.date": "2024-01-01",
           "sd_merge_recipe": "{}", "modelspec.license": "CC0", "format": "pt"}  # fmt: skip
    hashes = {"modelspec.hash_sha256": "0x0", "sshs_model_hash": "0"}
    lost = {"prompt": "a secret", "note": "in /home/me/models"}
    path = tmp_path / "mine.safetensors"
    save_file(load_file(a), path, metadata={**own, **hashes, **lost})
    said = "left out of the metadata of mine.safetensors: "
    converted = blockmerge.convert(path, tmp_path / "converted.safetensors", dtype="bf16")
    repaired = repair(path, tmp_path / "repaired.safetensors")
    for result in (converted, repaired):
        metadata = blockmerge.inspect(result.output).metadata
        assert {key: metadata[key] for key in metadata if key != "blockmerge.recipe"} == own
        (note,) = [note for note in result.notes if note.startswith(said)]
        assert set(note.removeprefix(said).split(", ")) == lost.keys()
    merged = blockmerge.merge(path, b, weights=0.5, output=tmp_path / "merged.safetensors")
    assert blockmerge.inspect(merged.output).metadata.keys() == {
        "modelspec.license",
        "format",
        "blockmerge.recipe",
    }
    (note,) = [note for note in merged.notes if note.startswith(said)]
    assert all(key in note for key in own.keys() - {"modelspec.license", "format"})
    assert not any(key in note for key in hashes)
    plain = blockmerge.convert(a, tmp_path / "plain.safetensors")
    assert not any("metadata" in note for note in plain.notes)


def test_a_converted_merge_still_tells_its_recipe(pairs, tmp_path):
    a, b = pairs()
    merged = blockmerge.merge(a, b, weights=0.5, output=tmp_path / "merged.safetensors")
    recipe = blockmerge.inspect(merged.output).metadata["blockmerge.recipe"]
    path = merged.output
    for name in ("once", "twice"):
        path = blockmerge.convert(path, tmp_path / f"{name}.safetensors", dtype="bf16").output
        metadata = blockmerge.inspect(path).metadata
        assert metadata["blockmerge.source_recipe"] == recipe
        assert json.loads(metadata["blockmerge.recipe"])["dtype"] == "bf16"
    again = blockmerge.merge(path, b, weights=0.5, output=tmp_path / "again.safetensors")
    assert "blockmerge.source_recipe" not in blockmerge.inspect(again.output).metadata


def test_how_a_was_made_is_not_copied_into_the_output(pairs, tmp_path):
    """What ComfyUI and its like leave in a file that they save, prompts and all."""
    a, b = pairs()
    graph = json.dumps({"3": {"class_type": "KSampler", "inputs": {"text": "a secret prompt"}}})
    made = ("workflow", "prompt", "extra_pnginfo", "parameters", "invokeai_graph", "invokeai_metadata")
    kept = {"format": "pt", "note": "mine", "ss_base_model_version": "sd_v1", "prompting_guide": "short ones"}
    save_file(load_file(a), tmp_path / "a.safetensors", metadata={**dict.fromkeys(made, graph), **kept})
    blockmerge.merge(tmp_path / "a.safetensors", b, weights=0.5, output=tmp_path / "merged.safetensors")
    blockmerge.convert(tmp_path / "a.safetensors", tmp_path / "converted.safetensors")
    for name in ("merged", "converted"):
        data = (tmp_path / f"{name}.safetensors").read_bytes()
        assert b"secret" not in data
        with safe_open(tmp_path / f"{name}.safetensors", "np") as file:
            metadata = file.metadata()
        assert {key: metadata[key] for key in metadata if key != "blockmerge.recipe"} == kept


def test_weights_come_in_every_form(pairs, tmp_path):
    a, b = pairs()
    numbers = oracle.numbers(oracle.HIGH_RES)
    forms = [
        oracle.HIGH_RES,
        numbers,
        np.array(numbers),
        numbers[1:],
        dict(zip(oracle.SD, numbers, strict=True)),
        blockmerge.BlockWeights.from_numbers(numbers),
        "IN01-IN02=1,IN03-IN04=0.67,IN05-IN06=0.33,OUT05-OUT06=.33,OUT07-OUT08=0.67,OUT09-OUT10=1",
    ]
    seen = set()
    for number, form in enumerate(forms):
        out = tmp_path / f"{number}.safetensors"
        blockmerge.merge(a, b, weights=form, output=out)
        raw = out.read_bytes()
        seen.add(raw)
    assert len(seen) == 1

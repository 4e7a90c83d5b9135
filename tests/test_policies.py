"""What becomes of the tensors that are not simply merged: each row of docs/policies.md.

Over 500 lines: as many tests as the table has rows.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import IncompatibleModelsError
from blockmerge.demo import make_state_dicts
from tests.refusals import assert_refused
from tests.small_models import small_model

UNET = "model.diffusion_model."
FIRST = UNET + "input_blocks.0.0.weight"
PROJ = UNET + "input_blocks.4.1.proj_in.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.fixture
def models(pairs):
    return tuple(load_file(path) for path in pairs())


@pytest.fixture
def merged(tmp_path):
    """Merge two state dicts through files and give back the result's tensors and notes."""

    def merge(a, b, **options):
        options = {"weights": 0.5} | options
        for name, tensors in (("a", a), ("b", b)):
            save_file(tensors, tmp_path / f"{name}.safetensors")
        output = tmp_path / "out.safetensors"
        result = blockmerge.merge(
            tmp_path / "a.safetensors", tmp_path / "b.safetensors", output=output, overwrite=True, **options
        )
        out = load_file(output)
        assert sum(
            (result.tensors.computed, result.tensors.from_a, result.tensors.from_b, result.tensors.from_vae)
        ) == len(out)
        return out, result

    return merge


def half(a, b, name):
    return ((a[name].double() + b[name].double()) / 2).to(a[name].dtype)


@pytest.mark.parametrize(
    ("base", "vae", "source"),
    [
        (0, "auto", 0),
        (0.5, "auto", 0),
        (0.51, "auto", 1),
        (1, "auto", 1),
        (1, "a", 0),
        (0, "b", 1),
        ("skip", "auto", 0),
    ],
)
def test_the_vae_is_taken_whole(models, merged, base, vae, source):
    out, result = merged(*models, weights=f"BASE={base},M00=0.5", vae=vae)
    for name in out:
        if name.startswith("first_stage_model."):
            assert torch.equal(out[name], models[source][name])
    assert any(
        f"the VAE is taken whole from {'ab'[source]}.safetensors" in note for note in result.notes
    ) == (vae == "auto")


def test_the_vae_blended_follows_base(models, merged):
    out, _ = merged(*models, weights="BASE=0.5", vae="blend")
    assert torch.equal(out[VAE], half(*models, VAE))
    assert torch.equal(out[TEXT], half(*models, TEXT))
    assert torch.equal(out[PROJ], models[0][PROJ])


@pytest.mark.parametrize(
    ("method", "weights", "factor"), [("scale", 0.5, 0.5), ("scale", "BASE=1.25,M00=0.5", 1.25)]
)
def test_the_vae_blended_follows_base_with_one_model(models, tmp_path, method, weights, factor):
    a, _ = models
    given = {"method": method, "weights": weights}
    for name, options in {
        "blend": {"vae": "blend"}, "auto": {}, "a": {"vae": "a"},
        "rules": {"vae": "blend", "rules": "BASE:decoder:0.25"},
    }.items():  # fmt: skip
        blockmerge.merge(a, output=tmp_path / f"{name}.safetensors", **given, **options)
        out = load_file(tmp_path / f"{name}.safetensors")
        here = {"blend": factor, "rules": 0.25}.get(name, 1.0)
        assert torch.equal(out[VAE], (a[VAE].double() * here).half()), name
        assert torch.equal(out[TEXT], (a[TEXT].double() * factor).half())
        merged = blockmerge.merge_state_dicts(a, **given, **options)
        assert all(torch.equal(merged[tensor], out[tensor]) for tensor in out)


def test_noise_in_the_vae_only_where_it_is_blended(models):
    a, _ = models
    for vae in ("auto", "a", "blend"):
        noisy = blockmerge.merge_state_dicts(a, method="add_noise", weights=0.1, seed=3, vae=vae)
        assert torch.equal(noisy[VAE], a[VAE]) == (vae != "blend")
        assert not torch.equal(noisy[TEXT], a[TEXT])
    with pytest.raises(blockmerge.RecipeError, match=r"unknown VAE choice 'b': auto, a or blend$"):
        blockmerge.merge_state_dicts(a, method="scale", weights=0.5, vae="b")


def test_a_vae_that_not_all_have_is_copied_though_a_blend_is_asked_for(models, tmp_path):
    a, b = models
    less = {name: tensor for name, tensor in b.items() if not name.startswith("first_stage_model.")}
    for places in ((a, b, less), (less, a, b), (less, a, less)):
        first = next(model for model in places if VAE in model)
        given = {"method": "average", "weights": 1, "vae": "blend"}
        result = blockmerge.merge(*places, output=tmp_path / "out.safetensors", overwrite=True, **given)
        out = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(out[name], first[name]) for name in first if name.startswith("first_stage"))
        assert not torch.equal(out[TEXT], a[TEXT])
        assert any(note.startswith("the VAE is only in ") for note in result.notes), result.notes
    result = blockmerge.merge(a, b, less, method="average", weights=1, output=tmp_path / "auto.safetensors")
    assert any(note.startswith("the VAE is taken whole from ") for note in result.notes)
    assert not any("--vae blend" in note for note in result.notes)  # it would not


def test_vaes_of_other_shapes_do_not_blend_and_the_way_out_works(models, merged):
    a, b = models
    name = next(name for name in b if name.startswith("first_stage_model.decoder.conv_in.weight"))
    other = {**b, name: b[name][:, :2].contiguous()}
    with pytest.raises(IncompatibleModelsError, match=r"shapes differ: .*--vae a\)") as caught:
        merged(a, other, vae="blend")
    assert "skip" not in str(caught.value)
    with pytest.raises(IncompatibleModelsError, match=r"shapes differ: .*vae='a'"):
        blockmerge.merge_state_dicts(a, other, weights=0.5, vae="blend")
    for out in (merged(a, other, vae="a")[0], blockmerge.merge_state_dicts(a, other, weights=0.5, vae="a")):
        assert torch.equal(out[name], a[name])
    blended = "model.diffusion_model.out.2.weight"
    assert torch.equal(merged(a, other, vae="a")[0][blended], half(a, b, blended))


@pytest.mark.parametrize("word", ["blend", "a", "b"])
def test_converting_takes_words_for_files(models, here, word):
    a, b = models
    says = rf"{word}.*vae \(--vae\) takes a file or a folder"
    with pytest.raises(blockmerge.CheckpointError, match=says):
        blockmerge.convert(a, "out.safetensors", vae=word)
    save_file({n: t for n, t in b.items() if n.startswith("first_stage_model.")}, word)
    blockmerge.convert(a, "out.safetensors", vae=word)
    assert torch.equal(load_file("out.safetensors")[VAE], b[VAE])


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_vae_file_is_baked_in(models, merged, tmp_path, prefix):
    vae = {
        prefix + name.removeprefix("first_stage_model."): tensor + 1
        for name, tensor in models[0].items()
        if name.startswith("first_stage_model.")
    }
    save_file({**vae, "loss.logvar": torch.zeros(1)}, tmp_path / "my.vae.safetensors")
    out, result = merged(*models, vae=tmp_path / "my.vae.safetensors")
    assert torch.equal(out[VAE], models[0][VAE] + 1)
    assert result.tensors.from_vae == 248
    assert "the VAE is my.vae.safetensors" in result.notes
    without = [{n: t for n, t in model.items() if not n.startswith("first_stage")} for model in models]
    out, result = merged(*without, vae=tmp_path / "my.vae.safetensors")
    assert torch.equal(out[VAE], models[0][VAE] + 1)
    assert "loss.logvar" not in out


def test_a_vae_that_does_not_fit_is_refused(models, pairs, tmp_path, capsys):
    a, b = pairs()
    vae = {name: tensor for name, tensor in models[0].items() if name.startswith("first_stage_model.")}
    wide = {**vae, VAE: torch.zeros(512, 4, 3, 3)}
    vae.pop(VAE)
    save_file(vae, tmp_path / "part.safetensors")
    save_file(wide, tmp_path / "wide.safetensors")
    assert_refused(
        capsys, tmp_path, a, b, "-w", "0.5", "--vae", "part.safetensors", says=["not a complete VAE", VAE]
    )
    assert_refused(
        capsys, tmp_path, a, b, "-w", "0.5", "--vae", "wide.safetensors", says=["another shape", VAE]
    )
    assert_refused(
        capsys, tmp_path, a, b, "-w", "0.5", "--vae", "C", says=["C", "auto, a, b, blend, a file or a folder"]
    )
    save_file({n: t for n, t in models[1].items() if n.startswith("model.")}, tmp_path / "unet.safetensors")
    assert_refused(
        capsys, tmp_path, a, "unet.safetensors", "-w", "0.5", "--vae", "b", says="unet.safetensors has no VAE"
    )


@pytest.mark.parametrize("prefixed", [(True, True), (False, False), (True, False), (False, True)])
def test_a_unet_alone_with_and_without_prefix(models, merged, prefixed):
    unets = [
        {
            name if keep else name.removeprefix(UNET): tensor
            for name, tensor in model.items()
            if name.startswith(UNET)
        }
        for model, keep in zip(models, prefixed, strict=True)
    ]
    out, result = merged(*unets)
    assert out.keys() == unets[0].keys()
    assert torch.equal(out[PROJ if prefixed[0] else PROJ.removeprefix(UNET)], half(*models, PROJ))
    assert result.tensors.computed == 686


def test_components_that_only_one_model_has(models, merged):
    unet = {name: tensor for name, tensor in models[0].items() if name.startswith(UNET)}
    out, result = merged(unet, models[1])
    assert out.keys() == models[1].keys()
    assert torch.equal(out[TEXT], models[1][TEXT])
    assert torch.equal(out[VAE], models[1][VAE])
    assert torch.equal(out[PROJ], half(*models, PROJ))
    assert "the VAE is only in b.safetensors and copied from there" in result.notes
    assert "the text encoder is only in b.safetensors and copied from there" in result.notes
    out, result = merged(models[1], unet)
    assert out.keys() == models[1].keys()
    assert torch.equal(out[TEXT], models[1][TEXT])


def test_a_bare_unet_gets_its_prefix_when_more_comes_with_it(models, merged):
    bare = {name.removeprefix(UNET): tensor for name, tensor in models[0].items() if name.startswith(UNET)}
    out, result = merged(bare, models[1])
    assert out.keys() == models[1].keys()
    assert any("get the prefix model.diffusion_model." in note for note in result.notes)


def test_single_tensors_that_only_one_model_has(models, merged):
    a, b = models
    extra = {"cond_stage_model.extra": torch.ones(3), "strange.tensor": torch.full((2,), 7.0)}
    out, result = merged(a, {**b, **extra})
    assert torch.equal(out["cond_stage_model.extra"], torch.ones(3))
    assert torch.equal(out["strange.tensor"], torch.full((2,), 7.0))
    assert any(
        "2 tensors are unknown to blockmerge" in note and "strange.tensor" in note for note in result.notes
    )
    out, result = merged({**a, **extra}, b)
    assert torch.equal(out["strange.tensor"], torch.full((2,), 7.0))
    assert any(
        "2 tensors are unknown to blockmerge" in note and "strange.tensor" in note for note in result.notes
    )


def test_schedules_and_integers_come_from_a(models, merged):
    a, b = models
    ours = {
        "betas": torch.rand(10),
        "alphas_cumprod": torch.rand(10),
        "steps": torch.tensor([1, 2]),
        "flag": torch.tensor(True),
    }
    theirs = {
        "betas": torch.rand(10),
        "alphas_cumprod": torch.rand(10),
        "steps": torch.tensor([3, 4]),
        "flag": torch.tensor(False),
    }
    out, result = merged({**a, **ours}, {**b, **theirs}, dtype="bf16")
    for name, tensor in ours.items():
        assert torch.equal(out[name], tensor)
    assert "2 integer or schedule tensors are copied from a.safetensors" in result.notes
    assert any(
        "2 tensors are unknown to blockmerge" in note and "steps, flag" in note for note in result.notes
    )
    out, _ = merged(a, {**b, **theirs})
    assert torch.equal(out["betas"], theirs["betas"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_floats_in_only_one_model_are_refused_in_the_unet_and_noted_elsewhere(models, merged, dtype):
    # Those that the architecture has as floats are refused before: see test_quantised_refused.
    unet = UNET + "time_embed.cond_proj.weight"
    text = "cond_stage_model.transformer.text_projection.weight"
    a, b = ({**one, unet: one[PROJ].clone(), text: one[TEXT].clone()} for one in models)
    spelled = {torch.int8: "I8", torch.bool: "BOOL"}[dtype]
    for first, second, said in (
        ({**a, unet: a[unet].to(dtype)}, b, f"{spelled} and F16"),
        (a, {**b, unet: b[unet].to(dtype)}, f"F16 and {spelled}"),
    ):
        with pytest.raises(
            IncompatibleModelsError, match=rf"cannot be merged: {unet} \(dtypes do not blend: {said}\)$"
        ):
            merged(first, second)
    out, result = merged(a, {**b, text: b[text].to(dtype)})
    assert torch.equal(out[text], a[text])
    assert (
        f"1 tensor is stored as floats in some models only, and copied from the first that has them ({text} is F16 and {spelled})"
        in result.notes
    )
    out, result = merged({**a, unet: a[unet].to(dtype)}, {**b, unet: b[unet].to(dtype)})
    assert torch.equal(out[unet], a[unet].to(dtype))
    assert "1 integer or schedule tensor is copied from a.safetensors" in result.notes


def test_intact_position_ids_never_change(models, merged):
    for dtype in (torch.int64, torch.int32, torch.float16, torch.float32, torch.bfloat16):
        exact = torch.arange(77).view(1, 77).to(dtype)
        out, result = merged({**models[0], POSITIONS: exact}, models[1], weights=1, dtype="bf16")
        assert torch.equal(out[POSITIONS], exact)
        assert out[POSITIONS].dtype == dtype
        assert not any("position_ids" in note for note in result.notes)


@pytest.mark.parametrize(
    "broken", [torch.arange(77).float() * 1.01, torch.arange(77) + 1, torch.full((77,), float("nan"))]
)
def test_broken_position_ids_are_restored(models, merged, broken):
    out, result = merged({**models[0], POSITIONS: broken.view(1, 77)}, models[1])
    assert torch.equal(out[POSITIONS], torch.arange(77).view(1, 77))
    assert any("position_ids restored" in note for note in result.notes)
    memory = blockmerge.merge_state_dicts(
        {**models[0], POSITIONS: broken.view(1, 77)}, models[1], weights=0.5
    )
    assert torch.equal(memory[POSITIONS], torch.arange(77).view(1, 77))


def test_position_ids_that_only_b_has(models, merged):
    a = {name: tensor for name, tensor in models[0].items() if name != POSITIONS}
    out, _ = merged(a, models[1])
    assert torch.equal(out[POSITIONS], models[1][POSITIONS])
    out, _ = merged(models[1], a)
    assert torch.equal(out[POSITIONS], models[1][POSITIONS])


def test_prediction_markers_come_from_a_only(models, merged):
    a, b = models
    marked = {**b, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    out, result = merged(a, marked)
    assert "v_pred" not in out
    assert any(
        "warning: prediction markers differ" in note and "b.safetensors has v_pred, ztsnr" in note
        for note in result.notes
    )
    out, result = merged(marked, b)
    assert "v_pred" in out
    assert any("warning" in note for note in result.notes)
    out, result = merged(marked, marked)
    assert not any("warning" in note for note in result.notes)


def ema_of(model):
    return {
        "model_ema.diffusion_model" + name.removeprefix(UNET).replace(".", ""): tensor.float()
        for name, tensor in model.items()
        if name.startswith(UNET)
    }


def test_ema_copies_are_left_out(models, merged):
    a, b = models
    out, result = merged({**a, **ema_of(a), "model_ema.decay": torch.tensor(0.99)}, b)
    assert out.keys() == a.keys()
    assert result.tensors.dropped == 687
    assert any("left out 687 EMA tensors of a.safetensors" in note for note in result.notes)
    leftovers = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}
    _, result = merged({**a, **leftovers}, b)
    said = "left out 2 EMA tensors of a.safetensors, which would be stale (model_ema.decay, model_ema.num_updates)"
    assert said in [
        note.replace("num_updates, model_ema.decay", "decay, model_ema.num_updates") for note in result.notes
    ]


def test_ema_weights_that_are_all_there_is_are_the_unet(models, merged):
    a, b = models
    out, result = merged(a, {**ema_of(b), "model_ema.decay": torch.tensor(0.99)})
    assert out.keys() == a.keys()
    assert torch.equal(out[PROJ], half(a, b, PROJ))
    assert any("b.safetensors has only EMA weights" in note for note in result.notes)
    out, result = merged(ema_of(a), b)
    assert out[PROJ].dtype == torch.float32
    assert torch.equal(out[PROJ].double(), (a[PROJ].double() + b[PROJ].double()) / 2)


def test_novelai_text_encoders_match_the_usual_ones(models, merged):
    a, b = models
    nai = {name.replace(".text_model.", "."): tensor for name, tensor in b.items()}
    assert nai.keys() != b.keys()
    out, _ = merged(a, nai)
    assert out.keys() == a.keys()
    assert torch.equal(out[TEXT], half(a, b, TEXT))
    out, _ = merged(nai, a)
    assert out.keys() == a.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("channels", "family"), [(9, "sd1"), (8, "sd1"), (5, "sd2")])
@pytest.mark.parametrize("weight", [0, 0.5, 1])
@pytest.mark.parametrize("wide_is_a", [True, False])
def test_more_input_channels_are_kept(merged, channels, family, weight, wide_is_a, dtype):
    a, b = (small_model(family, seed=seed) for seed in (0, 1))
    extra = torch.randn(8, channels - 4, 3, 3, dtype=dtype)
    wide = a if wide_is_a else b
    wide[FIRST] = torch.cat([wide[FIRST].to(dtype), extra], dim=1)
    out, result = merged(a, b, weights=weight)
    assert result.variant == {9: "inpainting", 8: "pix2pix", 5: "depth"}[channels]
    first, second = a[FIRST][:, :4], b[FIRST][:, :4]
    exact = ((1 - weight) * first.double() + weight * second.double()).to(a[FIRST].dtype)
    assert torch.equal(out[FIRST][:, :4], exact)
    assert torch.equal(out[FIRST][:, 4:], extra.to(a[FIRST].dtype))
    assert out[FIRST].dtype == a[FIRST].dtype
    memory = blockmerge.merge_state_dicts(a, b, weights=weight)
    assert torch.equal(memory[FIRST], out[FIRST])


def test_two_wide_first_convolutions_of_different_kinds_are_refused(models, tmp_path):
    a, b = models
    a[FIRST], b[FIRST] = torch.zeros(8, 9, 3, 3), torch.zeros(8, 8, 3, 3)
    with pytest.raises(IncompatibleModelsError, match="shapes differ"):
        blockmerge.merge(a, b, weights=0.5, output=tmp_path / "out.safetensors")


def test_each_tensor_keeps_the_dtype_of_a(models, merged):
    a, b = models
    mixed_a = {
        name: tensor.float() if "output_blocks" in name and tensor.is_floating_point() else tensor
        for name, tensor in a.items()
    }
    mixed_b = {name: tensor.bfloat16() if "input_blocks" in name else tensor for name, tensor in b.items()}
    for weight in (0.5, 1):
        out, result = merged(mixed_a, mixed_b, weights=weight)
        assert {name: tensor.dtype for name, tensor in out.items()} == {
            name: tensor.dtype for name, tensor in mixed_a.items()
        }
        assert any("are converted from BF16 to F16" in note for note in result.notes)
        assert any("are converted from F16 to F32" in note for note in result.notes)


def test_files_in_another_order_than_a(models, tmp_path):
    """B's tensors lie in reverse; written by hand, since safetensors always sorts."""
    import json

    a, b = models
    header, blob = {}, b""
    for name in reversed(list(b)):
        raw = b[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = {torch.float16: "F16", torch.int64: "I64"}[b[name].dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(b[name].shape),
            "data_offsets": [len(blob), len(blob) + len(raw)],
        }
        blob += raw
    for pad in range(4):  # the data begins at any byte
        text = json.dumps(header).encode() + b" " * pad
        (tmp_path / "b.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + blob)
        blockmerge.merge(
            a,
            tmp_path / "b.safetensors",
            preset="high_res",
            output=tmp_path / "one.safetensors",
            overwrite=True,
        )
        blockmerge.merge(
            tmp_path / "b.safetensors",
            a,
            preset="high_res",
            output=tmp_path / "three.safetensors",
            overwrite=True,
        )
        blockmerge.merge(a, b, preset="high_res", output=tmp_path / "two.safetensors", overwrite=True)
        blockmerge.merge(b, a, preset="high_res", output=tmp_path / "four.safetensors", overwrite=True)
        for left, right in (("one", "two"), ("three", "four")):
            first, second = (
                load_file(tmp_path / f"{left}.safetensors"),
                load_file(tmp_path / f"{right}.safetensors"),
            )
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)


def test_empty_and_scalar_tensors(models, merged):
    a, b = models
    extra = {
        UNET + "time_embed.scalar": torch.tensor(1.0),
        UNET + "time_embed.empty": torch.zeros(0, 4),
        "nothing": torch.zeros(0),
    }
    other = {
        UNET + "time_embed.scalar": torch.tensor(3.0),
        UNET + "time_embed.empty": torch.zeros(0, 4),
        "nothing": torch.zeros(0),
    }
    out, _ = merged({**a, **extra}, {**b, **other})
    assert out[UNET + "time_embed.scalar"].item() == 1.0  # nobody knows what it is
    assert out[UNET + "time_embed.scalar"].shape == ()
    assert out[UNET + "time_embed.empty"].shape == (0, 4)


def test_skip_leaves_a_block_alone(models, merged):
    out, result = merged(*models, weights="BASE=skip,IN04=skip,IN05=0.5")
    assert torch.equal(out[PROJ], models[0][PROJ])
    assert torch.equal(out[TEXT], models[0][TEXT])
    assert result.weights["IN04"] is None


def test_weights_beyond_the_models_are_noted(models, merged):
    _, result = merged(*models, weights="IN04=1.5,M00=-0.5")
    assert "weights outside 0 to 1 go beyond the models: IN04, M00" in result.notes


def test_no_two_tensors_of_a_folder_get_one_name(tmp_path):
    """A tensor under a folder's name in an LDM file; a part without its others, where another model has the
    whole.
    """
    a, b = make_state_dicts("sdxl")
    stray = blockmerge.convert(
        {**a, "vae.decoder.conv_in.bias": torch.ones(3)}, tmp_path / "a", naming="diffusers"
    )
    assert any("two names (vae.decoder.conv_in.bias)" in note for note in stray.notes)
    vae = load_file(tmp_path / "a" / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(vae["decoder.conv_in.bias"], a["first_stage_model.decoder.conv_in.bias"])

    text_encoder = tmp_path / "a" / "text_encoder_2" / "model.safetensors"
    parts = load_file(text_encoder)
    layer = "text_model.encoder.layers.3.self_attn"
    save_file(
        {name: tensor for name, tensor in parts.items() if name != f"{layer}.v_proj.weight"}, text_encoder
    )
    merged = blockmerge.merge(tmp_path / "a", b, weights=0.5, output=tmp_path / "merged")
    result = load_file(tmp_path / "merged" / "text_encoder_2" / "model.safetensors")
    whole = b["conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"]
    rows = [result[f"{layer}.{letter}_proj.weight"] for letter in "qkv"]
    assert torch.equal(torch.cat(rows), whole)
    assert any("others of that name" in note and f"{layer}.q_proj.weight" in note for note in merged.notes)


def test_every_one_of_many_models_counts(tmp_path):
    a = make_state_dicts("sd1")[0]
    name = "model.diffusion_model.out.2.bias"
    models = [{**a, name: torch.full_like(a[name], float(number))} for number in range(30)]
    merged = blockmerge.merge_state_dicts(*models, method="average")
    assert torch.allclose(merged[name], torch.full_like(a[name], 14.5))
    result = blockmerge.merge(*models, method="average", output=tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")[name], merged[name])
    assert len(result.models) == 30
    assert result.models[25:27] == ("state dict Z", "state dict 27")


def test_what_not_all_models_have_is_told(tmp_path):
    a, b = make_state_dicts("sd1")
    c = {name: tensor for name, tensor in a.items() if not name.startswith("cond_stage_model.")}
    extra = {"cond_stage_model.extra": torch.zeros(2)}
    result = blockmerge.merge(
        {**a, **extra}, {**b, **extra}, c, method="average", output=tmp_path / "out.safetensors"
    )
    assert (
        "the text encoder is only in state dict A, state dict B and copied from state dict A" in result.notes
    )
    mixed = [a, {**b, "extra": torch.zeros(2)}, {**a, "extra": torch.zeros(2, dtype=torch.int64)}]
    merged = blockmerge.merge_state_dicts(*mixed, method="average")
    assert torch.equal(merged["extra"], torch.zeros(2))


@pytest.mark.parametrize(
    ("method", "models", "source"), [("weighted_sum", 2, 1), ("add_difference", 3, 0), ("average", 3, 0)]
)
def test_the_vae_is_bs_only_where_weight_1_is_b(method, models, source):
    dicts = [*make_state_dicts("sd1"), make_state_dicts("sd1", seed=5)[0]][:models]
    merged = blockmerge.merge_state_dicts(*dicts, method=method, weights=1.0)
    name = "first_stage_model.decoder.conv_in.weight"
    assert torch.equal(merged[name], dicts[source][name])

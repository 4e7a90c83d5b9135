"""`convert`, and the parts of a model that it and merging treat in their own way: EMA copies, VAEs, variants,
dtypes.

Over 500 lines: the parts of a model share the forms that they are tried in.
"""

from __future__ import annotations

import itertools
import json
import os
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import BlockmergeError, IncompatibleModelsError
from blockmerge.anatomy import component_of, is_position_ids
from blockmerge.cli.main import run
from blockmerge.demo import make_state_dicts
from tests.conftest import unchanged
from tests.effort import some
from tests.forms import (
    FORMS,
    UNET,
    as_dtype,
    assert_same,
    ema_of,
    in_diffusers,
    is_unet,
    read,
    write,
    write_folder,
)
from tests.oracle import bits
from tests.refusals import assert_refused
from tests.small_models import small_model

VAE = "first_stage_model."
FIRST = UNET + "input_blocks.0.0.weight"
PROJ = UNET + "input_blocks.4.1.proj_in.weight"
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip

_USUAL = itertools.product(("fp16", "bf16", "fp32"), ("fp16", "bf16", "fp8_e4m3fn"))
CASTS = dict.fromkeys((*_USUAL, *some(itertools.product(DTYPES, DTYPES), of=5)))


@pytest.fixture(scope="module")
def states():
    made = {}

    def state(side=0, family="sd1"):
        if family not in made:
            made[family] = make_state_dicts(family)
        return dict(made[family][side])

    return state


@pytest.fixture(scope="module")
def small():
    """As `states`, with a few tensors of each kind: for what does not depend on how many there are."""
    made = cache(lambda side, family: small_model(family, torch.float32, side, for_a_folder=True))
    return lambda side=0, family="sd1": dict(made(side, family))


def merged(a, b, folder, **options):
    """Merge two state dicts by way of files; returns the result's tensors and the result."""
    paths = write(a, folder / "a", "safetensors"), write(b, folder / "b", "zip")
    options = {"weights": 0.5, "output": folder / "out.safetensors", "overwrite": True, **options}
    result = blockmerge.merge(*paths, **options)
    return read(options["output"]), result


def converted(source, folder, **options):
    """Convert a state dict or path; returns the output's tensors and the result."""
    output = folder / ("out" if options.get("naming") == "diffusers" else "out.safetensors")
    result = blockmerge.convert(source, output, overwrite=True, **options)
    return read(output), result


def ema_in(tensors):
    return {name: tensor for name, tensor in tensors.items() if component_of(name) == "ema"}


# -- EMA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["a", "b", "both"])
def test_ema_copies_are_dropped_kept_or_used(small, tmp_path, who):
    a, b = small(0), small(1)
    with_ema = {**a, **ema_of(a)} if who != "b" else a, {**b, **ema_of(b)} if who != "a" else b
    out, result = merged(*with_ema, tmp_path)
    plain, _ = merged(a, b, tmp_path)
    assert_same(out, plain)
    count = len(ema_of(a)) * (2 if who == "both" else 1)
    assert result.tensors.dropped == count
    assert sum("EMA tensors of" in note for note in result.notes) == (2 if who == "both" else 1)

    out, result = merged(*with_ema, tmp_path, ema="keep")
    assert_same({name: tensor for name, tensor in out.items() if component_of(name) != "ema"}, plain)
    # A copy that both have is merged as the U-Net is, to the half of it that it was; else it is as it was.
    wanted = ema_of(
        {name: tensor for name, tensor in plain.items() if is_unet(name)}
        if who == "both"
        else small(who == "b")
    )
    assert_same(ema_in(out), wanted)
    assert any("it does not follow the merge" in note for note in result.notes) == (who != "both")

    out, result = merged(*with_ema, tmp_path, ema="use")
    halves = [{n: t / 2 if is_unet(n) else t for n, t in state.items()} for state in (a, b)]
    wanted, _ = merged(halves[0] if who != "b" else a, halves[1] if who != "a" else b, tmp_path)
    assert_same(out, wanted)
    copies = sum(map(is_unet, a))
    assert sum(f"is its EMA copy ({copies} tensors)" in note for note in result.notes) == (
        2 if who == "both" else 1
    )


def test_ema_weights_alone_are_the_unet(small, tmp_path):
    alone = ema_of(small())
    for ema, naming in itertools.product(("drop", "keep", "use"), ("ldm", "diffusers")):
        out, result = converted(alone, tmp_path, ema=ema, naming=naming)
        wanted = {name: tensor / 2 for name, tensor in small().items() if is_unet(name)}
        assert_same(out, in_diffusers(wanted, "sd1") if naming == "diffusers" else wanted)
        assert any(
            "has only EMA weights for its U-Net: they are used as the U-Net" in note for note in result.notes
        )


def test_ema_copies_that_are_not_there_cannot_be_used(states, tmp_path, capsys):
    for side, name in ((0, "a"), (1, "b")):
        write(states(side), tmp_path / name, "safetensors")
    write_folder(in_diffusers(states(), "sd1"), tmp_path / "folder")
    says = "no EMA copies to use in a.safetensors and b.safetensors: leave out ema='use' (--ema use)"
    assert_refused(capsys, tmp_path, "a.safetensors", "b.safetensors", "-w", "0.5", "--ema", "use", says=says)
    assert_refused(
        capsys,
        tmp_path,
        "convert",
        "folder",
        "o.safetensors",
        "--ema",
        "use",
        says="no EMA copies to use in folder",
    )
    assert_refused(
        capsys,
        tmp_path,
        "convert",
        "folder",
        "o.safetensors",
        "--ema",
        "yes",
        says="unknown choice 'yes' for EMA",
    )


def test_a_folder_has_no_place_for_ema(small, tmp_path):
    out, result = converted({**small(), **ema_of(small())}, tmp_path, ema="keep", naming="diffusers")
    assert_same(out, in_diffusers(small(), "sd1"))
    assert any(
        f"{len(ema_of(small()))} tensors left out, which a diffusers folder has no place for" in note
        for note in result.notes
    )


# -- the VAE -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_vae(states, small):
    """Small models with all of a VAE."""
    return lambda side: {
        **small(side),
        **{name: tensor for name, tensor in states(side).items() if name.startswith(VAE)},
    }


def vae_files(states, folder):
    """{how it comes: path} of B's VAE."""
    vae = {name.removeprefix(VAE): tensor for name, tensor in states(1).items() if name.startswith(VAE)}
    whole = {VAE + name: tensor for name, tensor in vae.items()}
    in_folder = {n: t for n, t in in_diffusers(whole, "sd1").items() if n.startswith("vae/")}
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def old_name(name):
        return next((name.replace(new, former) for new, former in old.items() if new in name), name)

    save_file(vae, folder / "bare.safetensors")
    save_file(whole, folder / "prefixed.safetensors")
    torch.save(
        {"state_dict": {**vae, "loss.logvar": torch.zeros(())}, "epoch": 1}, folder / "anything.vae.pt"
    )
    write_folder(in_folder, folder / "vae-only")
    write_folder({old_name(name): tensor for name, tensor in in_folder.items()}, folder / "old-names")
    write(states(1), folder / "pipeline", "folder")
    write(states(1), folder / "model", "zip")
    names = (
        "bare.safetensors",
        "prefixed.safetensors",
        "anything.vae.pt",
        "vae-only/vae",
        "vae-only",
        "old-names/vae",
        "old-names",
    )
    return [folder / name for name in (*names, "pipeline", "model.ckpt")]


@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_any_vae_is_baked_in(whole_vae, tmp_path, naming):
    a, b = whole_vae(0), whole_vae(1)
    lacking = {name: tensor for name, tensor in a.items() if not name.startswith(VAE)}
    wanted = {**a, **{name: tensor for name, tensor in b.items() if name.startswith(VAE)}}
    wanted = in_diffusers(wanted, "sd1") if naming == "diffusers" else wanted
    for number, path in enumerate(vae_files(whole_vae, tmp_path)):
        out, result = converted(lacking if number % 2 else a, tmp_path, vae=path, naming=naming)
        assert_same(out, wanted)
        assert any(note.startswith("the VAE is ") and note.endswith(path.name) for note in result.notes)
    output = tmp_path / ("out" if naming == "diffusers" else "out.safetensors")
    out, result = merged(
        a, as_dtype(b, torch.float16), tmp_path, vae=path, naming=naming, output=output, weights=0
    )
    assert_same(out, wanted)
    assert result.tensors.from_vae == 248


def test_vaes_that_do_not_fit_are_refused(states, tmp_path, capsys):
    write(states(), tmp_path / "a", "safetensors")
    vae = {name.removeprefix(VAE): tensor for name, tensor in states(1).items() if name.startswith(VAE)}
    name = "decoder.mid.attn_1.q.weight"
    bad = {
        "lacking": ({n: t for n, t in vae.items() if n != name}, f"not a complete VAE: it lacks {VAE}{name}"),
        "empty": ({"x": torch.zeros(1)}, "not a complete VAE: it lacks"),
        "misshapen": ({**vae, name: vae[name][:-1]}, f"a VAE of another shape: {VAE}{name}"),
        "wider": ({n: t.repeat(2, *[1] * (t.dim() - 1)) for n, t in vae.items()}, "a VAE of another shape"),
    }
    lacking = {n: t for n, t in states().items() if not n.startswith(VAE)}
    write(lacking, tmp_path / "no-vae", "safetensors")
    for case, (tensors, says) in bad.items():
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / f"{case}.safetensors")
        says = [f"{case}.safetensors is", says]
        for model in ("a.safetensors", "no-vae.safetensors"):
            vae_option = ("--vae", f"{case}.safetensors")
            # Nothing there to hold it against but itself.
            if (model, case) != (
                "no-vae.safetensors",
                "wider",
            ):
                assert_refused(capsys, tmp_path, "convert", model, "o.safetensors", *vae_option, says=says)
            assert_refused(
                capsys,
                tmp_path,
                "convert",
                model,
                "o/",
                "--to",
                "diffusers",
                "--vae",
                "missing.pt",
                says="missing.pt",
            )
        assert_refused(capsys, tmp_path, "a.safetensors", "a.safetensors", "-w", "0", *vae_option, says=says)


# -- variants ------------------------------------------------------------------------------------------------


def widened(state, channels):
    kernel = torch.randn(
        state[FIRST].shape[0], channels - 4, 3, 3, generator=torch.Generator().manual_seed(channels)
    )
    return {**state, FIRST: torch.cat([state[FIRST], kernel], 1)}


@pytest.mark.parametrize(("family", "channels", "variant", "one", "other"), [
    ("sd1", 9, "inpainting", "safetensors", "folder"), ("sd1", 8, "pix2pix", "folder", "zip"),
    ("sd2", 9, "inpainting", "zip", "safetensors"), ("sd2", 5, "depth", "safetensors", "zip"),
    ("sdxl", 9, "inpainting", "folder", "safetensors"),
])  # fmt: skip
def test_variants_merge_with_normal_models_either_side_in_any_form(
    small, tmp_path, family, channels, variant, one, other
):
    a, b = small(0, family), small(1, family)
    wide = widened(b, channels)
    wanted_first = torch.cat([torch.lerp(a[FIRST], b[FIRST], 0.5), wide[FIRST][:, 4:]], 1)
    paths = write(a, tmp_path / "a", one, family), write(wide, tmp_path / "wide", other, family)
    for naming, given in (("ldm", paths), ("diffusers", paths[::-1])):
        output = tmp_path / ("out" if naming == "diffusers" else "out.safetensors")
        result = blockmerge.merge(*given, weights=0.5, output=output, naming=naming)
        assert result.variant == blockmerge.inspect(output).variant == variant
        first = read(output)["unet/conv_in.weight" if naming == "diffusers" else FIRST]
        torch.testing.assert_close(first, wanted_first, rtol=1e-5, atol=1e-7)
        assert torch.equal(first[:, 4:], wide[FIRST][:, 4:])


def test_an_ema_copy_of_the_first_convolution_has_its_channels_too(small, tmp_path):
    a, wide = small(0), widened(small(1), 9)
    out, _ = merged({**a, **ema_of(a)}, {**wide, **ema_of(wide)}, tmp_path, ema="keep")
    assert torch.equal(out["model_ema.diffusion_modelinput_blocks00weight"], out[FIRST] / 2)


def test_markers_of_v_prediction_are_kept(small, tmp_path):
    marked = {
        **small(),
        "v_pred": torch.ones(()),
        "ztsnr": torch.ones(()),
        "edm_vpred.sigma_max": torch.tensor(120.0),
    }
    markers = {"v_pred", "ztsnr", "edm_vpred.sigma_max"}
    for options in ({}, {"prune": True}, {"dtype": "fp16"}):
        out, _ = converted(marked, tmp_path, **options)
        assert {name: out[name] for name in markers} == {name: marked[name] for name in markers}
    no_edm = {name: tensor for name, tensor in marked.items() if "edm" not in name}
    _, result = converted(no_edm, tmp_path, naming="diffusers")
    assert any("no place for (" in note and "v_pred" in note for note in result.notes)
    out, result = merged(marked, small(1), tmp_path)
    assert out.keys() == marked.keys()
    assert any(note.startswith("warning: prediction markers differ") for note in result.notes)


def test_the_refiner_merges_only_with_refiners(states, tmp_path, capsys):
    a, b = states(0, "sdxl_refiner"), states(1, "sdxl_refiner")
    out, result = merged(a, b, tmp_path)
    assert (result.family, blockmerge.inspect(tmp_path / "a.safetensors").family) == (
        "sdxl_refiner",
        "sdxl_refiner",
    )
    torch.testing.assert_close(out[FIRST], torch.lerp(a[FIRST], b[FIRST], 0.5))
    write(states(0, "sdxl"), tmp_path / "base", "folder", "sdxl")
    says = [
        "Stable Diffusion XL refiner",
        "base is Stable Diffusion XL:",
        "only models of one family can be merged",
    ]
    assert_refused(capsys, tmp_path, "a.safetensors", "base", "-w", "0.5", says=says)
    wide = (
        write(widened(states(), 9), tmp_path / "nine", "zip"),
        write(widened(states(1), 8), tmp_path / "eight", "safetensors"),
    )
    assert_refused(
        capsys, tmp_path, *wide, "-w", "0.5", says=["nine.ckpt and eight.safetensors", FIRST, "shapes differ"]
    )
    three = {**states(), FIRST: states()[FIRST][:, :3].contiguous()}
    write(three, tmp_path / "three", "zip")
    assert_refused(
        capsys,
        tmp_path,
        "convert",
        "three.ckpt",
        "o.safetensors",
        says=["three.ckpt", "which no sd1 model has"],
    )


# -- dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "wanted"), CASTS)
def test_converting_is_torchs_own_cast(small, tmp_path, given, wanted):
    state = as_dtype(small(), DTYPES[given])
    form = FORMS[list(DTYPES).index(wanted) % 3]
    out, _ = converted(write(state, tmp_path / "in", form), tmp_path, dtype=wanted)
    assert_same(out, as_dtype(state, DTYPES[wanted]))
    out, _ = converted(state, tmp_path, dtype=wanted, naming="diffusers")
    assert_same(out, in_diffusers(as_dtype(state, DTYPES[wanted]), "sd1"))


@pytest.mark.parametrize("wanted", DTYPES)
def test_merging_in_and_out_of_eight_bits(states, tmp_path, wanted):
    a, b = as_dtype(states(0), torch.float8_e4m3fn), as_dtype(states(1), torch.float8_e5m2)
    out, _ = merged(a, b, tmp_path, dtype=wanted, vae="blend")
    for name in (PROJ, TEXT, VAE + "decoder.conv_in.weight"):
        assert torch.equal(
            bits(out[name]), bits(torch.lerp(a[name].float(), b[name].float(), 0.5).to(DTYPES[wanted]))
        ), name


def test_what_overflows_is_named(states, tmp_path, capsys):
    state = as_dtype(states(), torch.float32)
    state[PROJ] = torch.full_like(state[PROJ], 1e6)
    for form in ("zip", "folder"):
        path = write(state, tmp_path / form, form)
        for wanted, said in (("fp16", "F16"), ("fp8_e4m3fn", "F8_E4M3"), ("fp8_e5m2", "F8_E5M2")):
            for output in (["o.safetensors"], ["o", "--to", "diffusers"]):
                says = [
                    "1 converted tensor would hold NaN or infinity",
                    f"values too large for {said}",
                    "--allow-nonfinite",
                ]
                name = "unet/down_blocks.1.attentions.0.proj_in.weight" if "o" in output else PROJ
                assert_refused(
                    capsys, tmp_path, "convert", path.name, *output, "--dtype", wanted, says=[*says, name]
                )


# -- convert -------------------------------------------------------------------------------------------------


def test_pruning_leaves_what_a_loader_needs(states, tmp_path):
    needless = {
        "betas": torch.zeros(1000), "alphas_cumprod": torch.ones(1000), "optimizer.state": torch.ones(3),
        VAE + "loss.discriminator.main.0.weight": torch.ones(3, 3), "cond_stage_model.model_ema.decay": torch.zeros(()),
    }  # fmt: skip
    state = {**states(), **needless, **ema_of(states()), "v_pred": torch.ones(())}
    kept, result = converted(state, tmp_path)
    assert kept.keys() == state.keys() - ema_of(states()).keys()
    assert result.tensors.dropped == len(ema_of(states()))
    pruned, result = converted(state, tmp_path, prune=True)
    assert_same(pruned, {**states(), "v_pred": torch.ones(())})
    assert result.tensors.dropped == len(needless) + len(ema_of(states()))
    assert any(note.startswith("5 tensors left out, which no loader needs (") for note in result.notes)
    depth = {**widened(states(0, "sd2"), 5), "depth_model.model.scale": torch.ones(3)}
    pruned, _ = converted(depth, tmp_path, prune=True)
    assert_same(pruned, depth)
    folder = write(states(), tmp_path / "folder", "folder")
    (folder / "safety_checker").mkdir()
    save_file({"concept_embeds": torch.ones(3)}, folder / "safety_checker" / "model.safetensors")
    pruned, _ = converted(folder, tmp_path, prune=True, naming="diffusers")
    assert "safety_checker/concept_embeds" in pruned  # model_index.json names it, and a loader wants it then


def test_position_ids_are_converted_to_what_they_should_be(small, tmp_path):
    name = next(filter(is_position_ids, small()))
    for ids in (
        torch.arange(77.0)[None],
        torch.arange(77.0)[None].half(),
        torch.arange(77.0)[None] * 1.1,
        torch.zeros(77),
    ):
        out, _ = converted({**small(), name: ids}, tmp_path, dtype="bf16")
        assert torch.equal(out[name], torch.arange(77)[None])


def test_output_names(states, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(states(), tmp_path / "m", "zip")
    write(states(), tmp_path / "folder", "folder")
    for line, naming in (
        ("m.ckpt one.safetensors", "ldm"),
        ("m.ckpt two/ --to diffusers", "diffusers"),
        ("folder three.safetensors", "ldm"),
        ("folder/ four", "diffusers"),
        ("folder five.safetensors --to ldm", "ldm"),
        ("folder/unet six.safetensors --to ldm", "ldm"),
    ):
        assert run(["convert", *line.split(), "--json"]) == 0, line
        report = json.loads(capsys.readouterr().out)
        assert (report["naming"], report["method"]) == (naming, "convert")
        assert report["output"] == str(tmp_path / line.split()[1].rstrip("/"))
    assert_same(load_file("one.safetensors"), states())
    assert_same(load_file("three.safetensors"), states())
    assert_same(read("four"), read("two"))


@pytest.fixture(scope="module")
def places(states, tmp_path_factory):
    home = tmp_path_factory.mktemp("places")
    for name, form in (("m", "zip"), ("plain", "safetensors"), ("folder", "folder")):
        write(states(), home / name, form)
    return home


@pytest.mark.parametrize(("line", "says"), [
    ("m.ckpt o.ckpt", "o.ckpt: the output is a .safetensors file: give it that ending"),
    ("m.ckpt o", "o: the output is a .safetensors file"),
    ("m.ckpt o/", "o/ is a folder: give the output a file name, or naming='diffusers' (--to diffusers, of merge, bake and convert)"),
    ("folder o --to ldm", "o: the output is a .safetensors file"),
    ("m.ckpt o.safetensors --to diffusers", "a whole model under diffusers' names is a folder"),
    ("m.ckpt o.safetensors --to sgm", "unknown naming 'sgm': ldm or diffusers"),
    ("m.ckpt o.safetensors --dtype fp64", "unknown dtype 'fp64'"),
    ("m.ckpt o.safetensors --variant fp16", "m.ckpt is not a diffusers folder, and only these have variants: leave out variant='fp16' (--variant)"),
    ("folder o.safetensors --variant fp16", "folder has no weights of the variant 'fp16'"),
    ("m.ckpt m.ckpt", "m.ckpt"),
    ("plain.safetensors plain.safetensors", "is the input plain.safetensors"),
    ("plain.safetensors plain.safetensors --overwrite", "is the input plain.safetensors"),
    ("folder folder --overwrite", "is, holds or lies in the input"),
    ("folder folder/unet/o --overwrite", "is, holds or lies in the input"),
    ("m.ckpt plain.safetensors", "plain.safetensors exists: give another name, or overwrite (--overwrite)"),
    ("m.ckpt folder --to diffusers", "folder exists"),
    ("m.ckpt plain.safetensors/o --to diffusers", "does not exist"),
    ("m.ckpt nowhere/o.safetensors", "nowhere does not exist"),
    ("m.ckpt o.safetensors --vae b", "; vae (--vae) takes a file or a folder"),
    ("m.ckpt o.safetensors --threads 0", "threads"),
])  # fmt: skip
def test_refused_conversions(places, capsys, line, says):
    assert_refused(capsys, places, "convert", *line.split(), says=says)


def test_a_component_becomes_a_folder_without_strays(places, states, tmp_path):
    blockmerge.convert(places / "folder" / "unet", tmp_path / "alone", naming="diffusers")
    blockmerge.merge(
        places / "m.ckpt",
        places / "folder" / "unet",
        weights=0,
        output=tmp_path / "whole",
        naming="diffusers",
    )
    for name in ("alone", "whole"):
        assert {path.name for path in (tmp_path / name).iterdir() if path.is_file()} == {"model_index.json"}
        assert blockmerge.open_checkpoint(tmp_path / name).tensors
    assert_same(read(tmp_path / "whole"), in_diffusers(states(), "sd1"))


def test_sources_in_memory_and_opened(small, tmp_path):
    path = write(small(), tmp_path / "m", "legacy")
    with unchanged(path):
        for source in (path, str(path), blockmerge.open_checkpoint(path), small()):
            out, _ = converted(source, tmp_path)
            assert_same(out, small())
    with pytest.raises(BlockmergeError, match="is not a model"):
        blockmerge.convert(3, tmp_path / "o.safetensors")
    with pytest.raises(IncompatibleModelsError, match="no EMA copies to use in state dict A"):
        blockmerge.convert(small(), tmp_path / "o.safetensors", ema="use")
    assert "o.safetensors" not in os.listdir(tmp_path)

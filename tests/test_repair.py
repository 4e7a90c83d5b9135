"""`check --fix`: the copy has none of the problems that are called repairable, and is the same model in all
else.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import component_of
from blockmerge.checkpoints import TensorInfo, encode_header
from blockmerge.cli.main import run
from blockmerge.demo import make_state_dicts
from blockmerge.inspecting import KINDS, repair
from tests.conftest import unchanged
from tests.effort import in_turn
from tests.forms import FORMS, as_dtype, assert_same, ema_of, in_diffusers, is_unet, read, write
from tests.refusals import assert_refused

IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
PROJ = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
LOSS = "first_stage_model.loss.logvar"


@pytest.fixture(scope="module")
def healthy():
    return as_dtype(make_state_dicts("sd1")[0], torch.float16)


def renamed(state, old, new):
    return {name.replace(old, new): tensor.clone() for name, tensor in state.items()}


TEXT = "cond_stage_model.transformer."
DAMAGES = {
    "broken_position_ids": lambda state: {**state, IDS: state[IDS].float() * 0.99},
    "leftover_nan": lambda state: {**state, LOSS: torch.tensor([float("nan")])},
    "ema": lambda state: {**state, **ema_of(state)},
    "ema_only": lambda state: {**ema_of(state), **{n: t for n, t in state.items() if not is_unet(n)}},
    "leftovers": lambda state: {**state, "betas": torch.zeros(1000), LOSS: torch.ones(3)},
    "two_names": lambda state: {
        **state,
        **renamed({n: t for n, t in state.items() if TEXT in n}, "text_model.", ""),
    },
    "novelai_names": lambda state: renamed(state, TEXT + "text_model.", TEXT),
    "wrapped_names": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "other_names": lambda state: renamed(state, "first_stage_model.", "vae."),
    "float_position_ids": lambda state: {**state, IDS: state[IDS].half()},
}
METADATA = {
    "metadata_architecture": {"modelspec.architecture": "stable-diffusion-xl-v1-base"},
    "metadata_json": {"sd_merge_recipe": "{'type': 'webui'}", "sd_merge_models": "none"},
    "metadata_paths": {"trained_from": "/home/someone/models/a.ckpt"},
    "no_format": {},
}


def repaired(path, code):
    """Repair a file that has a problem of that code; returns the copy's path and tensors."""
    before = {problem.code for problem in blockmerge.check(path).problems}
    assert code in before
    output = path.parent / "fixed.safetensors"
    with unchanged(path):
        result = repair(path, output)
    after = {problem.code for problem in blockmerge.check(output).problems}
    assert set(result.fixed) == before - after
    assert code in result.fixed
    assert not {code for code in after if KINDS[code].fixable}
    assert result.faults == tuple(p for p in result.problems if p.severity != "note" and p.code in after)
    return output, load_file(output)


@pytest.mark.parametrize(("code", "form"), in_turn(DAMAGES, ["safetensors", "legacy"]))
def test_every_repairable_code(healthy, tmp_path, code, form):
    _, fixed = repaired(write(DAMAGES[code](healthy), tmp_path / "m", form), code)
    if code == "ema_only":
        assert_same(
            fixed, {name: tensor / 2 if is_unet(name) else tensor for name, tensor in healthy.items()}
        )
    else:
        assert_same(fixed, healthy)
    assert torch.equal(fixed[IDS], torch.arange(77)[None])


@pytest.mark.parametrize("code", METADATA)
def test_metadata_is_repaired(healthy, tmp_path, code):
    save_file(healthy, tmp_path / "m.safetensors", {**METADATA[code], "note": "stays"})
    output, fixed = repaired(tmp_path / "m.safetensors", code)
    assert_same(fixed, healthy)
    metadata = blockmerge.open_checkpoint(output).metadata
    assert metadata.keys() == {"note", "format", "blockmerge.recipe"}
    assert (metadata["note"], metadata["format"]) == ("stays", "pt")


def test_data_is_aligned(healthy, tmp_path):
    tensors, data = {}, b""
    for name in sorted(healthy, key=lambda name: name != PROJ):
        kind = {torch.int64: "I64", torch.float16: "F16"}[healthy[name].dtype]
        tensors[name] = TensorInfo(kind, tuple(healthy[name].shape), len(data))
        data += healthy[name].numpy().tobytes()
    header = encode_header(tensors, {"format": "pt"}, 8)
    header = (int.from_bytes(header[:8], "little") + 1).to_bytes(8, "little") + header[8:] + b" "
    (tmp_path / "m.safetensors").write_bytes(header + data)
    _, fixed = repaired(tmp_path / "m.safetensors", "unaligned_data")
    assert_same(fixed, healthy)


def test_the_list_of_repairable_codes_is_whole():
    assert {code for code, kind in KINDS.items() if kind.fixable} == {*DAMAGES, *METADATA, "unaligned_data"}


def test_folders_are_repaired_too(healthy, tmp_path):
    broken = DAMAGES["broken_position_ids"](healthy)
    for form in FORMS:
        path = write(broken, tmp_path / form, form)
        output = tmp_path / f"{form}-fixed{'' if path.is_dir() else '.safetensors'}"
        assert "broken_position_ids" in repair(path, output).fixed
        assert_same(read(output), in_diffusers(healthy, "sd1") if path.is_dir() else healthy)


def test_what_cannot_be_repaired_stays_and_is_said(healthy, tmp_path, capsys):
    broken = {name: tensor for name, tensor in healthy.items() if name != "model.diffusion_model.out.2.bias"}
    broken[PROJ] = torch.full_like(broken[PROJ], float("nan"))
    path = write({**broken, "betas": torch.zeros(1000)}, tmp_path / "m", "safetensors")
    assert run(["check", str(path), "--fix", str(tmp_path / "out.safetensors")]) == 1
    out, err = capsys.readouterr()
    assert err == "Error: m.safetensors has 2 faults: missing_tensors, nan_or_infinity\n"
    assert "fixed    leftovers" in out
    assert (
        out.splitlines()[-1]
        == f"wrote {tmp_path / 'out.safetensors'}: fixed leftovers; still wrong: missing_tensors, nan_or_infinity"
    )
    assert_same(load_file(tmp_path / "out.safetensors"), broken)
    assert run(["check", str(path), "--fix", str(tmp_path / "out.safetensors"), "--overwrite", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["fixed"], report["output"]) == (["leftovers"], str(tmp_path / "out.safetensors"))
    assert {problem["code"] for problem in report["problems"]} == {
        "leftovers",
        "missing_tensors",
        "nan_or_infinity",
    }
    path = write(DAMAGES["broken_position_ids"](healthy), tmp_path / "good", "zip")
    assert run(["check", str(path), "--fix", str(tmp_path / "good.safetensors"), "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_healthy_model_is_written_and_said_to_be_so(healthy, tmp_path, capsys):
    path = write(healthy, tmp_path / "m", "safetensors")
    output = tmp_path / "out.safetensors"
    repair(path, output)
    assert run(["check", str(output), "--fix", str(tmp_path / "again.safetensors")]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"wrote {tmp_path / 'again.safetensors'}: nothing needed repair"
    )
    assert_same(load_file(tmp_path / "again.safetensors"), healthy)


def test_refusals(healthy, tmp_path, capsys):
    write(healthy, tmp_path / "m", "safetensors")
    assert_refused(
        capsys,
        tmp_path,
        "check",
        "m.safetensors",
        "--fix",
        "m.safetensors",
        "--overwrite",
        says="is the input",
    )
    assert_refused(
        capsys,
        tmp_path,
        "check",
        "m.safetensors",
        "--fix",
        "m.ckpt",
        says="the output is a .safetensors file",
    )
    write(
        {name: t for name, t in healthy.items() if component_of(name) == "vae"},
        tmp_path / "vae",
        "safetensors",
    )
    assert_refused(
        capsys,
        tmp_path,
        "check",
        "vae.safetensors",
        "--fix",
        "o.safetensors",
        says="is a VAE alone, 248 tensors in ldm names",
    )

"""`inspect` and `check` of several files: a line each, whatever is wrong with one of them."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.cli.main import run
from tests.commands import ok
from tests.forms import write
from tests.refusals import assert_refused
from tests.thin_loras import make_lora


@pytest.fixture
def models(pairs, here):
    """A folder of a model, one in half its size, a LoRA's tensor and a page; a diffusers folder beside it."""
    folder = here / "models"
    folder.mkdir()
    sd1, sdxl = pairs()[0], pairs("sdxl")[0]
    shutil.copy(sd1, folder / "good.safetensors")
    shutil.copy(sdxl, folder / "xl.safetensors")
    (folder / "page.safetensors").write_text("<!doctype html><html></html>")
    (folder / "notes.txt").write_text("no model")
    write(load_file(sd1), here / "diffusers", "folder")
    return folder


def test_inspect_shows_a_line_for_each_and_fails_if_any_does(models, here, capsys):
    assert run(["inspect", "models", "diffusers"]) == 1
    out, err = capsys.readouterr()
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert list(lines) == ["good.safetensors", "page.safetensors", "xl.safetensors", "diffusers"]
    assert "Stable Diffusion XL, base" in lines["xl.safetensors"]
    assert " ldm " in lines["good.safetensors"]
    assert " diffusers " in lines["diffusers"]
    assert "F16" in lines["good.safetensors"]
    assert "HTML page" in lines["page.safetensors"]
    assert err == "Error: 1 of 4 files cannot be read: page.safetensors\n"
    (models / "page.safetensors").unlink()
    ok(capsys, "inspect", "models", "diffusers")


def test_json_of_several_holds_what_each_has_alone(models, here, capsys):
    assert run(["inspect", "models", "diffusers", "--json"]) == 1
    files = json.loads(capsys.readouterr().out)["files"]
    by_name = {one["name"]: one for one in files}
    assert len(by_name) == len(files) == 4
    assert by_name["page.safetensors"].keys() == {"name", "error"}
    for path in (models / "good.safetensors", models / "xl.safetensors", here / "diffusers"):
        assert json.loads(ok(capsys, "inspect", path, "--json")) == by_name[path.name]


def test_hashes_of_several(models, capsys):
    (models / "page.safetensors").unlink()
    lines = ok(capsys, "inspect", "models", "--hash").splitlines()
    for line, name in zip(lines, ("good.safetensors", "xl.safetensors"), strict=True):
        assert hashlib.sha256((models / name).read_bytes()).hexdigest() in line.split()


def test_check_of_several(models, here, capsys):
    broken = load_file(models / "good.safetensors")
    broken["model.diffusion_model.out.2.weight"].view(-1)[0] = torch.nan
    save_file(broken, models / "nan.safetensors", {"format": "pt"})
    assert run(["check", "models"]) == 1
    out, err = capsys.readouterr()
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert list(lines) == ["good.safetensors", "nan.safetensors", "page.safetensors", "xl.safetensors"]
    assert "nan_or_infinity" in lines["nan.safetensors"]
    assert "error" not in lines["good.safetensors"]
    assert err.startswith("Error: faults in 2 of 4 files, or they cannot be read: nan.safetensors, page")
    assert run(["check", "models", "--json"]) == 1
    files = json.loads(capsys.readouterr().out)["files"]
    assert [one["name"] for one in files if "problems" in one] == [
        "good.safetensors", "nan.safetensors", "xl.safetensors",
    ]  # fmt: skip
    alone = blockmerge.check(models / "nan.safetensors").to_dict()
    assert json.loads(json.dumps(alone)) == next(one for one in files if one["name"] == "nan.safetensors")
    assert run(["check", "models", "-q"]) == 1
    assert capsys.readouterr().out == ""
    good = models / "good.safetensors", models / "xl.safetensors"
    ok(capsys, "check", *good)


def test_check_says_what_a_file_is_that_is_no_model(models, capsys):
    half = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 2)}
    save_file(half, models / "style.safetensors", {"format": "pt"})
    assert run(["check", str(models)]) == 1
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.startswith("style"))
    assert "1 error: no_unet; is a LoRA" in line
    make_lora(models / "style.safetensors", "sd1")  # one that can be read
    assert run(["check", str(models), "--json"]) == 1  # of others
    (found,) = (
        one for one in json.loads(capsys.readouterr().out)["files"] if one["name"].startswith("style")
    )
    assert [one["code"] for one in found["problems"]] == ["lora", "no_format"]
    assert {one["severity"] for one in found["problems"]} == {"note"}
    (line,) = (
        one
        for one in ok(capsys, "check", models / "style.safetensors", models / "good.safetensors").splitlines()
        if one.startswith("style")
    )
    assert "2 notes: lora, no_format; is a LoRA" in line
    assert blockmerge.check(models / "style.safetensors").faults == ()


def test_one_file_prints_as_ever(models, here, capsys):
    """A folder of one file is a folder; a diffusers folder is one model."""
    shutil.copy(models / "good.safetensors", here)
    one = json.loads(ok(capsys, "inspect", "good.safetensors", "--json"))
    assert "files" not in one
    assert "files" not in json.loads(ok(capsys, "inspect", "diffusers", "--json"))
    for name in ("page", "xl"):
        (models / f"{name}.safetensors").unlink()
    assert json.loads(ok(capsys, "inspect", "models", "--json")) == {"files": [one]}


def test_patterns_and_files_named_twice(models, here, capsys):
    found = json.loads(ok(capsys, "inspect", "models/[gx]*", "models/xl.safetensors", "--json"))
    assert [one["name"] for one in found["files"]] == ["good.safetensors", "xl.safetensors"]
    assert run(["inspect", "diffusers", "*.nothing"]) == 1
    assert "no file matches *.nothing" in capsys.readouterr().out


def test_files_of_one_name_are_told_apart(models, here, capsys):
    shutil.copytree(models, here / "other")
    paths = ["models/good.safetensors", "other/good.safetensors"]
    found = json.loads(ok(capsys, "inspect", *paths, "--json"))
    assert [one["name"] for one in found["files"]] == paths
    assert [line.split()[0] for line in ok(capsys, "inspect", *paths).splitlines()] == paths


def test_a_variant_has_to_be_in_one_of_them(models, here, capsys):
    assert_refused(capsys, here, "inspect", "models", "diffusers", "--variant", "fp16", says="'fp16'")


def test_a_missing_file_is_a_line_among_several(models, capsys):
    good = str(models / "good.safetensors")
    assert run(["check", good, str(models / "gone.ckpt")]) == 1
    out, _ = capsys.readouterr()
    assert out.splitlines()[1] == "gone.ckpt         cannot open gone.ckpt: no such file or directory"


def test_an_empty_name_among_several(models, capsys):
    assert run(["check", "", str(models / "good.safetensors")]) == 1
    out, _ = capsys.readouterr()
    assert "  an empty path is not a model: give" in out.splitlines()[0]


def test_a_wrong_option_is_not_a_fault_of_the_files(models, here, capsys):
    assert_refused(capsys, here, "check", "models", "--threads", "0", says="number of threads")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("check", "--fix", "x.safetensors"), "--fix"), (("inspect", "--tensors"), "--tensors")],
)
def test_what_is_for_one_file_is_refused_for_several(models, here, capsys, arguments, says):
    line = assert_refused(capsys, here, *arguments, "models", says=says)
    assert "name one" in line

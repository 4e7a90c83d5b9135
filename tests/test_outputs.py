"""Outputs are objects: what a kind tells of itself is all that a merge asks, so a new kind is a file and a word."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import component_of
from blockmerge.checkpoints import AtomicFolder, check_output_folder
from blockmerge.merging import outputs
from blockmerge.merging.outputs import Layout, Output, WeightFile
from tests.refusals import snapshot
from tests.small_models import small_model, write_folder

U = "model.diffusion_model."


class Pair(Output):
    """A toy: a folder `X.pair` of two files, the U-Net under its bare names and all else, and a text."""

    title = "a pair"
    ending = ".pair"

    @classmethod
    def takes(cls, wish):
        return wish.path.endswith(".pair")

    def naming_of(self, wish):
        return "ldm"

    def lay_out(self, tensors, models, anatomy):
        unet = {t.name.removeprefix(U): t for t in tensors if component_of(t.ldm) == "unet"}
        rest = {t.name: t for t in tensors if component_of(t.ldm) != "unet"}
        said = json.dumps({"family": anatomy.family.name, "models": len(models)}).encode()
        files = (WeightFile("unet.safetensors", unet), WeightFile("more/rest.safetensors", rest))
        return Layout(files, {"pair.json": said}, ("a pair of files",))

    def check(self, inputs, *, overwrite=False):
        return check_output_folder(self.path, inputs, overwrite=overwrite)

    def reserve(self, target, files, *, overwrite=False):
        return AtomicFolder(target, files, overwrite=overwrite)


@pytest.fixture
def files(tmp_path):
    models = [small_model(seed=seed, for_a_folder=True) for seed in range(2)]
    for letter, model in zip("ab", models, strict=True):
        save_file(model, tmp_path / f"{letter}.safetensors")
    write_folder(tmp_path / "folder", models[0], "sd1")
    return [tmp_path / f"{letter}.safetensors" for letter in "ab"]


def test_a_toy_kind_is_one_class_and_a_word_in_the_registry(files, tmp_path, monkeypatch):
    with pytest.raises(
        blockmerge.OutputError, match=r"the output is a \.safetensors file: give it that ending"
    ):
        blockmerge.merge(*files, weights=0.3, output=tmp_path / "out.pair")
    monkeypatch.setattr(outputs, "KINDS", (Pair, *outputs.KINDS))
    result = blockmerge.merge(*files, weights=0.3, vae="blend", output=tmp_path / "out.pair")
    blockmerge.merge(*files, weights=0.3, vae="blend", output=tmp_path / "one.safetensors")
    unet, rest = (
        load_file(result.output / "unet.safetensors"),
        load_file(result.output / "more/rest.safetensors"),
    )
    both = {**{U + name: tensor for name, tensor in unet.items()}, **rest}
    one = load_file(tmp_path / "one.safetensors")
    assert both.keys() == one.keys()
    assert all(torch.equal(tensor, one[name]) for name, tensor in both.items())
    assert json.loads((result.output / "pair.json").read_text()) == {"family": "sd1", "models": 2}
    assert "a pair of files" in result.notes
    assert result.bytes == sum(os.path.getsize(path) for path in result.output.rglob("*") if path.is_file())
    converted = blockmerge.convert(tmp_path / "folder", tmp_path / "converted.pair")
    assert (converted.naming, converted.tensors.written) == ("ldm", len(one))
    before = snapshot(tmp_path)
    with pytest.raises(blockmerge.RecipeError, match=r"configs go into a diffusers folder only.* is a pair:"):
        blockmerge.merge(*files, weights=0.3, output=tmp_path / "b.pair", configs=tmp_path / "folder")
    with pytest.raises(blockmerge.OutputError, match=r"holds no diffusers model .*: give another name"):
        blockmerge.merge(*files, weights=0.3, output=tmp_path / "out.pair")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("a", "name", "naming", "kind", "spelled"),
    [
        ("a.safetensors", "x.safetensors", None, "SingleFile", "ldm"),
        ("a.safetensors", "x.SAFETENSORS", "ldm", "SingleFile", "ldm"),
        ("folder", "x.safetensors", None, "SingleFile", "ldm"),
        ("folder", "x", None, "DiffusersOutput", "diffusers"),
        ("a.safetensors", "x/", "diffusers", "DiffusersOutput", "diffusers"),
        ("a.safetensors", "x.safetensors/", "diffusers", "DiffusersOutput", "diffusers"),
        ("folder", "x", "ldm", None, "the output is a .safetensors file"),
        ("a.safetensors", "x/", None, None, "x/ is a folder: give the output a file name"),
        (
            "a.safetensors",
            "x.safetensors",
            "diffusers",
            None,
            "a whole model under diffusers' names is a folder",
        ),
    ],
)
def test_the_kind_follows_from_the_name_a_and_the_naming(files, tmp_path, a, name, naming, kind, spelled):
    model = blockmerge.checkpoints.Model.of(blockmerge.open_checkpoint(tmp_path / a))
    if kind is None:
        with pytest.raises(blockmerge.OutputError, match=spelled):
            outputs.choose_output(name, model, naming)
        return
    chosen = outputs.choose_output(name, model, naming)
    assert (type(chosen).__name__, chosen.naming) == (kind, spelled)


def test_nothing_outside_the_room_asks_what_an_output_is():
    """But for the writer of folders, which the room uses, and formats that are read."""
    import ast
    from pathlib import Path

    package = Path(blockmerge.__file__).parent
    kinds = {"SingleFile", "DiffusersOutput", "AtomicFolder", "check_output_folder"}
    for path in package.rglob("*.py"):
        place = path.relative_to(package).as_posix()
        if not place.startswith(("merging/outputs/", "checkpoints/")):
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert not names & kinds, place

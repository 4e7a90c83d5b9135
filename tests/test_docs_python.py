"""The Python on the documentation's pages for users runs, on thin files of the names that it gives."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import blockmerge
from blockmerge.cli.main import run
from blockmerge.demo import write_pair
from tests.thin_loras import make_lora
from tests.thin_unet import config

DOCS = Path(__file__).parents[1] / "docs"
MODELS = ("a", "b", "c", "e", "base", "model", "tuned")
PAGES = ("merge.md", "recipes.md", "lora.md", "live.md", "own_method.md")
LORAS = ("style", "a-lora", "b-lora", "big")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files that the pages name, made once."""
    folder = tmp_path_factory.mktemp("docs") / "files"
    (folder / "models").mkdir(parents=True)
    for number, name in enumerate(MODELS):
        paths = folder / "unused", folder / f"{name}.safetensors"
        write_pair(*paths, "sd1", difference=0.05 + number / 100, seed=0, overwrite=True)
    for number, name in enumerate(LORAS):
        make_lora(folder / f"{name}.safetensors", "sd1", seed=number)
    (folder / "mix.toml").write_text(blocks("recipes.md", "toml")[0], encoding="utf-8")
    pair = folder / "a.safetensors", folder / "b.safetensors"
    blockmerge.merge(*pair, preset="high_res", output=folder / "merged.safetensors")
    return folder


@pytest.fixture
def names(files, here):
    """What the pages do not define themselves, with the files in the current folder."""
    shutil.copytree(files, here, copy_function=os.link, dirs_exist_ok=True)
    unet = UNet2DConditionModel.from_config(config("sd1")).half()
    a, b = (load_file(f"{name}.safetensors") for name in "ab")
    return {"blockmerge": blockmerge, "a": a, "b": b, "pipe": SimpleNamespace(unet=unet)}


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page, names):
    own = [parameter.clone() for parameter in names["pipe"].unet.parameters()]
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(block, names)
    for output in re.findall(r'output="(.*?)"', "".join(found)):
        assert Path(output).exists(), output
    if page == "live.md":  # every LiveMerge there is closed
        assert all(map(torch.equal, names["pipe"].unet.parameters(), own))


def test_the_commands_for_a_method_of_ones_own(names):
    """The page's first block is mine.py; a third of half of the way to B is 0.15 of it."""
    first, commands = blocks("own_method.md", "python")[0], blocks("own_method.md", "shell")[0]
    Path("mine.py").write_text(first, encoding="utf-8")
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    a, b = (names[model][name].double() for model in "ab")
    for line, share in zip(commands.splitlines(), (0.15, 0.06), strict=True):
        words = shlex.split(line)[1:]
        assert run([*words, "-q", "-o", "out.safetensors", "--overwrite"]) == 0
        found = load_file("out.safetensors")[name].double()
        assert torch.allclose(found, a + share * (b - a), atol=1e-3)


def test_methods_on_the_page_merge(names):
    for block in blocks("own_method.md", "python"):
        exec(block, names)
    methods = [value for value in names.values() if hasattr(value, "blockmerge_method")]
    assert len(methods) == 5
    for method in methods:
        merged = blockmerge.merge_state_dicts(names["a"], names["b"], weights=0.3, method=method)
        assert all(torch.isfinite(tensor).all() for tensor in merged.values() if tensor.is_floating_point())

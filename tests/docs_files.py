"""The files that the documentation's commands name: thin ones, each made once and hard-linked wherever one runs."""

from __future__ import annotations

import os
import shutil

import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.cli.main import run
from blockmerge.demo import write_pair
from tests.forms import UNET, ema_of, is_unet, write
from tests.test_tokenizers import write_tokenizer
from tests.thin_loras import make_lora

MODELS = "a b c d base e tuned detailed mine model any-model nai more unused"
LORAS = "style detail a-lora b-lora v1 v2 big"
PAIRS = {"flux": "flux1", "anima": "anima", "zit": "z_image"}
RECIPE = """
output = "final.safetensors"
[X]
models = ["a.safetensors", "b.safetensors"]
preset = "high_res"
[Y]
models = ["X", "c.safetensors", "base.safetensors"]
method = "add_difference"
weights = 1
[final]
models = ["Y", "e.safetensors"]
preset = "low_res"
loras = ["style.safetensors:0.8:OUTALL"]
"""

METHOD = """
import blockmerge

@blockmerge.merge_method
def soften(a, b, *, alpha):
    return a + alpha * (b - a)
"""


def write_all(folder):
    """Write every file into a folder, and those that LoRA commands mean by a and b into another, `loras`."""
    folder.mkdir()
    names = [folder / f"{name}.safetensors" for name in MODELS.split()]
    for seed, pair in enumerate(zip(names[::2], names[1::2], strict=True)):
        write_pair(*pair, seed=seed)
    for name, family in PAIRS.items():
        write_pair(folder / f"{name}-a.safetensors", folder / f"{name}-b.safetensors", family)
    _write_strange(folder)
    for number, name in enumerate(LORAS.split()):
        make_lora(folder / f"{name}.safetensors", "sd1", seed=number)
    peft = folder / "style-peft.safetensors"
    blockmerge.convert_lora(folder / "style.safetensors", output=peft, to="diffusers")
    _write_other_forms(folder)
    _write_recipes(folder)
    os.mkdir(folder / "loras")
    for name, meant in {"a": "a-lora", "b": "b-lora"}.items():
        os.link(folder / f"{meant}.safetensors", folder / "loras" / f"{name}.safetensors")
    for home in ("models", "refs"):
        os.mkdir(folder / home)
        for name in ("a", "b", "c", "e", "base"):
            os.link(folder / f"{name}.safetensors", folder / home / f"{name}.safetensors")
    return folder


def _write_strange(folder):
    """Two models of no known family."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        tensors = {
            f"layers.{n}.{part}.weight": torch.randn(4, 4) for n in range(12) for part in ("attn.to_q", "mlp.fc1", "norm")
        }  # fmt: skip
        save_file(tensors | {"embed.weight": torch.randn(4, 4)}, folder / f"strange-{name}.safetensors")


def _write_other_forms(folder):
    model = load_file(folder / "b.safetensors")
    for name in ("b", "model", "a", "c"):
        write(model, folder / name, "zip")
    vae = {name: tensor for name, tensor in model.items() if name.startswith("first_stage_model.")}
    for name in ("kl-f8", "vae"):
        save_file(vae, folder / f"{name}.safetensors")
    write(model, folder / "more", "zip")
    write_pair(folder / "sdxl.safetensors", folder / "sdxl-b.safetensors", "sdxl")
    write(
        {n: t for n, t in (model | ema_of(model)).items() if not n.startswith(UNET)},
        folder / "ema-only",
        "zip",
    )
    assert any(map(is_unet, model))
    for name in ("diffusers-folder", "folder"):
        blockmerge.convert(folder / "b.safetensors", folder / name, naming="diffusers")
    for file in list((folder / "diffusers-folder").rglob("*.safetensors")):
        shutil.copy(file, file.with_name(f"{file.stem}.fp16.safetensors"))
    write_tokenizer(folder / "tokenizer")


def _write_recipes(folder):
    (folder / "mix.toml").write_text(RECIPE)
    (folder / "mine.toml").write_text('weights = "IN01-IN02=0.5"\n')
    (folder / "mine.py").write_text(METHOD)
    (folder / "mbwpresets.txt").write_text("NAME\t" + ",".join(["0.5"] * 26) + "\n")
    for name in ("merged", "release"):
        blockmerge.merge(
            folder / "a.safetensors",
            folder / "b.safetensors",
            preset="high_res",
            output=folder / f"{name}.safetensors",
        )
    for name in "abcd":
        os.link(folder / f"{name}.safetensors", folder / name)


def write_pinned(folder, capsys):
    """Write release.json, as the command itself prints it."""
    assert run(["recipe", str(folder / "release.safetensors"), "--pin"]) == 0
    (folder / "release.json").write_text(capsys.readouterr().out)

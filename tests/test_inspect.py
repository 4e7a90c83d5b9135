"""`inspect`: what is in a file, and what can be said of what is no model."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import component_of
from blockmerge.cli.main import run
from blockmerge.demo import make_state_dicts
from blockmerge.weights import ElementRules
from tests import oracle
from tests.commands import ok
from tests.forms import read, write
from tests.refusals import assert_refused


def test_inspect(pairs, here, capsys):
    a, _ = pairs("sdxl")
    out = ok(capsys, "inspect", a)
    assert "a.safetensors  Stable Diffusion XL, base, ldm names" in out
    assert re.search(r"IN08 +216 ", out)
    found = json.loads(ok(capsys, "inspect", a, "--json"))
    assert {"name", "family", "variant", "naming", "components", "blocks", "metadata"} <= found.keys()
    assert "hashes" not in found
    assert found["name"] == "a.safetensors"
    assert found["blocks"]["IN08"]["tensors"] == 216
    assert set(found["blocks"]["IN08"]) == {"tensors", "parameters", "bytes"}
    assert "BASE" not in found["blocks"]
    assert found["components"]["text_encoder_2"]["tensors"] == 390
    assert found["components"]["unet"]["dtypes"] == {"F16": 1680}
    assert sum(part["bytes"] for part in found["components"].values()) == sum(
        t.nbytes for t in load_file(a).values()
    )
    assert found["metadata"] == {"format": "pt"}


def test_a_recipe_in_the_metadata_is_said_in_a_few_words(pairs, here, capsys):
    a, b = pairs()
    lora = {f"lora_unet_mid_block_attentions_0_proj_in.lora_{part}.weight": torch.ones(shape) for part, shape in
            {"down": (2, 32, 1, 1), "up": (32, 2, 1, 1)}.items()}  # fmt: skip
    save_file(lora, "l.safetensors")
    (here / "mix.toml").write_text(
        f"[X]\nmodels = {json.dumps([str(a), str(b)])}\nweights = 0.5\n"
        f"[result]\nmodels = ['X', {json.dumps(str(b))}]\nweights = 0.2\n"
    )
    shows = " (blockmerge recipe FILE shows it)"
    for command, says in (
        ((a, b, "-p", "high_res"), f"weighted_sum high_res of a.safetensors and b.safetensors{shows}"),
        (("bake", a, "l.safetensors:0.8"), f"bake of a.safetensors, with l:0.8{shows}"),
        (("run", "mix.toml"), f"weighted_sum 0.2 of X and b.safetensors, in 2 merges{shows}"),
        (("lora", "extract", b, a, "--rank", "1"), "lora extract of b.safetensors and a.safetensors"),
    ):
        ok(capsys, *command, "-o", "o.safetensors", "--overwrite", "-q")
        assert f"blockmerge.recipe: {says}" in ok(capsys, "inspect", "o.safetensors").splitlines()
    # What is not a recipe, and what others write, is cut at its end.
    texts = {"blockmerge.recipe": '{"models": 7}', "notes": "\x1b[1m" + "12345" * 100, "short": "x" * 400}
    save_file(load_file(a), "m.safetensors", {"format": "pt", **texts})
    lines = ok(capsys, "inspect", "m.safetensors").splitlines()
    assert 'blockmerge.recipe: {"models": 7}' in lines
    assert f"notes: \\x1b[1m{'12345' * 100}"[: 7 + 403] + "…" in lines
    assert f"short: {'x' * 400}" in lines
    assert json.loads(ok(capsys, "inspect", "m.safetensors", "--json"))["metadata"] == {
        "format": "pt",
        **texts,
    }


def test_inspect_hashes(pairs, here, capsys):
    a, _ = pairs()
    found = json.loads(ok(capsys, "inspect", a, "--hash", "--json"))["hashes"]
    data = a.read_bytes()

    def sha(part):
        return (
            subprocess.run(["sha256sum"], input=part, capture_output=True, check=True)
            .stdout.decode()
            .split()[0]
        )

    length = int.from_bytes(data[:8], "little")
    assert found == {
        "sha256": sha(data),
        "autov2": sha(data)[:10],
        "autov3": sha(data[8 + length :])[:12],
        "autov1": sha(data[0x100000:0x110000])[:8],
    }
    assert found["sha256"] in ok(capsys, "inspect", a, "--hash")


@pytest.mark.parametrize("form", ["safetensors", "folder"])
@pytest.mark.parametrize(
    ("part", "title"), [("vae", "is a VAE alone"), ("text_encoder", "is a text encoder alone")]
)
def test_one_component_alone_is_called_so(here, capsys, form, part, title):
    model = {
        name: tensor for name, tensor in make_state_dicts("sd1")[0].items() if component_of(name) == part
    }
    naming = "diffusers" if form == "folder" else "ldm"
    path = write(model, here / "lone", form)
    if part == "vae" and form == "safetensors":  # as VAE files are: without the prefix
        save_file({name.removeprefix("first_stage_model."): tensor for name, tensor in model.items()}, path)
    says = f"{path.name} {title}, {len(read(path))} tensors in {naming} names: "
    assert says.removeprefix(path.name).strip() in ok(capsys, "inspect", path)
    found = json.loads(ok(capsys, "inspect", path, "--json"))
    assert (found["family"], found["naming"], list(found["components"])) == (None, naming, [part])
    assert_refused(capsys, here, "merge", path, path, "-w", "0.5", "-o", "x.safetensors", says=says)


def test_inspect_of_what_is_no_model(here, capsys):
    import torch
    from safetensors.torch import save_file

    save_file({"lora_unet_x": torch.zeros(3)}, here / "lora.safetensors")
    assert "no diffusion model" in ok(capsys, "inspect", "lora.safetensors")
    found = json.loads(ok(capsys, "inspect", "lora.safetensors", "--json"))
    assert (found["family"], found["blocks"]) == (None, {})
    assert found["components"]["other"]["tensors"] == 1
    assert run(["inspect", "lora.safetensors", "--hash"]) == 0
    assert "e3b0c442" in capsys.readouterr().out  # under 1 MiB AutoV1 hashes nothing


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_inspect_tensors_shows_the_names_that_rules_look_at(pairs, here, capsys, family):
    """In either naming; the oracle is a rule with each name, which takes a tensor of just this block."""
    a, _ = pairs(family)
    blockmerge.convert(a, "folder", naming="diffusers")
    layout = load_file(a)
    for path in (a, "folder"):
        listed = json.loads(ok(capsys, "inspect", path, "--tensors", "--json"))["tensors"]
        out = ok(capsys, "inspect", path, "--tensors")
        assert len(listed) == len(blockmerge.open_checkpoint(path).tensors)
        for name, one in listed.items():
            assert set(one) == {"ldm", "component", "block", "dtype", "shape"}
            assert one["ldm"] in layout
            assert one["block"] == oracle.block(one["ldm"], family)
            assert name in out
            assert one["ldm"] in out
        rules = ElementRules.parse(f"OUT03:{next(n for n in layout if 'output_blocks.3.' in n)}:1")
        assert rules.resolve(family).idle((one["block"], one["ldm"]) for one in listed.values()) == []
    assert "tensors" not in json.loads(ok(capsys, "inspect", a, "--json"))
    assert blockmerge.inspect(a).tensors is None
    found = blockmerge.inspect(a, tensors=True).tensors["model.diffusion_model.out.0.bias"]
    assert (found.dtype, found.component) == ("F16", "unet")


def test_inspect_tensors_of_what_is_no_model(here, capsys):
    save_file({"a.weight": torch.ones(2, 3), "b": torch.ones(())}, here / "x.safetensors")
    found = json.loads(ok(capsys, "inspect", "x.safetensors", "--tensors", "--json"))["tensors"]
    assert found["a.weight"] == {
        "ldm": "a.weight", "component": "other", "block": None, "dtype": "F32", "shape": [2, 3],
    }  # fmt: skip
    assert "a.weight" in ok(capsys, "inspect", "x.safetensors", "--tensors")

"""Merges that carry their recipe: what `explain` says of everything that the recipe names."""

from __future__ import annotations

import json

from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.cli.main import run
from tests.thin_loras import make_lora

A, B, STYLE = "a.safetensors", "b.safetensors", "style.safetensors"


def test_a_lora_of_the_recipe_is_part_of_the_explanation(pairs, here, capsys):
    a, b = pairs()
    (here / "loras").mkdir()
    style = make_lora(here / "loras" / STYLE, "sd1")
    other = make_lora(here / "loras" / "other.safetensors", "sd1", seed=1)
    blockmerge.bake(a, [(style, 0.8)], output="baked.safetensors")
    stage = blockmerge.Merge(a, b, weights=0.5, loras=[(style, 0.25), (style, 0.5)])
    blockmerge.merge(stage, b, weights=0.3, output="staged.safetensors")

    found = blockmerge.explain("baked.safetensors", [a, b, style])
    assert (found.parents, found.left_out) == ((A,), {})
    assert found.added == {STYLE: "the LoRA, strength 0.8"}
    assert f"made by bake of {A} with {STYLE} (LoRA, strength 0.8). Its own recipe says so" in found.verdict
    staged = blockmerge.explain("staged.safetensors", [a, b, style])
    assert staged.left_out == {}
    assert staged.added == {STYLE: "the LoRA, strength 0.25; the LoRA, strength 0.5"}
    assert f"{STYLE} (LoRA, strength 0.25) and {STYLE} (LoRA, strength 0.5)" in staged.verdict

    assert run(["explain", "baked.safetensors", *map(str, (a, b, style)), "--tensors", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["left_out"], said["added"]) == ({}, found.added)
    assert run(["explain", "baked.safetensors", *map(str, (a, style, other))]) == 1
    assert "1 of the candidates could not be used: other.safetensors" in capsys.readouterr().err


def test_a_lora_that_the_recipe_does_not_name_is_left_out(pairs, here):
    a, b = pairs()
    style = make_lora(here / STYLE, "sd1")
    blockmerge.merge(a, b, weights=0.5, output="m.safetensors")
    found = blockmerge.explain("m.safetensors", [a, b, style])
    assert found.added == {}
    assert "is a LoRA" in found.left_out[STYLE]


def test_a_copy_says_what_it_is_a_copy_of_and_how_that_was_made(pairs, here, capsys):
    a, b = pairs()
    blockmerge.merge(a, b, preset="high_res", output="merged.safetensors")
    tensors = load_file("merged.safetensors")
    save_file(tensors, "mystery.safetensors")  # without its recipe
    assert run(["explain", "mystery.safetensors", "merged.safetensors", str(a)]) == 0
    assert capsys.readouterr().out.split("\n") == [
        "mystery.safetensors is a copy of merged.safetensors (text encoder and VAE, too). Merged again, it is the "
        "same within two steps of its dtype everywhere. By its own recipe, merged.safetensors is made by "
        f"weighted_sum of {A} and {B} with the preset high_res.",
        "",
        "",
    ]
    said = {"version": "1", "method": "x", "models": []}
    save_file(tensors, "merged.safetensors", {"blockmerge.recipe": json.dumps(said)})
    assert "own recipe" not in blockmerge.explain("mystery.safetensors", ["merged.safetensors", a]).verdict


def test_what_a_recipe_names_that_is_not_there_is_said_first(pairs, here, capsys):
    a, b = pairs()
    blockmerge.merge(a, b, weights=0.5, output="half.safetensors")
    blockmerge.merge("half.safetensors", b, weights=0.5, output="m.safetensors")
    assert run(["explain", "m.safetensors", str(a), str(b)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(
        "- its own recipe could not be verified: m.safetensors: it names half.safetensors"
    )
    assert lines[1].endswith("blockmerge recipe --tree draws it")

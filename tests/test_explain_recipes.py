"""Merges that carry their recipe: what `explain` says of everything that the recipe names."""

from __future__ import annotations

import json

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

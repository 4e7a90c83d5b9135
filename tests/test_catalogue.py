"""`list_methods`, `list_presets` and `list_families` say as plain data what the command line says."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

import blockmerge
from blockmerge import catalogue
from blockmerge.cli.main import run

FAMILIES = Path(catalogue.__file__).parent / "anatomy" / "families"


def printed(capsys, *arguments):
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_methods_are_those_of_the_command_line(capsys):
    listed, shown = blockmerge.list_methods(), printed(capsys, "methods")
    assert [one.name for one in listed] == [one["name"] for one in shown]
    for one, other in zip(listed, shown, strict=True):
        for key in ("models", "locality", "formula", "source"):
            assert getattr(one, key) == other[key]
        assert list(one.weights) == other["weights"]
        assert [
            (number.name, number.default, number.range, number.description) for number in one.numbers
        ] == [
            (number["name"], number["default"], number["range"], number["description"])
            for number in other["numbers"]
        ]
    ties = next(one for one in listed if one.name == "ties")
    assert (ties.models, ties.least_models) == (None, 2)
    (kept,) = ties.numbers
    assert (kept.low, kept.high) == (0, 1)


def test_presets_are_those_of_the_command_line(capsys):
    listed, shown = blockmerge.list_presets(), printed(capsys, "presets")
    assert [one.name for one in listed] == [one["name"] for one in shown] == blockmerge.preset_names()
    for one, other in zip(listed, shown, strict=True):
        assert one.weights.get("sd1") == other["weights"]
        assert one.weights.get("sdxl") == other["sdxl"]
        assert (one.source, one.description) == (other["source"], other["description"])
        assert one.origin == "blockmerge"
        assert one.path is not None
        assert one.path.is_file()


def test_own_presets_say_where_they_are():
    folder = Path(os.environ["XDG_CONFIG_HOME"]) / "blockmerge" / "presets"
    folder.mkdir(parents=True)
    (folder / "list.txt").write_text(
        "first\t" + ",".join(["0.25"] * 26) + "\nhigh_res\t" + ",".join(["R"] * 26)
    )
    (folder / "mine.toml").write_text("weights = 0.5\naliases = ['my own']")
    first, high_res, mine, *others = blockmerge.list_presets()
    assert {one.origin for one in others} == {"blockmerge"}
    assert [one.path for one in (first, high_res, mine)] == [
        folder / "list.txt", folder / "list.txt", folder / "mine.toml",
    ]  # fmt: skip
    assert first.origin == "own"
    assert set(first.weights["sd1"].values()) == {0.25}
    assert high_res.is_random
    assert not mine.is_random
    assert mine.aliases == ("my own",)
    assert "flux1" in mine.families


def test_families_are_the_folders():
    listed = blockmerge.list_families()
    folders = {path.name for path in FAMILIES.iterdir() if path.is_dir() and path.name[0].islower()}
    assert {one.name for one in listed} == folders
    by_name = {one.name: one for one in listed}
    assert (by_name["sd1"].core, by_name["sd1"].counted, len(by_name["sd1"].blocks)) == ("unet", False, 26)
    assert by_name["sd1"].variants == ("base", "pix2pix", "inpainting")
    assert (by_name["flux1"].core, by_name["flux1"].counted) == ("transformer", True)
    assert by_name["sd3"].versions == ("medium", "3.5-medium", "3.5-large")


def test_what_is_listed_is_plain_and_frozen():
    everything = [*blockmerge.list_methods(), *blockmerge.list_presets(), *blockmerge.list_families()]
    json.dumps([dataclasses.asdict(one) for one in everything], default=str)
    for one in everything:
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.name = "other"
        described = {field.name for field in dataclasses.fields(one)}
        assert all(f"`{name}`" in type(one).__doc__ for name in described)

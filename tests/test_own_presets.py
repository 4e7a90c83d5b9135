"""`presets` as curves, and presets that users add to their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import blockmerge
from blockmerge.weights import find_preset, parse_weights
from blockmerge.weights.own_presets import weights_text
from tests import oracle
from tests.commands import ok
from tests.refusals import assert_refused


@pytest.fixture
def own(capsys):
    """The folder of the user's own presets, as the command says."""
    return Path(ok(capsys, "presets", "path").strip())


def curve_of(out, name):
    line = next(line for line in out.splitlines() if line.split()[:1] == [name])
    base, rest = line.split()[1:3]
    return base + rest


def height(weight, levels):
    """The nearest of the levels, but for what is neither 0 nor 1, which is neither the lowest nor the highest."""
    if weight <= 0:
        return levels[0]
    return levels[-1] if weight >= 1 else levels[min(6, max(1, round(weight * 7)))]


def test_each_preset_is_a_curve(here, capsys):
    out = ok(capsys, "presets")
    for name, text in (("high_res", oracle.HIGH_RES), ("low_res", oracle.LOW_RES)):
        expected = "".join(height(number, "▁▂▃▄▅▆▇█") for number in oracle.numbers(text))
        assert curve_of(out, name) == expected
    assert curve_of(out, "ALL_B") == "█" * 26


def test_curves_in_ascii_and_of_blocks_left_out(here, capsys):
    ok(capsys, "presets", "add", "mine", "-w", "IN00=skip,IN01=0.01,OUT11=0.999,M00=7,OUT00=-1")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-m", "blockmerge", "presets"], env=environment, capture_output=True, check=True
    )
    assert curve_of(done.stdout.decode("ascii"), "mine") == "_x." + "_" * 10 + "#" + "_" * 11 + "*"


def test_path_is_where_presets_are_found(own, here, capsys):
    assert not own.exists()
    own.mkdir(parents=True)
    (own / "soft.toml").write_text("weights = 0.5")
    assert "soft" in blockmerge.preset_names()


@pytest.mark.parametrize(
    "text", ["IN00-IN05=0.3,OUT06-OUT11=0..1", "0.5", oracle.HIGH_RES, "M00=skip,BASE=1"]
)
def test_weights_become_a_preset(own, here, capsys, text):
    out = ok(capsys, "presets", "add", "Soft one", "-w", text, "--description", "half")
    assert str(own / "soft_one.toml") in out
    preset = find_preset("soft one")
    assert preset.weights == parse_weights(text)
    assert preset.description == "half"


def test_weights_for_another_family(here, capsys):
    ok(capsys, "presets", "add", "xl", "-w", "IN00=0.5,OUT08=1", "--family", "sdxl")
    assert find_preset("xl").sdxl == parse_weights("IN00=0.5,OUT08=1", "sdxl")
    ok(capsys, "presets", "add", "deep", "-w", "D00-D18=0..1", "--family", "flux1")
    assert find_preset("deep").weights_for("flux1")["D18"] == 1
    assert "flux1" in ok(capsys, "presets")


def test_files_are_added(own, here, capsys):
    mine = f"FIRST\t{oracle.HIGH_RES}\nSECOND:{oracle.LOW_RES}\n"
    (here / "mbw.txt").write_text(mine)
    ok(capsys, "presets", "add", "mbw.txt#SECOND")
    assert find_preset("second").weights == parse_weights(oracle.LOW_RES)
    assert tomllib.loads((own / "second.toml").read_text())["name"] == "SECOND"
    assert_refused(capsys, here, "presets", "add", "mbw.txt", says="SECOND already")
    (own / "second.toml").unlink()
    ok(capsys, "presets", "add", "mbw.txt")
    assert (own / "mbw.txt").read_text() == mine
    assert find_preset("FIRST").weights == parse_weights(oracle.HIGH_RES)
    (here / "soft.toml").write_text("# by me\nweights = 0.5\n")
    ok(capsys, "presets", "add", "soft.toml")
    assert (own / "soft.toml").read_bytes() == (here / "soft.toml").read_bytes()


def test_a_merge_becomes_a_preset(pairs, here, capsys):
    blockmerge.merge(*pairs(), weights="IN00-IN11=0..1,M00=skip", output="m.safetensors")
    assert_refused(capsys, here, "presets", "add", "m.safetensors", says="give --name")
    ok(capsys, "presets", "add", "m.safetensors", "--name", "again")
    assert find_preset("again").weights == parse_weights("IN00-IN11=0..1,M00=skip")
    blockmerge.merge(*pairs(), preset="again", output="n.safetensors")
    assert blockmerge.verify("n.safetensors", [pairs()[0].parent]).same
    assert_refused(capsys, here, "presets", "add", pairs()[0], "--name", "x", says="no recipe")
    blockmerge.merge(*pairs("sdxl"), preset="high_res", output="xl.safetensors")
    ok(capsys, "presets", "add", "xl.safetensors", "--name", "of_xl")
    assert find_preset("of_xl").sdxl == find_preset("high_res").sdxl


def test_a_copy_under_another_name(here, capsys):
    ok(capsys, "presets", "add", "high_res", "--name", "mine")
    mine, known = find_preset("mine"), find_preset("high_res")
    assert (mine.weights, mine.sdxl) == (known.weights, known.sdxl)
    assert "in place of" in ok(capsys, "presets", "add", "mine", "--name", "low-res")


def test_nothing_is_replaced_unasked(own, here, capsys):
    ok(capsys, "presets", "add", "soft", "-w", "0.5")
    assert_refused(capsys, here, "presets", "add", "soft", "-w", "0.7", says=["exists", "--overwrite"])
    assert find_preset("soft").weights["IN00"] == 0.5
    ok(capsys, "presets", "add", "soft", "-w", "0.7", "--overwrite")
    assert find_preset("soft").weights["IN00"] == 0.7
    (own / "list.txt").write_text(f"OTHER\t{oracle.HIGH_RES}\n")
    for overwrite in ((), ("--overwrite",)):
        assert_refused(capsys, here, "presets", "add", "other", "-w", "1", *overwrite, says="list.txt")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("x", "-w", "IN99=1"), "IN99"),
        (("x", "-w", "1", "--family", "sdx"), "did you mean 'sdxl'?"),
        (("high_res", "--family", "sdxl"), "--weights"),
        (("HIGH-RES",), "--name"),
        (("high_res_replace", "--description", "mine"), "--name"),
        *(((f"soft{end}", "-w", "1"), "leave out --weights") for end in (".toml", ".JSON", ".safetensors")),
        (("", "-w", "1"), "'name'"),
        (("nothing",), "unknown preset 'nothing'"),
        (("gone.toml",), "cannot read preset file"),
        (("x", "-w", "1", "--name", "y"), "two names"),
        ((" ", "-w", "1"), "'name'"),
    ],
)
def test_what_is_no_preset_is_refused(own, here, capsys, arguments, says):
    assert_refused(capsys, here, "presets", "add", *arguments, says=says)
    assert not own.exists()


def test_names_stay_within_the_folder(own, here, capsys):
    ok(capsys, "presets", "add", "../../a*b", "-w", "1", "-q")
    (path,) = own.iterdir()
    assert path.resolve().parent == own.resolve()
    assert find_preset("../../a*b").weights["M00"] == 1


@pytest.mark.parametrize("name", ["CON", "lpt1", "nul.x", "..", ".hidden", "console"])
def test_files_have_names_that_every_system_allows(own, here, capsys, name):
    ok(capsys, "presets", "add", name, "-w", "1", "-q")
    (path,) = own.iterdir()
    stem = path.name.split(".")[0]
    assert stem
    assert stem not in {"con", "lpt1", "nul"}
    assert find_preset(name).weights["M00"] == 1


def test_no_other_preset_is_lost_with_a_file(own, here, capsys):
    """Names that are told apart may have the same file, and a file may have several."""
    ok(capsys, "presets", "add", "x#y", "-w", "0.5")
    for overwrite in ((), ("--overwrite",)):
        assert_refused(
            capsys, here, "presets", "add", "x_y", "-w", "1", *overwrite, says="x#y, which would be"
        )
    assert find_preset("x#y").weights["IN00"] == 0.5


def test_weights_as_text_are_read_back():
    weights = parse_weights(oracle.HIGH_RES)
    assert parse_weights(weights_text(dict(weights.items()))) == weights
    assert parse_weights(weights_text(dict(parse_weights("0").items()))) == parse_weights("0")

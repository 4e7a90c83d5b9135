"""The command line: exit codes, what goes where, and what a user reads. Drawn at a fixed width of 100.

Over 500 lines: one command line, run in the same few folders.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import blockmerge
from blockmerge.cli.main import run
from tests import oracle
from tests.commands import ok
from tests.refusals import assert_refused, snapshot


def test_the_main_job(pairs, here, capsys):
    a, b = pairs()
    out = ok(capsys, a, b, "--preset", "high_res")
    assert [path.name for path in here.iterdir()] == ["a+b-high_res.safetensors"]
    lines = out.splitlines()
    assert lines[0] == "weighted_sum high_res of a.safetensors and b.safetensors (Stable Diffusion 1.x)"
    assert "  IN03    0.67 ████████░░░░    OUT08   0.67 ████████░░░░" in lines
    assert "234 tensors computed, 749 taken from a.safetensors, 148 taken from b.safetensors" in lines
    assert "- the VAE is taken whole from a.safetensors (merge --vae blend would blend it)" in lines
    assert re.fullmatch(r".*a\+b-high_res\.safetensors  2\.2 MB in \d+\.\d\d s", lines[-1])


def test_merge_may_be_said_or_not_and_options_stand_anywhere(pairs, here, capsys):
    a, b = pairs()
    ok(capsys, "merge", a, b, "-p", "HIGH-RES", "-o", "1.safetensors")
    ok(capsys, "-p", "high_res", a, b, "-o", "2.safetensors")
    ok(capsys, a, "--preset=high-res_replace", b, "-o", "3.safetensors")
    contents = {(here / f"{n}.safetensors").read_bytes() for n in (1, 2, 3)}
    assert len(contents) == 1


def test_what_is_without_effect_is_said(pairs, here, capsys):
    seed = "seed (--seed) has no effect, since nothing is random"
    mapping = "sdxl_map (--sdxl-map) has no effect, since both mappings give the same weights"

    def notes(*arguments, family="sd1"):
        found = json.loads(ok(capsys, *pairs(family), *arguments, "--dry-run", "--json"))["notes"]
        return [note for note in found if "no effect" in note]

    assert notes("-w", "0.5", "--seed", "7") == notes("-w", "0.5", "--number", "seed=7") == [seed]
    assert notes("-p", "high_res", "--seed", "7", "--sdxl-map", "name") == [seed, mapping]
    for chance in (("-w", "random"), ("-w", "0.5", "--set", "M00=random"), ("-w", "0.5", "-m", "dare")):
        assert notes(*chance, "--seed", "7") == []
    assert notes("-w", "0.5", "-m", "tensor_sum", "--weights-beta", "random", "--seed", "7") == []
    assert notes("-w", "0.5", "--sdxl-map", "name", family="sdxl") == [mapping]
    assert notes("-p", "high_res", "--sdxl-map", "name", family="sdxl") == []
    assert notes("-w", "0.5") == []
    rule = "1 element rule has no effect, since no merged tensor fits: OUT06:ATTN:0.2"
    assert notes("-w", "0.5", "--rules", "out06:ATTN:0.2,out06:attn:0.2") == [rule]


def test_rules_adjust_and_clip_are_said_with_the_number_of_tensors(pairs, here, capsys):
    def merged(*options):
        done = json.loads(ok(capsys, *pairs(), "-w", "0.3", *options, "-o", "o.safetensors", "--json"))
        tensors = load_file(here / "o.safetensors")
        (here / "o.safetensors").unlink()
        return tensors, [note for note in done["notes"] if "VAE" not in note], done["tensors"]["computed"]

    plain, none, _ = merged()
    assert none == []
    rules, adjust = "OUT03-OUT05:attn2:0.8", "1,0,0,2"
    for option, text, says in (
        ("--rules", rules, f"1 element rule sets the weight of {{}} tensors ({rules})"),
        (
            "--rules",
            "BASE::0.9,:norm:skip",
            "2 element rules set the weight of {} tensors (BASE::0.9, :norm:skip)",
        ),
        ("--adjust", adjust, "adjust 1,0,0,2,0,0,0,0 changes {} tensors"),
    ):
        changed, notes, _ = merged(option, text)
        # The VAE is A's in both, and follows no rule.
        differing = sum(not torch.equal(tensor, plain[name]) for name, tensor in changed.items())
        assert notes == [says.format(differing)], text
    _, notes, computed = merged("--clip")
    assert notes == [f"clip keeps {computed} tensors between a.safetensors and b.safetensors"]
    _, notes, _ = merged("--clip", "--rules", f"{rules},::1")
    assert notes[1:] == [
        f"1 element rule has no effect, since later rules take all these tensors: {rules}",
        "clip has no effect, since every value is A's or B's",
    ]
    (here / "mix.toml").write_text(
        f"[X]\nmodels = {json.dumps([*map(str, pairs())])}\nweights = 0.5\nrules = '{rules}'\n"
        f"[result]\nmodels = ['X', {json.dumps(str(pairs()[0]))}]\nweights = 0.5\nadjust = '0,0,0,2'\n"
    )
    notes = json.loads(ok(capsys, "run", "mix.toml", "-o", "o.safetensors", "--dry-run", "--json"))["notes"]
    assert f"X: 1 element rule sets the weight of 15 tensors ({rules})" in notes
    assert "adjust 0,0,0,2,0,0,0,0 changes 1 tensor" in notes


def test_a_seed_among_the_numbers_is_the_seed(pairs, here, capsys):
    def recipe(*seed):
        text = ok(capsys, *pairs(), "-m", "dare", "-w", "random", *seed, "--dry-run", "--json")
        return json.loads(text)["recipe"]

    assert recipe("--number", "seed=7") == recipe("--seed", "7") != recipe()


def test_a_dry_run_tells_the_recipe_that_the_output_would_have(pairs, here, capsys):
    arguments = [
        *pairs(), "-m", "dare", "-w", "random", "--seed", "7", "--drop-rate", "0.3", "--clip", "--adjust", "0,0,0,1",
        "--rules", "OUT05:attn2:0.8", "--dtype", "bf16", "--vae", "b", "-o", "o.safetensors", "--json",
    ]  # fmt: skip
    planned = json.loads(ok(capsys, *arguments, "--dry-run"))["recipe"]
    assert planned == json.loads(ok(capsys, *arguments))["recipe"]
    with safe_open("o.safetensors", "pt") as file:
        assert planned == json.loads(file.metadata()["blockmerge.recipe"])
    assert planned["numbers"] == {"drop_rate": 0.3, "seed": 7}
    assert (planned["rules"], planned["adjust"], planned["clip"]) == (
        "OUT05:attn2:0.8",
        "0,0,0,1,0,0,0,0",
        True,
    )
    assert (planned["method"], planned["dtype"], planned["vae"]) == ("dare", "bf16", "b")
    assert set(planned["weights"]) == set(oracle.SD)


def test_json_is_one_object_with_the_promised_keys(pairs, here, capsys):
    a, b = pairs()
    found = json.loads(ok(capsys, a, b, "-p", "low_res", "--json"))
    assert {
        "output", "family", "variant", "naming", "method", "preset", "weights", "weights_beta", "models", "tensors", "bytes", "seconds", "notes",
    } <= found.keys()  # fmt: skip
    assert found["output"] == str(here / "a+b-low_res.safetensors")
    assert found["models"] == ["a.safetensors", "b.safetensors"]
    assert list(found["weights"].values()) == oracle.numbers(oracle.LOW_RES)
    assert (found["family"], found["variant"], found["naming"]) == ("sd1", "base", "ldm")
    assert (found["method"], found["preset"], found["weights_beta"]) == ("weighted_sum", "low_res", None)
    assert {"computed", "from_a", "from_b", "from_c", "dropped"} <= found["tensors"].keys()
    assert found["bytes"] == (here / "a+b-low_res.safetensors").stat().st_size
    assert found["seconds"] > 0


def test_set_goes_on_top(pairs, here, capsys):
    found = json.loads(ok(capsys, *pairs(), "-p", "low_res", "--set", "BASE=0.25,IN00-IN02=1", "--json"))
    expected = dict(zip(oracle.SD, oracle.numbers(oracle.LOW_RES), strict=True)) | {
        "BASE": 0.25,
        "IN00": 1,
        "IN01": 1,
        "IN02": 1,
    }
    assert found["weights"] == expected


def test_set_may_be_said_more_than_once(pairs, here, capsys):
    found = json.loads(
        ok(capsys, *pairs(), "-w", "0", "--set", "BASE=1,IN00=1", "--set", "IN00=0.5", "--json")
    )
    assert found["weights"] == dict.fromkeys(oracle.SD, 0) | {"BASE": 1, "IN00": 0.5}


def test_rules_may_be_said_more_than_once(pairs, here, capsys):
    first, second = "OUT06:attn:0.5", "OUT06:attn2.to_k:0.2,M00::1"
    common = (*pairs(), "-w", "0", "--dry-run", "--json")
    repeated = json.loads(ok(capsys, *common, "--rules", first, "--rules", second))["recipe"]["rules"]
    assert repeated == json.loads(ok(capsys, *common, "--rules", f"{first},{second}"))["recipe"]["rules"]
    assert repeated == "OUT06:attn:0.5, OUT06:attn2.to_k:0.2, M00::1"
    says = ["element rule 2", ">>OUT12<<"]
    assert_refused(capsys, here, *common, "--rules", first, "--rules", "OUT12::1", says=says)
    assert_refused(capsys, here, *common, "--rules", first, "--rules", " ", says="--rules is empty")


def test_sdxl_weights(pairs, here, capsys):
    a, b = pairs("sdxl")

    def weights(*arguments):
        return list(json.loads(ok(capsys, a, b, *arguments, "--json", "--dry-run"))["weights"].values())

    assert weights("-p", "high_res") == oracle.numbers(oracle.SDXL_HIGH_RES)
    named = dict(zip(oracle.SD, oracle.numbers(oracle.HIGH_RES), strict=True))
    assert weights("-p", "high_res", "--sdxl-map", "name") == [named[block] for block in oracle.SDXL]
    assert weights("-w", oracle.HIGH_RES) == [named[block] for block in oracle.SDXL]
    assert weights("-w", oracle.HIGH_RES, "--sdxl-map", "resolution") == oracle.numbers(oracle.SDXL_HIGH_RES)


def test_dry_run_writes_nothing(pairs, here, capsys):
    out = ok(capsys, *pairs(), "-p", "high_res", "--dry-run")
    assert "dry run: would write" in out
    assert "2.2 MB" in out
    assert list(here.iterdir()) == []
    (here / "a+b-high_res.safetensors").write_text("precious")
    (here / "mix.toml").write_text(f"[result]\nmodels = {json.dumps([*map(str, pairs())])}\nweights = 0.5\n")
    folder = here / "folder"
    ok(capsys, *pairs(), "-w", "0.5", "--to", "diffusers", "-o", folder, "-q")
    before = snapshot(here)
    for arguments, name in (
        ((*pairs(), "-p", "high_res"), "a+b-high_res.safetensors"),
        (("run", "mix.toml", "-o", "a+b-high_res.safetensors"), "a+b-high_res.safetensors"),
        ((*pairs(), "-w", "0.5", "--to", "diffusers", "-o", "folder"), "folder"),
    ):
        out = ok(capsys, *arguments, "--dry-run")
        assert f"- {name} exists: give another name, or overwrite (--overwrite)" in out
        assert "dry run: would write" in out
    assert snapshot(here) == before


def test_beta_is_drawn_where_there_is_one(pairs, here, capsys):
    def drawn(*arguments):
        out = ok(capsys, *pairs(), "-w", "0.25", *arguments, "-o", "o.safetensors", "--overwrite")
        return [
            line.strip()
            for line in out.splitlines()
            if line.startswith("beta") or " BASE " in line or "     M00 " in line
        ]

    both = (
        "BASE    0.25 ███░░░░░░░░░",
        "M00    0.25 ███░░░░░░░░░",
        "beta",
        "BASE     0.5 ██████░░░░░░",
        "M00    skip ------------",
    )
    for how in (["--dry-run"], []):
        found = drawn("-m", "tensor_sum", "--weights-beta", "0.5", "--set-beta", "M00=skip", *how)
        assert [" ".join(line.split()) for line in found] == [" ".join(line.split()) for line in both]
        assert len(drawn(*how)) == 2


def test_quiet_prints_nothing(pairs, here, capsys):
    assert ok(capsys, *pairs(), "-p", "high_res", "-q") == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ["how much of B?", "--preset high_res", "--weights 0.5"]),
        (("-p", "high_res", "-w", "1"), "both a preset and weights"),
        (("-p", "hi_res"), ["unknown preset 'hi_res'", "did you mean 'high_res'"]),
        (("-p", "nothing.toml"), "cannot read preset file nothing.toml"),
        (("-w", "IN55=1"), ["unknown block 'IN55'", "did you mean 'IN"]),
        (("-w", "1,2,3"), "3 weights given"),
        (("-w", "half"), "weights (--weights): 'half' is not a number"),
        (("-w", "0.5", "--set", "OUT12=1"), "changes (--set): unknown block 'OUT12'"),
        (("-w", "0.5", "-m", "weighted_sun"), "did you mean 'weighted_sum'"),
        (("-w", "0.5", "--dtype", "fp17"), ["unknown dtype 'fp17'", "did you mean 'fp16'"]),
        (("-w", "0.5", "--sdxl-map", "size"), "unknown SDXL mapping"),
        (("-w", "0.5", "--threads", "0"), "'0' is not a number of threads"),
        (("-w", "0.5", "--device", "toaster"), "unknown device 'toaster'"),
        (("-w", "0.5", "--device", "meta"), "unknown device 'meta'"),
        (
            ("-w", "0.5", "-m", "dare", "--number", "drop_rate=0", "--number", "drop_rate=1"),
            "drop_rate is given twice: 0 and 1",
        ),
        (
            ("-w", "0.5", "-m", "dare", "--drop-rate", "0", "--number", "drop_rate=1"),
            "drop_rate is given twice: 0 and 1",
        ),
        (
            ("-w", "0.5", "-m", "dare", "--number", "drop-rate=0", "--number", "drop_rate=1"),
            "drop_rate is given twice: 0 and 1",
        ),
        (("-w", "0.5", "-m", "dare", "--number", "seed=3", "--seed", "4"), "seed is given twice: 4 and 3"),
        (("-w", "0.5", "-m", "dare", "--number", "seed=x"), "the seed is a whole number; x given"),
    ],
)
def test_refused_arguments(pairs, here, capsys, arguments, says):
    (here / "taken.safetensors").write_text("what is asked for is looked at before the output's place")
    assert_refused(capsys, here, *pairs(), *arguments, "-o", "taken.safetensors", says=says)


def test_an_unknown_method_is_refused_before_the_place_of_a_report(pairs, here, capsys):
    (here / "taken.html").write_text("")
    assert_refused(
        capsys,
        here,
        "similarity",
        *pairs(),
        "--method",
        "waits",
        "-o",
        "taken.html",
        says="did you mean 'weights'?",
    )


def test_refusals_without_a_gpu(pairs, here, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_refused(capsys, here, *pairs(), "-w", "0.5", "--device", "cuda", says="device cuda cannot be used")
    ok(capsys, *pairs(), "-w", "0.5", "--device", "auto")


def test_the_number_of_models(pairs, here, capsys):
    a, b = pairs()
    for arguments in ([a, "-w", "0.5"], [a], ["merge", a, "-p", "high_res"]):
        assert_refused(
            capsys,
            here,
            *arguments,
            says="one model given; merging takes two: blockmerge A B --preset high_res",
        )
    assert_refused(capsys, here, "frob", says="frob: no such file or command")
    assert_refused(capsys, here, a, b, a, "-w", "0.5", says="weighted_sum merges 2 models; 3 given")


@pytest.mark.parametrize(
    "arguments", [["--frobnicate", "a", "b"], ["merge"], ["presets", "show"], ["a", "b", "--threads", "many"]]
)
def test_what_click_cannot_parse_is_exit_code_2(here, capsys, arguments):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: " in err


def test_models_of_one_name_are_told_apart(pairs, here, capsys):
    paths = []
    for folder, path in zip(("sd1/x", "sdxl/x"), (pairs()[0], pairs("sdxl")[0]), strict=True):
        (here / folder).mkdir(parents=True)
        paths.append(shutil.copy(path, here / folder / "a.safetensors"))
    says = "sd1/x/a.safetensors is Stable Diffusion 1.x and sdxl/x/a.safetensors is"
    assert_refused(capsys, here, *paths, "-w", "0.5", "-o", "o.safetensors", says=says)
    one = paths[0]
    found = json.loads(
        ok(capsys, one, "sd1/../sd1/x/a.safetensors", "-w", "0.5", "-o", "o.safetensors", "--json")
    )
    assert found["models"] == ["a.safetensors", "a.safetensors"]
    assert "A and B are the same file" in found["notes"]


@pytest.mark.parametrize(
    "option", ["--vae", "--rules", "--adjust", "--set", "--set-beta", "--configs", "--variant"]
)
@pytest.mark.parametrize("text", ["", " ,,"])
def test_an_empty_text_is_a_variable_that_is_not_set(pairs, here, capsys, option, text):
    assert_refused(
        capsys,
        here,
        *pairs(),
        "-w",
        "0.5",
        option,
        text,
        says=f"{option} is empty: give it a value, or leave it out",
    )


def test_configs_are_for_folders(pairs, here, capsys):
    says = "configs go into a diffusers folder only, and x.safetensors is a single file"
    assert_refused(capsys, here, "convert", pairs()[0], "x.safetensors", "--configs", here, says=says)


def test_presets(here, capsys):
    out = ok(capsys, "presets")
    assert len([line for line in out.splitlines() if re.match(r"\S", line)]) == 41
    found = json.loads(ok(capsys, "presets", "--json"))
    assert len(found) == 40
    assert all(preset.keys() == {"name", "weights", "sdxl", "source", "description"} for preset in found)
    shown = json.loads(ok(capsys, "presets", "show", "HIGH-RES", "--json"))
    assert shown == [preset for preset in found if preset["name"] == "high_res"]
    assert_refused(capsys, here, "presets", "show", "lowres", says="did you mean 'low_res'")


def test_presets_tell_of_files_that_cannot_be_read(here, capsys):
    from blockmerge.weights.presets import user_folder

    user_folder().mkdir(parents=True)
    (user_folder() / "broken.toml").write_text("weights = ")
    assert run(["presets", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 40
    assert re.fullmatch(r"Left out: preset file .*broken\.toml is not TOML: .*\n", err)
    assert_refused(
        capsys,
        here,
        "presets",
        "show",
        "broken",
        says=["your own preset 'broken' cannot be read: ", "broken.toml is not TOML"],
    )


def test_presets_show_draws_the_u(here, capsys):
    (here / "p.toml").write_text(
        'name = "[bold]p[/bold]"\nweights = "IN00=1,IN11=-0.5,M00=0.01,OUT00=skip,OUT11=1.25,BASE=0.999"\n'
    )
    lines = [line.rstrip() for line in ok(capsys, "presets", "show", "p.toml").splitlines()]
    assert lines[0] == "[bold]p[/bold]"
    assert lines[2] == "  BASE   0.999 ███████████░"
    assert lines[4] == "  IN00       1 ████████████    OUT11   1.25 ████████████"
    assert lines[15] == "  IN11    -0.5 ░░░░░░░░░░░░    OUT00   skip ------------"
    assert lines[16] == "                M00     0.01 █░░░░░░░░░░░"


def test_narrow_terminals_lose_nothing(pairs, here, capsys, monkeypatch):
    a, _ = pairs()
    wide = [ok(capsys, *words).split() for words in (("presets",), ("inspect", a))]
    u = ok(capsys, "presets", "show", "high_res").split("\n\n", 1)[1]
    for columns in (20, 40, 56):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert [ok(capsys, *words).split() for words in (("presets",), ("inspect", a))] == wide
        lines = ok(capsys, "presets", "show", "high_res").split("\n\n", 1)[1].splitlines()
        assert all(len(line) <= columns for line in lines)
        if columns == 56:
            assert u.startswith("\n".join(lines[:14]))
        else:
            assert [line.split()[:2] for line in lines[:26]] == [
                [block, f"{number:g}"]
                for block, number in zip(oracle.SD, oracle.numbers(oracle.HIGH_RES), strict=True)
            ]
    monkeypatch.setenv("COLUMNS", "0")
    assert u.startswith(ok(capsys, "presets", "show", "high_res").split("\n\n", 1)[1].split("SDXL")[0])


def test_ascii_terminals_get_ascii(pairs, here):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-m", "blockmerge", "presets", "show", "high_res"],
        capture_output=True,
        env=environment,
        check=True,
    )
    assert b"IN01       1 ############" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "blockmerge", "ä", "b", "-w", "1"],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1


def test_demo(here, capsys):
    out = ok(capsys, "demo")
    folder = here / "blockmerge-demo"
    assert sorted(path.name for path in folder.iterdir()) == [
        "a+b-high_res.safetensors",
        "a.safetensors",
        "b.safetensors",
    ]
    assert "weighted_sum high_res" in out
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000
    weights = dict(zip(oracle.SD, oracle.numbers(oracle.HIGH_RES), strict=True))
    oracle.assert_merged(
        *(load_file(folder / f"{name}.safetensors") for name in ("a+b-high_res", "a", "b")), weights, "sd1"
    )
    assert_refused(capsys, here, "demo", says=["a.safetensors exists", "another folder, or --overwrite"])
    first = snapshot(folder)
    ok(capsys, "demo", "--overwrite")
    assert snapshot(folder) == first
    ok(capsys, "demo", "--seed", "1", "--overwrite")
    assert snapshot(folder) != first
    found = json.loads(ok(capsys, "demo", "other", "--family", "sdxl", "--json"))
    assert found["family"] == "sdxl"
    assert_refused(
        capsys, here, "demo", "blockmerge-demo", "--overwrite", "--family", "sd9", says="unknown family 'sd9'"
    )
    (here / "file").write_text("")
    assert_refused(capsys, here, "demo", "file", says="cannot make the folder file")


def test_a_progress_bar_only_on_a_terminal(big_pair, here):
    command = [
        sys.executable,
        "-m",
        "blockmerge",
        *map(str, big_pair),
        "-w",
        "1",
        "--overwrite",
        "-o",
        "out.safetensors",
    ]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stderr == b""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=slave, env={**os.environ, "TERM": "xterm"}
    )
    os.close(slave)
    seen = b""
    try:
        while chunk := os.read(master, 4096):
            seen += chunk
    except OSError:  # the other end was closed
        pass
    os.close(master)
    assert process.wait() == 0
    assert b"merging" in seen
    assert b"MB" in seen


def test_no_color_is_honoured_and_pipes_get_none(pairs, here):
    command = [sys.executable, "-m", "blockmerge", "presets", "show", "high_res"]
    assert b"\x1b[" not in subprocess.run(command, capture_output=True, check=True).stdout
    colours = []
    for environment in ({"TERM": "xterm"}, {"TERM": "xterm", "NO_COLOR": "1"}):
        master, slave = pty.openpty()
        process = subprocess.Popen(command, stdout=slave, env={**os.environ, **environment})
        assert process.wait() == 0
        os.close(slave)
        seen = b""
        try:
            while chunk := os.read(master, 65536):
                seen += chunk
        except OSError:
            pass
        os.close(master)
        colours.append(b"\x1b[36m" in seen or b"\x1b[1;36m" in seen)
    assert colours == [True, False]


# What is copied loads no torch, which takes seconds.
@pytest.mark.parametrize(
    ("closed", "weight"),
    [("<&- >&- 2>&-", 0.5), ("2>&-", 1), (">&- 2>&-", 1), (">&-", 1)],
)
def test_closed_streams_do_not_keep_a_merge_from_being_done(pairs, here, capsys, closed, weight):
    a, b = pairs()
    command = f'exec "{sys.executable}" -m blockmerge "{a}" "{b}" -w {weight} -o'
    assert ok(capsys, a, b, "-w", weight, "-o", "plain.safetensors")
    done = subprocess.run(
        ["sh", "-c", f"{command} out.safetensors {closed}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (done.stdout == "") == (">&-" in closed.split())
    assert (here / "out.safetensors").read_bytes() == (here / "plain.safetensors").read_bytes()
    refused = subprocess.run(
        ["sh", "-c", f"{command} out.safetensors {closed}"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_a_result_that_cannot_be_printed_is_there_all_the_same(pairs, here):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = [sys.executable, "-m", "blockmerge", *map(str, pairs()), "-w", "1", "-o", "out.safetensors"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: cannot print the result, though all else is done: no space left on device\n"
    assert len(load_file(here / "out.safetensors")) == 1131


def test_a_closed_pipe_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "blockmerge", "presets", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["presets"], ["presets", "show", "high_res"], ["merge", "--help"]],
)
def test_what_needs_no_torch_does_not_load_it(arguments):
    code = (
        "import sys\nfrom blockmerge.cli.main import run\n"
        f"code = run({arguments!r})\nprint(sorted(m for m in ('torch', 'numpy', 'safetensors') if m in sys.modules), code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[] 0\n"


def test_importing_the_package_loads_no_torch():
    code = "import sys, blockmerge; blockmerge.merge, blockmerge.block_of, dir(blockmerge); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version(capsys):
    assert ok(capsys, "--version") == f"blockmerge, version {blockmerge.__version__}\n"


def test_help_without_arguments(capsys):
    assert run([]) in (0, 2)  # click has changed its mind about the code
    out = capsys.readouterr()
    assert "Merge checkpoints of image models block by block." in out.out + out.err


def test_ctrl_c_before_the_merge_begins(here, big_pair):
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time, sys; from blockmerge.cli import main; main.cli.main = lambda *a, **k: time.sleep(60); main.main()",
        ],
        stderr=subprocess.PIPE,
    )
    time.sleep(1.5)
    process.send_signal(2)
    assert process.wait(timeout=30) == 130
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()

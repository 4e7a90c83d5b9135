"""What the commands say to somebody who mistypes, or asks for what there is not."""

from __future__ import annotations

import shutil

import pytest
import torch

import blockmerge
from blockmerge.checkpoints.writing.disk import check_space
from blockmerge.cli.main import run
from tests.commands import ok
from tests.forms import read
from tests.refusals import assert_refused

ENDINGS = [".txt", ".json", ".csv", ".html"]


@pytest.fixture
def models(pairs, here):
    """A folder `models` of two files in the current one, and the two in the current one itself."""
    (here / "models").mkdir()
    for path in pairs():
        shutil.copy(path, here / "models")
        shutil.copy(path, here)
    return here


# -- reports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pdf", "xlsx", "png", "PDF", "md"])
@pytest.mark.parametrize("command", ["similarity", "explain"])
def test_a_report_is_written_as_its_ending_says_or_not_at_all(models, capsys, command, ending):
    asked = (command, "a.safetensors", "b.safetensors", "-o", f"r.{ending}")
    assert_refused(capsys, models, *asked, says=[f"r.{ending}", *ENDINGS, "--format"])


def test_a_report_whose_format_is_given_may_have_any_name(models, capsys):
    from blockmerge.cli.main import run

    asked = ["similarity", "a.safetensors", "b.safetensors", "-o"]
    assert run([*asked, "r.log", "--format", "table"]) == 0
    assert run([*asked, "r.data", "--json"]) == 0
    assert run([*asked, "plain"]) == 0
    assert (models / "r.log").read_text() == (models / "plain").read_text()
    assert (models / "r.data").read_text().startswith("{")


# -- outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        ("convert", "a.safetensors", "folder"),
        ("convert", "a.safetensors", "folder/"),
        ("convert", "a.safetensors", "models"),
        ("merge", "a.safetensors", "b.safetensors", "-w", "0.5", "-o", "folder"),
        ("a.safetensors", "b.safetensors", "-w", "0.5", "-o", "some.ckpt"),
    ],
)
def test_an_output_that_is_no_file_is_told_of_folders(models, capsys, asked):
    assert_refused(capsys, models, *asked, says=[asked[-1], "--to diffusers"])


def test_space_is_told_in_units_that_are_not_0(tmp_path, monkeypatch):
    real = shutil.disk_usage
    for free, size, says in (
        (100, 4_100, "it needs 4.1 kB, 100 B are free"),
        (1_000_001, 1_000_002, "it needs 1,000,002 B, 1,000,001 B are free"),
        (1_000_000, 2_130_000_000, "it needs 2.13 GB, 1.0 MB are free"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: real(path)._replace(free=free))
        with pytest.raises(blockmerge.OutputError, match=says):
            check_space(tmp_path / "out.safetensors", size)


# -- commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (
            ("mrege", "a.safetensors", "b.safetensors"),
            "mrege: no such file or command; did you mean 'merge'?",
        ),
        (("mrege", "a", "b", "-w", "0.5"), "did you mean 'merge'?"),
        (("conver", "a.safetensors", "out.safetensors"), "did you mean 'convert'?"),
        (("simliarity", "a.safetensors", "b.safetensors"), "did you mean 'similarity'?"),
        (("Inspect", "a.safetensors"), "did you mean 'inspect'?"),
        (
            ("prune", "a.safetensors"),
            "prune: no such file or command; did you mean 'blockmerge convert … --prune'?",
        ),
        (("fix", "a.safetensors", "b.safetensors"), "did you mean 'blockmerge check … --fix'?"),
        (
            ("frobnicate", "a.safetensors"),
            "commands are merge, run, recipe, again, verify, convert, bake, lora, inspect, check",
        ),
        (("preset",), "did you mean 'presets'?"),
    ],
)
def test_a_mistyped_command_is_named(models, capsys, asked, says):
    assert_refused(capsys, models, *asked, says=says)


def test_a_file_of_that_name_is_a_model(models, capsys):
    for name in ("mrege", "prune"):
        (models / "a.safetensors").rename(models / name)
        ok(capsys, name, "b.safetensors", "-w", "0.5", "--dry-run")
        (models / name).rename(models / "a.safetensors")
    assert_refused(capsys, models, "nope.safetensors", "b.safetensors", "-w", "1", says="nope.safetensors")


def test_a_folder_of_files_is_no_model(models, capsys):
    says = "models is a folder of 2 model files; merging takes the files: blockmerge models/a.safetensors "
    assert_refused(capsys, models, "merge", "models", says=[says, "models/b.safetensors --preset high_res"])
    assert_refused(capsys, models, "merge", "models/", "-w", "0.5", says="is a folder of 2 model files")
    says = "with 2 model files in it: give one of these, such as models/a.safetensors"
    for asked in (
        ("models", "b.safetensors", "-w", "0.5"),
        ("b.safetensors", "models/", "-w", "0.5"),
        ("convert", "models", "out.safetensors"),
        ("explain", "models", "a.safetensors"),
    ):
        assert_refused(capsys, models, *asked, says=says)
    (models / "empty").mkdir()
    assert_refused(capsys, models, "inspect", "empty", says="is a folder without a model")


# -- check ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_repaired_is_not_called_right(here, capsys):
    import torch
    from safetensors.torch import save_file

    from blockmerge.cli.main import run
    from blockmerge.demo import make_state_dicts

    model = make_state_dicts("sd1")[0]
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    model[name] = torch.full_like(model[name], torch.nan)
    save_file(model, here / "a.safetensors", {"format": "pt"})
    assert run(["check", "a.safetensors", "--fix", "b.safetensors"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"wrote {here / 'b.safetensors'}: none of what is wrong can be repaired: nan_or_infinity"
    save_file({**model, "betas": torch.ones(3)}, here / "a.safetensors", {"format": "pt"})
    assert run(["check", "a.safetensors", "--fix", "b.safetensors", "--overwrite"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"wrote {here / 'b.safetensors'}: fixed leftovers; still wrong: nan_or_infinity"


# -- what is missing -----------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_told_before_missing_weights(models, capsys):
    for asked in (("no.safetensors", "b.safetensors"), ("a.safetensors", "no.safetensors")):
        for options in ((), ("-w", "0.5"), ("--dry-run",)):
            line = assert_refused(
                capsys, models, *asked, *options, says="cannot open no.safetensors: no such file"
            )
            assert "how much" not in line
    assert_refused(capsys, models, "a.safetensors", "b.safetensors", says="how much of B?")


# -- counts --------------------------------------------------------------------------------------------------


def dtypes_of(path):
    return {name: tensor.dtype for name, tensor in read(path).items()}


@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_tensors_that_are_converted_are_those_of_the_output(tmp_path, pairs, naming):
    """Each once, however many models it is made of and however many it becomes in the other naming."""
    a, b = pairs("sd2", ("F32", "F32"))
    output = tmp_path / ("out" if naming == "diffusers" else "out.safetensors")
    for result in (
        blockmerge.merge(a, b, weights=0.5, dtype="fp16", naming=naming, output=output),
        blockmerge.convert(a, output, dtype="fp16", naming=naming, overwrite=True),
    ):
        floats = [dtype for dtype in dtypes_of(result.output).values() if dtype == torch.float16]
        (note,) = [note for note in result.notes if "converted from" in note]
        assert note == f"{len(floats)} tensors are converted from F32 to F16"


def test_help_and_list_are_commands_too(here, capsys):
    assert ok(capsys, "help") == ok(capsys, "--help")
    assert ok(capsys, "help", "lora", "merge") == ok(capsys, "lora", "merge", "--help")
    assert_refused(capsys, here, "help", "mrege", says="mrege: no such command; did you mean 'merge'?")
    assert_refused(capsys, here, "help", "merge", "lora", says="lora: no such command")
    for options in ((), ("--json",)):
        assert ok(capsys, "presets", "list", *options) == ok(capsys, "presets", *options)


@pytest.mark.parametrize(("option", "meant"), [("--alpha", "--weights"), ("--beta", "--weights-beta")])
def test_options_of_other_programs_lead_to_ours(pairs, capsys, option, meant):
    a, b = map(str, pairs())
    assert run([a, b, option, "0.5"]) == 2
    assert f"No such option '{option}'. Did you mean '{meant}'?" in capsys.readouterr().err.replace("(", "")
    assert run(["inspect", a, option, "0.5"]) == 2
    assert meant not in capsys.readouterr().err


def test_a_text_that_is_no_model_is_told_what_it_needs(here, capsys):
    for name, text, todo in (
        ("t.safetensors", "just text", "download the model itself"),
        (
            "d.safetensors",
            "Access to model x is restricted",
            "itself, with a token where its site asks for one",
        ),
        ("j.safetensors", '{"error": "Unauthorized"}', "itself, with a token where its site asks for one"),
        ("mix.toml", "# mine\n\n[result]\nmodels = ['a', 'b']\n", "a recipe is for blockmerge run"),
        ("flat.toml", 'models = ["a", "b"]\n', "a recipe is for blockmerge run"),
    ):
        (here / name).write_text(text)
        for command in ("recipe", "verify", "check"):
            assert run([command, name]) == 1
            assert capsys.readouterr().err.rstrip().endswith(todo), (name, command)
    (here / "typo.toml").write_text('[result]\nmodels = ["a" "b"]\n')
    assert_refused(capsys, here, "run", "typo.toml", says='at line 2, column 15): models = ["a" "b"] (TOML)')

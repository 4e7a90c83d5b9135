"""What shells complete: as click gives it, and in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from blockmerge.anatomy import FAMILIES
from blockmerge.cli.completion import SHELLS
from blockmerge.cli.main import cli
from blockmerge.methods import METHODS
from blockmerge.weights import preset_names
from tests.commands import ok
from tests.refusals import assert_refused


def completed(*words):
    """What the last of some words can become."""
    shell = ShellComplete(cli, {}, "blockmerge", "_BLOCKMERGE_COMPLETE")
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]


@pytest.fixture
def folder(here):
    """Models and what is none, in a folder with a folder."""
    for name in ("a.safetensors", "b.CKPT", "my model.safetensors", "mix.toml", "notes.md", ".hidden.pt"):
        (here / name).touch()
    (here / "models").mkdir()
    (here / "models" / "inner.pt").touch()
    return here


MODELS = ["a.safetensors", "b.CKPT", "models/", "my model.safetensors"]


@pytest.mark.parametrize(
    "words",
    [("merge",), ("inspect",), ("check", "a.safetensors"), ("convert",), ("bake", "a.safetensors"),
     ("lora", "inspect"), ("merge", "a.safetensors", "b.CKPT", "--lora"), ("a.safetensors",),
     ("convert", "--vae"), ("again",)],
)  # fmt: skip
def test_model_files(folder, words):
    assert completed(*words, "") == MODELS
    assert completed(*words, "m") == ["models/", "my model.safetensors"]
    assert completed(*words, "mo") == ["models/", "models/inner.pt"]
    assert completed(*words, "models/") == ["models/inner.pt"]
    assert completed(*words, "gone/") == []


def test_files_of_other_kinds(folder):
    assert completed("run", "") == ["mix.toml", "models/"]
    (folder / "models" / "deep").mkdir()
    assert completed("convert", "a.safetensors", "--configs", "") == ["models/", "models/deep/"]
    assert completed("verify", "a.safetensors", "--models", "") == ["models/", "models/deep/"]
    assert completed("similarity", "m") == ["mix.toml", "models/", "my model.safetensors"]
    assert completed("merge", ".h") == [".hidden.pt"]


def test_a_link_to_itself_is_no_folder(folder):
    (folder / "models" / "loop").symlink_to("loop")
    assert completed("merge", "models/") == ["models/inner.pt"]


def test_the_first_word(folder):
    """It is a command, or already the first model of a merge."""
    found = completed("")
    assert set(MODELS) < set(found)
    assert set(cli.commands) < set(found)
    assert completed("a") == ["again", "a.safetensors"]
    assert completed("pre") == ["presets"]
    assert completed("--preset-b") == ["--preset-beta"]
    assert completed("a.safetensors", "--preset-b") == ["--preset-beta"]
    assert completed("presnt", "x", "") == MODELS


def test_presets(folder, capsys):
    ok(capsys, "presets", "add", "my_own", "-w", "0.5")
    every = [*preset_names(), "mix.toml", "models/"]
    assert completed("a.safetensors", "b.CKPT", "--preset", "") == every
    assert completed("merge", "-p", "HIGH-r") == ["high_res"]
    assert completed("presets", "show", "my") == ["my_own"]
    assert completed("merge", "--preset-beta", "grad") == ["GRAD_A", "GRAD_V"]


def test_methods_and_families(folder):
    assert completed("merge", "-m", "") == list(METHODS)
    assert completed("methods", "add") == [name for name in METHODS if name.startswith("add")]
    assert completed("presets", "add", "x", "--family", "") == list(FAMILIES)
    assert completed("demo", "--family", "sdx") == ["sdxl"]


def test_words(folder):
    assert completed("convert", "--to", "") == ["ldm", "diffusers"]
    assert completed("merge", "--vae", "a") == ["auto", "a", "a.safetensors"]
    assert completed("convert", "--only", "text") == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    assert completed("similarity", "a.safetensors", "--method", "") == ["attention", "weights"]
    assert completed("completion", "") == list(SHELLS)


def test_blocks(folder, pairs):
    assert completed("merge", "--set", "OUT1") == ["OUT10=", "OUT11="]
    assert completed("merge", "-w", "BASE=0,in0")[-1] == "BASE=0,IN09="
    assert completed("merge", "--set", "IN00-M") == ["IN00-M00="]
    assert completed("merge", "--set", "IN00=0.5") == []
    assert completed("merge", str(pairs("sdxl")[0]), "--set", "OUT0")[-1] == "OUT08="
    assert completed("merge", "a.safetensors", "--set", "OUT0")[-1] == "OUT09="
    flux = next(name for name, family in FAMILIES.items() if family.arms is None)
    assert completed("presets", "add", "x", "--family", flux, "-w", "") == [
        f"{block}=" for block in FAMILIES[flux].blocks
    ]


def test_numbers_that_cannot_be_read_do_not_matter_yet(folder):
    assert completed("merge", "--number", "x", "a.safetensors", "--method", "dar") == ["dare"]


def test_all_that_take_files_complete_them(folder):
    """Of every parameter whose place in the help says so."""

    def walk(command, path):
        for parameter in command.params:
            said = parameter.metavar or ""
            if any(word in said for word in ("FILE", "FOLDER", "MODEL", "PATH", "RECIPE", "DIR")):
                yield " ".join(path), parameter
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*path, name))

    found = list(walk(cli, ()))
    assert len(found) > 30
    for where, parameter in found:
        context = click.Context(cli)
        values = [item.value for item in parameter.shell_complete(context, "mod")]
        assert values[:1] == ["models/"], (where, parameter.name)


def test_no_torch_is_loaded(folder):
    code = (
        "import sys; from tests.test_completion import completed;"
        "assert completed('merge', '-p', 'hi') == ['high_res'];"
        "assert completed('merge', '-m', 'dar') == ['dare'];"
        "assert completed('x.safetensors', '--set', 'M') == ['M00='];"
        "assert 'torch' not in sys.modules and 'rich' not in sys.modules, 'loaded'"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script(here, capsys, monkeypatch, shell):
    script = ok(capsys, "completion", shell)
    assert f"_BLOCKMERGE_COMPLETE={shell}_complete" in script
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert ok(capsys, "completion") == script
    syntax = shutil.which(shell)
    if syntax:
        subprocess.run([syntax, "-n"], input=script.encode(), check=True)


def test_unknown_shells(here, capsys, monkeypatch):
    assert_refused(capsys, here, "completion", "fsh", says="did you mean 'fish'?")
    monkeypatch.setenv("SHELL", "/bin/ksh")
    assert_refused(capsys, here, "completion", says="unknown shell 'ksh'")


# -- a real bash ---------------------------------------------------------------------------------------------

BASH = shutil.which("bash")


def make_program(folder):
    """The command as the tests' Python runs it."""
    program = folder / "blockmerge"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m blockmerge "$@"\n')
    program.chmod(0o755)


def typed(folder, line):
    """What bash's own reading of a line completes, cut into words as readline cuts it."""
    make_program(folder)
    script = f"""
        eval "$(./blockmerge completion bash)"
        compopt() {{ [[ $1 == -o && $2 == nospace ]] && SPACE=no; }}
        COMP_LINE={line!r} COMP_POINT=${{#COMP_LINE}}
        read -ra COMP_WORDS <<< "$(sed 's/[=:]/ & /g' <<< "$COMP_LINE")"
        [[ $COMP_LINE == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        function=$(complete -p blockmerge | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        "$function" ./blockmerge
        printf '%s\\n' "${{COMPREPLY[@]}}"
        echo "${{SPACE:-yes}}"
    """
    done = subprocess.run([BASH, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    *found, space = done.stdout.splitlines()
    return found, space


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "found", "space"),
    [
        ("blockmerge a.safetensors b.CKPT -p hi", ["high_res"], "yes"),
        ("blockmerge a.safetensors b.CKPT --preset=hi", ["high_res"], "yes"),
        ("blockmerge a.safetensors b.CKPT --set OUT1", ["OUT10=", "OUT11="], "no"),
        ("blockmerge a.safetensors b.CKPT --set IN00=0.5,OUT11", ["0.5,OUT11="], "no"),
        ("blockmerge a.safetensors b.CKPT --set IN00=0.5 -m dar", ["dare"], "yes"),
        ("blockmerge inspect my", ["my\\ model.safetensors"], "yes"),
        ("blockmerge inspect mod", ["models/", "models/inner.pt"], "no"),
        ("blockmerge bake a.safetensors models/inner.pt:0.8 --dtype fp1", ["fp16"], "yes"),
    ],
)
def test_bash(folder, line, found, space):
    assert typed(folder, line) == (found, space)


# -- a real fish ---------------------------------------------------------------------------------------------

FISH = shutil.which("fish")


@pytest.mark.skipif(FISH is None, reason="needs fish")
def test_fish(folder):
    """Weights of several blocks are one text with commas."""
    make_program(folder)
    script = """
        set -x PATH . $PATH
        blockmerge completion fish | source
        complete -C "blockmerge a.safetensors b.CKPT --set IN00=0.5,OUT1"
    """
    given = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(
        [FISH, "-c", script], cwd=folder, env=given, capture_output=True, text=True, check=True
    )
    assert (done.stdout.split(), done.stderr) == (["IN00=0.5,OUT10=", "IN00=0.5,OUT11="], "")

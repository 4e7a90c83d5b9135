"""Advice works: the options that a message names are those of the command that says it, or of one it names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import save_file

from blockmerge.cli.main import cli, run
from blockmerge.merging.planning.written import OPTIONS as WRITTEN_KEYS
from tests.effort import some
from tests.forms import ema_of
from tests.small_models import small_model, write_folder
from tests.test_house import PACKAGE, commands, defining_file, file_of, modules, short

OPTION = re.compile(r"(?<![\w-])--(?P<name>[a-z][a-z-]*|\{\})(?: (?!of )[\w./{}=]+)?(?P<of>,? of [a-z, ]+)?")
COMMANDS = {" ".join(path): command for path, command in commands()}
OPTIONS = {
    name: {
        option
        for one in command.get_params(click.Context(command, **cli.context_settings))
        for option in one.opts
    }
    for name, command in COMMANDS.items()
}


def options_said(text) -> Iterator[tuple[str, set[str]]]:
    """Yield (option, commands that it is said to be one of): `--x, of merge and convert`, `merge --x`."""
    for match in OPTION.finditer(text):
        before = text[: match.start()]
        of = set(re.findall(r"[a-z]+", match["of"] or ""))
        of.update(re.findall(r"\b([a-z]+) $", before))
        if re.search(r"blockmerge A B $", before):
            of.add("merge")
        yield f"--{match['name']}", of & COMMANDS.keys()


# -- what the source says ------------------------------------------------------------------------------------


OPTION_MAKERS = ("click.option", "click.Option", "click.version_option")


def texts(path):
    """Yield every text in a file's code but docstrings and the options' own names and help; {} stands for what
    is filled in.
    """
    tree = ast.parse(path.read_text())
    passed_over = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            passed_over.add(id(node.value))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in OPTION_MAKERS:
            passed_over.update(map(id, ast.walk(node)))
    for node in ast.walk(tree):
        if id(node) in passed_over:
            continue
        if isinstance(node, ast.JoinedStr):
            passed_over.update(map(id, node.values))
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


_defining_file = cache(defining_file)


@cache
def run_time_imports(path):
    """The package's files that a file imports when it runs."""
    return tuple(_run_time_imports(path))


def _run_time_imports(path):
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (file for alias in node.names if (file := file_of(alias.name)))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                file = (
                    _defining_file(whole, None) if file_of(whole) else _defining_file(node.module, alias.name)
                )
                if file is not None:
                    yield file


def home_of(command):
    """The file of a command: one for each, or a folder for a group of several."""
    first, *rest = command.split()
    folder = PACKAGE / "cli" / first
    return folder / f"{rest[0] if rest else 'group'}.py" if folder.is_dir() else folder.with_suffix(".py")


SAYS_NOTHING = {
    ("rendering/terminal.py", "rendering/recipes.py"): "a recipe in metadata is shown, or is not one"
}
"""Imports whose messages are never seen, and why."""


@cache
def reached_by(command):
    """The files that a command runs, by its imports."""
    found, new = set(), [home_of(command)]
    while new:
        path = new.pop()
        if path not in found:
            found.add(path)
            new += (one for one in run_time_imports(path) if (short(path), short(one)) not in SAYS_NOTHING)
    return {short(path) for path in found}


AS_KEYS = {"run", "again", "similarity", "explain"}
"""Commands that take the options of a merge as keys of a recipe, of the same names."""

KEYS = {"--" + key.replace("_", "-") for key in WRITTEN_KEYS}

FILLED_IN = {
    ("cli/main.py", "--{}"): (),  # it names the command that has the option
    ("merging/planning/request.py", "--{}"): {"--vae", "--configs"},
}
"""What stands for {} in an option's name."""

RECORDED = {
    "recipe": {"merging/recipe_recorded.py", "rendering/recipes.py", "cli/recipe.py"},
    "presets add": {"cli/presets/add.py", "weights/own_presets.py", "checkpoints/writing/writer.py"},
    "verify": {"merging/again.py", "merging/verify.py", "cli/verify.py", "cli/models_folders.py"},
}
"""Commands that read a merge that was made: of its options none is to be chosen. What they themselves say."""

NEVER_SAID = {
    ("check", "merging/planning/policies.py", "--vae"): "a repair asks for no VAE",
    ("check", "merging/planning/request.py", "--vae"): "likewise",
    ("check", "merging/planning/request.py", "--configs"): "a repair takes none",
    ("check", "merging/planning/request.py", "--seed"): "a repair leaves nothing to chance",
    ("check", "merging/planning/request.py", "--sdxl-map"): "a repair has no weights",
    ("check", "merging/planning/request.py", "--adjust"): "a repair adjusts nothing",
    (
        "check",
        "merging/outputs/folder_files.py",
        "--configs",
    ): "the notes of a repair's conversion are not told",
    ("check", "merging/execute.py", "--allow-nonfinite"): "a repair allows them",
    **{
        (command, f"checkpoints/{place}.py", "--variant"): "they take a folder's weights of any variant"
        for command in ("lora inspect", "lora similarity", "lora merge", "lora resize", "lora convert")
        for place in ("open", "formats/folder")
    },
    **{
        (command, "merging/recipe_changes.py", "--set"): "only recipes are changed on the way"
        for command in ("convert", "bake", "check")
    },
    ("explain", "merging/again.py", "--models"): "its candidates are the models",
    ("recipe", "rendering/recipes.py", "--lora"): "a word of the command that it shows",
    ("lora convert", "lora_making/size.py", "--rank"): "a conversion changes no ranks",
    ("lora convert", "lora_making/size.py", "--energy"): "likewise",
    ("check", "checkpoints/opening.py", "--ema"): "a repair asks for no EMA copies",
    **{
        (command, "merging/planning/request.py", option): "nothing is left to chance, weighted or adjusted"
        for command in ("convert", "bake")
        for option in ("--seed", "--sdxl-map", "--adjust")
    },
    **{
        ("lora convert", "lora_making/size.py", option): "it changes no ranks"
        for option in ("--rank", "--energy")
    },
    **{
        (command, "weights/request.py", option): "they ask for no weights"
        for command in ("check", "convert", "bake")
        for option in ("--preset", "--weights", "--set")
    },
    **{
        (command, "merging/planning/request.py", option): "they have no second weights"
        for command in ("check", "convert", "bake")
        for option in ("--weights-beta", "--preset-beta")
    },
}
"""Commands that import a file and lack an option that a text in it names, and why they never say that text."""


def test_every_option_that_the_source_names_is_one_of_the_commands_that_say_it():
    wrong, needed = [], set()
    for path in modules():
        place = short(path)
        said = [(text, *one) for text in texts(path) for one in options_said(text)]
        for text, option, of in said:
            for name in FILLED_IN.get((place, option), {option}):
                assert all(name in OPTIONS[command] for command in of), text
                assert any(name in options for options in OPTIONS.values()), text
                for command in COMMANDS:
                    if place not in reached_by(command) or name in OPTIONS[command] or of:
                        continue
                    if command in AS_KEYS and name in KEYS:
                        continue
                    if command in RECORDED and place not in RECORDED[command]:
                        continue
                    if isinstance(COMMANDS[command], click.Group):
                        continue  # its commands say it
                    if (command, place, name) in NEVER_SAID:
                        needed.add((command, place, name))
                    # A demo merges two good files of its own; what it says then is tested below.
                    elif command != "demo" or place.startswith("cli/"):
                        wrong.append(f"{command} lacks {name}, which {place} names: {text}")
    assert wrong == [], "\n".join(wrong)
    assert needed == NEVER_SAID.keys()


def test_the_source_is_really_looked_through():
    """Known mentions are found, in all ways that texts are written."""
    found = {
        (short(path), option)
        for path in modules()
        for text in texts(path)
        for option, _ in options_said(text)
    }
    assert found >= {
        ("checkpoints/formats/folder.py", "--variant"),  # an f-string over lines
        ("checkpoints/writing/writer.py", "--overwrite"),
        ("merging/planning/request.py", "--{}"),
        ("weights/request.py", "--preset"),  # a dict
        ("anatomy/identify.py", "--vae"),
        ("cli/similarity.py", "--common-base"),
    }
    for command in ("inspect", "similarity", "explain", "check", "merge", "convert"):
        assert {"checkpoints/formats/folder.py", "anatomy/identify.py"} <= reached_by(command), command
    assert "merging/recipe.py" in reached_by("check")
    assert not any(place.startswith("merging/") for place in reached_by("inspect"))
    assert dict(options_said("give it (--vae, of merge and convert), or merge --clip")) == {
        "--vae": {"merge", "convert"},
        "--clip": {"merge"},
    }
    assert dict(options_said("they cannot be merged (--ema use)")) == {"--ema": set()}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_names_its_own_options(command):
    own = OPTIONS[command]
    helps = [COMMANDS[command].help, *(getattr(one, "help", None) or "" for one in COMMANDS[command].params)]
    for line in "\n".join(helps).splitlines():
        named = re.search(r"blockmerge (\w+)( \w+)?", line)
        theirs = own
        if named:
            theirs = OPTIONS.get(named[1] + (named[2] or ""), OPTIONS.get(named[1], OPTIONS["merge"]))
        for option, _ in options_said(line):
            assert option in own | theirs, line


# -- what the commands say -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trouble(tmp_path_factory):
    """All sorts of files and folders that something is wrong with."""
    home = tmp_path_factory.mktemp("trouble")
    model = small_model(for_a_folder=True)
    unet = {name: tensor for name, tensor in model.items() if name.startswith("model.diffusion_model.")}
    vae = {name: tensor for name, tensor in model.items() if name.startswith("first_stage_model.")}
    text = {name: tensor for name, tensor in model.items() if name.startswith("cond_stage_model.")}
    name = next(iter(unet))
    files = {
        "model": model,
        "unet": unet,
        "vae": vae,
        "text": text,
        "ema": model | ema_of(model),
        "xl": small_model("sdxl"),
        "nan": model | {name: torch.full_like(unet[name], torch.nan)},
        "strange": {"conv_in.weight": torch.zeros(3)},
        "mixed": in_bare_names(model) | {"junk.x": torch.zeros(2)},
    }
    for name, tensors in files.items():
        save_file(tensors, home / f"{name}.safetensors")
    for name in ("folder", "sole", "several"):
        write_folder(home / name, model, "sd1")
    for path in (home / "sole").rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    for path in (home / "several").rglob("*.safetensors"):
        path.with_suffix(".bf16.safetensors").write_bytes(path.read_bytes())
        path.rename(path.with_suffix(".fp16.safetensors"))
    for number in "01":
        (home / "models--org--name" / "snapshots" / (number * 40)).mkdir(parents=True)
    (home / "models--org--name" / "blobs").mkdir()
    (home / "empty").mkdir()
    (home / "page.safetensors").write_text("<!DOCTYPE html>")
    return home


def in_bare_names(model):
    from tests.other_names import in_diffusers

    return {
        name.removeprefix("unet/"): tensor
        for name, tensor in in_diffusers(model, "sd1").items()
        if name.startswith("unet/")
    }


LINES = (
    "inspect {}",
    "inspect {} --hash",
    "check {}",
    "check {} --fix out",
    "check {} --fix out/",
    "check {} --fix out.safetensors",
    "check {} --fix exists.safetensors",
    "check {} --fix empty",
    "similarity {} model.safetensors",
    "similarity model.safetensors {} --method weights",
    "similarity --matrix {} model.safetensors",
    "similarity model.safetensors model.safetensors --method weights --common-base {}",
    "explain {} model.safetensors",
    "explain model.safetensors {}",
    "merge {} model.safetensors -w 0.5 -o out.safetensors",
    "merge model.safetensors {} -p high_res -o out",
    "merge model.safetensors {} -o out.safetensors",
    "merge model.safetensors model.safetensors -w 0.5 --vae {} -o out.safetensors",
    "merge model.safetensors {} -w 0.5 --vae b -o out.safetensors",
    "merge model.safetensors {} -w 0.5 --to diffusers --configs {} -o out",
    "merge {} {} -w 0.5 --seed 3 --sdxl-map name -o exists.safetensors",
    "convert {} out.safetensors --ema use",
    "convert {} out.safetensors --vae unet.safetensors",
    "convert {} out",
    "convert {} out/",
    "convert {} out --to diffusers",
    "convert {} exists.safetensors",
    "convert {} out.safetensors --dtype fp8_e4m3fn",
)
WRONG = (
    *(
        f"{name}.safetensors"
        for name in ("model", "unet", "vae", "text", "ema", "xl", "nan", "strange", "mixed")
    ),
    *("folder", "sole", "several", "models--org--name", "empty", "page.safetensors", "missing"),
)


@pytest.mark.parametrize("line", LINES)
def test_what_a_command_says_names_its_own_options(trouble, tmp_path, monkeypatch, capsys, line):
    for path in trouble.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "exists.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    command = line.split()[0]
    for given in some(WRONG, of=3, chosen_by=line):
        run(line.replace("{}", given).split())
        said = "".join(capsys.readouterr())
        assert said
        for option, of in options_said(said):
            assert all(option in OPTIONS[one] for one in of or {command}), (given, said)
        for made in (tmp_path / "out.safetensors", *Path("out").rglob("*")):
            if made.is_file():
                made.unlink()


def test_what_a_demo_says_names_the_command_that_has_the_option(tmp_path, capsys):
    assert run(["demo", str(tmp_path / "demo")]) == 0
    said = list(options_said(capsys.readouterr().out))
    assert said == [("--vae", {"merge"})]

"""The house is as the design draws it: who may import whom, the public names, sizes, and commands with
docs.
"""

from __future__ import annotations

import ast
import graphlib
import inspect as python_inspect
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import click
import pytest

import blockmerge
from blockmerge.anatomy import FAMILIES
from blockmerge.cli.main import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "blockmerge"

MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "dtypes": set(),
    "types": set(),
    "anatomy": set(),
    "weights": {"anatomy"},
    "methods": set(),
    "expressions": {"methods"},
    "checkpoints": {"expressions", "anatomy"},
    "adapters": {"checkpoints", "expressions", "weights", "anatomy"},
    "streaming": set(),
    "merging": {"adapters", "streaming", "checkpoints", "expressions", "methods", "weights", "anatomy"},
    "comparing": {"adapters", "streaming", "checkpoints", "expressions", "anatomy"},
    "explaining": {"merging", "comparing", "streaming", "checkpoints", "expressions", "weights", "anatomy"},
    "inspecting": {
        "merging",
        "comparing",
        "adapters",
        "streaming",
        "checkpoints",
        "expressions",
        "anatomy",
    },
    "lora_making": {"adapters", "streaming", "checkpoints", "expressions", "anatomy"},
    "rendering": {
        "anatomy",
        "merging",
        "methods",
        "comparing",
        "explaining",
        "inspecting",
        "lora_making",
        "weights",
    },
    "catalogue": {"methods", "weights", "anatomy"},
    "demo": {"checkpoints", "anatomy"},
    "cli": {
        "merging",
        "methods",
        "comparing",
        "explaining",
        "inspecting",
        "lora_making",
        "checkpoints",
        "weights",
        "rendering",
        "demo",
        "streaming",
        "anatomy",
    },
    "__main__": {"cli"},
}
EVERYONE_MAY_IMPORT = {"errors", "version", "dtypes", "types"}
LOADED_LATE = {
    "merging/flat_unet.py",
    "merging/devices.py",
    "merging/in_memory.py",
    "merging/kernel.py",
    "merging/launching.py",
    "streaming/tensors.py",
    "comparing/attention.py",
    "comparing/reading.py",
    "comparing/lora_sums.py",
    "comparing/sums.py",
    "explaining/chunks.py",
    "explaining/gram.py",
    "explaining/merging_again.py",
    "lora_making/computing.py",
    "lora_making/decomposing.py",
    "lora_making/rewriting.py",
}
NO_TORCH = {"errors", "catalogue", "anatomy", "weights", "adapters", "rendering", "cli"}


CONTRACT_WORDS = {
    "sdxl_map": "the argument of merge, merge_state_dicts and LiveMerge",
    "--sdxl-map": "the option of that name",
}
"""Words of the contract that have a family's name in them, wherever they stand, and why."""

CONTRACT_PLACES = {
    ("cli/demo.py", "sd1"): "`demo --family`, its default and the sizes of what it makes",
    ("cli/demo.py", "sd2"): "likewise",
    ("cli/demo.py", "sdxl"): "likewise",
    ("cli/merge.py", "sdxl"): "the help of --sdxl-map",
    ("rendering/json_text.py", "sdxl"): "a preset's key `sdxl` in JSON",
    ("rendering/terminal.py", "sdxl"): "a preset's own table `sdxl`, and its column",
    ("weights/block_weights.py", "sdxl"): "BlockWeights.for_sdxl and sdxl_map",
    ("weights/preset_files.py", "sdxl"): "a preset file's key `sdxl`, and Preset.sdxl",
}
"""Where else a family's name stands in code, and why."""

FAMILIES_HOME = PACKAGE / "anatomy" / "families"


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Yield (module, at the top level?) of every import statement of a file."""
    tree = parsed(path)
    late = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.If))
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) not in late


def test_imports_keep_to_the_table():
    for path in modules():
        room = room_of(path)
        if room == "__init__":
            continue
        for module, _ in imports(path):
            first, *rest = module.split(".")
            if first == "blockmerge" and rest and rest[0] != room:
                allowed = MAY_IMPORT[room] | EVERYONE_MAY_IMPORT
                assert rest[0] in allowed, f"{short(path)}: {room} may not import {rest[0]}"
            if first in ("click", "rich", "click_default_group"):
                allowed = {"cli"} | ({"rendering"} if first == "rich" else {"weights"})
                assert room in allowed, f"{short(path)}: {room} may not know {first}"


def test_torch_is_loaded_late():
    for path in modules():
        top = {module.split(".")[0] for module, at_top in imports(path) if at_top}
        # Only files that are themselves loaded late, by the first worker that computes.
        assert "torch" not in top or short(path) in LOADED_LATE, f"{short(path)} loads torch at once"
        anywhere = {module.split(".")[0] for module, _ in imports(path)}
        assert room_of(path) not in NO_TORCH or "torch" not in anywhere, f"{short(path)} knows torch"


def imported_names(path):
    """Yield (module, name) of every `from module import name` of a file, and (module, None) of imports of
    wholes.

    Late and TYPE_CHECKING imports count.
    """
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, None) if file_of(whole) else (node.module, alias.name)


def file_of(module):
    """The package's file that a module's dotted name stands for, or None."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def defining_file(module, name):
    """The file that an imported name is from: where an `__init__` only passes it on, the file that defines
    it.
    """
    file = file_of(module)
    if file is not None and file.name == "__init__.py":
        for origin, passed_on in imported_names(file):
            if name is not None and passed_on == name:
                return defining_file(origin, name)
    return file


def short(path):
    return path.relative_to(PACKAGE).as_posix()


def test_files_import_in_no_circle():
    graph = {
        short(path): {short(file) for names in imported_names(path) if (file := defining_file(*names))}
        for path in modules()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"files that import each other: {' ← '.join(error.args[1])}")


def test_no_file_imports_from_the_init_above_it():
    """That would be a circle too: the `__init__` imports the file."""
    for path in modules():
        above = {folder / "__init__.py" for folder in path.parents} - {path}
        assert not above & {file_of(module) for module, _ in imported_names(path)}, short(path)


def test_the_table_is_the_one_in_the_docs():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for room, allowed in MAY_IMPORT.items():
        if room in ("version", "__main__"):
            continue
        row = next(line for line in text.splitlines() if line.startswith((f"| `{room}/`", f"| `{room}.py`")))
        said = {word.strip() for word in row.split("|")[3].split(",")} - {"–"}
        assert said == allowed, room


def test_the_public_names():
    """The stub is their one list, and what it says is so."""
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text()).body:
        assert isinstance(node, ast.ImportFrom), "the stub holds imports alone"
        home = import_module(node.module)
        for alias in node.names:
            assert alias.asname == alias.name, "type checkers take a name for public only as itself"
            assert getattr(blockmerge, alias.name) is getattr(home, alias.name)
            assert alias.name in {*blockmerge.__all__, "__version__"}
    for name in blockmerge.__all__:
        assert name in dir(blockmerge)
    assert "__version__" not in blockmerge.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blockmerge.nothing


def test_the_contract_of_the_python_interface():
    merge = python_inspect.signature(blockmerge.merge).parameters
    for name, default in {
        "preset": None, "weights": None, "method": "weighted_sum", "preset_beta": None, "weights_beta": None, "vae": "auto",
        "dtype": "keep", "device": "cpu", "threads": None, "overwrite": False, "progress": None,
    }.items():  # fmt: skip
        assert merge[name].default == default
        assert merge[name].kind == merge[name].KEYWORD_ONLY
    assert merge["output"].default is merge["output"].empty
    dicts = python_inspect.signature(blockmerge.merge_state_dicts).parameters
    assert {
        "preset",
        "weights",
        "method",
        "preset_beta",
        "weights_beta",
        "check_finite",
        "numbers",
    } <= dicts.keys()
    assert list(python_inspect.signature(blockmerge.block_of).parameters) == ["name", "family"]
    with pytest.raises(blockmerge.RecipeError, match="weighted_sum takes no 'beta'"):
        blockmerge.merge("a", "b", output="c.safetensors", weights=0.5, weights_beta=0.5)
    with pytest.raises(
        blockmerge.RecipeError, match="unknown argument 'gamma': weighted_sum has no such number"
    ):
        blockmerge.merge_state_dicts({}, {}, weights=0.5, gamma=0.5)


def commands(group=cli, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize(
    ("path", "command"),
    list(commands()),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_command_has_help_and_a_place_in_the_docs(path, command):
    assert command.help
    for parameter in command.params:
        assert isinstance(parameter, click.Argument) or parameter.help, parameter.name
    assert f"## blockmerge {' '.join(path)}\n" in (ROOT / "docs" / "cli.md").read_text()


def test_the_command_reference_is_up_to_date():
    """`make docs` writes it."""
    from docs.cli_reference import reference

    assert (ROOT / "docs" / "cli.md").read_text() == reference()


def said(path):
    """Yield the identifiers and strings of a file: all of it where it is no code, else without docstrings and
    comments, which may name a family as an example.
    """
    if path.suffix != ".py":
        yield path.read_text()
        return
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) not in docstrings:
            values = [
                value
                for _, field in ast.iter_fields(node)
                for value in (field if isinstance(field, list) else [field])
            ]
            yield from (value for value in values if isinstance(value, str))


def test_no_family_is_named_outside_its_folder():
    """By its name, its title or what messages call it, as a word or a part of an identifier."""
    names = {word.casefold() for f in FAMILIES.values() for word in (f.name, f.title, f.called)}
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    named = re.compile(rf"(?<![a-z0-9])(?:{'|'.join(longest_first)})(?![a-z0-9])")
    contract = re.compile("|".join(map(re.escape, CONTRACT_WORDS)))
    found = set()
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix != ".pyc" and FAMILIES_HOME not in path.parents:
            place = path.relative_to(PACKAGE).as_posix()
            for text in said(path):
                found.update((place, name) for name in named.findall(contract.sub("", text.casefold())))
    assert found == CONTRACT_PLACES.keys()


def test_files_and_functions_are_of_a_size_to_be_read():
    for path in modules():
        text = path.read_text()
        assert text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = node.end_lineno - body[0].lineno + 1 if body else 0
                assert length <= 60, f"{path}: {node.name} has {length} lines"


def test_rooms_say_what_belongs_in_them():
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path

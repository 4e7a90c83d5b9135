"""Every command of the documentation and of the help texts runs, on thin files of the names that it gives."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from glob import glob
from itertools import pairwise
from pathlib import Path

import click
import pytest

from blockmerge.cli.main import cli, run
from tests.docs_files import write_all, write_pinned
from tests.pages import PAGES, ROOT, Page, all_commands, help_examples

HARNESS = (ROOT / "benchmarks" / "harness.py").read_text()
SET_UP = ("pip", "pipx", "uv", "git", "cd", ".", "python3")
"""What needs the network or is the shell's own."""


def page_of(path):
    return Page.of(path.read_text(encoding="utf-8"))


def of_blockmerge(found):
    return [line for line in found if line.startswith("blockmerge ")]


def all_examples():
    """(where they are, the commands that are there), for pages and help texts with any."""
    for path in PAGES:
        yield path.name, of_blockmerge(page_of(path).commands)
    for path, command in all_commands():
        yield f"{' '.join(path)} --help", of_blockmerge(help_examples(command))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("docs") / "files")


def words_of(line):
    """A command's words, as a shell gives them, without where its output goes."""
    words = shlex.split(line, comments=True)[1:]
    words = words[: next((place for place, word in enumerate(words) if word in (">", ">>")), None)]
    expanded = []
    for word in words:
        word = re.sub(r"^~(?=/)", str(Path.home()), word)
        expanded += (sorted(glob(word)) if "*" in word else None) or [word]
    return expanded


def make_ready(words, made):
    """Take away what the command is to write, put LoRAs where it takes LoRAs, and fetch what earlier commands
    made. Returns what it is to write.
    """
    written = [after for word, after in pairwise(words) if word in ("-o", "--output", "--fix")]
    written += words[2:3] if words[0] == "convert" else []
    if words[0] in ("lora", "bake"):
        for path in Path("loras").iterdir():
            os.replace(path, path.name)
    for path in map(Path, written):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for word in set(words) - set(written):
        if not os.path.exists(word) and (made / word).is_file():
            os.link(made / word, word)
    return written


@pytest.mark.parametrize(
    ("place", "lines"), [pytest.param(*one, id=one[0]) for one in all_examples() if one[1]]
)
def test_commands_run(place, lines, files, tmp_path, monkeypatch, capsys):
    """In their order; each in a new folder, with hard links to all files."""
    if not (files / "release.json").exists():
        write_pinned(files, capsys)
    shutil.copytree(files / "models", Path.home() / "models", copy_function=os.link)
    made = tmp_path / "made"
    made.mkdir()
    for number, line in enumerate(lines):
        here = tmp_path / str(number)
        shutil.copytree(files, here, copy_function=os.link)
        monkeypatch.chdir(here)
        words = words_of(line)
        written = make_ready(words, made)
        before = set(os.listdir())
        code = run(words)
        out, err = capsys.readouterr()
        assert code == 0, f"{line}\n{err}"
        assert all(os.path.exists(path) for path in written) or "--dry-run" in words, line
        assert out or "-o" in words, line
        for name in set(os.listdir()) - before:
            if os.path.isfile(name):
                os.replace(name, made / name)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_other_commands_are_there(path):
    """Those of make, Python and pytest."""
    for line in page_of(path).commands:
        match shlex.split(line, comments=True):
            case ["blockmerge", *_]:
                pass
            case ["make", *targets]:
                for target in targets:
                    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), line
            case ["python", script, *options]:
                source = (ROOT / script).read_text() + HARNESS
                for option in options:
                    if option.startswith("--"):
                        assert re.search(rf'["( ]{option[2:].replace("-", "[-_]")}\b|{option}\b', source), (
                            line
                        )
            case ["pytest", "-m", mark]:
                assert f'"{mark}:' in (ROOT / "pyproject.toml").read_text(), line
            case ["pytest", test]:
                assert (ROOT / test).is_file(), line
            case [first, *_]:
                assert first in SET_UP, line


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_the_text_have_their_options(path):
    for code in page_of(path).code:
        if not code.startswith("blockmerge ") or "…" in code.split()[:2]:
            continue
        words = shlex.split(code)[1:]
        command = cli
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        if command is cli:
            command = cli.commands["merge"]
        known = {"--help", "--version"}
        for parameter in command.get_params(click.Context(command)):
            known.update(parameter.opts)
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, code

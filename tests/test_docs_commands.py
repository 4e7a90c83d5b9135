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
OTHERS = ("pip install .", "pytest -m gpu")


def commands_in_pages():
    for path in PAGES:
        for line in Page.of(path.read_text(encoding="utf-8")).commands:
            yield path.name, line


def commands_in_help():
    for path, command in all_commands():
        for line in help_examples(command):
            yield f"{' '.join(path)} --help", line


def of_blockmerge(found):
    return [
        pytest.param(line, id=f"{place}: {line}") for place, line in found if line.startswith("blockmerge ")
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("docs") / "files")


@pytest.fixture
def place(files, here, monkeypatch, capsys):
    """The current folder, with hard links to all files, and `~/models`."""
    if not (files / "release.json").exists():
        write_pinned(files, capsys)
    shutil.copytree(files, here, copy_function=os.link, dirs_exist_ok=True)
    shutil.copytree(files / "models", Path.home() / "models", copy_function=os.link)
    return here


def words_of(line):
    """A command's words, as a shell gives them, and where its output goes."""
    words, target = shlex.split(line, comments=True)[1:], None
    if ">" in words:
        words, target = words[: words.index(">")], words[-1]
    expanded = []
    for word in words:
        word = re.sub(r"^~(?=/)", str(Path.home()), word)
        expanded += (sorted(glob(word)) if "*" in word else None) or [word]
    return expanded, target


def make_room(folder, words):
    """Take away what the command is to write, and put LoRAs where it takes LoRAs."""
    written = [after for word, after in pairwise(words) if word in ("-o", "--output", "--fix")]
    written += words[2:3] if words[0] == "convert" else []
    if words[0] == "lora" or words[0] == "bake":
        for path in (folder / "loras").iterdir():
            os.replace(path, folder / path.name)
    for path in map(Path, written):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return written


@pytest.mark.parametrize("line", of_blockmerge([*commands_in_pages(), *commands_in_help()]))
def test_commands_run(line, place, capsys):
    words, target = words_of(line)
    written = make_room(place, words)
    code = run(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert all(os.path.exists(path) for path in written) or "--dry-run" in words
    assert not target or out


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_other_commands_are_there(path):
    """Those of make and Python, in blocks and in the text."""
    page = Page.of(path.read_text(encoding="utf-8"))
    inline = [one for one in page.code if one.startswith(("make ", "python ", "pytest "))]
    for line in [*(one for one in page.commands if not one.startswith("blockmerge ")), *inline]:
        match shlex.split(line, comments=True):
            case ["make", target]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), line
            case ["python", script, *options]:
                source = (ROOT / script).read_text() + HARNESS
                for option in options:
                    if option.startswith("--"):
                        assert re.search(rf'["( ]{option[2:].replace("-", "[-_]")}\b|{option}\b', source), (
                            line
                        )
            case ["pytest", test] if test.startswith("tests/"):
                assert (ROOT / test).is_file(), line
            case words:
                assert " ".join(words) in OTHERS


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_the_text_have_their_options(path):
    for code in Page.of(path.read_text(encoding="utf-8")).code:
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

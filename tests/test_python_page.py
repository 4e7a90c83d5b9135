"""docs/python.md has every public name, and what it shows of them is so."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest

import blockmerge
from docs.python_reference import SUBJECTS, reference

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
FUNCTIONS = [name for name in blockmerge.__all__ if inspect.isfunction(getattr(blockmerge, name))]
PUBLIC = {name: getattr(blockmerge, name) for name in blockmerge.__all__}


def test_it_is_up_to_date():
    """`make docs` writes it."""
    assert PAGE.read_text(encoding="utf-8") == reference()


def test_every_public_name_is_on_it_once():
    headings = re.findall(r"^### (\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == blockmerge.__all__
    assert sorted(name for names in SUBJECTS.values() for name in names) == blockmerge.__all__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_leads_with_an_example_and_names_its_arguments(name):
    docstring = inspect.getdoc(PUBLIC[name])
    first, example, *_ = docstring.split("\n\n")
    assert first.endswith(".")
    assert example.startswith(">>> ")
    assert name in example
    described = "\n".join(docstrings_about_arguments(name, set()))
    for parameter in inspect.signature(PUBLIC[name]).parameters:
        assert f"`{parameter}`" in described or parameter == "function", parameter


def docstrings_about_arguments(name, seen):
    """Yield a function's docstring, and those of the functions that it refers to for its other arguments."""
    docstring = inspect.getdoc(PUBLIC[name])
    seen.add(name)
    yield docstring
    for sentence in re.findall(r"arguments[^.]*", docstring):
        for other in re.findall(r"`(\w+)`", sentence):
            if other in FUNCTIONS and other not in seen:
                yield from docstrings_about_arguments(other, seen)


@pytest.mark.parametrize("name", [name for name, one in PUBLIC.items() if isinstance(one, type)])
def test_examples_of_classes_are_true(name):
    run_examples(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_of_functions_are_true(name):
    run_examples(name)


def run_examples(name):
    runner = doctest.DocTestRunner()
    found = doctest.DocTestFinder().find(PUBLIC[name], name, globs={**PUBLIC, "blockmerge": blockmerge})
    for test in found:
        assert runner.run(test).failed == 0

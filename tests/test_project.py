"""What is shipped: what a package index shows, which systems are tested, and that the examples run."""

from __future__ import annotations

import ast
import doctest
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import hatch_build

ROOT = Path(__file__).parents[1]


def test_readme_links_lead_somewhere_from_a_package_index():
    """`make release` builds the packages, and looks at what is in them."""
    assert doctest.testmod(hatch_build).failed == 0
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", readme)
    pictures = [link for link in links if link.startswith("docs/pictures/")]
    assert pictures
    linked = hatch_build.for_index(readme, "https://example.org/project/")
    for link in links:
        kind = "raw" if link in pictures else "blob"
        assert f"](https://example.org/project/{kind}/HEAD/{link}" in linked
    assert not any(f"]({link}" in hatch_build.for_index(readme, None) for link in links)


def test_the_package_imports_only_what_it_depends_on():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w-]+", one)[0].replace("-", "_") for one in project["dependencies"]}
    imported = set()
    for path in (ROOT / "blockmerge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names - {"blockmerge"} <= declared


def test_every_python_and_system_that_is_said_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = [one.split(" :: ") for one in project["classifiers"]]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert [
        one[2] for one in said if one[:2] == ["Programming Language", "Python"] and "." in one[2]
    ] == matrix["python"]
    systems = {"MacOS": "macos-latest", "Windows": "windows-latest", "Linux": "ubuntu-latest"}
    assert {systems[one[-1]] for one in said if one[0] == "Operating System"} == set(matrix["system"])
    assert project["requires-python"] == f">={matrix['python'][0]}"
    steps = {step.get("run") for step in workflow["jobs"]["test"]["steps"]}
    made = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"ruff check .", "ruff format --check .", "mypy"} <= steps
    assert all(f"$(BIN)/{command}\n" in made for command in steps if command and "install" not in command)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0][
        "hooks"
    ]
    assert [hook["entry"].split(" --")[0] for hook in hooks] == ["ruff check", "ruff format", "mypy"]


EXAMPLES = {
    "from_a_release_to_a_variant.py": "release.safetensors: what its recipe makes\nmade from base.safetensors, detailed.safetensors, renamed.safetensors\n"
    "variant.safetensors: BASE is 0.5 now",
    "merge_from_python.py": "in memory: 1131 tensors, the same as in the file",
    "own_method.py": "as a weighted sum elsewhere: True",
    "sweep_a_preset.py": "best.safetensors has the same bits as the live U-Net\ngiven back: True",
    "where_it_comes_from.py": "made by weighted_sum of base.safetensors and detailed.safetensors with the preset high_res. Its own recipe",
}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(example, tmp_path):
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert EXAMPLES[example.name] in done.stdout

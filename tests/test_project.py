"""What is shipped: the wheel has the presets and the layouts, and the examples run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_has_presets_and_layouts_and_works_where_it_is_unpacked(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".venv*", ".git", "*cache*", "blockmerge-demo", "__pycache__"),
    )
    build = "from hatchling.build import build_wheel; print(build_wheel('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True
    )
    wheel = source / "dist" / done.stdout.split()[-1]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert sum(name.startswith("blockmerge/presets/") for name in names) == 40
        families = "blockmerge/anatomy/families"
        assert {name for name in names if name.startswith(families) and name.endswith((".tsv", ".toml"))} == {
            path.relative_to(ROOT).as_posix() for path in (ROOT / families).rglob("*.t*") if path.is_file()
        }
        assert "blockmerge/py.typed" in names
        assert "blockmerge/rendering/templates/page.html" in names
        assert "blockmerge/rendering/templates/page.css" in names
        assert not [name for name in names if name.startswith("tests")]
        archive.extractall(tmp_path / "site")
    shutil.rmtree(source)
    code = "import blockmerge; print(blockmerge.__file__, len(blockmerge.preset_names()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "site" / "blockmerge" / "__init__.py"), "40"]


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

"""What a release is made of, built and tried: `make release`.

A wheel, made from the sdist, must say the right things to a package index and work in a fresh environment.
Without `--install`, that environment borrows the packages that blockmerge needs from the one that runs this;
with it, they are installed anew, as a user would.
"""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"


def run(*command: str | Path, folder: Path = ROOT) -> str:
    """Run a command without this checkout on its path, and return what it prints."""
    others = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    print("+", *(str(part).replace(f"{ROOT}{os.sep}", "") for part in command), flush=True)
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=others, stdout=subprocess.PIPE, check=False, encoding="utf-8"
    )
    if done.returncode:
        sys.exit(f"{done.stdout}exit code {done.returncode}: nothing is to be released")
    return done.stdout


def build() -> tuple[Path, Path]:
    """Build the sdist, and of it the wheel; return both."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT)
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """All data is in both, no tests are in the wheel, and every link on a package index leads somewhere."""
    presets = {f"blockmerge/presets/{path.name}" for path in (ROOT / "presets").iterdir()}
    data = [
        path for path in (ROOT / "blockmerge").rglob("*") if path.suffix in (".tsv", ".toml", ".html", ".css")
    ]
    wanted = presets | {path.relative_to(ROOT).as_posix() for path in data} | {"blockmerge/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        said = email.message_from_bytes(archive.read(metadata))
    assert not wanted - names, f"the wheel lacks {sorted(wanted - names)}"
    assert not [name for name in names if not name.startswith("blockmerge")], (
        "the wheel has more than the package"
    )
    broken = re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", str(said.get_payload()))
    assert not broken, f"links that lead nowhere on a package index: {broken}"
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"LICENSE", "CHANGELOG.md", "CITATION.cff", "tests/conftest.py", "presets/high_res.toml"}
    assert not needed - packed, f"the sdist lacks {sorted(needed - packed)}"


def check_version(wheel: Path) -> None:
    """The version has a dated section in the changelog, and is that of CITATION.cff."""
    version = wheel.name.split("-")[1]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## {re.escape(version)} - (\d{{4}}-\d\d-\d\d)$", changes, re.MULTILINE)
    assert dated, f"CHANGELOG.md has no section '## {version} - YYYY-MM-DD'"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation, f"CITATION.cff is not of version {version}"
    assert f"\ndate-released: {dated[1]}\n" in citation, f"CITATION.cff is not of {dated[1]}"


def check_in_fresh_environment(wheel: Path, *, install: bool) -> None:
    """The wheel, installed, lists its presets, merges the demo's models, and has types."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=False)
        here = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        python = here / "python"
        pip = (sys.executable, "-m", "pip", "--python", python)
        if install:
            run(*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
            check_types(python, folder)
        else:
            run(*pip, "install", "--quiet", "--no-deps", wheel)
            check_types(python, folder)
            packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
            borrowed = "\n".join(path for path in sys.path if path.endswith("site-packages"))
            Path(packages, "borrowed.pth").write_text(borrowed, encoding="utf-8")
        where = run(python, "-c", "import blockmerge; print(blockmerge.__file__)", folder=folder)
        assert str(folder.resolve()) in str(Path(where).resolve()), f"{where} is not the wheel's"
        assert "high_res" in run(here / "blockmerge", "presets", folder=folder)
        assert "tensors computed" in run(here / "blockmerge", "demo", "demo", folder=folder)


def check_types(python: Path, folder: Path) -> None:
    """The examples are well typed by what is installed, with or without the packages that it needs."""
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, folder)
    options = ("--strict", "--disable-error-code", "import-not-found", "--cache-dir", os.devnull)
    examples = [path.name for path in folder.glob("*.py")]
    run(sys.executable, "-m", "mypy", *options, "--python-executable", python, *examples, folder=folder)


def main() -> None:
    """Build, check and say what was made."""
    sdist, wheel = build()
    check_contents(sdist, wheel)
    check_version(wheel)
    check_in_fresh_environment(wheel, install="--install" in sys.argv)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if "Repository" not in project.get("urls", {}):
        print("No Repository in [project.urls]: links to files are plain text on a package index.")
    print(f"dist/{sdist.name} and dist/{wheel.name} can be released.")


if __name__ == "__main__":
    main()

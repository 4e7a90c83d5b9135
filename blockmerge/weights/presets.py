"""Presets: named sets of block weights, each found by its name, in a file, or in the user's own folder.

Looked for in this order, so that a user's preset hides a shipped one of the same name:

1. the user's folder: `blockmerge/presets` in the config folder (`~/.config`, `%APPDATA%`, `~/Library/Application Support`)
2. the presets that come with blockmerge

Upper and lower case, `-` and `_` are the same in names.
"""

from __future__ import annotations

import contextlib
import os
from functools import cache
from pathlib import Path

from blockmerge.errors import PresetError, did_you_mean, listing, shown
from blockmerge.weights.block_weights import BlockWeights
from blockmerge.weights.preset_files import SUFFIXES, Preset, read_preset_file

__all__ = ["Preset", "find_preset", "load_preset", "preset_names", "presets", "shipped_folder", "user_folder"]


def load_preset(name: str) -> BlockWeights:
    """Return the 26 weights of a preset (its SDXL table is in `find_preset(name).sdxl`).

    `name` is a preset's name or alias, a preset file's path, or ``FILE#NAME`` for a file of many.
    Raises PresetError, with the nearest known name, when there is none.
    """
    return find_preset(name).weights


def preset_names() -> list[str]:
    """Return the names of all presets, the user's own first, each in alphabetical order."""
    return [preset.name for preset in presets()]


def presets() -> list[Preset]:
    """Return all presets, the user's own first, without those that a user's preset hides and files that are none."""
    found: dict[str, Preset] = {}
    for folder in (user_folder(), shipped_folder()):
        for preset in sorted(_presets_in(folder), key=lambda preset: preset.name.casefold()):
            found.setdefault(_fold(preset.name), preset)
    return list(found.values())


def find_preset(name: str) -> Preset:
    """Return a preset by name, alias, path, or ``FILE#NAME``. Raises PresetError when there is none."""
    name = os.fspath(name)
    known = _by_name()
    if preset := known.get(_fold(name)):
        return preset
    path, _, inner = name.partition("#")
    if Path(path).suffix.lower() in SUFFIXES or os.path.isfile(path):
        return _from_file(Path(path), inner)
    names = [name for preset in known.values() for name in (preset.name, *preset.aliases)]
    raise PresetError(f"unknown preset '{shown(name)}'{did_you_mean(name, names)} ('blockmerge presets' lists them)")


def user_folder() -> Path:
    """The folder of the user's own presets; it need not exist."""
    from click import get_app_dir  # it knows where each operating system wants such a folder

    return Path(get_app_dir("blockmerge", roaming=True)) / "presets"


def shipped_folder() -> Path:
    """The folder of the presets that come with blockmerge: inside the package, or beside it in a source checkout."""
    package = Path(__file__).parents[1]
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "presets"


def _from_file(path: Path, inner: str) -> Preset:
    found = read_preset_file(path)
    if not inner:
        if len(found) != 1:
            names = listing((preset.name for preset in found), limit=5)
            raise PresetError(f"{shown(path)} holds {len(found)} presets ({names}): write {shown(path.name)}#NAME")
        return found[0]
    for preset in found:
        if _fold(inner) in (_fold(preset.name), *map(_fold, preset.aliases)):
            return preset
    raise PresetError(f"no preset '{shown(inner)}' in {shown(path)}{did_you_mean(inner, [preset.name for preset in found])}")


def _by_name() -> dict[str, Preset]:
    known: dict[str, Preset] = {}
    for preset in presets():
        for name in (preset.name, *preset.aliases):
            known.setdefault(_fold(name), preset)
    return known


def _fold(name: str) -> str:
    return name.strip().casefold().replace("-", "_")


def _presets_in(folder: Path) -> tuple[Preset, ...]:
    try:
        newest = max((entry.stat().st_mtime_ns for entry in [folder, *folder.iterdir()]), default=0)
    except OSError:  # the user's folder need not exist
        return ()
    return _read_folder(folder, newest)


@cache
def _read_folder(folder: Path, newest: int) -> tuple[Preset, ...]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    found: list[Preset] = []
    for path in files:
        # A stray text in the user's folder must not take all presets away; asked for by its path, it says what is wrong.
        with contextlib.suppress(PresetError):
            found += read_preset_file(path)
    return tuple(found)

"""Presets: named sets of block weights, each found by its name, in a file, or in the user's own folder.

Looked for in this order, so that a user's preset hides a shipped one of the same name:

1. the user's folder: `blockmerge/presets` in the config folder (`~/.config`, `%APPDATA%`,
   `~/Library/Application Support`)
2. the presets that come with blockmerge

Upper and lower case, `-` and `_` are the same in names.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from blockmerge.errors import PresetError, did_you_mean, listing, shown
from blockmerge.weights.block_weights import BlockWeights
from blockmerge.weights.grammar import finite_number
from blockmerge.weights.preset_files import SUFFIXES, Preset, read_preset_file

__all__ = [
    "Preset",
    "find_preset",
    "find_share",
    "load_preset",
    "preset_names",
    "presets",
    "shipped_folder",
    "unreadable_presets",
    "user_folder",
]


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
    """Return all presets, the user's own first, without those that a user's preset hides and files that are
    none.
    """
    return list(_by_own_name().values())


def unreadable_presets() -> list[str]:
    """Return what is wrong with each file in the user's folder that cannot be read, a line for each."""
    return [fault for _, fault in _presets_in(user_folder())[1]]


def find_preset(name: str) -> Preset:
    """Return a preset by name, alias, path, or ``FILE#NAME``. Raises PresetError when there is none."""
    if not isinstance(name, (str, os.PathLike)):
        raise PresetError(
            f"a preset is a name or a file, not a {type(name).__name__}: give weights as weights="
        )
    name = os.fspath(name)
    known = _by_name()
    if preset := known.get(_fold(name)):
        return preset
    path, _, inner = name.partition("#")
    if Path(path).suffix.lower() in SUFFIXES or os.path.isfile(path):
        return _from_file(Path(path), inner)
    names = [name for preset in known.values() for name in (preset.name, *preset.aliases)]
    raise PresetError(
        f"unknown preset '{shown(name)}'{did_you_mean(name, names)} ('blockmerge presets' lists "
        f"them){_unreadable(name)}"
    )


def find_share(text: str) -> tuple[Preset, float]:
    """Return the preset and the ratio that ``NAME@RATIO`` means; without ``@RATIO`` it is 1.

    What is itself a preset's name or file is that, whatever @ it holds. Raises PresetError when there is
    none, or the ratio is not a number.
    """
    try:
        return find_preset(text), 1.0
    except PresetError as error:
        name, at, tail = (
            os.fspath(text).rpartition("@") if isinstance(text, (str, os.PathLike)) else ("", "", "")
        )
        if not at:
            raise
        ratio = finite_number(tail)
        try:
            preset = find_preset(name)
        except PresetError as without:
            # "hi_res@0.6" is told of hi_res, "me@work/x.toml" of the whole.
            raise error if ratio is None else without from None
    if ratio is None:
        raise PresetError(
            f"'{shown(tail)}' in '{shown(text)}' is not a number: write NAME@RATIO, as in high_res@0.6"
        )
    return preset, ratio


def user_folder() -> Path:
    """The folder of the user's own presets; it need not exist."""
    from click import get_app_dir  # it knows where each operating system wants such a folder

    return Path(get_app_dir("blockmerge", roaming=True)) / "presets"


def shipped_folder() -> Path:
    """The folder of the presets that come with blockmerge: inside the package, or beside it in a source
    checkout.
    """
    package = Path(__file__).parents[1]
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "presets"


def _from_file(path: Path, inner: str) -> Preset:
    found = read_preset_file(path)
    if not inner:
        if len(found) != 1:
            names = listing((preset.name for preset in found), limit=5)
            raise PresetError(
                f"{shown(path)} holds {len(found)} presets ({names}): write {shown(path.name)}#NAME"
            )
        return found[0]
    wanted = [preset for preset in found if _fold(inner) in (_fold(preset.name), *map(_fold, preset.aliases))]
    if len(wanted) > 1:
        raise PresetError(
            f"{shown(path)} holds {len(wanted)} presets of the name '{shown(inner)}': remove all but one"
        )
    if wanted:
        return wanted[0]
    raise PresetError(
        f"no preset '{shown(inner)}' in {shown(path)}{did_you_mean(inner, [preset.name for preset in found])}"
    )


def _by_name() -> dict[str, Preset]:
    by_own_name = _by_own_name()
    known: dict[str, Preset] = {}
    for preset in _all():
        for name in (preset.name, *preset.aliases):
            # A hidden preset's aliases lead to the one that hides it.
            known.setdefault(_fold(name), by_own_name[_fold(preset.name)])
    return known


def _by_own_name() -> dict[str, Preset]:
    found: dict[str, Preset] = {}
    for preset in _all():
        found.setdefault(_fold(preset.name), preset)
    return found


def _all() -> list[Preset]:
    """All presets, the user's own first, also those that are hidden."""
    folders = (_presets_in(folder)[0] for folder in (user_folder(), shipped_folder()))
    return [
        preset for found in folders for preset in sorted(found, key=lambda preset: preset.name.casefold())
    ]


def _unreadable(name: str) -> str:
    """What an unknown preset's message says of files that cannot be read: of that name, if there is one, or
    of the first.
    """
    faults = sorted(_presets_in(user_folder())[1], key=lambda fault: _fold(fault[0].stem) != _fold(name))
    return (
        f"; {faults[0][1]}" + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else "") if faults else ""
    )


def _fold(name: str) -> str:
    return name.strip().casefold().replace("-", "_")


def _presets_in(folder: Path) -> tuple[tuple[Preset, ...], tuple[tuple[Path, str], ...]]:
    """The presets in a folder, and the files that cannot be read with what is wrong with them."""
    try:
        newest = max((entry.stat().st_mtime_ns for entry in [folder, *folder.iterdir()]), default=0)
    except OSError:  # the user's folder need not exist
        return (), ()
    return _read_folder(folder, newest)


@cache
def _read_folder(folder: Path, newest: int) -> tuple[tuple[Preset, ...], tuple[tuple[Path, str], ...]]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    found: list[Preset] = []
    faults: list[tuple[Path, str]] = []
    for path in files:
        try:
            found += read_preset_file(path)
        except PresetError as error:  # a stray text in the user's folder must not take all presets away
            faults.append((path, str(error)))
    return tuple(found), tuple(faults)

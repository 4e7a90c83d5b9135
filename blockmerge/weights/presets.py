"""Presets: named sets of block weights, each found by its name, in a file, or in the user's own folder.

Looked for in this order, so that a user's preset hides a shipped one of the same name:

1. the user's folder: `blockmerge/presets` in the config folder (`~/.config`, `%APPDATA%`,
   `~/Library/Application Support`)
2. the presets that come with blockmerge

Upper and lower case, `-` and `_` are the same in names. The file of a preset that comes with blockmerge is
named like the preset, so that it is found without reading the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from blockmerge.anatomy import DEFAULT_FAMILY
from blockmerge.errors import PresetError, did_you_mean, listing, reason, shown
from blockmerge.weights.block_weights import BlockWeights
from blockmerge.weights.plain_numbers import finite_number
from blockmerge.weights.preset_files import SUFFIXES, Preset, PresetFile, presets_of_file, read_preset_file

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


_ALIASES = {"high_res_replace": "high_res", "low_res_replace": "low_res"}
"""Other names of the presets that come with blockmerge. Their files say so too, but would all have to be
read.
"""


def load_preset(name: str) -> BlockWeights:
    """Return the 26 weights of a preset.

    >>> load_preset("high_res")["IN01"]
    1.0

    `name` is a preset's name or alias, a preset file, or ``FILE#NAME`` for a file of many. `list_presets` has
    the tables for other families.

    Raises `PresetError` where there is no such preset, or it has no weights for SD1.
    """
    return find_preset(name).weights_for(DEFAULT_FAMILY)


def preset_names() -> list[str]:
    """Return the names of all presets: your own first, each group in alphabetical order.

    >>> "high_res" in preset_names()
    True
    """
    return [preset.name for preset in presets()]


def presets() -> list[Preset]:
    """Return all presets, the user's own first, without those that a user's preset hides, and without files
    that cannot be read.
    """
    return list(_by_own_name([*_own(), *_sorted(_presets_in(shipped_folder())[0])]).values())


def unreadable_presets() -> list[str]:
    """Return what is wrong with each file, or line of a file, in the user's folder that cannot be read, a
    line of text for each.
    """
    return [fault for _, fault in _presets_in(user_folder())[1]]


def find_preset(name: str) -> Preset:
    """Return a preset by name, alias, path, or ``FILE#NAME``. Raises PresetError when there is none."""
    if preset := _find(name):
        return preset
    raise _unknown(name)


def find_share(text: str) -> tuple[Preset, float]:
    """Return the preset and the ratio that ``NAME@RATIO`` means; without ``@RATIO`` it is 1.

    What is itself a preset's name or file is that, whatever @ it holds. Raises PresetError when there is
    none, or the ratio is not a number.
    """
    fault = None
    try:
        if whole := _find(text):
            return whole, 1.0
    except PresetError as error:
        fault = error
    name, at, tail = os.fspath(text).rpartition("@") if isinstance(text, (str, os.PathLike)) else ("", "", "")
    if not at:
        raise fault or _unknown(text)
    ratio = finite_number(tail)
    try:
        preset = find_preset(name)
    except PresetError as without:
        # "hi_res@0.6" is told of hi_res, "me@work/x.toml" of the whole.
        raise (fault or _unknown(text)) if ratio is None else without from None
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


def _find(name: str) -> Preset | None:
    """The preset of a name, or in a file; None where no preset and no file has the name."""
    if not isinstance(name, (str, os.PathLike)):
        raise PresetError(
            f"a preset is a name or a file, not a {type(name).__name__}: give weights as weights="
        )
    name = os.fspath(name)
    own = _own()
    hiding = _by_own_name(own)
    if preset := next((preset for preset in own if fold(name) in names_of(preset)), None):
        return hiding[fold(preset.name)]
    if preset := _shipped(name):
        if fault := next((why for called, why in _faults() if fold(called) in names_of(preset)), None):
            # The user's own would hide it, and is not what it is.
            raise PresetError(f"your own preset '{shown(preset.name)}' cannot be read: {fault}")
        # A hidden preset's aliases lead to the one that hides it.
        return hiding.get(fold(preset.name), preset)
    path, _, inner = name.partition("#")
    if Path(path).suffix.lower() in SUFFIXES or os.path.isfile(path):
        return _from_file(Path(path), inner)
    return None


def _shipped(name: str) -> Preset | None:
    """The preset of that name or alias that comes with blockmerge."""
    own_name = _ALIASES.get(fold(name), fold(name))
    stem = own_name.replace("/", "_div").replace("*", "_x")
    try:
        path = next((path for path in shipped_folder().iterdir() if path.stem == stem), None)
    except OSError:
        return None
    presets = () if path is None else _read(path).presets
    return next((preset for preset in presets if fold(preset.name) == own_name), None)


def is_shipped(name: str) -> bool:
    """Whether a preset of that name or alias comes with blockmerge."""
    return _shipped(name) is not None


def _unknown(name: str) -> PresetError:
    faults = _faults()
    if why := next((why for called, why in faults if fold(called) == fold(name)), None):
        return PresetError(f"your own preset '{shown(name)}' cannot be read: {why}")
    unread = f", and says why it cannot read {len(faults)} of your own" if faults else ""
    names = [name for preset in presets() for name in (preset.name, *preset.aliases)]
    return PresetError(
        f"unknown preset '{shown(name)}'{did_you_mean(name, names)} ('blockmerge presets' lists them{unread})"
    )


def _from_file(path: Path, inner: str) -> Preset:
    file = read_preset_file(path)
    found = file.presets
    if not inner:
        if file.faults and len(found) == 1:  # whether that one is meant cannot be told
            raise PresetError(file.faults[0][1])
        if len(found) != 1:
            names = listing((preset.name for preset in found), limit=5)
            raise PresetError(
                f"{shown(path)} holds {len(found)} presets ({names}): write {shown(path.name)}#NAME"
            )
        return found[0]
    wanted = [preset for preset in found if fold(inner) in names_of(preset)]
    if fault := next((why for called, why in file.faults if fold(called) == fold(inner)), None):
        raise PresetError(fault)
    if len(wanted) > 1:
        raise PresetError(
            f"{shown(path)} holds {len(wanted)} presets of the name '{shown(inner)}': remove all but one"
        )
    if wanted:
        return wanted[0]
    raise PresetError(
        f"no preset '{shown(inner)}' in {shown(path)}{did_you_mean(inner, [preset.name for preset in found])}"
    )


def _own() -> list[Preset]:
    """The user's own presets, also those that another of the same name hides."""
    return _sorted(_presets_in(user_folder())[0])


def _faults() -> list[tuple[str, str]]:
    """What cannot be read of the user's own presets: (name of the preset, why)."""
    return _presets_in(user_folder())[1]


def _sorted(presets: Iterable[Preset]) -> list[Preset]:
    return sorted(presets, key=lambda preset: preset.name.casefold())


def _by_own_name(presets: Iterable[Preset]) -> dict[str, Preset]:
    found: dict[str, Preset] = {}
    for preset in presets:
        found.setdefault(fold(preset.name), preset)
    return found


def own_files() -> list[tuple[Path, Sequence[Preset]]]:
    """The files of the user's folder that can be read, and the presets in each."""
    return [(path, _read(path).presets) for path in _paths_in(user_folder())]


def names_of(preset: Preset) -> list[str]:
    """All names that a preset answers to, in the spelling in which names are compared."""
    return [fold(name) for name in (preset.name, *preset.aliases)]


def fold(name: str) -> str:
    """A name in the one spelling in which names are compared."""
    return name.strip().casefold().replace("-", "_")


def _presets_in(folder: Path) -> tuple[list[Preset], list[tuple[str, str]]]:
    """The presets in a folder, and what cannot be read: (name of the preset or the file, why)."""
    found: list[Preset] = []
    faults: list[tuple[str, str]] = []
    for path in _paths_in(folder):
        # A stray text in the user's folder must not take all presets away.
        file = _read(path)
        found += file.presets
        faults += file.faults
    return found, faults


def _paths_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError:  # the user's folder need not exist
        return []


def _read(path: Path) -> PresetFile:
    """The presets of a file in a folder, read again only after the file was changed."""
    try:
        status = path.stat()
    except OSError as error:
        return PresetFile((), ((path.stem, f"cannot read preset file {shown(path)}: {reason(error)}"),))
    return presets_of_file(path, (status.st_mtime_ns, status.st_size))

"""New presets of the user's own: what their files hold, and where they go."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockmerge.anatomy import DEFAULT_FAMILY, FAMILIES
from blockmerge.errors import PresetError, did_you_mean, listing, reason, shown
from blockmerge.weights.block_weights import BlockWeights
from blockmerge.weights.grammar import WeightsLike
from blockmerge.weights.preset_files import Preset, preset_of_text, read_preset_file
from blockmerge.weights.presets import fold, names_of, own_files, user_folder


def weights_text(weights: Mapping[str, float | None]) -> str:
    """Return weights as a text that gives them again, of those blocks only that are not 0.

    >>> weights_text({"BASE": 0.0, "IN00": 0.67, "IN01": None, "M00": 1.0})
    'IN00=0.67,IN01=skip,M00=1'
    """
    named = [f"{block}={_number(weight)}" for block, weight in weights.items() if weight != 0]
    return ",".join(named) or f"{next(iter(weights))}=0"


def written_preset(
    name: str, weights: str, family: str | None = None, *, description: str = "", source: str = ""
) -> bytes:
    """Return the preset file of weights for the models of a family.

    Raises PresetError for a name that no preset can have, weights that cannot be read, and an unknown family.
    """
    family = DEFAULT_FAMILY if family is None else family
    if family not in FAMILIES:
        raise PresetError(
            f"unknown family '{shown(family)}'{did_you_mean(family, FAMILIES)} ({', '.join(FAMILIES)})"
        )
    is_usual = FAMILIES[family].blocks == FAMILIES[DEFAULT_FAMILY].blocks
    key = DEFAULT_FAMILY if is_usual else family
    return _written(Preset(name.strip(), {key: weights}, description=description, source=source))


def copied_preset(preset: Preset, name: str, description: str = "") -> bytes:
    """Return the preset file of a preset under another name. Raises PresetError as `written_preset` does."""
    return _written(Preset(name.strip(), preset.tables, (), preset.source, description or preset.description))


def place_of(name: str) -> Path:
    """Where a preset of that name goes: a file of the user's folder."""
    stem = re.sub(r"[^\w.+-]", "_", fold(name).replace("/", "_div").replace("*", "_x"))
    return user_folder() / ("_" * bool(_NO_FILE.match(stem)) + stem + ".toml")


_NO_FILE = re.compile(r"\.|(con|prn|aux|nul|com\d|lpt\d)(\.|$)")
"""How names begin that are hidden, or that Windows has for devices."""


def check_new(names: Sequence[str], target: Path) -> None:
    """Raise PresetError where another file of the user's folder has a preset of one of these names, or the
    target one of another name.
    """
    wanted = set(map(fold, names))
    for path, presets in own_files():
        taken = [preset.name for preset in presets if wanted & set(names_of(preset))]
        if taken and path != target:
            raise PresetError(
                f"you have a preset of the name {listing(taken)} already, in {shown(path)}: "
                "give another name, or take that one out"
            )
        others = [preset.name for preset in presets if fold(preset.name) not in wanted]
        if others and path == target:
            raise PresetError(
                f"{shown(path)} has your preset {listing(others)}, which would be lost: "
                "give another name, or move that file"
            )


def presets_in(path: Path) -> tuple[bytes, list[str]]:
    """Return a preset file's contents, and the names of the presets in it. Raises PresetError."""
    names = [preset.name for preset in read_preset_file(path).presets]
    try:
        return path.read_bytes(), names
    except OSError as error:
        raise PresetError(f"cannot read preset file {shown(path)}: {reason(error)}") from error


def _written(preset: Preset) -> bytes:
    import tomli_w

    tables = {family: _as_text(table) for family, table in preset.tables.items()}
    content: dict[str, Any] = {"name": preset.name}
    content |= {key: text for key in ("description", "source") if (text := getattr(preset, key))}
    content["weights"] = tables[DEFAULT_FAMILY] if tables.keys() == {DEFAULT_FAMILY} else tables
    text = tomli_w.dumps(content)
    preset_of_text(text, place_of(preset.name or "preset"))  # which refuses what could not be read again
    return text.encode()


def _as_text(table: WeightsLike) -> Any:
    if isinstance(table, BlockWeights):
        return weights_text(table)
    return dict(table) if isinstance(table, Mapping) else table


def _number(weight: float | None) -> str:
    return "skip" if weight is None else repr(float(weight)).removesuffix(".0")

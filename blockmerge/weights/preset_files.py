"""Preset files: our own TOML form, and the two text forms in use elsewhere.

- TOML: `name`, `weights` (26 numbers, or 25 without BASE), and optionally `sdxl` (20 or 19), `aliases`,
  `source`, `description`.
- SuperMerger's list: a line ``NAME<tab>26 numbers separated by commas`` or ``NAME:numbers`` for each preset.
- merge-block-weighted's list: the same with 25 numbers.

A text file may begin with a header line; empty lines and lines that begin with # are skipped.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blockmerge.anatomy import SD_BLOCKS, SDXL_BLOCKS
from blockmerge.errors import PresetError, WeightsError, reason, shown
from blockmerge.weights.block_weights import BlockWeights
from blockmerge.weights.grammar import WeightsLike, parse_weights
from blockmerge.weights.random_weights import is_random

SUFFIXES = (".toml", ".txt", ".tsv", ".csv")

_LARGEST = 1 << 20  # bytes; a preset file is a page of text, and somebody may name a checkpoint by mistake


@dataclass(frozen=True)
class Preset:
    """A named set of weights as they are written: for SD1 and SD2, and for SDXL where the preset has its own
    table for it.
    """

    name: str
    written: WeightsLike
    written_for_sdxl: WeightsLike | None = None
    aliases: tuple[str, ...] = ()
    source: str = ""
    description: str = ""

    @property
    def weights(self) -> BlockWeights:
        """The 26 weights of SD1 and SD2; random ones as seed 0 draws them."""
        return self.weights_for("sd1")

    @property
    def sdxl(self) -> BlockWeights | None:
        """The 20 weights of the preset's own table for SDXL, if it has one."""
        return None if self.written_for_sdxl is None else parse_weights(self.written_for_sdxl, "sdxl")

    @property
    def is_random(self) -> bool:
        """Whether any weight is left to chance, and so to the seed."""
        return is_random((self.written, self.written_for_sdxl))

    def weights_for(self, family: str, sdxl_map: str | None = None, seed: int | str = 0) -> BlockWeights:
        """The weights for a family; for SDXL the preset's own table, unless a mapping is asked for."""
        if family == "sdxl" and self.written_for_sdxl is not None and sdxl_map is None:
            return parse_weights(self.written_for_sdxl, "sdxl", seed=seed)
        weights = parse_weights(self.written, seed=seed)
        return weights.for_sdxl(sdxl_map or "name") if family == "sdxl" else weights


def read_preset_file(path: Path) -> list[Preset]:
    """Read all presets of a file. Raises PresetError that names the file and the line or key that is
    wrong.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise PresetError(f"{shown(path)} is too large for a preset file")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise PresetError(f"cannot read preset file {shown(path)}: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise PresetError(f"preset file {shown(path)} is not text (UTF-8)") from error
    if path.suffix.lower() == ".toml":
        return [_from_toml(text, path)]
    return _from_lines(text, path)


def _from_toml(text: str, path: Path) -> Preset:
    try:
        table = tomllib.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # a ValueError of its own is that of a number of thousands of digits
        why = shown(error) if isinstance(error, tomllib.TOMLDecodeError) else "too deep, or a number too long"
        raise PresetError(f"preset file {shown(path)} is not TOML: {why}") from error
    known = {"name", "weights", "sdxl", "aliases", "source", "description"}
    if unknown := sorted(table.keys() - known):
        raise PresetError(
            f"preset file {shown(path)}: unknown key '{shown(unknown[0])}'; known are "
            f"{', '.join(sorted(known))}"
        )
    if "weights" not in table:
        raise PresetError(f"preset file {shown(path)} has no 'weights'")
    aliases = table.get("aliases", [])
    if not isinstance(aliases, list) or not all(
        isinstance(alias, str) and alias.strip() for alias in aliases
    ):
        raise PresetError(f"preset file {shown(path)}: 'aliases' is not a list of texts")
    name = table.get("name", path.stem)
    if not isinstance(name, str) or not name.strip() or len(name.splitlines()) > 1:
        raise PresetError(f"preset file {shown(path)}: 'name' is not a text of one line")
    return Preset(
        name=name.strip(),
        written=_checked(table["weights"], SD_BLOCKS, f"preset file {shown(path)}: 'weights'"),
        written_for_sdxl=_checked(table["sdxl"], SDXL_BLOCKS, f"preset file {shown(path)}: 'sdxl'")
        if "sdxl" in table
        else None,
        aliases=tuple(aliases),
        source=_text(table, "source", path),
        description=_text(table, "description", path),
    )


def _text(table: Mapping[str, object], key: str, path: Path) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise PresetError(f"preset file {shown(path)}: '{key}' is not a text")
    return " ".join(value.split())


def _checked(value: object, blocks: tuple[str, ...], where: str) -> WeightsLike:
    if not isinstance(value, (int, float, str, list, dict)):
        raise PresetError(f"{where}: neither a number, a list, a text nor a table of weights")
    try:
        parse_weights(value, "sdxl" if blocks == SDXL_BLOCKS else "sd1")
        if isinstance(value, list) and not len(blocks) - 1 <= len(value) <= len(blocks):
            raise WeightsError(
                f"{len(value)} weights given where {len(blocks)} (or {len(blocks) - 1} without BASE) are "
                "needed"
            )
    except WeightsError as error:
        raise PresetError(f"{where}: {error}") from error
    return value


def _from_lines(text: str, path: Path) -> list[Preset]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        name, *rest = (part.strip() for part in re.split(r"[\t:]", line.strip(), maxsplit=1))
        if not line.strip() or name.startswith("#") or name.casefold() == "preset_name":
            continue
        where = f"preset file {shown(path)}, line {number}"
        if not rest or not name or not rest[0]:
            raise PresetError(f"{where}: expected NAME, a tab or colon, and 26 or 25 numbers")
        if re.search(r"(^|,)\s*E[RUX]\s*(,|$)", rest[0]):
            # SuperMerger's random number for each tensor, not each block. A list with one such line is still
            # useful.
            continue
        found.append(Preset(name, _checked(rest[0], SD_BLOCKS, where), source=path.name))
    if not found:
        raise PresetError(f"preset file {shown(path)} holds no preset")
    return found

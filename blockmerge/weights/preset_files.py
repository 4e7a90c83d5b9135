"""Preset files: our own TOML form, and the two text forms in use elsewhere.

- TOML: `name`, `weights` (26 numbers, or 25 without BASE; or a table of families, each with weights of its
  own), and optionally `sdxl` (20 or 19 numbers), `aliases`, `source`, `description`.
- SuperMerger's list: a line ``NAME<tab>26 numbers separated by commas`` or ``NAME:numbers`` for each preset.
- merge-block-weighted's list: the same with 25 numbers.

A text file may begin with a header line; empty lines and lines that begin with # are skipped. So is a line
that cannot be read, and it is told with the others' presets.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from blockmerge.anatomy import DEFAULT_FAMILY, FAMILIES, Family
from blockmerge.errors import PresetError, WeightsError, reason, shown
from blockmerge.weights.block_lists import (
    blocks_of_count,
    family_named,
    spans,
    ways_to,
    without_base,
)
from blockmerge.weights.block_weights import BlockWeights
from blockmerge.weights.grammar import WeightsLike, is_one_number, notes_on, parse_weights, read_weights
from blockmerge.weights.random_weights import is_random
from blockmerge.weights.words import block_range

SUFFIXES = (".toml", ".txt", ".tsv", ".csv")

_LARGEST = 1 << 20  # bytes; a preset file is a page of text, and somebody may name a checkpoint by mistake

_KEYS = ("aliases", "description", "name", "sdxl", "source", "weights")

_SDXL = "sdxl"  # a word of the files: a key of its own, beside `weights`


@dataclass(frozen=True)
class Preset:
    """A named set of weights: a table for each of some families, as read or, where it leaves any weight to
    chance or is one number for all blocks, as written.
    """

    name: str
    tables: Mapping[str, WeightsLike]
    aliases: tuple[str, ...] = ()
    source: str = ""
    description: str = ""
    path: Path | None = field(default=None, compare=False)

    @property
    def weights(self) -> BlockWeights | None:
        """The 26 weights of SD1 and SD2, if it has any for them; random ones as seed 0 draws them."""
        return self.weights_for(DEFAULT_FAMILY) if self.serves(DEFAULT_FAMILY) else None

    @property
    def sdxl(self) -> BlockWeights | None:
        """The 20 weights of the preset's own table for SDXL, if it has one."""
        return self.weights_for(_SDXL) if _SDXL in self.tables else None

    @property
    def others(self) -> dict[str, BlockWeights]:
        """The weights of its tables for other families, by the families' names: without those for models of
        more or fewer blocks than are usual.
        """
        tables = self.usual_tables
        return {name: tables[name] for name in tables if name not in (DEFAULT_FAMILY, _SDXL)}

    @property
    def usual_tables(self) -> dict[str, BlockWeights]:
        """The weights of its tables, by the families' names, as `others` has some of them."""
        found = {family: self._usual_weights(family) for family in self.tables}
        return {family: weights for family, weights in found.items() if weights is not None}

    @property
    def tables_as_written(self) -> dict[str, str]:
        """The tables that are not among the `others`, since they are for models of other blocks than are
        usual.
        """
        unread = (family for family in self.tables if self._usual_weights(family) is None)
        return {family: str(self.tables[family]) for family in unread}

    def _usual_weights(self, family: str) -> BlockWeights | None:
        """The weights for a family whose models have the usual blocks, None where the table is for others."""
        try:
            return self.weights_for(family)
        except PresetError:
            return None

    @property
    def is_random(self) -> bool:
        """Whether any weight is left to chance, and so to the seed."""
        return any(is_random(table) for table in self.tables.values())

    @property
    def families(self) -> tuple[str, ...]:
        """The families that the preset has weights for, in tables of their own or in another's, other than by
        depth.
        """
        return tuple(name for name, family in FAMILIES.items() if self._table_for(family, by_depth=False))

    def weights_for(
        self, family: Family | str, sdxl_map: str | None = None, seed: int | str = 0
    ) -> BlockWeights:
        """The weights for a family: from its own table, or from that of a family with the same blocks, or
        carried over from another's, at last by depth. With an `sdxl_map` they are carried over wherever that
        can be done.

        Raises PresetError when no table serves.
        """
        return self.table_for(family, sdxl_map, seed).for_family(family, sdxl_map)

    def table_for(
        self, family: Family | str, sdxl_map: str | None = None, seed: int | str = 0
    ) -> BlockWeights:
        """The weights that serve for a family, before they are carried over to its blocks.

        Raises PresetError when no table serves.
        """
        wanted = family_named(family)
        found = self._table_for(wanted, carry_first=sdxl_map is not None)
        if found is None:
            raise PresetError(
                f"preset '{shown(self.name)}' has no weights for {wanted.title}, only for "
                f"{', '.join(self.families)}: give a preset with a table 'weights.{wanted.name}', or weights"
            )
        table, whose = found
        try:
            weights = read_weights(table, whose, seed)
        except WeightsError as error:  # of a model with other blocks than were expected
            raise PresetError(f"preset '{shown(self.name)}': {error}") from error
        return weights if weights.go_by_depth_to(whose) else weights.for_family(whose)

    def notes_for(self, family: Family, sdxl_map: str | None = None, seed: int | str = 0) -> list[str]:
        """What `notes_on` says of the table that serves for a family."""
        found = self._table_for(family, carry_first=sdxl_map is not None)
        return notes_on(*found, seed) if found else []

    def serves(self, family: Family | str) -> bool:
        """Whether the preset has weights for a family, in a table of its own or in another's."""
        return self._table_for(family_named(family)) is not None

    def _table_for(
        self, wanted: Family, *, carry_first: bool = False, by_depth: bool = True
    ) -> tuple[WeightsLike, Family] | None:
        """The table that serves for a family, and the family for which it is read."""
        own = [wanted.name] if wanted.name in self.tables else []
        # The same name may stand for a family with other blocks.
        tables = {name: wanted if name in own else FAMILIES[name] for name in [*own, *self.tables]}
        same = [name for name, family in tables.items() if family.blocks == wanted.blocks]
        carried = [name for name, family in tables.items() if ways_to(wanted, family.blocks)]
        found = [
            (self.tables[name], tables[name])
            for name in ([*carried, *same] if carry_first else [*same, *carried])
        ]
        if DEFAULT_FAMILY in tables and is_one_number(self.tables[DEFAULT_FAMILY]):
            found.append((self.tables[DEFAULT_FAMILY], wanted))
        if by_depth and wanted.arms is None:
            usual_first = sorted(self.tables, key=lambda name: name != DEFAULT_FAMILY)
            found += [(self.tables[name], FAMILIES[name]) for name in usual_first]
        return found[0] if found else None


@dataclass(frozen=True)
class PresetFile:
    """The presets of a file, and `faults`: (name of a preset, why its line cannot be read)."""

    presets: tuple[Preset, ...]
    faults: tuple[tuple[str, str], ...] = ()


@lru_cache(512)
def presets_of_file(path: Path, stamp: tuple[int, int]) -> PresetFile:
    """Return what `read_preset_file` returns, once for each `stamp`: when the file was changed, and its size.

    What it raises becomes a fault of the preset that is called like the file.
    """
    try:
        return read_preset_file(path)
    except PresetError as error:
        return PresetFile((), ((path.stem, str(error)),))


def read_preset_file(path: Path) -> PresetFile:
    """Read all presets of a file.

    Raises PresetError that names the file and the line or key that is wrong, where no preset can be read.
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
    is_toml = path.suffix.lower() == ".toml"
    read = PresetFile((preset_of_text(text, path),)) if is_toml else _from_lines(text, path)
    return replace(read, presets=tuple(replace(preset, path=path) for preset in read.presets))


def preset_of_text(text: str, path: Path) -> Preset:
    """Return the preset of a TOML file's text. Raises PresetError, which calls the file `path`."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # A ValueError that is no TOMLDecodeError is that of a number of thousands of digits.
        why = shown(error) if isinstance(error, tomllib.TOMLDecodeError) else "too deep, or a number too long"
        raise PresetError(f"preset file {shown(path)} is not TOML: {why}") from error
    if unknown := sorted(table.keys() - set(_KEYS)):
        raise PresetError(
            f"preset file {shown(path)}: unknown key '{shown(unknown[0])}'; known are {', '.join(_KEYS)}"
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
        tables=_tables(table, f"preset file {shown(path)}"),
        aliases=tuple(aliases),
        source=_text(table, "source", path),
        description=_text(table, "description", path),
    )


def _tables(table: Mapping[str, object], where: str) -> dict[str, WeightsLike]:
    """The weights for each family: those of `weights`, and `sdxl`."""
    written = _by_key(table["weights"], where)
    if _SDXL in table:
        if f"weights.{_SDXL}" in written:
            raise PresetError(f"{where}: '{_SDXL}' and 'weights.{_SDXL}' are both given: remove one of them")
        written[_SDXL] = _SDXL, table[_SDXL]
    return {family: _checked(value, family, f"{where}: '{key}'") for key, (family, value) in written.items()}


def _by_key(weights: object, where: str) -> dict[str, tuple[str, object]]:
    """What `weights` holds, {key: (family, weights)}: a table for each family, or that of the usual one."""
    keys = list(weights) if isinstance(weights, dict) else []
    families = [key for key in keys if key in FAMILIES]
    blocks = FAMILIES[DEFAULT_FAMILY].blocks
    if not isinstance(weights, dict) or not families:
        try:
            for key in keys:
                block_range(key, FAMILIES[DEFAULT_FAMILY])
        except WeightsError as error:
            raise PresetError(f"{where}: 'weights': {error}; families are {', '.join(FAMILIES)}") from error
        return {"weights": (DEFAULT_FAMILY, weights)}
    if others := [key for key in keys if key not in families]:
        raise PresetError(
            f"{where}: 'weights' holds '{shown(others[0])}' beside the family '{families[0]}': its keys are "
            f"either families ({', '.join(FAMILIES)}) or blocks ({', '.join(spans(blocks))})"
        )
    return {f"weights.{family}": (family, weights[family]) for family in families}


def _text(table: Mapping[str, object], key: str, path: Path) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise PresetError(f"preset file {shown(path)}: '{key}' is not a text")
    return " ".join(value.split())


def _checked(value: object, family: str, where: str) -> WeightsLike:
    """Return the weights that are read from a preset file; as written where a seed or the family decides."""
    if not isinstance(value, (int, float, str, list, dict)):
        raise PresetError(f"{where}: neither a number, a list, a text nor a table of weights")
    blocks = FAMILIES[family].blocks
    if FAMILIES[family].arms is None:  # how many blocks there are is known from a model
        return value
    try:
        weights = parse_weights(value, family)
        if isinstance(value, list) and blocks_of_count(len(value), blocks) != blocks:
            fewer = without_base(blocks).replace("(", "(or ")
            raise WeightsError(f"{len(value)} weights given where {len(blocks)}{fewer} are needed")
    except WeightsError as error:
        raise PresetError(f"{where}: {error}") from error
    return value if is_random(value) or is_one_number(value) else weights


def _from_lines(text: str, path: Path) -> PresetFile:
    found: list[Preset] = []
    faults: list[tuple[str, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        name, *rest = (part.strip() for part in re.split(r"[\t:]", line.strip(), maxsplit=1))
        if not line.strip() or name.startswith("#") or name.casefold() == "preset_name":
            continue
        if rest and re.search(r"(^|,)\s*E[RUX]\s*(,|$)", rest[0]):
            # SuperMerger's random number for each tensor, not each block.
            continue
        try:
            found.append(
                _from_line(name, *rest, path=path, where=f"preset file {shown(path)}, line {number}")
            )
        except PresetError as error:
            # A list with one such line is still useful.
            faults.append((name, str(error)))
    if not found:
        raise PresetError(faults[0][1] if faults else f"preset file {shown(path)} holds no preset")
    return PresetFile(tuple(found), tuple(faults))


def _from_line(name: str, numbers: str = "", *, path: Path, where: str) -> Preset:
    if not name or not numbers:
        raise PresetError(f"{where}: expected NAME, a tab or colon, and 26 or 25 numbers")
    return Preset(name, {DEFAULT_FAMILY: _checked(numbers, DEFAULT_FAMILY, where)}, source=path.name)

"""What there is to choose from: methods, presets and families, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blockmerge.anatomy import FAMILIES, Family
from blockmerge.methods import METHODS, Method, Number
from blockmerge.weights import Preset, presets
from blockmerge.weights.presets import user_folder


@dataclass(frozen=True)
class NumberInfo:
    """A number that a method takes besides its weights.

    - `name`: the keyword of `merge`.
    - `kind`: ``"number"``, ``"whole number"``, or ``"numbers"``, one for each model.
    - `default`: its value where none is given. None stands for 1 for each model.
    - `low`, `high`: the smallest and the largest value. An infinity stands for no limit.
    - `range`: the same in words.
    - `description`: what the number does.
    """

    name: str
    kind: str
    default: float | None
    low: float
    high: float
    range: str
    description: str


@dataclass(frozen=True)
class MethodInfo:
    """A merge method, as `list_methods` describes it.

    - `name`: what the argument `method` of `merge` takes.
    - `models`: how many models it merges. None stands for any number from `least_models` on.
    - `least_models`: the smallest number of models.
    - `weights`: the block weights that it takes, ``"alpha"`` and ``"beta"``, each with its default. None
      stands for a weight that must be given.
    - `numbers`: the other numbers that it takes.
    - `locality`: how much one value depends on: ``"element"``, ``"row"``, ``"tensor"`` or ``"model"``.
    - `formula`: what it computes. A, B and C are the models, α and β a block's weights.
    - `source`: where the formula comes from.
    """

    name: str
    models: int | None
    least_models: int
    weights: Mapping[str, float | None]
    numbers: tuple[NumberInfo, ...]
    locality: str
    formula: str
    source: str


@dataclass(frozen=True)
class PresetInfo:
    """A preset, as `list_presets` describes it.

    - `name`, `aliases`: what the argument `preset` of `merge` takes.
    - `description`, `source`: texts from its file.
    - `weights`: {family: {block: weight}}, for each family that its file has a table for. None stands for a
      block that is left out of the merge. Random weights are those of seed 0.
    - `families`: the families that it has weights for, in a table of their own or in another family's.
    - `is_random`: whether any weight depends on the seed.
    - `origin`: ``"own"`` for a preset in your presets folder, else ``"blockmerge"``.
    - `path`: its file.
    """

    name: str
    aliases: tuple[str, ...]
    description: str
    source: str
    weights: Mapping[str, Mapping[str, float | None]]
    families: tuple[str, ...]
    is_random: bool
    origin: Literal["own", "blockmerge"]
    path: Path | None


@dataclass(frozen=True)
class FamilyInfo:
    """A family of models, as `list_families` describes it.

    - `name`: a short name, such as ``"sdxl"``. `title` is the one for people.
    - `core`: what its diffusion model is, ``"unet"`` or ``"transformer"``.
    - `blocks`: the blocks of the usual model, in the order in which weights are listed.
    - `counted`: whether the number of blocks is read from each file, since models differ in it.
    - `variants`: kinds of models that share the blocks, such as ``"inpainting"``. The usual one comes first.
    - `versions`: kinds of models that cannot be merged with each other.
    """

    name: str
    title: str
    core: str
    blocks: tuple[str, ...]
    counted: bool
    variants: tuple[str, ...]
    versions: tuple[str, ...]


def list_methods() -> list[MethodInfo]:
    """Return all merge methods that come with blockmerge.

    >>> [method.name for method in blockmerge.list_methods() if method.models == 1]
    ['scale', 'add_noise']
    """
    return [_method(method) for method in METHODS.values()]


def list_presets() -> list[PresetInfo]:
    """Return all presets: your own first, then those that come with blockmerge.

    >>> high_res = next(one for one in blockmerge.list_presets() if one.name == "high_res")
    >>> high_res.origin, high_res.weights["sd1"]["IN01"]
    ('blockmerge', 1.0)

    A preset of your own hides one of the same name. Files that cannot be read are left out.
    """
    own = user_folder()
    return [_preset(preset, own) for preset in presets()]


def list_families() -> list[FamilyInfo]:
    """Return all families of models that blockmerge knows.

    >>> {family.name: len(family.blocks) for family in blockmerge.list_families()}["sdxl"]
    20
    """
    return [_family(family) for family in FAMILIES.values()]


def _method(method: Method) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        models=method.models,
        least_models=method.least,
        weights=dict(method.weights),
        numbers=tuple(map(_number, method.numbers)),
        locality=method.locality,
        formula=method.formula,
        source=method.source,
    )


def _number(number: Number) -> NumberInfo:
    return NumberInfo(
        name=number.name,
        kind=number.kind,
        default=number.default,
        low=number.low,
        high=number.high,
        range=number.range,
        description=number.text,
    )


def _preset(preset: Preset, own: Path) -> PresetInfo:
    usual = {family: dict(weights) for family, weights in preset.usual_tables.items()}
    is_own = preset.path is not None and preset.path.parent == own
    return PresetInfo(
        name=preset.name,
        aliases=preset.aliases,
        description=preset.description,
        source=preset.source,
        weights=usual,
        families=preset.families,
        is_random=preset.is_random,
        origin="own" if is_own else "blockmerge",
        path=preset.path,
    )


def _family(family: Family) -> FamilyInfo:
    return FamilyInfo(
        name=family.name,
        title=family.title,
        core=family.core,
        blocks=family.blocks,
        counted=bool(family.lists),
        variants=tuple(family.variants.values()),
        versions=tuple(version.name for version in family.versions),
    )

"""Where in a file the diffusion model is, for families whose names alone do not say: by a whole file's names.

A U-Net's names are known wherever they stand (`names.py`). Those of transformers are words that many models
use (`blocks.0.`, `layers.0.`, `x_embedder.`), under whatever prefix the program wrote that saved them. So
several prefixes are tried, and what stands under the one that yields a family is the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from blockmerge.anatomy.families import FAMILIES, remembered
from blockmerge.anatomy.family import NAMINGS, Family
from blockmerge.anatomy.names import (
    EMA_PREFIX,
    canonical_name,
    component_of,
    is_leftover,
    without_wrappers,
)

WRITTEN_PREFIXES = (
    "model.diffusion_model.", "", "net.", "model.", "transformer.", "transformer/", "diffusion_model.",
    "model.model.", "pipe.dit.", "dit.",
)  # fmt: skip
"""What stands before the names: in ComfyUI's files, alone, in Cosmos, AuraFlow, dumps of pipelines, folders,
and files of other trainers.
"""


_BESIDE = ("text_encoders.", "conditioner.", "cond_stage_model.", "ema.", "ema_model.", "model_ema.")
"""What names begin with of something else than the diffusion model, in files without a prefix for it."""
_NUMBER = re.compile(r"(?<![^./_])\d+(?![^./_])")


@dataclass(frozen=True)
class Core:
    """The diffusion model in a file: its family, of the file's own size, its naming, and the `prefix` that
    its names have there.
    """

    family: Family
    naming: str
    prefix: str

    @property
    def usual_prefix(self) -> str:
        """What the canonical names of a diffusion model begin with."""
        return self.family.unet_prefix(self.naming)

    def canonical(self, name: str) -> str:
        """The canonical name of one of the file's tensors."""
        bare = self._usual_ending(without_wrappers(name))
        if (own := self._own_part(bare)) is not None:
            return own
        if not bare.startswith(self.prefix) or (not self.prefix and is_beside(bare)):
            return canonical_name(bare)
        return self.usual_prefix + bare.removeprefix(self.prefix)

    def _usual_ending(self, name: str) -> str:
        for other, own in self.family.other_endings.items():
            if name.endswith(other):
                return name.removesuffix(other) + own
        return name

    def _own_part(self, name: str) -> str | None:
        """The name of a tensor in a part that a folder keeps in a folder of its own, which dicts have with a
        dot.
        """
        for part in self.family.prefixes.get(self.naming, {}):
            if part.endswith("/") and part != self.usual_prefix and part != self.prefix:
                for spelled in (part, part.replace("/", ".")):
                    if name.startswith(spelled):
                        return part + name.removeprefix(spelled)
        return None


def core_of(names: Collection[str]) -> Core | None:
    """Find the diffusion model among a file's names, for the families that are not U-Nets; None without one.

    >>> core_of(["net.blocks.0.mlp.layer1.weight", …]).family.name  # doctest: +SKIP
    'cosmos_predict2'
    """
    found = _found(frozenset(map(without_wrappers, names)))
    if found is None:
        return None
    return _core(*found, map(without_wrappers, names))


def canonical_names(names: Collection[str], core: Core | None) -> dict[str, str]:
    """Return {name in a file: canonical name} for all of a file's names; `core` is the diffusion model that
    was found among them, where only the whole file tells what its names are.
    """
    if core is None:
        return {name: canonical_name(name) for name in names}
    return {name: core.canonical(name) for name in names}


def _found(names: frozenset[str]) -> tuple[Family, str, str] | None:
    firsts = tuple(signs.first for family in _families() for signs in family.signs.values())
    candidates = sorted(name for name in names if name.endswith(firsts))
    for family in _families():
        for naming, signs in family.signs.items():
            for prefix in _before(signs.first, candidates):
                if signs.names_fit(names, prefix):
                    return family, naming, prefix
    return None


def _before(first: str, names: Collection[str]) -> Iterator[str]:
    """What stands before a name wherever it is found: the usual prefixes first, then all others."""
    found = [name.removesuffix(first) for name in names if name.endswith(first)]
    yield from (prefix for prefix in WRITTEN_PREFIXES if prefix in found)
    yield from (one for one in found if one[-1:] in (".", "/") and one not in (*WRITTEN_PREFIXES, EMA_PREFIX))


def name_in_core(name: str, family: Family) -> str:
    """Return the canonical name of a tensor of a family's diffusion model, under whatever prefix; that of a
    tensor alone where it is none of the model's.
    """
    bare = without_wrappers(name)
    short = (bare.removeprefix(prefix) for prefix in WRITTEN_PREFIXES if bare.startswith(prefix))
    named = (family.unet_prefix(naming) + one for one in short for naming in NAMINGS)
    return next((one for one in named if family.is_in_layout(one)), canonical_name(bare))


def damaged_cores_of(names: Collection[str]) -> list[Core]:
    """Find what is left of the diffusion model of a known family, whose signs are gone: of each family whose
    names are as many of these as any's. There is none where fewer than four fifths of the names are those of
    one: what is left of a model has no others, and simple names are those of many models.
    """
    bare = list(map(without_wrappers, names))
    kinds = {template_of(name) for name in bare}
    found: dict[str, tuple[int, Family, str, str]] = {}
    for family, naming, prefix in product(
        _families(), NAMINGS, (*WRITTEN_PREFIXES, *_common_prefixes(kinds))
    ):
        own = [one.removeprefix(prefix) for one in kinds if one.startswith(prefix)]
        hits = len(_templates(family, naming).intersection(own))
        if hits and 5 * hits >= 4 * len(own) and hits > found.get(family.name, (0,))[0]:
            found[family.name] = hits, family, naming, prefix
    most = max((hits for hits, *_ in found.values()), default=0)
    return [
        _core(family, naming, prefix, bare) for hits, family, naming, prefix in found.values() if hits == most
    ]


def _common_prefixes(names: Collection[str]) -> list[str]:
    """What at least half of the names begin with, up to three words."""
    beginnings = Counter(
        prefix
        for name in names
        for prefix in {".".join(name.split(".")[:count]) + "." for count in range(1, 4)}
    )
    return [prefix for prefix, count in beginnings.items() if 2 * count >= len(names) > 1]


def _core(family: Family, naming: str, prefix: str, bare: Iterable[str]) -> Core:
    short = {name.removeprefix(prefix) for name in bare if name.startswith(prefix)}
    counts = tuple(max(1, one.count_in(short, naming)) for one in family.lists)
    return Core(family.sized(counts, _version_of(family, naming, short)), naming, prefix)


@remembered(None)
def _templates(family: Family, naming: str) -> frozenset[str]:
    """The names of a whole diffusion model without prefix, with 0 for every number."""
    prefix, found = family.unet_prefix(naming), set[str]()
    for version in family.versions or (None,):
        one = family.sized(family.counts, version.name) if version else family
        names = (one.short(name) for name in one.unet)
        if naming != "ldm":
            places = (place for name in one.unet for place in one.relation_of(name).diffusers)
            names = (place.removeprefix(prefix) for place in places)
        found.update(map(template_of, names))
    return frozenset(found)


def template_of(name: str) -> str:
    """Return a name with 0 for every number between dots."""
    return _NUMBER.sub("0", name)


@remembered(None)
def _families() -> tuple[Family, ...]:
    return tuple(family for family in FAMILIES.values() if family.lists)


def _version_of(family: Family, naming: str, names: Collection[str]) -> str:
    fitting = (
        one.name
        for one in family.versions
        if all(name in names for name in one.has.get(naming, ()))
        and not any(name in names for name in one.lacks.get(naming, ()))
    )
    return next(fitting, family.version)


def is_beside(name: str) -> bool:
    """Whether a name without prefix is of something else than the diffusion model. Markers belong to it."""
    known = component_of(name) not in ("unet", "other") or is_leftover(name)
    return known or name.startswith(_BESIDE)

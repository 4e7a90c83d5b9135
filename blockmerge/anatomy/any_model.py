"""A model of no known family: whether its names allow that it is merged, and by which blocks.

Only what is nothing else: adapters, ControlNets and VAEs are not, nor is what is left of a known model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

from blockmerge.anatomy.cores import WRITTEN_PREFIXES, Core, damaged_cores_of, is_beside, template_of
from blockmerge.anatomy.described import Beginning, Shape
from blockmerge.anatomy.families import FAMILIES, remembered
from blockmerge.anatomy.family import OUTSIDE, Family
from blockmerge.anatomy.identify import Anatomy
from blockmerge.anatomy.names import (
    DIFFUSERS_UNET_PREFIX,
    UNET_PREFIX,
    canonical_name,
)
from blockmerge.anatomy.numbered import FoundList, numbered_lists
from blockmerge.anatomy.other_kinds import kind_of
from blockmerge.anatomy.renaming import Renaming

_PREFIXES = (
    "model.diffusion_model.",
    "model.model.",
    "transformer/",
    "unet/",
    "prior/",
    "decoder/",
    "diffusion_model.",
)
"""Where the diffusion model is in files that hold more; without one of these, it is all that there is."""


_OF_A_VAE = re.compile(
    r"(\w+\.)*?(de|en)coder\.(up|down|up_blocks|down_blocks|stages|conv_in|conv_out|conv1|mid|middle)\."
    r"|(\w+\.)*?(de|en)coder\.(block\.0\.res_unit|layers\.\d+\.layers\.)"
)
"""How the names of VAEs go on, whose lists are none of blocks of a model."""


class AnyCore(Core):
    """The model in a file of no known family."""

    def canonical(self, name: str) -> str:
        """As of known models, but what looks like a wrapper may be a part of such names."""
        if not name.startswith(self.prefix) or (not self.prefix and is_beside(name)):
            return canonical_name(name)
        return self.usual_prefix + name.removeprefix(self.prefix)

    @property
    def anatomy(self) -> Anatomy:
        """All that is known of it."""
        return Anatomy(self.family, "base" if self.family.version else "unknown", self.naming)


def any_core_of(shapes: Mapping[str, Shape]) -> AnyCore | None:
    """Find the model in a file of no known family, by its own names; None for what may not be merged so.

    Ask `core_of` and `identify` first.
    """
    kind = kind_of(shapes)
    if (kind and not kind.is_mergeable) or _is_vae(shapes):
        return None
    names = list(shapes)
    if not (kind and kind.is_sure) and _is_known_in_part(names):
        return None
    prefix = _prefix_of(names)
    own = [name for name in names if name.startswith(prefix) and (prefix or not is_beside(name))]
    lists = numbered_lists([name.removeprefix(prefix) for name in own])
    if not lists:
        return None
    naming = "diffusers" if "/" in prefix else "ldm"
    return AnyCore(_family(lists, kind.what if kind else "", prefix), naming, prefix)


def _is_vae(names: Collection[str]) -> bool:
    """Whether most names are those of a VAE, of whatever kind."""
    return 2 * sum(_OF_A_VAE.match(name) is not None for name in names) > len(names)


def _prefix_of(names: Collection[str]) -> str:
    """What the names of the diffusion model begin with: as a part of a file that holds more, or before all
    names of one that holds nothing else.
    """
    part = next((one for one in _PREFIXES if any(name.startswith(one) for name in names)), None)
    own = [name for name in names if not is_beside(name)]
    # `model.` is a part of the names of language models, some of which have more beside it.
    written = [one for one in WRITTEN_PREFIXES if one not in ("", "model.")]
    whole = (one for one in written if own and all(name.startswith(one) for name in own))
    return part if part is not None else next(whole, "")


@lru_cache(64)
def _family(lists: tuple[FoundList, ...], what: str, prefix: str) -> Family:
    """The family of such lists; one object for the same."""
    known = FAMILIES["any"]
    blocks = (block for one in lists for block in _blocks(one))
    beginnings: dict[str, list[Beginning]] = {}
    for one in lists:
        root, dot, _ = one.start.partition(".")
        root = (
            root if dot else ""
        )  # where the number is glued to the first word, no name begins with it alone
        beginnings.setdefault(root, []).append(
            Beginning(f"{one.start}#.", one.block.replace("#", ""), (0, 1))
        )
    title = f"{what}, {known.title}" if what else known.title
    of_names = {root: tuple(found) for root, found in beginnings.items()}
    prefixes = {naming: dict(one) for naming, one in known.prefixes.items()}
    if "/" in prefix:
        prefixes["diffusers"] = {prefix: "unet"} | prefixes["diffusers"]
    folder = prefix if "/" in prefix else known.unet_prefix("diffusers")
    core = Renaming.of(known.unet_prefix("ldm"), folder, "same", list)
    return replace(
        known,
        renamings=(core, *known.renamings[1:]),
        title=title,
        version=what,
        blocks=(OUTSIDE, *blocks),
        unlisted={"ldm": of_names, "diffusers": of_names},
        prefixes=prefixes,
        found=lists,
    )


def _blocks(one: FoundList) -> Iterable[str]:
    return (one.block.replace("#", f"{number:02}") for number in range(one.count))


def _is_known_in_part(names: Collection[str]) -> bool:
    """Whether most names are those of a known family: then it is a damaged model of it, or a part."""
    if damaged_cores_of(names):
        return True
    templates = set(map(template_of, names))
    known = _unet_templates()
    short = (template_of(canonical_name(one)).removeprefix(UNET_PREFIX) for one in templates)
    return 5 * sum(one in known for one in short) >= 4 * len(templates)


@remembered(None)
def _unet_templates() -> frozenset[str]:
    found = set()
    for family in FAMILIES.values():
        if family.arms:
            for name in family.listed:
                for one in (name, *family.relation_of(name).diffusers):
                    found.add(template_of(one).removeprefix(UNET_PREFIX))
                    found.add(template_of(one).removeprefix(DIFFUSERS_UNET_PREFIX))
    return frozenset(found)

"""How a U-Net stands to its family: complete, a known derivative, incomplete, or another model altogether.

Names are held against the family's whole layout; widths are not looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from blockmerge.anatomy.described import Derivative, matches
from blockmerge.anatomy.family import Family
from blockmerge.anatomy.structure import is_buildable
from blockmerge.errors import UnknownFamilyError, counted, listing

_DISTILLED = Derivative("distilled", "distilled")
"""What lacks whole layers, and is none of the models that are known to."""


@dataclass(frozen=True)
class Standing:
    """What a U-Net has beside its family's layout (`added`), and what it lacks of it (`missing`): LDM names.

    `derivatives` are the models that it is known to be by that. Without one, it is incomplete where it lacks
    something, and what it has beside the layout is unknown.
    """

    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    derivatives: tuple[Derivative, ...] = ()

    @property
    def is_cut(self) -> bool:
        """Whether layers were cut out of it on purpose."""
        return bool(self.missing) and any(one.cut or one is _DISTILLED for one in self.derivatives)

    @property
    def is_damaged(self) -> bool:
        """Whether something is missing that no known derivative lacks."""
        return bool(self.missing) and not self.is_cut

    @cached_property
    def said(self) -> str:
        """The derivatives in words, nothing without: ``"unCLIP"``."""
        return ", ".join(one.title for one in self.derivatives)


COMPLETE = Standing()


def standing_of(family: Family, names: Iterable[str]) -> Standing:
    """Hold the LDM names of a U-Net against a family.

    Raises UnknownFamilyError where a whole arm of the U-Net is missing, as in a ControlNet.
    """
    return _standing_of(family, frozenset(names))


@lru_cache(16)  # the models of a merge have the same names
def _standing_of(family: Family, have: frozenset[str]) -> Standing:
    missing = tuple(name for name in family.unet if name not in have)
    added = tuple(sorted(have - family.unet.keys()))
    _check_arms(family, have)
    found = [one for one in family.derivatives if any(matches(one.adds, name) for name in added)]
    is_strange = not all(family.knows(name) for name in added)
    if missing and not is_strange and (cut := _cut_out(family, missing, have)):
        found.append(cut)
    return Standing(missing, added, tuple(found)) if missing or added else COMPLETE


def _check_arms(family: Family, have: Collection[str]) -> None:
    for arm in (family.arms.left, family.arms.right) if family.arms else ():
        names = [name for name, block in family.unet.items() if block in arm]
        lacking = [name for name in names if name not in have]
        if len(lacking) == len(names):
            missing = f"{counted(len(lacking), 'tensor')} of the other half ({listing(lacking)})"
            raise UnknownFamilyError(f"holds only half of a U-Net of {family.called}: it lacks all {missing}")


def _cut_out(family: Family, missing: Collection[str], have: frozenset[str]) -> Derivative | None:
    """Which derivative lacks exactly these tensors; the nameless one where diffusers can build the rest."""
    for one in family.derivatives:
        if one.cut and {name for name in family.unet if matches(one.cut, family.short(name))} == set(missing):
            return one
    prefix = family.unet_prefix("diffusers")
    places = family.origins(family.unet.keys() & have, "ldm", "diffusers")
    return _DISTILLED if is_buildable({place.removeprefix(prefix) for place in places}) else None

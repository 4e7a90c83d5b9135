"""Which architecture a checkpoint has, told from its tensors' names and shapes alone.

Nothing here looks at widths (320, 768, …): they are the same in nearly every real file, but signs that do not
need them also hold for narrow test models. Nor does it look at text encoders: a U-Net may come alone. What to
look for is in each family's description.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blockmerge.anatomy.families import FAMILIES
from blockmerge.anatomy.family import NAMINGS, Family, Shape
from blockmerge.anatomy.names import lone_component
from blockmerge.errors import RecipeError, UnknownFamilyError, counted


@dataclass(frozen=True)
class Anatomy:
    """What `identify` found: the family, its variant (``"base"``, ``"inpainting"``, …) and the naming."""

    family: Family
    variant: str
    naming: str


def identify(shapes: Mapping[str, Shape]) -> Anatomy:
    """Tell family, variant and naming from tensor names and shapes.

    Raises UnknownFamilyError, saying what was found, when there is no U-Net or none that blockmerge knows.
    """
    family, naming, unet = _recognised(shapes)
    variant = family.variant_of(unet, naming)
    for name in shapes:
        try:
            family.block_of(name)
        except RecipeError as error:
            raise UnknownFamilyError(f"holds no whole {family.name} U-Net: {error}") from None
    return Anatomy(family, variant, naming)


def _recognised(shapes: Mapping[str, Shape]) -> tuple[Family, str, Mapping[str, Shape]]:
    """The family and naming whose signs fit, and the shapes by names without prefix."""
    unets: dict[tuple[str, ...], dict[str, Shape]] = {}
    for naming in NAMINGS:
        instead = None
        for family in FAMILIES.values():
            prefixes = tuple(map(family.unet_prefix, NAMINGS))
            if prefixes not in unets:
                unets[prefixes] = {_without(prefixes, name): shape for name, shape in shapes.items()}
            unet = unets[prefixes]
            signs = family.signs.get(naming)
            if signs is None or not signs.are_looked_at(unet):
                continue
            if signs.fit(unet):
                return family, naming, unet
            instead = instead or signs.found_instead(unet)
        if instead is not None:
            raise UnknownFamilyError(f"holds a U-Net that is neither {_all_called()} ({instead})")
    raise UnknownFamilyError(_instead_of_a_unet(shapes))


def _without(prefixes: Iterable[str], name: str) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def _all_called() -> str:
    *names, last = dict.fromkeys(family.called for family in FAMILIES.values())
    return f"{', '.join(names)} nor {last}"


def _instead_of_a_unet(names: Iterable[str]) -> str:
    match lone_component(names):
        case "vae", naming, count:
            return (
                f"is a VAE alone, {counted(count, 'tensor')} in {naming} names: "
                "give it as vae (--vae, of merge and convert)"
            )
        case _, naming, count:
            return (
                f"is a text encoder alone, {counted(count, 'tensor')} in {naming} names: "
                "give a model with a U-Net"
            )
    firsts = dict.fromkeys(f.signs["ldm"].first for f in FAMILIES.values() if "ldm" in f.signs)
    return f"holds no Stable Diffusion U-Net (no tensor {' or '.join(firsts)})"

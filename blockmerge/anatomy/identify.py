"""Which architecture a checkpoint has, told from its tensors' names and shapes alone.

Nothing here looks at widths (320, 768, …): they are the same in nearly every real file, but signs that do not
need them also hold for narrow test models. Nor does it look at text encoders: a U-Net may come alone. What to
look for is in each family's description.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blockmerge.anatomy.cores import core_of, damaged_cores_of
from blockmerge.anatomy.described import Shape
from blockmerge.anatomy.families import FAMILIES, remembered
from blockmerge.anatomy.family import NAMINGS, Family
from blockmerge.anatomy.names import canonical_name, component_of, is_prediction_marker, lone_component
from blockmerge.anatomy.other_kinds import kind_of, mistaken_for_a_unet, other_kind
from blockmerge.anatomy.standing import COMPLETE, Standing, standing_of
from blockmerge.errors import RecipeError, UnknownFamilyError, counted, listing


@dataclass(frozen=True)
class Anatomy:
    """What `identify` found: the family, the naming, what the input channels are for (``"base"``,
    ``"inpainting"``, …), and how the U-Net stands to the family's layout.
    """

    family: Family
    inputs: str
    naming: str
    standing: Standing = COMPLETE

    @property
    def variant(self) -> str:
        """What kind of the family's models it is: ``"base"``, ``"inpainting"``, ``"unclip"``,
        ``"inpainting lcm"``, ``"3.5-large"``.
        """
        kinds = [*([self.family.version] * bool(self.family.version))]
        kinds += [one.name for one in self.standing.derivatives]
        usual = next(iter(self.family.variants.values()), "base")
        return " ".join([*([] if kinds and self.inputs == usual else [self.inputs]), *kinds])


def identify(shapes: Mapping[str, Shape]) -> Anatomy:
    """Tell family, variant and naming from tensor names and shapes.

    Raises UnknownFamilyError, saying what was found, when there is no U-Net or none that blockmerge knows.
    """
    if (mistaken := mistaken_for_a_unet(shapes)) is not None:
        raise UnknownFamilyError(mistaken)
    if (core := core_of(shapes)) is not None:
        family, naming = core.family, core.naming
        unet: Mapping[str, Shape] = {
            name.removeprefix(core.usual_prefix): shape for name, shape in shapes.items()
        }
    else:
        family, naming, unet = _recognised(shapes)
    inputs = family.variant_of(unet, naming)
    for name in shapes:
        try:
            family.block_of(name)
        except RecipeError as error:
            raise UnknownFamilyError(f"holds no whole {family.name} {family.core_title}: {error}") from None
    return Anatomy(family, inputs, naming, _standing(family, naming, shapes))


def has_signs_of_a_unet(shapes: Mapping[str, Shape]) -> bool:
    """Whether `identify` would look at a file's names as those of a U-Net at all."""
    if core_of(shapes) is not None:
        return True
    for family in _unets():
        prefixes = tuple(map(family.unet_prefix, NAMINGS))
        unet = {_without(prefixes, name): shape for name, shape in shapes.items()}
        if any(signs.are_looked_at(unet) for signs in family.signs.values()):
            return True
    return False


@remembered(None)
def _unets() -> tuple[Family, ...]:
    return tuple(family for family in FAMILIES.values() if not family.lists)


def _recognised(shapes: Mapping[str, Shape]) -> tuple[Family, str, Mapping[str, Shape]]:
    """The family and naming whose signs fit, and the shapes by names without prefix."""
    unets: dict[tuple[str, ...], dict[str, Shape]] = {}
    for naming in NAMINGS:
        instead, cut = None, None
        for family in _unets():
            prefixes = tuple(map(family.unet_prefix, NAMINGS))
            if prefixes not in unets:
                unets[prefixes] = {_without(prefixes, name): shape for name, shape in shapes.items()}
            unet = unets[prefixes]
            signs = family.signs.get(naming)
            if signs is None or not signs.are_looked_at(unet):
                continue
            if signs.fit(unet):
                return family, naming, unet
            if signs.fit(unet, cut=True) and _is_cut(family, naming, shapes):
                cut = cut or family
            instead = instead or signs.found_instead(unet)
        if cut is not None:
            return cut, naming, unet
        if instead is not None:
            raise UnknownFamilyError(f"holds a U-Net that is neither {_all_called()} ({instead})")
    raise UnknownFamilyError(_instead_of_a_unet(shapes))


def _standing(family: Family, naming: str, names: Iterable[str]) -> Standing:
    """How the U-Net among a model's names stands to a family."""
    unet = [
        canonical_name(name)
        for name in names
        if component_of(name) == "unet" and not is_prediction_marker(name)
    ]
    return standing_of(family, family.origins(unet, naming, "ldm"))


def _is_cut(family: Family, naming: str, names: Iterable[str]) -> bool:
    try:
        standing = _standing(family, naming, names)
    except UnknownFamilyError:
        return False
    return standing.is_cut and not any(not family.knows(name) for name in standing.added)


def _without(prefixes: Iterable[str], name: str) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def _all_called() -> str:
    *names, last = dict.fromkeys(family.called for family in _unets())
    return f"{', '.join(names)} nor {last}"


def _instead_of_a_unet(shapes: Mapping[str, Shape]) -> str:
    firsts = dict.fromkeys(f.signs["ldm"].first for f in _unets() if "ldm" in f.signs)
    nothing = f"holds no diffusion model (no tensor {' or '.join(firsts)})"
    if _has_most_of_a_unet(shapes):
        return nothing
    if (told := damaged(shapes) or other_kind(shapes)) is not None:
        return told
    match lone_component(shapes):
        case "vae", naming, count:
            return (
                f"is a VAE alone, {counted(count, 'tensor')} in {naming} names: "
                "give it as vae (--vae, of merge, bake and convert)"
            )
        case _, naming, count:
            return (
                f"is a text encoder alone, {counted(count, 'tensor')} in {naming} names: "
                "give a model with a U-Net"
            )
    return nothing


def damaged(shapes: Mapping[str, Shape]) -> str | None:
    """Say what a file is that holds a diffusion model of a known family without the tensors by which it is
    known, and None of any other.
    """
    kind = kind_of(shapes)
    if (kind and kind.is_sure) or core_of(shapes) or not (cores := damaged_cores_of(shapes)):
        return None
    core = cores[0]
    have = core.family.origins(map(core.canonical, shapes), core.naming, "ldm")
    missing = [core.family.short(name) for name in core.family.unet if name not in have]
    titles = " or ".join(one.family.title for one in cores)
    lacks = f"it lacks {counted(len(missing), 'tensor')} ({listing(missing)})"
    return f"holds no whole {titles} {core.family.core_title}: {lacks}"


def _has_most_of_a_unet(names: Iterable[str]) -> bool:
    """Whether it is a damaged model of a known family, and not another kind of file."""
    unet = [canonical_name(name) for name in names if component_of(name) == "unet"]
    held = ((family, family.origins(unet, "diffusers", "ldm").keys()) for family in _unets())
    return any(2 * len(family.unet.keys() & found) > len(family.unet) for family, found in held)

"""What is asked of a family that is given by its name."""

from __future__ import annotations

from collections.abc import Iterable

from blockmerge.anatomy.families import DEFAULT_FAMILY, FAMILIES
from blockmerge.anatomy.origins import Origin, Relation
from blockmerge.errors import RecipeError, shown


def layout(family: str) -> dict[str, tuple[int, ...]]:
    """Return {tensor name: shape} of a complete file of one of FAMILIES, LDM naming."""
    return dict(FAMILIES[family].layout)


def block_of(name: str, family: str | None = None) -> str:
    """Return the block that a tensor belongs to.

    >>> block_of("model.diffusion_model.input_blocks.4.1.proj_in.weight")
    'IN04'

    `name` is a tensor's name in LDM naming, with or without `model.diffusion_model.`, or a U-Net's name in
    diffusers naming. `family` is one of FAMILIES; it decides where `out.` and `conv_out.` are (OUT11, or
    OUT08 in SDXL). Without it, SD1 and SD2 are assumed. Everything outside the U-Net is BASE.

    The borders are those of the original merge-block-weighted tool and of SuperMerger: the time embedding
    belongs to IN00, the last norm and convolution (`out.`) to the last output block.

    Raises RecipeError when the name is no text, or the family is unknown or has no such block.
    """
    if not isinstance(name, str):
        raise RecipeError(f"a tensor's name is a text; {type(name).__name__} given")
    if family is None:
        family = DEFAULT_FAMILY
    if family not in FAMILIES:
        raise RecipeError(f"unknown family '{shown(family)}': {', '.join(FAMILIES)}")
    return FAMILIES[family].block_of(name)


def relation_of(name: str, family: str) -> Relation:
    """Return where a folder of that family keeps the values of an LDM tensor; NO_PLACE where it does not."""
    return FAMILIES[family].relation_of(name)


def origins_in_diffusers(names: Iterable[str], family: str) -> dict[str, Origin]:
    """Return {diffusers name: origin} for tensors of LDM naming, as `Family.origins` does."""
    return FAMILIES[family].origins(names, "ldm", "diffusers")

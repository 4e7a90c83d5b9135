"""Which architecture a checkpoint has, told from its tensors' names and shapes alone.

Nothing here looks at widths (320, 768, …): they are the same in nearly every real file, but signs that do not
need them also hold for narrow test models. Nor does it look at text encoders: a U-Net may come alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from blockmerge.anatomy.blocks import SD_BLOCKS, SDXL_BLOCKS, block_of
from blockmerge.anatomy.names import DIFFUSERS_UNET_PREFIX, UNET_PREFIX, lone_component
from blockmerge.errors import RecipeError, UnknownFamilyError, counted


@dataclass(frozen=True)
class Adjusted:
    """What `adjust` does to a tensor: times 1 + `factor` × the number of that name; or, where there are
    `tones`, plus 0.02 × (the contrast, and the amounts of brightness and three colours times their rows).
    """

    number: str = ""
    factor: float = 0.0
    tones: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Family:
    """An architecture: its short name, its title for people, its blocks, and its variants by input
    channels.

    `called` is what messages call it and its kin. `carried` says how the weights of another family's blocks
    become this family's: {that family: {way: {block: the block whose weight it takes}}}, the usual way first.
    `adjusted` says what `adjust` does: {a tensor's name in the U-Net: what is done to it}.
    """

    name: str
    title: str
    blocks: tuple[str, ...]
    variants: Mapping[int, str]
    called: str
    carried: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    adjusted: Mapping[str, Adjusted] = field(default_factory=dict)


_BY_NAME = {block: block for block in SDXL_BLOCKS}
_BY_RESOLUTION = {**_BY_NAME, **{f"OUT{k:02}": f"OUT{k + 3:02}" for k in range(9)}}
"""SDXL's OUT*k* works at the resolution of SD1's OUT*(k+3)*."""

# SuperMerger's: weights × (1 − n/100), biases × (1 + n/50). The tones are what BRI, COL1, COL2 and COL3 each
# do to the last three of the four latent channels.
_ADJUSTED = {
    "input_blocks.0.0.weight": Adjusted("into", -0.01),
    "input_blocks.0.0.bias": Adjusted("into", 0.02),
    "out.0.weight": Adjusted("out", -0.01),
    "out.0.bias": Adjusted("out", 0.02),
    "out.2.weight": Adjusted("out2", -0.01),
    "out.2.bias": Adjusted(tones=((-1, 1 / 3, 2 / 3), (1, 1, 0), (0, -1, -1), (1, 0, 1))),
}
_SDXL_ADJUSTED = {
    **_ADJUSTED,
    "out.2.bias": Adjusted(tones=((0, 0, 1), (1, 0, 0), (-1, -1, 0), (-1, 1, 0))),
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "sd1",
            "Stable Diffusion 1.x",
            SD_BLOCKS,
            {4: "base", 8: "pix2pix", 9: "inpainting"},
            called="SD1",
            adjusted=_ADJUSTED,
        ),
        Family(
            "sd2",
            "Stable Diffusion 2.x",
            SD_BLOCKS,
            {4: "base", 5: "depth", 8: "pix2pix", 9: "inpainting"},
            called="SD2",
            adjusted=_ADJUSTED,
        ),
        Family(
            "sdxl",
            "Stable Diffusion XL",
            SDXL_BLOCKS,
            {4: "base", 8: "pix2pix", 9: "inpainting"},
            called="SDXL",
            carried={"sd1": {"name": _BY_NAME, "resolution": _BY_RESOLUTION}},
            adjusted=_SDXL_ADJUSTED,
        ),
        Family(
            "sdxl_refiner",
            "Stable Diffusion XL refiner",
            SD_BLOCKS,
            {4: "base"},
            called="SDXL",
            adjusted=_ADJUSTED,
        ),
    )
}

DEFAULT_FAMILY = "sd1"
"""Which family is meant where none is given."""


def register(family: Family) -> None:
    """Add a family to FAMILIES."""
    FAMILIES[family.name] = family


def unregister(name: str) -> None:
    """Take a family out of FAMILIES."""
    del FAMILIES[name]


@dataclass(frozen=True)
class Anatomy:
    """What `identify` found: the family, its variant (``"base"``, ``"inpainting"``, …) and the naming."""

    family: Family
    variant: str
    naming: str


def identify(shapes: Mapping[str, tuple[int, ...]]) -> Anatomy:
    """Tell family, variant and naming from tensor names and shapes.

    Raises UnknownFamilyError, saying what was found, when there is no U-Net or none that blockmerge knows.
    """
    unet = {
        name.removeprefix(UNET_PREFIX).removeprefix(DIFFUSERS_UNET_PREFIX): shape
        for name, shape in shapes.items()
    }
    if "input_blocks.0.0.weight" in unet:
        naming, first, family = "ldm", "input_blocks.0.0.weight", _ldm_family(unet)
    elif "conv_in.weight" in unet and any(name.startswith("down_blocks.") for name in unet):
        naming, first, family = "diffusers", "conv_in.weight", _diffusers_family(unet)
    else:
        raise UnknownFamilyError(_instead_of_a_unet(shapes))
    channels = unet[first][1] if len(unet[first]) == 4 else 0
    variant = FAMILIES[family].variants.get(channels)
    if variant is None:
        raise UnknownFamilyError(
            f"its first convolution {first} has shape {list(unet[first])}, which no {family} model has"
        )
    for name in shapes:
        try:
            block_of(name, family)
        except RecipeError as error:
            raise UnknownFamilyError(f"holds no whole {family} U-Net: {error}") from None
    return Anatomy(FAMILIES[family], variant, naming)


def _instead_of_a_unet(names: Iterable[str]) -> str:
    match lone_component(names):
        case "vae", naming, count:
            return f"is a VAE alone, {counted(count, 'tensor')} in {naming} names: give it as vae (--vae)"
        case _, naming, count:
            return (
                f"is a text encoder alone, {counted(count, 'tensor')} in {naming} names: give a model "
                "with a U-Net"
            )
    return "holds no Stable Diffusion U-Net (no tensor input_blocks.0.0.weight)"


def _highest(names: Mapping[str, object], pattern: str) -> int:
    found = (re.match(pattern, name) for name in names)
    # Six digits at most: a hostile name must not make a number of a megabyte.
    return max((int(match[1][:6]) for match in found if match), default=-1)


def _ldm_family(unet: Mapping[str, tuple[int, ...]]) -> str:
    highest = _highest(unet, r"input_blocks\.(\d+)\.")
    attention = any(name.startswith("input_blocks.1.1.") for name in unet)
    labelled = "label_emb.0.0.weight" in unet
    if highest == 8 and labelled and not attention:
        return "sdxl"
    if highest == 11 and labelled and not attention:
        return "sdxl_refiner"
    proj_in = unet.get("input_blocks.1.1.proj_in.weight")
    if highest == 11 and proj_in is not None and len(proj_in) in (2, 4):
        # SD1 projects into its transformers with a 1×1 convolution, SD2 with a matrix.
        return "sd1" if len(proj_in) == 4 else "sd2"
    raise UnknownFamilyError(
        f"holds a U-Net that is neither SD1, SD2 nor SDXL (its highest input block is {highest})"
    )


def _diffusers_family(unet: Mapping[str, tuple[int, ...]]) -> str:
    levels = _highest(unet, r"down_blocks\.(\d+)\.") + 1
    if levels == 3 and "add_embedding.linear_1.weight" in unet:
        return "sdxl"
    if levels == 4 and "add_embedding.linear_1.weight" in unet:
        return "sdxl_refiner"
    proj_in = unet.get("down_blocks.0.attentions.0.proj_in.weight")
    if levels == 4 and proj_in is not None and len(proj_in) in (2, 4):
        return "sd1" if len(proj_in) == 4 else "sd2"
    raise UnknownFamilyError(f"holds a U-Net that is neither SD1, SD2 nor SDXL (it has {levels} levels)")

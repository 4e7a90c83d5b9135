"""The blocks a user sets weights for, and which tensor belongs to which.

The borders are those of the original merge-block-weighted tool and of SuperMerger: the time embedding belongs
to IN00, the last norm and convolution (`out.`) to the last output block, and what is no tensor of the U-Net
to BASE.
"""

from __future__ import annotations

import re
from functools import lru_cache

from blockmerge.anatomy.layouts import LAYOUTS
from blockmerge.errors import RecipeError, shown

SD_BLOCKS = ("BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12)))
"""The 26 blocks of SD1 and SD2, in the order in which weights are listed."""

SDXL_BLOCKS = ("BASE", *(f"IN{n:02}" for n in range(9)), "M00", *(f"OUT{n:02}" for n in range(9)))
"""The 20 blocks of SDXL, in the order in which weights are listed."""

_LDM = re.compile(
    r"(?:model\.diffusion_model\.)?"
    r"(?:(?P<io>input|output)_blocks\.(?P<n>\d+)\.|(?P<first>time_embed\.|label_emb\.)|(?P<mid>middle_block\.)|(?P<last>out\.))"
)
_DIFFUSERS = re.compile(
    r"(?:unet/)?(?:(?P<way>down|up)_blocks\.(?P<level>\d+)\.(?:(?:resnets|attentions)\.(?P<layer>\d+)|(?P<sampler>downsamplers|upsamplers)\.0)\."
    r"|(?P<first>conv_in\.|time_embedding\.|add_embedding\.)|(?P<mid>mid_block\.)|(?P<last>conv_norm_out\.|conv_out\.))"
)


def block_of(name: str, family: str | None = None) -> str:
    """Return the block that a tensor belongs to.

    >>> block_of("model.diffusion_model.input_blocks.4.1.proj_in.weight")
    'IN04'

    `name` is a tensor's name in LDM naming, with or without `model.diffusion_model.`, or a U-Net's name in
    diffusers naming. `family` is one of LAYOUTS; it decides where `out.` and `conv_out.` are (OUT11, or OUT08
    in SDXL). Without it, SD1 and SD2 are assumed. Everything outside the U-Net is BASE.

    Raises RecipeError when the name is no text, or the family is unknown or has no such block.
    """
    if not isinstance(name, str):
        raise RecipeError(f"a tensor's name is a text; {type(name).__name__} given")
    return _block_of(name, family)


@lru_cache(1 << 13)  # the models of a merge have the same names
def _block_of(name: str, family: str | None) -> str:
    if family not in (None, *LAYOUTS):
        raise RecipeError(f"unknown family '{shown(family)}': {', '.join(LAYOUTS)}")
    blocks = SDXL_BLOCKS if family == "sdxl" else SD_BLOCKS
    block = _ldm_block(name, blocks[-1]) or _diffusers_block(name, blocks[-1]) or "BASE"
    if block not in blocks:
        raise RecipeError(f"tensor {shown(name)} would be in {block}, which {family or 'sd1'} does not have")
    return block


def _ldm_block(name: str, last: str) -> str | None:
    match = _LDM.match(name)
    if match is None:
        return None
    if match["io"]:
        return f"{'IN' if match['io'] == 'input' else 'OUT'}{int(match['n'][:6]):02}"
    return "IN00" if match["first"] else "M00" if match["mid"] else last


def _diffusers_block(name: str, last: str) -> str | None:
    match = _DIFFUSERS.match(name)
    if match is None:
        return None
    if match["way"]:
        # Three units a level on either side. Going down, conv_in is IN00 and pushes the rest on by one.
        unit = 2 if match["sampler"] else int(match["layer"][:6])
        number = 3 * int(match["level"][:6]) + unit
        return f"IN{number + 1:02}" if match["way"] == "down" else f"OUT{number:02}"
    return "IN00" if match["first"] else "M00" if match["mid"] else last

"""What is asked of a family that is given by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from blockmerge.anatomy.cores import name_in_core
from blockmerge.anatomy.families import DEFAULT_FAMILY, FAMILIES
from blockmerge.anatomy.names import canonical_name, plain_name_of_ema
from blockmerge.anatomy.origins import Origin, Relation
from blockmerge.errors import RecipeError, shown

_OF_AN_ADAPTER = re.compile(
    r"(?:^|[._/])(?:lora|loha|lokr|hada|lycoris|dora|glora|boft|oft)(?:[._/]|$)"
    r"|\.(?:alpha|diff|diff_b|w_norm|b_norm|on_input)$",
    re.IGNORECASE,
)
"""What the names of LoRAs and their relatives have, and those of models have not: of modules
(``lora_unet_…``, ``lora_te1_…``) and of what is stored for each (``….lora_up.weight``, ``….lokr_w1``).
"""


def layout(family: str) -> dict[str, tuple[int, ...]]:
    """Return {tensor name: shape} of a complete file of one of FAMILIES, LDM naming."""
    return dict(FAMILIES[family].layout)


def block_of(name: str, family: str | None = None) -> str:
    """Return the block that a tensor belongs to.

    >>> block_of("model.diffusion_model.input_blocks.4.1.proj_in.weight")
    'IN04'

    - `name`: a tensor's name as LDM or diffusers write it, with or without its prefix.
    - `family`: a name of `list_families`. Without it, SD1 or SD2 is assumed.

    Everything outside of the U-Net or transformer is BASE. The borders are those of merge-block-weighted and
    SuperMerger: the time embedding is in IN00, the last norm and convolution are in the last output block.

    Raises `RecipeError` where the name is not a text or belongs to a LoRA, or the family is not known or has
    no such block.
    """
    if not isinstance(name, str):
        raise RecipeError(f"a tensor's name is a text; {type(name).__name__} given")
    if family is None:
        family = DEFAULT_FAMILY
    if family not in FAMILIES:
        raise RecipeError(f"unknown family '{shown(family)}': {', '.join(FAMILIES)}")
    known = FAMILIES[family]
    canonical = plain_name_of_ema(name) or (canonical_name(name) if known.arms else name_in_core(name, known))
    if _OF_AN_ADAPTER.search(name):
        raise RecipeError(
            f"{shown(name)} is a name in a LoRA or another adapter, not in a model: "
            "give the name of the tensor that it changes"
        )
    return known.block_of(canonical)


def relation_of(name: str, family: str) -> Relation:
    """Return where a folder of that family keeps the values of an LDM tensor; NO_PLACE where it does not."""
    return FAMILIES[family].relation_of(name)


def origins_in_diffusers(names: Iterable[str], family: str) -> dict[str, Origin]:
    """Return {diffusers name: origin} for tensors of LDM naming, as `Family.origins` does."""
    return FAMILIES[family].origins(names, "ldm", "diffusers")

"""What a checkpoint is made of: families, components, blocks and the names of tensors. No torch, no files."""

from blockmerge.anatomy.any_model import AnyCore, any_core_of
from blockmerge.anatomy.by_name import (
    block_of,
    layout,
    origins_in_diffusers,
    relation_of,
)
from blockmerge.anatomy.completeness import LayoutGaps, components_of, layout_gaps
from blockmerge.anatomy.components import COMPONENTS, TITLES
from blockmerge.anatomy.cores import Core, canonical_names, core_of
from blockmerge.anatomy.described import Adjusted, Arms, matches
from blockmerge.anatomy.families import (
    DEFAULT_FAMILY,
    FAMILIES,
    register,
    unregister,
)
from blockmerge.anatomy.family import NAMINGS, OUTSIDE, Family
from blockmerge.anatomy.identify import Anatomy, damaged, has_signs_of_a_unet, identify
from blockmerge.anatomy.names import (
    DIFFUSERS_UNET_PREFIX,
    EMA_PREFIX,
    UNET_PREFIX,
    VAE_PARTS,
    canonical_name,
    component_of,
    is_leftover,
    is_position_ids,
    is_prediction_marker,
    is_schedule,
    lone_component,
    plain_names_of_ema,
    unwrapped_name,
)
from blockmerge.anatomy.origins import Origin, Place, Relation, Rows
from blockmerge.anatomy.other_kinds import other_kind
from blockmerge.anatomy.renaming import Renaming
from blockmerge.anatomy.standing import Standing

__all__ = [
    "COMPONENTS",
    "DEFAULT_FAMILY",
    "DIFFUSERS_UNET_PREFIX",
    "EMA_PREFIX",
    "FAMILIES",
    "NAMINGS",
    "OUTSIDE",
    "TITLES",
    "UNET_PREFIX",
    "VAE_PARTS",
    "Adjusted",
    "Anatomy",
    "AnyCore",
    "Arms",
    "Core",
    "Family",
    "LayoutGaps",
    "Origin",
    "Place",
    "Relation",
    "Renaming",
    "Rows",
    "Standing",
    "any_core_of",
    "block_of",
    "canonical_name",
    "canonical_names",
    "component_of",
    "components_of",
    "core_of",
    "damaged",
    "has_signs_of_a_unet",
    "identify",
    "is_leftover",
    "is_position_ids",
    "is_prediction_marker",
    "is_schedule",
    "layout",
    "layout_gaps",
    "lone_component",
    "matches",
    "origins_in_diffusers",
    "other_kind",
    "plain_names_of_ema",
    "register",
    "relation_of",
    "unregister",
    "unwrapped_name",
]

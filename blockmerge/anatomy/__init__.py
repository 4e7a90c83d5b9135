"""What a checkpoint is made of: families, components, blocks and the names of tensors. No torch, no files."""

from blockmerge.anatomy.blocks import SD_BLOCKS, SDXL_BLOCKS, block_of
from blockmerge.anatomy.completeness import LayoutGaps, components_of, layout_gaps
from blockmerge.anatomy.families import FAMILIES, Anatomy, Family, identify
from blockmerge.anatomy.layouts import layout
from blockmerge.anatomy.names import (
    COMPONENTS,
    UNET_PREFIX,
    canonical_name,
    component_of,
    is_position_ids,
    is_prediction_marker,
    is_schedule,
    plain_names_of_ema,
)

__all__ = [
    "COMPONENTS",
    "FAMILIES",
    "SDXL_BLOCKS",
    "SD_BLOCKS",
    "UNET_PREFIX",
    "Anatomy",
    "Family",
    "LayoutGaps",
    "block_of",
    "canonical_name",
    "component_of",
    "components_of",
    "identify",
    "is_position_ids",
    "is_prediction_marker",
    "is_schedule",
    "layout",
    "layout_gaps",
    "plain_names_of_ema",
]

"""New LoRAs, made of others (merged, resized, converted) or of the difference of two models (extracted)."""

from blockmerge.lora_making.convert import convert_lora
from blockmerge.lora_making.extract import extract_lora
from blockmerge.lora_making.merge import merge_loras
from blockmerge.lora_making.resize import resize_lora
from blockmerge.lora_making.result import LoraConversion, LoraResult
from blockmerge.lora_making.size import Size

__all__ = [
    "LoraConversion",
    "LoraResult",
    "Size",
    "convert_lora",
    "extract_lora",
    "merge_loras",
    "resize_lora",
]

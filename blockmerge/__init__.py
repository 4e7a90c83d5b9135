"""blockmerge: merge Stable Diffusion checkpoints block by block.

>>> import blockmerge
>>> blockmerge.block_of("model.diffusion_model.input_blocks.4.1.proj_in.weight")
'IN04'

The public names are those of `__all__`. None of them loads torch before it is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockmerge.version import __version__ as __version__

if TYPE_CHECKING:
    from blockmerge.adapters import Lora as Lora
    from blockmerge.anatomy import block_of as block_of
    from blockmerge.checkpoints import Checkpoint as Checkpoint
    from blockmerge.checkpoints import open_checkpoint as open_checkpoint
    from blockmerge.comparing import LoraSimilarity as LoraSimilarity
    from blockmerge.comparing import SimilarityMatrix as SimilarityMatrix
    from blockmerge.comparing import SimilarityResult as SimilarityResult
    from blockmerge.comparing import lora_similarity as lora_similarity
    from blockmerge.comparing import similarity as similarity
    from blockmerge.comparing import similarity_matrix as similarity_matrix
    from blockmerge.errors import BlockmergeError as BlockmergeError
    from blockmerge.errors import CheckpointError as CheckpointError
    from blockmerge.errors import IncompatibleModelsError as IncompatibleModelsError
    from blockmerge.errors import NonFiniteError as NonFiniteError
    from blockmerge.errors import OutputError as OutputError
    from blockmerge.errors import PresetError as PresetError
    from blockmerge.errors import RecipeError as RecipeError
    from blockmerge.errors import UnknownFamilyError as UnknownFamilyError
    from blockmerge.errors import WeightsError as WeightsError
    from blockmerge.explaining import Explanation as Explanation
    from blockmerge.explaining import explain as explain
    from blockmerge.inspecting import CheckResult as CheckResult
    from blockmerge.inspecting import Inspection as Inspection
    from blockmerge.inspecting import LoraInspection as LoraInspection
    from blockmerge.inspecting import check as check
    from blockmerge.inspecting import inspect as inspect
    from blockmerge.inspecting import inspect_lora as inspect_lora
    from blockmerge.lora_making import LoraConversion as LoraConversion
    from blockmerge.lora_making import LoraResult as LoraResult
    from blockmerge.lora_making import convert_lora as convert_lora
    from blockmerge.lora_making import extract_lora as extract_lora
    from blockmerge.lora_making import merge_loras as merge_loras
    from blockmerge.lora_making import resize_lora as resize_lora
    from blockmerge.merging import LiveMerge as LiveMerge
    from blockmerge.merging import Merge as Merge
    from blockmerge.merging import MergeResult as MergeResult
    from blockmerge.merging import Plan as Plan
    from blockmerge.merging import Recipe as Recipe
    from blockmerge.merging import Verification as Verification
    from blockmerge.merging import again as again
    from blockmerge.merging import bake as bake
    from blockmerge.merging import convert as convert
    from blockmerge.merging import merge as merge
    from blockmerge.merging import merge_state_dicts as merge_state_dicts
    from blockmerge.merging import verify as verify
    from blockmerge.methods import merge_method as merge_method
    from blockmerge.weights import BlockWeights as BlockWeights
    from blockmerge.weights import load_preset as load_preset
    from blockmerge.weights import preset_names as preset_names

_HOMES = {
    "BlockWeights": "weights",
    "BlockmergeError": "errors",
    "CheckResult": "inspecting",
    "Checkpoint": "checkpoints",
    "CheckpointError": "errors",
    "Explanation": "explaining",
    "IncompatibleModelsError": "errors",
    "Inspection": "inspecting",
    "LiveMerge": "merging",
    "Lora": "adapters",
    "LoraConversion": "lora_making",
    "LoraInspection": "inspecting",
    "LoraResult": "lora_making",
    "LoraSimilarity": "comparing",
    "Merge": "merging",
    "MergeResult": "merging",
    "NonFiniteError": "errors",
    "OutputError": "errors",
    "Plan": "merging",
    "PresetError": "errors",
    "Recipe": "merging",
    "RecipeError": "errors",
    "SimilarityMatrix": "comparing",
    "SimilarityResult": "comparing",
    "UnknownFamilyError": "errors",
    "Verification": "merging",
    "WeightsError": "errors",
    "again": "merging",
    "bake": "merging",
    "block_of": "anatomy",
    "check": "inspecting",
    "convert": "merging",
    "convert_lora": "lora_making",
    "explain": "explaining",
    "extract_lora": "lora_making",
    "inspect": "inspecting",
    "inspect_lora": "inspecting",
    "load_preset": "weights",
    "lora_similarity": "comparing",
    "merge": "merging",
    "merge_loras": "lora_making",
    "merge_method": "methods",
    "merge_state_dicts": "merging",
    "open_checkpoint": "checkpoints",
    "preset_names": "weights",
    "resize_lora": "lora_making",
    "similarity": "comparing",
    "similarity_matrix": "comparing",
    "verify": "merging",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Each name is fetched from its room when it is first used, so that `import blockmerge` itself costs next
    # to nothing.
    if name not in _HOMES:
        raise AttributeError(f"module 'blockmerge' has no attribute '{name}'")
    value = getattr(import_module(f"blockmerge.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

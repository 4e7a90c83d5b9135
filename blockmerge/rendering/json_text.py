"""Results as JSON, with the keys that scripts may rely on (`docs/json.md`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockmerge.comparing import LoraSimilarity, SimilarityMatrix, SimilarityResult
    from blockmerge.explaining import Explanation
    from blockmerge.inspecting import CheckResult, Inspection, LoraInspection
    from blockmerge.lora_making import LoraConversion, LoraResult
    from blockmerge.merging import MergeResult
    from blockmerge.merging.verify import Verification
    from blockmerge.methods import Method
    from blockmerge.weights import Preset


def merge_json(result: MergeResult) -> str:
    """A merge; `output` is the only path, all other names are without folders."""
    return _dumps(result.to_dict())


def verification_json(found: Verification) -> str:
    """Whether a file is what its recipe makes; `different` says by how many steps."""
    return _dumps(found.to_dict())


def recipe_json(run: Mapping[str, Any]) -> str:
    """A recipe as a merged file's metadata has it."""
    return _dumps(dict(run))


def lora_json(result: LoraResult) -> str:
    """A new LoRA; `held` only of an extracted one."""
    return _dumps(result.to_dict())


def inspection_json(found: Inspection) -> str:
    """An inspection; `hashes` only where they were asked for."""
    return _dumps(found.to_dict())


def lora_conversion_json(found: LoraConversion) -> str:
    """A LoRA in another form; `output` is the only path."""
    return _dumps(found.to_dict())


def lora_inspection_json(found: LoraInspection) -> str:
    """What is in a LoRA; ranks and alphas are keys, as texts."""
    return _dumps(found.to_dict())


def lora_similarity_json(found: LoraSimilarity) -> str:
    """How alike two LoRAs are: cosines; `parts` only where the blocks were asked for."""
    return _dumps(found.to_dict())


def check_json(found: CheckResult) -> str:
    """What is wrong with a checkpoint; every tensor of a problem is named."""
    return _dumps(found.to_dict())


def files_json(files: Sequence[Mapping[str, Any]]) -> str:
    """Several files, each as it is alone, or with an `error` that says why it cannot be read."""
    return _dumps({"files": files})


def methods_json(methods: Sequence[Method]) -> str:
    """A list of methods; `models` is null for any number, `weights` are the block weights each takes."""
    from blockmerge.methods import purpose_of

    return _dumps(
        [
            {
                "name": method.name,
                "purpose": purpose_of(method),
                "models": method.models,
                "weights": list(method.weights),
                "numbers": [
                    {
                        "name": number.name,
                        "default": number.default,
                        "range": number.range,
                        "description": number.text,
                    }
                    for number in method.numbers
                ],
                "locality": method.locality,
                "formula": method.formula,
                "source": method.source,
            }
            for method in methods
        ]
    )


def presets_json(presets: Sequence[Preset]) -> str:
    """A list of presets."""
    return _dumps([_preset(preset) for preset in presets])


def preset_json(preset: Preset) -> str:
    """A list of one preset."""
    return presets_json([preset])


def similarity_json(result: SimilarityResult) -> str:
    """A base and its references; `similarity` and `parts` are percent or cosines, by the method."""
    return _dumps(result.to_dict())


def matrix_json(result: SimilarityMatrix) -> str:
    """All models beside all."""
    return _dumps(result.to_dict())


def explanation_json(found: Explanation) -> str:
    """Where a merge comes from; `tensors` only where they were asked for."""
    return _dumps(found.to_dict())


def _preset(preset: Preset) -> dict[str, Any]:
    tables = {family: dict(weights) for family, weights in preset.others.items()}
    return {
        "name": preset.name,
        "weights": dict(preset.weights) if preset.weights else None,
        "sdxl": dict(preset.sdxl) if preset.sdxl else None,
        **({"tables": tables} if tables else {}),
        "source": preset.source,
        "description": preset.description,
    }


def _dumps(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False)

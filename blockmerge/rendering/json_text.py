"""Results as JSON, with the keys that scripts may rely on (`docs/json.md`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockmerge.inspecting import Inspection
    from blockmerge.merging import MergeResult
    from blockmerge.weights import Preset


def merge_json(result: MergeResult) -> str:
    """A merge; `output` is the only path, all other names are without folders."""
    fields = asdict(result)
    fields.update(output=str(result.output), weights_beta=None)
    return _dumps(fields)


def inspection_json(found: Inspection) -> str:
    """An inspection; `hashes` only where they were asked for."""
    fields: dict[str, Any] = asdict(found)
    if found.hashes is None:
        del fields["hashes"]
    for block in fields["blocks"].values():
        del block["dtypes"]
    return _dumps(fields)


def presets_json(presets: Sequence[Preset]) -> str:
    """A list of presets."""
    return _dumps([_preset(preset) for preset in presets])


def preset_json(preset: Preset) -> str:
    """A list of one preset."""
    return presets_json([preset])


def _preset(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "weights": dict(preset.weights),
        "sdxl": dict(preset.sdxl) if preset.sdxl else None,
        "source": preset.source,
        "description": preset.description,
    }


def _dumps(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False)

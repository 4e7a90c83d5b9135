"""What makes a diffusers folder of the tensors of a merge: its weight files, cut into shards, and all that lies beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from blockmerge.checkpoints import DiffusersFolder, Model, TensorInfo
from blockmerge.merging.decisions import Decision

SHARD_BYTES = 10_000_000_000
"""The largest weight file in a folder, as diffusers itself cuts them ("10GB")."""

_TRANSFORMERS_STEM, _DIFFUSERS_STEM = "model", "diffusion_pytorch_model"


def split_folder(decisions: Sequence[Decision], models: Sequence[Model]) -> tuple[dict[str, list[Decision]], dict[str, bytes]]:
    """Return {weight file: its tensors}, and {index file: its bytes} for the components that take several files."""
    components: dict[str, list[Decision]] = {}
    for decision in decisions:
        components.setdefault(decision.name.partition("/")[0], []).append(decision)
    files: dict[str, list[Decision]] = {}
    indexes: dict[str, bytes] = {}
    for component, members in components.items():
        stem = f"{component}/{_stem(component, models)}"
        shards = _shards(members)
        if len(shards) == 1:
            files[f"{stem}.safetensors"] = members
            continue
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            path = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            files[path] = shard
            weight_map.update({decision.name.partition("/")[2]: path.partition("/")[2] for decision in shard})
        index = {"metadata": {"total_size": sum(map(_nbytes, members))}, "weight_map": weight_map}
        indexes[f"{stem}.safetensors.index.json"] = _json(index)
    return files, indexes


def _stem(component: str, models: Sequence[Model]) -> str:
    for model in models:
        if isinstance(model.source, DiffusersFolder) and component in model.source.components:
            return model.source.components[component]
    return _DIFFUSERS_STEM if component in ("unet", "vae") else _TRANSFORMERS_STEM


def _shards(decisions: Sequence[Decision]) -> list[list[Decision]]:
    shards: list[list[Decision]] = [[]]
    size = 0
    for decision in decisions:
        nbytes = _nbytes(decision)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(decision)
        size += nbytes
    return shards


def _nbytes(decision: Decision) -> int:
    return TensorInfo(decision.dtype, decision.shape, 0).nbytes


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def folder_files(*a):
    return {}


def folder_files(recipe, models, decisions, anatomy):
    return {}

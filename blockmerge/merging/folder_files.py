"""What makes a diffusers folder of the tensors of a merge: its weight files, cut into shards, and all that lies beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from blockmerge.anatomy import Anatomy, is_prediction_marker
from blockmerge.anatomy.configs import folder_configs
from blockmerge.checkpoints import Checkpoint, CheckpointLike, DiffusersFolder, Model, TensorInfo, open_checkpoint
from blockmerge.errors import CheckpointError, IncompatibleModelsError, UnknownFamilyError, reason, shown
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


def folder_files(
    models: Sequence[Model], decisions: Sequence[Decision], anatomy: Anatomy, configs: CheckpointLike | None
) -> tuple[dict[str, bytes], list[str]]:
    """Return {path: bytes} of all that lies beside the weights, and notes for the user.

    Configs, tokenizers and scheduler come from the folder `configs`, else from the first model that is a folder; what none
    of them has is worked out from shapes. Raises CheckpointError when they cannot be read, IncompatibleModelsError when a
    component is too incomplete to have a config.
    """
    prediction, notes = _prediction(models[0], anatomy)
    try:
        made = folder_configs({d.key: d.shape for d in decisions}, anatomy.family.name, **prediction)
    except UnknownFamilyError as error:
        raise IncompatibleModelsError(f"{shown(models[0].name)} cannot become a diffusers folder: it {error}") from None
    source = _folder_of_configs(models, configs)
    if source is None:
        notes.append("a single file holds no tokenizers: the new folder has none (--configs FOLDER takes them from another)")
        return {path: _json(content) for path, content in made.items()}, notes
    carried = _carried(source)
    components = {decision.name.partition("/")[0] for decision in decisions}
    files = {path: data for path, data in carried.items() if path.count("/") == 0 or _belongs(path, components, source)}
    for path, content in made.items():
        if path not in files or not _fits(path, files[path], content):
            files[path] = _json(content)
    files["model_index.json"] = _json(_index(files["model_index.json"], made["model_index.json"], components, source))
    return files, notes


def _prediction(a: Model, anatomy: Anatomy) -> tuple[dict[str, Any], list[str]]:
    """What the U-Net predicts, as far as can be told from markers and metadata."""
    markers = {name for name in a.tensors if is_prediction_marker(name)}
    if "v_pred" in markers:
        return {"prediction": "v_prediction", "zero_snr": "ztsnr" in markers}, []
    architecture = a.source.metadata.get("modelspec.architecture", "")
    if anatomy.family.name != "sd2" or anatomy.variant != "base" or "512" in architecture:
        return {"prediction": "epsilon"}, []
    if "768-v" in architecture:
        return {"prediction": "v_prediction"}, []
    note = "nothing tells whether this SD2 model predicts v or noise: scheduler_config.json says v_prediction, as of SD2.1 at 768"
    return {"prediction": "v_prediction"}, [note]


def _folder_of_configs(models: Sequence[Model], configs: CheckpointLike | None) -> DiffusersFolder | None:
    if configs is not None:
        found: Checkpoint = open_checkpoint(configs)
        if not _is_pipeline(found):
            raise CheckpointError(f"{shown(found.name)} is no diffusers folder, so there are no configs to take from it")
        return found
    return next((model.source for model in models if _is_pipeline(model.source)), None)


def _is_pipeline(checkpoint: Checkpoint) -> TypeGuard[DiffusersFolder]:
    """Whether it is a folder of components; one component's own folder has its config at another place."""
    return isinstance(checkpoint, DiffusersFolder) and "" not in checkpoint.components


def _carried(source: DiffusersFolder) -> dict[str, bytes]:
    try:
        return {path: (source.path / path).read_bytes() for path in source.carried}
    except OSError as error:
        raise CheckpointError(f"cannot read {shown(error.filename)}: {reason(error)}") from error


def _belongs(path: str, components: set[str], source: DiffusersFolder) -> bool:
    """Whether a file's folder is one without weights, as a tokenizer's, or that of a component that the output has."""
    folder = path.partition("/")[0]
    return folder in components or folder not in source.components


def _fits(path: str, data: bytes, made: Mapping[str, Any]) -> bool:
    """Whether a U-Net's config is that of the output's variant: other first convolutions take another config."""
    if path != "unet/config.json":
        return True
    config = _parsed(data)
    return config is not None and config.get("in_channels") == made["in_channels"]


def _index(data: bytes, made: Mapping[str, Any], components: set[str], source: DiffusersFolder) -> dict[str, Any]:
    """model_index.json with exactly the components that the folder has."""
    index = _parsed(data) or dict(made)
    for part, entry in made.items():
        if part in components and index.get(part) in (None, [None, None]):
            index[part] = entry
    with_weights = {*source.components, "unet", "vae", "text_encoder", "text_encoder_2"}
    index.update({part: [None, None] for part in index.keys() & with_weights - components})
    return index


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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

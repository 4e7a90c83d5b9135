"""What a model says that its U-Net predicts, where no marker does: in a file's metadata, or in the config of
a folder's scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockmerge.checkpoints.formats.folder import SCHEDULER, DiffusersFolder
from blockmerge.checkpoints.model import Model
from blockmerge.errors import CheckpointError, reason, shown

_IN_METADATA: Mapping[str, Mapping[str, str]] = {
    "modelspec.prediction_type": {
        "epsilon": "epsilon",
        "eps": "epsilon",
        "v": "v_prediction",
        "v_prediction": "v_prediction",
        "sample": "sample",
        "flow": "flow",
        "flow_prediction": "flow",
        "flow_matching": "flow",
        "rectified_flow": "flow",
        "edm": "EDM",
    },
    "ss_v_parameterization": {"true": "v_prediction", "false": "epsilon"},  # kohya's
}
"""{key: {value in lower case, with `_`: prediction}}; other values say nothing."""


@dataclass(frozen=True)
class ToldPrediction:
    """What a model predicts, ``"epsilon"``, ``"v_prediction"``, ``"sample"``, ``"flow"`` or ``"EDM"``, and
    what of it says so.
    """

    prediction: str
    where: str


def told_prediction(model: Model) -> ToldPrediction | None:
    """Return what a model's metadata or scheduler say; None where they do not.

    Raises CheckpointError when a folder's scheduler_config.json cannot be read.
    """
    metadata = model.source.metadata
    for key, values in _IN_METADATA.items():
        said = metadata.get(key, "").strip().lower().replace("-", "_").replace(" ", "_")
        if said in values:
            return ToldPrediction(values[said], key)
    unmarked = model.anatomy.family.prediction.get(model.anatomy.inputs)
    for part, prediction in ({} if unmarked is None else unmarked.architectures).items():
        if part in metadata.get("modelspec.architecture", ""):
            return ToldPrediction(prediction, "modelspec.architecture")
    return _told_by_folder(model.source) if isinstance(model.source, DiffusersFolder) else None


def prediction_of_scheduler(config: Mapping[str, Any]) -> str | None:
    """Return what a scheduler's config stands for, None where it is none."""
    name = config.get("_class_name")
    if not isinstance(name, str):
        return None
    said = config.get("prediction_type", "epsilon")  # diffusers' own default
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") is True or said == "flow_prediction":
        return "flow"
    if name.startswith("EDM"):
        return "EDM" if said == "epsilon" else f"EDM {said}"
    return str(said)


def _told_by_folder(folder: DiffusersFolder) -> ToldPrediction | None:
    if SCHEDULER not in folder.carried:
        return None
    path = folder.path / SCHEDULER
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {shown(path)}: {reason(error)}") from error
    except (ValueError, RecursionError):
        return None
    prediction = prediction_of_scheduler(config) if isinstance(config, dict) else None
    if prediction is None:
        return None
    by_class = "" if prediction == config.get("prediction_type", "epsilon") else f" ({config['_class_name']})"
    return ToldPrediction(prediction, f"scheduler_config.json{by_class}")

"""What a new LoRA's metadata says, with the keys that programs look for.

`ss_` keys are sd-scripts' (library/train_util.py, networks/lora.py), `modelspec.` ones of
https://github.com/Stability-AI/ModelSpec; their values for a family are data of its.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any

from blockmerge.anatomy import Family
from blockmerge.checkpoints import faulty_metadata
from blockmerge.lora_making.size import Size
from blockmerge.version import __version__

RECIPE_KEY = "blockmerge.recipe"

_VERSION, _PREDICTION = "ss_base_model_version", "modelspec.prediction_type"
_OF_THE_FILE = (
    "sshs_",
    "modelspec.hash_sha256",
    "modelspec.date",
    "blockmerge.",
    "ss_network_",
    "lora_adapter_metadata",
)
"""How keys begin that are true of one file only: hashes, when and how it came to be, its ranks and alphas."""


def of_family(
    family: Family, metadata: Iterable[Mapping[str, str]] = (), prediction: str = ""
) -> dict[str, str]:
    """Return what is said of the base model: the version that some metadata agree on, else that of what the
    model predicts, else the family's usual one.
    """
    versions: Mapping[str, Mapping[str, str]] = family.adapters.get("written", {}).get("metadata", {})
    stated = [{key: one.get(key) for key in (_VERSION, _PREDICTION)} for one in metadata]
    found = [*versions.values()]
    for key in (_VERSION, _PREDICTION):
        said = {one[key] for one in stated if one[key] is not None}
        agreeing = [version for version in found if {version.get(key)} == said]
        found = agreeing or found
    usual = found[0] if found else {}
    return dict(usual if stated else versions.get(prediction, usual))


def new_metadata(
    of_base: Mapping[str, str], recipe: Mapping[str, Any], title: str, merged_from: Sequence[str] = ()
) -> dict[str, str]:
    """Return the metadata of a new LoRA but for its ranks and hashes. Its date is a day, so that the
    same request gives the same file.
    """
    return {
        "format": "pt",
        **of_base,
        "ss_network_module": "networks.lora",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.date": date.today().isoformat(),
        **({"modelspec.merged_from": ", ".join(merged_from)} if merged_from else {}),
        RECIPE_KEY: json.dumps({"version": __version__, **recipe}, ensure_ascii=False),
    }


def still_true(metadata: Mapping[str, str], family: Family) -> dict[str, str]:
    """Return what a LoRA's metadata say that is true of it at another rank, too."""
    faulty = {key for keys in faulty_metadata(metadata, family.name).values() for key in keys}
    return {
        key: value
        for key, value in metadata.items()
        if not key.startswith(_OF_THE_FILE) and key not in faulty
    }


def of_ranks(linear: Sequence[int], convolutions: Sequence[int], size: Size) -> dict[str, str]:
    """Return what is said of the ranks of both kinds of modules, as sd-scripts says it."""
    dim, conv_dim = (_one(ranks, size) for ranks in (linear, convolutions))
    said = {"ss_network_dim": dim or conv_dim or "0", "ss_network_alpha": _alpha(dim or conv_dim or "0")}
    if conv_dim is not None:
        args = {"conv_dim": conv_dim, "conv_alpha": _alpha(conv_dim)}
        said["ss_network_args"] = json.dumps(args)
    return said


def _one(ranks: Sequence[int], size: Size) -> str | None:
    """The rank of all, as a text: the highest where one was asked for, which not all can have."""
    if not ranks:
        return None
    return str(max(ranks)) if size.rank is not None or len(set(ranks)) == 1 else "Dynamic"


def _alpha(rank: str) -> str:
    return rank if rank == "Dynamic" else str(float(rank))

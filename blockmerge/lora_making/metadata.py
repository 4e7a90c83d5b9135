"""What a new LoRA's metadata says, with the keys that programs look for.

`ss_` keys are sd-scripts' (library/train_util.py, networks/lora.py), `modelspec.` ones of
https://github.com/Stability-AI/ModelSpec; their values for a family are data of its.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any

from blockmerge.anatomy import Family
from blockmerge.checkpoints import faulty_metadata
from blockmerge.lora_making.size import Size
from blockmerge.version import __version__

RECIPE_KEY = "blockmerge.recipe"

_ALPHAS_KEY = "blockmerge.alphas"
_LARGEST_ALPHA = 1e9
_OF_TRAINING = ("ss_network_module", "ss_network_args", "ss_network_dropout", "modelspec.date")
"""How keys begin that stay true of a file in another form."""

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
    return {key: metadata[key] for key in _sound(metadata, family) if not key.startswith(_OF_THE_FILE)}


def _sound(metadata: Mapping[str, str], family: Family) -> list[str]:
    """The keys of what misleads nobody, and tells nothing that its maker would not have published."""
    faulty = {key for keys in faulty_metadata(metadata, family.name).values() for key in keys}
    return [key for key in metadata if key not in faulty]


def converted(
    metadata: Mapping[str, str], family: Family, recipe: Mapping[str, Any], network: str | None
) -> dict[str, str]:
    """Return the metadata of a LoRA in another form, but for its alphas and hashes: all that stays true, and
    what programs look for that read kohya's form, where there is a `network`.
    """
    kept = {key: metadata[key] for key in _sound(metadata, family) if key.startswith(_OF_TRAINING)}
    usual = {} if network is None else {**of_family(family, [metadata]), "ss_network_module": network}
    said = {RECIPE_KEY: json.dumps({"version": __version__, **recipe}, ensure_ascii=False)}
    return {**usual, **kept, **still_true(metadata, family), "format": "pt", **said}


def of_alphas(
    metadata: Mapping[str, str], numbers: Iterable[tuple[bool, int, float]], *, always: bool
) -> dict[str, str]:
    """Return what is said of ranks and alphas, as sd-scripts says it, for (has it a kernel, rank, alpha) of
    all modules; what else was said beside stays. Nothing where nothing was, unless `always`.
    """
    if not always and "ss_network_dim" not in metadata:
        return {}
    each: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
    for has_kernel, rank, alpha in numbers:
        each[has_kernel].append((rank, alpha))
    if not each[False] and not each[True]:
        return {}
    first = each[False] or each[True]
    said = {
        "ss_network_dim": _same(rank for rank, _ in first),
        "ss_network_alpha": _same(a for _, a in first),
    }
    args = _arguments(metadata.get("ss_network_args", ""))
    if each[True]:
        args["conv_dim"] = _same(rank for rank, _ in each[True])
        args["conv_alpha"] = _same(alpha for _, alpha in each[True])
    return {**said, **({"ss_network_args": json.dumps(args)} if args else {})}


def with_alphas(alphas: Mapping[str, float]) -> dict[str, str]:
    """Return what is said of alphas, {module: alpha}, that were put into factors and can be taken out
    again.
    """
    if not alphas:
        return {}
    usual, _ = Counter(alphas.values()).most_common(1)[0]
    others = {module: alpha for module, alpha in alphas.items() if alpha != usual}
    return {_ALPHAS_KEY: json.dumps({"alpha": usual, "modules": others})}


def alphas_of(metadata: Mapping[str, str], modules: Iterable[str]) -> dict[str, float]:
    """Return {module: alpha} of what `with_alphas` has written; nothing where that cannot be understood."""
    try:
        said = json.loads(metadata.get(_ALPHAS_KEY, "{}"))
        others = said.get("modules", {})
        found = {module: others.get(module, said.get("alpha")) for module in modules}
    except (ValueError, RecursionError, AttributeError):
        return {}
    return {
        module: float(alpha)
        for module, alpha in found.items()
        if isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 < alpha < _LARGEST_ALPHA
    }


def of_ranks(linear: Sequence[int], convolutions: Sequence[int], size: Size) -> dict[str, str]:
    """Return what is said of the ranks of both kinds of modules, as sd-scripts says it."""
    dim, conv_dim = (_one(ranks, size) for ranks in (linear, convolutions))
    said = {"ss_network_dim": dim or conv_dim or "0", "ss_network_alpha": _alpha(dim or conv_dim or "0")}
    if conv_dim is not None:
        args = {"conv_dim": conv_dim, "conv_alpha": _alpha(conv_dim)}
        said["ss_network_args"] = json.dumps(args)
    return said


def _arguments(text: str) -> dict[str, Any]:
    """The network's arguments; none where they cannot be read."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _same(numbers: Iterable[float]) -> str:
    """The number that all are, as sd-scripts writes it."""
    found = set(numbers)
    return str(found.pop()) if len(found) == 1 else "Dynamic"


def _one(ranks: Sequence[int], size: Size) -> str | None:
    """The rank of all, as a text: the highest where one was asked for, which not all can have."""
    if not ranks:
        return None
    return str(max(ranks)) if size.rank is not None or len(set(ranks)) == 1 else "Dynamic"


def _alpha(rank: str) -> str:
    return rank if rank == "Dynamic" else str(float(rank))

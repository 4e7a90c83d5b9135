"""What a recipe in metadata says of the files that it was made from, by which they are found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockmerge.checkpoints import Checkpoint, Model, identity_of, sha256_of
from blockmerge.merging.planning.adapting import Adapted
from blockmerge.merging.planning.metadata import RECIPE_KEY
from blockmerge.merging.planning.run_faults import strict_json

_LARGEST = 1 << 18
"""Bytes of a model's own recipe that are carried along: those of a merge of merges grow with each."""


def files_of(
    models: Sequence[Model],
    names: Sequence[str],
    vae: Checkpoint | None,
    adapted: Adapted,
    *,
    is_hashed: bool = False,
) -> dict[str, Any]:
    """Return what is recorded of models, a VAE's file and LoRAs: None for a stage, and for what is in memory.
    With `is_hashed`, SHA-256s are recorded, too, which reads the files that were not hashed before.

    Raises CheckpointError when a file cannot be read.
    """
    of_models = [
        _recorded(model.source, name, is_hashed=is_hashed) if model.is_file else None
        for model, name in zip(models, names, strict=True)
    ]
    found: dict[str, Any] = {"models": of_models}
    if vae is not None:
        found["vae"] = _recorded(vae, vae.name, is_hashed=is_hashed)
    if adapted.applied:
        sources = [one.adapter.source for one in adapted.applied]
        found["loras"] = [_recorded(one, one.name, is_hashed=is_hashed) for one in sources]
    return found


def _recorded(checkpoint: Checkpoint, name: str, *, is_hashed: bool) -> dict[str, Any] | None:
    identity = identity_of(checkpoint)
    if identity is None:
        return None
    own, sha256 = _recipe_of(checkpoint.shared_metadata), sha256_of(checkpoint) if is_hashed else None
    name = name.encode("utf-8", "replace").decode()  # names of files may be bytes that are no text
    said = {"name": name, "size": identity.size, "identity": identity.digest}
    more = {"sha256": sha256, "recipe": own}
    return {**said, **{key: value for key, value in more.items() if value is not None}}


def _recipe_of(metadata: Mapping[str, str]) -> Any:
    """The recipe that a model was itself made by, where it says so."""
    text = metadata.get(RECIPE_KEY, "")
    if not text or len(text) > _LARGEST:
        return None
    own = strict_json(text)
    return own if isinstance(own, dict) else None

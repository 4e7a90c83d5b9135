"""`inspect`: family, components, blocks, metadata and hashes of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from blockmerge.anatomy import (
    COMPONENTS,
    Anatomy,
    component_of,
    lone_component,
    plain_names_of_ema,
)
from blockmerge.checkpoints import (
    CheckpointLike,
    Hashes,
    TensorInfo,
    hash_file,
    open_checkpoint,
    quantised,
    recognised,
)
from blockmerge.errors import shown
from blockmerge.inspecting.tensors import ListedTensor, list_tensors, names_in_ldm
from blockmerge.streaming import Progress


@dataclass(frozen=True)
class Part:
    """The size of a component or a block, in `bytes` as stored; `dtypes` counts the tensors of each dtype."""

    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]

    @classmethod
    def of(cls, tensors: list[TensorInfo]) -> Part:
        """Add up tensors."""
        dtypes: dict[str, int] = {}
        for info in tensors:
            dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
        return cls(
            len(tensors), sum(info.elements for info in tensors), sum(info.nbytes for info in tensors), dtypes
        )


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    - `name`: the file's name.
    - `family`, `variant`, `naming`: what kind of model it is. None where that is not known.
    - `why_unknown`: one line about why the family is not known, or None.
    - `missing`: tensors that the diffusion model should have and lacks.
    - `quantised`: how the weights are quantised, or None.
    - `components`, `blocks`: {name: its `tensors`, `parameters`, `bytes` and `dtypes`}.
    - `metadata`: {key: text}.
    - `broken_off`: one line where the file is a download that did not finish, or None.
    - `hashes`: `autov1`, `autov2`, `autov3` and `sha256`. None unless asked for.
    - `tensors`: {name: an entry}. None unless asked for.
    - `notes`: sentences for the user.
    """

    name: str
    family: str | None
    variant: str | None
    naming: str | None
    why_unknown: str | None
    missing: tuple[str, ...]
    quantised: str | None
    components: Mapping[str, Part]
    blocks: Mapping[str, Part]
    metadata: Mapping[str, str]
    broken_off: str | None
    hashes: Hashes | None
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, ListedTensor] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`, and `hashes`
        and `tensors` are there only where they were asked for.
        """
        fields = asdict(self)
        for key in ("hashes", "tensors"):
            if fields[key] is None:
                del fields[key]
        for block in fields["blocks"].values():
            del block["dtypes"]
        return fields


def inspect(
    path: CheckpointLike,
    hashes: bool = False,
    progress: Progress | None = None,
    *,
    variant: str | None = None,
    tensors: bool = False,
) -> Inspection:
    """Look at what is in a model, by its header.

    >>> blockmerge.inspect("a.safetensors").components["unet"].parameters  # doctest: +SKIP
    859520964

    - `path`: a path, an opened checkpoint, a state dict or a recipe.
    - `hashes`: read the whole file once for its hashes.
    - `tensors`: list every tensor with its block, and with the LDM name that element rules know it by.
    - `variant`, `progress`: as for `merge`.

    A file that is not an image model is not an error: `why_unknown` says what it is.

    Raises `CheckpointError` where the file cannot be read.
    """
    checkpoint = open_checkpoint(path, variant=variant)
    plain = plain_names_of_ema(checkpoint.tensors)
    has_unet = any(component_of(name) == "unet" for name in checkpoint.tensors)
    how = quantised(checkpoint)
    shapes = {name: how.shape_of(info) for name, info in checkpoint.tensors.items() if name not in how.aside}
    names, anatomy, why = recognised(checkpoint, shapes, plain)
    if why is not None and has_unet and how.signs:
        why = f"holds a U-Net of {how} weights, whose shapes do not tell which"
    alone, naming, _ = (None if anatomy else lone_component(names)) or (None, None, 0)
    components: dict[str, list[TensorInfo]] = {component: [] for component in COMPONENTS}
    for name, info in checkpoint.tensors.items():
        components[alone or component_of(name if name in plain else names[name])].append(info)
    if anatomy:
        components = {anatomy.family.called_component(one): infos for one, infos in components.items()}
    return Inspection(
        name=checkpoint.name,
        family=anatomy.family.name if anatomy else None,
        variant=anatomy.variant if anatomy else None,
        naming=anatomy.naming if anatomy else naming,
        why_unknown=why,
        missing=anatomy.standing.missing if anatomy and anatomy.standing.is_damaged else (),
        quantised=str(how) if how.kind else None,
        components={component: Part.of(infos) for component, infos in components.items() if infos},
        blocks={} if anatomy is None else _blocks(checkpoint.tensors, names, anatomy),
        metadata=checkpoint.metadata,
        broken_off=checkpoint.broken_off(),
        hashes=hash_file(checkpoint, progress) if hashes else None,
        notes=tuple(f"{shown(checkpoint.name)} {note}" for note in checkpoint.notes),
        tensors=list_tensors(checkpoint.tensors, names, anatomy) if tensors else None,
    )


def _blocks(tensors: Mapping[str, TensorInfo], names: Mapping[str, str], anatomy: Anatomy) -> dict[str, Part]:
    """The blocks of the diffusion model, whose tensors count as in the original naming, where some are joined
    that a folder keeps apart.
    """
    family = anatomy.family
    found: dict[str, list[TensorInfo]] = {block: [] for block in family.blocks[1:]}
    joined: dict[str, set[str]] = {}
    originals = names_in_ldm(names.values(), anatomy)
    for name, info in tensors.items():
        if component_of(names[name]) == "unet":
            block = family.block_of(names[name])
            found.setdefault(block, []).append(info)
            joined.setdefault(block, set()).add(originals.get(names[name], names[name]))
    parts = {block: Part.of(infos) for block, infos in found.items()}
    return {block: replace(part, tensors=len(joined.get(block, ()))) for block, part in parts.items()}

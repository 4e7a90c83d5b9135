"""`inspect`: family, components, blocks, metadata and hashes of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from blockmerge.anatomy import (
    COMPONENTS,
    Anatomy,
    block_of,
    canonical_name,
    component_of,
    identify,
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
)
from blockmerge.errors import UnknownFamilyError
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
    """What `inspect` found. Without a known U-Net, family and variant are None, and `why_unknown` says why.

    So is naming, but of a VAE or a text encoder alone.

    `quantised` says how the weights are, or is None. `blocks` are the U-Net's, without BASE. `hashes` is None
    unless asked for.
    """

    name: str
    family: str | None
    variant: str | None
    naming: str | None
    why_unknown: str | None
    quantised: str | None
    components: Mapping[str, Part]
    blocks: Mapping[str, Part]
    metadata: Mapping[str, str]
    hashes: Hashes | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON, with the keys of `docs/json.md`: `hashes` only
        where they were asked for.
        """
        fields = asdict(self)
        if self.hashes is None:
            del fields["hashes"]
        for block in fields["blocks"].values():
            del block["dtypes"]
        return fields


def inspect(path: CheckpointLike, hashes: bool = False, progress: Progress | None = None) -> Inspection:
    """Look at a checkpoint's header, and at the scales of quantised weights; with `hashes` also read the
    whole file once.

    Raises CheckpointError when it cannot be read. A file that is no Stable Diffusion model is no error.
    """
    checkpoint = open_checkpoint(path)
    plain = plain_names_of_ema(checkpoint.tensors)
    has_unet = any(component_of(name) == "unet" for name in checkpoint.tensors)
    names = {name: canonical_name(name) for name in checkpoint.tensors}
    if not has_unet:  # then EMA weights are the U-Net
        names.update(plain)
    how = quantised(checkpoint)
    anatomy, why = _identify({names[name]: how.shape_of(info) for name, info in checkpoint.tensors.items()})
    if why is not None and has_unet and how.signs:
        why = f"holds a U-Net of {how} weights, whose shapes do not tell which"
    alone, naming, _ = lone_component(names) or (None, None, 0)
    components: dict[str, list[TensorInfo]] = {component: [] for component in COMPONENTS}
    blocks: dict[str, list[TensorInfo]] = {
        block: [] for block in (anatomy.family.blocks[1:] if anatomy else ())
    }
    for name, info in checkpoint.tensors.items():
        components[alone or component_of(name)].append(info)
        if anatomy and component_of(names[name]) == "unet":
            block = block_of(names[name], anatomy.family.name)
            blocks.setdefault(block, []).append(info)
    return Inspection(
        name=checkpoint.name,
        family=anatomy.family.name if anatomy else None,
        variant=anatomy.variant if anatomy else None,
        naming=anatomy.naming if anatomy else naming,
        why_unknown=why,
        quantised=str(how) if how.kind else None,
        components={component: Part.of(infos) for component, infos in components.items() if infos},
        blocks={block: Part.of(infos) for block, infos in blocks.items()},
        metadata=checkpoint.metadata,
        hashes=hash_file(checkpoint, progress) if hashes else None,
    )


def _identify(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Anatomy | None, str | None]:
    try:
        return identify(shapes), None
    except UnknownFamilyError as error:
        return None, str(error)

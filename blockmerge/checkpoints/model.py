"""A model as merging and comparing see it: its anatomy, and its tensors under the names by which models are matched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blockmerge.anatomy import UNET_PREFIX, Anatomy, canonical_name, component_of, identify, plain_names_of_ema
from blockmerge.checkpoints.checkpoint import Checkpoint, TensorInfo
from blockmerge.errors import UnknownFamilyError, listing, shown

VAE_PREFIX = "first_stage_model."


@dataclass(frozen=True)
class Model:
    """A checkpoint, what it is, and `tensors`: canonical name → tensor.

    EMA copies are left out and only counted, unless they are all the U-Net there is.

    `bare` says that its U-Net's names lack `model.diffusion_model.`.
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    tensors: Mapping[str, TensorInfo]
    original_names: Mapping[str, str]
    components: frozenset[str]
    bare: bool
    ema_tensors: int
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name to show people."""
        return self.checkpoint.name

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Model:
        """Look at a checkpoint's names and shapes. Raises UnknownFamilyError, with the file's name, without a known U-Net."""
        original, notes = _matched_names(checkpoint)
        tensors = {canonical: checkpoint.tensors[name] for canonical, name in original.items()}
        try:
            anatomy = identify({name: info.shape for name, info in tensors.items()})
        except UnknownFamilyError as error:
            raise UnknownFamilyError(f"{shown(checkpoint.name)} {error}") from None
        return cls(
            checkpoint=checkpoint,
            anatomy=anatomy,
            tensors=tensors,
            original_names=original,
            components=frozenset(map(component_of, tensors)),
            bare=any(canonical == UNET_PREFIX + name for canonical, name in original.items()),
            ema_tensors=sum(component_of(name) == "ema" for name in checkpoint.tensors.keys() - set(original.values())),
            notes=tuple(notes),
        )


def _matched_names(checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """Return {canonical name: name in the file}, EMA copies left out, and notes."""
    names: dict[str, str] = {}
    twice: list[str] = []
    for name in checkpoint.tensors:
        if component_of(name) == "ema":
            continue
        canonical = canonical_name(name)
        if canonical in names:
            twice.append(name)
            if name != canonical:  # the name that every loader knows wins
                continue
        names[canonical] = name
    notes = (
        [f"{shown(checkpoint.name)} holds {len(twice)} tensors under two names ({listing(twice, 1)}): one of each is used"]
        if twice
        else []
    )
    if not any(component_of(name) == "unet" for name in names):
        ema = {plain: name for name, plain in plain_names_of_ema(checkpoint.tensors).items()}
        if ema:
            notes.append(f"{shown(checkpoint.name)} has only EMA weights for its U-Net: they are used as the U-Net")
            names = {**ema, **names}
    return names, notes


def vae_tensors(checkpoint: Checkpoint) -> dict[str, str]:
    """Return {canonical name: name in the file} of a VAE's tensors, with or without `first_stage_model.` in the file."""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    found = {}
    for name in checkpoint.tensors:
        bare = name.removeprefix(VAE_PREFIX)
        if bare.startswith(parts):
            found[VAE_PREFIX + bare] = name
    return found

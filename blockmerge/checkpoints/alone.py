"""One component of a model as a model of its own: a file of nothing else, or a part of a whole one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from blockmerge.anatomy import (
    FAMILIES,
    Anatomy,
    Family,
    Renaming,
    canonical_name,
    component_of,
    is_leftover,
    is_prediction_marker,
    layout_gaps,
    lone_component,
)
from blockmerge.anatomy.configs import latent_channels
from blockmerge.checkpoints.checkpoint import Checkpoint
from blockmerge.checkpoints.model import VAE_PREFIX, Alone, Model, in_ldm, refuse_integers
from blockmerge.checkpoints.quantised import Quantised, quantised
from blockmerge.errors import CheckpointError, IncompatibleModelsError, counted, listing, shown
from blockmerge.expressions import Expression

CORE_WORDS = ("unet", "transformer")
COMPONENT_WORDS = (*CORE_WORDS, "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""What a component is called where one is asked for: as diffusers' folders are."""


def lone_model(checkpoint: Checkpoint, name: str) -> Model | None:
    """Return a VAE or a text encoder alone, under the LDM names of the first family that has such a one; None
    for what is neither, or has not all of its tensors.

    Raises CheckpointError for quantised weights that cannot be read.
    """
    lone = lone_component(checkpoint.tensors)
    if lone is None and not any(own.startswith(_OPENCLIP) for own in checkpoint.tensors):
        return None
    how = quantised(checkpoint)
    found = list(_fitting(checkpoint, lone[0] if lone else "text_encoder", how))
    if not found:
        return None
    how.check(name)
    (family, renaming, naming, tensors), *others = found
    refuse_integers(tensors, family, name)
    titles = list(dict.fromkeys(one[0].title for one in found))
    component = component_of(next(iter(tensors)))
    title = family.titles[component]
    notes = [f"{shown(name)} {note}" for note in checkpoint.notes]
    notes.append(f"{shown(name)} is a {title} alone, as in {listing(titles, len(titles))}")
    if dead := [one for one in checkpoint.tensors if is_leftover(one)]:
        notes.append(f"left out {counted(len(dead), 'tensor')} that no loader needs ({listing(dead)})")
    return Model(
        source=checkpoint,
        anatomy=Anatomy(family, "base", naming),
        tensors=tensors,
        components=frozenset({component}),
        prefix="",
        ema_tensors=(),
        notes=tuple(notes),
        name=name,
        quantised=how,
        alone=Alone(renaming.diffusers.rstrip("/"), renaming.ldm, tuple(one[0] for one in others)),
    )


def only_component(model: Model, only: str) -> Model:
    """Return the part of a model that is one of COMPONENT_WORDS.

    Raises IncompatibleModelsError when the model has none, or something beside it that belongs to it.
    """
    family = model.anatomy.family
    if model.alone is not None:
        if only in (model.alone.folder, *model.components):
            return model
        raise IncompatibleModelsError(
            f"{shown(model.name)} has no {only}: it is a {model.alone.folder} alone"
        )
    if only in CORE_WORDS:
        alone = Alone(family.core, "" if family.arms else family.unet_prefix("ldm"), is_part=True)
        names = [name for name in model.tensors if component_of(name) == "unet" or is_prediction_marker(name)]
    else:
        renaming = _renaming_of(family, only)
        names = [name for name in model.tensors if renaming and name.startswith(renaming.ldm)]
        alone = Alone(only, renaming.ldm if renaming else "", is_part=True)
    if not names:
        there = listing(sorted(_words_of(model)), 9)
        raise IncompatibleModelsError(
            f"{shown(model.name)} has no {only} (--only, of convert): it has {there}"
        )
    return replace(
        model,
        tensors={name: model.tensors[name] for name in names},
        components=frozenset(map(component_of, names)) - {"other"},
        ema_tensors=(),
        alone=alone,
    )


def _words_of(model: Model) -> Iterator[str]:
    family = model.anatomy.family
    if "unet" in model.components:
        yield family.core
    for one in _renamings(family):
        if any(name.startswith(one.ldm) for name in model.tensors):
            yield one.diffusers.rstrip("/")


def _renamings(family: Family) -> list[Renaming]:
    """How the components beside the diffusion model are called in both namings."""
    return [one for one in family.renamings if component_of(one.ldm) not in ("unet", "other")]


def _renaming_of(family: Family, only: str) -> Renaming | None:
    named = [one for one in _renamings(family) if one.diffusers == f"{only}/"]
    meant = [one for one in _renamings(family) if component_of(one.ldm) == only]
    return next(iter((*named, *meant)), None)


def _fitting(
    checkpoint: Checkpoint, component: str, how: Quantised
) -> Iterator[tuple[Family, Renaming, str, Mapping[str, Expression]]]:
    """The families that have such a component, those whose layouts list it first, with its LDM names."""
    # Of text encoders that no layout lists, it is not known when they are whole.
    listing_it = [one for one in FAMILIES.values() if component in one.components]
    by_channels = [one for one in FAMILIES.values() if component == "vae" and latent_channels(one)]
    for family in dict.fromkeys((*listing_it, *by_channels)):
        for renaming in _renamings(family):
            if component_of(renaming.ldm).rstrip("_23") != component:
                continue
            naming, original = _named_as(checkpoint, renaming, component, how)
            try:
                tensors = in_ldm(checkpoint, original, naming, family, how)
            except CheckpointError:  # parts that do not join
                continue
            if _is_whole(tensors, family, renaming):
                yield family, renaming, naming, tensors


def _named_as(
    checkpoint: Checkpoint, renaming: Renaming, component: str, how: Quantised
) -> tuple[str, dict[str, str]]:
    """Whose names a component has, and {full name in that naming: name in the file}."""
    short: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name not in how.aside and not is_leftover(name):
            full = canonical_name(name)
            inner = full.partition("/")[2] if "/" in full else full.removeprefix(renaming.ldm)
            if component == "vae":
                inner = inner.removeprefix(VAE_PREFIX)
            short[inner] = name
    is_diffusers = any(one.startswith(_OF_DIFFUSERS) for one in short)
    prefix = renaming.diffusers if is_diffusers else renaming.ldm
    original = {canonical_name(prefix + one): own for one, own in short.items()}
    return "diffusers" if is_diffusers else "ldm", original


_OPENCLIP = "transformer.resblocks."
_OF_DIFFUSERS = ("encoder.down_blocks.", "decoder.up_blocks.", "text_model.")


def _is_whole(tensors: Mapping[str, Expression], family: Family, renaming: Renaming) -> bool:
    component = component_of(renaming.ldm)
    shapes = {name: one.shape for name, one in tensors.items()}
    if not tensors or not all(name.startswith(renaming.ldm) and family.knows(name) for name in tensors):
        return False
    channels, first = latent_channels(family), shapes.get(f"{renaming.ldm}decoder.conv_in.weight")
    if component == "vae" and channels and first is not None and first[1:2] != (channels,):
        return False
    gaps = layout_gaps(shapes, family, component)
    return not (gaps.missing or gaps.misshapen)

"""Whether models can be merged as wholes: of one family, and with the same tensors but for what the first
alone may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from blockmerge.anatomy import UNET_PREFIX, Family, component_of, is_prediction_marker, matches
from blockmerge.checkpoints import Model, names_of
from blockmerge.errors import IncompatibleModelsError, counted, listing, shown


def check_families(models: Sequence[Model]) -> None:
    """Raise IncompatibleModelsError for models of different families."""
    first = models[0]
    for other in models[1:]:
        ours, theirs = first.anatomy, other.anatomy
        if ours.family.is_like(theirs.family):
            continue
        said = [f"{shown(one.name)} is {_described(one, first, other)}" for one in (first, other)]
        is_size = (ours.family.title, ours.family.found) == (theirs.family.title, theirs.family.found)
        what = "as many blocks" if is_size else "one family" if not ours.family.found else "the same blocks"
        raise IncompatibleModelsError(f"{' and '.join(said)}: only models of {what} can be merged")


def _described(model: Model, first: Model, other: Model) -> str:
    """What messages call a model's family, with its blocks where nothing else tells it from the other."""
    family = model.anatomy.family
    if first.anatomy.family.title != other.anatomy.family.title:
        return family.title
    sizes = [(one.path, one.count) for one in family.found] or [
        (one.paths["ldm"], count)
        for one, count in zip(family.lists, family.counts, strict=True)
        if one.has_blocks
    ]
    return f"{family.title} with {' and '.join(f'{count} {shown(path)}' for path, count in sizes)}"


def check_unets(models: Sequence[Model]) -> None:
    """Raise IncompatibleModelsError for U-Nets of different tensors, but for what A alone has beside those of
    its family.
    """
    unets = list(map(_unet_of, models))
    # Of what is not known, nothing is more ordinary than the rest.
    family = models[0].anatomy.family
    ordinary = set[str]().union(*unets) if family.takes_any_name else _ordinary(family)
    # What not all files have is used by none, and may come from any.
    needed = [{name for name in unet if not matches(family.optional, name)} for unet in unets]
    if damaged := _damaged(models):
        raise IncompatibleModelsError("; ".join(damaged))
    faults = _cut_differently(models) or [
        *_lacking(models, [unet & ordinary for unet in unets]),
        *_added(
            models[0],
            models[1:],
            needed[0] - ordinary,
            [unet - ordinary - needed[0] for unet in needed[1:]],
        ),
    ]
    if faults:
        raise IncompatibleModelsError(f"{names_of(models)} cannot be merged: {'; '.join(faults)}")


def _ordinary(family: Family) -> Set[str]:
    """What every model of a family has: its layout, without what not all files have."""
    return {name for name in family.unet if not matches(family.optional, name)}


def _damaged(models: Sequence[Model]) -> list[str]:
    """Say which transformers lack tensors that all of their family have: those were lost, not left out."""
    return [
        f"{shown(model.name)} is not a whole {family.title} {family.core_title}: it lacks "
        f"{counted(len(missing), 'tensor')} ({listing(missing)})"
        for model in models
        if (family := model.anatomy.family).lists
        and (missing := [name for name in model.anatomy.standing.missing if not family.may_lack(name)])
    ]


def _cut_differently(models: Sequence[Model]) -> list[str]:
    """Say which models lack layers that others have, since they were made without them."""
    if len({model.anatomy.standing.missing for model in models}) == 1:
        return []
    return [
        f"{shown(model.name)} is {standing.said}, made without "
        f"{counted(len(standing.missing), 'tensor')} of the {model.anatomy.family.core_title} "
        f"({listing(standing.missing)}): it merges "
        "only with models that lack the same"
        for model in models
        if (standing := model.anatomy.standing).is_cut
    ]


def _lacking(models: Sequence[Model], unets: Sequence[Set[str]]) -> list[str]:
    whole = set[str]().union(*unets)
    others = "the others" if len(unets) > 2 else "the other"
    return [
        f"{shown(model.name)} lacks {counted(len(whole - unet), _core_tensor(model))} of {others} "
        f"({listing(_shown_names(model, whole - unet))})"
        for model, unet in reversed(list(zip(models, unets, strict=True)))
        if whole - unet
    ]


def _added(a: Model, models: Sequence[Model], own: Set[str], added: Sequence[Set[str]]) -> list[str]:
    """Say what models have that A, which decides what the output is, has not."""
    return [
        f"{shown(model.name)} has {counted(len(names), _core_tensor(model))} that {shown(a.name)} lacks "
        f"({listing(_shown_names(model, names))}){_which(model)}: "
        + ("both have some of their own" if own - _unet_of(model) else "give it as the first model")
        for model, names in zip(models, added, strict=True)
        if names
    ]


def _shown_names(model: Model, names: Iterable[str]) -> list[str]:
    """Names for messages: of a model of no known family, without a prefix that only matching gives them."""
    prefix = UNET_PREFIX if model.anatomy.family.takes_any_name else ""
    return sorted(name.removeprefix(prefix) for name in names)


def _core_tensor(model: Model) -> str:
    return f"{model.anatomy.family.core_title} tensor"


def _unet_of(model: Model) -> Set[str]:
    return {name for name in model.tensors if component_of(name) == "unet" and not is_prediction_marker(name)}


def _which(model: Model) -> str:
    said = model.anatomy.standing.said
    return f", since it is {said}" if said else ""

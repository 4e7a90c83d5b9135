"""What the user is told of the decisions: notes about everything that was decided for them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from blockmerge.anatomy import TITLES, component_of, is_prediction_marker, layout_gaps
from blockmerge.checkpoints import DiffusersFolder, Model, in_cache, read, state_dict_name, told_prediction
from blockmerge.errors import counted, listing, shown
from blockmerge.expressions import Expression, Held
from blockmerge.merging.planning.combining import quantised_as
from blockmerge.merging.planning.decisions import Decision, Findings, VaeFile
from blockmerge.merging.planning.naming import OutputTensor, what_it_is
from blockmerge.merging.planning.request import MergeRequest, Resolved
from blockmerge.weights import BlockWeights

_LARGEST_MARKER = 4096  # bytes


def describe(
    models: Sequence[Model],
    request: MergeRequest,
    resolved: Resolved,
    decisions: Sequence[Decision],
    found: Findings,
    naming: str,
    written: Sequence[OutputTensor] | None = None,
) -> list[str]:
    """Return notes, a sentence each, on models, components, tensors, weights and dtypes, in this order; of a
    stage, from which nothing is `written`, without those that only a result needs.
    """
    notes = [
        *_same_files(models),
        *(note for model in models for note in model.notes),
        *_vae(models, request, found.vae, is_stage=written is None),
        *_standings(models),
        *_input_channels(models, decisions),
        *_components(models, request, found.vae),
        *_ema(models, request),
        *_kept(models, request, found),
        *_tensors(models, found, naming),
        *_rules(found),
        *_clip_and_adjust(models, request, found),
        *differing_predictions(models),
        *_weights(resolved.weights, resolved.beta),
        *_casts(decisions, written or ()),
    ]
    return list(dict.fromkeys(notes))


def _same_files(models: Sequence[Model]) -> Iterator[str]:
    places: dict[str, list[str]] = {}
    for number, model in enumerate(models):
        if model.source.path is not None and model.is_file:
            letter = state_dict_name(number).removeprefix("state dict ")
            places.setdefault(os.path.realpath(model.source.path), []).append(letter)
    for letters in places.values():
        if len(letters) > 1:
            yield f"{', '.join(letters[:-1])} and {letters[-1]} are the same file"


def _vae(
    models: Sequence[Model], request: MergeRequest, vae: Model | VaeFile | None, *, is_stage: bool
) -> Iterator[str]:
    if isinstance(vae, VaeFile):
        source, name = vae.source, vae.source.name
        # The folder of a VAE alone is called "vae".
        if isinstance(source, DiffusersFolder) and "" in source.components and not in_cache(source.path):
            name = os.path.join(os.path.basename(os.path.dirname(os.path.abspath(source.path))), name)
        yield f"the VAE is {shown(name)}"
        yield from (f"{shown(name)} {note}" for note in source.notes)
        return
    holders = sum("vae" in model.components for model in models)
    if vae is not None and request.vae == "auto" and holders > 1 and not is_stage:
        blend = " (merge --vae blend would blend it)" if holders == len(models) else ""
        yield f"the VAE is taken whole from {shown(vae.vae_name)}{blend}"


def _standings(models: Sequence[Model]) -> Iterator[str]:
    for model in models:
        standing = model.anatomy.standing
        if standing.said:
            yield f"{shown(model.name)} is {standing.said}"
        if standing.is_damaged:
            lacking = counted(len(standing.missing), f"{model.anatomy.family.core_title} tensor")
            yield f"warning: {shown(model.name)} lacks {lacking} ({listing(standing.missing)})"
        yield from _incomplete(model)


def _incomplete(model: Model) -> Iterator[str]:
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    for component in sorted(model.components - {"unet", "ema", "other"}):
        missing = layout_gaps(shapes, model.anatomy.family, component).missing
        if missing:
            lacking = f"{counted(len(missing), 'tensor')} of the {model.anatomy.family.titles[component]}"
            yield f"warning: {shown(model.name)} lacks {lacking} ({listing(missing)})"


def _input_channels(models: Sequence[Model], decisions: Sequence[Decision]) -> Iterator[str]:
    a = models[0]
    layer = a.anatomy.family.input_layer
    made = next((one.expression.shape for one in decisions if one.ldm == layer), ())
    own = a.tensors[layer].shape if layer in a.tensors else made
    if made != own and len(made) > 1:
        others = [model.name for model in models[1:] if model.tensors[layer].shape == made]
        more = f"{made[1]} input channels, not the {own[1]} of {shown(a.name)}"
        yield f"the output has {more}: the others are those of {shown(others[0])}"


def _components(models: Sequence[Model], request: MergeRequest, vae: Model | VaeFile | None) -> Iterator[str]:
    for component in sorted(set[str]().union(*(model.components for model in models)) - {"other", "unet"}):
        holders = [model for model in models if component in model.components]
        is_said = isinstance(vae, VaeFile) or (len(holders) > 1 and request.vae != "blend")
        if len(holders) == len(models) or (component == "vae" and is_said):
            continue
        stale = ", as it was: it does not follow the merge" if component == "ema" else ""
        yield f"the {TITLES.get(component, component)} is {_only_in(holders)}{stale}"


def _only_in(holders: Sequence[Model]) -> str:
    first, only = shown(holders[0].name), ", ".join(shown(model.name) for model in holders)
    return f"only in {only} and copied from {'there' if len(holders) == 1 else first}"


def _ema(models: Sequence[Model], request: MergeRequest) -> Iterator[str]:
    for model in models:
        if model.ema_tensors:
            has_unet = any(component_of(name) == "unet" for name in model.source.tensors)
            stale = ", which would be stale" if has_unet and request.changes_values else ""
            left_out = f"left out {counted(len(model.ema_tensors), 'EMA tensor')} of {shown(model.name)}"
            yield f"{left_out}{stale} ({listing(model.ema_tensors)})"


def _kept(models: Sequence[Model], request: MergeRequest, found: Findings) -> Iterator[str]:
    if found.kept_tables:
        tables = _tensors_are(len(found.kept_tables), "table")
        yield f"{tables} the same in all models and copied ({listing(found.kept_tables)})"
    if found.kept_encoders:
        kept = f"the text encoders ({counted(len(found.kept_encoders), 'tensor')}) are those of"
        why = ": models of this family use them as they were published"
        hint = (
            f"{why} (merge --text-encoder blend would blend them)" if request.text_encoder == "auto" else ""
        )
        yield f"{kept} {shown(models[0].name)}{hint}"


def _tensors(models: Sequence[Model], found: Findings, naming: str) -> Iterator[str]:
    for holders, names in found.only_in.items():
        yield f"{_tensors_are(len(names))} {_only_in(holders)} ({listing(names)})"
    for names, what in ((found.homeless, ""), (found.homeless_unknown, " unknown to blockmerge")):
        if names:
            left_out = f"{counted(len(names), 'tensor')}{what} left out"
            yield f"{left_out}, which {what_it_is(naming)} has no place for ({listing(names)})"
    if found.pruned:
        left_out = f"{counted(len(found.pruned), 'tensor')} left out"
        yield f"{left_out}, which no loader needs ({listing(found.pruned)})"
    if found.unknown:
        unknown = f"{_tensors_are(len(found.unknown))} unknown to blockmerge, and kept unchanged"
        yield f"{unknown}, from the first model with that name ({listing(found.unknown)})"
    if found.lost_with_a_vae:
        lost = f"{_tensors_are(len(found.lost_with_a_vae))} unknown to blockmerge, and left out"
        yield f"{lost} with a VAE that is not taken ({listing(found.lost_with_a_vae)})"
    if found.kept:
        kept = _tensors_are(len(found.kept), "integer or schedule tensor")
        yield f"{kept} copied from {shown(models[0].name)}"
    if found.mixed:
        mixed = f"{_tensors_are(len(found.mixed))} stored as floats in some models only"
        yield f"{mixed}, and copied from the first that has them ({listing(found.mixed, width=300)})"
    for model, names in found.only_of_shape.items():
        several = f"{_tensors_are(len(names))} of several shapes"
        yield f"{several}, and copied from {shown(model.name)} ({listing(names)})"
    if found.restored:
        yield f"broken position_ids restored to 0, 1, 2, … ({listing(found.restored)})"


def _rules(found: Findings) -> Iterator[str]:
    counts = found.rules.counts(found.blended)
    if counts:
        rules, tensors = counted(len(counts), "element rule"), counted(sum(counts.values()), "tensor")
        yield f"{rules} {'sets' if len(counts) == 1 else 'set'} the weight of {tensors} ({listing(counts)})"
    idle = found.rules.idle(found.blended)
    overruled = [str(rule) for rule, _ in found.rules.rules if str(rule) not in {*counts, *idle}]
    for without, why in ((idle, "no merged tensor fits"), (overruled, "later rules take all these tensors")):
        if without:
            rules = f"{counted(len(without), 'element rule')} {'has' if len(without) == 1 else 'have'}"
            yield f"{rules} no effect, since {why}: {listing(without)}"


def _clip_and_adjust(models: Sequence[Model], request: MergeRequest, found: Findings) -> Iterator[str]:
    if found.clipped:
        between = f"between {shown(models[0].name)} and {shown(models[1].name)}"
        yield f"clip keeps {counted(len(found.clipped), 'tensor')} {between}"
    elif request.clip:
        yield "clip (--clip) has no effect, since every value is A's or B's"
    if found.adjusted:
        yield f"adjust {request.adjust} changes {counted(len(found.adjusted), 'tensor')}"


def differing_predictions(models: Sequence[Model]) -> Iterator[str]:
    """Warn of models whose markers differ, or whose metadata or schedulers say that they predict different
    things.
    """
    markers = [_markers_of(model) for model in models]
    told = list(map(told_prediction, models))
    predicts = ["" if one is None else shown(f"predicts {one.prediction} by its {one.where}") for one in told]
    if any(found != markers[0] for found in markers):
        what = "markers"
        values = "" if any(found.keys() != markers[0].keys() for found in markers) else " of other values"
        said = [
            f"has {listing(found)}{values}" if found else f"has none{more and ' and ' + more}"
            for found, more in zip(markers, predicts, strict=True)
        ]
    elif len({one.prediction for one in told if one is not None}) > 1:
        what, said = "types", [one or "does not say" for one in predicts]
    else:
        return
    named = [f"{shown(model.name)} {one}" for model, one in zip(models, said, strict=True)]
    differ = f"warning: prediction {what} differ ({'; '.join(named)})"
    yield f"{differ}: U-Nets of different prediction types do not blend"


def _markers_of(model: Model) -> dict[str, bytes]:
    """{marker: its bytes}, in order; they are a few numbers, or none."""
    markers = sorted(name for name in model.tensors if is_prediction_marker(name))
    return {
        name: read(tensor) if (tensor := model.tensors[name]).nbytes <= _LARGEST_MARKER else b""
        for name in markers
    }


def _weights(weights: BlockWeights, beta: BlockWeights) -> Iterator[str]:
    for which, given in (("weights", weights), ("weights for beta", beta)):
        outside = [block for block, weight in given.items() if weight is not None and not 0 <= weight <= 1]
        if outside:
            yield f"{which} outside 0 to 1 go beyond the models: {listing(outside)}"


def _casts(decisions: Sequence[Decision], written: Sequence[OutputTensor]) -> Iterator[str]:
    inputs = {one.ldm: one.inputs for one in decisions}
    dtypes = Counter((given, one.dtype) for one in written for given in set(map(_stored_as, inputs[one.ldm])))
    casts = {pair: count for pair, count in dtypes.items() if pair[0] != pair[1]}
    for (given, wanted), count in sorted(casts.items()):
        yield f"{_tensors_are(count)} converted from {given} to {wanted}"


def _stored_as(tensor: Expression) -> str:
    if isinstance(tensor, Held):
        return tensor.kept
    codes = quantised_as(tensor)
    return tensor.dtype if codes is None else f"scaled {codes}"


def _tensors_are(count: int, noun: str = "tensor") -> str:
    return f"{counted(count, noun)} {'is' if count == 1 else 'are'}"

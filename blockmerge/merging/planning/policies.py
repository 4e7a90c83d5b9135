"""What becomes of every tensor: the policies, applied to names, dtypes and shapes.

Files and state dicts share this, so that both merge alike. Everything is decided under LDM names, whatever
the models' own; `naming.py` then gives each tensor the name, and the arrangement, that it has in the output.
What is decided is in `docs/policies.md`; what it means for the user, in notes, is in `describing.py`. Of the
data only a few small tensors are read: `position_ids`, markers.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Self

from blockmerge.anatomy import (
    component_of,
    is_leftover,
    is_position_ids,
    is_prediction_marker,
    layout_gaps,
    matches,
    plain_names_of_ema,
)
from blockmerge.checkpoints import (
    Checkpoint,
    CheckpointLike,
    Model,
    embedding_of,
    fault_of_position_ids,
    names_of,
    other_kind_of,
    positions_beside,
    vae_tensors,
)
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import CheckpointError, IncompatibleModelsError, listing, shown
from blockmerge.expressions import Expression, Gathered, Held, Known, simplify
from blockmerge.merging.planning.adapting import Adapted, lost_in_rounding
from blockmerge.merging.planning.alike import check_families, check_unets
from blockmerge.merging.planning.combining import Combination, Weights, kept_dtype, rounded, widest_input
from blockmerge.merging.planning.decisions import Decision, Decisions, Findings, VaeFile
from blockmerge.merging.planning.describing import describe
from blockmerge.merging.planning.equal_tables import are_equal
from blockmerge.merging.planning.naming import OutputTensor, folders_of, has_place, named, what_it_is
from blockmerge.merging.planning.request import MergeRequest, Resolved
from blockmerge.merging.result import Counts
from blockmerge.weights import BlockWeights, Change


def decide(
    models: Sequence[Model],
    request: MergeRequest,
    resolved: Resolved,
    naming: str | None = None,
    *,
    adapted: Adapted,
    names_components: bool = False,
) -> Decisions:
    """Apply the policies; the output has the names of `naming`, by default A's, spelled as an `Output` of
    such `names_components` says.

    Raises IncompatibleModelsError, naming the first few tensors and counting the rest, for U-Nets of
    different tensors or shapes, floats in one model only, and a VAE that was asked for and is not there.
    """
    naming = naming or models[0].anatomy.naming
    policies = Policies.of(models, request, resolved, naming, adapted)
    decisions = policies.decide()
    tensors, lost = named(
        {one.ldm: one.expression for one in decisions}, models[0], naming, names_components=names_components
    )
    if twice := [name for name, count in Counter(one.name for one in tensors).items() if count > 1]:
        # The last guard before a file that no reader opens.
        raise IncompatibleModelsError(
            f"{names_of(models)} cannot be merged: two tensors of the output would be called {listing(twice)}"
        )
    _check_components(models, tensors, output_naming=naming)
    notes = describe(models, request, resolved, decisions, policies.found, naming, tensors)
    return Decisions(
        tuple(OutputTensor(one.name, one.ldm, simplify(one.expression)) for one in tensors),
        (*policies.sources, *adapted.sources),
        policies.vae_file,
        _counts(models, decisions, len(policies.found.left_out), len(tensors)),
        (*notes, *lost, *adapted.notes, *lost_in_rounding(adapted.changes, decisions)),
    )


def _check_components(models: Sequence[Model], tensors: Sequence[OutputTensor], output_naming: str) -> None:
    """The last guard before an output without a VAE that a model had, or the like."""
    held = {component_of(one.ldm) for one in tensors}
    had = set[str]().union(*(model.components for model in models)) - {"other", "ema"}
    if lost := sorted(had - held):
        whose = next(model for model in models if lost[0] in model.components)
        names = [name for name in whose.tensors if component_of(name) == lost[0]]
        title = whose.anatomy.family.titles[lost[0]]
        raise IncompatibleModelsError(
            f"the {title} of {shown(whose.name)} has names ({listing(names)}) that "
            f"{what_it_is(output_naming)} has no place for: give another naming "
            "(--to, of merge, bake and convert)"
        )


def looked_at(models: Sequence[Model]) -> Iterator[tuple[Expression, ...]]:
    """Yield the tensors that methods look at which look at whole models: those of all models that have one
    name.

    They are floats of one shape; the VAE, EMA copies, and markers, which hold nothing, are left out.
    """
    family = models[0].anatomy.family
    for name in models[0].tensors:
        if component_of(name) == "vae" or not family.knows(name) or is_position_ids(name):
            continue
        if component_of(name) == "unet" and matches(family.optional, name):  # which not all namings have
            continue
        found = tuple(model.tensors[name] for model in models if name in model.tensors)
        found = tuple(map(simplify, found))
        alike = len(found) == len(models) and len({one.shape for one in found}) == 1
        if alike and found[0].elements and all(one.dtype in FLOAT_DTYPES for one in found):
            yield found


class Policies:
    """The policies, for one merge: each tensor is asked about once, by its LDM name. `held` says in which
    dtype one of a stage is held until the result is rounded; without it, all are rounded.
    """

    @classmethod
    def of(
        cls,
        models: Sequence[Model],
        request: MergeRequest,
        resolved: Resolved,
        naming: str,
        adapted: Adapted,
        held: Callable[[str], str] | None = None,
    ) -> Self:
        """The policies of a merge whose output has that naming.

        Raises IncompatibleModelsError for models that do not merge.
        """
        check_families(models)
        check_unets(models)
        method, family = request.merge_method, models[0].anatomy.family
        combination = Combination.of(method, family, resolved.numbers, clip=request.clip)
        figures = Gathered(method, tuple(looked_at(models))) if method.locality == "model" else None
        combination = replace(combination, figures=figures, changes=adapted.changes)
        policies = cls(models, request, resolved, combination, naming, held)
        request.opening.check(models, [one.source for one in policies.donors if isinstance(one, VaeFile)])
        return policies

    def __init__(
        self,
        models: Sequence[Model],
        request: MergeRequest,
        resolved: Resolved,
        combination: Combination,
        naming: str,
        held: Callable[[str], str] | None,
    ) -> None:
        self.models, self.request, self.naming, self.held = models, request, naming, held
        self.weights, self.beta, self.combination = resolved.weights, resolved.beta, combination
        self.family = models[0].anatomy.family
        self.rules = request.rules.resolve(self.family)
        self.vae = _choose_vae(models, request, resolved.weights)
        self.found = Findings(self.vae, self.rules)
        self.adjust = request.adjust if request.adjust else None
        self.keeps_text_encoders = len(models) > 1 and request.keeps_text_encoders(self.family)
        self.donors: list[Model | VaeFile] = [*models]
        if isinstance(self.vae, VaeFile):
            self.donors.append(self.vae)
        self.folders = folders_of(self.family, models)
        self.names = tuple(dict.fromkeys(name for donor in self.donors for name in donor.tensors))
        self.plain_of_ema = plain_names_of_ema(self.names)

    @property
    def vae_file(self) -> Checkpoint | None:
        """The VAE's own file, where there is one."""
        return self.vae.source if isinstance(self.vae, VaeFile) else None

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """All that is read, each once."""
        found = (source for donor in self.donors for source in donor.sources)
        return tuple(dict.fromkeys(found))

    def decide(self) -> list[Decision]:
        """What becomes of each tensor. Raises IncompatibleModelsError for those that cannot be merged."""
        decisions = [self._decide_one(name) for name in self.names]
        if self.found.faults:
            faults = listing(self.found.faults, width=300)
            done = "merged" if self.request.changes_values else "converted"
            raise IncompatibleModelsError(f"{names_of(self.models)} cannot be {done}: {faults}")
        return [decision for decision in decisions if decision is not None]

    def _decide_one(self, name: str) -> Decision | None:
        holders = [model for model in self.models if name in model.tensors]
        if self._is_left_out(name, holders):
            self.found.left_out.append(name)
            return None
        whole = self._of_whole_component(name, holders)
        if whole is not None:
            return whole
        if is_prediction_marker(name):
            return self._taken(name, self.models[0], keeps_dtype=True)
        if is_position_ids(name):
            return self._position_ids(name, holders)
        if not self._is_known(name):
            self.found.unknown.append(name)
            return self._taken(name, holders[0], keeps_dtype=True)
        floats = sum(model.tensors[name].dtype in FLOAT_DTYPES for model in holders)
        is_ema = component_of(name) == "ema" and name not in self.plain_of_ema
        if floats == 0 or is_leftover(name) or is_ema:
            if len(holders) == len(self.models) > 1:
                self.found.kept.append(name)
            return self._taken(name, holders[0], keeps_dtype=True)
        if floats < len(holders):
            return self._mixed(name, holders)
        if len(holders) < len(self.models):
            return self._only_in(name, holders)
        return self._merged(name)

    def _of_whole_component(self, name: str, holders: Sequence[Model]) -> Decision | None:
        """A tensor of a component that is taken whole: a VAE, or text encoders that nobody trains."""
        component = component_of(name)
        if component == "vae" and self.vae is not None:
            known = self._is_known(name)
            if not known:
                self.found.unknown.append(name)
            return self._taken(name, self.vae, keeps_dtype=not known)
        if self.keeps_text_encoders and component.startswith("text_encoder"):
            if holders[0] is not self.models[0]:
                self.found.only_in.setdefault(tuple(holders), []).append(name)
            elif len(holders) > 1:
                self.found.kept_encoders.append(name)
            is_known = self._is_known(name) and not is_position_ids(name)
            return self._taken(name, holders[0], keeps_dtype=not is_known)
        return None

    def _is_left_out(self, name: str, holders: Sequence[Model]) -> bool:
        """Whether the output has no place for a tensor, nobody needs it, or whoever decides of it has
        none.
        """
        if not has_place(name, self.naming, self.family, self.folders):
            (self.found.homeless if self._is_known(name) else self.found.homeless_unknown).append(name)
            makes = [one.title for one in self.family.derivatives if one.has(name)]
            # What models may lack is used by none.
            is_used = component_of(name) == "unet" and not matches(self.family.optional, name)
            if makes or is_used:
                what = (
                    f"makes the model {makes[0]}" if makes else f"is a part of the {self.family.core_title}"
                )
                where = what_it_is(self.naming)
                self.found.faults.append(f"{shown(name)} ({what}, and {where} has no place for it)")
            return True
        if self.request.prune and is_leftover(name):
            self.found.pruned.append(name)
            return True
        if component_of(name) == "vae" and self.vae is not None:
            is_left_out = name not in self.vae.tensors
            if is_left_out and not self._is_known(name):
                self.found.lost_with_a_vae.append(name)
            return is_left_out
        return is_prediction_marker(name) and name not in self.models[0].tensors

    def _is_known(self, name: str) -> bool:
        """Whether a tensor is one of the family's, an EMA copy, or a schedule."""
        name = self.plain_of_ema.get(name, name)
        is_special = component_of(name) == "ema" or is_leftover(name) or is_prediction_marker(name)
        return is_special or self.family.knows(name)

    def _merged(self, name: str) -> Decision | None:
        tensors = [model.tensors[name] for model in self.models]
        shapes = [one.shape for one in tensors]
        widest = widest_input(name, shapes, self.family)
        block, weights = self._weights_of(name)
        if len(set(shapes)) > 1 and widest is None:
            return self._of_several_shapes(name, block, self.combination.copied(weights))
        dtype = self.request.output_dtype or kept_dtype(tensors[0])
        if self.family.is_fixed(name) and len(tensors) > 1 and are_equal(tensors):
            self.found.kept_tables.append(name)
            return self._taken(name, self.models[0])
        self.found.blended.append((block, name))
        change = self._change(name, dtype, shapes[widest or 0])
        made = self.combination.combine(name, tensors, weights, self._held_in(name, dtype), change)
        if made.model is None and self.combination.clips:
            self.found.clipped.append(name)
        copied = None if self.combination.is_changed(name) else made.model
        donor = None if copied is None else self.models[copied]
        return Decision(name, _held(made.expression, dtype), made.inputs, donor)

    def _held_in(self, name: str, dtype: str) -> str:
        """The dtype in which a tensor is computed that has `dtype` in a file."""
        return dtype if self.held is None or dtype not in FLOAT_DTYPES else self.held(name)

    def _weights_of(self, name: str) -> tuple[str, Weights]:
        """The block of a tensor, and its weights."""
        plain_name = self.plain_of_ema.get(name, name)
        block = self.family.block_of(plain_name)
        return block, (self.rules.weight(block, plain_name, self.weights[block]), self.beta[block])

    def _of_several_shapes(self, name: str, block: str, copied: int | None) -> Decision | None:
        """A tensor that cannot be blended: A's where that is copied, and outside the U-Net another's, too."""
        if copied is not None and (copied == 0 or component_of(name) != "unet"):
            donor = self.models[copied]
            self.found.only_of_shape.setdefault(donor, []).append(name)
            return self._taken(name, donor)
        shapes = dict.fromkeys(str(list(model.tensors[name].shape)) for model in self.models)
        way_out = ""
        if component_of(name) == "vae":
            way_out = "; vae='a' (--vae a) takes the VAE of the first model as it is"
        elif "alpha" in self.request.merge_method.weights:
            way_out = f"; {block}=skip leaves its block out"
        self.found.faults.append(f"{shown(name)} (shapes differ: {shown(', '.join(shapes))}{way_out})")
        return None

    def _taken(self, name: str, donor: Model | VaeFile, *, keeps_dtype: bool = False) -> Decision:
        tensor = donor.tensors[name]
        dtype = kept_dtype(tensor)
        if not keeps_dtype and dtype in FLOAT_DTYPES:
            of_a = kept_dtype(self.models[0].tensors.get(name, tensor))
            dtype = self.request.output_dtype or (of_a if of_a in FLOAT_DTYPES else dtype)
        change = self._change(name, dtype, tensor.shape)
        expression = self.combination.finished(
            name, change, self._held_in(name, dtype), [tensor], lambda dtype: rounded(tensor, dtype)
        )
        copied = None if self.combination.is_changed(name) else donor
        return Decision(name, _held(expression, dtype), (tensor,), copied)

    def _mixed(self, name: str, holders: Sequence[Model]) -> Decision | None:
        """A tensor that holds floats in one model and something else in another, which cannot be blended."""
        dtypes = " and ".join(dict.fromkeys(model.tensors[name].dtype for model in holders))
        if component_of(name) == "unet":
            self.found.faults.append(f"{shown(name)} (dtypes do not blend: {dtypes})")
            return None
        self.found.mixed.append(f"{shown(name)} is {dtypes}")
        return self._taken(name, holders[0], keeps_dtype=True)

    def _only_in(self, name: str, holders: Sequence[Model]) -> Decision:
        component = component_of(name)
        others = [model for model in self.models if model not in holders]
        if component == "other" or any(component in model.components for model in others):
            self.found.only_in.setdefault(tuple(holders), []).append(name)
        return self._taken(name, holders[0])

    def _position_ids(self, name: str, holders: Sequence[Model]) -> Decision:
        donor = holders[0]
        tensor = donor.tensors[name]
        positions = self._positions(name, holders)
        if fault_of_position_ids(tensor, positions) is not None:
            own = positions_beside(name, donor.tensors)
            if own == positions or fault_of_position_ids(tensor, own) is not None:
                self.found.restored.append(name)
        elif tensor.dtype not in FLOAT_DTYPES or not self.request.restores_position_ids:
            return self._taken(name, donor, keeps_dtype=True)
        return Decision(name, Known(struct.pack(f"<{positions}q", *range(positions)), "I64", (1, positions)))

    def _positions(self, name: str, holders: Sequence[Model]) -> int:
        """How many rows the output's embedding of positions has."""
        embedding = embedding_of(name)
        having = [model for model in self.models if embedding in model.tensors]
        if len(having) == len(self.models):  # where they differ, one of them is copied
            copied = self.combination.copied(self._weights_of(embedding)[1])
            having = [self.models[copied or 0]]
        return positions_beside(name, (having or holders)[0].tensors)

    def _change(self, name: str, dtype: str, shape: tuple[int, ...]) -> Change | None:
        """What `adjust` does to a tensor of the output."""
        if self.adjust is None or dtype not in FLOAT_DTYPES:
            return None
        change = self.adjust.for_tensor(name, self.family)
        if change and change.shift and shape != (len(change.shift),):
            self.found.faults.append(
                f"{shown(name)} (shape {list(shape)}: adjust sets the colours of 4 channels)"
            )
            return None
        if change is not None:
            self.found.adjusted.append(name)
        return change


def _held(tensor: Expression, dtype: str) -> Expression:
    """A tensor that is computed in some dtype and has `dtype` in a file."""
    return tensor if tensor.dtype == dtype else Held(tensor, dtype)


def _counts(models: Sequence[Model], decisions: Sequence[Decision], left_out: int, written: int) -> Counts:
    taken = Counter(decision.donor for decision in decisions)
    of_models = [0 if model in models[:number] else taken[model] for number, model in enumerate(models)]
    from_a, from_b, from_c = (*of_models, 0, 0)[:3]
    return Counts(
        computed=taken[None],
        from_a=from_a,
        from_b=from_b,
        from_c=from_c,
        from_others=sum(of_models[3:]),
        from_vae=sum(count for donor, count in taken.items() if isinstance(donor, VaeFile)),
        dropped=left_out + sum(len(model.ema_tensors) for model in models),
        written=written,
    )


# -- the VAE -------------------------------------------------------------------------------------------------


def _choose_vae(
    models: Sequence[Model], request: MergeRequest, weights: BlockWeights
) -> Model | VaeFile | None:
    """Return whose VAE is taken as a whole, or None where it follows BASE like all else."""
    has_vae = [model for model in models if "vae" in model.components]
    match request.vae_choice(len(models)):
        case int(number):
            if models[number] not in has_vae:
                raise IncompatibleModelsError(
                    f"{shown(models[number].name)} has no VAE: give another as vae (--vae)"
                )
            return models[number]
        case "blend" if len(has_vae) == len(models) and request.changes_values:
            return None
        case "blend" | "auto" if len(has_vae) < 2:
            return has_vae[0] if has_vae else None
        case "blend":  # what not all models have is the first one's
            return has_vae[0]
        case "auto":
            weight_one_is_b = request.merge_method.copies(1.0, 0.0) == 1
            base = weights["BASE"]
            return has_vae[1] if weight_one_is_b and base is not None and base > 0.5 else has_vae[0]
        case file:
            return _open_vae(file, models, request)


def _open_vae(vae: CheckpointLike, models: Sequence[Model], request: MergeRequest) -> VaeFile:
    try:
        checkpoint = request.opening.checkpoint(vae)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_vae_takes(models, request)}") from error
    family = models[0].anatomy.family
    tensors = vae_tensors(checkpoint, family)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    gaps = layout_gaps(shapes, family, "vae")
    # Without a layout, tensors that were found are surely this family's.
    is_another = family.arms or not tensors
    if gaps.missing and is_another and (kind := other_kind_of(checkpoint)) is not None:
        raise CheckpointError(f"{shown(checkpoint.name)} {kind}; {_vae_takes(models, request)}")
    if gaps.missing:
        raise IncompatibleModelsError(
            f"{shown(checkpoint.name)} is not a complete VAE: it lacks {listing(gaps.missing)}"
        )
    if not tensors:
        what = other_kind_of(checkpoint) or "holds no VAE"
        raise CheckpointError(f"{shown(checkpoint.name)} {what}; {_vae_takes(models, request)}")
    of_models = {name: tensor.shape for model in reversed(models) for name, tensor in model.tensors.items()}
    wrong = [
        name
        for name, shape in shapes.items()
        if name in gaps.misshapen or of_models.get(name, shape) != shape
    ]
    if wrong:
        raise IncompatibleModelsError(f"{shown(checkpoint.name)} is a VAE of another shape: {listing(wrong)}")
    return VaeFile(checkpoint, tensors)


def _vae_takes(models: Sequence[Model], request: MergeRequest) -> str:
    return f"vae (--vae) takes {request.vae_choices(len(models))}a file or a folder"

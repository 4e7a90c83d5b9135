"""What becomes of every tensor: the policies, applied to names, dtypes and shapes alone.

Files and state dicts share this, so that both merge alike. Everything is decided under LDM names, whatever
the models' own; the last step gives each tensor the place and the name that it has in the output. What it
decides is in `docs/policies.md`.
"""

from __future__ import annotations

import os
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from blockmerge.anatomy import (
    DIFFUSERS_UNET_PREFIX,
    TITLES,
    UNET_PREFIX,
    Relation,
    block_of,
    component_of,
    is_leftover,
    is_position_ids,
    is_prediction_marker,
    is_schedule,
    layout_gaps,
    plain_names_of_ema,
    relation_of,
)
from blockmerge.checkpoints import (
    FLOAT_DTYPES,
    POSITIONS,
    Checkpoint,
    DiffusersFolder,
    Model,
    TensorInfo,
    View,
    fault_of_position_ids,
    open_checkpoint,
    state_dict_name,
    vae_view,
)
from blockmerge.errors import CheckpointError, IncompatibleModelsError, RecipeError, counted, listing, shown
from blockmerge.merging.planning.request import MergeRequest
from blockmerge.merging.result import Counts
from blockmerge.weights import BlockWeights, Change

VAE_FILE = -1
"""Stands for the stand-alone VAE file among the numbers of the models."""

SHARED_CHANNELS = 4
"""The input channels that the U-Nets of all variants have in common: the latent image's."""

FIRST_CONVOLUTION = UNET_PREFIX + "input_blocks.0.0.weight"


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one tensor of the output.

    `name` is its name in the output, `ldm` the LDM tensor that it is or is a part of, and `key` what the
    sources' views call it. `sources` are the models it is read from (0 = A, 1 = B, …, VAE_FILE). With `alpha`
    it is computed by the method, without it is the one source's, cast to `dtype` where that differs; with
    `literal` it is those bytes. `wider` is the model whose additional input channels are kept, where only the
    first four are merged; `change` is what `adjust` does.
    """

    name: str
    ldm: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[int, ...]
    alpha: float | None = None
    beta: float | None = None
    literal: bytes | None = None
    wider: int | None = None
    change: Change | None = None


@dataclass(frozen=True)
class Decisions:
    """All tensors of the output in A's order, then what only others have; counts and notes.

    `views` are the sources under the output's names, `ldm` the models under LDM's, which methods that look at
    more than single elements are defined on.
    """

    tensors: tuple[Decision, ...]
    views: Mapping[int, View]
    ldm: Mapping[int, View]
    counts: Counts
    notes: tuple[str, ...]

    def info(self, source: int, decision: Decision) -> TensorInfo:
        """Where a source holds a tensor's values."""
        return self.views[source].tensors[decision.key]

    @property
    def checkpoints(self) -> Mapping[int, Checkpoint]:
        """What the sources are read from."""
        return {number: view.checkpoint for number, view in self.views.items()}


def decide(
    models: Sequence[Model],
    recipe: MergeRequest,
    weights: BlockWeights,
    beta: BlockWeights | None = None,
    naming: str | None = None,
    *,
    names_components: bool = False,
) -> Decisions:
    """Apply the policies; the output has the names of `naming`, by default A's, spelled as an `Output` of
    such `names_components` says.

    Raises IncompatibleModelsError, naming the first few tensors and counting the rest, when U-Nets hold
    different tensors, or floats in one model only, when shapes differ, or the VAE that was asked for is not
    there.
    """
    return _Judge(
        models, recipe, weights, beta, naming or models[0].anatomy.naming, names_components
    ).decide()


@dataclass
class _Judge:
    models: Sequence[Model]
    recipe: MergeRequest
    weights: BlockWeights
    beta: BlockWeights | None
    naming: str
    names_components: bool
    notes: list[str] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    restored: list[str] = field(default_factory=list)
    homeless: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    only_in: dict[tuple[int, ...], list[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    ruled: list[tuple[str, str]] = field(default_factory=list)

    def decide(self) -> Decisions:
        _check_kinds(self.models)
        if self.recipe.ema == "use" and not any(
            plain_names_of_ema(model.source.tensors) for model in self.models
        ):
            raise IncompatibleModelsError(
                f"no EMA copies to use in {self._names()}: leave out ema='use' (--ema use)"
            )
        self.family = self.models[0].anatomy.family.name
        self.views: dict[int, View] = {number: model.ldm for number, model in enumerate(self.models)}
        self.notes += _same_files(self.models)
        for model in self.models:
            self.notes += model.notes
        self.vae_source = self._choose_vae()
        self._check_unets()
        names = list(dict.fromkeys(name for view in self.views.values() for name in view.tensors))
        self.plain_of_ema = plain_names_of_ema(names)
        self.rules = self.recipe.rules.resolve(self.family)
        decisions = [decision for name in names if (decision := self._decide_one(name)) is not None]
        if self.recipe.adjust:
            decisions = list(map(self._adjusted, decisions))
        if self.faults:
            raise IncompatibleModelsError(
                f"{self._names()} cannot be merged: {listing(self.faults, width=300)}"
            )
        self._describe(decisions)
        counts = self._counts(decisions)
        if self.naming == "diffusers":
            decisions = self._in_diffusers(decisions)
        ldm = {number: model.ldm for number, model in enumerate(self.models)}
        counts = replace(counts, written=len(decisions))
        return Decisions(tuple(self._spelled(decisions)), self.views, ldm, counts, tuple(self.notes))

    # -- one tensor
    # -----------------------------------------------------------------------------------------------

    def _decide_one(self, name: str) -> Decision | None:
        component = component_of(name)
        holders = [number for number in range(len(self.models)) if name in self.views[number].tensors]
        if not self._has_place(name):
            self.homeless.append(name)
            return self._leave_out()
        if self.recipe.prune and is_leftover(name, self.models[holders[0] if holders else 0].anatomy.variant):
            self.pruned.append(name)
            return self._leave_out()
        if component == "vae" and self.vae_source is not None:
            return (
                self._take(name, self.vae_source)
                if name in self.views[self.vae_source].tensors
                else self._leave_out()
            )
        if is_prediction_marker(name):
            return self._take(name, 0, fixed_dtype=True) if 0 in holders else self._leave_out()
        if is_position_ids(name):
            return self._position_ids(name, holders[0])
        dtypes = [self.views[number].tensors[name].dtype for number in holders]
        floats = sum(dtype in FLOAT_DTYPES for dtype in dtypes)
        if floats == 0 or is_schedule(name) or (component == "ema" and name not in self.plain_of_ema):
            self.counted["kept"] += len(holders) == len(self.models) > 1
            return self._take(name, holders[0], fixed_dtype=True)
        if floats < len(holders):
            return self._mixed(name, component, " and ".join(dict.fromkeys(dtypes)), holders[0])
        if len(holders) < len(self.models):
            others = [model for number, model in enumerate(self.models) if number not in holders]
            if component == "other" or any(component in other.components for other in others):
                self.only_in.setdefault(tuple(holders), []).append(name)
            return self._take(name, holders[0])
        return self._merge(name)

    def _merge(self, name: str) -> Decision | None:
        shapes = [self.views[number].tensors[name].shape for number in range(len(self.models))]
        wider = None
        if len(set(shapes)) > 1:
            wider = _wider_first_convolution(self.plain_of_ema.get(name, name), shapes)
            if wider is None:
                said = ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
                self.faults.append(f"{shown(name)} (shapes differ: {shown(said)})")
                return None
        block = block_of(self.plain_of_ema.get(name, name), self.family)
        alpha = self.rules.weight(block, self.plain_of_ema.get(name, name), self.weights[block])
        beta = self.beta[block] if self.beta is not None else 0.0
        self.ruled.append((block, name))
        source = 0 if alpha is None or beta is None else self.recipe.merge_method.copies(alpha, beta)
        if self.recipe.clip and source not in (0, 1):  # C need not lie between A and B
            source = None
        dtype = self.recipe.output_dtype or self.views[0].tensors[name].dtype
        shape = shapes[wider or 0]
        if source is not None:
            return Decision(name, name, name, dtype, shape, (source,), wider=wider)
        return Decision(
            name, name, name, dtype, shape, tuple(range(len(self.models))), alpha, beta, wider=wider
        )

    def _adjusted(self, decision: Decision) -> Decision:
        if decision.dtype not in FLOAT_DTYPES:
            return decision
        change = self.recipe.adjust.for_tensor(decision.ldm, self.family)
        if change and change.shift and decision.shape != (len(change.shift),):
            self.faults.append(
                f"{shown(decision.ldm)} (shape {list(decision.shape)}: adjust sets the colours of 4 channels)"
            )
        return replace(decision, change=change)

    def _take(self, name: str, source: int, *, fixed_dtype: bool = False) -> Decision:
        info = self.views[source].tensors[name]
        dtype = info.dtype
        if not fixed_dtype and dtype in FLOAT_DTYPES:
            of_a = self.views[0].tensors.get(name, info).dtype
            dtype = self.recipe.output_dtype or (of_a if of_a in FLOAT_DTYPES else dtype)
        return Decision(name, name, name, dtype, info.shape, (source,))

    def _mixed(self, name: str, component: str, dtypes: str, source: int) -> Decision | None:
        """A tensor that holds floats in one model and something else in another, which cannot be blended."""
        if component == "unet":
            self.faults.append(f"{shown(name)} (dtypes do not blend: {dtypes})")
            return None
        self.mixed.append(f"{shown(name)} is {dtypes}")
        return self._take(name, source, fixed_dtype=True)

    def _leave_out(self) -> Decision | None:
        self.counted["dropped"] += 1
        return None

    def _position_ids(self, name: str, source: int) -> Decision:
        decision = self._take(name, source, fixed_dtype=True)
        if fault_of_position_ids(self.views[source], name) is not None:
            self.restored.append(name)
        elif not self.recipe.restores_position_ids or decision.dtype not in FLOAT_DTYPES:
            # Exact floats do no harm, and a merge has no business with them; converting puts them right.
            return decision
        literal = struct.pack(f"<{POSITIONS}q", *range(POSITIONS))
        return replace(decision, dtype="I64", shape=(1, POSITIONS), sources=(), literal=literal)

    # -- the models as wholes
    # -------------------------------------------------------------------------------------

    def _names(self) -> str:
        *first, last = [shown(model.name) for model in self.models]
        return f"{', '.join(first)} and {last}" if first else last

    def _check_unets(self) -> None:
        unets = [{name for name in model.tensors if component_of(name) == "unet"} for model in self.models]
        whole = set[str]().union(*unets)
        others = "the others" if len(unets) > 2 else "the other"
        lacking = [
            f"{shown(model.name)} lacks {counted(len(whole - unet), 'U-Net tensor')} of {others} "
            f"({listing(sorted(whole - unet))})"
            for model, unet in reversed(list(zip(self.models, unets, strict=True)))
            if whole - unet
        ]
        if lacking:
            raise IncompatibleModelsError(f"these models cannot be merged: {'; '.join(lacking)}")

    def _choose_vae(self) -> int | None:
        """Return the model that the VAE is taken from as a whole, or None where it follows BASE like all
        else.
        """
        vae = self.recipe.vae_choice(len(self.models))
        has_vae = [number for number, model in enumerate(self.models) if "vae" in model.components]
        if isinstance(vae, int):
            if vae not in has_vae:
                raise IncompatibleModelsError(
                    f"{shown(self.models[vae].name)} has no VAE: give another as vae (--vae)"
                )
            return vae
        if vae == "blend" or vae == "auto":
            if len(has_vae) < 2:
                return has_vae[0] if has_vae else None
            base = self.weights["BASE"]
            if vae == "blend":
                return None
            weight_one_is_b = self.recipe.merge_method.copies(1.0, 0.0) == 1
            chosen = has_vae[1] if weight_one_is_b and base is not None and base > 0.5 else has_vae[0]
            self.notes.append(
                f"the VAE is taken whole from {shown(self.models[chosen].name)} (--vae blend would blend it)"
            )
            return chosen
        return self._open_vae_file()

    def _open_vae_file(self) -> int:
        try:
            checkpoint = open_checkpoint(self.recipe.vae)
        except CheckpointError as error:
            choices = self.recipe.vae_choices(len(self.models))
            raise CheckpointError(f"{error}; vae (--vae) takes {choices}a file or a folder") from error
        view = vae_view(checkpoint)
        shapes = {name: info.shape for name, info in view.tensors.items()}
        gaps = layout_gaps(shapes, self.family, "vae")
        if gaps.missing:
            raise IncompatibleModelsError(
                f"{shown(checkpoint.name)} is no complete VAE: it lacks {listing(gaps.missing)}"
            )
        of_models = {
            name: info.shape for model in reversed(self.models) for name, info in model.tensors.items()
        }
        wrong = [
            name
            for name, shape in shapes.items()
            if name in gaps.misshapen or of_models.get(name, shape) != shape
        ]
        if wrong:
            raise IncompatibleModelsError(
                f"{shown(checkpoint.name)} is a VAE of another shape: {listing(wrong)}"
            )
        self.views[VAE_FILE] = view
        name = checkpoint.name
        if (
            isinstance(checkpoint, DiffusersFolder) and "" in checkpoint.components
        ):  # the folder of a VAE alone is called "vae"
            name = os.path.join(os.path.basename(os.path.dirname(os.path.abspath(checkpoint.path))), name)
        self.notes.append(f"the VAE is {shown(name)}")
        return VAE_FILE

    # -- the output's naming
    # --------------------------------------------------------------------------------------

    def _has_place(self, name: str) -> bool:
        if self.naming == "ldm":
            return "/" not in name
        return "/" in name or bool(relation_of(name, self.family).diffusers)

    def _in_diffusers(self, decisions: Sequence[Decision]) -> list[Decision]:
        """The same under diffusers' names: most tensors become one, some three, all read through the sources'
        other views.
        """
        source_of_vae = (
            {VAE_FILE: vae_view(self.views[VAE_FILE].checkpoint, "diffusers")}
            if VAE_FILE in self.views
            else {}
        )
        self.views = {**{n: model.view("diffusers") for n, model in enumerate(self.models)}, **source_of_vae}
        placed: dict[str, Decision] = {}
        doubles = []
        # A part that lacks its others keeps its own name; where another model has the whole, that goes first
        # and wins.
        for decision in sorted(decisions, key=lambda decision: "/" in decision.ldm):
            relation = (
                Relation((decision.ldm,)) if "/" in decision.ldm else relation_of(decision.ldm, self.family)
            )
            for place in relation.diffusers:
                shape = decision.shape
                if decision.sources and decision.wider is None:
                    shape = self.views[decision.sources[0]].tensors[place].shape
                if place in placed:
                    doubles.append(place)
                else:
                    placed[place] = replace(decision, name=place, key=place, shape=shape)
        if doubles:
            self.notes.append(
                f"{counted(len(doubles), 'tensor')} left out, since the output has others of that name "
                f"({listing(doubles)})"
            )
        of_a = self.views[
            0
        ].tensors  # A's order again: the parts of joined tensors do not stand side by side in every file
        return sorted(
            placed.values(),
            key=lambda decision: of_a[decision.key].offset if decision.key in of_a else sys.maxsize,
        )

    def _spelled(self, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """A's spelling where the output is a U-Net alone; else the full names, which every loader accepts."""
        a = self.models[0]
        bare = a.bare and a.anatomy.naming == self.naming
        if self.names_components or (self.naming == "ldm" and not bare):
            return decisions
        if all(component_of(decision.ldm) == "unet" for decision in decisions):
            prefix = UNET_PREFIX if self.naming == "ldm" else DIFFUSERS_UNET_PREFIX
            return [replace(decision, name=decision.name.removeprefix(prefix)) for decision in decisions]
        if self.naming == "ldm":
            self.notes.append(
                f"the U-Net's names get the prefix {UNET_PREFIX}, as a file with more than a U-Net needs it"
            )
        return decisions

    # -- afterwards
    # -----------------------------------------------------------------------------------------------

    def _counts(self, decisions: Sequence[Decision]) -> Counts:
        taken = Counter(
            decision.sources[0]
            for decision in decisions
            if len(decision.sources) == 1 and decision.alpha is None
        )
        return Counts(
            computed=sum(len(decision.sources) != 1 or decision.alpha is not None for decision in decisions),
            from_a=taken[0],
            from_b=taken[1],
            from_c=taken[2],
            from_vae=taken[VAE_FILE],
            from_others=sum(count for number, count in taken.items() if number > 2),
            dropped=self.counted["dropped"] + sum(len(model.ema_tensors) for model in self.models),
        )

    def _describe(self, decisions: Sequence[Decision]) -> None:
        self._describe_components()
        for holders, names in self.only_in.items():
            first, only = (
                shown(self.models[holders[0]].name),
                ", ".join(shown(self.models[n].name) for n in holders),
            )
            whence = "there" if len(holders) == 1 else first
            self.notes.append(
                f"{_tensors_are(len(names))} only in {only} and copied from {whence} ({listing(names)})"
            )
        if self.homeless:
            where = "a diffusers folder" if self.naming == "diffusers" else "a file in LDM names"
            self.notes.append(
                f"{counted(len(self.homeless), 'tensor')} left out, which {where} has no place for "
                f"({listing(self.homeless)})"
            )
        if self.pruned:
            self.notes.append(
                f"{counted(len(self.pruned), 'tensor')} left out, which no loader needs "
                f"({listing(self.pruned)})"
            )
        if self.counted["kept"]:
            kept = _tensors_are(self.counted["kept"], "integer or schedule tensor")
            self.notes.append(f"{kept} copied from {shown(self.models[0].name)}")
        if self.mixed:
            self.notes.append(
                f"{_tensors_are(len(self.mixed))} of floats in some models only, and copied from the first "
                "that has them "
                f"({listing(self.mixed, width=300)})"
            )
        if self.restored:
            self.notes.append(f"broken position_ids restored to 0, 1, 2, … ({listing(self.restored)})")
        if idle := self.rules.idle(self.ruled):
            self.notes.append(
                f"{counted(len(idle), 'element rule')} without effect, since no merged tensor fits: "
                f"{listing(idle)}"
            )
        self._describe_markers()
        for which, weights in (("weights", self.weights), ("weights for beta", self.beta)):
            if outside := [
                block
                for block, weight in (weights or {}).items()
                if weight is not None and not 0 <= weight <= 1
            ]:
                self.notes.append(f"{which} outside 0 to 1 go beyond the models: {listing(outside)}")
        casts = Counter(
            (self.views[source].tensors[decision.key].dtype, decision.dtype)
            for decision in decisions
            for source in decision.sources
            if self.views[source].tensors[decision.key].dtype != decision.dtype
        )
        for (given, wanted), count in sorted(casts.items()):
            self.notes.append(f"{_tensors_are(count)} converted from {given} to {wanted}")

    def _describe_components(self) -> None:
        for component in sorted(
            set[str]().union(*(model.components for model in self.models)) - {"other", "unet"}
        ):
            holders = [model for model in self.models if component in model.components]
            if len(holders) == len(self.models) or (
                component == "vae" and (self.vae_source == VAE_FILE or len(holders) > 1)
            ):
                continue
            stale = ", as it was: it does not follow the merge" if component == "ema" else ""
            title = TITLES.get(component, component)
            first, only = shown(holders[0].name), ", ".join(shown(model.name) for model in holders)
            whence = "there" if len(holders) == 1 else first
            self.notes.append(f"the {title} is only in {only} and copied from {whence}{stale}")
        for model in self.models:
            if model.ema_tensors:
                is_stale = self.recipe.changes_values and any(
                    component_of(name) == "unet" for name in model.source.tensors
                )
                left_out = f"left out {counted(len(model.ema_tensors), 'EMA tensor')} of {shown(model.name)}"
                self.notes.append(
                    f"{left_out}{', which would be stale' if is_stale else ''} ({listing(model.ema_tensors)})"
                )

    def _describe_markers(self) -> None:
        markers = [
            sorted(name for name in model.tensors if is_prediction_marker(name)) for model in self.models
        ]
        if all(found == markers[0] for found in markers):
            return
        said = [
            f"{shown(m.name)} {'has ' + listing(found) if found else 'has none'}"
            for m, found in zip(self.models, markers, strict=True)
        ]
        self.notes.append(
            f"warning: prediction markers differ ({'; '.join(said)}): U-Nets of different prediction types "
            "do not blend"
        )


def _tensors_are(count: int, noun: str = "tensor") -> str:
    return f"{counted(count, noun)} {'is' if count == 1 else 'are'}"


def _same_files(models: Sequence[Model]) -> Iterator[str]:
    places: dict[str, list[str]] = {}
    for number, model in enumerate(models):
        if model.source.path is not None:
            letter = state_dict_name(number).removeprefix("state dict ")
            places.setdefault(os.path.realpath(model.source.path), []).append(letter)
    for letters in places.values():
        if len(letters) > 1:
            yield f"{', '.join(letters[:-1])} and {letters[-1]} are the same file"


def _check_kinds(models: Sequence[Model]) -> None:
    first = models[0]
    for other in models[1:]:
        ours, theirs = first.anatomy, other.anatomy
        if ours.family != theirs.family:
            raise IncompatibleModelsError(
                f"{shown(first.name)} is {ours.family.title} and {shown(other.name)} is "
                f"{theirs.family.title}: "
                "only models of one family can be merged"
            )


def _wider_first_convolution(name: str, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """Return the first model with additional input channels in the U-Net's first convolution, or None for any
    other case.
    """
    if name != FIRST_CONVOLUTION or any(len(shape) != 4 for shape in shapes):
        return None
    if len({(shape[0], *shape[2:]) for shape in shapes}) > 1:
        return None
    channels = [shape[1] for shape in shapes]
    widest = max(channels)
    return channels.index(widest) if set(channels) == {SHARED_CHANNELS, widest} else None


def check_vae_option(vae: object) -> None:
    """Raise RecipeError when a state dict merge is asked for a VAE that only files can have."""
    if vae not in ("auto", "a", "b", "blend"):
        raise RecipeError(f"unknown VAE choice '{shown(vae)}': auto, a, b or blend")

"""What becomes of every tensor: the policies, applied to names, dtypes and shapes alone.

Files and state dicts share this, so that both merge alike. What it decides is in `docs/policies.md`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from blockmerge.anatomy import (
    UNET_PREFIX,
    block_of,
    component_of,
    is_position_ids,
    is_prediction_marker,
    is_schedule,
    layout,
)
from blockmerge.checkpoints import FLOAT_DTYPES, VAE_PREFIX, Checkpoint, Model, TensorInfo, open_checkpoint, vae_tensors
from blockmerge.errors import CheckpointError, IncompatibleModelsError, RecipeError, counted, listing, shown
from blockmerge.merging.recipe import Recipe
from blockmerge.merging.result import Counts
from blockmerge.weights import BlockWeights

VAE_FILE = -1
"""Stands for the stand-alone VAE file among the numbers of the models."""

FIRST_CONVOLUTIONS = (UNET_PREFIX + "input_blocks.0.0.weight", "conv_in.weight")

_MOST_POSITIONS = 4096  # real ones are 77; more would be no position_ids, and too much to read while planning

_COMPONENT_TITLES = {"text_encoder": "text encoder", "text_encoder_2": "second text encoder", "vae": "VAE"}


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one tensor of the output.

    `sources` are the models it is read from (0 = A, 1 = B, VAE_FILE). With `alpha` it is computed by the method,
    without it is the one source's, cast to `dtype` where that differs; with `literal` it is those bytes. `wider` is the
    model whose additional input channels are kept, where only some are merged.
    """

    name: str
    canonical: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[int, ...]
    alpha: float | None = None
    literal: bytes | None = None
    wider: int | None = None


@dataclass(frozen=True)
class Decisions:
    """All tensors of the output in A's order, then what only others have; the sources; counts and notes."""

    tensors: tuple[Decision, ...]
    checkpoints: Mapping[int, Checkpoint]
    infos: Mapping[int, Mapping[str, TensorInfo]]
    original_names: Mapping[int, Mapping[str, str]]
    counts: Counts
    notes: tuple[str, ...]


def decide(models: Sequence[Model], recipe: Recipe, weights: BlockWeights) -> Decisions:
    """Apply the policies.

    Raises IncompatibleModelsError, naming the first few tensors and counting the rest, when U-Nets hold different
    tensors, or floats in one model only, when shapes differ, or the VAE that was asked for is not there.
    """
    return _Judge(models, recipe, weights).decide()


@dataclass
class _Judge:
    models: Sequence[Model]
    recipe: Recipe
    weights: BlockWeights
    notes: list[str] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    restored: list[str] = field(default_factory=list)
    only_in: dict[int, list[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)

    def decide(self) -> Decisions:
        a, b = self.models
        _check_kinds(a, b)
        self.infos: dict[int, Mapping[str, TensorInfo]] = {0: a.tensors, 1: b.tensors}
        self.originals: dict[int, Mapping[str, str]] = {0: a.original_names, 1: b.original_names}
        self.checkpoints: dict[int, Checkpoint] = {0: a.checkpoint, 1: b.checkpoint}
        for model in self.models:
            self.notes += model.notes
        self.vae_source = self._choose_vae()
        self._check_unets()
        names = list(dict.fromkeys([*a.tensors, *b.tensors, *self.infos.get(VAE_FILE, {})]))
        decisions = [decision for name in names if (decision := self._decide_one(name)) is not None]
        if self.faults:
            raise IncompatibleModelsError(
                f"{shown(a.name)} and {shown(b.name)} cannot be merged: {listing(self.faults, width=300)}"
            )
        self._describe(decisions)
        return Decisions(
            tuple(self._with_output_names(decisions)),
            self.checkpoints,
            self.infos,
            self.originals,
            self._counts(decisions),
            tuple(self.notes),
        )

    # -- one tensor -----------------------------------------------------------------------------------------------

    def _decide_one(self, name: str) -> Decision | None:
        component = component_of(name)
        holders = [number for number in (0, 1) if name in self.infos[number]]
        if component == "vae" and self.vae_source is not None:
            return self._take(name, self.vae_source) if name in self.infos[self.vae_source] else self._leave_out()
        if is_prediction_marker(name):
            return self._take(name, 0, fixed_dtype=True) if 0 in holders else self._leave_out()
        if is_position_ids(name):
            return self._position_ids(name, holders[0])
        dtypes = [self.infos[number][name].dtype for number in holders]
        floats = sum(dtype in FLOAT_DTYPES for dtype in dtypes)
        if floats == 1 and len(holders) == 2 and not is_schedule(name):
            return self._mixed(name, component, " and ".join(dtypes))
        if floats < len(holders) or is_schedule(name):
            self.counted["kept"] += len(holders) == 2
            return self._take(name, holders[0], fixed_dtype=True)
        if len(holders) == 1:
            other = self.models[1 - holders[0]]
            if component == "other" or component in other.components:
                self.only_in.setdefault(holders[0], []).append(name)
            return self._take(name, holders[0])
        return self._merge(name)

    def _merge(self, name: str) -> Decision | None:
        first, second = (self.infos[number][name].shape for number in (0, 1))
        wider = None
        if first != second:
            wider = _wider_first_convolution(name, first, second)
            if wider is None:
                self.faults.append(f"{shown(name)} (shapes differ: {shown(list(first))} and {shown(list(second))})")
                return None
        alpha = self.weights[block_of(name, self.models[0].anatomy.family.name)]
        source = 0 if alpha is None else self.recipe.merge_method.copies(alpha)
        sources, alpha = ((0, 1), alpha) if source is None else ((source,), None)
        dtype = self.recipe.output_dtype or self.infos[0][name].dtype
        return Decision(name, name, dtype, second if wider == 1 else first, sources, alpha, wider=wider)

    def _take(self, name: str, source: int, *, fixed_dtype: bool = False) -> Decision:
        info = self.infos[source][name]
        dtype = info.dtype
        if not fixed_dtype and dtype in FLOAT_DTYPES:
            of_a = self.infos[0].get(name, info).dtype
            dtype = self.recipe.output_dtype or (of_a if of_a in FLOAT_DTYPES else dtype)
        return Decision(name, name, dtype, info.shape, (source,))

    def _mixed(self, name: str, component: str, dtypes: str) -> Decision | None:
        """A tensor that holds floats in one model and something else in the other, which cannot be blended."""
        if component == "unet":
            self.faults.append(f"{shown(name)} (dtypes do not blend: {dtypes})")
            return None
        self.mixed.append(f"{shown(name)} is {dtypes}")
        return self._take(name, 0, fixed_dtype=True)

    def _leave_out(self) -> Decision | None:
        self.counted["dropped"] += 1
        return None

    def _position_ids(self, name: str, source: int) -> Decision:
        decision = self._take(name, source, fixed_dtype=True)
        if self.infos[source][name].elements > _MOST_POSITIONS:
            return decision
        if _intact_position_ids(self.checkpoints[source].read(self.originals[source][name]), self.infos[source][name]):
            return decision
        self.restored.append(name)
        literal = np.broadcast_to(np.arange(decision.shape[-1], dtype="<i8"), decision.shape).tobytes()
        return replace(decision, dtype="I64", sources=(), literal=literal)

    # -- the models as wholes -------------------------------------------------------------------------------------

    def _check_unets(self) -> None:
        a, b = self.models
        unets = [{name for name in model.tensors if component_of(name) == "unet"} for model in self.models]
        lacking = []
        for model, names in ((b, unets[0] - unets[1]), (a, unets[1] - unets[0])):
            if names:
                lacking.append(
                    f"{shown(model.name)} lacks {counted(len(names), 'U-Net tensor')} of the other ({listing(sorted(names))})"
                )
        if lacking:
            raise IncompatibleModelsError(f"these models cannot be merged: {'; '.join(lacking)}")

    def _choose_vae(self) -> int | None:
        """Return the model that the VAE is taken from as a whole, or None where it follows BASE like all else."""
        vae = self.recipe.vae
        has_vae = [number for number in (0, 1) if "vae" in self.models[number].components]
        if vae in ("a", "b"):
            number = ("a", "b").index(str(vae))
            if number not in has_vae:
                raise IncompatibleModelsError(f"{shown(self.models[number].name)} has no VAE: take another with --vae")
            return number
        if vae == "blend" or vae == "auto":
            if len(has_vae) < 2:
                return has_vae[0] if has_vae else None
            base = self.weights["BASE"]
            if vae == "blend":
                return None
            chosen = 0 if base is None or base <= 0.5 else 1
            self.notes.append(f"the VAE is taken whole from {shown(self.models[chosen].name)} (--vae blend would blend it)")
            return chosen
        return self._open_vae_file()

    def _open_vae_file(self) -> int:
        vae = self.recipe.vae
        try:
            checkpoint = open_checkpoint(vae)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (--vae takes auto, a, b, blend or a file)") from error
        names = vae_tensors(checkpoint)
        reference: Mapping[str, tuple[int, ...] | None] = dict.fromkeys(n for n in layout("sd1") if n.startswith(VAE_PREFIX))
        for model in reversed(self.models):
            reference = {**reference, **{n: t.shape for n, t in model.tensors.items() if component_of(n) == "vae"}}
        if missing := sorted(reference.keys() - names.keys()):
            raise IncompatibleModelsError(f"{shown(checkpoint.name)} is no complete VAE: it lacks {listing(missing)}")
        infos = {canonical: checkpoint.tensors[name] for canonical, name in names.items()}
        wrong = [n for n, shape in reference.items() if shape is not None and infos[n].shape != shape]
        if wrong:
            raise IncompatibleModelsError(f"{shown(checkpoint.name)} is a VAE of another shape: {listing(wrong)}")
        self.infos[VAE_FILE], self.originals[VAE_FILE], self.checkpoints[VAE_FILE] = infos, names, checkpoint
        self.notes.append(f"the VAE is {shown(checkpoint.name)}")
        return VAE_FILE

    # -- afterwards -----------------------------------------------------------------------------------------------

    def _with_output_names(self, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """A's spelling where the output is a U-Net alone; else the full names, which every loader accepts."""
        a = self.models[0]
        unet_only = all(component_of(decision.name) == "unet" for decision in decisions)
        if not a.bare:
            return decisions
        if unet_only:
            return [replace(decision, name=decision.name.removeprefix(UNET_PREFIX)) for decision in decisions]
        self.notes.append(f"the U-Net's names get the prefix {UNET_PREFIX}, as a file with more than a U-Net needs it")
        return decisions

    def _counts(self, decisions: Sequence[Decision]) -> Counts:
        taken = Counter(decision.sources[0] for decision in decisions if len(decision.sources) == 1)
        return Counts(
            computed=sum(len(decision.sources) != 1 for decision in decisions),
            from_a=taken[0],
            from_b=taken[1],
            from_vae=taken[VAE_FILE],
            dropped=self.counted["dropped"] + sum(model.ema_tensors for model in self.models),
        )

    def _describe(self, decisions: Sequence[Decision]) -> None:
        a, b = self.models
        for model, other in ((a, b), (b, a)):
            for component in sorted(model.components - other.components - {"other"}):
                if component != "vae" or self.vae_source != VAE_FILE:
                    self.notes.append(
                        f"the {_COMPONENT_TITLES.get(component, component)} is only in {shown(model.name)} and copied from there"
                    )
            if model.ema_tensors and "unet" in map(component_of, model.checkpoint.tensors):
                self.notes.append(
                    f"left out {counted(model.ema_tensors, 'EMA tensor')} of {shown(model.name)}, which would be stale"
                )
        for number, names in self.only_in.items():
            self.notes.append(
                f"{_tensors_are(len(names))} only in {shown(self.models[number].name)} and copied from there ({listing(names)})"
            )
        if self.counted["kept"]:
            kept = _tensors_are(self.counted["kept"], "integer or schedule tensor")
            self.notes.append(f"{kept} copied from {shown(a.name)}")
        if self.mixed:
            self.notes.append(
                f"{_tensors_are(len(self.mixed))} of floats in one model only, and copied from {shown(a.name)} "
                f"({listing(self.mixed, width=300)})"
            )
        if self.restored:
            self.notes.append(f"broken position_ids restored to 0, 1, 2, … ({listing(self.restored)})")
        markers = [sorted(name for name in model.tensors if is_prediction_marker(name)) for model in self.models]
        if markers[0] != markers[1]:
            said = [
                f"{shown(m.name)} {'has ' + listing(found) if found else 'has none'}"
                for m, found in zip(self.models, markers, strict=True)
            ]
            self.notes.append(
                f"warning: prediction markers differ ({'; '.join(said)}): U-Nets of different prediction types do not blend"
            )
        outside = [block for block, weight in self.weights.items() if weight is not None and not 0 <= weight <= 1]
        if outside:
            self.notes.append(f"weights outside 0 to 1 go beyond the models: {listing(outside)}")
        casts = Counter(
            (self.infos[source][decision.canonical].dtype, decision.dtype)
            for decision in decisions
            for source in decision.sources
            if self.infos[source][decision.canonical].dtype != decision.dtype
        )
        for (given, wanted), count in sorted(casts.items()):
            self.notes.append(f"{_tensors_are(count)} converted from {given} to {wanted}")


def _tensors_are(count: int, noun: str = "tensor") -> str:
    return f"{counted(count, noun)} {'is' if count == 1 else 'are'}"


def _check_kinds(a: Model, b: Model) -> None:
    ours, theirs = a.anatomy, b.anatomy
    if ours.family != theirs.family:
        raise IncompatibleModelsError(
            f"{shown(a.name)} is {ours.family.title} and {shown(b.name)} is {theirs.family.title}: "
            "only models of one family can be merged"
        )
    if ours.naming != theirs.naming:
        raise IncompatibleModelsError(
            f"{shown(a.name)} has {ours.naming} names and {shown(b.name)} has {theirs.naming} names: "
            "models of two namings cannot be merged yet"
        )


def _wider_first_convolution(name: str, first: Sequence[int], second: Sequence[int]) -> int | None:
    """Return which model has additional input channels in the U-Net's first convolution, or None for any other case."""
    if name not in FIRST_CONVOLUTIONS or len(first) != 4 or len(second) != 4:
        return None
    if (first[0], *first[2:]) != (second[0], *second[2:]) or min(first[1], second[1]) != 4:
        return None
    return 0 if first[1] > second[1] else 1


def _intact_position_ids(data: bytes, info: TensorInfo) -> bool:
    """Whether every row is 0, 1, 2, … by value: floats that are exactly that do no harm, and stay as they are."""
    spelled = {"I64": "<i8", "I32": "<i4", "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(info.dtype)
    if spelled is None or not info.shape:
        return True
    values = np.frombuffer(data, dtype=spelled)
    if info.dtype == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    return bool(np.array_equal(values.reshape(info.shape), np.broadcast_to(np.arange(info.shape[-1]), info.shape)))


def check_vae_option(vae: object) -> None:
    """Raise RecipeError when a state dict merge is asked for a VAE that only files can have."""
    if vae not in ("auto", "a", "b", "blend"):
        raise RecipeError(f"unknown VAE choice '{shown(vae)}': auto, a, b or blend")

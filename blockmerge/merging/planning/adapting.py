"""The LoRAs of a merge: opened, held against its models, and what there is to say of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockmerge.adapters import Adapter, Applied, Changes, Lora, Module
from blockmerge.checkpoints import Checkpoint, Model, names_of
from blockmerge.dtypes import FLOAT_DTYPES, precision_of
from blockmerge.errors import IncompatibleModelsError, counted, listing, shown
from blockmerge.merging.planning.decisions import Decision
from blockmerge.merging.planning.request import MergeRequest

_COARSE = 8  # bits of a mantissa, with which half of a change of 0.1 % is lost


@dataclass(frozen=True, eq=False)
class Adapted:
    """The LoRAs of a merge in their order, what they do to its tensors, and what results say of each."""

    applied: tuple[Applied, ...]
    changes: Changes
    said: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """Their files."""
        return tuple(one.adapter.source for one in self.applied)

    @classmethod
    def of(cls, request: MergeRequest, models: Sequence[Model]) -> Adapted:
        """Open the LoRAs that are asked for. Of their values only alphas are read.

        Raises IncompatibleModelsError for a LoRA of another family, and for modules that meet no tensor
        unless the request is `partial`; CheckpointError for what is not a LoRA; WeightsError for its
        blocks.
        """
        family = models[0].anatomy.family
        shapes = _shapes(models) if request.loras else {}
        applied, said, notes = [], [], []
        for lora in request.loras:
            adapter = lora.open(family, shapes)
            weights = lora.weights(family, request.weights.seed)
            unmet = [one.name for one in adapter.modules if not _is_met(one, shapes)]
            _check_met(adapter, unmet, models, partial=request.partial)
            applied.append(Applied(adapter, lora.strength, weights))
            said.append(_said(lora, adapter, unmet, weights))
            notes += [*adapter.notes, *_notes(applied[-1], unmet)]
        return cls(tuple(applied), Changes(applied, family), tuple(said), tuple(dict.fromkeys(notes)))


def _shapes(models: Sequence[Model]) -> dict[str, tuple[int, ...]]:
    """Those of a merge's tensors: A's, but the widest of a first convolution."""
    shapes = {name: tensor.shape for model in reversed(models) for name, tensor in model.tensors.items()}
    first = models[0].anatomy.family.input_layer
    if first in shapes:
        shapes[first] = max(model.tensors[first].shape for model in models if first in model.tensors)
    return shapes


def _is_met(module: Module, shapes: Mapping[str, object]) -> bool:
    return module.target is not None and module.target.ldm in shapes


def _check_met(adapter: Adapter, unmet: Sequence[str], models: Sequence[Model], *, partial: bool) -> None:
    count = len(adapter.modules)
    if len(unmet) == count:
        raise IncompatibleModelsError(
            f"none of the {counted(count, 'module')} of {shown(adapter.name)} matched a tensor of "
            f"{names_of(models)} ({listing(unmet)})"
        )
    if unmet and not partial:
        raise IncompatibleModelsError(
            f"{len(unmet)} of the {counted(count, 'module')} of {shown(adapter.name)} matched no tensor of "
            f"{names_of(models)} ({listing(unmet)}): "
            "partial (--partial, of merge and bake) leaves those out"
        )


def _said(lora: Lora, adapter: Adapter, unmet: Sequence[str], weights: Mapping[str, Any]) -> dict[str, Any]:
    kinds = list(adapter.kinds)
    return {
        "name": lora.label,
        "kind": kinds[0] if len(kinds) == 1 else "+".join(kinds),
        "strength": lora.strength,
        "blocks": dict(weights),
        "modules": len(adapter.modules),
        "met": len(adapter.modules) - len(unmet),
        "unmet": list(unmet),
    }


def _notes(one: Applied, unmet: Sequence[str]) -> Iterator[str]:
    name, met = shown(one.adapter.name), len(one.adapter.modules) - len(unmet)
    yield f"{name}: {counted(met, 'module')} matched"
    if unmet:
        yield f"{name}: {counted(len(unmet), 'module')} without a tensor left out ({listing(unmet)})"
    if not any(True for _ in one.scaled()):
        yield f"{name} changes nothing: its strength, or the weight of each block that it is for, is 0"


def lost_in_rounding(changes: Changes, decisions: Sequence[Decision]) -> Iterator[str]:
    """Say so where the output's dtype is too coarse for small changes."""
    dtypes = {one.expression.dtype for one in decisions if one.ldm in changes}
    coarse = sorted(
        dtype for dtype in dtypes if dtype in FLOAT_DTYPES and precision_of(dtype).mantissa < _COARSE
    )
    if coarse:
        yield (
            f"rounding to {' and '.join(coarse)} takes half or more of changes as small as 0.1 % of a "
            "weight, so what is baked in may be weaker than the LoRA at run time: "
            "dtype fp32 (--dtype, of merge and bake) keeps all"
        )

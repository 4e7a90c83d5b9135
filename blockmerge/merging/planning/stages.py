"""Stages: what a recipe merges on the way to its result, as models whose tensors are expressions.

Nothing is computed, and nothing rounded, before the result is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blockmerge.anatomy import component_of
from blockmerge.checkpoints import Checkpoint, Model
from blockmerge.dtypes import FLOAT_DTYPES, size_of, wide_dtype
from blockmerge.errors import BlockmergeError, shown
from blockmerge.expressions import Expression, Held, simplify, unmeasured
from blockmerge.merging.planning.adapting import Adapted
from blockmerge.merging.planning.describing import describe
from blockmerge.merging.planning.policies import Policies
from blockmerge.merging.planning.recorded import files_of
from blockmerge.merging.planning.request import MergeRequest
from blockmerge.merging.planning.written import as_run


@dataclass(frozen=True, eq=False)
class Stage(Model):
    """What a merge within a recipe makes. Its `source` is that of its A, whose form and metadata it has;
    `beneath` is all that it is read from, and `described` how it and the stages within it are made, by their
    names. `vae_from` is what its VAE is taken from whole, where that is so.
    """

    beneath: tuple[Checkpoint, ...] = ()
    described: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    vae_from: str | None = None

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """All that it is read from."""
        return self.beneath

    @property
    def vae_name(self) -> str:
        """Its own name, where it makes its VAE itself."""
        return self.vae_from or self.name

    @property
    def is_file(self) -> bool:
        """It is not."""
        return False

    @classmethod
    def merged(
        cls, name: str, models: Sequence[Model], request: MergeRequest, held: Callable[[str], str] | None
    ) -> Stage:
        """Decide a merge of models as its own command would. `held` is that of `Policies`.

        Raises what `make_plan` raises, with the stage's name.
        """
        try:
            return cls._decided(name, models, request, held)
        except BlockmergeError as error:
            raise type(error)(f"stage {shown(name)}: {error}") from error

    @classmethod
    def _decided(
        cls, name: str, models: Sequence[Model], request: MergeRequest, held: Callable[[str], str] | None
    ) -> Stage:
        request.check_model_count(len(models))
        a = models[0]
        resolved = request.resolve(a.anatomy.family, len(models))
        adapted = Adapted.of(request, models)
        policies = Policies.of(models, request, resolved, a.anatomy.naming, adapted, held)
        decisions = policies.decide()
        tensors = {one.ldm: _simple(one.expression) for one in decisions}
        first = tensors.get(a.anatomy.family.input_layer)
        notes = describe(models, request, resolved, decisions, policies.found, a.anatomy.naming)
        names, blocks = names_of_models(models), [one["blocks"] for one in adapted.said]
        run = as_run(request, names, resolved, blocks)
        run["files"] = files_of(models, names, policies.vae_file, adapted)
        return cls(
            source=a.source,
            anatomy=replace(a.anatomy, inputs=inputs_for(a, first.shape if first else ())),
            tensors=tensors,
            components=frozenset(map(component_of, tensors)),
            prefix=a.prefix,
            ema_tensors=(),
            notes=tuple(_of_stage(name, models, (*notes, *resolved.notes, *adapted.notes))),
            name=name,
            beneath=(*policies.sources, *adapted.sources),
            described={**stages_of(models), name: run},
            vae_from=None if policies.vae is None else policies.vae.vae_name,
        )


def inputs_for(a: Model, shape: tuple[int, ...]) -> str:
    """What input channels are for, of a first convolution of that shape: as A's, unless another model has
    more.
    """
    family = a.anatomy.family
    return family.variants.get(shape[1], a.anatomy.inputs) if len(shape) > 1 else a.anatomy.inputs


def names_of_models(models: Sequence[Model]) -> list[str]:
    """What a recipe calls models: files without folders, and stages."""
    return [model.source.name if model.is_file else model.name for model in models]


def stages_of(models: Sequence[Model]) -> dict[str, Mapping[str, Any]]:
    """How the stages among models are made, and those within them."""
    return {
        name: run for model in models if isinstance(model, Stage) for name, run in model.described.items()
    }


def _of_stage(name: str, models: Sequence[Model], notes: Sequence[str]) -> Iterator[str]:
    """Notes with the name of the stage that they are about: those of stages within it have one."""
    within = {note for model in models if not model.is_file for note in model.notes}
    yield from (note if note in within else f"{shown(name)}: {note}" for note in notes)


def _simple(tensor: Expression) -> Expression:
    """The same without what does nothing, and with the dtype that it would have in a file.

    Shares are told of the result's LoRAs alone.
    """
    if isinstance(tensor, Held):
        return Held(simplify(unmeasured(tensor.tensor)), tensor.kept)
    return simplify(unmeasured(tensor))


def held_for(output: str | None, leaves: Sequence[Model]) -> Callable[[str], str]:
    """Return what says in which dtype a tensor of that name is held: one step wider than any file has it that
    is read, or the `output`, where that has a dtype of its own.
    """

    def held(name: str) -> str:
        dtypes = {one.dtype for leaf in leaves if (one := leaf.tensors.get(name)) is not None}
        floats = tuple(sorted(dtypes & FLOAT_DTYPES))
        return wide_dtype(floats, output or max(floats, key=size_of, default="F16"))

    return held

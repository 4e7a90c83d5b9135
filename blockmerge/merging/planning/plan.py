"""The plan: what will be done, byte by byte, made from the headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

from blockmerge.anatomy import Anatomy
from blockmerge.checkpoints import Model, TensorInfo, encode_header
from blockmerge.dtypes import size_of
from blockmerge.expressions import Expression, Gathered, Stored, leaves_of
from blockmerge.merging.outputs import Output, WeightFile
from blockmerge.merging.planning.adapting import Adapted
from blockmerge.merging.planning.decisions import Decisions
from blockmerge.merging.planning.metadata import (
    RECIPE_KEYS,
    about_metadata,
    lost_metadata,
    output_metadata,
    web_ui_metadata,
    written_again,
)
from blockmerge.merging.planning.naming import OutputTensor
from blockmerge.merging.planning.policies import decide
from blockmerge.merging.planning.recorded import files_of
from blockmerge.merging.planning.request import MergeRequest, Resolved
from blockmerge.merging.planning.runs import Drafter, PlannedFile, known_bytes
from blockmerge.merging.planning.stages import inputs_for, names_of_models, stages_of
from blockmerge.merging.planning.written import as_run
from blockmerge.streaming import PAGE


@dataclass(frozen=True)
class PlannedOutput:
    """A merge, ready to be carried out: the files that are computed and, in a folder, the `small_files`
    beside them.

    `to_gather` is what has to be looked at before the first tensor is merged, a pass over the models each.
    """

    request: MergeRequest
    anatomy: Anatomy
    resolved: Resolved
    described: Mapping[str, Any]
    models: tuple[str, ...]
    decided: Decisions
    output: Output
    files: tuple[PlannedFile, ...]
    small_files: Mapping[str, bytes]
    to_gather: tuple[Gathered, ...]
    loras: tuple[Mapping[str, Any], ...] = ()

    @property
    def size(self) -> int:
        """The size of the whole output in bytes."""
        return sum(file.size for file in self.files) + sum(map(len, self.small_files.values()))

    def tensor(self, name: str) -> OutputTensor:
        """What an output tensor is."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> Mapping[str, OutputTensor]:
        return {one.name: one for one in self.decided.tensors}

    def inputs_of(self, name: str) -> Iterator[Stored]:
        """Yield the stored tensors that an output tensor is made from."""
        yield from (one for one in leaves_of(self.tensor(name).expression) if isinstance(one, Stored))


def make_plan(
    models: Sequence[Model],
    request: MergeRequest,
    output: Output,
    metadata: Mapping[str, str] | None = None,
    name: str | None = None,
) -> PlannedOutput:
    """Plan a merge from the checkpoints' headers. Reads no weights, but for samples that tell the files
    again. `metadata` stands in the output in place of what would be written there. `name` is what a recipe of
    several stages calls its result.

    Raises what the request, the models or the weights are refused for: RecipeError, WeightsError,
    UnknownFamilyError, IncompatibleModelsError, CheckpointError.
    """
    a = models[0]
    family = a.anatomy.family
    resolved = request.resolve(family, len(models))
    adapted = Adapted.of(request, models)
    decided = decide(
        models, request, resolved, output.naming, adapted=adapted, names_components=output.names_components
    )
    names = names_of_models(models)
    described = as_run(request, names, resolved, [one["blocks"] for one in adapted.said])
    described["files"] = files_of(models, names, decided.vae_file, adapted, is_hashed=request.hash)
    if stages := stages_of(models):
        described |= {"stages": stages, "round": request.rounding, **({"result": name} if name else {})}
    recipe = json.dumps(described, ensure_ascii=False)
    changes_values = request.changes_values or not all(model.is_file for model in models)
    made = output_metadata(_metadata_of(a), recipe, family.name, changes_values=changes_values)
    made |= {**about_metadata(request.about, a, names), **web_ui_metadata(described)}
    metadata = made if metadata is None else written_again(made, metadata)
    lost = lost_metadata(a.source.metadata, metadata, a.name)
    first = next((one.shape for one in decided.tensors if one.ldm == a.anatomy.family.input_layer), ())
    anatomy = replace(a.anatomy, inputs=inputs_for(a, first), naming=output.naming)
    laid_out = output.lay_out(decided.tensors, models, anatomy)
    return PlannedOutput(
        request,
        anatomy,
        resolved,
        described,
        tuple(names),
        replace(decided, notes=(*decided.notes, *resolved.notes, *laid_out.notes, *lost)),
        output,
        tuple(planned_file(file, metadata) for file in laid_out.files),
        laid_out.small_files,
        tuple(to_gather(one.expression for one in decided.tensors)),
        adapted.said,
    )


def _metadata_of(a: Model) -> Mapping[str, str]:
    """A's metadata, as far as they are true of what is taken out of it: ModelSpec tells of the whole."""
    own = {key: text for key, text in a.source.shared_metadata.items() if key in RECIPE_KEYS}
    said = {**a.source.metadata, **own}
    if a.alone is None or not a.alone.is_part or "unet" in a.components:
        return said
    return {key: text for key, text in said.items() if not key.startswith("modelspec.")}


def to_gather(tensors: Iterable[Expression]) -> list[Gathered]:
    """What tensors need to be gathered first, in an order in which it can be: what is gathered from tensors
    of a stage may itself need what is gathered before.
    """
    merged = [one for one in tensors if one.inputs]
    wanted = dict.fromkeys(leaf for one in merged for leaf in leaves_of(one) if isinstance(leaf, Gathered))
    found = (one for gathered in wanted for one in (*to_gather(chain(*gathered.tensors)), gathered))
    return list(dict.fromkeys(found))


def planned_file(file: WeightFile[OutputTensor], metadata: Mapping[str, str]) -> PlannedFile:
    """Lay out a file: its header, then its tensors, aligned as readers want them, and the runs that make
    them.
    """
    order = _aligned_order(list(file.tensors.items()))
    in_file: dict[str, TensorInfo] = {}
    offset = 0
    for name, one in order:
        in_file[name] = TensorInfo(one.dtype, one.shape, offset)
        offset += one.nbytes
    header = encode_header(in_file, metadata, PAGE)
    begins = {name: len(header) + info.offset for name, info in in_file.items()}
    placed = {one.name: TensorInfo(one.dtype, one.shape, begins[name]) for name, one in order}
    drafted = [(0, known_bytes(header)), *((begins[name], one.expression) for name, one in order)]
    return PlannedFile(file.path, placed, Drafter().all(drafted))


def _aligned_order(tensors: Sequence[tuple[str, OutputTensor]]) -> Sequence[tuple[str, OutputTensor]]:
    """A's order; or, where that would put a tensor at an offset that does not suit its dtype, the widest
    dtypes first.

    The reference reader cannot open a file in which, say, an int64 tensor begins at an odd byte.
    """
    offset = 0
    for _, one in tensors:
        if offset % size_of(one.dtype):
            return sorted(tensors, key=lambda named: -size_of(named[1].dtype))
        offset += one.nbytes
    return tensors

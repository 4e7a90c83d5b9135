"""The plan: what will be done, byte by byte, made from the headers alone.

The output is a sequence of runs, each a stretch of bytes that get the same treatment. Neighbouring tensors
join into one run where they lie side by side in every file that is read, so that a merge is a few dozen long
runs instead of a thousand small tensors.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blockmerge.anatomy import Anatomy, Origin, component_of, identify, origins_in_diffusers
from blockmerge.checkpoints import Checkpoint, Model, TensorInfo, encode_header, itemsize
from blockmerge.errors import IncompatibleModelsError, shown
from blockmerge.merging.outputs import Output, WeightFile
from blockmerge.merging.planning.decisions import SHARED_CHANNELS, Decision, Decisions, decide
from blockmerge.merging.planning.metadata import output_metadata
from blockmerge.merging.planning.request import MergeRequest, Resolved
from blockmerge.merging.planning.written import as_run
from blockmerge.methods import Method, key_of
from blockmerge.streaming import PAGE
from blockmerge.weights import Change

LDM = 1000
"""Added to a model's number: its view under LDM names, where the output has others."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Where a run reads: a checkpoint by its number in the plan, an offset in bytes, and the dtype found
    there.
    """

    source: int
    offset: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that its method must see as what it is: the operands' shapes under LDM names.

    `origin` says which part of the result is the output; with `wider`, that operand's additional input
    channels are kept, and the method sees what all have in common. `rows` says that the first axis may be
    cut.
    """

    shapes: tuple[tuple[int, ...], ...]
    origin: Origin
    wider: int | None = None
    rows: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What is computed, beyond casting: the method with these weights (not without `alpha`), then `change`.

    Methods of chance get the tensor's `key`. `whole` is None where single elements are all that is looked at.
    """

    alpha: float | None
    beta: float | None = None
    key: int | None = None
    whole: Whole | None = None
    change: Change | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A contiguous stretch of output bytes that get the same treatment.

    `literal` bytes as they are; or one operand copied (dtype ``"U8"`` on both sides) or cast; or with `work`
    computed from all operands. It may be cut after every `grain` elements. `position` is that of the first
    element in its tensor.
    """

    start: int
    elements: int
    dtype: str
    operands: tuple[Operand, ...] = ()
    work: Work | None = None
    literal: bytes | None = None
    grain: int = 1
    position: int = 0

    @property
    def stop(self) -> int:
        """The byte after the last."""
        return self.start + self.elements * size_of(self.dtype)

    @property
    def is_computed(self) -> bool:
        """Whether torch is needed: for methods and for casts."""
        return self.work is not None or any(operand.dtype != self.dtype for operand in self.operands)

    def continues(self, other: Run) -> bool:
        """Whether this run goes on where `other` ends, in the output and in everything that is read."""
        if self.literal is not None or other.literal is not None:
            return False
        if self.work is not None and (self.work.whole is not None or self.work.key is not None):
            return False
        if (self.start, self.dtype, self.work, len(self.operands)) != (
            other.stop,
            other.dtype,
            other.work,
            len(other.operands),
        ):
            return False
        return all(
            mine.source == theirs.source
            and mine.dtype == theirs.dtype
            and mine.offset == theirs.offset + other.elements * size_of(theirs.dtype)
            for mine, theirs in zip(self.operands, other.operands, strict=True)
        )


@dataclass(frozen=True)
class PlannedFile:
    """One file of the output: `path` within a folder, or empty; tensors by the names of decisions, offsets
    from its start.
    """

    path: str
    tensors: Mapping[str, TensorInfo]
    runs: tuple[Run, ...]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.runs[-1].stop

    @property
    def is_cut_anywhere(self) -> bool:
        """Whether all runs may be cut at every element."""
        return all(run.grain == 1 for run in self.runs)

    def pieces(self, size: int) -> list[tuple[int, int]]:
        """Return the stretches (start, stop) that are each written at once: of `size` bytes, or what cannot
        be cut smaller.
        """
        if self.is_cut_anywhere:
            return [(start, min(start + size, self.size)) for start in range(0, self.size, size)]
        pieces: list[tuple[int, int]] = []
        for run in self.runs:
            grain = run.grain * size_of(run.dtype)
            step = max(grain, size // grain * grain)
            pieces += [(start, min(start + step, run.stop)) for start in range(run.start, run.stop, step)]
        return pieces

    def runs_between(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the runs that overlap the bytes [start, stop)."""
        index = bisect_right(self.runs, start, key=lambda run: run.start) - 1
        while index < len(self.runs) and self.runs[index].start < stop:
            yield self.runs[index]
            index += 1

    def tensors_between(self, start: int, stop: int) -> Iterator[tuple[str, TensorInfo]]:
        """Yield the tensors that overlap the bytes [start, stop)."""
        for name, info in self.tensors.items():
            if info.offset < stop and info.offset + info.nbytes > start:
                yield name, info


@dataclass(frozen=True)
class Plan:
    """A merge, ready to be carried out: the files that are computed and, in a folder, the `small_files`
    beside them.
    """

    recipe: MergeRequest
    anatomy: Anatomy
    resolved: Resolved
    described: Mapping[str, Any]
    decided: Decisions
    output: Output
    files: tuple[PlannedFile, ...]
    small_files: Mapping[str, bytes]

    @property
    def size(self) -> int:
        """The size of the whole output in bytes."""
        return sum(file.size for file in self.files) + sum(map(len, self.small_files.values()))

    @property
    def checkpoints(self) -> Mapping[int, Checkpoint]:
        """The checkpoints that are read, by the numbers that operands have."""
        ldm = {LDM + number: view.checkpoint for number, view in self.decided.ldm.items()}
        return {**self.decided.checkpoints, **ldm}

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models, a VAE file not among them."""
        return tuple(view.checkpoint.name for number, view in self.decided.views.items() if number >= 0)

    def decision_of(self, name: str) -> Decision:
        """What becomes of an output tensor."""
        return next(decision for decision in self.decided.tensors if decision.name == name)

    def inputs_of(self, name: str) -> Iterator[tuple[Checkpoint, TensorInfo]]:
        """Yield where an output tensor's values come from: each checkpoint, and the tensor there."""
        decision = self.decision_of(name)
        for number in dict.fromkeys((*decision.sources, decision.wider)):
            if number is not None:
                yield self.checkpoints[number], self.decided.info(number, decision)


def size_of(dtype: str) -> int:
    """The bytes of one element of a dtype that is known to be known."""
    size = itemsize(dtype)
    assert size is not None, dtype
    return size


def make_plan(models: Sequence[Model], recipe: MergeRequest, output: Output) -> Plan:
    """Plan a merge from the checkpoints' headers. Reads no weights.

    Raises what the recipe, the models or the weights are refused for: RecipeError, WeightsError,
    UnknownFamilyError, IncompatibleModelsError, CheckpointError.
    """
    family = models[0].anatomy.family.name
    resolved = recipe.resolve(family, len(models))
    weights, beta = resolved.weights, resolved.beta
    decided = decide(models, recipe, weights, beta, output.naming, names_components=output.names_components)
    sources = [model.source for model in models]
    decided = replace(decided, notes=(*decided.notes, *resolved.notes))
    described = as_run(recipe, [source.name for source in sources], resolved)
    metadata = output_metadata(sources[0].metadata, json.dumps(described, ensure_ascii=False), family)
    drafter = Drafter(recipe, decided, resolved.numbers, family)
    anatomy = identify(
        {d.key: d.shape for d in decided.tensors if component_of(d.ldm) != "ema"}
    )  # B may have widened it
    laid_out = output.lay_out(decided.tensors, models, anatomy)
    decided = replace(decided, notes=(*decided.notes, *laid_out.notes))
    files = tuple(_plan_file(file, drafter, metadata) for file in laid_out.files)
    return Plan(recipe, anatomy, resolved, described, decided, output, files, laid_out.small_files)


def _plan_file(file: WeightFile[Decision], drafter: Drafter, metadata: Mapping[str, str]) -> PlannedFile:
    order = _aligned_order(tuple(file.tensors.values()))
    tensors = _lay_out(order)
    spelled = {decision.name: name for name, decision in file.tensors.items()}
    header = encode_header({spelled[name]: info for name, info in tensors.items()}, metadata, PAGE)
    tensors = {
        name: TensorInfo(info.dtype, info.shape, len(header) + info.offset) for name, info in tensors.items()
    }
    runs = [Run(0, len(header), "U8", literal=header)]
    for decision in order:
        for run in drafter.runs(decision, tensors[decision.name].offset):
            if not run.elements:
                continue
            if run.continues(runs[-1]):
                last = runs[-1]
                run = replace(last, elements=last.elements + run.elements)
                runs.pop()
            runs.append(run)
    return PlannedFile(file.path, tensors, tuple(runs))


def _aligned_order(decisions: Sequence[Decision]) -> Sequence[Decision]:
    """A's order; or, where that would put a tensor at an offset that does not suit its dtype, the widest
    dtypes first.

    The reference reader cannot open a file in which, say, an int64 tensor begins at an odd byte.
    """
    offset = 0
    for decision in decisions:
        size = size_of(decision.dtype)
        if offset % size:
            return sorted(decisions, key=lambda decision: -size_of(decision.dtype))
        offset += TensorInfo(decision.dtype, decision.shape, 0).nbytes
    return decisions


def _lay_out(decisions: Sequence[Decision]) -> dict[str, TensorInfo]:
    offset = 0
    tensors = {}
    for decision in decisions:
        info = TensorInfo(decision.dtype, decision.shape, offset)
        if decision.name in tensors:  # the last guard before a file that no reader opens
            raise IncompatibleModelsError(f"two tensors of the output would be called {shown(decision.name)}")
        tensors[decision.name] = info
        offset += info.nbytes
    return tensors


@dataclass(frozen=True)
class Drafter:
    """Turns decisions into runs."""

    recipe: MergeRequest
    decided: Decisions
    numbers: Mapping[str, Any]
    family: str

    def runs(self, decision: Decision, start: int) -> Iterator[Run]:
        """Yield the runs that make one tensor: one, but for the methods and first convolutions that go row by
        row.
        """
        if decision.literal is not None:
            yield Run(start, len(decision.literal), "U8", literal=decision.literal)
            return
        found = [self.decided.info(number, decision) for number in decision.sources]
        method = self.recipe.merge_method if decision.alpha is not None else None
        work = self.work(decision)
        if method is not None and method.rows is not None and self._is_as_in_ldm(decision):
            yield from self._swapped(decision, start, found, method)
        elif work is not None and work.whole is not None:
            yield self._whole(decision, start, work, work.whole)
        elif decision.wider is not None:
            yield from self._widened(decision, start, found, work)
        else:
            elements = TensorInfo(decision.dtype, decision.shape, 0).elements
            part = self.origin(decision).part if work is not None and work.key is not None else 0
            at = [(info, 0) for info in found]
            yield _run(decision.dtype, start, elements, at, decision.sources, work, part * elements)

    def work(self, decision: Decision, *, in_pieces: bool = True) -> Work | None:
        """What is computed for a tensor, or None where it is copied or cast.

        With `in_pieces`, additional input channels are left to runs of their own; else they belong to the
        work.
        """
        if decision.alpha is None and decision.change is None and (in_pieces or decision.wider is None):
            return None
        method = self.recipe.merge_method if decision.alpha is not None else None
        random = method is not None and method.random
        key = key_of(self.numbers["seed"], decision.ldm) if random else None
        origin = self.origin(decision)
        whole = decision.change is not None or (method is not None and method.locality != "element")
        whole = whole or (random and origin.transposed) or (not in_pieces and decision.wider is not None)
        return Work(
            decision.alpha,
            decision.beta,
            key,
            self._seen_whole(decision, origin) if whole else None,
            decision.change,
        )

    def origin(self, decision: Decision) -> Origin:
        """Which part of its LDM tensor the output is."""
        if decision.key == decision.ldm:
            return Origin((decision.ldm,))
        return origins_in_diffusers((decision.ldm,), self.family)[decision.key]

    def operands(self, decision: Decision) -> list[int]:
        """The models that a whole tensor is computed from; besides, the one whose additional input channels
        are kept.
        """
        wider = () if decision.wider is None else (decision.wider,)
        return list(dict.fromkeys((*decision.sources, *wider)))

    def _is_as_in_ldm(self, decision: Decision) -> bool:
        origin = self.origin(decision)
        return (
            not origin.transposed and origin.parts == 1 and decision.wider is None and decision.change is None
        )

    def _ldm_info(self, number: int, decision: Decision) -> tuple[int, TensorInfo]:
        """Where a model holds a tensor under its LDM name, and the number of that view."""
        view = self.decided.ldm.get(number)
        if view is not None and decision.ldm in view.tensors:
            return LDM + number, view.tensors[decision.ldm]
        return number, self.decided.info(number, decision)

    def _seen_whole(self, decision: Decision, origin: Origin) -> Whole:
        numbers = self.operands(decision)
        shapes = tuple(self._ldm_info(number, decision)[1].shape for number in numbers)
        wider = None if decision.wider is None else numbers.index(decision.wider)
        by_rows = (
            decision.alpha is not None
            and self.recipe.merge_method.locality == "row"
            and self._is_as_in_ldm(decision)
        )
        return Whole(shapes, origin, wider, by_rows and len(decision.shape) > 1 and decision.shape[0] > 0)

    def _whole(self, decision: Decision, start: int, work: Work, whole: Whole) -> Run:
        """A tensor that is read under its LDM name, so that it is the same whatever the output's naming."""
        found = [self._ldm_info(number, decision) for number in self.operands(decision)]
        elements = TensorInfo(decision.dtype, decision.shape, 0).elements
        operands = tuple(Operand(number, info.offset, info.dtype) for number, info in found)
        grain = max(1, elements // decision.shape[0] if whole.rows else elements)
        return Run(start, elements, decision.dtype, operands, work, grain=grain)

    def _swapped(
        self, decision: Decision, start: int, found: Sequence[TensorInfo], method: Method
    ) -> Iterator[Run]:
        assert method.rows is not None
        width = TensorInfo("U8", decision.shape[1:], 0).elements
        for first, last, source in method.rows(decision.shape, decision.alpha, decision.beta):
            elements = (last - first) * width
            yield _run(decision.dtype, start, elements, [(found[source], first * width)], (source,), None)
            start += elements * size_of(decision.dtype)

    def _widened(
        self, decision: Decision, start: int, found: Sequence[TensorInfo], work: Work | None
    ) -> Iterator[Run]:
        assert decision.wider is not None
        rows, channels, *kernel = decision.shape
        pixels = kernel[0] * kernel[1]
        shared, row_size = pixels * SHARED_CHANNELS, channels * pixels
        wide = self.decided.info(decision.wider, decision)
        for row in range(rows):
            at = [(info, row * info.shape[1] * pixels) for info in found]
            # Numbered as in the whole computation, where the method sees the shared channels only.
            position = row * shared if work is not None and work.key is not None else 0
            yield _run(decision.dtype, start, shared, at, decision.sources, work, position)
            start += shared * size_of(decision.dtype)
            kept = [(wide, row * row_size + shared)]
            yield _run(decision.dtype, start, row_size - shared, kept, (decision.wider,), None)
            start += (row_size - shared) * size_of(decision.dtype)


def _run(
    dtype: str,
    start: int,
    elements: int,
    at: Sequence[tuple[TensorInfo, int]],
    sources: Sequence[int],
    work: Work | None,
    position: int = 0,
) -> Run:
    """One run of `elements`, reading each source from the given tensor at the given element."""
    operands = tuple(
        Operand(number, info.offset + element * size_of(info.dtype), info.dtype)
        for number, (info, element) in zip(sources, at, strict=True)
    )
    if work is None and operands[0].dtype == dtype:
        # Copies are runs of bytes, so that neighbours of different dtypes join too.
        raw = Operand(operands[0].source, operands[0].offset, "U8")
        return Run(start, elements * size_of(dtype), "U8", (raw,))
    return Run(start, elements, dtype, operands, work, position=position)

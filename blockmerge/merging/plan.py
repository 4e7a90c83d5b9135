"""The plan: what will be done, byte by byte, made from the headers alone.

The output is a sequence of runs, each a stretch of bytes that get the same treatment. Neighbouring tensors join into one
run where they lie side by side in every file that is read, so that a merge is a few dozen long runs instead of a
thousand small tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blockmerge.anatomy import Anatomy, identify
from blockmerge.checkpoints import Checkpoint, Model, TensorInfo, encode_header, itemsize
from blockmerge.merging.decisions import Decision, Decisions, decide
from blockmerge.merging.metadata import output_metadata
from blockmerge.merging.recipe import Recipe
from blockmerge.streaming import PAGE
from blockmerge.weights import BlockWeights


@dataclass(frozen=True, slots=True)
class Operand:
    """Where a run reads: a checkpoint by its number in the plan, an offset in bytes, and the dtype found there."""

    source: int
    offset: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Run:
    """A contiguous stretch of output bytes that get the same treatment.

    `literal` bytes as they are; or one operand copied (dtype ``"U8"`` on both sides) or cast; or with `alpha` the
    method's result of all operands.
    """

    start: int
    elements: int
    dtype: str
    operands: tuple[Operand, ...] = ()
    alpha: float | None = None
    literal: bytes | None = None

    @property
    def stop(self) -> int:
        """The byte after the last."""
        return self.start + self.elements * size_of(self.dtype)

    @property
    def is_computed(self) -> bool:
        """Whether torch is needed: for methods and for casts."""
        return self.alpha is not None or any(operand.dtype != self.dtype for operand in self.operands)

    def continues(self, other: Run) -> bool:
        """Whether this run goes on where `other` ends, in the output and in everything that is read."""
        if self.literal is not None or other.literal is not None:
            return False
        if (self.start, self.dtype, self.alpha, len(self.operands)) != (
            other.stop,
            other.dtype,
            other.alpha,
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
class Plan:
    """A merge, ready to be carried out. `tensors` are the output's, with offsets from the file's start; `size` in bytes."""

    recipe: Recipe
    anatomy: Anatomy
    weights: BlockWeights
    decided: Decisions
    tensors: Mapping[str, TensorInfo]
    runs: tuple[Run, ...]
    size: int

    @property
    def checkpoints(self) -> Mapping[int, Checkpoint]:
        """The checkpoints that are read, by the numbers that operands have."""
        return self.decided.checkpoints

    def runs_between(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the runs that overlap the bytes [start, stop)."""
        index = bisect_right(self.runs, start, key=lambda run: run.start) - 1
        while index < len(self.runs) and self.runs[index].start < stop:
            yield self.runs[index]
            index += 1

    def inputs_of(self, name: str) -> Iterator[tuple[Checkpoint, TensorInfo]]:
        """Yield where an output tensor's values come from: each checkpoint, and the tensor there."""
        decision = next(decision for decision in self.decided.tensors if decision.name == name)
        for number in dict.fromkeys((*decision.sources, decision.wider)):
            if number is not None:
                yield self.checkpoints[number], self.decided.infos[number][decision.canonical]

    def tensors_between(self, start: int, stop: int) -> Iterator[tuple[str, TensorInfo]]:
        """Yield the output's tensors that overlap the bytes [start, stop)."""
        for name, info in self.tensors.items():
            if info.offset < stop and info.offset + info.nbytes > start:
                yield name, info


def size_of(dtype: str) -> int:
    """The bytes of one element of a dtype that is known to be known."""
    size = itemsize(dtype)
    assert size is not None, dtype
    return size


def make_plan(checkpoints: Sequence[Checkpoint], recipe: Recipe) -> Plan:
    """Plan a merge from the checkpoints' headers. Reads no weights.

    Raises what the recipe, the models or the weights are refused for: RecipeError, WeightsError, UnknownFamilyError,
    IncompatibleModelsError, CheckpointError.
    """
    recipe.check_model_count(len(checkpoints))
    models = [Model.of(checkpoint) for checkpoint in checkpoints]
    weights = recipe.weights.resolve(models[0].anatomy.family.name)
    decided = decide(models, recipe, weights)
    order = _aligned_order(decided.tensors)
    metadata = output_metadata(
        checkpoints[0].metadata,
        recipe.as_metadata(checkpoints, weights, recipe.weights.label if recipe.weights.preset else None),
    )
    tensors = _lay_out(order)
    header = encode_header(tensors, metadata, PAGE)
    tensors = {name: TensorInfo(info.dtype, info.shape, len(header) + info.offset) for name, info in tensors.items()}
    runs = [Run(0, len(header), "U8", literal=header)]
    for decision in order:
        for run in _runs_of(decision, tensors[decision.name].offset, decided):
            if not run.elements:
                continue
            if run.continues(runs[-1]):
                last = runs[-1]
                run = Run(last.start, last.elements + run.elements, run.dtype, last.operands, run.alpha)
                runs.pop()
            runs.append(run)
    return Plan(
        recipe=recipe,
        anatomy=identify({name: info.shape for name, info in tensors.items()}),  # B may have widened the first convolution
        weights=weights,
        decided=decided,
        tensors=tensors,
        runs=tuple(runs),
        size=runs[-1].stop,
    )


def _aligned_order(decisions: Sequence[Decision]) -> Sequence[Decision]:
    """A's order; or, where that would put a tensor at an offset that does not suit its dtype, the widest dtypes first.

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
        tensors[decision.name] = info
        offset += info.nbytes
    return tensors


def _runs_of(decision: Decision, start: int, decided: Decisions) -> Iterator[Run]:
    """Yield the runs that make one tensor: one, but for a first convolution of which only some channels are merged."""
    if decision.literal is not None:
        yield Run(start, len(decision.literal), "U8", literal=decision.literal)
        return
    found = {
        number: decided.infos[number][decision.canonical] for number in (*decision.sources, decision.wider) if number is not None
    }
    if decision.wider is None:
        elements = TensorInfo(decision.dtype, decision.shape, 0).elements
        yield _run(decision, start, elements, {number: (info, 0) for number, info in found.items()}, decision.sources)
        return
    rows, channels, *kernel = decision.shape
    pixels = kernel[0] * kernel[1]
    shared = pixels * min(info.shape[1] for info in (*found.values(), decided.infos[1 - decision.wider][decision.canonical]))
    row_size = channels * pixels
    for row in range(rows):
        at = {number: (info, row * info.shape[1] * pixels) for number, info in found.items()}
        yield _run(decision, start, shared, at, decision.sources)
        start += shared * size_of(decision.dtype)
        beyond = {decision.wider: (found[decision.wider], row * row_size + shared)}
        yield _run(decision, start, row_size - shared, beyond, (decision.wider,))
        start += (row_size - shared) * size_of(decision.dtype)


def _run(
    decision: Decision,
    start: int,
    elements: int,
    at: Mapping[int, tuple[TensorInfo, int]],
    sources: Sequence[int],
) -> Run:
    """One run of `elements`, reading each source from the given tensor at the given element."""
    operands = []
    for number in sources:
        info, element = at[number]
        operands.append(Operand(number, info.offset + element * size_of(info.dtype), info.dtype))
    if len(operands) == 1:
        if operands[0].dtype != decision.dtype:
            return Run(start, elements, decision.dtype, tuple(operands))
        # Copies are runs of bytes, so that neighbours of different dtypes join too.
        raw = Operand(operands[0].source, operands[0].offset, "U8")
        return Run(start, elements * size_of(decision.dtype), "U8", (raw,))
    return Run(start, elements, decision.dtype, tuple(operands), decision.alpha)

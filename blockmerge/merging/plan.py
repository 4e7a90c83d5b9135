"""The plan: what will be done, byte by byte, made from the headers alone.

The output is a sequence of runs, each a stretch of bytes that get the same treatment. Neighbouring tensors join into one
run where they lie side by side in every file that is read, so that a merge is a few dozen long runs instead of a
thousand small tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from blockmerge.anatomy import Anatomy, component_of, identify
from blockmerge.checkpoints import Checkpoint, Model, TensorInfo, encode_header, itemsize
from blockmerge.merging.decisions import SHARED_CHANNELS, Decision, Decisions, decide
from blockmerge.merging.folder_files import folder_files, split_folder
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
class PlannedFile:
    """One file of the output: `path` within a folder, or empty; tensors by the names of decisions, offsets from its start."""

    path: str
    tensors: Mapping[str, TensorInfo]
    runs: tuple[Run, ...]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.runs[-1].stop

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
class Form:
    """What the output is: its naming, and whether it is a folder or a single file."""

    naming: str
    folder: bool = False


@dataclass(frozen=True)
class Plan:
    """A merge, ready to be carried out: the files that are computed and, in a folder, the `small_files` beside them."""

    recipe: Recipe
    anatomy: Anatomy
    weights: BlockWeights
    decided: Decisions
    form: Form
    files: tuple[PlannedFile, ...]
    small_files: Mapping[str, bytes]

    @property
    def size(self) -> int:
        """The size of the whole output in bytes."""
        return sum(file.size for file in self.files) + sum(map(len, self.small_files.values()))

    @property
    def checkpoints(self) -> Mapping[int, Checkpoint]:
        """The checkpoints that are read, by the numbers that operands have."""
        return self.decided.checkpoints

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models, a VAE file not among them."""
        return tuple(view.checkpoint.name for number, view in self.decided.views.items() if number >= 0)

    def inputs_of(self, name: str) -> Iterator[tuple[Checkpoint, TensorInfo]]:
        """Yield where an output tensor's values come from: each checkpoint, and the tensor there."""
        decision = next(decision for decision in self.decided.tensors if decision.name == name)
        for number in dict.fromkeys((*decision.sources, decision.wider)):
            if number is not None:
                yield self.checkpoints[number], self.decided.info(number, decision)


def size_of(dtype: str) -> int:
    """The bytes of one element of a dtype that is known to be known."""
    size = itemsize(dtype)
    assert size is not None, dtype
    return size


def make_plan(models: Sequence[Model], recipe: Recipe, form: Form) -> Plan:
    """Plan a merge from the checkpoints' headers. Reads no weights.

    Raises what the recipe, the models or the weights are refused for: RecipeError, WeightsError, UnknownFamilyError,
    IncompatibleModelsError, CheckpointError.
    """
    weights = recipe.weights.resolve(models[0].anatomy.family.name)
    decided = decide(models, recipe, weights, naming=form.naming)
    sources = [model.source for model in models]
    metadata = output_metadata(sources[0].metadata, recipe.as_metadata(sources, weights))
    anatomy = identify({d.key: d.shape for d in decided.tensors if component_of(d.ldm) != "ema"})  # B may have widened it
    small_files: dict[str, bytes] = {}
    if form.folder:
        shards, indexes = split_folder(decided.tensors, models)
        small_files = {**folder_files(recipe, models, decided.tensors, anatomy), **indexes}
        files = [_plan_file(path, shard, decided, metadata) for path, shard in shards.items()]
    else:
        files = [_plan_file("", decided.tensors, decided, metadata)]
    return Plan(recipe, anatomy, weights, decided, form, tuple(files), small_files)


def _plan_file(path: str, decisions: Sequence[Decision], decided: Decisions, metadata: Mapping[str, str]) -> PlannedFile:
    order = _aligned_order(decisions)
    tensors = _lay_out(order)
    # In a folder, the component is the file's place, not a part of its tensors' names.
    in_file = {name.partition("/")[2] if path else name: info for name, info in tensors.items()}
    header = encode_header(in_file, metadata, PAGE)
    tensors = {name: TensorInfo(info.dtype, info.shape, len(header) + info.offset) for name, info in tensors.items()}
    runs = [Run(0, len(header), "U8", literal=header)]
    for decision in order:
        for run in _runs_of(decision, tensors[decision.name].offset, decided):
            if not run.elements:
                continue
            if run.continues(runs[-1]):
                last = runs[-1]
                run = replace(last, elements=last.elements + run.elements)
                runs.pop()
            runs.append(run)
    return PlannedFile(path, tensors, tuple(runs))


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
    found = {number: decided.info(number, decision) for number in (*decision.sources, decision.wider) if number is not None}
    if decision.wider is None:
        elements = TensorInfo(decision.dtype, decision.shape, 0).elements
        yield _run(decision, start, elements, {number: (info, 0) for number, info in found.items()}, decision.sources)
        return
    rows, channels, *kernel = decision.shape
    pixels = kernel[0] * kernel[1]
    shared = pixels * SHARED_CHANNELS
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

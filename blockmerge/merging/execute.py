"""Carrying out a plan: workers fill pieces of the output from its runs and write each in one call."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blockmerge.checkpoints import Reader
from blockmerge.errors import NonFiniteError, OutputError, reason, shown
from blockmerge.merging.planning.plan import Plan, PlannedFile, Run
from blockmerge.streaming import (
    PAGE,
    OutputStream,
    Progress,
    TorchThreads,
    aligned_buffer,
    for_each,
    processors,
    thread_count,
)

if TYPE_CHECKING:
    from blockmerge.merging.kernel import Kernel

PIECE_BYTES = 4 << 20
"""What a worker writes in one call. Larger pieces write no faster, and each worker holds one."""

CHUNK_BYTES = 1 << 20
"""What a worker computes at once: small enough to stay in a cache, large enough that Python is not in the
way.
"""

PIECES_MEMORY = 32 << 20
"""What all workers' pieces may take together, however many workers there are."""

CHUNKS_MEMORY = 4 << 20
"""What all workers' chunks may take together. The intermediate values of a chunk take up to ten times as
much, of 8-bit floats twenty times.
"""


Piece = tuple[int, int]
"""A stretch (start, stop) of the output's bytes that one worker fills and writes at once."""


@dataclass(frozen=True)
class Pace:
    """How a plan is cut; it never changes the result."""

    threads: int
    piece_bytes: int
    chunk_bytes: int = CHUNK_BYTES
    direct: bool = True

    @classmethod
    def default(cls, threads: int | None = None) -> Pace:
        """The pace for a number of threads, by default twice the processors."""
        threads = thread_count(threads)
        piece, chunk = (
            max(PAGE, min(most, memory // threads) // PAGE * PAGE)
            for most, memory in ((PIECE_BYTES, PIECES_MEMORY), (CHUNK_BYTES, CHUNKS_MEMORY))
        )
        return cls(threads, piece, chunk)


def execute(
    plan: Plan,
    path_of: Callable[[str], Path],
    pace: Pace,
    device: str = "cpu",
    progress: Progress | None = None,
    *,
    shown_as: Path,
) -> None:
    """Write the planned files to where `path_of` has each, which exists and may be padded to a multiple of
    PAGE.

    Raises NonFiniteError naming the tensors when something that was computed is NaN or infinite (unless the
    recipe allows it), CheckpointError when an input cannot be read or was changed meanwhile, OutputError,
    with the name `shown_as`, when writing fails.
    """
    nonfinite: list[str] = []
    done, total = 0, sum(file.size for file in plan.files)
    gathered = gather(plan, pace)
    for file in plan.files:
        pieces = file.pieces(pace.piece_bytes)
        if "torch" not in sys.modules:
            pieces = _ordered_for_loading(pieces, file)
        # Direct writes need whole pages, which tensors that cannot be cut do not end at.
        output = OutputStream(path_of(file.path), direct=pace.direct and file.is_cut_anywhere)
        job = _Job(plan, file, output, pace, device, shown_as, gathered)
        try:
            for_each(
                pieces,
                job.worker,
                min(_threads(file, pace), len(pieces)),
                file.size,
                _part_of(progress, done, total),
            )
        finally:
            job.torch_threads.restore()
        done += file.size
        nonfinite += [name for name in file.tensors if name in job.nonfinite]
    for checkpoint in plan.checkpoints.values():
        checkpoint.check_unchanged()
    if nonfinite:
        raise NonFiniteError(_explain_nonfinite(plan, nonfinite))


def _threads(file: PlannedFile, pace: Pace) -> int:
    """All of them, but where tensors are computed as a whole no more than processors: each takes its tensor's
    memory.
    """
    return pace.threads if file.is_cut_anywhere else min(pace.threads, processors())


def _part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    return progress and (lambda done, _: progress(before + done, total))


def _ordered_for_loading(pieces: list[Piece], file: PlannedFile) -> list[Piece]:
    """Put one piece that needs torch first and those that need none behind it.

    torch takes as long to load as most merges take: one worker loads it while the others already copy.
    """
    computed = [piece for piece in pieces if any(run.is_computed for run in file.runs_between(*piece))]
    copied = sorted(set(pieces) - set(computed))
    return [*computed[:1], *copied, *computed[1:]]


def gather(plan: Plan, pace: Pace) -> object:
    """For a method that looks at the whole model: go through all tensors once for the figures it needs. Else
    None.
    """
    if plan.recipe.merge_method.locality != "model":
        return None
    from blockmerge.merging.kernel import Statistics

    statistics = Statistics(plan)
    try:
        for_each(statistics.names, statistics.worker, min(pace.threads, processors()), statistics.total)
    finally:
        statistics.torch_threads.restore()
    return statistics.gathered()


class _Job:
    """What the workers of one execution share."""

    def __init__(
        self,
        plan: Plan,
        file: PlannedFile,
        output: OutputStream,
        pace: Pace,
        device: str,
        shown_as: Path,
        gathered: object,
    ) -> None:
        self.gathered = gathered
        self.shown_as = shown_as
        self.plan = plan
        self.file = file
        self.output = output
        self.pace = pace
        self.device = device
        self.nonfinite: set[str] = set()
        self._lock = threading.Lock()
        self.torch_threads = TorchThreads()

    @contextmanager
    def worker(self) -> Iterator[Callable[[Piece], int]]:
        try:
            with ExitStack() as stack:
                yield _Worker(self, stack).do_piece
        except OSError as error:  # readers have their own errors: this is the output
            raise OutputError(f"cannot write {shown(self.shown_as)}: {reason(error)}") from error

    def note_nonfinite(self, start: int, stop: int, is_finite: Callable[[int, int], bool]) -> None:
        """Find out which tensors in the bytes [start, stop) of the output are not finite."""
        for name, info in self.file.tensors_between(start, stop):
            if not is_finite(max(start, info.offset), min(stop, info.offset + info.nbytes)):
                with self._lock:
                    self.nonfinite.add(name)


class _Worker:
    """One thread's readers, writer and buffers."""

    def __init__(self, job: _Job, stack: ExitStack) -> None:
        self.job = job
        self.stack = stack
        self.readers: dict[int, Reader] = {}
        self.piece = aligned_buffer(job.pace.piece_bytes)
        self.writer = stack.enter_context(job.output.writer())
        self.kernel: Kernel | None = None

    def do_piece(self, piece: Piece) -> int:
        file = self.job.file
        start, stop = piece
        if stop - start > len(self.piece):
            self.piece = aligned_buffer(stop - start)
        for run in file.runs_between(start, stop):
            low, high = max(start, run.start), min(stop, run.stop)
            target = self.piece[low - start : high - start]
            if run.literal is not None:
                target[:] = run.literal[low - run.start : high - run.start]
            elif run.is_computed:
                self.compute(run, low, target)
            else:
                operand = run.operands[0]
                self.reader(operand.source).read_into(operand.offset + low - run.start, target)
        # Whole pages, as direct writes need them; the last page is cut to the file's size at the end.
        end = -(-(stop - start) // PAGE) * PAGE if file.is_cut_anywhere else stop - start
        self.writer.write(start, self.piece[:end])
        return stop - start

    def compute(self, run: Run, low: int, target: memoryview) -> None:
        if self.kernel is None:
            from blockmerge.merging.kernel import Kernel

            self.job.torch_threads.single_here()
            self.kernel = Kernel(
                self.job.plan, self.job.file, self.job.device, self.job.pace.chunk_bytes, self.job.gathered
            )
        for start, stop, is_finite in self.kernel.compute(run, low, target, self.reader):
            self.job.note_nonfinite(start, stop, is_finite)

    def reader(self, source: int) -> Reader:
        if source not in self.readers:
            self.readers[source] = self.stack.enter_context(self.job.plan.checkpoints[source].reader())
        return self.readers[source]


def _explain_nonfinite(plan: Plan, names: list[str]) -> str:
    """Say which tensors are not finite and, for the first few, which input is the reason."""
    from blockmerge.merging.kernel import holds_nonfinite

    why = {}
    for name in names[:3]:
        bad = [
            shown(checkpoint.name)
            for checkpoint, info in plan.inputs_of(name)
            if holds_nonfinite(checkpoint, info)
        ]
        dtype = next(file.tensors[name].dtype for file in plan.files if name in file.tensors)
        method = plan.recipe.merge_method
        cause = f"values too large for {dtype}"
        if bad:
            cause = f"NaN or infinity in {' and '.join(bad)}"
        elif method.own and plan.decision_of(name).alpha is not None:
            cause = (
                f"the method {shown(method.name)} makes NaN of finite values, or some too large for {dtype}"
            )
        why[shown(name)] = cause
    verb = "merged" if plan.recipe.changes_values else "converted"
    what = "tensors" if len(names) > 1 else "tensor"
    same = len(why) > 1 and len(set(why.values())) == 1
    named = (
        f"{', '.join(why)} (each: {cause})"
        if same
        else ", ".join(f"{name} ({cause})" for name, cause in why.items())
    )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{len(names)} {verb} {what} would hold NaN or infinity: {named}{more}; "
        "nothing was written; allow_nonfinite (--allow-nonfinite) keeps them"
    )

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
from blockmerge.merging.plan import Plan, PlannedFile, Run
from blockmerge.streaming import PAGE, OutputStream, Progress, TorchThreads, aligned_buffer, for_each, thread_count

if TYPE_CHECKING:
    from blockmerge.merging.kernel import Kernel

PIECE_BYTES = 4 << 20
"""What a worker writes in one call. Larger pieces write no faster, and each worker holds one."""

CHUNK_BYTES = 512 << 10
"""What a worker computes at once: small enough to stay in a cache, large enough that Python is not in the way."""

PIECES_MEMORY = 32 << 20
"""What all workers' pieces may take together, however many workers there are."""


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
        piece = max(PAGE, min(PIECE_BYTES, PIECES_MEMORY // threads) // PAGE * PAGE)
        return cls(threads, piece)


def execute(
    plan: Plan,
    path_of: Callable[[str], Path],
    pace: Pace,
    device: str = "cpu",
    progress: Progress | None = None,
    *,
    shown_as: Path,
) -> None:
    """Write the planned files to where `path_of` has each, which exists and may be padded to a multiple of PAGE.

    Raises NonFiniteError naming the tensors when something that was computed is NaN or infinite (unless the recipe
    allows it), CheckpointError when an input cannot be read or was changed meanwhile, OutputError, with the name
    `shown_as`, when writing fails.
    """
    nonfinite: list[str] = []
    done, total = 0, sum(file.size for file in plan.files)
    for file in plan.files:
        pieces = list(range(0, file.size, pace.piece_bytes))
        if "torch" not in sys.modules:
            pieces = _ordered_for_loading(pieces, file, pace)
        job = _Job(plan, file, OutputStream(path_of(file.path), direct=pace.direct), pace, device, shown_as)
        try:
            for_each(pieces, job.worker, min(pace.threads, len(pieces)), file.size, _part_of(progress, done, total))
        finally:
            job.torch_threads.restore()
        done += file.size
        nonfinite += [name for name in file.tensors if name in job.nonfinite]
    for checkpoint in plan.checkpoints.values():
        checkpoint.check_unchanged()
    if nonfinite:
        raise NonFiniteError(_explain_nonfinite(plan, nonfinite))


def _part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    return progress and (lambda done, _: progress(before + done, total))


def _ordered_for_loading(pieces: list[int], plan: PlannedFile, pace: Pace) -> list[int]:
    """Put one piece that needs torch first and those that need none behind it.

    torch takes as long to load as most merges take: one worker loads it while the others already copy.
    """
    computed = [start for start in pieces if any(run.is_computed for run in plan.runs_between(start, start + pace.piece_bytes))]
    copied = sorted(set(pieces) - set(computed))
    return [*computed[:1], *copied, *computed[1:]]


class _Job:
    """What the workers of one execution share."""

    def __init__(self, plan: Plan, file: PlannedFile, output: OutputStream, pace: Pace, device: str, shown_as: Path) -> None:
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
    def worker(self) -> Iterator[Callable[[int], int]]:
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

    def do_piece(self, start: int) -> int:
        file = self.job.file
        stop = min(start + self.job.pace.piece_bytes, file.size)
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
        self.writer.write(start, self.piece[: -(-(stop - start) // PAGE) * PAGE])
        return stop - start

    def compute(self, run: Run, low: int, target: memoryview) -> None:
        if self.kernel is None:
            from blockmerge.merging.kernel import Kernel

            self.job.torch_threads.single_here()
            self.kernel = Kernel(self.job.plan.recipe, self.job.device, self.job.pace.chunk_bytes)
        for start, stop, is_finite in self.kernel.compute(run, low, target, self.reader):
            self.job.note_nonfinite(start, stop, is_finite)

    def reader(self, source: int) -> Reader:
        if source not in self.readers:
            self.readers[source] = self.stack.enter_context(self.job.plan.checkpoints[source].reader())
        return self.readers[source]


def _explain_nonfinite(plan: Plan, names: list[str]) -> str:
    """Say which tensors are not finite and, for the first few, which input is the reason."""
    from blockmerge.merging.kernel import holds_nonfinite

    why = []
    for name in names[:3]:
        bad = [shown(checkpoint.name) for checkpoint, info in plan.inputs_of(name) if holds_nonfinite(checkpoint, info)]
        dtype = next(file.tensors[name].dtype for file in plan.files if name in file.tensors)
        cause = f"NaN or infinity in {' and '.join(bad)}" if bad else f"values too large for {dtype}"
        why.append(f"{shown(name)} ({cause})")
    verb = "merged" if plan.recipe.method is not None else "converted"
    what = "tensors" if len(names) > 1 else "tensor"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{len(names)} {verb} {what} would hold NaN or infinity: {', '.join(why)}{more}; "
        "nothing was written (--allow-nonfinite keeps them)"
    )

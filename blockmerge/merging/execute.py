"""Carrying out a plan: workers fill pieces of the output from its runs and write each in one call."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from blockmerge.checkpoints import Readers
from blockmerge.errors import NonFiniteError, OutputError, listing, reason, shown
from blockmerge.expressions import Figures, Gathered, methods_of
from blockmerge.merging.planning.plan import PlannedOutput
from blockmerge.merging.planning.runs import PlannedFile, Run
from blockmerge.merging.shares import Shares
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


FACTORS_MEMORY = 64 << 20
"""What all workers may hold together of what is read whole: the factors of a hundred LoRAs."""

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
    plan: PlannedOutput,
    path_of: Callable[[str], Path],
    pace: Pace,
    device: str = "cpu",
    progress: Progress | None = None,
    *,
    shown_as: Path,
) -> Shares:
    """Write the planned files to where `path_of` has each, which exists and may be padded to a multiple of
    PAGE. Return how large what was added to the weights of each block is.

    Raises what `compute` raises.
    """

    def output(file: PlannedFile) -> OutputStream:
        return OutputStream(path_of(file.path), direct=pace.direct)

    return compute(plan, output, pace, device, progress, shown_as=shown_as)


class Sink(Protocol):
    """Where the bytes of a file go; each worker has a writer of its own."""

    def writer(self) -> AbstractContextManager[Writer]: ...  # noqa: D102


class Writer(Protocol):
    """One worker's way to put a piece in its place."""

    def write(self, offset: int, piece: memoryview) -> None: ...  # noqa: D102


def compute(
    plan: PlannedOutput,
    sink_of: Callable[[PlannedFile], Sink],
    pace: Pace,
    device: str = "cpu",
    progress: Progress | None = None,
    *,
    shown_as: Path,
) -> Shares:
    """Compute the planned files, and give their bytes to what `sink_of` has for each.

    Raises NonFiniteError naming the tensors when something that was computed is NaN or infinite (unless the
    recipe allows it), CheckpointError when an input cannot be read or was changed meanwhile, OutputError,
    with the name `shown_as`, when writing fails.
    """
    nonfinite: list[str] = []
    done, total = 0, sum(file.size for file in plan.files)
    figures = gather(plan.to_gather, pace)
    shares = Shares(plan.anatomy.family)
    with _on(device):
        for file in plan.files:
            job = _Job(plan, file, sink_of(file), pace, device, shown_as, figures, shares)
            job.run(_part_of(progress, done, total))
            nonfinite += [name for name in file.tensors if name in job.nonfinite]
            done += file.size
    for checkpoint in plan.decided.checkpoints:
        checkpoint.check_unchanged()
    if nonfinite:
        raise NonFiniteError(_explain_nonfinite(plan, nonfinite))
    return shares


def _on(device: str) -> AbstractContextManager[None]:
    """What a merge on that device must leave behind, or not."""
    if device == "cpu":  # for which torch need not be loaded yet
        return nullcontext()
    from blockmerge.merging.devices import memory_given_back

    return memory_given_back()


def _threads(file: PlannedFile, pace: Pace) -> int:
    """How many workers: no more than can compute at once where most is computed by rows or whole tensors.

    Such methods compute more than they read, so that more workers would only push each other's numbers out of
    the caches, or wait for each other's desks. And no more than the factors of many LoRAs leave memory for.
    """
    by_more_than_elements = sum(run.stop - run.start for run in file.runs if run.grain > 1)
    threads = min(pace.threads, processors()) if 2 * by_more_than_elements > file.size else pace.threads
    factors = max((run.program.factor_bytes for run in file.runs), default=0)
    return max(1, min(threads, FACTORS_MEMORY // max(1, factors)))


def _piece_bytes(file: PlannedFile, pace: Pace) -> int:
    """How large a piece is: twice as large, as far as memory allows, where most is changed by factors, which
    are made ready for each piece anew.
    """
    by_tiles = sum(run.stop - run.start for run in file.runs if run.program.goes_by_tiles)
    if 2 * by_tiles <= file.size:
        return pace.piece_bytes
    most = PIECES_MEMORY // pace.threads // PAGE * PAGE
    return max(pace.piece_bytes, min(2 * pace.piece_bytes, most))


def _part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    return progress and (lambda done, _: progress(before + done, total))


def _ordered_for_loading(pieces: list[Piece], file: PlannedFile) -> list[Piece]:
    """Put one piece that needs torch first and those that need none behind it.

    torch takes as long to load as most merges take: one worker loads it while the others already copy.
    """
    computed = [piece for piece in pieces if any(run.is_computed for run in file.runs_between(*piece))]
    copied = sorted(set(pieces) - set(computed))
    return [*computed[:1], *copied, *computed[1:]]


def gather(wanted: Sequence[Gathered], pace: Pace) -> dict[Gathered, object]:
    """Go through all tensors of each, and return what the methods say of them; each may need those before."""
    found: dict[Gathered, object] = {}
    for one in wanted:
        from blockmerge.merging.kernel import Gathering

        gathering = Gathering(one, found)
        try:
            for_each(
                enumerate(one.tensors), gathering.worker, min(pace.threads, processors()), gathering.total
            )
        finally:
            gathering.torch_threads.restore()
        found[one] = gathering.result()
    return found


class _Job:
    """What the workers of one execution share."""

    def __init__(
        self,
        plan: PlannedOutput,
        file: PlannedFile,
        output: Sink,
        pace: Pace,
        device: str,
        shown_as: Path,
        figures: Figures,
        shares: Shares,
    ) -> None:
        self.plan, self.file, self.output = plan, file, output
        self.pace, self.device, self.shown_as = pace, device, shown_as
        self.figures, self.shares = figures, shares
        self.nonfinite: set[str] = set()
        self.lock = threading.Lock()
        self.torch_threads = TorchThreads()
        self._pieces = list(file.pieces(_piece_bytes(file, pace)))
        self._threads = min(_threads(file, pace), len(self._pieces))
        self.lends = self._threads > processors()
        self._large = threading.BoundedSemaphore(processors())
        self._desks: list[_Desk] = []

    def run(self, progress: Progress | None) -> None:
        """Write the file. No memory for it is kept."""
        pieces = self._pieces
        if "torch" not in sys.modules:
            pieces = _ordered_for_loading(pieces, self.file)
        try:
            for_each(pieces, self.worker, self._threads, self.file.size, progress)
        finally:
            self.torch_threads.restore()
            self._desks.clear()

    @contextmanager
    def worker(self) -> Iterator[Callable[[Piece], int]]:
        try:
            with ExitStack() as stack:
                worker = _Worker(self, stack)
                stack.callback(worker.desk.buffers.clear)
                yield worker.do_piece
        except OSError as error:  # readers have their own errors: this is the output
            raise OutputError(f"cannot write {shown(self.shown_as)}: {reason(error)}") from error

    @contextmanager
    def desk_for_large_pieces(self) -> Iterator[_Desk]:
        """Lend memory for whole tensors: to no more workers at once than can compute at once, and the same
        again. Where there are no more workers, each uses its own.
        """
        with self._large:
            with self.lock:
                desk = self._desks.pop() if self._desks else _Desk()
            yield desk
            with self.lock:
                self._desks.append(desk)

    def note_nonfinite(self, start: int, stop: int, is_finite: Callable[[int, int], bool]) -> None:
        """Find out which tensors in the bytes [start, stop) of the output are not finite."""
        for name, info in self.file.tensors_between(start, stop):
            if not is_finite(max(start, info.offset), min(stop, info.offset + info.nbytes)):
                with self.lock:
                    self.nonfinite.add(name)


class _Desk:
    """Memory to work in: for the piece of the output that is being written, and for what it is made from."""

    def __init__(self) -> None:
        self.buffers: dict[object, memoryview] = {}
        self._piece = memoryview(b"")

    def piece(self, start: int, stop: int) -> memoryview:
        """Memory for these bytes of a file and the rest of their last page; pages begin as in the file."""
        before = start % PAGE
        nbytes = -(-(before + stop - start) // PAGE) * PAGE
        if nbytes > len(self._piece):
            self._piece = aligned_buffer(nbytes)
        return self._piece[before:nbytes]


class _Worker:
    """One thread's readers, writer and memory."""

    def __init__(self, job: _Job, stack: ExitStack) -> None:
        self.job = job
        self.readers = stack.enter_context(Readers())
        self.writer = stack.enter_context(job.output.writer())
        self.desk = _Desk()
        self.kernel: Kernel | None = None

    def do_piece(self, piece: Piece) -> int:
        start, stop = piece
        runs = list(self.job.file.runs_between(start, stop))
        borrows = self.job.lends and any(run.grain_bytes > self.job.pace.chunk_bytes for run in runs)
        with self.job.desk_for_large_pieces() if borrows else nullcontext(self.desk) as desk:
            memory = desk.piece(start, stop)
            for run in runs:
                low, high = max(start, run.start), min(stop, run.stop)
                self.fill(run, low, memory[low - start : high - start], desk)
            # The last page is written whole, and cut to the file's size at the end.
            is_last = stop == self.job.file.size
            self.writer.write(start, memory if is_last else memory[: stop - start])
        return stop - start

    def fill(self, run: Run, low: int, target: memoryview, desk: _Desk) -> None:
        if not run.is_computed:
            operand = run.operands[0]
            self.readers.read_into(operand.source, operand.offset + low - run.start, target)
            return
        if self.kernel is None:
            from blockmerge.merging.kernel import Kernel

            job = self.job
            job.torch_threads.single_here()
            self.kernel = Kernel(
                job.plan, job.file, job.device, job.pace.chunk_bytes, job.figures, job.shares
            )
        for start, stop, is_finite in self.kernel.compute(run, low, target, self.readers, desk.buffers):
            self.job.note_nonfinite(start, stop, is_finite)


def _explain_nonfinite(plan: PlannedOutput, names: list[str]) -> str:
    """Say which tensors are not finite and, for the first few, which input is the reason."""
    why = {shown(name): _cause(plan, name, is_alone=len(names) == 1) for name in names[:3]}
    verb = "merged" if plan.request.changes_values else "baked" if plan.request.loras else "converted"
    what = "tensors" if len(names) > 1 else "tensor"
    same = len(why) > 1 and len(set(why.values())) == 1
    each = ", ".join(f"{name} ({cause})" for name, cause in why.items())
    named = f"{', '.join(why)} (each: {next(iter(why.values()))})" if same else each
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{len(names)} {verb} {what} would hold NaN or infinity: {named}{more}; "
        "nothing was written; allow_nonfinite (--allow-nonfinite) keeps them"
    )


def _cause(plan: PlannedOutput, name: str, *, is_alone: bool) -> str:
    """Say why a tensor is not finite; which tensor of a LoRA is the reason only where that is one for all."""
    from blockmerge.merging.kernel import holds_nonfinite

    inputs, tensor = list(plan.inputs_of(name)), plan.tensor(name)
    of_loras = [one for one in inputs if plan.request.loras and one.source.name not in plan.models]
    if bad := [one for one in inputs if holds_nonfinite(one)]:
        each = (
            f"{shown(one.source.name)}: {shown(one.name)}"
            if is_alone and one in of_loras
            else shown(one.source.name)
            for one in bad
        )
        return f"NaN or infinity in {' and '.join(dict.fromkeys(each))}"
    if own := [method for method in methods_of(tensor.expression) if method.own]:
        makes = f"the method {shown(own[0].name)} makes NaN of finite values"
        return f"{makes}, or some too large for {tensor.dtype}"
    adding = listing(dict.fromkeys(one.source.name for one in of_loras))
    return f"values too large for {tensor.dtype}" + (f", with what {adding} adds" if adding else "")

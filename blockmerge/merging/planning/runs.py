"""Runs: what an output file consists of, byte by byte, and how it is cut.

A file is a sequence of runs, each a stretch of bytes that get the same treatment. Neighbouring tensors join
into one run where they have one program and lie side by side in every file that is read, so that a merge is a
few dozen long runs instead of a thousand small tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from blockmerge.checkpoints import Checkpoint, TensorInfo
from blockmerge.dtypes import size_of
from blockmerge.expressions import Expression, Joined, Known, Program, Programs, Stored, is_arranged
from blockmerge.streaming import PAGE


@dataclass(frozen=True, slots=True)
class Operand:
    """What a run reads: bytes of a checkpoint from `offset` on, a tensor in another arrangement, or what was
    gathered.
    """

    source: Checkpoint | Expression
    offset: int
    dtype: str

    @classmethod
    def of(cls, tensor: Expression, dtype: str) -> Operand:
        """Where a tensor lies, if its bytes lie in a row, else the tensor itself."""
        if isinstance(tensor, Stored) and isinstance(tensor.source, Checkpoint):
            return cls(tensor.source, tensor.offset, dtype)
        return cls(tensor, 0, dtype)

    def continues(self, other: Operand, elements: int) -> bool:
        """Whether it begins where `other` ends after so many elements, in the same file."""
        if (
            self.source is not other.source
            or self.dtype != other.dtype
            or not isinstance(self.source, Checkpoint)
        ):
            return False
        return self.offset == other.offset + elements * size_of(self.dtype)


@dataclass(frozen=True, slots=True)
class Run:
    """A contiguous stretch of output bytes that get the same treatment: `program` applied to `operands`.

    It may be cut after every `grain` elements. A run that is only copied is one of bytes (dtype ``"U8"``), so
    that neighbours of different dtypes join, too.
    """

    start: int
    elements: int
    dtype: str
    program: Program
    operands: tuple[Operand, ...]
    grain: int = 1

    @property
    def stop(self) -> int:
        """The byte after the last."""
        return self.start + self.elements * size_of(self.dtype)

    @property
    def is_computed(self) -> bool:
        """Whether torch is needed: for all that is not copied."""
        return self.program is not COPY

    @property
    def grain_bytes(self) -> int:
        """The size of the stretch that cannot be cut."""
        return self.grain * size_of(self.dtype)

    @property
    def unit_bytes(self) -> int:
        """The size of the stretch that is best not cut: of a tile, both pieces would compute all."""
        return max(self.grain, self.program.unit) * size_of(self.dtype)

    def continues(self, other: Run, elements: int) -> bool:
        """Whether this run goes on where `other` ends after so many elements, in the output and in all that
        is read.
        """
        if self.program is not other.program or not self.program.joins or self.dtype != other.dtype:
            return False
        if self.start != other.start + elements * size_of(self.dtype):
            return False
        pairs = zip(self.operands, other.operands, strict=True)
        return all(mine.continues(theirs, elements) for mine, theirs in pairs)


COPY = Programs().of(Known(b"", "U8", (0,)))[0]
"""The program of all that is only copied, byte by byte."""


class Drafter:
    """Turns tensors into runs."""

    def __init__(self) -> None:
        self._programs = Programs()

    def runs(self, tensor: Expression, start: int) -> Iterator[Run]:
        """Yield the runs that make one tensor: one, but where it is joined of several."""
        if isinstance(tensor, Joined) and tensor.axis == 0:
            for member in tensor.members:
                yield from self.runs(member, start)
                start += member.nbytes
        elif is_arranged(tensor):
            if tensor.nbytes:
                yield Run(start, tensor.nbytes, "U8", COPY, (Operand.of(tensor, "U8"),))
        elif tensor.elements:
            program, leaves = self._programs.of(tensor)
            operands = tuple(Operand.of(leaf, leaf.dtype) for leaf in leaves)
            yield Run(start, tensor.elements, tensor.dtype, program, operands, program.grain(tensor.shape))

    def all(self, tensors: Sequence[tuple[int, Expression]]) -> tuple[Run, ...]:
        """The runs of (start, tensor) in the order of the file, those that go on joined."""
        runs = (run for start, tensor in tensors for run in self.runs(tensor, start))
        return tuple(_joined(runs))


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Join each run to the one before, where it continues that."""
    held: Run | None = None
    elements = 0  # of the run that is held, and of all that have joined it
    for run in runs:
        if held is not None and run.continues(held, elements):
            elements += run.elements
            continue
        if held is not None:
            yield replace(held, elements=elements)
        held, elements = run, run.elements
    if held is not None:
        yield replace(held, elements=elements)


@dataclass(frozen=True)
class PlannedFile:
    """One file of the output: `path` within a folder, or empty; tensors by their output names, offsets from
    its start.
    """

    path: str
    tensors: Mapping[str, TensorInfo]
    runs: tuple[Run, ...]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.runs[-1].stop

    def pieces(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield the stretches (start, stop) that are each filled and written at once, of about `size` bytes,
        a multiple of PAGE.

        They begin and end at pages, as direct writes need it, wherever a run can be cut there, and is not
        better cut between tiles. A tensor that cannot be cut is in a piece as a whole, however large it is.
        """
        start = 0
        while start < self.size:
            stop = self._end_of_piece(start, size)
            yield start, stop
            start = stop

    def _end_of_piece(self, start: int, size: int) -> int:
        """Where a piece ends that begins at `start`: at the last page within `size`, if it can; else before
        what lies across that, at a page or else where that begins; else after it, where it is larger than a
        piece. What goes by tiles is rather cut where it begins, if that is not too near, or between tiles.
        """
        goal = (start + size) // PAGE * PAGE
        if goal >= self.size:
            return self.size
        run = self._run_at(goal)
        if self._is_cut(goal):
            return self._better_end(run, start, goal) if run.unit_bytes > run.grain_bytes else goal
        before = run.start + (goal - run.start) // run.grain_bytes * run.grain_bytes
        page = before // PAGE * PAGE
        if page > start and self._is_cut(page):
            return page
        if before > start:
            return before
        after = before + run.grain_bytes
        page = -(-after // PAGE) * PAGE
        return page if page < self.size and self._is_cut(page) else after

    @staticmethod
    def _better_end(run: Run, start: int, goal: int) -> int:
        """Where in a run that goes by tiles the piece from `start` to `goal` had better end."""
        if run.start > start and run.start - start >= (goal - start) // 2:
            return run.start
        tile = run.start + (goal - run.start) // run.unit_bytes * run.unit_bytes
        return tile if tile > start else goal

    def _is_cut(self, position: int) -> bool:
        """Whether no stretch that cannot be cut lies across a position."""
        run = self._run_at(position)
        return (position - run.start) % run.grain_bytes == 0

    def _run_at(self, position: int) -> Run:
        return self.runs[bisect_right(self.runs, position, key=lambda run: run.start) - 1]

    def runs_between(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the runs that overlap the bytes [start, stop)."""
        index = bisect_right(self.runs, start, key=lambda run: run.start) - 1
        while index < len(self.runs) and self.runs[index].start < stop:
            yield self.runs[index]
            index += 1

    def tensors_between(self, start: int, stop: int) -> Iterator[tuple[str, TensorInfo]]:
        """Yield the tensors that overlap the bytes [start, stop)."""
        index = max(0, bisect_right(self._by_place, start, key=lambda one: one[1].offset) - 1)
        while index < len(self._by_place) and self._by_place[index][1].offset < stop:
            name, info = self._by_place[index]
            if info.offset + info.nbytes > start:
                yield name, info
            index += 1

    @cached_property
    def _by_place(self) -> Sequence[tuple[str, TensorInfo]]:
        """The tensors from the first byte to the last; those without bytes before others."""
        return sorted(self.tensors.items(), key=lambda one: (one[1].offset, one[1].nbytes))


def known_bytes(data: bytes) -> Known:
    """Bytes of a file that are no tensor: its header."""
    return Known(data, "U8", (len(data),))

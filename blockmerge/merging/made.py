"""A merge as a checkpoint: its tensors are computed where they are read, and nothing is written."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from blockmerge.checkpoints import Checkpoint, Reader, Readers
from blockmerge.expressions import Figures
from blockmerge.merging.execute import Pace, gather
from blockmerge.merging.planning.plan import PlannedOutput
from blockmerge.merging.planning.runs import Run
from blockmerge.streaming import aligned_buffer

if TYPE_CHECKING:
    from blockmerge.merging.kernel import Kernel


class MadeCheckpoint(Checkpoint):
    """What a merge of one file would write, with the same bits. It has no path and no files.

    What is read twice is computed twice, and a tensor that a method must see whole is computed whole for
    every part of it that is read.
    """

    def __init__(self, planned: PlannedOutput, pace: Pace, name: str) -> None:
        self.planned, self.pace, self.name = planned, pace, name
        [self.file] = planned.files
        self.tensors = dict(self.file.tensors)
        self.metadata: Mapping[str, str] = {}
        self._lock = threading.Lock()

    def reader(self) -> Reader:
        """Open a reader, which computes."""
        with self._lock:
            return _MadeReader(self)

    @cached_property
    def figures(self) -> Figures:
        """What has to be looked at before the first tensor is merged."""
        return gather(self.planned.to_gather, self.pace)

    def check_unchanged(self) -> None:
        """Raise CheckpointError when a model was changed."""
        for checkpoint in self.planned.decided.checkpoints:
            checkpoint.check_unchanged()


class _MadeReader(Reader):
    def __init__(self, made: MadeCheckpoint) -> None:
        self._made, self._plan = made, made.planned
        self._readers = Readers(made.figures)
        self._buffers: dict[object, memoryview] = {}
        self._kernel: Kernel | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what lies from `offset` on."""
        stop = offset + len(buffer)
        for run in self._made.file.runs_between(offset, stop):
            low, high = max(offset, run.start), min(stop, run.stop)
            self._fill(run, low, buffer[low - offset : high - offset])

    def close(self) -> None:
        """Close the readers of the models."""
        self._readers.close()
        self._buffers.clear()

    def _fill(self, run: Run, low: int, target: memoryview) -> None:
        if not run.is_computed:
            operand = run.operands[0]
            self._readers.read_into(operand.source, operand.offset + low - run.start, target)
            return
        grain = run.grain_bytes
        begin = run.start + (low - run.start) // grain * grain
        end = run.start + -(-(low + len(target) - run.start) // grain) * grain
        if (begin, end) == (low, low + len(target)):
            self._compute(run, low, target)
            return
        whole = aligned_buffer(end - begin)
        self._compute(run, begin, whole)
        target[:] = whole[low - begin :][: len(target)]

    def _compute(self, run: Run, low: int, target: memoryview) -> None:
        if self._kernel is None:
            from blockmerge.merging.kernel import Kernel

            pace: Pace = self._made.pace
            plan: PlannedOutput = self._plan
            self._kernel = Kernel(plan, self._made.file, "cpu", pace.chunk_bytes, self._made.figures)
        for _ in self._kernel.compute(run, low, target, self._readers, self._buffers):
            pass  # what is not finite is compared as it is

"""`repair`: a copy of a checkpoint without what writing it anew puts right."""

from __future__ import annotations

from dataclasses import replace

from blockmerge.checkpoints import CheckpointLike, Model, open_checkpoint
from blockmerge.inspecting.check import check
from blockmerge.inspecting.problems import CheckResult
from blockmerge.merging import convert
from blockmerge.merging.planning.metadata import LOST_METADATA
from blockmerge.streaming import Progress
from blockmerge.types import PathLike


def repair(
    path: CheckpointLike,
    output: PathLike,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
) -> CheckResult:
    """Write a repaired copy of a checkpoint, and say what was wrong with it.

    `fixed` are the codes of the problems that the copy is rid of. The other arguments are those of `check`
    and `convert`.

    A conversion that prunes does all of it: it writes the usual names, `position_ids` as int64, aligned data
    and honest metadata, and neither EMA copies nor leftovers. What it cannot repair stays: the copy is
    checked like the original, and what is found only there is among the problems too.

    Raises what `check` and `convert` raise; a file without a known U-Net cannot be repaired.
    """
    source = open_checkpoint(path, variant=variant)
    Model.of(source)  # one component alone is converted, but is no model to be repaired
    written = convert(
        source,
        output,
        prune=True,
        threads=threads,
        overwrite=overwrite,
        allow_nonfinite=True,
        progress=progress,
    )
    before = check(source, progress, threads)
    after = check(output, progress, threads)
    remaining = {problem.code for problem in after.problems}
    lost = [note for note in written.notes if note.startswith(LOST_METADATA)]
    known = {problem.code for problem in before.problems}
    fixed = [problem.code for problem in before.problems if problem.code not in remaining]
    new = [problem for problem in after.problems if problem.code not in known]
    return replace(
        before,
        problems=(*before.problems, *new),
        fixed=tuple(dict.fromkeys(fixed)),
        output=str(written.output),
        notes=(*before.notes, *lost),
    )

"""`check`: what is wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blockmerge.anatomy import is_position_ids, is_schedule
from blockmerge.checkpoints import (
    Checkpoint,
    CheckpointLike,
    SafetensorsFile,
    fault_of_position_ids,
    open_checkpoint,
    positions_beside,
)
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import counted, listing, shown
from blockmerge.expressions import Stored
from blockmerge.inspecting.checksums import wrong_checksums
from blockmerge.inspecting.metadata import check_file, check_metadata
from blockmerge.inspecting.problems import SEVERITIES, CheckResult, Problem
from blockmerge.inspecting.structure import Subject, check_structure
from blockmerge.streaming import Progress


def check(
    path: CheckpointLike,
    progress: Progress | None = None,
    threads: int | None = None,
    *,
    variant: str | None = None,
) -> CheckResult:
    """Look for everything that can be wrong with a model.

    >>> blockmerge.check("a.safetensors").faults  # doctest: +SKIP
    ()

    - `path`: a path, an opened checkpoint, a state dict or a recipe.
    - `variant`, `threads`, `progress`: as for `merge`.

    All floats are read once, and the checksums of a zip archive are verified, in a few megabytes of memory.
    `docs/check.md` lists the problems. A file that is not an image model is not an error, but a problem.

    Raises `CheckpointError` where the file cannot be read.
    """
    subject = Subject.of(open_checkpoint(path, variant=variant))
    checkpoint, anatomy = subject.checkpoint, subject.model.anatomy if subject.model else None
    problems = [
        *check_structure(subject),
        *check_metadata(checkpoint.metadata, anatomy.family.name if anatomy else None),
    ]
    if isinstance(checkpoint, SafetensorsFile):
        problems += check_file(checkpoint)
    if (broken := checkpoint.broken_off()) is not None:
        problems.append(Problem.of("broken_off", broken))
    else:
        problems += _checksums(checkpoint, progress, threads)
        problems += _position_ids(subject)
        problems += _values(subject, progress, threads)
    return CheckResult(
        name=checkpoint.name,
        family=anatomy.family.name if anatomy else None,
        variant=anatomy.variant if anatomy else None,
        naming=anatomy.naming if anatomy else None,
        problems=tuple(sorted(problems, key=lambda problem: SEVERITIES.index(problem.severity))),
        notes=tuple(f"{shown(checkpoint.name)} {note}" for note in checkpoint.notes),
    )


def _checksums(checkpoint: Checkpoint, progress: Progress | None, threads: int | None) -> Iterator[Problem]:
    if wrong := wrong_checksums(checkpoint, threads, progress):
        parts = f"{counted(len(wrong), 'part')} of the archive"
        yield Problem.of(
            "wrong_checksum",
            f"{parts} with another checksum than was written, so that its numbers are not those that were "
            f"saved ({listing(part.name for part in wrong)}): download it again",
            [name for part in wrong for name in part.tensors],
        )


def _position_ids(subject: Subject) -> Iterator[Problem]:
    for name, info in subject.checkpoint.tensors.items():
        if not is_position_ids(name):
            continue
        positions = positions_beside(name, subject.checkpoint.tensors)
        fault = fault_of_position_ids(Stored.of(subject.checkpoint, name), positions)
        if fault is not None:
            yield Problem.of(
                "broken_position_ids", f"{shown(name)} misplaces the words of a prompt: {fault}", [name]
            )
        elif info.dtype in FLOAT_DTYPES:
            yield Problem.of(
                "float_position_ids",
                f"{shown(name)} is right, but stored as {info.dtype} and not as I64",
                [name],
            )


def _values(subject: Subject, progress: Progress | None, threads: int | None) -> Iterator[Problem]:
    from blockmerge.inspecting.values import peaks_of  # late, for it loads numpy

    tensors = subject.checkpoint.tensors
    # Schedules may hold infinity for good reasons: one that ends in pure noise divides by 0.
    names = [
        name
        for name, info in tensors.items()
        if info.dtype in FLOAT_DTYPES
        and not (is_schedule(name) or is_position_ids(name) or name in subject.quantised.aside)
    ]
    peaks = peaks_of(subject.checkpoint, names, threads, progress)
    unused = set(subject.unused)
    bad = [name for name, peak in peaks.items() if not peak.is_finite]
    yield from _found(
        "nan_or_infinity",
        "with NaN or infinity, which make black images",
        [name for name in bad if name not in unused],
    )
    yield from _found(
        "leftover_nan", "that nothing needs, with NaN or infinity", [name for name in bad if name in unused]
    )
    components = subject.components()
    used = {name: peak for name, peak in peaks.items() if name not in unused and components[name] != "other"}
    # Biases may well be 0.
    zero = [
        name
        for name, peak in used.items()
        if peak.is_zero and (name.endswith("weight") or len(tensors[name].shape) > 1)
    ]
    yield from _found("zero_weights", "of nothing but zeros, whose layers do nothing", zero)
    large = [name for name, peak in used.items() if peak.overflows_fp16]
    yield from _found(
        "overflows_fp16",
        "with values beyond float16's 65504, which make black images in half precision",
        large,
    )


def _found(code: str, what: str, names: Sequence[str]) -> Iterator[Problem]:
    if names:
        yield Problem.of(code, f"{counted(len(names), 'tensor')} {what} ({listing(names)})", names)

"""`Plan`: a recipe that is ready to be run."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

from blockmerge.checkpoints import check_space
from blockmerge.errors import OutputError, reason, shown
from blockmerge.merging.execute import Pace, execute
from blockmerge.merging.planning.plan import PlannedOutput
from blockmerge.merging.result import MergeResult
from blockmerge.merging.shares import Shares
from blockmerge.merging.tree import Node
from blockmerge.streaming import Progress

_STEP = 1 << 22  # bytes that are hashed at once


@dataclass(frozen=True)
class Plan:
    """A recipe whose models are open and whose output is decided, ready to be run.

    >>> plan = blockmerge.Merge("a.safetensors", "b.safetensors", weights=0.5).plan("c.safetensors")
    ... # doctest: +SKIP
    >>> print(*plan.summary().notes, sep="\\n")  # doctest: +SKIP
    >>> result = plan.run()  # doctest: +SKIP

    `target` is where the output will be. `planned` describes every byte of it, for blockmerge's own use.
    """

    recipe: Node
    target: Path
    planned: PlannedOutput = field(repr=False)
    pace: Pace
    device: str
    overwrite: bool
    seconds: float

    def summary(self) -> MergeResult:
        """Return what the merge would do, as a `MergeResult` with `dry_run`.

        An output that exists is a note. Raises `OutputError` where the disk has not enough space.
        """
        check_space(self.target, self.planned.size)
        return self._result(self.seconds, self._existing())

    def run(self, progress: Progress | None = None, *, sha256: str | None = None) -> MergeResult:
        """Write the output, and return what was done.

        - `progress`: called as ``progress(done, total)``, in bytes.
        - `sha256`: the hash that the output must have, in hexadecimal digits.

        Raises what `merge` raises, and `OutputError` for another hash; nothing is written then.
        """
        started = time.perf_counter()
        plan = self.planned
        plan.output.check((), overwrite=self.overwrite)
        for checkpoint in plan.decided.checkpoints:
            checkpoint.check_whole()
        sizes: dict[str, int | bytes] = {file.path: file.size for file in plan.files}
        with plan.output.reserve(
            self.target, {**plan.small_files, **sizes}, overwrite=self.overwrite
        ) as reserved:
            shares = execute(plan, reserved.path_of, self.pace, self.device, progress, shown_as=self.target)
            if sha256 is not None:
                _check_hash(reserved.path_of(""), plan.size, sha256)
            reserved.commit()
            swept = reserved.swept
        return self._result(self.seconds + time.perf_counter() - started, swept, shares)

    def _existing(self) -> tuple[str, ...]:
        if not self.target.exists():
            return ()
        to_do = "it would be replaced" if self.overwrite else "give another name, or overwrite (--overwrite)"
        return (f"{shown(self.planned.output.path)} exists: {to_do}",)

    def _result(
        self, seconds: float, more_notes: tuple[str, ...] = (), shares: Shares | None = None
    ) -> MergeResult:
        plan, request = self.planned, self.recipe.request
        has = request.merge_method.weights
        return MergeResult(
            output=self.target,
            family=plan.anatomy.family.name,
            variant=plan.anatomy.variant,
            naming=plan.output.naming,
            method=request.method_name,
            preset=plan.resolved.preset,
            weights=dict(plan.resolved.weights) if "alpha" in has else {},
            weights_beta=dict(plan.resolved.beta) if "beta" in has else None,
            models=tuple(plan.models),
            tensors=plan.decided.counts,
            bytes=plan.size,
            seconds=seconds,
            notes=(*plan.decided.notes, *more_notes),
            runs=sum(len(file.runs) for file in plan.files),
            recipe=plan.described,
            dry_run=shares is None,
            loras=tuple(
                {**lora, "change": shares.of(number) if shares else {}}
                for number, lora in enumerate(plan.loras)
            ),
            change=shares.of(None) if shares else {},
            stages=plan.described.get("stages", {}),
        )


def _check_hash(path: Path, size: int, sha256: str) -> None:
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while size and (part := file.read(min(size, _STEP))):  # what is beyond is cut off at the end
                found.update(part)
                size -= len(part)
    except OSError as error:
        raise OutputError(f"cannot read what was written: {reason(error)}") from error
    if found.hexdigest() != sha256.lower():
        raise OutputError(
            f"what was made has the SHA-256 {found.hexdigest()[:12]}…, and {shown(sha256[:12])}… is pinned: "
            "nothing was written. Bits depend on the kind of processor and on torch's version"
        )

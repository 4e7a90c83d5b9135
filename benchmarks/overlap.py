"""How far reading, transfer, computing and writing overlap in file merges with heavy methods, on a GPU or the
processor.

Each stage is timed in a merge with one worker, stage after stage; then the merge is timed as it is. If
nothing overlapped, it would take as long as the stages together.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import blockmerge
from benchmarks.harness import arguments, full_size_pair
from blockmerge.merging.kernel import Kernel
from blockmerge.merging.planning.runs import Run
from blockmerge.streaming.output import PieceWriter
from blockmerge.streaming.tensors import tensor_view


def main() -> None:
    """Print the table."""
    chosen = arguments(
        __doc__ or "",
        device={"default": "cuda" if torch.cuda.is_available() else "cpu"},
        methods={"nargs": "+", "default": ["slerp", "ties"]},
    )
    is_cuda = chosen.device.startswith("cuda")
    device = torch.cuda.get_device_name(torch.device(chosen.device)) if is_cuda else "processor"
    with full_size_pair(chosen) as (a, b, output):
        print(f"device: {device}\n")
        print(
            "| method | read s | to the device s | compute s | back s | write s | together s | merge s | "
            "merge ÷ together |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for method in chosen.methods:

            def merge(threads: int | None, method: str = method) -> float:
                started = time.perf_counter()
                blockmerge.merge(
                    a,
                    b,
                    output=output,
                    method=method,
                    weights=0.5,
                    device=chosen.device,
                    threads=threads,
                    overwrite=True,
                )
                return time.perf_counter() - started

            merge(None)  # loads what is loaded once
            with timed_stages() as spent:
                merge(1)
            seconds = min(merge(None) for _ in range(chosen.rounds))
            stages = [spent[stage] for stage in ("read", "there", "compute", "back", "write")]
            told = " | ".join(
                f"{stage:.2f}" for stage in (*stages, sum(stages), seconds, seconds / sum(stages))
            )
            print(f"| {method} | {told} |")


@contextmanager
def timed_stages() -> Iterator[Counter[str]]:
    """Time every stage of the merges in between; each waits for the one before it to end."""
    spent: Counter[str] = Counter()

    def clocked(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent[stage] += time.perf_counter() - started

        return call

    def compute_one(self: Kernel, operands: list[Any], run: Run, first: int, out: torch.Tensor) -> bool:
        """What the kernel's own does, each stage waited for; operands are in page-locked memory."""
        device = self._device

        def there() -> list[Any]:
            moved = [
                one.to(device, non_blocking=True) if isinstance(one, torch.Tensor) else one
                for one in operands
            ]
            return synchronised(moved, device)

        def compute() -> torch.Tensor:
            result = torch.empty_like(out, device=device)
            run.program.run(moved, run.program.shaped(result), first)
            return synchronised(result, device)

        def back() -> torch.Tensor:
            locked = out
            if device.type == "cuda":
                locked = tensor_view(self._buffer("out", out.nbytes), run.dtype, len(out))
            return synchronised(locked.copy_(result, non_blocking=True), device)

        moved = clocked("there", there)()
        result = clocked("compute", compute)()
        locked = clocked("back", back)()
        if locked is not out:
            out.copy_(locked)
        return True

    def synchronised(value: Any, device: torch.device) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return value

    with (
        mock.patch.object(Kernel, "_read", clocked("read", Kernel._read)),
        mock.patch.object(Kernel, "_compute_one", compute_one),
        mock.patch.object(PieceWriter, "write", clocked("write", PieceWriter.write)),
    ):
        yield spent


if __name__ == "__main__":
    main()

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
from blockmerge.streaming.output import PieceWriter


def main() -> None:
    """Print the table."""
    chosen = arguments(
        __doc__ or "",
        device={"default": "cuda" if torch.cuda.is_available() else "cpu"},
        methods={"nargs": "+", "default": ["slerp", "ties"]},
    )
    device = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else "processor"
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

    def compute_one(
        self: Kernel, inputs: list[torch.Tensor], run: Any, first: int, out: torch.Tensor
    ) -> bool:
        def there() -> list[torch.Tensor]:
            return synchronised([tensor.to(self._device) for tensor in inputs])

        def compute() -> torch.Tensor:
            result = torch.empty_like(out, device=self._device)
            self._computation.run(moved, run.work, run.position + first, result)
            return synchronised(result)

        moved = clocked("there", there)()
        result = clocked("compute", compute)()
        clocked("back", lambda: out.copy_(result))()
        return True

    def synchronised(value: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return value

    with (
        mock.patch.object(Kernel, "_read", clocked("read", Kernel._read)),
        mock.patch.object(Kernel, "_compute_one", compute_one),
        mock.patch.object(PieceWriter, "write", clocked("write", PieceWriter.write)),
    ):
        yield spent


if __name__ == "__main__":
    main()

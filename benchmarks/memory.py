"""Merging state dicts in memory beside merging the same files: CPU seconds, of all threads and of the system
for them.

    python benchmarks/memory.py [--family sd1] [--rounds 5] [--folder DIR]

Three models at full size, add_difference and weighted_sum with a flat 0.5. The state dicts are read before;
the file merge reads its files from the page cache and writes its output, fsync included.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from harness import arguments, full_size_pair, measure, report

import blockmerge


def cpu_of(action: Callable[[], object]) -> float:
    """CPU seconds of this process that an action takes."""
    started = time.process_time()
    action()
    return time.process_time() - started


def main() -> None:
    chosen = arguments(__doc__ or "")
    with full_size_pair(chosen) as (a, b, output):
        c = output.with_name(f"{chosen.family}-c.safetensors")
        if not c.exists():
            from blockmerge.demo import write_pair

            write_pair(c, output.with_name("unused.safetensors"), chosen.family, full_size=True, seed=5)
            output.with_name("unused.safetensors").unlink()
        from safetensors.torch import load_file

        dicts = [{name: tensor.clone() for name, tensor in load_file(path).items()} for path in (a, b, c)]
        actions = {}
        for method, count in (("weighted_sum", 2), ("add_difference", 3)):

            def in_memory(method: str = method, count: int = count) -> object:
                return blockmerge.merge_state_dicts(*dicts[:count], method=method, weights=0.5)

            def of_files(method: str = method, count: int = count) -> object:
                files = (a, b, c)[:count]
                return blockmerge.merge(*files, output=output, method=method, weights=0.5, overwrite=True)

            actions[f"{method}, files"] = lambda run=of_files: cpu_of(run)
            actions[f"{method}, state dicts"] = lambda run=in_memory: cpu_of(run)
        seconds = measure(actions, chosen.rounds, lambda: None)
        report(seconds, ["weighted_sum, files", "add_difference, files"])


if __name__ == "__main__":
    main()

"""How long every method takes on full-size models, beside weighted_sum on the same files in the same minute,
and its memory.

    python benchmarks/methods.py [--family sd1] [--rounds 3] [--folder DIR] [--methods slerp,ties] \
        [--no-memory]

Every merge is of a flat weight of 0.5, of four models where a method takes any number, with torch loaded and
files warm; fsync included. CPU seconds are those of all threads, and of the system for them. Each is run
right after weighted_sum, `--rounds` times, and the ratio is the median of those within a round. Before them,
add_difference with the preset high_res is held against weighted_sum with it. Memory is as in merge.py. """

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

from harness import arguments, full_size_pair, peak_memory

from blockmerge.methods import METHODS

MEMORY = (
    "blockmerge.merge(*sys.argv[3:], output=sys.argv[1], method=sys.argv[2], weights=0.5, overwrite=True)"
)


def timed(files: list[Path], output: Path, method: str, **options: object) -> tuple[float, float]:
    """Seconds, and seconds of CPU."""
    import blockmerge

    output.unlink(missing_ok=True)
    started, cpu = time.perf_counter(), time.process_time()
    blockmerge.merge(*files[: METHODS[method].models or 4], output=output, method=method, **options)  # type: ignore[arg-type]
    return time.perf_counter() - started, time.process_time() - cpu


def beside_weighted_sum(
    files: list[Path], output: Path, method: str, rounds: int, **options: object
) -> tuple[float, ...]:
    """The medians of a method's seconds, of its CPU seconds, and of the ratios to weighted_sum's seconds just
    before.
    """
    run = partial(timed, files, output, **options)
    pairs = [(run(method="weighted_sum"), run(method=method)) for _ in range(rounds)]
    of_each = ((seconds, cpu, seconds / plain) for (plain, _), (seconds, cpu) in pairs)
    return tuple(map(statistics.median, zip(*of_each, strict=True)))


def main() -> None:
    chosen = arguments(
        __doc__ or "",
        methods={"default": ",".join(METHODS), "help": "only these, separated by commas"},
        no_memory={"action": "store_true", "help": "times only"},
    )
    with full_size_pair(chosen) as (a, b, output):
        files = [a, b, *(output.with_name(f"{chosen.family}-{letter}.safetensors") for letter in "cd")]
        if not all(file.exists() for file in files):
            from blockmerge.demo import write_pair

            write_pair(*files[2:], chosen.family, full_size=True, seed=5, overwrite=True)
        timed(files, output, "weighted_sum", weights=0.5)
        seconds, cpu, ratio = beside_weighted_sum(
            files, output, "add_difference", chosen.rounds, preset="high_res"
        )
        print(
            f"\nadd_difference with high_res: {seconds:.2f} s, {cpu:.2f} of CPU, {ratio:.2f} times "
            "weighted_sum with high_res\n"
        )
        print(
            "| method | models | locality | median s | CPU s | ÷ weighted_sum | more MB |\n|" + " --- |" * 7,
            flush=True,
        )
        for name in chosen.methods.split(","):
            method = METHODS[name]
            seconds, cpu, ratio = beside_weighted_sum(files, output, name, chosen.rounds, weights=0.5)
            more = ""
            if not chosen.no_memory:
                loaded, peak = peak_memory(MEMORY, output, name, *files[: method.models or 4])
                more = f"{peak - loaded:.0f}"
            print(
                f"| {name} | {method.models or 4} | {method.locality} | {seconds:.2f} | {cpu:.2f} | "
                f"{ratio:.2f} | {more} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

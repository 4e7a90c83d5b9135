"""smooth_add_difference beside scipy.ndimage's filters on the largest convolutions there are: time,
difference, memory.

    python benchmarks/smoothing.py [--shapes 320x320x3x3,1280x2560x3x3]

One thread each, fp16 tensors, filtered in float32 as in a merge and by scipy in float64. The difference is
the largest of any element, in parts of the largest of the delta B - C; it is to stay below 1e-5. Memory is
that of the method, beside the three models' tensors and the result.
"""

from __future__ import annotations

import argparse
import time
from math import prod
from pathlib import Path

import torch
from harness import machine, peak_memory
from scipy import ndimage

from blockmerge.methods.smoothing import smoothed_slabs

MEMORY = """
torch.set_num_threads(1)
from blockmerge.methods import METHODS
shape = [int(extent) for extent in sys.argv[1].split("x")]
tensors = [torch.randn(shape, dtype=torch.float16) for _ in range(4)]
METHODS["smooth_add_difference"].function(*tensors[:3], alpha=1.0, out=tensors[3])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="320x320x3x3,1280x1280x3x3,1280x2560x3x3")
    shapes = parser.parse_args().shapes.split(",")
    torch.set_num_threads(1)
    print(machine(Path()))
    print(
        "\n| shape | s | scipy s | ns an element | difference | MB beside the tensors |\n| --- | --- | --- | "
        "--- | --- | --- |"
    )
    for named in shapes:
        shape = [int(extent) for extent in named.split("x")]
        generator = torch.Generator().manual_seed(0)
        c = torch.randn(shape, generator=generator).mul_(0.02).half()
        b = torch.randn(shape, generator=generator).mul_(0.001).add_(c).half()
        found = torch.empty(shape)
        started = time.perf_counter()
        for rows, values in smoothed_slabs(b, c, torch.float32):
            found[rows] = values
        ours = time.perf_counter() - started
        delta = b.double().numpy() - c.double().numpy()
        started = time.perf_counter()
        wanted = ndimage.gaussian_filter(
            ndimage.median_filter(delta, size=3, mode="reflect"), 1.0, mode="reflect"
        )
        theirs = time.perf_counter() - started
        difference = abs(found.numpy() - wanted).max() / abs(delta).max()
        loaded, peak = peak_memory(MEMORY, named)
        count = prod(shape)
        more = peak - loaded - 4 * 2 * count / 1e6
        print(
            f"| {named} | {ours:.1f} | {theirs:.1f} | {ours / count * 1e9:.0f} | {difference:.1e} | "
            f"{more:.0f} |"
        )


if __name__ == "__main__":
    main()

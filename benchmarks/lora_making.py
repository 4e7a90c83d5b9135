"""Making LoRAs, against full singular value decompositions of the same matrices.

    python benchmarks/lora_making.py [--family sdxl] [--rounds 1] [--rank 32]

  full SVDs of differences   `torch.linalg.svd` of what extract takes apart, on all cores: of every `--each`th
                             layer, by size, scaled by rows · columns · min(rows, columns) to all
  extract                    blockmerge.extract_lora of B from A, in this process
  full SVDs of sums          both products of two LoRAs formed and added, and the SVD of that; scaled alike
  merge                      blockmerge.merge_loras of the two to the rank of one

Files are warm. Memory is the peak of a whole process beyond `import torch`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))

import blockmerge
from benchmarks.harness import arguments, full_size_pair, peak_memory
from benchmarks.lora import write_lora
from blockmerge.adapters import Target, targets_of
from blockmerge.anatomy import FAMILIES


def main() -> None:
    """Print the table."""
    chosen = arguments(__doc__ or "", rank={"type": int, "default": 32}, each={"type": int, "default": 40})
    with full_size_pair(chosen) as (a, b, output):
        loras = [a.parent / f"{chosen.family}-making{number}.safetensors" for number in range(2)]
        for number, lora in enumerate(loras):
            write_lora(lora, chosen.family, chosen.rank, seed=number)
        layers = sorted(linear_layers(chosen.family), key=lambda one: (cost(one.shape), one.ldm))
        modules = {name: cost(shape) for name, shape in shapes_of(loras[0]).items()}
        rank = chosen.rank

        def extract() -> None:
            blockmerge.extract_lora(b, a, output=output, rank=rank, conv_rank=rank, overwrite=True)

        def merge() -> None:
            blockmerge.merge_loras(loras, output=output, rank=rank, overwrite=True)

        actions: dict[str, Callable[[], float]] = {
            "full SVDs of differences": lambda: of_differences(a, b, layers, chosen.each),
            "extract": lambda: timed(extract),
            "full SVDs of sums": lambda: of_sums(loras, modules, chosen.each),
            "merge": lambda: timed(merge),
        }
        print("\n| what | median s | ÷ full SVDs |\n| --- | --- | --- |")
        before = 1.0
        for number, (name, action) in enumerate(actions.items()):
            seconds = statistics.median(action() for _ in range(chosen.rounds))
            print(
                f"| {name} | {seconds:.1f} | {seconds / before:.3f} |"
                if number % 2
                else f"| {name} | {seconds:.1f} | |"
            )
            before = seconds
        options = f"output=sys.argv[3], rank={rank}, overwrite=True"
        extracting = f"blockmerge.extract_lora(sys.argv[1], sys.argv[2], {options}, conv_rank={rank})"
        merging = f"blockmerge.merge_loras(sys.argv[1:3], {options})"
        for name, code, given in (("extract", extracting, (b, a)), ("merge", merging, loras)):
            loaded, peak = peak_memory(code, *given, output)
            print(f"memory beyond `import torch`, {name}: {peak - loaded:.0f} MB")
        for lora in loras:
            lora.unlink()


def timed(action: Callable[[], Any]) -> float:
    """The seconds that it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def cost(shape: tuple[int, ...]) -> float:
    """What the SVD of a weight takes, but for a factor."""
    rows, columns = shape[0], prod(shape[1:])
    return float(rows * columns * min(rows, columns))


def linear_layers(family: str) -> Iterable[Target]:
    """All layers of the U-Net and the text encoders that have a matrix, each once."""
    found = {one.ldm: one for one in targets_of(FAMILIES[family]).values() if one.place is None}
    return (one for one in found.values() if len(one.shape) > 1 and not one.ldm.startswith("first_stage"))


def of_differences(a: Path, b: Path, layers: list[Target], each: int) -> float:
    """Seconds of the full SVDs of B − A, float32, sampled."""
    spent = done = 0.0
    with safe_open(a, "pt") as first, safe_open(b, "pt") as second:
        names = set(first.keys())
        layers = [one for one in layers if one.ldm in names]
        for one in layers[each // 2 :: each]:
            difference = second.get_tensor(one.ldm).float() - first.get_tensor(one.ldm).float()
            spent += timed(partial(torch.linalg.svd, difference.flatten(1), full_matrices=False))
            done += cost(one.shape)
    return spent * sum(cost(one.shape) for one in layers) / done


def shapes_of(lora: Path) -> dict[str, tuple[int, ...]]:
    """{module: (rows, columns)} of a LoRA in kohya's spelling."""
    with safe_open(lora, "pt") as file:
        names = list(file.keys())
        return {
            name: (
                file.get_slice(f"{name}.lora_up.weight").get_shape()[0],
                prod(file.get_slice(f"{name}.lora_down.weight").get_shape()[1:]),
            )
            for name in (one.removesuffix(".alpha") for one in names if one.endswith(".alpha"))
        }


def of_sums(loras: list[Path], modules: dict[str, float], each: int) -> float:
    """Seconds of forming the products of both LoRAs, adding them and the full SVD, float32, sampled."""
    spent = done = 0.0
    by_cost = sorted(modules, key=lambda name: (modules[name], name))
    with safe_open(loras[0], "pt") as first, safe_open(loras[1], "pt") as second:
        for name in by_cost[each // 2 :: each]:
            factors = [
                (file.get_tensor(f"{name}.lora_up.weight").float().flatten(1),
                 file.get_tensor(f"{name}.lora_down.weight").float().flatten(1))
                for file in (first, second)
            ]  # fmt: skip

            def decompose(factors: list[tuple[torch.Tensor, torch.Tensor]] = factors) -> None:
                torch.linalg.svd(sum(up @ down for up, down in factors), full_matrices=False)

            spent += timed(decompose)
            done += modules[name]
    return spent * sum(modules.values()) / done


if __name__ == "__main__":
    main()

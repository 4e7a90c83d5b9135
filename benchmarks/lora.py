"""Baking LoRAs, against what converting costs, what their products alone cost, and what people do without it.

    python benchmarks/lora.py [--family sdxl] [--rounds 3] [--rank 32]

  convert           the same model written with nothing changed: what reading and writing cost
  products          the LoRA's products alone, `torch.mm(out=)` into one buffer again and again, on all cores
  load, add, save   a whole process: load_file of the model, W += (alpha / rank)·up @ down, save_file, fsync
  bake              blockmerge.bake in this process, fsync included

Files are warm. Rounds are in random order; ratios are the medians of those within a round. Memory is the peak
of a whole process beyond `import torch`.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import blockmerge
from benchmarks.harness import arguments, full_size_pair, peak_memory
from blockmerge.adapters import targets_of
from blockmerge.anatomy import FAMILIES

SCRIPT = """
import os, sys
import torch
from safetensors.torch import load_file, save_file
from blockmerge.adapters import targets_of
from blockmerge.anatomy import FAMILIES
model, lora, output, family = sys.argv[1:]
targets = targets_of(FAMILIES[family])
weights, factors = load_file(model), load_file(lora)
for name in [name.removesuffix(".alpha") for name in factors if name.endswith(".alpha")]:
    up, down = factors[name + ".lora_up.weight"].float(), factors[name + ".lora_down.weight"].float()
    weight = weights[targets[name].ldm]
    if targets[name].place is None:
        change = factors[name + ".alpha"].item() / len(down) * (up.flatten(1) @ down.flatten(1))
        weight += change.view(weight.shape).to(weight.dtype)
save_file(weights, output)
with open(output, "rb") as file:
    os.fsync(file.fileno())
"""


def main() -> None:
    """Print the table."""
    chosen = arguments(__doc__ or "", rank={"type": int, "default": 32})
    with full_size_pair(chosen) as (model, _, output):
        loras = [model.parent / f"{chosen.family}-lora{number}.safetensors" for number in range(3)]
        for number, lora in enumerate(loras):
            write_lora(lora, chosen.family, chosen.rank, seed=number)
        factors = [load_file(lora) for lora in loras]

        def bake(count: int) -> Callable[[], None]:
            return lambda: void(blockmerge.bake(model, loras[:count], output=output, overwrite=True))

        actions: dict[str, Callable[[], None]] = {
            "convert": lambda: void(blockmerge.convert(model, output, overwrite=True)),
            "products of one": lambda: products(factors[:1]),
            "products of three": lambda: products(factors),
            "load, add, save": lambda: script(model, loras[0], output, chosen.family),
            "bake one": bake(1),
            "bake three": bake(3),
        }
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        for number in range(chosen.rounds + 1):  # the first round warms up
            for name in random.sample(list(actions), len(actions)):
                output.unlink(missing_ok=True)
                started = time.perf_counter()
                actions[name]()
                if number:
                    seconds[name].append(time.perf_counter() - started)
        report(seconds)
        code = "blockmerge.bake(sys.argv[1], sys.argv[3:], output=sys.argv[2], overwrite=True)"
        for count in (1, 3):
            loaded, peak = peak_memory(code, model, output, *loras[:count])
            print(f"memory beyond `import torch`, {count}: {peak - loaded:.0f} MB")
        for lora in loras:
            lora.unlink()


def report(seconds: dict[str, list[float]]) -> None:
    """Print medians, and ratios to the larger of converting and the products."""
    print("\n| what | median s | ÷ max(convert, products) | ÷ load, add, save |\n| --- | --- | --- | --- |")
    for name, spent in seconds.items():
        of = "products of three" if name.endswith("three") else "products of one"
        least = [max(pair) for pair in zip(seconds["convert"], seconds[of], strict=True)]
        ratios = [
            statistics.median(a / b for a, b in zip(spent, base, strict=True))
            for base in (least, seconds["load, add, save"])
        ]
        print(f"| {name} | {statistics.median(spent):.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def write_lora(path: Path, family: str, rank: int, seed: int) -> None:
    """A LoRA for all linear layers that kohya's trainers adapt, in their spelling, with random values."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    seen = set()
    for name, target in targets_of(FAMILIES[family]).items():
        is_usual = name.startswith("lora_") and any(
            word in name for word in ("attn", "_ff_", "proj_in", "proj_out", "_mlp_")
        )
        if not is_usual or target in seen or len(target.shape) not in (2, 4):
            continue
        seen.add(target)
        rows, *inner = target.shape
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, rank, generator=generator).mul_(0.02).half()
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *inner, generator=generator).mul_(0.02).half()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, path)


def products(loras: list[dict[str, torch.Tensor]]) -> None:
    """All products of joined factors, one after the other into one buffer."""
    names = [name.removesuffix(".alpha") for name in loras[0] if name.endswith(".alpha")]
    buffer = torch.empty(0)
    for name in names:
        up = torch.cat([lora[f"{name}.lora_up.weight"].flatten(1).float() for lora in loras], 1)
        down = torch.cat([lora[f"{name}.lora_down.weight"].flatten(1).float() for lora in loras])
        count = len(up) * down.shape[1]
        if buffer.numel() < count:
            buffer = torch.empty(count)
        torch.mm(up, down, out=buffer[:count].view(len(up), -1))


def script(model: Path, lora: Path, output: Path, family: str) -> None:
    """Load all, add, save, in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, str(model), str(lora), str(output), family]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})


def void(_: object) -> None:
    """Nothing."""


if __name__ == "__main__":
    main()

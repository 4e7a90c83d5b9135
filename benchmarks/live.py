"""How long `LiveMerge.apply` takes, beside what the memory of the device allows.

    python benchmarks/live.py [--family sd1] [--dtype fp16] [--rounds 20] [--device cuda]

On a full-size U-Net of random weights, with `weighted_sum`:

  copy          one flat tensor of the U-Net's size into another: its bytes read and written are the copy
                bandwidth
  lerp          torch.lerp of two such tensors into a third, by hand
  all blocks    apply() of another weight for all blocks: A and B read, the U-Net written
  every other   apply() of a weight for one block and another for the next, so that no neighbours are done as
                one
  OUT05         apply() of another weight for that block alone

Each is timed with CUDA events after a warm-up, the device being busy until all is queued, and on other
devices by the clock; what is printed is the median. The share is of the copy bandwidth, for the bytes that
must move. `until queued` is how long the call itself keeps Python busy, which adds to the device's time where
that has nothing else to do.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import machine

import blockmerge
from blockmerge.anatomy import FAMILIES, UNET_PREFIX, layout

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="sd1", choices=list(FAMILIES))
    parser.add_argument("--dtype", default="fp16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    print(device_name(device))
    a, b = (random_unet(chosen.family, DTYPES[chosen.dtype], device, seed) for seed in (1, 2))
    live = blockmerge.LiveMerge(module_of(a), a, b)
    elements = sum(tensor.numel() for tensor in a.values())
    del a, b

    weights = itertools.cycle([0.25, 0.75])  # never what is there already
    other = itertools.cycle(
        [{block: number % 2 / 4 + shift for number, block in enumerate(live.weights)} for shift in (0.1, 0.6)]
    )
    copy, lerp = plain(elements, DTYPES[chosen.dtype], device, chosen.rounds)
    nbytes = elements * DTYPES[chosen.dtype].itemsize
    of_block = sum(
        count(shape) for name, shape in unet_shapes(chosen.family).items() if in_block(name, chosen.family)
    )
    share = of_block / elements
    bandwidth = 2 * nbytes / copy[0]
    print(
        f"{chosen.family}, {chosen.dtype}: {nbytes / 1e9:.2f} GB; copying goes at {bandwidth / 1e9:.0f} "
        "GB/s, read and written"
    )
    print(
        "\n| what | ms | GB moved | share of copy bandwidth | until queued ms |\n| --- | --- | --- | --- | "
        "--- |"
    )
    row("copy", copy, 2 * nbytes, bandwidth)
    row("lerp", lerp, 3 * nbytes, bandwidth)
    whole = timed(lambda: live.apply(weights=next(weights)), device, chosen.rounds)
    row("all blocks", whole, 3 * nbytes, bandwidth)
    row(
        "every other",
        timed(lambda: live.apply(weights=next(other)), device, chosen.rounds),
        3 * nbytes,
        bandwidth,
    )
    single = timed(lambda: live.apply(weights={"OUT05": next(weights)}, keep=True), device, chosen.rounds)
    row("OUT05", single, 3 * nbytes * share, bandwidth)
    print(
        f"\nall blocks ÷ lerp: {whole[0] / lerp[0]:.2f}; OUT05 ÷ its share of all blocks: "
        f"{single[0] / whole[0] / share:.2f}"
    )


def plain(
    elements: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Time a copy and a lerp of flat tensors."""
    first, second, third = (torch.zeros(elements, dtype=dtype, device=device) for _ in range(3))
    copy = timed(lambda: second.copy_(first), device, rounds)
    return copy, timed(lambda: torch.lerp(first, second, 0.3, out=third), device, rounds)


def timed(action: Callable[[], object], device: torch.device, rounds: int) -> tuple[float, float]:
    """Return the median seconds that an action takes on the device, and those until it returns."""
    spent, queued = [], []
    for number in range(rounds + 3):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            # The device is kept busy meanwhile, so that it is not the wait for Python that is measured.
            torch.cuda._sleep(5_000_000)
            begin.record()
            started = time.perf_counter()
            action()
            returned = time.perf_counter()
            end.record()
            torch.cuda.synchronize(device)
            seconds = begin.elapsed_time(end) / 1e3
        else:
            started = time.perf_counter()
            action()
            returned = time.perf_counter()
            seconds = returned - started
        if number >= 3:
            spent.append(seconds)
            queued.append(returned - started)
    return statistics.median(spent), statistics.median(queued)


def row(name: str, seconds: tuple[float, float], nbytes: float, bandwidth: float) -> None:
    spent, queued = seconds
    print(
        f"| {name} | {spent * 1e3:.3f} | {nbytes / 1e9:.3f} | {nbytes / spent / bandwidth:.0%} | "
        f"{queued * 1e3:.2f} |"
    )


def unet_shapes(family: str) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix(UNET_PREFIX): shape
        for name, shape in layout(family).items()
        if name.startswith(UNET_PREFIX)
    }


def random_unet(family: str, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(0.02)
        for name, shape in unet_shapes(family).items()
    }


def module_of(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module whose parameters have these names."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(tensor))
    return root


def in_block(name: str, family: str) -> bool:
    return blockmerge.block_of(name, family) == "OUT05"


def count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{machine(Path(tempfile.gettempdir()))}; {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
